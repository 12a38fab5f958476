"""What the questions of the lab share: arms, seeds, a line of results for each, tables, figures.

A question is a script. It measures one arm with one seed, and shows what came out. A measurement is
a line of a JSON-lines file, written when it is known: the same command goes on where it was
stopped. Several processes may share the work, each with its own --out, which `cat` joins.
"""
import io
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Collection

import numpy as np

from support.config import flag, read_settings
from support.files import Lines, Parser, UserError, positive, replace_file
from support.stats import bootstrap_ci, mean_ci, with_interval

# ------------------------------------------------------------------------------- questions

def parser(doc: str) -> Parser:
    """For a script's flags. doc: its docstring, which begins with what it asks."""
    return Parser(description=" ".join(doc.split("\n\n")[0].split()))


@dataclass
class Question:
    """What is measured of every arm with every seed, and how that is shown.

    measure(arm, seed, *what `answer` is given, *values of the settings) -> the rest of a line. If
    the arms are about the writers of finished runs, {seed: the folder of its run} comes after seed.
    show({arm: its lines}). draw(the same, file), or None where a table says it all."""
    arms: Collection
    measure: Callable
    show: Callable
    draw: Callable | None
    # Flags that all lines of a file must share, numbers of towns, and their defaults.
    settings: dict = field(default_factory=dict)
    kind: str = "arm"               # what a line calls its arm; "arms" is the flag for them
    of_runs: bool = False

    def flags(self, doc: str, needs_out=True, **arms) -> Parser:
        """What every question is asked with. arms: more about the flag for them."""
        ap = parser(doc)
        ap.add_argument("--out", required=needs_out, type=Path,
                        help="JSON lines, as they are known")
        if self.draw:
            ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
        name = self.kind + "s"
        ap.add_argument(f"--{name}", nargs="+", metavar=name.upper(), **{
            "choices": self.arms, "default": list(self.arms)} | arms)
        for setting, default in self.settings.items():
            ap.add_argument(flag(setting), type=positive, default=default,
                            help=f"how many towns (default: {default})")
        if self.of_runs:
            ap.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="finished runs "
                            "of `python outer_loop.py --iterations 3 --outer-lr 2e-3 --seed S`, "
                            "one for each seed")
        else:
            ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
        return ap

    def ask(self, doc: str, **arms):
        """The whole program, if it has no further flags."""
        ap = self.flags(doc, **arms)
        self.answer(ap, ap.parse_args())

    def answer(self, ap: Parser, args, *given):
        """Measure what the file has not, then show and draw what it has."""
        seeds, given = getattr(args, "seeds", None), list(given)
        if self.of_runs:
            folders = {read_settings(run)["seed"]: run for run in args.runs}
            seeds = sorted(folders)
            given.insert(0, folders)
        given += [getattr(args, name) for name in self.settings]

        def measure(line):
            return self.measure(line[self.kind], line["seed"], *given)

        # All arms with the first seed, then with the next.
        wanted = []
        for seed in seeds:
            wanted += [{self.kind: arm, "seed": seed} for arm in getattr(args, self.kind + "s")]
        found = groups(complete(ap, args, wanted, measure, self.settings), self.kind, self.arms)
        self.show(found)
        if self.draw and args.svg:
            self.draw(found, args.svg)


def complete(ap, args, wanted: list[dict], measure, settings=()) -> list[dict]:
    """All lines of args.out, once those that are wanted are among them.

    wanted: what tells each line from others, as {"arm": "half", "seed": 0}. measure(one of these)
    -> the rest of its line. UserError: a line was made with other settings."""
    done = Lines(args.out)
    shared = {name: getattr(args, name) for name in settings}
    for line in done.records:
        for name, value in shared.items():
            # A line that is older than a flag was made with its default.
            if line.get(name, ap.get_default(name)) != value:
                raise UserError(f"{args.out} has lines of another {flag(name)}; name another --out")
    for this in wanted:
        if where(done.records, **this):
            continue
        words = ", ".join(map(str, this.values()))
        print(f"\n=== {words}", flush=True)
        begin = time.time()
        found = measure(this)
        # Some count their seconds in a way of their own.
        found.setdefault("seconds", round(time.time() - begin))
        done.add(this | shared | found)
        print(f"{words}: {found['seconds']} s", flush=True)
    return done.records


# ------------------------------------------------------------------------------- lines

def where(records: list[dict], **values) -> list[dict]:
    """The lines with these values: where(records, arm="half", seed=0)."""
    found = []
    for line in records:
        if all(line.get(name) == value for name, value in values.items()):
            found.append(line)
    return found


def groups(records: list[dict], kind: str, names) -> dict[str, list[dict]]:
    """{name: its lines} of the arms that have some, in this order. kind: "arm", "rule", ..."""
    found = {name: where(records, **{kind: name}) for name in names}
    return {name: lines for name, lines in found.items() if lines}


def differences(lines: list[dict], others: list[dict], value, reference=None) -> list:
    """value(line) of one arm minus reference(line) of another, for each seed that both have.

    A seed has the same towns and the same first self-edits in both. What makes a seed hard for both
    cancels, and does not widen the interval."""
    known = {line["seed"]: (reference or value)(line) for line in others}
    return [value(line) - known[line["seed"]] for line in lines if line["seed"] in known]


def last_reward(line: dict) -> float:
    """After the last round, of a line with a "reward" per round."""
    return line["reward"][-1]


def gain(line: dict) -> float:
    """By how much the reward rose, from before the first round until then."""
    return line["reward"][-1] - line["reward"][0]


def mean_of(rows: list[dict]) -> dict[str, float]:
    """The mean of each value over dicts with the same keys."""
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


# ------------------------------------------------------------------------------- words

def over_seeds(rows, form=".3f") -> list[str]:
    """Means with 95 % intervals, '0.586 ±0.035', one per column. rows (seeds, columns)."""
    texts = []
    for mean, half in zip(*mean_ci(rows)):
        # A single seed has no interval.
        texts.append(format(mean, form) + ("" if np.isnan(half) else f" ±{half:.3f}"))
    return texts


def of_seeds(values, form=".3f") -> str:
    """The same for one value per seed; '' for none."""
    return over_seeds([[value] for value in values], form)[0] if len(values) else ""


def over_passages(values, form=".3f") -> str:
    """'0.639 [0.601, 0.677]': a mean over passages, with its interval by bootstrap."""
    return with_interval(np.mean(values), bootstrap_ci(values), form)


def arrows(values, form=".3f") -> str:
    """'0.602 -> 0.676 -> 0.760': a value per round, or a first and a last one."""
    return " -> ".join(format(value, form) for value in values)


def print_table(head: list, rows: list[list], title=""):
    """Print Markdown."""
    if title:
        print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


# ------------------------------------------------------------------------------- figures

def pyplot():
    """matplotlib's pyplot, which writes the same file each time."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("svg")
    # Names inside an SVG are made of this, instead of by chance.
    matplotlib.rcParams["svg.hashsalt"] = "nanoSEAL"
    from matplotlib import pyplot
    return pyplot


def new_figure(xlabel: str, ylabel: str):
    """(figure, axes)."""
    figure, axes = pyplot().subplots(figsize=(6, 4.5), layout="constrained")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.grid(axis="y", color="#ddd")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def error_bars(axes, x, rows, **look):
    """Means over seeds at x, with intervals. rows (seeds, len(x))."""
    mean, half = mean_ci(rows)
    # A single seed has no interval: a bar of length 0.
    axes.errorbar(x, mean, np.nan_to_num(half), marker="o", markersize=4, capsize=3, **look)


def draw_lines(file, labels: tuple[str, str], lines: dict, ylim=None):
    """A figure. labels: of both axes. lines: {name: (x, values (seeds, len(x)))}."""
    figure, axes = new_figure(*labels)
    for name, (x, values) in lines.items():
        error_bars(axes, x, values, label=name)
    if ylim:
        axes.set_ylim(*ylim)
    save(figure, file)


def save(figure, file):
    """Write a figure as SVG, whole or not at all. Its labels are explained below it."""
    labels = figure.axes[0].get_legend_handles_labels()[1]
    if labels:
        figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    replace_file(file, drawing.getvalue())
