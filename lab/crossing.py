"""From where on is one curve above another? For lab/compute.py, over numbers of self-edits."""
import numpy as np

from support.stats import mean_ci, with_interval


def crossing(ks, curve, other) -> float | None:
    """The k from which a curve stays at or above another. None: it is below at the last k."""
    # The last k at which it is below decides, as an early lead may be chance.
    above = np.subtract(curve, other)
    below = np.flatnonzero(above < 0)
    if len(below) == 0:
        return ks[0]
    i = below[-1]
    if i == len(ks) - 1:
        return None
    # Between two measured k, a straight line over their logarithms.
    part = above[i] / (above[i] - above[i + 1])
    return ks[i] * (ks[i + 1] / ks[i]) ** part


def crossings(ks, pairs) -> str:
    """The geometric mean of where curves cross, with its 95 % interval, in words.

    pairs: (curve, other) of each seed."""
    found = [crossing(ks, curve, other) for curve, other in pairs]
    if not found:
        return ""
    logs = [[np.log(k)] for k in found if k is not None]
    if not logs:
        return f"in none of {len(found)}"
    (mean,), (half,) = mean_ci(logs)
    words = f"{np.exp(mean):.1f}"
    # A single seed has no interval.
    if not np.isnan(half):
        words = with_interval(np.exp(mean), np.exp([mean - half, mean + half]), ".1f")
    return f"{words}, in {len(logs)} of {len(found)}"


def where_passed(ks, lines: list[dict], others: list[dict]) -> tuple[str, str]:
    """From which k on the accuracy of an arm is above another arm's at the same k, and above that
    at the first k, seed by seed. lines, others: of the two arms."""
    reference = {line["seed"]: line["accuracy"] for line in others}
    same, first = [], []
    for line in lines:
        if line["seed"] in reference:
            other = reference[line["seed"]]
            same.append((line["accuracy"], other))
            first.append((line["accuracy"], other[:1]))
    return crossings(ks, same), crossings(ks, first)
