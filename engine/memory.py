"""What fits: bytes of each phase, and how much to do side by side. Arithmetic, but for a look at
the device."""
import os
import sys
from pathlib import Path

import torch

from support.files import UserError


def free_memory(device):
    """Bytes that are free on a device."""
    if device.type == "cuda":
        # What torch's allocator holds and does not use is free as well.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    if not hasattr(os, "sysconf"):      # Windows
        return 4 * 2 ** 30
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS
    pages = os.sysconf(free) * os.sysconf("SC_PAGE_SIZE")
    return min(max(pages, available()), free_in_container())


def available(file="/proc/meminfo"):
    """Bytes that Linux would give: free ones, and those in which it only caches files (0: unknown).

    Free ones alone are few on any machine that has just read a model from its disk."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def free_in_container(folder="/sys/fs/cgroup"):
    """Bytes that a container's limit leaves (Linux); without one, no bound."""
    try:
        limit = Path(folder, "memory.max").read_text().strip()
        used = int(Path(folder, "memory.current").read_text())
        return float("inf") if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return float("inf")


def peak_memory():
    """Most bytes used so far: on CUDA by torch's allocator, else by the process (0: unknown)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:     # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024      # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error):
    """Whether this exception says so. torch has several: of its allocator on CUDA, of the one on a
    CPU, and of cuBLAS. While a graph is recorded, another error may follow from it."""
    if error is None:
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    if isinstance(error, RuntimeError) and any(word in str(error) for word in words):
        return True
    return is_out_of_memory(error.__context__)


def less_memory(model, slots) -> int:
    """After running out: half the slots; with one slot left, activations are recomputed as well.

    What has ended was yielded already. The others start anew from their seeds, to the same end."""
    if slots > 1:
        slots //= 2
        print(f"out of memory: going on with {slots} adapters side by side", flush=True)
    elif not model.recompute:
        model.recompute = True
        print("out of memory: going on with recomputed activations", flush=True)
    else:
        raise UserError("out of memory with a single adapter and recomputed activations; try a "
                        "smaller batch or shorter documents")
    return slots


def in_halves(function, items: list, device) -> list:
    """function(items), a list with an entry for each; when memory runs out, half of the items at a
    time. UserError if a single one is too much."""
    try:
        return function(items)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
    # Not within `except`, as the error holds on to what was in use.
    if len(items) == 1:
        raise UserError("out of memory with a single adapter or text; try shorter texts, or "
                        "--dtype bfloat16")
    half = len(items) // 2
    print(f"out of memory: going on with {half} at a time", flush=True)
    give_back_memory(device)
    return (in_halves(function, items[:half], device)
            + in_halves(function, items[half:], device))


def on_host_if_full(function, *tensors):
    """function(*tensors), computed on the host if the device's memory has run out."""
    try:
        return function(*tensors)
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
    print("out of memory: this is computed on the host", flush=True)
    give_back_memory(tensors[0].device)
    return function(*[x.cpu() for x in tensors])


def give_back_memory(device):
    """Let the device have what torch's allocator holds and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step_memory(model, lora, slots, tokens):
    """Bytes of a training step beside the weights, with so many adapters and tokens in it.

    Within 15 % of simulated peaks (tests/test_memory.py); too little by up to half where the
    low-rank products are padded (no grouped_mm)."""
    # Of each adapter parameter: value, m and v in float32, and in bfloat16 a copy and the gradient.
    adapters = 16 * slots * lora.parameters(model)
    # The output layer works on chunks of at most 2^27 logits: in bfloat16, and twice in float32.
    most = 2 ** 24 if model.device.type == "cpu" else 2 ** 27
    chunk = min(tokens * model.config.vocab_size, most)
    return adapters + activation_memory(model, lora, tokens) + 10 * chunk


def activation_memory(model, lora, tokens):
    """Bytes that are kept for the backward pass."""
    c = model.config
    heads, kv_heads = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    # A block keeps what its norms, its attention (queries, keys, values, output) and its activation
    # function read, and the input of each adapted layer; a frozen layer needs none.
    block = 2 * c.dim + 2 * (heads + kv_heads) + 3 * c.hidden_dim
    targets = set(lora.targets)
    if targets & {"q_proj", "k_proj", "v_proj"}:
        block += c.dim
    if targets & {"gate_proj", "up_proj"}:
        block += c.dim
    if "o_proj" in targets:
        block += heads
    if "down_proj" in targets:
        block += c.hidden_dim
    if c.qk_norm:
        block += heads + kv_heads

    # If activations are recomputed, only a block's input is kept, and one block at a time.
    kept = c.n_layer * block
    if model.recompute:
        kept = c.n_layer * c.dim + block
    return tokens * kept * model.dtype.itemsize


def tokens_per_step(jobs) -> float:
    """Of one of these lora.Jobs, the mean."""
    return sum(job.tokens for job in jobs) / sum(job.steps for job in jobs)


def auto_slots(model, jobs, free=None):
    """How many of these lora.Jobs to train side by side: enough to fill a step, few enough to fit.
    """
    # Tokens that keep the device busy: of a small model it takes more.
    full = 1024
    if model.device.type != "cpu":
        full = 8192 if sum(p.numel() for p in model.parameters()) < 2e9 else 4096
    fit = int(share_of_free(model, free) / one_job_memory(model, jobs))
    return max(1, min(len(jobs), round(full / tokens_per_step(jobs)), fit))


def one_job_memory(model, jobs):
    """Bytes of a step with one of these lora.Jobs in it."""
    # Twice the mean, as some steps are longer.
    lora = jobs[0].recipe.lora
    return (step_memory(model, lora, 1, 0)
            + activation_memory(model, lora, 2 * tokens_per_step(jobs)))


def share_of_free(model, free=None):
    """Bytes that training may take."""
    return (free or free_memory(model.device)) / 1.4


def recompute_if_short(model, jobs):
    """On a CPU: recompute activations if even one of these lora.Jobs would not fit. There a system
    that runs out kills the process, and less_memory never hears of it."""
    if model.device.type == "cpu" and not model.recompute:
        if one_job_memory(model, jobs) > share_of_free(model):
            print("memory is short: activations are recomputed", flush=True)
            model.recompute = True


def row_memory(model, length):
    """Bytes of the keys and values of a row of `length` tokens."""
    c = model.config
    return 2 * c.n_layer * c.n_kv_head * c.head_dim * length * model.dtype.itemsize


def auto_rows(model, length, free=None):
    """How many rows of `length` tokens to decode side by side: 1/1.5 of what is free, as a cache
    that grows has one layer twice."""
    free = free or free_memory(model.device)
    return max(1, min(256, int(free / 1.5) // row_memory(model, length)))


def auto_answering(model, lora, free=None):
    """How many adapters answer together: a third of what is free."""
    # Bytes per parameter: as trained, side by side, and two copies in bfloat16 while the rows that
    # are left are folded.
    fit = (free or free_memory(model.device)) / 3 / (12 * lora.parameters(model))
    return max(1, min(16 if model.device.type == "cpu" else 64, int(fit)))
