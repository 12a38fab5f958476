"""How far a run's rewards can be trusted: between the seeds of the inner loop, and what the best of
K is worth by seeds that did not choose it.

    python -m lab.reliability RUN_DIR
"""
from collections import defaultdict
from pathlib import Path

import numpy as np

from support.files import Parser, UserError, cli
from support.records import Lines


class Rollouts(Lines):
    """rollouts.jsonl, of which the rewards of training self-edits are looked at."""

    def check(self, r):
        if r["split"] != "train" or not r["right"]:
            return
        numbers = [r[key] for key in ("iteration", "task", "edit", "documents")]
        whole = (all(type(number) is int for number in numbers) and 0 <= r["reward"] <= 1
                 and isinstance(r["token_ids"], list)
                 and all(isinstance(row, list) and row and set(row) <= {True, False}
                         for row in r["right"]))
        if not whole:
            raise ValueError("a value of another kind than a run writes")


def read_groups(folder):
    """The rollouts of training self-edits, a list per (iteration, passage)."""
    path = Path(folder) / "rollouts.jsonl"
    groups = defaultdict(list)
    for r in Rollouts(path, repair=False).records:      # the run may be going on
        if r["split"] == "train" and r["right"]:
            groups[r["iteration"], r["task"]].append(r)
    if not groups:
        raise UserError(f"{path}: no rewards of training self-edits in this run; name the folder "
                        "of a run that has some")
    for (t, i), group in groups.items():
        if len({len(r["right"]) for r in group}) > 1:
            raise UserError(f"{path}: iteration {t}, task {i}: self-edits with different numbers "
                            "of seeds; a run has one --seeds")
    return [sorted(group, key=lambda r: r["edit"]) for group in groups.values()]


def accuracy_of(group):
    """(K, seeds): the accuracy of each self-edit of a passage with each seed."""
    rows = []
    for r in group:
        rows.append([np.mean(right) for right in r["right"]])
    return np.array(rows)


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


def correlation(x, y):
    return np.corrcoef(x, y)[0, 1] if np.std(x) and np.std(y) else np.nan


def main():
    ap = Parser(description=" ".join(__doc__.split("\n\n")[0].split()))
    ap.add_argument("run", help="a run's folder")
    groups = read_groups(ap.parse_args().run)
    accuracy = [accuracy_of(group) for group in groups]
    seeds = min(a.shape[1] for a in accuracy)
    print(f"{len(groups)} passages, {sum(map(len, groups))} self-edits, {seeds} seeds each")
    if seeds > 1:
        for what, value in variance_components(accuracy).items():
            print(f"  {what:<66} {value:6.3f}")

    rollouts = [r for group in groups for r in group]
    reward = [r["reward"] for r in rollouts]
    tokens = [len(r["token_ids"]) for r in rollouts]
    documents = [r["documents"] for r in rollouts]
    for what, x in (("tokens", tokens), ("documents", documents)):
        print(f"  correlation of the reward with the number of {what:<18} "
              f"{correlation(reward, x):10.3f}")


if __name__ == "__main__":
    cli(main)
