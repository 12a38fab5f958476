"""Learned pads: a few of them stand for all those of a row that is filled with EOS."""
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from engine import padding
from engine.packing import Example, pack
from engine.train import Running, sft
from engine.update import FrozenHeadLoss
from lora import Adapters, Lora, Route
from model import load_pretrained
from tests.helpers import CASES, mixed_jobs

LORA = Lora(rank=8, alpha=16, targets=["q_proj", "v_proj"])
EOS = 2
ROW = 96        # tokens
CONTENT = 20


def loss_and_gradient(model, example):
    """Of a fresh adapter that learns this example: the loss, and a gradient (P,)."""
    adapters = Adapters(model, LORA, n=1)
    adapters.init(0, seed=0)
    adapters.flat.requires_grad_()
    running = Running(0, None, [example], iter([[0]]), first=0)
    step = pack([running], model.device, adapters.flat.dtype)

    with Route(adapters, step.segments, None):
        h = model.hidden(step.ids, step.ribbon.position, step.ribbon.attend)
        nll = FrozenHeadLoss.apply(h[step.source], model.lm_head.weight, step.labels)
        loss = (nll * step.weight).sum()
        loss.backward()
    return loss.item(), adapters.flat.grad[0]


def peft_loss_and_layers(folder, adapters, ids):
    """The same by transformers and PEFT, on the whole row: the loss, and the LoRA layers.

    The mask hides the pads, as in the official code, and they are labels all the same."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LORA.targets)
    reference = peft.get_peft_model(base, config)
    layers = [module for module in reference.modules() if hasattr(module, "lora_A")]
    for layer, (A, _) in zip(layers, adapters.pairs(adapters.flat)):
        layer.lora_A["default"].weight.data.copy_(A[0])

    row = torch.tensor([ids + [EOS] * (ROW - len(ids))])
    seen = (torch.arange(ROW) < CONTENT).long()[None]
    loss = reference(input_ids=row, attention_mask=seen, labels=row).loss
    loss.backward()
    return loss.item(), layers


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3"])
def test_learned_pads_are_those_of_a_padded_row(case, tmp_path):
    torch.manual_seed(5)
    CASES[case]().save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base", "cpu")
    adapters = Adapters(model, LORA, n=1)
    adapters.init(0, seed=0)
    ids = [*torch.randint(3, 320, (CONTENT,)).tolist(), EOS]
    plain = Example.of(ids, [True] * len(ids))

    loss, gradient = loss_and_gradient(model, padding.with_pads(plain, ROW, n_pads=1000))
    few_loss, few_gradient = loss_and_gradient(model, padding.with_pads(plain, ROW, n_pads=8))
    their_loss, layers = peft_loss_and_layers(tmp_path / "base", adapters, ids)

    # With every pad there, ours is theirs.
    assert loss == pytest.approx(their_loss, rel=1e-5)
    for layer, (_, B) in zip(layers, adapters.pairs(gradient[None])):
        theirs = layer.lora_B["default"].weight.grad
        torch.testing.assert_close(B[0], theirs, atol=1e-6, rtol=1e-3)
    # Eight stand for all, nearly. Random weights are the worst case; on SmolLM2 the cosine is .99.
    assert few_loss == pytest.approx(loss, rel=0.1)
    assert F.cosine_similarity(few_gradient, gradient, dim=0) > 0.9


# ------------------------------------------------------------------------------- in the engine

def test_padded_jobs_beside_others_equal_one_at_a_time(model64):
    """Padded and plain texts lie in one ribbon, which then has masks for all of them."""
    jobs = mixed_jobs(n=5)
    for i in (0, 2, 4):
        examples = []
        for ids, learn in jobs[i].examples:
            examples.append(([*ids, EOS], [*learn, True]))
        recipe = replace(jobs[i].recipe, pad_to=64)
        jobs[i] = replace(jobs[i], examples=examples, recipe=recipe)
    jobs = [replace(job, recipe=replace(job.recipe, slots=3)) for job in jobs]

    packed = dict(sft(model64, jobs))

    for i, job in enumerate(jobs):
        ((_, alone),) = sft(model64, [job])
        torch.testing.assert_close(packed[i].weights, alone.weights, atol=1e-12, rtol=0)


# ------------------------------------------------------------------------------- edges

def example_of(n, pad_to):
    """A text of n tokens and an EOS in a row of pad_to."""
    return Example.of([7] * n + [EOS], [True] * (n + 1), pad_to)


def test_without_pad_to_there_are_no_pads():
    whole = example_of(5, pad_to=0)

    assert whole.pads == 0
    assert whole.ids.tolist() == [7] * 5 + [EOS]
    assert whole.labels.tolist() == [7] * 4 + [EOS]
    assert whole.weight.tolist() == [1] * 5


def test_a_text_longer_than_the_row_is_cut_and_has_no_eos():
    cut = example_of(9, pad_to=8)

    assert cut.pads == 0
    assert cut.ids.tolist() == [7] * 8
    assert cut.labels.tolist() == [7] * 7


def test_a_text_that_fills_the_row_ends_with_its_eos():
    exact = example_of(7, pad_to=8)

    assert exact.pads == 0
    assert exact.ids.tolist() == [7] * 7 + [EOS]
    assert exact.labels.tolist() == [7] * 6 + [EOS]


def test_of_two_pads_one_predicts_the_other():
    one = example_of(6, pad_to=8)

    assert one.pads == 1
    assert one.position.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert one.labels.tolist() == [7] * 5 + [EOS] * 2
    assert one.weight.tolist() == [1] * 7


def test_eight_pads_are_spread_over_a_long_row_and_weigh_as_much_as_all():
    many = example_of(5, pad_to=2048)

    assert many.pads == 8
    assert many.labels[4:].tolist() == [EOS] * 9
    assert many.weight.sum() == 2047
    # They lie evenly, and none where the row ends: the last pad predicts nothing.
    gaps = many.position[5:].diff()
    assert gaps.max() - gaps.min() <= 1
    assert many.position[-1] < 2047
