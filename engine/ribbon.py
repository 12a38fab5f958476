"""The ribbon: sequences laid end to end, and attention within each of them. Then a training step's
tokens, which are laid out on one.

Nothing is padded but what attention needs: on a CPU it unrolls the ribbon into a padded view and
rolls the result up again; on CUDA flash attention takes the ribbon as it lies.

Shapes: T tokens, n sequences of a group, L the longest of them, H heads, K key/value heads, E
components of a head.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from engine.device import few_kernels, flash_attention, has_flash, to_device


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
        # One long sequence must not pad a hundred short ones to its own length: 1 to 32 tokens are
        # a group, 33 to 128 the next, and so on.
        groups = {}
        for i, n in enumerate(lengths):
            if n:
                groups.setdefault((max(n, 16) - 1).bit_length() // 2, []).append(i)
        self.groups = list(groups.values())

        # Each group is a block of n x L cells; the blocks lie one after the other.
        self.shapes = []                                    # (n, L) of each group
        self.cells = 0                                      # of all groups together
        begin = torch.zeros(len(lengths), dtype=torch.long)     # each sequence's first cell
        for members in self.groups:
            longest = max(lengths[i] for i in members)
            begin[members] = self.cells + longest * torch.arange(len(members))
            self.shapes.append((len(members), longest))
            self.cells += len(members) * longest
        self.masks = [None] * len(self.groups)              # None: causal (see PaddedRibbon)

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
        self.even = len(self.groups) == 1 and self.cells == row.numel()

    def unroll(self, x):
        """(T, ...) -> [(n, L, ...) of each group], zeros where there is padding."""
        # index_copy, as its backward pass is a gather; an indexed assignment's would sort.
        if not self.even:
            x = x.new_zeros(self.cells, *x.shape[1:]).index_copy(0, self.cell, x)
        blocks = x.split([n * longest for n, longest in self.shapes])
        return [block.view(*shape, *x.shape[1:]) for block, shape in zip(blocks, self.shapes)]

    def attend(self, layer, q, k, v):
        """Causal attention within each sequence. q (T, H, E), k and v (T, K, E) -> (T, H, E).

        `layer` is not used here: decode.Rows needs it for its cache."""
        if has_flash(q) and not any(mask is not None for mask in self.masks):
            return flash_attention(q, k, v, [self.bounds] * 2, [self.longest] * 2)
        # One call per group of like lengths. Within it sequences are a batch, and heads are too.
        outputs = []
        groups = zip(self.unroll(q), self.unroll(k), self.unroll(v), self.masks)
        for q_view, k_view, v_view, mask in groups:                         # (n, L, H or K, E)
            y = attention(q_view.transpose(1, 2), k_view.transpose(1, 2), v_view.transpose(1, 2),
                          mask)
            outputs.append(y.transpose(1, 2).flatten(0, 1))                 # (n * L, H, E)
        # Rolled up again: each token's cell.
        y = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return y if self.even else y.index_select(0, self.cell)


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


@dataclass
class LowRank:
    """What the adapters add to a layer: (alpha / r) B A x, each token under its segment's adapter.

    A (n, r, in), B (n, out, r)."""
    A: torch.Tensor
    B: torch.Tensor
    scale: float
    segments: Segments
    grouped: bool
    stacked: torch.Tensor | None = None     # the A's of all layers that read x (device.together)

    def __call__(self, x, y):
        """y (T, out) plus the term of x (T, in). y itself may change."""
        return self.up(self.down(x, self.A), y)

    def down(self, x, A):
        """A x: (T, r), or (n, L, r) where the products are batched over adapters."""
        n, segments = len(A), self.segments
        # Segments of one length: a product batched over adapters.
        if segments.even:
            return x.view(n, -1, x.shape[1]) @ A.mT
        # One kernel multiplies each segment by its own matrix, without padding.
        if self.grouped:
            return F.grouped_mm(x, A.mT, offs=segments.ends)
        # Where there is no such kernel, segments are padded. index_copy, as its backward pass is a
        # gather; an indexed assignment's would sort.
        x = x.new_zeros(n * segments.longest, x.shape[1]).index_copy(0, segments.cell, x)
        return x.view(n, segments.longest, -1) @ A.mT

    def up(self, h, y):
        """y + (alpha / r) B h."""
        segments, B = self.segments, self.B.mT
        if segments.even and few_kernels(y) and not torch.is_grad_enabled():
            y.view(len(h), -1, y.shape[1]).baddbmm_(h, B, alpha=self.scale)
            return y
        h = h * self.scale
        if self.grouped and not segments.even:
            term = F.grouped_mm(h, B, offs=segments.ends)
        else:
            term = (h @ B).flatten(0, 1)
            term = term if segments.even else term.index_select(0, segments.cell)
        return y + term if few_kernels(y) else y.add_(term)     # a part of a whole must not change


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(E) + mask) v. q (n, H, L, E), k and v (n, K, L', E) -> (n, H, L, E).

    mask: added to the scores, or false where a key is not seen; None: causal."""
    # Grouped-query attention: several query heads share a key head. By hand each has its own; and
    # on a GPU with a mask, as no fused kernel takes both.
    shared_heads = q.shape[1] // k.shape[1]
    by_hand = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= 256
    if shared_heads > 1 and (by_hand or q.is_cuda and mask is not None):
        k, v = k.repeat_interleave(shared_heads, dim=1), v.repeat_interleave(shared_heads, dim=1)
    if not by_hand:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                              enable_gqa=k.shape[1] < q.shape[1])
    # On a CPU torch's own takes up to four times as long in bfloat16 as these products. But they
    # keep L^2 scores for the backward pass, which for long texts are most of a step's memory.
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


# ------------------------------------------------------------------------------- a training step

# A job's texts become tensors once. A step then lays out those of every running job without work
# per token.

@dataclass
class Example:
    """A text to train on, as tensors on the host. Made once per job, used in every epoch."""
    ids: torch.Tensor       # (L,)
    source: torch.Tensor    # (N,) the tokens that predict a label
    labels: torch.Tensor    # (N,)
    weight: torch.Tensor    # (N,) of each label: 1, or as given; more for a pad of many
    position: torch.Tensor  # (L,)
    total: float            # of the weights' sizes
    pads: int = 0           # how many of the last ids are pads (see with_pads)

    @classmethod
    def of(cls, ids: list[int], learn: list, pad_to=0):
        """Token j predicts token j + 1, if that one has a weight: learn [0, 0, 1, 1] gives source
        [1, 2] and labels ids[2], ids[3]."""
        if pad_to:
            ids, learn = ids[:pad_to], learn[:pad_to]
        ids, learn = torch.tensor(ids), torch.tensor(learn, dtype=torch.double)
        source = learn[1:].nonzero()[:, 0]
        weight = learn[source + 1]
        example = cls(ids, source, ids[source + 1], weight, torch.arange(len(ids)),
                      float(weight.abs().sum()))
        return with_pads(example, pad_to) if len(ids) < pad_to else example


@dataclass
class Room:
    """For CUDA graphs, which are of fixed shapes: steps of about as many tokens are filled up to
    the same shapes. What fills them is read and not learned, and none of the texts sees it."""
    texts: int              # no step has more
    longest: int            # tokens; no text has more
    most: int               # tokens; a step of more keeps a GPU busy, and is not filled up

    @classmethod
    def of(cls, jobs, slots, most):
        texts, longest = 0, 16
        for job in jobs:
            texts = max(texts, min(job.recipe.batch, len(job.examples)))
            longest = max(longest, *[len(ids) for ids, _ in job.examples])
        return cls(slots * texts, longest, most)

    def fill(self, lengths) -> list[int]:
        """The lengths of the texts to add."""
        total = sum(lengths)
        size = next_size(total)
        added = [self.longest] * ((size - total) // self.longest)
        added.append((size - total) % self.longest)
        # An eighth of the tokens is the most that is added; then texts without any.
        most = self.texts + size // (8 * self.longest) + 1
        return added + [0] * (most - len(lengths) - len(added))


def next_size(n):
    """The next of 256, 512, .. 4096, 4608, ..: an eighth more at most, but at least 256, because a
    step of fewer tokens takes as long."""
    block = max(256, 2 ** ((n - 1).bit_length() - 4))
    return -(-n // block) * block


@dataclass
class Packed:
    """The next micro-batch of every running job, end to end, sorted by slot. On the device."""
    ribbon: Ribbon
    segments: Segments      # the tokens of each slot
    ids: torch.Tensor       # (T,)
    source: torch.Tensor    # (N,) the tokens that predict a label
    labels: torch.Tensor    # (N,)
    weight: torch.Tensor    # (N,) of each label's loss: for each slot their sizes add up to 1
    slot: torch.Tensor      # (N,) whose label it is
    fixed: bool             # filled up to one of a few shapes
    # Of each slot, (n, 1): train.py sets them.
    lr: torch.Tensor | None = None
    t: torch.Tensor | None = None

    def tensors(self):
        """All that a step reads of it."""
        return [self.ribbon.position, self.ribbon.bounds, self.segments.ends, self.ids, self.source,
                self.labels, self.weight, self.slot, self.lr, self.t]


def pack(running, device, dtype, room: Room | None = None) -> Packed:
    """Lay out a step: `running` holds each slot's train.Running, or None. dtype: of the weights."""
    texts, owner, totals = [], [], []       # of each text: its slot, and the weight of all there
    for slot, active in enumerate(running):
        batch = []
        if active:
            batch = [active.examples[number] for number in next(active.batches)]
        texts += batch
        owner += [slot] * len(batch)
        # The loss is a mean over the slot's own labels, so each weighs one over their number.
        totals += [sum(x.total for x in batch) or 1.0] * len(batch)

    lengths = [len(x.ids) for x in texts]
    counts = [0] * len(running)
    for slot, length in zip(owner, lengths):
        counts[slot] += length
    # What belongs to labels is worked out for all texts at once.
    n_labels = torch.tensor([len(x.source) for x in texts])
    begin = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)     # of each text on the ribbon
    source = [torch.cat([x.source for x in texts]) + begin.repeat_interleave(n_labels)]
    slots = [torch.tensor(owner).repeat_interleave(n_labels)]
    weight = torch.cat([x.weight for x in texts]).to(dtype)
    weight = [weight / torch.tensor(totals, dtype=dtype).repeat_interleave(n_labels)]
    ids = [x.ids for x in texts]
    labels = [x.labels for x in texts]
    if room and sum(lengths) > room.most:
        room = None
    if room:
        # Further texts, which belong to the last slot, and further labels that weigh nothing.
        added = room.fill(lengths)
        lengths += added
        counts[-1] += sum(added)
        ids.append(torch.zeros(sum(added), dtype=torch.long))
        n_labels = len(source[0])
        # Where most tokens have a label, as many as there are tokens: fewer shapes.
        size = sum(lengths)
        lacking = (size if 2 * n_labels > size else next_size(n_labels)) - n_labels
        for filled in (source, labels, slots):
            filled.append(torch.zeros(lacking, dtype=torch.long))
        weight.append(torch.zeros(lacking, dtype=dtype))

    # Attention needs to know where each text ends, and which tokens imitate padding, if any do.
    pads = [x.pads for x in texts]
    if any(pads):
        position = torch.cat([x.position for x in texts])
        ribbon = PaddedRibbon(lengths, pads, position, device)
    else:
        ribbon = Ribbon(lengths, device, room.longest if room else 0)
    return Packed(
        ribbon, Segments(counts, device, fixed=room is not None),
        ids=to_device(torch.cat(ids), device),
        source=to_device(torch.cat(source), device),
        labels=to_device(torch.cat(labels), device),
        weight=to_device(torch.cat(weight), device),
        slot=to_device(torch.cat(slots), device),
        fixed=room is not None)


# -------------------------------------------------- the official code's padded rows: --pad-to 2048

# NOTE(paper): the official code fills every document with EOS to a row of 2048 tokens and learns
# the pads as well, which are about 98 % of its targets. In such a row a pad sees the content and no
# pad, not even itself, since the padding mask hides those; so pads differ in their position alone
# (RoPE). Here eight of them, spread evenly over the row and weighted, stand for all. Rows filled
# plainly, in which pads see pads, train something else: docs/results/official.md tells.

def with_pads(example, pad_to, n_pads=8):
    """An Example whose text ends with one EOS, as if it filled a row of pad_to tokens.

    That EOS is the first pad. Each pad but the last predicts the next one: `n` of them do."""
    content = len(example.ids) - 1
    n = pad_to - 1 - content
    n_pads = min(n_pads, n)
    spread = ((torch.arange(n_pads) + 0.5) * n / n_pads).long()
    eos = example.ids[-1:].expand(n_pads)
    weight = torch.cat([example.weight, torch.full((n_pads,), n / n_pads)])
    return replace(
        example,
        ids=torch.cat([example.ids[:content], eos]),
        source=torch.cat([example.source, torch.arange(content, content + n_pads)]),
        labels=torch.cat([example.labels, eos]),
        weight=weight,
        total=float(weight.abs().sum()),
        position=torch.cat([example.position[:content], content + spread]),
        pads=n_pads)


class PaddedRibbon(Ribbon):
    """A ribbon in which the last pads[i] tokens of sequence i are seen by no token."""

    def __init__(self, lengths, pads, position, device):
        """position (T,), on the host: the tokens' positions in the rows that are imitated."""
        super().__init__(lengths, device)
        self.position = to_device(position, device)
        for group, members in enumerate(self.groups):
            _, longest = self.shapes[group]
            content = torch.tensor([lengths[i] - pads[i] for i in members])
            is_content = torch.arange(longest) < content[:, None, None, None]   # (n, 1, 1, L)
            causal = torch.ones(longest, longest).tril().bool()
            self.masks[group] = to_device(causal & is_content, device)          # (n, 1, L, L)
