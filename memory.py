"""What fits: bytes of each phase, and how much to do side by side. Arithmetic, but for a look at
the device."""
import os
import sys

import torch

from checkpoint import UserError


def free_memory(device):
    """Bytes that are free on a device."""
    if device.type == "cuda":
        # What torch's allocator holds and does not use is free as well.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS
    return os.sysconf(free) * os.sysconf("SC_PAGE_SIZE")


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
    CPU, and of cuBLAS."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


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


def give_back_memory(device):
    """Let the device have what torch's allocator holds and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step_memory(model, lora, slots, tokens):
    """Bytes of a training step with so many adapters and tokens in it.

    Per adapter parameter 18: value, gradient, m and v in float32, a copy in bfloat16. Per token
    what a block keeps for its backward pass, or only its input if activations are recomputed. It is
    too little by up to half where the low-rank products are padded (no grouped_mm)."""
    c = model.config
    kept = 5 * c.dim + 2 * (c.n_head + c.n_kv_head) * c.head_dim + 4 * c.hidden_dim
    if model.recompute:
        kept = c.dim
    return 18 * slots * lora.parameters(model) + tokens * c.n_layer * kept * model.dtype.itemsize


def auto_slots(model, jobs):
    """How many of these sft.Jobs to train side by side: enough to fill a step, few enough to fit.
    """
    tokens = 0
    for job in jobs:
        tokens += job.recipe.epochs * sum(len(ids) for ids, _ in job.examples)
    per_step = tokens / sum(job.steps for job in jobs)      # of one job
    full = 4096 if model.device.type == "cuda" else 1024    # tokens that keep the device busy
    # Twice the mean, as some steps are longer; half of what is free.
    one = step_memory(model, jobs[0].recipe.lora, 1, 2 * per_step)
    fit = int(free_memory(model.device) / 2 / one)
    return max(1, min(len(jobs), round(full / per_step), fit))


def auto_rows(model, length):
    """How many rows of `length` tokens to decode side by side: a third of what is free."""
    c = model.config
    per_row = 2 * c.n_layer * c.n_kv_head * c.head_dim * length * model.dtype.itemsize  # bytes
    return max(1, min(256, free_memory(model.device) // 3 // per_row))


def auto_answering(model, lora):
    """How many adapters answer together: 10 bytes a parameter (as trained, side by side, in
    bfloat16), a third of what is free."""
    fit = free_memory(model.device) / 3 / (10 * lora.parameters(model))
    return max(1, min(64 if model.device.type == "cuda" else 16, int(fit)))
