"""How far a run's rewards can be trusted.

    python -m lab.reliability RUN_DIR
"""
import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from checkpoint import UserError, cli
from run import Lines
from stats import variance_components


def reliability(argv):
    """Print how far a run's rewards can be trusted: between the seeds of the inner loop, and what
    the best of K is worth by seeds that did not choose it."""
    ap = argparse.ArgumentParser(description=reliability.__doc__)
    ap.add_argument("run", help="a run's folder")
    rollouts = Lines(Path(ap.parse_args(argv).run) / "rollouts.jsonl").records
    rows = defaultdict(dict)  # (iteration, passage) -> {self-edit: record}
    for r in rollouts:
        if r["split"] == "train" and r["right"]:
            rows[r["iteration"], r["task"]][r["edit"]] = r
    groups = [list(edits.values()) for edits in rows.values()]
    if not groups:
        raise UserError("no rewards of training self-edits in this run")
    accuracy = [np.array([[np.mean(right) for right in r["right"]] for r in group])
                for group in groups]  # per passage (K, seeds)
    seeds = min(a.shape[1] for a in accuracy)
    print(f"{len(groups)} passages, {sum(map(len, groups))} self-edits, {seeds} seeds each")
    if seeds > 1:
        for what, value in variance_components(accuracy).items():
            print(f"  {what:<66} {value:6.3f}")
    everything = [r for group in groups for r in group]
    reward = [r["reward"] for r in everything]
    for what, x in (("tokens", [len(r["token_ids"]) for r in everything]),
                    ("documents", [r["documents"] for r in everything])):
        print(f"  correlation of the reward with the number of {what:<18} "
              f"{np.corrcoef(reward, x)[0, 1] if np.std(x) and np.std(reward) else np.nan:10.3f}")


if __name__ == "__main__":
    cli(lambda: reliability(sys.argv[1:]))
