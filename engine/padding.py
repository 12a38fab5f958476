"""The official code's padded rows, imitated: --pad-to 2048. Nothing else needs this file.

NOTE(paper): the official code fills every document with EOS to a row of 2048 tokens and learns the
pads as well, which are about 98 % of its targets. In such a row a pad sees the content and no pad,
not even itself, since the padding mask hides those; so pads differ in their position alone (RoPE).
Here eight of them, spread evenly over the row and weighted, stand for all. Rows filled plainly, in
which pads see pads, train something else: docs/RESULTS.md compares the three.
"""
from dataclasses import replace

import torch

from engine.gpu import to_device
from engine.ribbon import Ribbon, like_lengths


def with_pads(example, pad_to, n_pads=8):
    """A packing.Example whose text ends with one EOS, as if it filled a row of pad_to tokens.

    That EOS is the first pad. Each pad but the last predicts the next one: `n` of them do."""
    content = len(example.ids) - 1
    n = pad_to - 1 - content
    n_pads = min(n_pads, n)
    spread = ((torch.arange(n_pads) + 0.5) * n / n_pads).long()
    eos = example.ids[-1:].expand(n_pads)
    return replace(
        example,
        ids=torch.cat([example.ids[:content], eos]),
        source=torch.cat([example.source, torch.arange(content, content + n_pads)]),
        labels=torch.cat([example.labels, eos]),
        weight=torch.cat([example.weight, torch.full((n_pads,), n / n_pads)]),
        position=torch.cat([example.position[:content], content + spread]),
        pads=n_pads)


class PaddedRibbon(Ribbon):
    """A ribbon in which the last pads[i] tokens of sequence i are seen by no token."""

    def __init__(self, lengths, pads, position, device):
        """position (T,), on the host: the tokens' positions in the rows that are imitated."""
        super().__init__(lengths, device)
        self.position = to_device(position, device)
        for group, members in enumerate(like_lengths(lengths)):
            _, longest = self.shapes[group]
            content = torch.tensor([lengths[i] - pads[i] for i in members])
            is_content = torch.arange(longest) < content[:, None, None, None]   # (n, 1, 1, L)
            causal = torch.ones(longest, longest).tril().bool()
            self.masks[group] = to_device(causal & is_content, device)          # (n, 1, L, L)

    def attend(self, layer, q, k, v):
        # No fused kernel takes both a mask and heads that share keys: repeat the keys and values.
        repeats = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        return super().attend(layer, q, k, v)
