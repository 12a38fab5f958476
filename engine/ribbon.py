"""The ribbon: sequences laid end to end, and attention within each of them.

Nothing is padded but what attention needs: on a CPU it unrolls the ribbon into a padded view and
rolls the result up again; on CUDA flash attention takes the ribbon as it lies.

Shapes: T tokens, n sequences of a group, L the longest of them, H heads, K key/value heads, E
components of a head.
"""
import math

import torch
import torch.nn.functional as F

from engine.gpu import flash_attention, has_flash, to_device


class Ribbon:
    """Sequences laid end to end: T = sum(lengths) tokens, and no padding.

    For lengths [3, 1, 2] and sequences a, b, c:

        ribbon       a0 a1 a2 b0 c0 c1
        row           0  0  0  1  2  2      which sequence a token belongs to
        position      0  1  2  0  0  1      its place in that sequence
        unrolled     a0 a1 a2 | b0 .. .. | c0 c1 ..        (3 sequences, L = 3)
        cell          0  1  2  3  6  7      a token's place in the unrolled view

    A ".." is padding. It stands to the right of its sequence, and attention is causal, so that no
    token ever sees it and no mask is needed.

    row, position, cell: (T,). last, each sequence's last token: (n,). bounds, 0 and one after each
    last token: (n + 1,) in int32, as flash attention wants them."""

    def __init__(self, lengths, device, longest=0):
        """Sequences are unrolled in groups of like lengths. longest: no sequence is longer; worked
        out from the lengths if 0."""
        self.longest = longest or max(lengths)
        groups = like_lengths(lengths)

        # Each group is a block of n x L cells; the blocks lie one after the other.
        self.shapes = []                                    # (n, L) of each group
        self.cells = 0                                      # of all groups together
        begin = torch.zeros(len(lengths), dtype=torch.long)     # each sequence's first cell
        for members in groups:
            longest = max(lengths[i] for i in members)
            begin[members] = self.cells + longest * torch.arange(len(members))
            self.shapes.append((len(members), longest))
            self.cells += len(members) * longest
        self.masks = [None] * len(groups)                   # None: causal (see padding.py)

        # Where each token is: worked out on the host, so that nothing waits for the device.
        length = torch.tensor(lengths)
        ends = length.cumsum(0)
        row = torch.repeat_interleave(torch.arange(len(lengths)), length)
        position = torch.arange(row.numel()) - (ends - length)[row]
        self.row = to_device(row, device)
        self.position = to_device(position, device)
        self.cell = to_device(begin[row] + position, device)
        self.last = to_device(ends - 1, device)
        self.bounds = to_device(F.pad(ends, (1, 0)).int(), device)
        # Without padding the unrolled view has the ribbon's own order: unrolling is a reshape.
        self.even = len(groups) == 1 and self.cells == row.numel()

    def unroll(self, x):
        """(T, ...) -> [(n, L, ...) of each group], zeros where there is padding."""
        # index_copy, as its backward pass is a gather; an indexed assignment's would sort.
        if not self.even:
            x = x.new_zeros(self.cells, *x.shape[1:]).index_copy(0, self.cell, x)
        blocks = x.split([n * longest for n, longest in self.shapes])
        return [block.view(*shape, *x.shape[1:]) for block, shape in zip(blocks, self.shapes)]

    def roll(self, views):
        """[(n, L, ...) of each group] -> (T, ...), the inverse of `unroll`."""
        blocks = [view.reshape(-1, *view.shape[2:]) for view in views]
        x = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        return x if self.even else x.index_select(0, self.cell)

    def attend(self, layer, q, k, v):
        """Causal attention within each sequence. q (T, H, E), k and v (T, K, E) -> (T, H, E).

        `layer` is not used here: decode.Cache's attend needs it."""
        if has_flash(q) and not any(mask is not None for mask in self.masks):
            return flash_attention(q, k, v, self.bounds, self.longest)
        # One call per group of like lengths. Within it sequences are a batch, and heads are too.
        outputs = []
        groups = zip(self.unroll(q), self.unroll(k), self.unroll(v), self.masks)
        for q_view, k_view, v_view, mask in groups:                         # (n, L, H or K, E)
            y = attention(q_view.transpose(1, 2), k_view.transpose(1, 2), v_view.transpose(1, 2),
                          mask)
            outputs.append(y.transpose(1, 2))                               # (n, L, H, E)
        return self.roll(outputs)


class Segments:
    """Where the tokens of n adapters lie on a ribbon: the first counts[0] are adapter 0's, and so
    on. A count may be 0. fixed: for CUDA graphs, the same products whatever the counts are."""

    def __init__(self, counts, device, fixed=False):
        count = torch.tensor(counts)
        ends = count.cumsum(0)
        longest = max(counts)
        self.even = min(counts) == longest and not fixed
        self.ends = to_device(ends.int(), device)   # (n,) int32, as grouped_mm wants them
        # A view in which each segment is padded to the longest: (n, L) cells. cell (T,): where a
        # token stands in it.
        self.longest = longest
        shift = longest * torch.arange(len(counts)) - (ends - count)
        self.cell = to_device(torch.arange(sum(counts)) + shift.repeat_interleave(count), device)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(E) + mask) v. q (n, H, L, E), k and v (n, K, L', E) -> (n, H, L, E).

    mask: added to the scores, or false where a key is not seen; None: causal."""
    # Grouped-query attention: several query heads share a key head.
    shared_heads = q.shape[1] // k.shape[1]
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[2] > 256:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                              enable_gqa=shared_heads > 1)
    # On a CPU torch's own takes up to four times as long in bfloat16 as these products. But they
    # keep L^2 scores for the backward pass, which for long texts are most of a step's memory.
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    if shared_heads > 1:
        k, v = k.repeat_interleave(shared_heads, dim=1), v.repeat_interleave(shared_heads, dim=1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def like_lengths(lengths):
    """Indices of sequences in groups: 1 to 32 tokens, 33 to 128, 129 to 512, ...

    One long sequence must not pad a hundred short ones to its own length."""
    # The number of binary digits of n - 1, halved.
    groups = {}
    for i, n in enumerate(lengths):
        size = (max(n, 16) - 1).bit_length() // 2
        if n:
            groups.setdefault(size, []).append(i)
    return list(groups.values())


def round_up(n, block):
    """The next multiple of `block`."""
    return -(-n // block) * block
