"""Texts on the ribbon. Learned pads: a few stand for all those of a row filled with EOS."""
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from engine.ribbon import Example, pack, with_pads
from engine.train import FrozenHeadLoss, Running, sft
from lora import Adapters, Lora
from model import load_pretrained
from tests.helpers import mixed_jobs

LORA = Lora(rank=8, alpha=16, targets=["q_proj", "v_proj"])
EOS = 2
ROW = 96        # tokens
CONTENT = 20


def loss_and_gradient(model, adapters, example):
    """Of an adapter that learns this example: the loss, and a gradient (P,)."""
    adapters.flat.grad = None
    running = Running(0, None, [example], iter([[0]]), first=0)
    step = pack([running], model.device, adapters.flat.dtype)
    with adapters.route(step.segments):
        h = model.hidden(step.ids, step.ribbon.position, step.ribbon.attend)
        nll = FrozenHeadLoss.apply(h[step.source], model.lm_head.weight, step.labels)
        loss = (nll * step.weight).sum()
        loss.backward()
    return loss.item(), adapters.flat.grad[0]


def peft_loss_and_layers(base, adapter, ids):
    """The same by transformers and PEFT, on the whole row: the loss, and the LoRA layers. The mask
    hides the pads, as in the official code, and they are labels all the same."""
    reference = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter,
                                               is_trainable=True)
    row = torch.tensor([ids + [EOS] * (ROW - len(ids))])
    seen = (torch.arange(ROW) < CONTENT).long()[None]
    loss = reference(input_ids=row, attention_mask=seen, labels=row).loss
    loss.backward()
    return loss.item(), [module for module in reference.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize("peer", ["llama3", "qwen2", "qwen3"], indirect=True)
def test_learned_pads_are_those_of_a_padded_row(peer, tmp_path):
    base, _ = peer
    model = load_pretrained(base, "cpu")
    adapters = Adapters(model, LORA, n=1)
    adapters.init(0, seed=0)
    adapters.save(0, tmp_path / "adapter")
    adapters.flat.requires_grad_()
    ids = [*torch.randint(3, 320, (CONTENT,)).tolist(), EOS]
    plain = Example.of(ids, [True] * len(ids))

    every_pad = with_pads(plain, ROW, n_pads=1000)
    loss, gradient = loss_and_gradient(model, adapters, every_pad)
    few_pads = with_pads(plain, ROW, n_pads=8)
    few_loss, few_gradient = loss_and_gradient(model, adapters, few_pads)
    their_loss, layers = peft_loss_and_layers(base, tmp_path / "adapter", ids)

    assert loss == pytest.approx(their_loss, rel=1e-5)
    for layer, (_, B) in zip(layers, adapters.pairs(gradient[None])):
        theirs = layer.lora_B["default"].weight.grad
        torch.testing.assert_close(B[0], theirs, atol=1e-6, rtol=1e-3)
    # Eight stand for all, nearly. Random weights are the worst case; on SmolLM2 the cosine is .99.
    assert few_loss == pytest.approx(loss, rel=0.1)
    assert F.cosine_similarity(few_gradient, gradient, dim=0) > 0.9


def test_padded_jobs_beside_others_equal_one_at_a_time(model64):
    jobs = mixed_jobs(n=5)
    for i, job in enumerate(jobs):
        examples = [([*ids, EOS], [*learn, True]) for ids, learn in job.examples]
        recipe = replace(job.recipe, pad_to=[64, 0][i % 2], slots=3)
        jobs[i] = replace(job, examples=examples, recipe=recipe)
    packed = dict(sft(model64, jobs))
    for i, job in enumerate(jobs):
        ((_, alone),) = sft(model64, [job])
        torch.testing.assert_close(packed[i].weights, alone.weights, atol=1e-12, rtol=0)


@pytest.mark.parametrize("n, pad_to, content, pads, weight", [
    (5, 0, 6, 0, 1),        # without a row to fill there are no pads
    (9, 8, 8, 0, 1),        # a text longer than the row is cut, and has no EOS
    (7, 8, 8, 0, 1),        # one that fills the row ends with its EOS
    (6, 8, 6, 1, 1),        # of two pads one predicts the other
    (5, 2048, 5, 8, 2042 / 8)])     # eight pads weigh as much as all
def test_pads_fill_a_row(n, pad_to, content, pads, weight):
    """A text of n tokens and an EOS, in a row of pad_to."""
    text = ([7] * n + [EOS])[:content]
    example = Example.of([7] * n + [EOS], [True] * (n + 1), pad_to)
    assert example.pads == pads
    assert example.ids.tolist() == text + [EOS] * pads
    # Each token predicts the next, the last of the content the first EOS; each pad predicts one.
    first = [EOS] if pads else []
    assert example.labels.tolist() == text[1:] + first + [EOS] * pads
    assert example.weight.tolist() == [1] * (content - 1 + len(first)) + [weight] * pads
    assert example.position[:content].tolist() == list(range(content))
    # Pads lie evenly, and none where the row ends: the last pad predicts nothing.
    positions = example.position[content:]
    assert all(content <= position < pad_to - 1 for position in positions)
    if pads > 1:
        gaps = positions.diff()
        assert gaps.max() - gaps.min() <= 1
