"""A run as one HTML file, report.html in its folder: no script, nothing loaded from elsewhere.

    python -m support.page RUN_DIR      # of any run, finished or not: it reads files, not weights
"""
import base64
import html
import json
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from support.config import PRESETS, Config, flag
from support.files import Lines, Parser, UserError, cli, printable, read_json, replace_file
from support.ranks import Metrics, Records, place_of
from support.report import arrows, iteration_line, typical_task

# Mid-tones that can be told apart, also by the colour-blind, on white and on black.
COLOURS = "#3b82c4 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #8c6bb1 #8a8a8a #a6761d #66a61e".split()
# Should anything of others get through, the browser runs no script and loads nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = """:root { color-scheme: light dark }
@media (prefers-color-scheme: dark) { body { background: #16181c; color: #e4e4e4 } }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 62rem; margin: auto; padding: 1rem;
  overflow-wrap: anywhere }
svg { display: block; width: 100%; max-width: 36rem; fill: currentColor; overflow: hidden }
svg path { fill: none; stroke: currentColor }
pre, td { white-space: pre-wrap } pre { font-size: .8rem } img { max-width: 100% }
table { border-collapse: collapse; font-size: .88rem } .scroll, .cards { overflow-x: auto }
td, th { border: 1px solid #8886; padding: .2em .6em; text-align: left; overflow-wrap: normal }
.cards { display: flex; gap: .8rem } .best { outline: 2px solid #009e73 }
.card { flex: 1 0 14rem; background: #8882; padding: 0 .8rem; margin: 3px }
.bar { display: flex; font-size: .7rem; height: 1.1rem; margin: 2px 0; background: #8882 }
.bar b { width: 1.5rem }
.bar span { overflow: hidden; text-align: center; color: #000; box-shadow: inset -1px 0 #fff }
ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1.2rem }
ul svg { display: inline-block; width: 1.8rem } .right { color: #00916a } .wrong { color: #d55e00 }
"""


def write(folder) -> Path:
    """Write report.html into a run's folder, from the files there. UserError if they are none."""
    path = Path(folder)
    run = SimpleNamespace(path=path, cfg=read_json(path / "config.json"),
                          metrics=Metrics(path / "metrics.jsonl", repair=False),
                          rollouts=Records(path / "rollouts.jsonl", repair=False))
    sections = {"The run": headline, "The two loops": loops, "Held-out reward": curve,
                "What self-edits are made of": made_of, "Rivals: one task's self-edits": rivals,
                "Held-out tasks": held_out, "Which line taught which answer": credit,
                "Passages in a row": continual, "Puzzles": pictures}
    try:
        found = [tag("h2", title) + body for title, section in sections.items()
                 if (body := section(run))]
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{folder}: no page, as these are no records of a run ({e!r})") from None
    name = "nanoSEAL: " + clean(path.resolve().name, 100)
    head = [tag("meta", charset="utf-8"), tag("title", name), tag("style", CSS),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1")]
    page = tag("html", tag("head", *head), tag("body", tag("h1", name), *found), lang="en")
    replace_file(path / "report.html", f"<!DOCTYPE html>\n{page}")
    return path / "report.html"


def refresh(run):
    """Bring a run's page up to date. A page that can't be made stops no run."""
    try:
        write(run.folder)
    except UserError as e:
        run.log(f"note: {e}")


def tag(kind, /, *inside, **attributes) -> str:
    """An element. inside: HTML. attributes: texts, whose names have _ for -, and class_."""
    said = [f' {name.rstrip("_").replace("_", "-")}="{clean(text, 10 ** 9)}"'
            for name, text in attributes.items()]
    end = "" if kind in ("meta", "img") else f"</{kind}>\n"
    return f"<{kind}{''.join(said)}>{''.join(map(str, inside))}{end}"


def clean(text, most=2000) -> str:
    """Text of others: cut, without control characters, escaped."""
    return html.escape(printable(text, most))


def table(head, rows) -> str:
    """Cells are HTML."""
    lines = [tag("tr", *(tag("th", cell) for cell in head))]
    lines += [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", *lines), class_="scroll")


def heat(share) -> str:
    """A share, or a difference of shares, on green; on red if it is negative."""
    colour = "0, 158, 115" if share >= 0 else "213, 94, 0"
    strength = 0.6 * min(1, abs(share))
    return tag("div", f"{share:.3f}", style=f"background: rgba({colour}, {strength:.2f})")


# ------------------------------------------------------------------------------ the run as a whole

def headline(run) -> str:
    changed = max(path.stat().st_mtime for path in run.path.glob("*.json*"))
    result = [iteration_line(m) for m in run.metrics.records] or ["no round is measured"]
    rows = [(clean(name), clean(json.dumps(value))) for name, value in run.cfg.items()]
    return (tag("p", time.strftime("%Y-%m-%d %H:%M", time.localtime(changed)))
            + tag("pre", clean(command(run))) + tag("pre", clean("\n".join(result), 10 ** 5))
            + tag("details", tag("summary", "All settings"), table(("name", "value"), rows)))


def command(run) -> str:
    """What made this run. eval.py writes it down; else it follows from the settings."""
    for path in run.path.glob("*.json"):
        written = read_json(path)
        if "command" in written:
            return shlex.join(["python", *written["command"]])
    # From the preset that leaves the fewest flags to give.
    flags = {}
    for preset in PRESETS:
        usual = vars(Config()) | PRESETS[preset] | {"run_dir": f"runs/{preset}"}
        flags[preset] = {name: value for name, value in run.cfg.items()
                         if name in usual and json.dumps(value) != json.dumps(usual[name])}
    preset = min(flags, key=lambda name: len(flags[name]))
    program = re.sub(r"^\w+", r"\g<0>.py", run.cfg.get("program", "outer_loop"))
    words = ["python", *program.split(), "--preset", preset]
    for name, value in flags[preset].items():
        words.append(flag(name if value is not False else "no_" + name))
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def loops(run) -> str:
    """Both loops as a drawing, with this run's numbers. eval.py has no outer loop."""
    cfg = run.cfg
    if cfg.get("program") != "outer_loop" and not run.metrics.records:
        return ""
    n, k, puzzles = cfg["tasks"], cfg["edits"], "arc" in cfg["domain"]
    kept = {"best": f"keep the {cfg['keep']} best of each {k}",
            "solved": f"keep those of reward {cfg.get('solved_at', 1):g} or more",
            "random": f"keep {cfg['keep']} of each {k}, at random"}.get(
                cfg["update"], f"{cfg['update']}: weigh all by their advantage")
    weighed = cfg["update"] in ("reinforce", "grpo")
    boxes = [(f"θₜ reads {n} {'puzzles' if puzzles else 'passages'}",
              f"and writes K = {k} self-edits of each"),
             ("θ′ ← θₜ trained on one self-edit", f"LoRA of rank {cfg['inner_rank']}"),
             (f"θ′ is asked {'for the solution' if puzzles else 'without the passage'}",
              "reward: the share of right answers"),
             (kept, f"of {n * k} self-edits in a round"),
             ("M-step: θₜ₊₁ ← SFT, so weighed" if weighed else "M-step: θₜ₊₁ ← SFT on those kept",
              "more like the better ones" if weighed else "to write more like them")]
    parts = [tag("path", d="M64 64h292v180H64z", stroke_dasharray="4 3"),
             tag("path", d="M76 367H40V31h36m-7-4 7 4-7 4"),
             words(134, 80, f"inner loop, {n * k * cfg['seeds']} times"),
             words(30, 200, f"outer loop, {cfg['iterations']} rounds", turn=-90)]
    for i, (first, second) in enumerate(boxes):
        # A box, and an arrow to the next one. The picture ends before the last arrow.
        y = 8 + 84 * i
        parts += [tag("path", d=f"M76 {y}h268v46H76zM210 {y + 46}v38m-4-7 4 7 4-7"),
                  words(210, y + 19, first, size=13), words(210, y + 37, second)]
    return svg(360, 391, parts)


def svg(width, height, parts) -> str:
    return tag("svg", *parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}")


def words(x, y, text, size=11, turn=0) -> str:
    return tag("text", clean(text, 60), text_anchor="middle", font_size=size,
               transform=f"translate({x} {y}) rotate({turn})")


def plot(series, rounds) -> str:
    """Shares over rounds. series: (name, shares, intervals, attributes of the line)."""
    def at(x, y):
        return f"{48 + 342 * x / max(1, rounds):.1f} {230 - 215 * y:.1f}"

    parts = [words(12, 122, "held-out reward", turn=-90), words(219, 268, "rounds")]
    for y in np.linspace(0, 1, 6):
        parts += [tag("path", d=f"M{at(0, y)}H390", stroke_opacity=0.2),
                  words(32, 234 - 215 * y, f"{y:.1f}")]
    for x in range(0, rounds + 1, 1 + rounds // 12):
        parts.append(words(at(x, 0).split()[0], 248, x))
    legend = []
    for (name, shares, intervals, look), colour in zip(series, COLOURS * len(series)):
        look = look | {"style": f"stroke: {colour}; stroke-linecap: round"}
        # The last point twice: a line of one point is a dot. A whisker for each interval.
        paths = ["L".join(at(x, y) for x, y in [*enumerate(shares), (len(shares) - 1, shares[-1])])]
        paths += [f"{at(x, low)}L{at(x, high)}" for x, (low, high) in enumerate(intervals)]
        parts += [tag("path", d="M" + path, **look) for path in paths]
        values = arrows(shares if len(set(shares)) > 1 else shares[:1])
        swatch = svg(30, 10, [tag("path", d="M0 5H30", **look)])
        legend.append(tag("li", swatch, " ", clean(f"{name} {values}", 200)))
    return svg(400, 275, parts) + tag("ul", *legend)


def curve(run) -> str:
    metrics = run.metrics.records
    if not metrics:
        return ""
    rounds = max(len(metrics) - 1, run.cfg["iterations"])
    series = [("with a self-edit", [m["eval_reward"] for m in metrics],
               [m["eval_ci"] for m in metrics], {"stroke_width": 3})]
    for kind in metrics[0]["eval_by_kind"]:
        shares = [m["eval_by_kind"].get(kind, 0) for m in metrics]
        series.append((f"its {kind} questions", shares, [], {"stroke_width": 1}))
    # What to compare with was measured once, but for the model without a self-edit.
    levels = {arm["name"]: [arm["reward"]] * (rounds + 1) for arm in metrics[0]["baselines"]}
    levels["un-adapted"] = [m["eval_unadapted"] for m in metrics]
    for (name, shares), dash in zip(levels.items(), ["7 5", "2 4", "9 4 2 4"] * len(levels)):
        series.append((name, shares, [], {"stroke_dasharray": dash}))
    return plot(series, rounds)


def made_of(run) -> str:
    """A bar for each round. Shares that exclude each other share a bar: all lr are one choice."""
    made = [m["made_of"] for m in run.metrics.records]
    choice = {name: re.sub(r" [\d.e+-]+$", "", name) for shares in made for name in shares}
    # Others do so only if they add up to everything, as the forms of lines do.
    others = [name for name in choice if choice[name] == name]
    if all(abs(sum(shares.get(name, 0) for name in others) - 1) < 1e-6 for shares in made):
        choice |= dict.fromkeys(others, "its lines")
    parts = []
    for title in dict.fromkeys(choice.values()):
        names = [name for name in choice if choice[name] == title]
        colours = list(zip(names, COLOURS * len(names)))
        for t, shares in enumerate(made):
            bar = [tag("span", f"{shares[name]:.0%}", title=name,
                       style=f"flex: {shares[name]:.3f}; background: {colour}")
                   for name, colour in colours if name in shares]
            parts.append(tag("div", tag("b", t), *bar, class_="bar"))
        shown = [" → ".join(f"{shares.get(name, 0):.0%}" for shares in made) for name in names]
        parts.append(tag("ul", *(tag("li", tag("span", "■ ", style=f"color: {colour}"),
                                     clean(f"{name} {text}", 200))
                                 for (name, colour), text in zip(colours, shown))))
    return "".join(parts)


# ------------------------------------------------------------------------------- tasks

def card(title, r, best=False) -> str:
    """A self-edit, and what it was worth."""
    worth = f"reward {r['reward']:.3f}, un-adapted {r['unadapted']:.3f}"
    return tag("div", tag("h3", title), tag("p", worth, " ★ the best" if best else ""),
               tag("p", clean(r["note"], 300), class_="wrong"), tag("pre", clean(r["text"])),
               class_="card best" if best else "card")


def rivals(run) -> str:
    """The self-edits of that training task of the last round whose rewards differ most."""
    train = [r["iteration"] for r in run.rollouts.records if r["split"] == "train"]
    tasks = {}
    for r in run.rollouts.of(max(train, default=0), "train"):
        tasks.setdefault(r["task"], []).append(r)
    if not tasks:
        return ""
    edits = max(tasks.values(), key=lambda edits: np.ptp([r["reward"] for r in edits]))
    # As in `select`: without documents nothing is learned, and of equal rewards the first is best.
    edits.sort(key=lambda r: (not r["documents"], -r["reward"]))
    cards = [card(f"self-edit {r['edit'] + 1}", r, r is edits[0] and r["documents"] > 0)
             for r in edits]
    return (tag("p", clean(edits[0]["title"], 200), f", in round {max(train) + 1}")
            + tag("div", *cards, class_="cards"))


def held_out(run) -> str:
    """A typical task before the first round and after the last, and the rewards of all."""
    # The model's own self-edits have no name in outer_loop.py, and these in eval.py.
    arms = re.compile(r"(its own self-edits|self-edits after round \d+)?")
    own = {}
    for r in sorted(run.rollouts.records, key=place_of):
        if r["split"] == "eval" and arms.fullmatch(r.get("arm", "")):
            own.setdefault((r["task"], r["iteration"]), []).append(r)
    if not own:
        return ""
    tasks, rounds = (sorted(set(numbers)) for numbers in zip(*own))
    i, why = tasks[0], "The first task"
    if run.metrics.records:
        i, why = typical_task(run, run.metrics.records[-1]), "Its gain is nearest to the mean gain"
    ends = [own[i, t][0] for t in rounds if (i, t) in own]
    ends = ends[:1] + ends[1:][-1:]
    names = [f"after {r['iteration']} rounds" for r in ends]
    rows = [[clean(question, 500), clean(gold, 300), *(verdict(r, q) for r in ends)]
            for q, (question, gold) in enumerate(zip(ends[0]["questions"], ends[0]["gold"]))]
    titles = {i: clean(edits[0]["title"], 80) for (i, _), edits in own.items()}
    every = [[titles[i], *(heat(np.mean([r["reward"] for r in own[i, t]])) if (i, t) in own else ""
                           for t in rounds)] for i in tasks]
    return (tag("p", why, ": ", clean(ends[0]["title"], 200))
            + tag("div", *map(card, names, ends), class_="cards")
            + table(("question", "gold answer", *names), rows)
            + tag("details", tag("summary", f"All {len(every)} tasks"),
                  table(("mean reward", *(f"after {t}" for t in rounds)), every)))


def verdict(r, q) -> str:
    """The first inner loop's answer to question q, and of all how many are right."""
    if not r["right"]:
        return "no answer"
    n, right = len(r["right"]), sum(row[q] for row in r["right"])
    kind, sign = ("right", "✓") if right else ("wrong", "✗")
    share = f" in {right or n} of {n}" if n > 1 else ""
    return (clean(r["answers"][0][q], 300) + "\n"
            + tag("span", f"{sign} {kind}{share}", class_=kind))


def credit(run) -> str:
    """What credit.py found, if it was asked: documents by questions."""
    path = run.path / "credit.json"
    if not path.exists():
        return ""
    found = read_json(path)
    questions = [clean(f"{question} {gold}", 300)
                 for question, gold in zip(found["questions"], found["gold"])]
    rows = [[clean(document, 300), *map(heat, row)]
            for document, row in zip(found["documents"], found["credit"])]
    what = (f"{found['title']}, after {found['iteration']} rounds: by how much each document "
            "raises the probability of each gold answer")
    return tag("p", clean(what, 300)) + table(("document", *questions), rows)


def continual(run) -> str:
    """eval.py continual: accuracy on each passage after so many edits, the mean over streams."""
    records = Lines(run.path / "continual.jsonl", repair=False).records
    rows = [[f"after {r['edit']}", *map(heat, np.mean(r["accuracy"], axis=0))] for r in records]
    return rows and table(["edits", *(f"passage {i}" for i in range(1, len(rows[0])))], rows)


def pictures(run) -> str:
    """eval.py arc's. An SVG that is an image can't run a script."""
    return "".join(tag("img", alt=path.stem, loading="lazy", src="data:image/svg+xml;base64,"
                       + base64.b64encode(path.read_bytes()).decode())
                   for path in sorted(run.path.glob("*.svg"))[:100])


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("run_dir", help="a run's folder")
    print(write(ap.parse_args().run_dir))


if __name__ == "__main__":
    cli(main)
