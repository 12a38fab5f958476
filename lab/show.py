"""Tables and figures of the lab: means with 95 % intervals, over seeds or over passages."""
import io
import json
from collections import Counter

import numpy as np

from support.files import UserError, replace_file
from support.stats import bootstrap_ci, mean_ci, with_interval


# ------------------------------------------------------------------------------- words

def plus_minus(mean, half, form=".3f") -> str:
    """'0.586 ±0.035': a mean and half of its interval. A single seed has no interval."""
    interval = "" if np.isnan(half) else f" ±{half:.3f}"
    return format(mean, form) + interval


def over_seeds(rows, form=".3f") -> list[str]:
    """Means with intervals, one per column. rows (seeds, columns)."""
    return [plus_minus(mean, half, form) for mean, half in zip(*mean_ci(rows))]


def of_seeds(values, form=".3f") -> str:
    """The same for one value per seed; '' for none."""
    if len(values) == 0:
        return ""
    (text,) = over_seeds([[value] for value in values], form)
    return text


def over_passages(values, form=".3f") -> str:
    """'0.639 [0.601, 0.677]': a mean over passages, with its interval by bootstrap."""
    return with_interval(np.mean(values), bootstrap_ci(values), form)


def arrows(values, form=".3f") -> str:
    """'0.602 -> 0.676 -> 0.760': a value per round, or a first and a last one."""
    return " -> ".join(format(value, form) for value in values)


def made_of(shares: list[dict]) -> str:
    """What lines of self-edits most frequently are, with mean shares: 'copy 60%, plain 12%'."""
    total = Counter()
    for one in shares:
        total.update(one)
    means = [(form, share / len(shares)) for form, share in total.most_common()]
    return ", ".join(f"{form} {share:.0%}" for form, share in means if share >= .05)


def print_table(head: list, rows: list[list], title=""):
    """Print Markdown."""
    if title:
        print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def save_numbers(file, groups: dict[str, dict]):
    """{name: {what: values}} as JSON, a line per name."""
    lines = [f"{json.dumps(name)}: {json.dumps(of)}" for name, of in groups.items()]
    replace_file(file, "{\n" + ",\n".join(lines) + "\n}\n")


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


def new_figure(xlabel: str, ylabel: str, size=(6, 4.5)):
    """(figure, axes). size: in inches."""
    figure, axes = pyplot().subplots(figsize=size, layout="constrained")
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


def save(figure, file):
    """Write a figure as SVG, whole or not at all. Its labels are explained below it."""
    labels = figure.axes[0].get_legend_handles_labels()[1]
    if labels:
        figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    replace_file(file, drawing.getvalue())
