"""What a GPU does otherwise than a CPU: each a small function beside the plain path.

The tests run the plain paths, and these as far as a CPU can; tests/test_cuda.py needs a GPU.
"""
import os
import sys
from collections import Counter
from functools import cache

import torch

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


def cpu_has_bfloat16():
    """Whether this CPU multiplies bfloat16: three to four times as fast as float32 then."""
    # Before torch 2.13 there is no such question.
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return found.get("avx512_bf16", False) or found.get("amx_bf16", False)


# ------------------------------------------------------------------------------- graphs

def has_graphs(device):
    """Whether steps are recorded as CUDA graphs. NANOSEAL_NO_GRAPHS=1 says no, to find a fault."""
    return device.type == "cuda" and not os.environ.get("NANOSEAL_NO_GRAPHS")


class Recorded:
    """A computation that is recorded as a CUDA graph, one for all inputs of the same shapes, and
    then launched whole: a step of thousands of kernels costs the host one call."""
    PLAIN = 2       # so often it just runs, as few replays would not pay for recording

    def __init__(self):
        self.seen = Counter()
        self.graphs = {}    # shapes -> (graph, its input, its output)
        self.pool = None    # memory that all graphs share, as they run one after the other

    def __call__(self, compute, x):
        """compute(x), a tensor. compute reads the tensors of x.tensors() and what never changes its
        address, and may write to the latter."""
        shapes = tuple(tensor.shape for tensor in x.tensors())
        # A graph can only be recorded when every kernel was loaded.
        self.seen[shapes] += 1
        if self.seen[shapes] <= self.PLAIN:
            return compute(x)
        if shapes not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):   # records, and runs nothing
                result = compute(x)
            self.pool = graph.pool()
            self.graphs[shapes] = graph, x, result
        graph, own, result = self.graphs[shapes]
        for old, new in zip(own.tensors(), x.tensors()):
            old.copy_(new)
        graph.replay()
        return result.clone()


# ------------------------------------------------------------------------------- fused kernels

def fused(function, x):
    """The function, compiled if x is on CUDA: pointwise operations become few kernels, so that
    their values are not written and read again each time."""
    return compiled(function) if x.is_cuda else function


@cache
def compiled(function):
    # One graph for all shapes. Where that can't be done (no C compiler), it runs as it is.
    torch._dynamo.config.suppress_errors = True
    return torch.compile(function, dynamic=True)


# ------------------------------------------------------------------------------- flash attention

def has_flash(x):
    """Whether flash attention takes x (T, H, E): half precision, at most 256 wide, Ampere on."""
    return (x.is_cuda and torch.backends.cuda.is_flash_attention_available()
            and x.dtype in (torch.bfloat16, torch.float16) and x.shape[-1] <= 256
            and torch.cuda.get_device_capability(x.device)[0] >= 8)


def flash_attention(q, k, v, bounds, longest):
    """Causal attention within each sequence of a ribbon, as it lies: nothing is padded.

    q (T, H, E), k and v (T, K, E); bounds (n + 1,) int32, 0 and where each sequence ends; longest,
    of the sequences. It has a gradient."""
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, 0.0, True, False)
    return out
