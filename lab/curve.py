"""Held-out reward over iterations, runs of several seeds together (the paper's Figure 4).

    python -m lab.curve RUN_DIR [RUN_DIR ...] [--svg FILE]

Runs that differ in their seed alone belong together; intervals are over seeds.
"""
from itertools import chain
from pathlib import Path

import numpy as np

from lab.experiment import error_bars, new_figure, of_seeds, over_seeds, parser, save
from support.config import read_settings
from support.files import Lines, UserError, cli, printable

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
# What settings mean, in a figure's legend.
MEANING = {"update best": "the best self-edits are kept",
           "update solved": "self-edits that solved their puzzle are kept",
           "update random": "any self-edits are kept (control)",
           "directives": "each chooses its learning rate and epochs"}
# What does not set runs apart: names and paths, and what Run adds to its settings.
ALIKE = ("seed", "run_dir", "model", "verbose", "program", "command", "own", "content", "code")


def read_runs(folders):
    """{what sets these runs apart: [metrics of each run, a dict per iteration]}."""
    configs, metrics = [], []
    for folder in map(Path, folders):
        config = read_settings(folder)
        configs.append(config)
        metrics.append(Lines(folder / "metrics.jsonl", repair=False).records)
        if len(metrics[-1]) <= max(0, config["iterations"]):
            raise UserError(f"{folder}: this run has not ended; repeat its command to resume it")

    # repr, as a list can't be in a set.
    differ = [name for name in configs[0] if name not in ALIKE
              and len({repr(config.get(name)) for config in configs}) > 1]
    groups = {}
    for folder, config, lines in zip(folders, configs, metrics):
        own = {name: config.get(name) for name in differ if config.get(name) is not False}
        words = [name if value is True else f"{name} {value}" for name, value in own.items()]
        group = groups.setdefault(", ".join(words) or "all runs", [])
        group.append(lines)
        if len(lines) != len(group[0]):
            raise UserError(f"{folder}: {len(lines)} iterations are measured, {len(group[0])} in "
                            "another run with its settings; leave one of them out")
    return groups


def by_iteration(runs, value) -> list[list[float]]:
    """(runs, iterations): value(metrics) of each run."""
    return [[value(m) for m in run] for run in runs]


def describe(name, runs):
    """Lines of figures about the runs of a group."""
    rewards = by_iteration(runs, lambda m: m["eval_reward"])
    lines = [f"{printable(name)}, {len(runs)} seeds: {' -> '.join(over_seeds(rewards))}"]
    gains = [row[-1] - row[0] for row in rewards]
    by_seed = " ".join(f"{gain:+.3f}" for gain in gains)
    lines.append(f"    gain {of_seeds(gains, '+.3f')}, by seed {by_seed}")
    for kind in runs[0][0]["eval_by_kind"]:
        if not all(kind in m["eval_by_kind"] for run in runs for m in run):
            continue    # no self-edit could be read in one iteration
        found = by_iteration(runs, lambda m: m["eval_by_kind"][kind])
        lines.append(f"    {printable(kind)} questions: {' -> '.join(over_seeds(found))}")

    # Of self-edits, in the order in which they were met.
    for part in dict.fromkeys(part for m in chain(*runs) for part in m["made_of"]):
        shares = np.mean(by_iteration(runs, lambda m: m["made_of"].get(part, 0)), axis=0)
        if max(shares) >= .02:
            shares = " -> ".join(f"{share:.0%}" for share in shares)
            lines.append(f"    {printable(part)}: {shares}")
    return lines


def draw(groups, file):
    """A figure of mean rewards with intervals; the passage alone is a dashed line."""
    figure, axes = new_figure("iteration of ReST-EM",
                              "held-out reward (95 % interval over seeds)")
    for i, (name, runs) in enumerate(groups.items()):
        rewards = by_iteration(runs, lambda m: m["eval_reward"])
        # Beside each other, not on top.
        t = np.arange(len(runs[0])) + 0.03 * i
        # XML has no control characters, and matplotlib reads $ as the begin of a formula.
        meaning = ", ".join(MEANING.get(words, words) for words in name.split(", "))
        meaning = printable(meaning).replace("$", r"\$")
        error_bars(axes, t, rewards, color=COLOURS[i % 4], label=f"{meaning}; {len(runs)} seeds")
    floor = []
    for run in chain(*groups.values()):
        floor += [arm["reward"] for arm in run[0]["baselines"] if arm["name"] == "passage only"]
    if floor:
        axes.axhline(np.mean(floor), color="#777", linestyle="--",
                     label="trained on the passage only")
    axes.set_xticks(range(max(len(runs[0]) for runs in groups.values())))
    axes.set_ylim(0, 1)
    save(figure, file)


def main():
    ap = parser(__doc__)
    ap.add_argument("runs", nargs="+", help="run folders, of several seeds")
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    args = ap.parse_args()
    groups = read_runs(args.runs)
    for name, runs in groups.items():
        print("\n".join(describe(name, runs)))
    if args.svg:
        draw(groups, args.svg)


if __name__ == "__main__":
    cli(main)
