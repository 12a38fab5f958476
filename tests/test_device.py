"""What a GPU does otherwise, as far as a CPU can tell: graphs of torch.compile by a backend that
only traces, flash attention by its schema and by a plain product in its place."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import lora
import model as transformer
from engine import decode
from engine import ribbon as ribbon_file
from engine import update
from engine.decode import Sampling
from engine.gpu import flash_attention, fused, has_flash
from engine.ribbon import Ribbon
from engine.train import sft
from lora import Adapters, Lora
from model import load_pretrained
from tests.helpers import ALL, CASES, mixed_jobs
from tests.strict import may_stay_unused


@pytest.fixture()
def traced(monkeypatch):
    """Whatever is compiled on CUDA is traced here. `frame_count`: how many graphs it took."""
    counter = CompileCounterWithBackend("eager")
    compiled = {}

    @may_stay_unused        # decoding has no update
    def trace(function, x):
        if function not in compiled:
            compiled[function] = torch.compile(function, dynamic=True, backend=counter)
        return compiled[function]

    torch._dynamo.reset()
    monkeypatch.setattr(transformer, "fused", trace)
    monkeypatch.setattr(update, "fused", trace)
    yield counter
    torch._dynamo.reset()


def train(model, jobs):
    jobs = [replace(job, recipe=replace(job.recipe, slots=3)) for job in jobs]
    return dict(sft(model, jobs))


# ------------------------------------------------------------------------------- compiled pieces

def test_nothing_is_compiled_on_a_cpu():
    assert fused(torch.relu, torch.zeros(1)) is torch.relu


@pytest.mark.parametrize("dtype, grouped", [("bfloat16", True), ("float32", False)])
def test_three_graphs_serve_all_layers(tiny_folder, traced, monkeypatch, dtype, grouped):
    """rotate, swiglu and the loss, whatever the layers, the tokens, and the adapters' segments."""
    monkeypatch.setattr(lora, "can_group", lambda *_: grouped)
    model = load_pretrained(tiny_folder, "cpu", getattr(torch, dtype))
    jobs = mixed_jobs(n=8)

    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(transformer, "fused", lambda function, x: function)
        plain.setattr(update, "fused", lambda function, x: function)
        expected = train(model, jobs)
    assert traced.frame_count == 0

    trained = train(model, jobs)

    assert traced.frame_count == 3
    for i in expected:
        torch.testing.assert_close(trained[i].weights, expected[i].weights, atol=2e-3, rtol=0)


def test_few_graphs_serve_all_grids_of_a_decoding(tiny_folder, traced):
    model = load_pretrained(tiny_folder, "cpu", torch.float32)
    adapters = Adapters(model, Lora(4, 8, ALL), 4)      # of rank 4: padded, not grouped
    adapters.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    groups = [[[i, i + j + 1] * (j + 1) for j in range(6)] for i in range(4)]
    stop = frozenset(range(0, 264, 8))
    sampling = Sampling(40, stop=stop, max_rows=16)
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(transformer, "fused", lambda function, x: function)
        expected = decode.generate(model, groups, sampling, adapters=adapters)

    written = decode.generate(model, groups, sampling, adapters=adapters)

    assert written == expected
    # rotate and swiglu, of one row and of many.
    assert traced.frame_count <= 6


def test_the_update_is_one_graph():
    p, g, m, v = (torch.randn(3, 50) for _ in range(4))
    state = (p, g, m, v.abs())
    lr = torch.tensor([[0.1], [0.0], [0.3]])
    t = torch.tensor([[1.0], [5.0], [9.0]])
    settings = dict(clip=1.0, weight_decay=0.01)

    plain = [x.clone() for x in state]
    update.adamw_(*plain, lr, t, plain[0], **settings)
    traced = [x.clone() for x in state]
    compiled = torch.compile(update.adamw_, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(*traced, lr, t, traced[0], **settings)

    for a, b, before in zip(plain, traced, state):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, before)


def test_all_adapters_are_updated_together_on_cuda(monkeypatch):
    calls = []
    state = [torch.randn(3, 50).abs() for _ in range(4)]
    rates = [torch.full((3, 1), 0.1), torch.full((3, 1), 2.0)]
    apart, together = [x.clone() for x in state], [x.clone() for x in state]
    update.adamw_all(*apart, *rates, apart[0], clip=1.0, weight_decay=0.0)

    class OnCuda(torch.Tensor):
        is_cuda = True

    def record(function, x):
        calls.append(function)
        return function

    monkeypatch.setattr(update, "fused", record)
    update.adamw_all(together[0].as_subclass(OnCuda), *together[1:], *rates, together[0],
                     clip=1.0, weight_decay=0.0)

    assert calls == [update.adamw_]
    for ours, theirs in zip(together, apart):
        torch.testing.assert_close(ours.as_subclass(torch.Tensor), theirs)


# ------------------------------------------------------------------------------- flash attention

def by_sequence(q, k, v, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, debug):
    """What aten's flash attention computes, a sequence at a time."""
    assert bounds_q.dtype == torch.int32
    assert torch.equal(bounds_q, bounds_k)
    lengths = bounds_q.diff().tolist()
    assert (bounds_q[0], sum(lengths)) == (0, len(q))
    assert longest_q == longest_k == max(lengths)
    assert (dropout, causal, debug) == (0.0, True, False)
    outputs = []
    for q_part, k_part, v_part in zip(*(x.split(lengths) for x in (q, k, v))):
        heads_first = [x.transpose(0, 1) for x in (q_part, k_part, v_part)]
        y = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        outputs.append(y.transpose(0, 1))
    return torch.cat(outputs), None, None, None, None


def test_flash_attention_takes_the_ribbon_as_it_lies(tiny, monkeypatch):
    lengths = [5, 40, 1, 17]
    ids = torch.randint(0, 256, (sum(lengths),))
    ribbon = Ribbon(lengths, "cpu")
    expected = tiny.hidden(ids, ribbon.position, ribbon.attend)
    called = []

    def op(*args):
        called.append(args)
        return by_sequence(*args)

    monkeypatch.setattr(ribbon_file, "has_flash", lambda x: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", op)
    h = tiny.hidden(ids, ribbon.position, ribbon.attend)

    assert len(called) == tiny.config.n_layer
    torch.testing.assert_close(h, expected, atol=1e-5, rtol=1e-4)


def test_torch_knows_this_flash_attention_and_its_gradient():
    """On meta tensors, which are shapes alone: its arguments, its shape, its gradient."""
    q = torch.empty(9, 4, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.empty(9, 2, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(2))
    bounds = torch.empty(3, device="meta", dtype=torch.int32)

    y = flash_attention(q, k, v, bounds, 6)
    y.sum().backward()

    assert y.shape == q.shape
    assert [x.grad.shape for x in (q, k, v)] == [q.shape, k.shape, v.shape]


def test_a_cpu_has_no_flash_attention():
    assert not has_flash(torch.zeros(3, 2, 64, dtype=torch.bfloat16))


def test_imitated_pads_are_masked_and_no_flash_attention(tiny, monkeypatch):
    from engine.padding import PaddedRibbon
    monkeypatch.setattr(ribbon_file, "has_flash", lambda x: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", None)
    ribbon = PaddedRibbon([5, 7], [2, 0], torch.arange(12), "cpu")

    tiny.hidden(torch.randint(0, 256, (12,)), ribbon.position, ribbon.attend)


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_model_can_be_traced(case, tmp_path, traced):
    CASES[case]().save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base", "cpu")
    ids = torch.randint(0, 320, (2, 11))
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(transformer, "fused", lambda function, x: function)
        expected = model(ids)

    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-3)
    assert traced.frame_count == 2
