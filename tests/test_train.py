"""The engine: many adapters at once are the same as one at a time, as sft_one's, and as PEFT's."""
import gc
import weakref
from dataclasses import replace
from unittest.mock import Mock

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (AutoModelForCausalLM, get_cosine_schedule_with_warmup,
                          get_linear_schedule_with_warmup)

from engine import train as engine
from engine.ribbon import next_size
from engine.train import FrozenHeadLoss, adamw_, sft
from lora import Adapters, Job, Lora, sft_one
from model import load_pretrained
from support.files import UserError
from tests.helpers import ALL, CASES, RECIPE, mixed_jobs

SOME = ["q_proj", "v_proj"]
SCHEDULES = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}


@pytest.fixture(scope="module")
def model32(tiny_folder):
    return load_pretrained(tiny_folder, "cpu")


def train(model, jobs, slots=0):
    """What the engine makes of some jobs: {number: Trained}."""
    jobs = [replace(job, recipe=replace(job.recipe, slots=slots)) for job in jobs]
    return dict(sft(model, jobs))


def train_alone(model, jobs):
    """The same by the engine, but one job at a time."""
    return {i: train(model, [job])[0] for i, job in enumerate(jobs)}


def weights(trained):
    """(n, P), in the order of the jobs' numbers."""
    return torch.stack([trained[i].weights for i in sorted(trained)])


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
@pytest.mark.parametrize("which, targets, tolerance", [
    ("model64", SOME, 1e-12), ("model64", ALL, 1e-12),
    ("model32", ALL, 5e-5)])    # multiplies by grouped_mm; float64 does so in padded batches
def test_many_at_once_equal_one_at_a_time(which, targets, tolerance, seed, request):
    model = request.getfixturevalue(which)
    recipe = replace(RECIPE, lora=replace(RECIPE.lora, targets=targets))
    assert recipe.lora.adapters(model, 1).grouped == (which == "model32")
    jobs = mixed_jobs(seed, recipe=recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    # Three slots for seven jobs: slots are refilled, and empty towards the end.
    packed = train(model, jobs, slots=3)
    alone = train_alone(model, jobs)

    assert packed.keys() == alone.keys()
    assert difference(weights(packed), weights(alone)) <= tolerance
    naive = torch.stack([sft_one(model, job).weights for job in jobs])
    assert difference(weights(packed), naive) <= tolerance
    for i, job in enumerate(jobs):
        assert len(packed[i].losses) == job.steps
        assert packed[i].losses == pytest.approx(alone[i].losses, abs=tolerance, rel=0)
    assert weights(packed).abs().max() > 0.02
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("which, lr, tolerance", [("model64", 1e200, 1e-12),
                                                  ("model32", 1e30, 1e-5)])
def test_a_diverging_adapter_harms_no_other(which, lr, tolerance, request):
    model = request.getfixturevalue(which)
    jobs = mixed_jobs()
    alone = train_alone(model, jobs)
    # The longest job begins first, so that others go on beside it once it has diverged.
    jobs[1] = replace(jobs[1], recipe=replace(RECIPE, lr=lr, epochs=9, batch=1))
    packed = train(model, jobs, slots=3)
    assert packed[1].diverged
    assert list(sft(model, [])) == []
    del packed[1], alone[1]
    assert not any(trained.diverged for trained in packed.values())
    assert difference(weights(packed), weights(alone)) <= tolerance


def train_by_peft(reference, job):
    """The last loss of the usual loop: padded batches, torch's AdamW, transformers' schedule."""
    recipe = job.recipe
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = SCHEDULES[recipe.schedule](optimizer, recipe.warmup, job.steps)
    for batch in job.micro_batches():
        texts = [torch.tensor(job.examples[e][0]) for e in batch]
        masks = [torch.tensor(job.examples[e][1]) for e in batch]
        ids = pad_sequence(texts, batch_first=True)
        learn = pad_sequence(masks, batch_first=True)[:, 1:]
        seen = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)

        logits = reference(ids, attention_mask=seen).logits
        loss = F.cross_entropy(logits[:, :-1][learn], ids[:, 1:][learn])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        schedule.step()
    return loss.item()


@pytest.mark.parametrize("case, targets", [("llama3", ALL), ("qwen2", ALL), ("qwen3", SOME),
                                           ("qwen3", ALL)])
def test_engine_equals_peft_and_torch_optim(case, targets, tmp_path):
    torch.manual_seed(4)
    CASES[case]().save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base", "cpu")
    lora = Lora(rank=4, alpha=8, targets=targets)
    recipe = replace(RECIPE, lora=lora, weight_decay=0.1)
    jobs = mixed_jobs(n=4, shortest=20, recipe=recipe)

    ours = train(model, jobs, slots=3)

    adapters = Adapters(model, lora, n=2)
    for i, job in enumerate(jobs):
        adapters.init(0, job.seed)
        adapters.save(0, tmp_path / f"start-{i}")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        reference = peft.PeftModel.from_pretrained(base, tmp_path / f"start-{i}", is_trainable=True)
        last_loss = train_by_peft(reference, job)

        adapters.flat[1] = ours[i].weights
        adapters.save(1, tmp_path / f"end-{i}")
        end = load_file(tmp_path / f"end-{i}" / "adapter_model.safetensors")
        theirs = peft.get_peft_model_state_dict(reference)
        torch.testing.assert_close(end, dict(theirs), atol=5e-5, rtol=0)
        assert ours[i].losses[-1] == pytest.approx(last_loss, abs=5e-4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup, steps", [(11, 40), (0, 7), (11, 5)])
def test_schedules_are_those_of_transformers(name, warmup, steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    theirs = SCHEDULES[name](optimizer, warmup, steps)
    recipe = replace(RECIPE, lr=0.3, epochs=1, batch=1, schedule=name, warmup=warmup)
    job = Job([([1], [True])] * steps, seed=0, recipe=recipe)
    for step in range(job.steps):
        assert job.lr_at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_an_epoch_has_every_example_once_in_an_order_of_its_own():
    job = Job([([1], [True])] * 10, seed=0, recipe=replace(RECIPE, epochs=3, batch=4))
    batches = list(job.micro_batches())
    assert job.steps == 9
    assert [len(batch) for batch in batches] == [4, 4, 2] * 3
    epochs = [sum(batches[i:i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(job.micro_batches()) == batches
    assert list(replace(job, seed=1).micro_batches()) != batches


def test_frozen_head_loss_is_cross_entropy():
    vocab = 2 ** 19     # so large that its logits are made 32 tokens at a time: 50 are two chunks
    h = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, 4, dtype=torch.float64)
    labels = torch.randint(0, vocab, (50,))
    scale = torch.rand(50, dtype=torch.float64)
    ours = FrozenHeadLoss.apply(h, weight, labels)
    theirs = F.cross_entropy(h @ weight.T, labels, reduction="none")
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    gradients = [torch.autograd.grad((loss * scale).sum(), h)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-9)


def test_bf16_agrees_with_float32(model32, tiny_folder):
    jobs = mixed_jobs(seed=2, n=3)
    half = load_pretrained(tiny_folder, "cpu", torch.bfloat16)
    expected = train(model32, jobs, slots=3)
    rounded = train(half, jobs, slots=3)
    # bfloat16 rounds by up to 0.2 %. Training moves a loss by a fifth.
    for i in expected:
        assert rounded[i].losses == pytest.approx(expected[i].losses, rel=0.01)
    assert expected[0].losses[-1] < 0.9 * expected[0].losses[0]


def test_a_step_of_many_adapters_is_torchs_of_each_and_writes_the_copy_that_products_read():
    """On a GPU one call updates all adapters: with a norm, a rate and a step number of each."""
    values = torch.randn(3, 50, dtype=torch.float64)
    scale = torch.tensor([[0.01], [1.0], [9.0]])     # the first gradient is too short to be clipped
    gradients = [(scale * torch.randn(3, 50)).bfloat16() for _ in range(4)]
    rates = torch.tensor([[0.1], [0.01], [0.03]], dtype=torch.float64)
    first = torch.tensor([[0], [1], [2]])       # the step at which an adapter begins

    ours, m, v = values.clone(), torch.zeros(3, 50).double(), torch.zeros(3, 50).double()
    copy = torch.zeros(3, 50, dtype=torch.bfloat16)
    for step, gradient in enumerate(gradients):
        started = (step >= first).double()
        t = (step + 1 - first).clamp(min=1).double()
        adamw_(ours, gradient * started.bfloat16(), m, v, rates * started, t, copy, clip=1.0,
               weight_decay=0.1)

    for i in range(3):
        parameter = values[i].clone().requires_grad_()
        optimizer = torch.optim.AdamW([parameter], lr=rates[i].item(), weight_decay=0.1)
        for gradient in gradients[i:]:
            parameter.grad = gradient[i].double()
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
        torch.testing.assert_close(ours[i], parameter.detach(), atol=1e-12, rtol=0)
    assert torch.equal(copy, ours.bfloat16())


def test_edits_on_top_of_each_other_are_as_if_merged(model64, tiny_folder):
    """Two adapters of rank 4 lie side by side in one of rank 8. The second is trained beside the
    first, which is fixed."""
    narrow = replace(RECIPE.lora, rank=4, alpha=8)
    merged = load_pretrained(tiny_folder, "cpu", torch.float64)
    stack = Adapters(model64, RECIPE.lora, n=1)
    for k, job in enumerate(mixed_jobs(n=2)):
        alone = Adapters(merged, narrow, n=1)
        alone.init(0, job.seed)
        fresh = torch.zeros_like(stack.flat)
        rows = slice(4 * k, 4 * k + 4)
        for (A, B), (new_A, new_B) in zip(stack.pairs(fresh), alone.pairs(alone.flat)):
            A[:, rows] = new_A
            B[:, :, rows] = new_B
        mask = torch.zeros_like(stack.flat, dtype=torch.bool)
        for A, B in stack.pairs(mask):
            A[:, rows] = B[:, :, rows] = True

        (start,), (free,) = stack.flat + fresh, mask
        trained = train(model64, [replace(job, start=start, free=free)])[0]
        assert torch.equal(trained.weights[~free], stack.flat[0][~free])
        assert difference(trained.weights[free], start[free]) > 5e-4
        stack.flat[0] = trained.weights

        recipe = replace(job.recipe, lora=narrow)
        alone.flat[0] = train(merged, [replace(job, recipe=recipe)])[0].weights
        alone.merge(0)
        ids = torch.randint(0, 256, (1, 30))
        with stack.route([30]):
            torch.testing.assert_close(model64(ids), merged(ids), atol=1e-9, rtol=0)


@pytest.mark.parametrize("slots", [1, 3])
def test_steps_that_are_filled_up_for_graphs_train_the_same(model64, monkeypatch, slots):
    """What graphs do to shapes, without a GPU. tests/test_gpu.py records them."""
    jobs = mixed_jobs(n=9, recipe=replace(RECIPE, epochs=4))
    expected = train(model64, jobs, slots)
    shapes = []

    def run(self, compute, step):
        shapes.append(tuple(tensor.shape for tensor in step.tensors()))
        return compute(step)
    monkeypatch.setattr(engine, "has_graphs", lambda device: True)
    monkeypatch.setattr(engine, "can_record", lambda *_: True)
    monkeypatch.setattr(engine.Recorded, "__call__", run)

    filled = train(model64, jobs, slots)

    assert difference(weights(filled), weights(expected)) < 1e-12
    for i in filled:
        assert filled[i].losses == pytest.approx(expected[i].losses)
    for ids, bounds, *_ in shapes:
        assert ids[0] == next_size(ids[0])
        assert bounds[0] >= slots * 3 + 1       # batches of three texts, and what is added


@pytest.mark.parametrize("n, rounded", [(1, 256), (256, 256), (257, 512), (4096, 4096),
                                        (4097, 4608), (8000, 8192)])
def test_sizes_are_rounded_up_by_an_eighth_or_to_256(n, rounded):
    assert next_size(n) == rounded


def test_only_jobs_of_fixed_shapes_are_recorded(model32, monkeypatch):
    adapters = Adapters(model32, RECIPE.lora, 2)
    jobs = mixed_jobs(n=2)
    assert not engine.can_record(adapters, jobs)     # a CPU has no flash attention
    monkeypatch.setattr(engine, "has_flash", lambda x: True)
    assert engine.can_record(adapters, jobs)
    for changes in ({"recipe": replace(RECIPE, pad_to=64)},
                    {"free": torch.ones(adapters.flat.shape[1], dtype=torch.bool)}):
        assert not engine.can_record(adapters, [*jobs, replace(jobs[0], **changes)])


def test_a_trainer_that_ends_leaves_no_memory_behind(model32, monkeypatch):
    """Its graphs hold memory of the device, so it must not wait for the garbage collector."""
    engines = []
    take_jobs = engine.Engine.take_jobs

    def watched(self, *args):
        engines.append(weakref.ref(self))
        return take_jobs(self, *args)
    monkeypatch.setattr(engine.Engine, "take_jobs", watched)
    gc.disable()
    try:
        train(model32, mixed_jobs(n=2))
        assert engines[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("is_full, error, line", [
    (lambda steps, model: len(steps) > 2 and 3 in steps,
     torch.OutOfMemoryError("CUDA out of memory"), "going on with 2 adapters"),
    # With one slot left.
    (lambda steps, model: not model.recompute,
     RuntimeError("DefaultCPUAllocator: can't allocate memory"),
     "going on with recomputed activations")], ids=["slots", "recompute"])
def test_out_of_memory_goes_on_with_less_and_changes_nothing(is_full, error, line, model64,
                                                             monkeypatch, capsys):
    jobs = mixed_jobs(recipe=replace(RECIPE, slots=4))
    expected = weights(train(model64, jobs, slots=4))
    pack, heard = engine.pack, []

    def in_little(running, *where):
        if is_full([run.step for run in running if run], model64):
            raise error
        return pack(running, *where)
    monkeypatch.setattr(engine, "pack", in_little)

    trained = dict(sft(model64, jobs, lambda *counts: heard.append(counts)))

    assert line in capsys.readouterr().out.splitlines()[-1]
    assert difference(weights(trained), expected) <= 1e-12
    assert heard[-1] == (sum(job.steps for job in jobs),) * 2
    assert model64.recompute is False       # as before


@pytest.mark.parametrize("error, kind, words", [
    (torch.OutOfMemoryError(), UserError, "smaller batch or shorter documents"),
    (RuntimeError("shapes differ"), RuntimeError, "shapes differ")])
def test_what_neither_slots_nor_recomputing_mend_is_raised(error, kind, words, model64,
                                                           monkeypatch):
    monkeypatch.setattr(engine, "pack", Mock(side_effect=error))
    with pytest.raises(kind, match=words):
        train(model64, mixed_jobs(), slots=4)
    assert model64.recompute is False
