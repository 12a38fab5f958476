"""What fits: the formula against what is really kept, and how much is then done side by side.

How much is free is faked, so that it decides."""
import os
import tempfile
from dataclasses import replace

import pytest
import torch

from engine import device
from engine import train as engine
from engine.decode import Rows
from engine.device import (activation_memory, auto_answering, auto_rows, auto_slots, free_memory,
                           in_halves, step_memory, try_memory)
from engine.ribbon import Ribbon
from engine.train import Engine, sft
from lora import Adapters, Job, Lora
from model import ModelConfig, Transformer, load_pretrained
from support.checkpoint import read_config
from support.files import UserError
from tests.helpers import ALL, RECIPE, mixed_jobs
from tools.plan import write_shape

CPU = torch.device("cpu")
SOME = ["q_proj", "v_proj"]
PLENTY = 10 ** 15   # bytes


@pytest.fixture()
def set_free(monkeypatch):
    def set_to(n):
        monkeypatch.setattr(device, "free_memory", lambda device: n)
    return set_to


@pytest.fixture(scope="module")
def half(tiny_folder):
    return load_pretrained(tiny_folder, "cpu", torch.bfloat16)


@pytest.mark.parametrize("targets, counts, expected, for_qwen3", [
    # The formula is right for an adapter on every layer, and on few.
    (ALL, [500], 1.0, 1.0),
    (SOME, [500], 0.97, 0.97),
    # Segments of two adapters differ in length: attention unrolls and pads them, and keeps that.
    (ALL, [300, 200], 0.8, 0.74)])
def test_the_memory_formula_counts_what_autograd_keeps(targets, counts, expected, for_qwen3, peer):
    """Within 5 % of estimate / kept as expected here. auto_slots counts on twice the tokens and
    1/1.4 of the free memory: it is safe down to a third."""
    model = load_pretrained(peer[0], "cpu")
    lora = Lora(rank=8, alpha=16, targets=targets)
    adapters = Adapters(model, lora, n=len(counts))
    adapters.flat.requires_grad_()
    ribbon = Ribbon(counts, model.device)
    ids = torch.randint(0, model.config.vocab_size, (sum(counts),))
    kept = {}       # each storage once

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with adapters.route(counts):
            h = model.hidden(ids, ribbon.position, ribbon.attend)
    assert h.requires_grad

    for weight in [*model.parameters(), adapters.flat]:
        kept.pop(weight.untyped_storage().data_ptr(), None)
    ratio = activation_memory(model, lora, sum(counts)) / sum(x.nbytes() for x in kept.values())
    assert ratio == pytest.approx(for_qwen3 if model.config.qk_norm else expected, abs=0.05)


def test_the_memory_formula_counts_the_adapters_state_and_what_is_recomputed(half, monkeypatch):
    """Value and two moments in float32, copy and gradient in bfloat16."""
    trainer = Engine(half, RECIPE, n=2)
    trainer.take_jobs(mixed_jobs(n=2), [0, 1])
    trainer.step()
    state = [trainer.flat, trainer.read, trainer.read.grad, trainer.m, trainer.v]
    assert [tensor.element_size() for tensor in state] == [4, 2, 2, 4, 4]
    assert sum(tensor.nbytes for tensor in state) == step_memory(half, RECIPE.lora, 2, tokens=0)
    usual = activation_memory(half, RECIPE.lora, tokens=1000)
    monkeypatch.setattr(half, "recompute", True)
    inputs = 1000 * half.config.n_layer * half.config.dim * 2
    recomputed = activation_memory(half, RECIPE.lora, tokens=1000)
    assert recomputed == usual / half.config.n_layer + inputs


def meta_model(shape, recompute=False):
    """A model of a known shape without memory, as on a GPU in bfloat16."""
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        write_shape(shape, folder)
        model = Transformer(ModelConfig(**read_config(folder))).to(torch.bfloat16)
    model.recompute = recompute
    return model


FIVE = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
INNER, OUTER, PUZZLES = Lora(32, 64, SOME), Lora(64, 128, ALL), Lora(128, 16, FIVE)


@pytest.mark.parametrize("shape, lora, slots, tokens, recompute, peak", [
    # The paper's inner loop on passages, its M-step, and its inner loop on puzzles.
    ("qwen2.5-7b", INNER, 42, 2800, False, 18.8), ("qwen2.5-7b", INNER, 128, 7400, False, 50.1),
    ("qwen2.5-7b", OUTER, 1, 4200, False, 25.9), ("qwen2.5-7b", OUTER, 1, 4200, True, 5.0),
    ("qwen2.5-7b", OUTER, 1, 15000, False, 81.6), ("qwen2.5-7b", OUTER, 1, 22480, True, 12.8),
    ("llama-3.2-1b", PUZZLES, 3, 3600, False, 10.2),
    ("llama-3.2-1b", PUZZLES, 16, 19200, False, 47.7)])
def test_the_memory_formula_against_simulated_peaks(shape, lora, slots, tokens, recompute, peak):
    """Peaks in GiB beside the weights, simulated from the lifetimes of all storages of a step."""
    estimate = step_memory(meta_model(shape, recompute), lora, slots, tokens) / 2 ** 30
    assert estimate == pytest.approx(peak, rel=0.15)


def jobs_of(n, length, examples=1, **recipe):
    text = ([1] * length, [True] * length)
    return [Job([text] * examples, seed=i, recipe=replace(RECIPE, **recipe)) for i in range(n)]


def bytes_of_slots(model, n, tokens):
    state = step_memory(model, RECIPE.lora, n, tokens=0)
    return state + activation_memory(model, RECIPE.lora, tokens)


def test_slots_fill_a_step_and_are_no_more_than_the_jobs(tiny, set_free):
    set_free(PLENTY)
    assert auto_slots(tiny, jobs_of(40, length=100, batch=1)) == 10
    assert auto_slots(tiny, jobs_of(40, length=100, batch=1, epochs=9)) == 10
    assert auto_slots(tiny, jobs_of(40, length=50, examples=2, batch=2)) == 10
    assert auto_slots(tiny, jobs_of(3, length=100)) == 3
    assert auto_slots(tiny, jobs_of(5, length=1000)) == 1
    assert 1 <= auto_slots(tiny, mixed_jobs()) <= 7
    set_free(0)
    assert auto_slots(tiny, mixed_jobs()) == 0      # not even one


@pytest.mark.parametrize("n", [2, 3, 7])
def test_as_many_slots_are_taken_as_fit_in_the_free_memory(tiny, set_free, monkeypatch, n):
    jobs = jobs_of(40, length=20, batch=1, epochs=1)
    # Twice 20 tokens for each, as a step may be longer than the mean.
    needed = 1.4 * bytes_of_slots(tiny, n, tokens=2 * 20 * n)
    set_free(needed * 0.999)
    assert auto_slots(tiny, jobs) == n - 1
    set_free(needed * 1.001)
    assert auto_slots(tiny, jobs) == n
    made = []

    class Spy(Engine):
        def __init__(self, model, recipe, n):
            made.append(n)
            super().__init__(model, recipe, n)
    monkeypatch.setattr(engine, "Engine", Spy)

    assert len(list(sft(tiny, jobs))) == 40
    assert made == [n]


def test_a_job_that_would_not_fit_is_trained_with_recomputed_activations(tiny, set_free, capsys,
                                                                         monkeypatch):
    jobs = jobs_of(1, length=20, batch=1)
    needed = bytes_of_slots(tiny, 1, tokens=2 * 20)
    seen = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (seen.append(tiny.recompute), step(self)))
    found = []
    for share, recomputed, said in [
            (1.41, False, ""), (1.39, True, "memory is short: activations are recomputed\n")]:
        set_free(share * needed)
        ((_, trained),) = sft(tiny, jobs)
        found.append(trained.weights)
        assert seen[-jobs[0].steps:] == [recomputed] * jobs[0].steps
        assert not tiny.recompute
        assert capsys.readouterr().out == said
    assert torch.allclose(*found)


def cache_bytes(model, rows):
    return sum(kv.nbytes for kv in Rows(model, rows, 128, 0, None).kv)


def answering_bytes(model, n):
    """What n adapters weigh in update_and_score: as trained, side by side, and as multiplied by two
    routes, that of the prompts or the rows before and that of the rows now."""
    trained = [torch.zeros(RECIPE.lora.parameters(model)) for _ in range(n)]
    adapters = Adapters.stack(model, RECIPE.lora, trained)
    copy = adapters.flat.to(model.dtype)
    return sum(tensor.nbytes for tensor in [*trained, adapters.flat, copy, copy])


@pytest.mark.parametrize("how_many, weigh, free, share, most", [
    (lambda model: auto_rows(model, length=128), cache_bytes, 5_000_000, 1.5, 256),
    (lambda model: auto_answering(model, RECIPE.lora), answering_bytes, 2_000_000, 3, 16)],
    ids=["rows", "adapters that answer"])
def test_as_many_as_fit_in_a_share_of_the_free_memory(how_many, weigh, free, share, most, half,
                                                      set_free):
    set_free(free)
    n = how_many(half)
    assert 1 < n < most
    assert weigh(half, n) <= free / share < weigh(half, n + 1)
    set_free(0)
    assert how_many(half) == 1
    set_free(PLENTY)
    assert how_many(half) == most


CAN_BE_HAD = "MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:   700 kB\nCached: 600 kB\n"


# What only caches files is free. Kernels before 3.14, and systems other than Linux, do not say what
# is available. A container may have a limit.
@pytest.mark.parametrize("meminfo, limit, used, free", [
    (CAN_BE_HAD, None, None, 700 * 1024), ("MemFree: 100 kB\n", None, None, 100 * 1024),
    (None, None, None, 100 * 1024), (None, "1000", "300", 700), (None, "max", "300", 100 * 1024),
    (None, "100", "300", 0), (None, "x", "y", 100 * 1024)])
def test_what_the_system_and_a_container_s_limit_leave_is_free(meminfo, limit, used, free,
                                                               tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1024}.get(name, 100))
    for name, text in [("meminfo", meminfo), ("memory.max", limit), ("memory.current", used)]:
        if text:
            (tmp_path / name).write_text(text + "\n")
    assert free_memory(CPU, tmp_path / "meminfo", tmp_path) == free


def test_free_memory_is_part_of_what_there_is_and_a_gpu_is_asked_itself(monkeypatch):
    there_is = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(CPU) < there_is
    # Where the system does not say what is free, all of it counts, as on macOS.
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 0})
    assert free_memory(CPU) == there_is
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_memory(torch.device("cuda")) == 123 + 30    # what torch holds and does not use


ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
          RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_halves_of_what_does_not_fit(error, capsys):
    sizes = []

    def double(items):
        sizes.append(len(items))
        if len(items) > 2:
            raise error
        return [2 * item for item in items]

    assert in_halves(double, [1, 2, 3, 4, 5]) == [2, 4, 6, 8, 10]
    assert sizes == [5, 2, 3, 1, 2]
    assert capsys.readouterr().out.count("out of memory: going on with") == 2


def test_one_that_does_not_fit_is_one_line_and_an_error_of_another_kind_is_raised():
    def full(*_):       # torch's own error
        torch.empty(2 ** 55, dtype=torch.uint8)

    def broken(*_):
        raise RuntimeError("device-side assert triggered")

    with pytest.raises(UserError, match="out of memory with a single"):
        in_halves(full, [1, 2])
    with pytest.raises(RuntimeError, match="device-side assert"):
        in_halves(broken, [1, 2])
    assert try_memory(full) == (False, None)
    assert try_memory(lambda: None) == (True, None)
