"""The two figures of the explanations: SEAL's two loops, and how a ribbon of tokens is packed.

    python docs/figures.py [FOLDER]     # rebuilds loops.svg and ribbon.svg (default: in docs)

ribbon.svg is computed: ribbon.pack lays out a small step, and Ribbon.attend says who sees whom.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib                                                           # noqa: E402
import torch                                                                # noqa: E402
from matplotlib.figure import Figure                                        # noqa: E402
from matplotlib.patches import FancyBboxPatch                               # noqa: E402
from engine.ribbon import Example, pack                                            # noqa: E402

GREY, BLUE, ORANGE, GREEN = COLOURS = ("#707070", "#2f6db3", "#c96a10", "#2f8a4c")
LIGHT = dict(zip(COLOURS, ("#f1f3f5", "#d3e3f5", "#fbdfc3", "#cfead6")))
BOLD = dict(ha="left", weight="bold")
CODE = dict(family="DejaVu Sans Mono", size=8)
# Texts stay texts. The same salt and no date: the same file every time.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "nanoSEAL", "patch.linewidth": 1,
         "font.size": 9, "font.family": ["DejaVu Sans"], "text.color": "#222222"}
METADATA = {"Date": None, "Creator": None}


def write(axes, x, y, text, ha="center", **style):
    axes.text(x, y, text, ha=ha, va="center", **style)


def tile(axes, x, y, width, height, fill, edge="white", corner=0):
    axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=fill, edgecolor=edge,
                                  boxstyle=f"round,pad=0,rounding_size={corner}"))


def arrow(axes, *points, label="", at=(0, 0), colour=GREY):
    """A line through these points with a head at its end, and a text beside it."""
    axes.plot(*zip(*points[:-1]), color=colour, lw=1.4)
    axes.annotate("", points[-1], points[-2], arrowprops=dict(
        arrowstyle="-|>,head_width=.25,head_length=.5", color=colour, lw=1.4, shrinkA=0, shrinkB=0))
    write(axes, *at, label)


def loops(axes):
    """The outer loop is a ring, clockwise; the inner loop is its right half."""
    tile(axes, 1, 1, 98, 61, "white", GREY, 1)
    write(axes, 4, 4.5, "Outer loop: rounds t = 0, 1, 2, ...", **BOLD)
    write(axes, 41, 4.5, "outer_loop.rest_em", "left", color=GREY, **CODE)
    # The inner loop runs once for each self-edit: sheets behind the first.
    for shift in (2, 1, 0):
        tile(axes, 56 + shift, 14.5 + shift, 39, 44, "white", GREEN, 1)
    write(axes, 58, 17.6, "Inner loop: for each self-edit", **BOLD)
    write(axes, 58, 20.5, "inner_loop.update_and_score", "left", color=GREEN, **CODE)
    # What is done, and the function that does it.
    for x, y, colour, text, function in [
        (4, 8, GREY, "task: a passage C, questions τ", "tasks.load_data"),
        (4, 21, BLUE, "policy θₜ reads C and\nwrites K self-edits", "selfedit.sample_self_edits"),
        (4, 36.5, ORANGE, "M-step: SFT on the kept:\nC is read, SE learned", "outer_loop.m_step"),
        (4, 50.8, ORANGE, "keep the best of each task", "outer_loop.select"),
        (58, 23, GREEN, "θ′ ← SFT(θₜ, SE)\na LoRA adapter, θₜ is frozen", "train.sft"),
        (58, 35.2, GREEN, "θ′ is asked the questions τ\nwithout the passage", "inner_loop.ask"),
        (58, 47.4, GREEN, "reward r: the share\nof right answers", "inner_loop.reward"),
    ]:
        lines = text.count("\n") + 1
        tile(axes, x, y, 32, 5.2 + 2.6 * lines, LIGHT[colour], colour, 1)
        write(axes, x + 16, y + 1.2 + 1.35 * lines, text, linespacing=1.5)
        write(axes, x + 16, y + 2.9 + 2.6 * lines, function, color=colour, **CODE)
    arrow(axes, (20, 15.8), (20, 21), label="C", at=(22, 18.4))
    arrow(axes, (36, 11.9), (92.5, 11.9), (92.5, 40.4), (90, 40.4), label="τ", at=(75, 10))
    arrow(axes, (36, 26.2), (58, 26.2), label="K self-edits", at=(46, 24.2))
    arrow(axes, (74, 33.4), (74, 35.2))
    arrow(axes, (74, 45.6), (74, 47.4))
    arrow(axes, (58, 54.7), (36, 54.7), label="K rewards", at=(46, 52.7))
    arrow(axes, (20, 50.8), (20, 46.9), label="kept SE", at=(25, 48.9))
    arrow(axes, (20, 36.5), (20, 31.4), label="θₜ₊₁ writes next", at=(28.5, 34))


def ribbon(axes):
    """Above: the ribbon. Below, a row for each token: attention, and a linear layer."""
    documents, running = [[5], [3, 4], [2, 3]], []      # the lengths of each adapter's documents
    for lengths in documents:
        examples = [Example.of(list(range(n)), [True] * n) for n in lengths]
        running.append(SimpleNamespace(examples=examples, batches=iter([range(len(lengths))])))
    packed = pack(running, "cpu", torch.float32)
    names = [f"{'abcde'[row]}{i}" for row, i in zip(packed.ribbon.row, packed.ribbon.position)]
    weights = dict(zip(packed.source.tolist(), packed.weight.tolist()))
    # Equal scores share attention evenly, and the values are one-hot: they say who gets some.
    T = len(names)
    same = torch.zeros(T, 1, 8)
    sees = packed.ribbon.attend(None, same, same, torch.eye(T)[:, None])[:, 0] > 0

    write(axes, 2, 9.5, "ribbon", **BOLD)
    write(axes, 2, 14, "loss weight", "left")
    write(axes, 7, 21, "Attention: a token sees its own\ndocument, up to itself", **BOLD)
    write(axes, 7, 24.8, "ribbon.Ribbon", "left", color=GREY, **CODE)
    write(axes, 54, 21, "A layer: W x + (α/r) B A x, with\nA and B of the token's adapter", **BOLD)
    write(axes, 54, 24.8, "ribbon.LowRank, ribbon.Segments", "left", color=GREY, **CODE)
    ends = packed.segments.ends.tolist()
    for i, colour in enumerate((BLUE, ORANGE, GREEN)):
        # A stretch of the ribbon, its tokens 5 wide ...
        end, n, tint = ends[i], len(documents[i]), LIGHT[colour]
        begin = ends[i - 1] if i else 0
        axes.plot([13.4 + 5 * begin, 12.6 + 5 * end], [5.4, 5.4], color=colour, lw=2)
        write(axes, 13 + 2.5 * (begin + end), 3.2, f"adapter {i}: {n} document{'s' * (n > 1)}",
              color=colour, weight="bold")
        for token in range(begin, end):
            x, y, name = 13 + 5 * token, 27 + 2.4 * token, names[token]
            tile(axes, x, 7.5, 5, 4, tint)
            write(axes, x + 2.5, 9.5, name, **CODE)
            write(axes, x + 2.5, 14, f"1/{1 / weights[token]:.0f}" if token in weights else "–")
            # ... and below, where a token is a row: whom it sees,
            write(axes, 4.5, y + 1.2, name, **CODE)
            for other in sees[token].nonzero()[:, 0].tolist():
                tile(axes, 7 + 2.4 * other, y, 2.4, 2.4, colour)
        # and the way through its adapter: from x to rank r, and up again.
        y = 27 + 1.2 * (begin + end)
        for x, left, right, name in ((66, 3.6, 1.2, "A"), (78, 1.2, 3.6, "B")):
            axes.fill([x, x + 6, x + 6, x], [y - left, y - right, y + right, y + left],
                      facecolor=tint, edgecolor=colour)
            write(axes, x + 3, y, name + "₀₁₂"[i])
        for start, stop in ((57.5, 66), (72, 78), (84, 93)):
            arrow(axes, (start, y), (stop, y), colour=colour)
        for x in (54, 93):
            tile(axes, x, 27 + 2.4 * begin, 3.5, 2.4 * (end - begin), tint)
    tile(axes, 7, 27, 2.4 * T, 2.4 * T, "none", GREY)
    # The frozen product runs once over the whole ribbon.
    y = 27 + 2.4 * T
    tile(axes, 62, y + 1.5, 26, 5, LIGHT[GREY], GREY, 1)
    arrow(axes, (55.75, y), (55.75, y + 4), (62, y + 4), label="W, frozen, for all", at=(75, y + 4))
    arrow(axes, (88, y + 4), (94.75, y + 4), (94.75, y))


def main():
    folder = Path(sys.argv[1] if sys.argv[1:] else ROOT / "docs")
    for draw, height in ((loops, 63), (ribbon, 76)):
        with matplotlib.rc_context(STYLE):
            # 100 units wide; y points down. At 700 pixels a text of 9 points has 12 pixels.
            figure = Figure(figsize=(7.2, 0.072 * height), facecolor="white")
            axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 100), ylim=(height, 0))
            axes.axis("off")
            draw(axes)
            figure.savefig(f"{folder}/{draw.__name__}.svg", metadata=METADATA)


if __name__ == "__main__":
    main()
