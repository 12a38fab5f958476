"""What fits: the formula against what is really kept, and how much is then done side by side.

How much is free is faked, so that it decides."""
import os
import tempfile
from dataclasses import replace

import pytest
import torch

from engine import memory
from engine import train as engine
from engine.decode import Cache
from engine.memory import activation_memory, in_halves, on_host_if_full, step_memory
from engine.memory import auto_answering, auto_rows, auto_slots, free_memory
from engine.ribbon import Ribbon
from engine.train import Engine, sft
from lora import Adapters, Job, Lora
from model import ModelConfig, Transformer, load_pretrained
from support.files import UserError
from tests.helpers import ALL, CASES, RECIPE, mixed_jobs
from tools.plan import write_shape

CPU = torch.device("cpu")
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
    # The formula is right for an adapter on every layer, and on few.
    (ALL, [500], 1.0, 1.0),
    (SOME, [500], 0.97, 0.97),
    # Segments of two adapters differ in length: attention unrolls and pads them, and keeps that.
    (ALL, [300, 200], 0.8, 0.74),
])
def test_the_memory_formula_counts_what_autograd_keeps(case, targets, counts, expected, for_qwen3,
                                                       tmp_path):
    """Within 5 % of estimate / kept as expected here. auto_slots counts on twice the tokens and
    1/1.4 of the free memory: it is safe down to a third."""
    torch.manual_seed(4)
    CASES[case]().save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base", "cpu")
    lora = Lora(rank=8, alpha=16, targets=targets)
    adapters = Adapters(model, lora, n=len(counts))
    adapters.flat.requires_grad_()

    kept = bytes_kept_for_backward(model, adapters, counts)
    estimate = activation_memory(model, lora, sum(counts))

    if case == "qwen3":
        expected = for_qwen3
    assert estimate / kept == pytest.approx(expected, abs=0.05)


def test_the_memory_formula_counts_the_adapters_state(half):
    """Value and two moments in float32, copy and gradient in bfloat16."""
    trainer = Engine(half, RECIPE, n=2)
    trainer.take_jobs(mixed_jobs(n=2), [0, 1])
    trainer.step()

    state = [trainer.flat, trainer.read, trainer.read.grad, trainer.m, trainer.v]
    assert [tensor.element_size() for tensor in state] == [4, 2, 2, 4, 4]
    assert sum(tensor.nbytes for tensor in state) == step_memory(half, RECIPE.lora, 2, tokens=0)


def test_recomputed_activations_are_a_block_and_the_inputs_of_all(half):
    c = half.config
    usual = activation_memory(half, RECIPE.lora, tokens=1000)
    half.recompute = True
    recomputed = activation_memory(half, RECIPE.lora, tokens=1000)
    half.recompute = False

    inputs = 1000 * c.n_layer * c.dim * 2
    assert recomputed == usual / c.n_layer + inputs


def meta_model(shape, recompute=False):
    """A model of a known shape without memory, as on a GPU in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        write_shape(shape, folder)
        with torch.device("meta"):
            model = Transformer(ModelConfig.from_folder(folder)).to(torch.bfloat16)
    model.recompute = recompute
    return model


FIVE = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("shape, lora, slots, tokens, recompute, peak", [
    # The inner loop of the paper's knowledge domain.
    ("qwen2.5-7b", Lora(32, 64, SOME), 42, 2800, False, 18.8),
    ("qwen2.5-7b", Lora(32, 64, SOME), 64, 4000, False, 27.2),
    ("qwen2.5-7b", Lora(32, 64, SOME), 128, 7400, False, 50.1),
    # Its M-step: 10 self-edits of 420, 900, 1500 and 2248 tokens.
    ("qwen2.5-7b", Lora(64, 128, ALL), 1, 4200, False, 25.9),
    ("qwen2.5-7b", Lora(64, 128, ALL), 1, 9000, False, 50.7),
    ("qwen2.5-7b", Lora(64, 128, ALL), 1, 15000, False, 81.6),
    ("qwen2.5-7b", Lora(64, 128, ALL), 1, 4200, True, 5.0),
    ("qwen2.5-7b", Lora(64, 128, ALL), 1, 9000, True, 6.7),
    ("qwen2.5-7b", Lora(64, 128, ALL), 1, 15000, True, 9.4),
    ("qwen2.5-7b", Lora(64, 128, ALL), 1, 22480, True, 12.8),
    # The inner loop of the puzzles: two examples of 600 tokens a slot.
    ("llama-3.2-1b", Lora(128, 16, FIVE), 3, 3600, False, 10.2),
    ("llama-3.2-1b", Lora(128, 16, FIVE), 8, 9600, False, 24.6),
    ("llama-3.2-1b", Lora(128, 16, FIVE), 16, 19200, False, 47.7),
])
def test_the_memory_formula_against_simulated_peaks(shape, lora, slots, tokens, recompute, peak):
    """Peaks in GiB beside the weights, simulated from the lifetimes of all storages of a step."""
    model = meta_model(shape, recompute)

    estimate = step_memory(model, lora, slots, tokens) / 2 ** 30

    assert estimate == pytest.approx(peak, rel=0.15)


def test_an_80_gb_card_takes_the_paper_s_round(set_free):
    """7B in bfloat16: 64 adapters and more side by side, and 250 self-edits of 2048 tokens."""
    model = meta_model("qwen2.5-7b")
    set_free(79.2e9 - 15.2e9)
    recipe = replace(RECIPE, lora=Lora(32, 64, SOME), batch=1)
    text = ([1] * 49, [True] * 49)
    jobs = [Job([text] * 9, seed=i, recipe=recipe) for i in range(750)]

    assert auto_slots(model, jobs) >= 64
    assert auto_rows(model, 300 + 2048) >= 250


# ------------------------------------------------------------------------------- slots

def jobs_of(n, length, examples=1, **recipe):
    """n jobs that are alike: so many examples of one length."""
    text = ([1] * length, [True] * length)
    return [Job([text] * examples, seed=i, recipe=replace(RECIPE, **recipe)) for i in range(n)]


def bytes_of_slots(model, n, tokens):
    state = step_memory(model, RECIPE.lora, n, tokens=0)
    return state + activation_memory(model, RECIPE.lora, tokens)


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
def test_slots_fit_in_the_free_memory(tiny, set_free, n):
    jobs = jobs_of(40, length=20, batch=1)
    # Twice 20 tokens for each, as a step may be longer than the mean.
    needed = 1.4 * bytes_of_slots(tiny, n, tokens=2 * 20 * n)

    set_free(needed * 1.001)
    assert auto_slots(tiny, jobs) == n

    set_free(needed * 0.999)
    assert auto_slots(tiny, jobs) == n - 1


def test_the_engine_takes_as_many_slots_as_fit(tiny, set_free, monkeypatch):
    jobs = jobs_of(5, length=20, batch=1)
    set_free(1.4001 * bytes_of_slots(tiny, 3, tokens=2 * 20 * 3))
    made = []

    class Spy(Engine):
        def __init__(self, model, recipe, n):
            made.append(n)
            super().__init__(model, recipe, n)
    monkeypatch.setattr(engine, "Engine", Spy)

    assert len(list(sft(tiny, jobs))) == 5
    assert made == [3]


def test_a_job_that_would_not_fit_is_trained_with_recomputed_activations(tiny, set_free, capsys,
                                                                         monkeypatch):
    """A system that runs out of memory kills the process: nothing would be raised."""
    jobs = jobs_of(1, length=20, batch=1)
    set_free(1.41 * bytes_of_slots(tiny, 1, tokens=2 * 20))
    ((_, usual),) = sft(tiny, jobs)
    assert capsys.readouterr().out == ""

    set_free(1.39 * bytes_of_slots(tiny, 1, tokens=2 * 20))
    seen = []
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (seen.append(tiny.recompute), step(self)))
    ((_, short),) = sft(tiny, jobs)

    assert seen == [True] * jobs[0].steps
    assert not tiny.recompute
    assert torch.allclose(usual.weights, short.weights)
    assert capsys.readouterr().out == "memory is short: activations are recomputed\n"


# ------------------------------------------------------------------------------- rows

def cache_bytes(model, rows, length):
    cache = Cache(model, rows, length)
    return sum(keys.nbytes + values.nbytes for keys, values in cache.kv)


def test_rows_fit_in_two_thirds_of_the_free_memory(half, set_free):
    """The rows of a real cache are weighed; one row more would be too much."""
    set_free(5_000_000)

    rows = auto_rows(half, length=128)

    assert 1 < rows < 256
    assert cache_bytes(half, rows, 128) <= 5_000_000 / 1.5
    assert cache_bytes(half, rows + 1, 128) > 5_000_000 / 1.5


def test_rows_are_at_least_one_and_at_most_256(half, set_free):
    set_free(0)
    assert auto_rows(half, length=128) == 1

    set_free(PLENTY)
    assert auto_rows(half, length=128) == 256


# ------------------------------------------------------------------------------- answering

def answering_bytes(model, n):
    """What n adapters weigh in update_and_score: as trained, side by side, and as multiplied by two
    routes, that of the prompts or the rows before and that of the rows now."""
    trained = [torch.zeros(RECIPE.lora.parameters(model)) for _ in range(n)]
    adapters = Adapters.stack(model, RECIPE.lora, trained)
    copy = adapters.flat.to(model.dtype)
    return sum(tensor.nbytes for tensor in [*trained, adapters.flat, copy, copy])


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


def test_what_only_caches_files_is_available(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:   700 kB\nCached: 600 kB\n")

    assert memory.available(file) == 700 * 1024
    # Kernels before 3.14, and systems other than Linux.
    file.write_text("MemTotal: 900 kB\nMemFree: 100 kB\n")
    assert memory.available(file) == memory.available(tmp_path / "nowhere") == 0


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


# ------------------------------------------------------------------------------- running out

ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
          RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"),
          RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_halves_of_what_does_not_fit(error, capsys):
    sizes = []

    def double(items):
        sizes.append(len(items))
        if len(items) > 2:
            raise error
        return [2 * item for item in items]

    assert in_halves(double, [1, 2, 3, 4, 5], CPU) == [2, 4, 6, 8, 10]
    assert sizes == [5, 2, 3, 1, 2]
    assert capsys.readouterr().out.count("out of memory: going on with") == 2


def test_one_that_does_not_fit_is_one_line():
    def never(items):
        raise MemoryError

    with pytest.raises(UserError, match="out of memory with a single"):
        in_halves(never, [1, 2], CPU)


def test_what_has_no_room_is_computed_on_the_host(capsys):
    calls = []

    def add(a, b):
        calls.append(a.device)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return a + b

    assert on_host_if_full(add, torch.ones(2), torch.ones(2)).tolist() == [2, 2]
    assert len(calls) == 2
    assert "on the host" in capsys.readouterr().out


@pytest.mark.parametrize("call", [lambda f: in_halves(lambda items: f(), [1, 2], CPU),
                                  lambda f: on_host_if_full(lambda x: f(), torch.ones(1))])
def test_an_error_of_another_kind_is_raised(call):
    def broken():
        raise RuntimeError("device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        call(broken)


@pytest.mark.parametrize("limit, used, free", [("1000", "300", 700), ("max", "300", float("inf")),
                                               ("100", "300", 0), ("x", "y", float("inf"))])
def test_a_containers_limit_counts(limit, used, free, tmp_path):
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")

    assert memory.free_in_container(tmp_path) == free


def test_without_a_container_there_is_no_limit(tmp_path):
    assert memory.free_in_container(tmp_path / "nowhere") == float("inf")
