"""How far can rewards be trusted?

    python -m lab.reliability RUN_DIR

Between the seeds of the inner loop, and what the best of K is worth by seeds that did not choose
it. How far judges can be trusted, tests/test_judges.py asks.
"""
from collections import defaultdict
from pathlib import Path

import numpy as np

from lab.experiment import parser
from support.files import UserError, cli
from support.ranks import Records


def read_groups(folder):
    """The rollouts of training self-edits, a list per (iteration, passage)."""
    path = Path(folder) / "rollouts.jsonl"
    groups = defaultdict(list)
    for r in Records(path, repair=False).records:       # the run may be going on
        if r["split"] == "train" and r["right"]:
            groups[r["iteration"], r["task"]].append(r)
    if not groups:
        raise UserError(f"{path}: no rewards of training self-edits in this run; name the folder "
                        "of a run that has some")
    return [sorted(group, key=lambda r: r["edit"]) for group in groups.values()]


def accuracy_of(group):
    """(K, seeds): the accuracy of each self-edit of a passage with each seed."""
    return np.array([[np.mean(right) for right in r["right"]] for r in group])


def variance_components(accuracy):
    """Statistics of rewards; accuracy: per passage (K, seeds).

    The variance between the self-edits of a passage is measured by the covariance of two seeds, in
    which the seeds' own noise is absent (the mean square between minus within, over all pairs).
    Reliability is that of the mean over all seeds (Spearman-Brown)."""
    noise, true, chosen, held_out = [], [], [], []
    for a in accuracy:
        k, n = a.shape
        noise.append(a.var(axis=1, ddof=1).mean())
        if k > 1:
            true.append(a.mean(axis=1).var(ddof=1) - noise[-1] / n)
        chosen.append(a.mean(axis=1).max())
        # Choose without one seed, and ask that seed what the choice is worth.
        for out in range(n):
            best = np.delete(a, out, axis=1).mean(axis=1).argmax()
            held_out.append(a[best, out])

    n = accuracy[0].shape[1]
    within = np.mean(noise)
    between = max(0.0, np.mean(true)) if true else 0.0
    total = between + within / n
    return {"standard deviation of one inner loop, over seeds": within ** 0.5,
            "true standard deviation between the self-edits of a passage": between ** 0.5,
            f"reliability of a {n}-seed mean, among the edits of a passage":
                between / total if total else np.nan,
            "mean reward": np.mean([a.mean() for a in accuracy]),
            "the best of K, by the seeds that chose it": np.mean(chosen),
            "the best of K, chosen without one seed, by that seed": np.mean(held_out)}


def main():
    ap = parser(__doc__)
    ap.add_argument("run", metavar="RUN_DIR", help="its folder")
    groups = read_groups(ap.parse_args().run)
    accuracy = [accuracy_of(group) for group in groups]
    seeds = min(a.shape[1] for a in accuracy)
    print(f"{len(groups)} passages, {sum(map(len, groups))} self-edits, {seeds} seeds each")
    if seeds == 1:
        raise UserError("one seed tells nothing about seeds; --seeds 2 or more does")
    for what, value in variance_components(accuracy).items():
        print(f"  {what:<66} {value:6.3f}")


if __name__ == "__main__":
    cli(main)
