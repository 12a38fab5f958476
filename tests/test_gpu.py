"""What a GPU does otherwise, as far as a CPU can tell: graphs of torch.compile by a backend that
only traces, flash attention by its schema and by a plain product in its place.

The last two sections are what only a GPU can show. They are skipped without one:

    python -m pytest -q -s tests/test_gpu.py
"""
import time
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import lora
import model as transformer
from engine import decode, device
from engine import ribbon as ribbon_file
from engine import train as train_file
from engine.decode import Sampling
from engine.device import compiled, flash_attention
from engine.ribbon import PaddedRibbon, Ribbon
from engine.train import adamw_, sft
from lora import Adapters, Job, Lora, PROJECTIONS, Recipe
from model import load_pretrained
from tests.helpers import ALL, CASES, STOP, generate, mixed_jobs, random_adapters, work
from tests.make_checkpoint import make_checkpoint
from tests.strict import may_stay_unused


def train(model, jobs, slots=3):
    return dict(sft(model, [replace(job, recipe=replace(job.recipe, slots=slots)) for job in jobs]))


@pytest.fixture()
def trace(monkeypatch):
    """A function: from then on, whatever is compiled on CUDA is traced here. It returns a counter
    of graphs."""
    counter = CompileCounterWithBackend("eager")
    compiled = {}

    @may_stay_unused        # decoding has no update
    def traced(function, x):
        if function not in compiled:
            compiled[function] = torch.compile(function, dynamic=True, backend=counter)
        return compiled[function]

    def start():
        monkeypatch.setattr(transformer, "fused", traced)
        monkeypatch.setattr(train_file, "fused", traced)
        return counter
    torch._dynamo.reset()
    yield start
    torch._dynamo.reset()


# ------------------------------------------------------------------------------- compiled pieces

@pytest.mark.parametrize("dtype, grouped", [("bfloat16", True), ("float32", False)])
def test_four_graphs_serve_all_layers(tiny_folder, trace, monkeypatch, dtype, grouped):
    """rotate, swiglu, the loss and AdamW, whatever the layers, tokens and adapters' segments."""
    monkeypatch.setattr(lora, "has_grouped_mm", lambda *_: grouped)
    model = load_pretrained(tiny_folder, "cpu", getattr(torch, dtype))
    jobs = mixed_jobs(n=8)
    expected = train(model, jobs)
    counter = trace()
    trained = train(model, jobs)
    assert counter.frame_count == 4
    for i in expected:
        torch.testing.assert_close(trained[i].weights, expected[i].weights, atol=2e-3, rtol=0)


def test_few_graphs_serve_all_grids_of_a_decoding(tiny, trace):
    adapters = random_adapters(tiny, 4, Lora(4, 8, ALL), std=0.05)      # rank 4: padded products
    groups = [[[i, i + j + 1] * (j + 1) for j in range(6)] for i in range(4)]
    how = (groups, Sampling(40, stop=STOP, max_rows=16), None, adapters)
    expected = generate(tiny, *how)
    counter = trace()
    assert generate(tiny, *how) == expected
    # rotate and swiglu, of one row and of many.
    assert counter.frame_count <= 6


def test_every_kind_of_model_can_be_traced(peer, trace):
    model = load_pretrained(peer[0], "cpu")
    ids = torch.randint(0, 320, (2, 11))
    expected = model(ids)
    counter = trace()
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-3)
    assert counter.frame_count == 2


# ------------------------------------------------------------------------------- flash attention

def by_sequence(q, k, v, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, debug,
                seqused_k):
    """What aten's flash attention computes, a sequence at a time."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32
    lengths, seen = bounds_q.diff(), bounds_k.diff() if seqused_k is None else seqused_k
    assert (bounds_q[0], sum(lengths), longest_q) == (0, len(q), max(lengths))
    assert (dropout, debug) == (0.0, False) and 0 < min(seen) and max(seen) <= longest_k
    outputs = []
    for own, begin, n in zip(q.split(lengths.tolist()), bounds_k.tolist(), seen.tolist()):
        heads_first = [x.transpose(0, 1) for x in (own, k[begin:begin + n], v[begin:begin + n])]
        y = F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)
        outputs.append(y.transpose(0, 1))
    return torch.cat(outputs), None, None, None, None


def test_flash_attention_takes_the_ribbon_as_it_lies_but_for_imitated_pads(tiny, monkeypatch):
    lengths = [5, 40, 1, 17]
    ids = torch.randint(0, 256, (sum(lengths),))
    ribbon, called = Ribbon(lengths, "cpu"), []
    expected = tiny.hidden(ids, ribbon.position, ribbon.attend)

    def op(*args, **seen):
        called.append(args)
        return by_sequence(*args, **seen)

    monkeypatch.setattr(ribbon_file, "has_flash", lambda x: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", op)
    h = tiny.hidden(ids, ribbon.position, ribbon.attend)

    assert len(called) == tiny.config.n_layer
    torch.testing.assert_close(h, expected, atol=1e-5, rtol=1e-4)
    ribbon = PaddedRibbon([5, 7], [2, 0], torch.arange(12), "cpu")
    tiny.hidden(ids[:12], ribbon.position, ribbon.attend)
    assert len(called) == tiny.config.n_layer


def test_torch_knows_this_flash_attention_and_its_gradient():
    q, k, v = (torch.empty(9, heads, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
               for heads in (4, 2, 2))
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    y = flash_attention(q, k, v, [bounds] * 2, [6] * 2)
    y.sum().backward()
    assert y.shape == q.shape
    assert [x.grad.shape for x in (q, k, v)] == [q.shape, k.shape, v.shape]


# ------------------------------------------------------------------------------- fewer kernels

@pytest.fixture()
def fewer(monkeypatch):
    """A function: from then on there are as few kernels as on CUDA."""
    def start():
        for file in (device, ribbon_file):
            monkeypatch.setattr(file, "few_kernels", may_stay_unused(lambda x: True))
        monkeypatch.setattr(device, "compiled", lambda function: function)
    return start


@pytest.mark.parametrize("case", CASES)
def test_fewer_kernels_compute_the_same(case, tmp_path, fewer):
    """Training and texts of every kind of model, with adapters at some layers or at all of them."""
    lora = Lora(4, 12, ALL if "tied" in case else ["q_proj", "v_proj"])
    CASES[case]().save_pretrained(tmp_path / "base")
    plain = load_pretrained(tmp_path / "base", "cpu", torch.float64)
    joined = load_pretrained(tmp_path / "base", "cpu", torch.float64)
    jobs = mixed_jobs(n=4, recipe=replace(RECIPE, lora=lora))
    expected = train(plain, jobs), texts(plain, lora)
    fewer()
    trained, written = train(joined, jobs), texts(joined, lora)
    for i in expected[0]:
        torch.testing.assert_close(trained[i].weights, expected[0][i].weights, atol=1e-10, rtol=0)
    assert written == expected[1]


def texts(model, lora):
    adapters = random_adapters(model, 2, lora, std=0.05)
    return generate(model, [[[1, 2, 3], [4]], [[5, 6]]], Sampling(12), adapters=adapters)


@pytest.mark.parametrize("grouped", [True, False])
def test_one_product_for_the_a_of_several_adapters(tiny, fewer, grouped):
    ids, attend = torch.randint(0, 256, (24,)), Ribbon([5, 11, 8], "cpu")
    found = []
    for start in (lambda: None, fewer):
        start()
        adapters = random_adapters(tiny, 5, Lora(8, 8, ["q_proj", "v_proj"]), std=0.05)
        adapters.flat.requires_grad_()
        adapters.grouped = grouped
        with adapters.route([16, 0, 8, 0, 0]):
            h = tiny.hidden(ids, attend.position, attend.attend)
            h.square().sum().backward()
        found.append((h.detach(), adapters.flat.grad))
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-4)


def test_weights_that_lie_together_load_change_and_save_as_before(tmp_path):
    CASES["qwen2"]().save_pretrained(tmp_path / "base")
    plain, joined = [load_pretrained(tmp_path / "base", "cpu") for _ in range(2)]
    ids = torch.randint(0, 256, (1, 9))
    adapters = [Adapters(model, Lora(4, 8, ALL), 1) for model in (plain, joined)]
    other = {name: 1.1 * weight for name, weight in plain.state_dict().items()}
    changes = [lambda i, model: None,
               lambda i, model: adapters[i].merge(0),
               lambda i, model: model.load_state_dict(other, assign=True),
               lambda i, model: model.double(),
               lambda i, model: model.model["layers"][0].self_attn.k_proj.weight.mul_(2)]
    adapters[0].flat.normal_(std=0.05)
    adapters[1].flat.copy_(adapters[0].flat)

    for change in changes:
        for i, model in enumerate((plain, joined)):
            change(i, model)
        expected = plain(ids)
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            patch.setattr(device, "few_kernels", lambda x: True)
            patch.setattr(device, "compiled", lambda function: function)
            torch.testing.assert_close(joined(ids), expected)

    attn = joined.model["layers"][0].self_attn
    assert attn.k_proj.weight.storage_offset() == attn.q_proj.weight.numel()
    plain.save_pretrained(tmp_path / "plain")
    joined.save_pretrained(tmp_path / "joined")
    file = "model.safetensors"
    assert (tmp_path / "joined" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_flash_attention_over_the_cache(tiny, monkeypatch):
    how = [[[1, 2, 3], [4], [5] * 70]], Sampling(12, n=2, temperature=1.0, top_p=0.9), range(6)
    expected = generate(tiny, *how)
    monkeypatch.setattr(decode, "has_flash", lambda x: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", by_sequence)
    assert generate(tiny, *how) == expected


# ------------------------------------------------------------------------------- training (GPU)

SHAPE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
             head_dim=64, num_hidden_layers=4)
RECIPE = Recipe(Lora(rank=8, alpha=16, targets=PROJECTIONS), lr=1e-3, epochs=3, batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return make_checkpoint(tmp_path_factory.mktemp("models") / "cuda", **SHAPE)


@pytest.fixture()
def model(folder):
    return load_pretrained(folder, "cuda", torch.bfloat16)


def all_losses(trained):
    losses = []
    for number in sorted(trained):
        losses += trained[number].losses
    return torch.tensor(losses)


@pytest.fixture()
def alike():
    """Jobs of like lengths: all their steps have a few shapes."""
    return [Job([([5 + i + k] * 30, [True] * 30) for k in range(4)], i, RECIPE) for i in range(12)]


def test_a_new_shape_costs_no_plan(model):
    """cuDNN's attention would build a plan of a second for each new shape."""
    seconds = []
    for n in (33, 34, 35, 36, 37, 38):
        ribbon = Ribbon([n, n + 1, n - 1], "cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.hidden(torch.zeros_like(ribbon.position), ribbon.position, ribbon.attend)
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


def test_graphs_train_the_same(model, alike, monkeypatch):
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: (replays.append(g), replay(g)))
    with_graphs = train(model, alike, slots=5)
    monkeypatch.setenv("NANOSEAL_NO_GRAPHS", "1")
    without = train(model, alike, slots=5)
    assert len(replays) > 5
    assert (all_losses(with_graphs) - all_losses(without)).abs().max() < 0.1
    for i in without:
        moved = (with_graphs[i].weights - without[i].weights).norm()
        assert moved < 0.1 * without[i].weights.norm()


def test_answers_between_the_yields_of_a_training_change_nothing(model, alike):
    """Decoding records and drops graphs while those of training wait (pytorch#193402)."""
    alone = train(model, alike)
    beside = {}
    for i, trained in sft(model, [replace(job, recipe=replace(RECIPE, slots=3)) for job in alike]):
        beside[i] = trained
        generate(model, [[[1, 2]], [[3]]], Sampling(40), None, random_adapters(model, 2))
    for i in alone:
        assert torch.equal(beside[i].weights, alone[i].weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("n, P", [(3, 5000), (64, 4096), (1, 70000), (7, 4096)])
def test_the_compiled_update_is_the_plain_one(n, P):
    state = [torch.randn(n, P, device="cuda") for _ in range(4)]
    state[3].abs_()
    lr = torch.full((n, 1), 1e-3, device="cuda")
    t = torch.tensor([[1.0 + i % 4] for i in range(n)], device="cuda")
    plain = [x.clone() for x in state]
    fast = [x.clone() for x in state]
    for update, x in [(adamw_, plain), (compiled(adamw_), fast)]:
        update(*x, lr, t, x[0], clip=1.0, weight_decay=0.01)
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
    places = {(warning.filename, warning.lineno) for warning in heard
              if "synchron" in str(warning.message)}
    assert len(places) <= 3, sorted(places)


def test_running_out_of_memory_halves_the_slots(model, capsys):
    examples = [([5] * 400, [True] * 400)] * 2
    jobs = [Job(examples, i, replace(RECIPE, epochs=1, batch=1)) for i in range(16)]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    train(model, jobs, slots=16)

    peak = torch.cuda.max_memory_allocated() - before
    # The same with half of that memory.
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    allowed = torch.cuda.memory_reserved() + 0.5 * peak
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        assert len(train(model, jobs, slots=16)) == 16
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: going on with" in capsys.readouterr().out


# ------------------------------------------------------------------------------- decoding (GPU)

@pytest.mark.parametrize("case", ["sampled", "adapters"])
def test_graphs_change_nothing(model, monkeypatch, case):
    how = work(model, case)
    with_graphs = generate(model, *how)
    monkeypatch.setattr(decode, "has_graphs", lambda device: False)
    assert generate(model, *how) == with_graphs


def test_flash_attention_over_the_cache_is_the_masked_one(model, monkeypatch):
    g = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, device="cuda", dtype=model.dtype)
    q, k, v = draw(5, 4, 64), draw(5, 2, 64), draw(5, 2, 64)
    cache = decode.Rows(model, 5, 64, 0, None)
    cache.length += torch.tensor([0, 1, 20, 62, 63], device="cuda")
    cache.kv[0] = draw(*cache.kv[0].shape)
    fast = cache.to_cache()(0, q, k, v)
    monkeypatch.setattr(decode, "has_flash", lambda x: False)
    torch.testing.assert_close(fast, cache.to_cache()(0, q, k, v), atol=0.02, rtol=0.02)
