"""Held-out reward over iterations, runs of several seeds together (the paper's Figure 4).

    python -m lab.curve RUN_DIR [RUN_DIR ...] [--svg FILE]

Runs that differ in their seed alone belong together; intervals are over seeds.
"""
import io
from pathlib import Path

import numpy as np

from files import Lines, Parser, UserError, cli, printable, replace_file
from run import read_settings
from stats import mean_ci

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
# What settings mean, in a figure's legend.
MEANING = {"update best": "the best self-edits are kept",
           "update solved": "self-edits that solved their puzzle are kept",
           "update random": "any self-edits are kept (control)",
           "directives": "each chooses its learning rate and epochs"}


# What does not set runs apart: names and paths, and what run.py adds to its settings.
ALIKE = ("seed", "run_dir", "model", "verbose", "program", "own", "content")


class Metrics(Lines):
    """metrics.jsonl, a line per iteration."""

    def check(self, m):
        if m["iteration"] != len(self.records):
            raise ValueError(f"iteration {len(self.records)} belongs here")
        shares = [m["eval_reward"]]
        shares += [arm["reward"] for arm in m["baselines"] if arm["name"] == "passage only"]
        for key in ("eval_by_kind", "made_of"):
            if not isinstance(m[key], dict):
                raise ValueError(f"{key} must be an object")
            shares += m[key].values()
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError("a reward or a share that is not from 0 to 1")


def read_runs(folders):
    """{what sets these runs apart: [metrics of each run, a dict per iteration]}."""
    configs, metrics = [], []
    for folder in map(Path, folders):
        config = read_settings(folder)
        if not isinstance(config, dict) or type(config.get("iterations")) is not int:
            raise UserError(f"{folder / 'config.json'}: not the settings of a run (no whole number "
                            "of iterations); restore it")
        configs.append(config)
        metrics.append(Metrics(folder / "metrics.jsonl", repair=False).records)
        if len(metrics[-1]) <= max(0, config["iterations"]):
            raise UserError(f"{folder}: this run has not ended; repeat its command to resume it")

    differ = []
    for name in configs[0]:
        values = {json_value(config.get(name)) for config in configs}
        if len(values) > 1 and name not in ALIKE:
            differ.append(name)
    groups = {}
    for folder, config, records in zip(folders, configs, metrics):
        words = []
        for name in differ:
            value = config.get(name)
            if value is not False:
                words.append(name if value is True else f"{name} {value}")
        group = groups.setdefault(", ".join(words) or "all runs", [])
        group.append(records)
        if len(records) != len(group[0]):
            raise UserError(f"{folder}: {len(records)} iterations are measured, {len(group[0])} in "
                            "another run with its settings; leave one of them out")
    return groups


def json_value(value):
    return repr(value) if isinstance(value, (list, dict)) else value


def over_seeds(runs, value):
    """(means, half-intervals) over runs of value(metrics), per iteration."""
    return mean_ci([[value(m) for m in run] for run in runs])


def arrows(mean, half):
    return " -> ".join(with_interval(m, h, ".3f") for m, h in zip(mean, half))


def with_interval(mean, half, form):
    """A single run has no interval."""
    interval = "" if np.isnan(half) else f" ±{half:.3f}"
    return format(mean, form) + interval


def describe(name, runs):
    """Lines of figures about the runs of a group."""
    rewards = over_seeds(runs, lambda m: m["eval_reward"])
    lines = [f"{printable(name)}, {len(runs)} seeds: {arrows(*rewards)}"]
    gains = [run[-1]["eval_reward"] - run[0]["eval_reward"] for run in runs]
    mean, half = mean_ci(np.reshape(gains, (-1, 1)))
    by_seed = " ".join(f"{gain:+.3f}" for gain in gains)
    lines.append(f"    gain {with_interval(mean[0], half[0], '+.3f')}, by seed {by_seed}")
    for kind in runs[0][0]["eval_by_kind"]:
        if not all(kind in m["eval_by_kind"] for run in runs for m in run):
            continue    # no self-edit could be read in one iteration
        found = over_seeds(runs, lambda m: m["eval_by_kind"][kind])
        lines.append(f"    {printable(kind)} questions: {arrows(*found)}")

    parts = {}          # of self-edits, in the order in which they were met
    for run in runs:
        for m in run:
            parts |= dict.fromkeys(m["made_of"])
    for part in parts:
        shares, _ = over_seeds(runs, lambda m: m["made_of"].get(part, 0))
        if max(shares) >= .02:
            shares = " -> ".join(f"{share:.0%}" for share in shares)
            lines.append(f"    {printable(part)}: {shares}")
    return lines


def passage_only(groups):
    """Mean reward of training on the passage alone, or None."""
    found = []
    for runs in groups.values():
        for run in runs:
            found += [arm["reward"] for arm in run[0]["baselines"] if arm["name"] == "passage only"]
    return np.mean(found) if found else None


def pyplot():
    """matplotlib's pyplot, which writes the same file each time."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nanoSEAL"    # the same file each time
    from matplotlib import pyplot
    return pyplot


def save(figure, file):
    """Write a figure as SVG, whole or not at all."""
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    replace_file(file, drawing.getvalue())


def draw(groups, floor, file):
    """A figure of mean rewards with intervals; `floor` is a dashed line."""
    figure, axes = pyplot().subplots(figsize=(6, 4.2), layout="constrained")
    for i, (name, runs) in enumerate(groups.items()):
        mean, half = over_seeds(runs, lambda m: m["eval_reward"])
        t = np.arange(len(mean)) + 0.03 * i                # beside each other, not on top
        # XML has no control characters, and matplotlib reads $ as the begin of a formula.
        meaning = ", ".join(MEANING.get(words, words) for words in name.split(", "))
        meaning = printable(meaning).replace("$", r"\$")
        axes.errorbar(t, mean, np.nan_to_num(half), color=COLOURS[i % 4], marker="o", capsize=3,
                      label=f"{meaning}; {len(runs)} seeds")
    if floor is not None:
        axes.axhline(floor, color="#777", linestyle="--", label="trained on the passage only")
    axes.set_xlabel("iteration of ReST-EM")
    axes.set_ylabel("held-out reward (95 % interval over seeds)", fontsize=9)
    axes.set_xticks(range(max(len(runs[0]) for runs in groups.values())))
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color="#ddd")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    save(figure, file)


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("runs", nargs="+", help="run folders, of several seeds")
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    args = ap.parse_args()
    if args.svg and (Path(args.svg).is_dir() or not Path(args.svg).parent.is_dir()):
        raise UserError(f"--svg {args.svg}: name a file, in a folder that is there")
    groups = read_runs(args.runs)
    for name, runs in groups.items():
        print("\n".join(describe(name, runs)))
    if args.svg:
        draw(groups, passage_only(groups), args.svg)


if __name__ == "__main__":
    cli(main)
