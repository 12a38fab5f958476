"""How well do scores of self-edits choose among them? For lab/proxy.py and lab/proxy_run.py."""
import numpy as np

KEEP = 2        # self-edits of a town that are learned in the preset


def others(whole):
    """(towns, K, inner loops): judge s is the mean of all inner loops but loop s. So no loop judges
    what it chose."""
    return (whole.sum(axis=2, keepdims=True) - whole) / (whole.shape[2] - 1)


def ranks(values):
    """Along the second axis, around 0: how many are lower minus how many are higher."""
    return np.sign(values[:, :, None] - values[:, None]).sum(axis=2)


def correlation(scores, judges):
    """(towns,) Spearman's, within a town, mean over judges; 0 where all are equal."""
    a, b = ranks(scores), ranks(judges)
    squares = (a ** 2).sum(axis=1) * (b ** 2).sum(axis=1)
    return ((a * b).sum(axis=1) / np.sqrt(np.maximum(squares, 1))).mean(axis=1)


def worth(scores, judges, k: int, keep=KEEP):
    """(towns,) what the best of k self-edits are worth, mean over groups of k and over judges."""
    found = []
    for first in range(0, judges.shape[1], k):
        group = slice(first, first + k)
        # Sorting is stable: of equals the first is chosen.
        ranked = np.argsort(-scores[:, group], axis=1, kind="stable")
        chosen = np.take_along_axis(judges[:, group], ranked[:, :keep], axis=1)
        found.append(chosen.mean(axis=(1, 2)))
    return np.mean(found, axis=0)
