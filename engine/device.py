"""The device: what a GPU does otherwise than a CPU, what fits, and what to do when memory runs out.

GPU-only code is a few small functions. The plain version is used everywhere else: tests run it, and
the rest as far as a CPU can; tests/test_gpu.py needs a GPU. What fits is arithmetic.
"""
import contextlib
import math
import os
import re
import resource
import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from support.files import UserError

# On Hopper torch would choose cuDNN's attention, which builds a plan of about a second for every
# new shape. The ribbon has new shapes at every step; flash attention has no such price.
torch.backends.cuda.enable_cudnn_sdp(False)
# The ribbon never asks for the same sizes twice: without this torch's allocator would be full of
# pieces that fit nothing. Read when the first tensor comes to a GPU.
if sys.platform == "linux":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def to_device(tensor, device):
    """Copy to a device without waiting for it."""
    # A copy from ordinary memory would wait: the device can't read it while the system may move it.
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# ------------------------------------------------------------------------------- graphs

def has_graphs(device):
    """Whether steps are recorded as CUDA graphs. NANOSEAL_NO_GRAPHS=1 says no, to find a fault."""
    return device.type == "cuda" and not os.environ.get("NANOSEAL_NO_GRAPHS")


@cache
def own_stream():
    """The stream on which training steps are recorded.

    When a CUDA graph ends, torch clears the cuBLAS workspace of every graph that was recorded on
    the same stream (pytorch#193402, torch 2.12 and newer). Decoding records and drops graphs while
    training steps wait to be replayed, so these must not share torch's one capture stream."""
    return torch.cuda.Stream()


class Recorded:
    """A computation that is recorded as a CUDA graph, one for all inputs of the same shapes, and
    then launched whole: a step of thousands of kernels costs the host one call."""

    def __init__(self):
        self.loaded = set()     # shapes that have run once: then every kernel is loaded
        self.graphs = {}        # shapes -> (graph, its input, its output)
        self.pool = ()          # memory that all graphs share, as they run one after the other

    def __call__(self, compute, x):
        """compute(x), a tensor. compute may read x.tensors() and what never changes its address
        (weights, optimizer state), and may write to the latter."""
        shapes = tuple(tensor.shape for tensor in x.tensors())
        if shapes not in self.loaded:
            self.loaded.add(shapes)
            return compute(x)
        if shapes not in self.graphs:
            self.graphs[shapes] = self.record(compute, x)
        graph, own, result = self.graphs[shapes]
        for old, new in zip(own.tensors(), x.tensors()):
            old.copy_(new)
        graph.replay()
        return result.clone()

    def record(self, compute, x):
        """(a graph of compute(x), x, the graph's output). Nothing runs yet."""
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would give all idle memory back each time, for the next steps to fetch.
        # Here only when little is free. The quarter is a guess, which never ran on a GPU.
        if torch.cuda.mem_get_info()[0] < torch.cuda.memory_reserved() / 4:
            torch.cuda.empty_cache()
        torch.cuda.synchronize()
        with torch.cuda.stream(own_stream()):
            graph.capture_begin(*self.pool)
            try:
                result = compute(x)
            finally:
                graph.capture_end()
        self.pool = (graph.pool(),)
        return graph, x, result


# ------------------------------------------------------------------------------- kernels

def few_kernels(x):
    """Whether x is on CUDA, where a small kernel takes as long as a larger one."""
    return x.is_cuda


def fused(function, x):
    """The function, compiled if x is on CUDA: pointwise operations become few kernels, so that
    their values are not written and read again each time."""
    return compiled(function) if few_kernels(x) else function


@cache
def compiled(function):
    # One graph for all shapes. Where that can't be done (no C compiler), it runs as it is.
    torch._dynamo.config.suppress_errors = True
    return torch.compile(function, dynamic=True)


def together(x, *layers):
    """[layer(x) for layer in layers], linear layers. On CUDA one product with all their weights,
    and one with the A's of all their adapters (ribbon.LowRank)."""
    widths = [layer.out_features for layer in layers]
    # To lay the gradients of wide parts side by side takes longer than a single product saves.
    wide = torch.is_grad_enabled() and sum(widths) > 3 * x.shape[1]
    if not few_kernels(x) or wide or any(layer.weight.requires_grad for layer in layers):
        return [layer(x) for layer in layers]
    y = F.linear(x, joined(layers, "weight"), joined(layers, "bias"))
    parts = list(y.split(widths, -1))
    adapted = [i for i, layer in enumerate(layers) if layer.delta]
    if adapted:
        deltas = [layers[i].delta for i in adapted]
        # Stacked once in a Route: of a decoding, in its first step.
        if deltas[0].stacked is None:
            deltas[0].stacked = torch.cat([delta.A for delta in deltas], 1)
        h = deltas[0].down(x, deltas[0].stacked)
        for i, delta, own in zip(adapted, deltas, h.chunk(len(deltas), -1)):
            parts[i] = delta.up(own, parts[i])
    return parts


def joined(layers, name):
    """The layers' weights (or biases, or None) as one tensor. Each is then a view of it, so that
    whoever reads or writes a weight finds what is multiplied."""
    parts = [getattr(layer, name) for layer in layers]
    if parts[0] is None:
        return None
    lengths = [len(part) for part in parts]
    whole = getattr(layers[0], f"joined_{name}", None)
    # Not yet, or other weights have been loaded: they move together. Outside of inference_mode, in
    # which training could not use them later.
    if whole is None or not all(map(torch.Tensor.is_set_to, parts, whole.split(lengths))):
        with torch.inference_mode(False):
            whole = torch.cat(parts)
            setattr(layers[0], f"joined_{name}", whole)
            for layer, part in zip(layers, whole.split(lengths)):
                setattr(layer, name, torch.nn.Parameter(part, requires_grad=False))
    return whole


def added(x, layer, y):
    """x + layer(y). On CUDA, where no gradient is needed, the product adds to x in place."""
    if not few_kernels(x) or torch.is_grad_enabled():
        return x + layer(y)
    x.addmm_(y, layer.weight.mT)
    return x if layer.delta is None else layer.delta(y, x)


def has_flash(x):
    """Whether flash attention takes x (T, H, E): half precision, at most 256 wide, Ampere on."""
    return (x.is_cuda and torch.backends.cuda.is_flash_attention_available()
            and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] <= 256
            and torch.cuda.get_device_capability(x.device)[0] >= 8)


def has_grouped_mm(device, dtype, widths):
    """Whether F.grouped_mm is fast for matrices of these widths: fused in bfloat16 on data-centre
    GPUs, capability 9 or 10 (others wait for the device), a loop in C++ on a CPU."""
    if device.type == "cuda":
        fast = dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)
    else:
        fast = dtype != torch.float64
    # Its rows must begin at multiples of 16 bytes.
    return fast and all(width % 8 == 0 for width in widths)


def flash_attention(q, k, v, bounds, longest, causal=True, seen=None):
    """Attention within each sequence of a ribbon, as it lies: nothing is padded.

    q (T, H, E), k and v (T', K, E). bounds: of the queries and of the keys, (n + 1,) int32, 0 and
    where each sequence ends; longest: the same. seen (n,) int32: how many keys count, if not all.
    It has a gradient."""
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *bounds, *longest, 0.0, causal, False, seqused_k=seen)
    return out


# ------------------------------------------------------------------------------- what fits

def free_memory(device, meminfo="/proc/meminfo", cgroup="/sys/fs/cgroup"):
    """Bytes that are free on a device."""
    if device.type == "cuda":
        # What torch's allocator holds and does not use is free as well.
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    # Linux also gives what it only caches files in. Free bytes alone are few on a machine that has
    # just read a model from its disk.
    with contextlib.suppress(OSError):
        found = re.search(r"^MemAvailable:\s*(\d+)", Path(meminfo).read_text(), re.MULTILINE)
        free = max(free, 1024 * int(found[1]) if found else 0)
    # A container may have a limit of its own ("max": none).
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path(cgroup, "memory.max").read_text())
        used = int(Path(cgroup, "memory.current").read_text())
        free = min(free, max(0, limit - used))
    return free


def peak_memory():
    """Most bytes used so far: on CUDA by torch's allocator, else by the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024      # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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


def auto_slots(model, jobs, free=None) -> int:
    """How many of these lora.Jobs fill a step and fit side by side. 0: not even one fits."""
    # Tokens that keep the device busy: of a small model it takes more.
    full = 1024
    if model.device.type != "cpu":
        full = 8192 if sum(p.numel() for p in model.parameters()) < 2e9 else 4096
    tokens = sum(job.tokens for job in jobs) / sum(job.steps for job in jobs)
    # Bytes of one job, as in step_memory: for twice the mean number of tokens, as some steps are
    # longer.
    lora = jobs[0].recipe.lora
    need = 16 * lora.parameters(model) + activation_memory(model, lora, 2 * tokens)
    fit = int((free or free_memory(model.device)) / 1.4 / need)
    # The longest job's steps come one after the other: more slots than these save no step.
    steps = [job.steps for job in jobs]
    useful = math.ceil(1.05 * sum(steps) / max(steps))
    return min(len(jobs), max(1, round(full / tokens)), useful, fit)


def row_memory(model, length):
    """Bytes of the keys and values of a row of `length` tokens."""
    c = model.config
    return 2 * c.n_layer * c.n_kv_head * c.head_dim * length * model.dtype.itemsize


def auto_rows(model, length, free=None):
    """How many rows of `length` tokens to decode side by side: 1/1.5 of what is free, as a cache
    that grows has one layer twice."""
    free = free or free_memory(model.device)
    most = 256 if model.device.type == "cpu" else 1280
    return max(1, min(most, int(free / 1.5) // row_memory(model, length)))


def auto_answering(model, lora, free=None):
    """How many adapters answer together: a third of what is free."""
    # Bytes per parameter: as trained, side by side, and two copies in bfloat16 while the rows that
    # are left are folded.
    fit = (free or free_memory(model.device)) / 3 / (12 * lora.parameters(model))
    return max(1, min(16 if model.device.type == "cpu" else 256, int(fit)))


# ---------------------------------------------------------------------------- when memory runs out

def try_memory(function):
    """(True, function()), or (False, None) if memory ran out; then what is unused is given back."""
    try:
        return True, function()
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
    # Not within `except`, as the error holds on to what was in use. Without CUDA it does nothing.
    torch.cuda.empty_cache()
    return False, None


def in_halves(function, items: list) -> list:
    """function(items), a list with an entry for each; when memory runs out, half of the items at a
    time. UserError if a single one is too much."""
    ok, found = try_memory(lambda: function(items))
    if ok:
        return found
    if len(items) == 1:
        raise UserError("out of memory with a single adapter or text; try shorter texts, or "
                        "--dtype bfloat16")
    half = len(items) // 2
    print(f"out of memory: going on with {half} at a time", flush=True)
    return in_halves(function, items[:half]) + in_halves(function, items[half:])


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
