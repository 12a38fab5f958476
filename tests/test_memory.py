"""What fits: the formula against what is really kept, and how much is then done side by side.

How much is free is faked, so that it decides."""
import os
from dataclasses import replace

import pytest
import torch

import memory
import sft as engine
from generate import Cache
from lora import Adapters, Lora
from memory import auto_answering, auto_rows, auto_slots, free_memory, step_memory
from model import Ribbon, load_pretrained
from sft import Engine, Job, sft
from tests.helpers import ALL, CASES, RECIPE, mixed_jobs

SOME = ["q_proj", "v_proj"]
PLENTY = 10 ** 15   # bytes


@pytest.fixture()
def set_free(monkeypatch):
    """A function that sets how many bytes seem to be free."""
    def set_to(n):
        monkeypatch.setattr(memory, "free_memory", lambda device: n)
    return set_to


@pytest.fixture(scope="module")
def half(tiny_folder):
    return load_pretrained(tiny_folder, "cpu", torch.bfloat16)


# ------------------------------------------------------------------------------- the formula

def bytes_kept_for_backward(model, adapters, counts):
    """What autograd keeps of a forward pass, each storage once, without the weights."""
    ribbon = Ribbon(counts, model.device)
    ids = torch.randint(0, model.config.vocab_size, (sum(counts),))
    weights = [*model.parameters(), adapters.flat]
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with adapters.route(counts):
            h = model.hidden(ids, ribbon.position, ribbon.attend)
    assert h.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("targets, counts, expected, for_qwen3", [
    # An adapter on every layer: the formula is right. It does not know Qwen3's norms of queries and
    # keys, which keep what they normalise.
    (ALL, [500], 1.0, 0.85),
    # Few layers are adapted: the others need not keep their input, so the formula is careful.
    (SOME, [500], 1.28, 1.03),
    # Segments of two adapters differ in length: attention unrolls and pads them, and keeps that.
    (ALL, [300, 200], 0.8, 0.63),
])
def test_the_memory_formula_counts_what_autograd_keeps(case, targets, counts, expected, for_qwen3,
                                                       tmp_path):
    """Within 5 % of estimate / kept as expected here. auto_slots counts on twice the tokens and
    half of the free memory: it is safe down to a quarter."""
    torch.manual_seed(4)
    CASES[case]().save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base", "cpu")
    lora = Lora(rank=8, alpha=16, targets=targets)
    adapters = Adapters(model, lora, n=len(counts))
    adapters.flat.requires_grad_()

    kept = bytes_kept_for_backward(model, adapters, counts)
    estimate = step_memory(model, lora, 1, sum(counts)) - step_memory(model, lora, 1, 0)

    if case == "qwen3":
        expected = for_qwen3
    assert estimate / kept == pytest.approx(expected, abs=0.05)


def test_the_memory_formula_counts_the_adapters_state(half):
    """In bfloat16: value, gradient and two moments in float32, and a copy in bfloat16."""
    trainer = Engine(half, RECIPE, n=2)
    trainer.take_jobs(mixed_jobs(n=2), [0, 1])
    trainer.forward_backward()
    trainer.update()

    copy = trainer.flat.to(half.dtype)
    state = [trainer.flat, trainer.flat.grad, trainer.m, trainer.v, copy]
    assert sum(tensor.nbytes for tensor in state) == step_memory(half, RECIPE.lora, 2, tokens=0)


def test_recomputed_activations_need_less(tiny):
    usual = step_memory(tiny, RECIPE.lora, 1, tokens=10_000)
    tiny.recompute = True
    recomputed = step_memory(tiny, RECIPE.lora, 1, tokens=10_000)

    assert recomputed < usual / 4


# ------------------------------------------------------------------------------- slots

def jobs_of(n, length, examples=1, **recipe):
    """n jobs that are alike: so many examples of one length."""
    text = ([1] * length, [True] * length)
    return [Job([text] * examples, seed=i, recipe=replace(RECIPE, **recipe)) for i in range(n)]


def test_slots_fill_a_step(tiny, set_free):
    """On a CPU that is 1024 tokens."""
    set_free(PLENTY)

    assert auto_slots(tiny, jobs_of(40, length=100, batch=1)) == 10
    assert auto_slots(tiny, jobs_of(40, length=100, batch=1, epochs=9)) == 10
    assert auto_slots(tiny, jobs_of(40, length=50, examples=2, batch=2)) == 10


def test_slots_are_no_more_than_the_jobs_and_at_least_one(tiny, set_free):
    set_free(PLENTY)
    assert auto_slots(tiny, jobs_of(3, length=100)) == 3
    assert auto_slots(tiny, jobs_of(5, length=1000)) == 1
    assert 1 <= auto_slots(tiny, mixed_jobs()) <= 7

    set_free(0)
    assert auto_slots(tiny, mixed_jobs()) == 1


@pytest.mark.parametrize("n", [2, 3, 7])
def test_slots_fit_in_half_of_the_free_memory(tiny, set_free, n):
    jobs = jobs_of(40, length=20, batch=1)
    # Twice 20 tokens for each, as a step may be longer than the mean.
    needed = 2 * step_memory(tiny, RECIPE.lora, n, tokens=2 * 20 * n)

    set_free(needed * 1.001)
    assert auto_slots(tiny, jobs) == n

    set_free(needed * 0.999)
    assert auto_slots(tiny, jobs) == n - 1


def test_the_engine_takes_as_many_slots_as_fit(tiny, set_free, monkeypatch):
    jobs = jobs_of(5, length=20, batch=1)
    set_free(2.001 * step_memory(tiny, RECIPE.lora, 3, tokens=2 * 20 * 3))
    made = []

    class Spy(Engine):
        def __init__(self, model, recipe, n):
            made.append(n)
            super().__init__(model, recipe, n)
    monkeypatch.setattr(engine, "Engine", Spy)

    assert len(list(sft(tiny, jobs))) == 5
    assert made == [3]


# ------------------------------------------------------------------------------- rows

def cache_bytes(model, rows, length):
    cache = Cache(model, rows, length)
    return sum(keys.nbytes + values.nbytes for keys, values in cache.kv)


def test_rows_fit_in_a_third_of_the_free_memory(half, set_free):
    """The rows of a real cache are weighed; one row more would be too much."""
    set_free(10_000_000)

    rows = auto_rows(half, length=128)

    assert 1 < rows < 256
    assert cache_bytes(half, rows, 128) <= 10_000_000 / 3
    assert cache_bytes(half, rows + 1, 128) > 10_000_000 / 3


def test_rows_are_at_least_one_and_at_most_256(half, set_free):
    set_free(0)
    assert auto_rows(half, length=128) == 1

    set_free(PLENTY)
    assert auto_rows(half, length=128) == 256


# ------------------------------------------------------------------------------- answering

def answering_bytes(model, n):
    """What n adapters weigh in update_and_score: as trained, side by side, as multiplied."""
    trained = [torch.zeros(RECIPE.lora.parameters(model)) for _ in range(n)]
    adapters = Adapters.stack(model, RECIPE.lora, trained)
    copy = adapters.flat.to(model.dtype)
    return sum(tensor.nbytes for tensor in [*trained, adapters.flat, copy])


def test_adapters_that_answer_fit_in_a_third_of_the_free_memory(half, set_free):
    set_free(2_000_000)

    n = auto_answering(half, RECIPE.lora)

    assert 1 < n < 16
    assert answering_bytes(half, n) <= 2_000_000 / 3
    assert answering_bytes(half, n + 1) > 2_000_000 / 3


def test_adapters_that_answer_are_at_least_one_and_at_most_16_on_a_cpu(half, set_free):
    set_free(0)
    assert auto_answering(half, RECIPE.lora) == 1

    set_free(PLENTY)
    assert auto_answering(half, RECIPE.lora) == 16


# ------------------------------------------------------------------------------- the device

def physical_memory():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_free_memory_is_part_of_what_there_is():
    assert 0 < free_memory(torch.device("cpu")) < physical_memory()


def test_where_the_system_does_not_say_what_is_free_all_of_it_counts(monkeypatch):
    """As on macOS."""
    monkeypatch.setattr(os, "sysconf_names", {"SC_PHYS_PAGES": 0})

    assert free_memory(torch.device("cpu")) == physical_memory()


def test_a_gpu_is_asked_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (123, 456))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)

    assert free_memory(torch.device("cuda")) == 123 + 30    # what torch holds and does not use


# ------------------------------------------------------------------------------- running out

@pytest.mark.parametrize("error", [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)")])
def test_every_kind_of_running_out_is_known(error):
    assert memory.is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_are_not(error):
    assert not memory.is_out_of_memory(error)


def test_torch_s_own_error_on_a_cpu_is_known():
    with pytest.raises(RuntimeError) as ended:
        torch.empty(2 ** 55, dtype=torch.uint8)

    assert memory.is_out_of_memory(ended.value)
