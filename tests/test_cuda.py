"""What only a GPU can show. Skipped without one:

    python -m pytest -q -s tests/test_cuda.py
"""
import time
import warnings
from dataclasses import replace

import pytest
import torch

from engine import decode
from engine.decode import Sampling
from engine.gpu import compiled
from engine.memory import step_memory
from engine.ribbon import Ribbon
from engine.train import sft
from engine.update import adamw_
from lora import Adapters, Job, Lora, PROJECTIONS, Recipe
from model import load_pretrained
from tests.helpers import mixed_jobs
from tests.make_checkpoint import make_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SHAPE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
             head_dim=64, num_hidden_layers=4)
RECIPE = Recipe(Lora(rank=8, alpha=16, targets=PROJECTIONS), lr=1e-3, epochs=3, batch=2)
STOP = frozenset(range(0, 264, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("models") / "cuda", **SHAPE)


@pytest.fixture()
def model(folder):
    return load_pretrained(folder, "cuda", torch.bfloat16)


def train(model, jobs, slots):
    """{number: Trained} of jobs, so many side by side."""
    return dict(sft(model, [replace(job, recipe=replace(job.recipe, slots=slots)) for job in jobs]))


def all_losses(trained):
    losses = []
    for number in sorted(trained):
        losses += trained[number].losses
    return torch.tensor(losses)


def random_adapters(model, n, lora=RECIPE.lora, std=0.1):
    adapters = Adapters(model, lora, n)
    adapters.flat.normal_(std=std, generator=torch.Generator("cuda").manual_seed(0))
    return adapters


# ------------------------------------------------------------------------------- training

def test_a_new_shape_costs_no_plan(model):
    """cuDNN's attention would build a plan of a second for each new shape."""
    seconds = []
    for n in (33, 34, 35, 36, 37, 38):
        ids = torch.randint(0, 256, (3 * n,), device="cuda")
        ribbon = Ribbon([n, n + 1, n - 1], "cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.hidden(ids, ribbon.position, ribbon.attend)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)

    assert sorted(seconds)[3] < 0.05


@pytest.mark.parametrize("rank", [8, 32, 64])
def test_grouped_products_equal_padded_ones(model, rank):
    ids = torch.randint(0, 256, (24,), device="cuda")
    ribbon = Ribbon([5, 11, 8], "cuda")
    found = []
    for grouped in (True, False):
        adapters = random_adapters(model, 5, Lora(rank, 16, PROJECTIONS), std=0.05)
        adapters.grouped = grouped
        adapters.flat.requires_grad_()
        with adapters.route([16, 0, 8, 0, 0]):
            h = model.hidden(ids, ribbon.position, ribbon.attend)
            h.float().square().mean().backward()
        # An empty segment has no gradient, nor garbage.
        assert not adapters.flat.grad[[1, 3, 4]].any()
        found.append((h.detach().float(), adapters.flat.grad))

    for ours, theirs in zip(*found):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_many_at_once_as_one_at_a_time(model):
    jobs = mixed_jobs(n=12)
    packed = all_losses(train(model, jobs, slots=5))
    alone = all_losses(train(model, jobs, slots=1))

    assert (packed - alone).abs().max() < 0.1


def test_graphs_train_the_same(model, monkeypatch):
    """All steps of jobs of like lengths have a few shapes."""
    jobs = [Job([([5 + i + k] * 30, [True] * 30) for k in range(4)], i, RECIPE) for i in range(12)]
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: (replays.append(g), replay(g)))
    with_graphs = train(model, jobs, slots=5)
    monkeypatch.setenv("NANOSEAL_NO_GRAPHS", "1")

    without = train(model, jobs, slots=5)

    assert len(replays) > 5
    assert (all_losses(with_graphs) - all_losses(without)).abs().max() < 0.1
    for i in without:
        moved = (with_graphs[i].weights - without[i].weights).norm()
        assert moved < 0.1 * without[i].weights.norm()


@pytest.mark.parametrize("n, P", [(3, 5000), (64, 4096), (1, 70000), (7, 4096)])
def test_the_compiled_update_is_the_plain_one(n, P):
    state = [torch.randn(n, P, device="cuda") for _ in range(4)]
    state[3].abs_()
    lr = torch.full((n, 1), 1e-3, device="cuda")
    t = torch.tensor([[1.0 + i % 4] for i in range(n)], device="cuda")
    plain = [x.clone() for x in state]
    fast = [x.clone() for x in state]

    settings = dict(clip=1.0, weight_decay=0.01)
    adamw_(*plain, lr, t, plain[0], **settings)
    compiled(adamw_)(*fast, lr, t, fast[0], **settings)

    for ours, theirs in zip(fast, plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_step_waits_for_nothing(model):
    """Only where a job ends is something read back from the device."""
    train(model, mixed_jobs(n=3), slots=3)      # compiles
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(model, mixed_jobs(n=6), slots=3)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    places = set()
    for warning in heard:
        if "synchron" in str(warning.message):
            places.add(f"{warning.filename.rsplit('/', 1)[-1]}:{warning.lineno}")
    print("waits at", sorted(places))
    assert len(places) <= 3


def test_memory_is_as_reckoned_and_running_out_halves_the_slots(model, capsys):
    examples = [([5] * 400, [True] * 400)] * 2
    jobs = [Job(examples, i, replace(RECIPE, epochs=1, batch=1)) for i in range(16)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    train(model, jobs, slots=16)

    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak {peak / 2 ** 20:.0f} MiB, formula "
          f"{step_memory(model, RECIPE.lora, 16, 16 * 400) / 2 ** 20:.0f} MiB")

    # The same with half of that memory.
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    allowed = torch.cuda.memory_reserved() + 0.5 * peak
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        trained = train(model, jobs, slots=16)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(trained) == 16
    assert "out of memory: going on with" in capsys.readouterr().out


# ------------------------------------------------------------------------------- decoding

PROMPTS = [[i, i + 1] for i in range(9)] + [[7] * 300]


@pytest.mark.parametrize("case", ["sampled", "adapters"])
def test_graphs_change_nothing(model, monkeypatch, case):
    if case == "sampled":
        groups, adapters = [PROMPTS], None
        sampling = Sampling(60, n=2, temperature=1.0, top_p=0.9, stop=STOP, max_rows=8)
    else:
        groups, adapters = [PROMPTS[:5], PROMPTS[5:]], random_adapters(model, 2)
        sampling = Sampling(60, stop=STOP, max_rows=6)
    with_graphs = decode.generate(model, groups, sampling, range(20), adapters)

    monkeypatch.setattr(decode, "has_graphs", lambda device: False)

    assert decode.generate(model, groups, sampling, range(20), adapters) == with_graphs
