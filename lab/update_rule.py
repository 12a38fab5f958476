"""ReST-EM against its neighbours: which update rule learns to write better self-edits?

    python -m lab.update_rule --out FILE.jsonl --runs FOLDER [--svg FILE]

The paper says that GRPO and PPO were unstable, and shows no figure. Here each rule (lab/rules.py)
runs in the tiny world, at the learning rate that did best on other towns (lab/outer_rate.py). A run
of a rule with a seed is an ordinary run of outer_loop.py, in a folder below --runs. 1 to 3 minutes
each, on one thread.
"""
import math
from pathlib import Path

import numpy as np

from lab.experiment import add_seeds, complete, differences, each, flags, gain
from lab.experiment import last_reward, where
from lab.rules import RULES, USUAL, measure
from lab.show import arrows, new_figure, of_seeds, print_table, save
from support.files import cli
from support.stats import mean_ci


def measured_rules(records: list[dict]) -> dict:
    """{(rule, outer learning rate): its lines}, in the order of RULES."""
    found = {}
    for arm in RULES:
        for line in where(records, split="eval", arm=arm):
            found.setdefault((arm, line["lr"]), []).append(line)
    return found


def show(rules: dict):
    """A row per rule and learning rate, with intervals over seeds."""
    usual = rules.get((USUAL, RULES[USUAL][1]), [])
    rows = []
    for (arm, lr), lines in rules.items():
        # A rule may gain much in the mean and yet break with some seed: hence its worst one.
        gains = [gain(line) for line in lines]
        spread = np.std(gains, ddof=1) if len(gains) > 1 else math.nan
        more = differences(lines, usual, last_reward)
        rewards = np.mean([line["reward"] for line in lines], axis=0)
        # A run that diverged has no last round: then its last one that there was.
        kinds = np.mean([[line["distinct"][0], line["distinct"][-1]] for line in lines], axis=0)
        rows.append([arm, f"{lr:g}", arrows(rewards), of_seeds(gains, "+.3f"),
                     of_seeds(more, "+.3f"), f"{spread:.3f}", f"{min(gains):+.3f}"])
        for what in ("inner steps", "outer steps"):
            rows[-1].append(f"{np.mean([line[what] for line in lines]):.0f}")
        rows[-1].append(arrows(kinds, ".0f"))
    head = ["rule", "outer lr", "held-out reward, by round", "gain",
            f"last round, against {USUAL}", "s.d.", "worst seed", "inner steps", "outer steps",
            "kinds of lines"]
    print_table(head, rows)


def draw(rules: dict, file):
    """Gains: a point per seed, the mean and its interval."""
    figure, axes = new_figure("gain of held-out reward after 3 rounds, 95 % intervals", "", (7, 5))
    for y, lines in enumerate(rules.values()):
        gains = [[gain(line)] for line in lines]
        mean, half = mean_ci(gains)
        axes.plot(gains, [y] * len(lines), ".", color="#bbb")
        axes.errorbar(mean, [y], xerr=np.nan_to_num(half), color="#1f77b4", marker="o", capsize=3)
    # No gain.
    axes.axvline(0, color="#777", linestyle="--")
    axes.set_yticks(range(len(rules)), [f"{arm}, {lr:g}" for arm, lr in rules])
    axes.invert_yaxis()
    save(figure, file)


def main():
    ap = flags(__doc__)
    add_seeds(ap)
    ap.add_argument("--runs", required=True, type=Path, help="where the runs' folders go")
    ap.add_argument("--arms", nargs="+", choices=RULES, default=list(RULES), metavar="RULE")
    args = ap.parse_args()
    # The split and the rate are part of what is wanted, as a file has lines of several.
    wanted = []
    for unit in each("arm", args.arms, args.seeds):
        arm, seed = unit["arm"], unit["seed"]
        wanted.append({"split": "eval", "arm": arm, "lr": RULES[arm][1], "seed": seed})
    records = complete(ap, args, wanted, lambda line: measure(args.runs, line))
    rules = measured_rules(records)
    show(rules)
    if args.svg:
        draw(rules, args.svg)


if __name__ == "__main__":
    cli(main)
