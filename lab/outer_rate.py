"""Which outer learning rate suits an update rule? To choose it, before lab/update_rule.py.

    python -m lab.outer_rate --out FILE.jsonl --runs FOLDER

Two seeds, and towns that nothing else is reported on. 20 minutes for all rules and a seed.
"""
from pathlib import Path

import numpy as np

from lab.experiment import complete, each, flags, where
from lab.rules import CLIPPED, RULES, USUAL, measure
from support.files import cli

GRID = (2e-3, 4e-3, 8e-3)
# rule -> a factor. Two rules take four times as many steps, with nothing to hold them back, so that
# lower rates are tried for them.
FACTORS = {USUAL: 1, "all that help (Eq. 2)": 1 / 2, "all of reward .7 and above": 1,
           "best 2 of 8, from the base": 1, "reinforce, K = 8": 1, "grpo, K = 8": 1,
           "grpo, K = 8, 4 epochs": 1 / 4, CLIPPED: 1}
# Choosing is shorter: fewer passages, and one self-edit of each held-out one.
SHORT = {"tasks": 15, "eval_edits": 1, "eval_tasks": 24, "iterations": 2}


def show(records: list[dict]):
    """The last reward at each rate that was tried."""
    for arm in RULES:
        tried = where(records, split="tune", arm=arm)
        for lr in sorted({line["lr"] for line in tried}):
            last = [line["reward"][-1] for line in where(tried, lr=lr)]
            print(f"{arm}, outer learning rate {lr:g}: {np.mean(last):.3f} ({len(last)} seeds)")


def main():
    ap = flags(__doc__)
    ap.add_argument("--runs", required=True, type=Path, help="where the runs' folders go")
    ap.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    ap.add_argument("--arms", nargs="+", choices=FACTORS, default=list(FACTORS), metavar="RULE")
    args = ap.parse_args()
    wanted = []
    for unit in each("arm", args.arms, args.seeds):
        for lr in GRID:
            rate = lr * FACTORS[unit["arm"]]
            wanted.append({"split": "tune", "arm": unit["arm"], "lr": rate, "seed": unit["seed"]})
    show(complete(ap, args, wanted, lambda line: measure(args.runs, line, **SHORT)))


if __name__ == "__main__":
    cli(main)
