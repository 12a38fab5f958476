"""A step's tokens: the micro-batches of many jobs laid end to end on one ribbon.

For train.py. A job's texts become tensors once, and a step then lays out those of every running job
without work per token.
"""
from dataclasses import dataclass

import torch

from engine import padding
from engine.gpu import to_device
from engine.ribbon import Ribbon, Segments, round_up


@dataclass
class Example:
    """A text to train on, as tensors on the host. Made once per job, used in every epoch."""
    ids: torch.Tensor       # (L,)
    source: torch.Tensor    # (N,) the tokens that predict a label
    labels: torch.Tensor    # (N,)
    weight: torch.Tensor    # (N,) of each label: 1, or as given; more for a pad of many
    position: torch.Tensor  # (L,)
    pads: int = 0           # how many of the last ids are pads (padding.py)

    @classmethod
    def of(cls, ids: list[int], learn: list, pad_to=0):
        """Token j predicts token j + 1, if that one has a weight: learn [0, 0, 1, 1] gives source
        [1, 2] and labels ids[2], ids[3]."""
        if pad_to:
            ids, learn = ids[:pad_to], learn[:pad_to]
        ids, learn = torch.tensor(ids), torch.tensor(learn, dtype=torch.double)
        source = learn[1:].nonzero()[:, 0]
        example = cls(ids, source, ids[source + 1], learn[source + 1], torch.arange(len(ids)))
        return padding.with_pads(example, pad_to) if len(ids) < pad_to else example


@dataclass
class Room:
    """For CUDA graphs, which are of fixed shapes: with it, steps of about as many tokens are filled
    up to the same shapes. What fills them is read and not learned, and none of the texts sees it.
    """
    texts: int              # no step has more
    longest: int            # tokens; no text has more

    @classmethod
    def of(cls, jobs, slots):
        texts, longest = 0, 16
        for job in jobs:
            texts = max(texts, min(job.recipe.batch, len(job.examples)))
            longest = max(longest, *[len(ids) for ids, _ in job.examples])
        return cls(slots * texts, longest)

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
    """The next of 256, 288, 320, .. 512, 576, ..: eighths of a power of two, and at least 16."""
    return round_up(n, max(16, 2 ** ((n - 1).bit_length() - 4)))


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
    # Of each slot, (n, 1): train.py sets them.
    lr: torch.Tensor | None = None
    t: torch.Tensor | None = None

    def tensors(self):
        """All that a step reads of it."""
        return [self.ribbon.position, self.ribbon.bounds, self.segments.ends, self.ids, self.source,
                self.labels, self.weight, self.slot, self.lr, self.t]


def pack(running, device, dtype, room: Room | None = None) -> Packed:
    """Lay out a step: `running` holds each slot's train.Running, or None. dtype: of the weights."""
    texts, counts, source, weight, slots = [], [], [], [], []
    begin = 0       # of the text on the ribbon
    for slot, active in enumerate(running):
        batch = []
        if active:
            batch = [active.examples[number] for number in next(active.batches)]
        # The loss is a mean over the slot's own labels, so each weighs one over their number.
        total = sum(float(x.weight.abs().sum()) for x in batch)
        for x in batch:
            source.append(begin + x.source)
            weight.append(x.weight.to(dtype) / (total or 1))
            slots.append(torch.full((len(x.source),), slot))
            begin += len(x.ids)
        texts += batch
        counts.append(sum(len(x.ids) for x in batch))

    lengths = [len(x.ids) for x in texts]
    ids = [x.ids for x in texts]
    labels = [x.labels for x in texts]
    if room:
        # Further texts, which belong to the last slot, and further labels that weigh nothing.
        added = room.fill(lengths)
        lengths += added
        counts[-1] += sum(added)
        ids.append(torch.zeros(sum(added), dtype=torch.long))
        n_labels = sum(map(len, source))
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
        ribbon = padding.PaddedRibbon(lengths, pads, position, device)
    else:
        ribbon = Ribbon(lengths, device, room.longest if room else 0)
    return Packed(
        ribbon, Segments(counts, device, fixed=room is not None),
        ids=to_device(torch.cat(ids), device),
        source=to_device(torch.cat(source), device),
        labels=to_device(torch.cat(labels), device),
        weight=to_device(torch.cat(weight), device),
        slot=to_device(torch.cat(slots), device))
