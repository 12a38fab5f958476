"""A run as one HTML file, report.html in its folder: no script, nothing loaded from elsewhere.

    python -m support.page RUN_DIR      # of any run, finished or not: it reads files, not weights

How it looks is support/page.html, a Jinja template; here is what it is told.
"""
import base64
import json
import re
import shlex
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from support.config import FREE, PRESETS, Config, flag, read_settings
from support.files import (FIELDS, Lines, Parser, UserError, cli, printable, read_json,
                           replace_file)
from support.ranks import Records, place_of
from support.report import kinds_by_change, learned, telling_task, when

# Mid-tones that can be told apart, also by the colour-blind, on white and on black.
COLOURS = "#3b82c4 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #8c6bb1 #8a8a8a #a6761d #66a61e".split()


def write(folder) -> Path:
    """Write report.html into a run's folder, from the files there. UserError if they are none."""
    path = Path(folder)
    cfg = read_settings(path)
    # Texts of others are cut, lose their control characters, and are escaped.
    env = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                      undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                      finalize=lambda value: value if isinstance(value, Markup | int | float)
                      else printable(value))
    env.filters |= {"grids": grids}
    try:
        run = SimpleNamespace(
            path=path, cfg=SimpleNamespace(**vars(Config()) | cfg),
            metrics=Lines(path / "metrics.jsonl", repair=False),
            rollouts=Records(path / "rollouts.jsonl", repair=False))
        groups = made_of(run)
        page = env.get_template("page.html").render(
            name=path.resolve().name, changed=time.strftime("%Y-%m-%d", last_change(path)),
            command=command(run, cfg), cfg=run.cfg, puzzles="arc" in run.cfg.domain,
            settings={name: last_part(value) for name, value in cfg.items()},
            learned=learned(run.cfg), when=when, colours=COLOURS,
            metrics=run.metrics.records, story=story(run), curve=curve(run), made_of=groups,
            form_colours=form_colours(groups), rivals=rivals(run), held_out=held_out(run),
            credit=credit(run), continual=continual(run), pictures=pictures(run))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
            TemplateError) as e:
        raise UserError(f"{folder}: no page, as these are no records of a run ({e!r})") from None
    replace_file(path / "report.html", page)
    return path / "report.html"


def refresh(run):
    """Bring a run's page up to date. A page that can't be made stops no run."""
    try:
        write(run.folder)
    except (UserError, OSError) as e:
        run.log(f"note: {e}")


# ------------------------------------------------------------------------------ the run as a whole

def last_change(path):
    return time.localtime(max(file.stat().st_mtime for file in path.glob("*.json*")))


def last_part(value) -> str:
    """A setting as text. People show their pages to others, so the end of a path is enough."""
    is_path = isinstance(value, str) and value.startswith("/")
    return Path(value).name if is_path else str(value)


def command(run, cfg: dict) -> str:
    """What made this run. eval.py writes it down; else it follows from the settings."""
    for path in run.path.glob("*.json"):
        written = read_json(path)
        if "command" in written:
            return shlex.join(["python", *written["command"]])
    # From the preset that leaves the fewest flags to give.
    flags = {}
    for preset in PRESETS:
        usual = vars(Config()) | PRESETS[preset] | {"run_dir": f"runs/{preset}"}
        flags[preset] = {name: value for name, value in cfg.items()
                         if name in usual and json.dumps(value) != json.dumps(usual[name])}
    preset = min(flags, key=lambda name: len(flags[name]))
    program = re.sub(r"^\w+", r"\g<0>.py", cfg.get("program", "outer_loop"))
    words = ["python", *program.split(), "--preset", preset]
    for name, value in flags[preset].items():
        words.append(flag(name if value is not False else "no_" + name))
        if not isinstance(value, bool):
            words += map(last_part, value if isinstance(value, list) else [value])
    return shlex.join(words)


def story(run) -> list[dict]:
    """The numbers to print large: [{what, before, after}, ...]. The first is the whole."""
    metrics = run.metrics.records
    if not metrics:
        return []
    first, last = metrics[0], metrics[-1]
    numbers = [{"what": "all questions", "before": first["eval_reward"],
                "after": last["eval_reward"]}]
    for kind in kinds_by_change(metrics)[:2]:
        numbers.append({"what": f"{kind} questions", "before": first["eval_by_kind"][kind],
                        "after": last["eval_by_kind"].get(kind, 0)})
    return numbers


def controls(run) -> list[list[dict]]:
    """The metrics of the runs beside this one that differ in --update random alone, if at all in
    their seed."""
    free = FREE | {"update", "keep", "solved_at", "seed", "code", "baselines"}
    found = []
    for path in sorted(run.path.resolve().parent.glob("*/config.json")):
        try:
            other = read_settings(path.parent)
            same = all(other.get(name) == value for name, value in vars(run.cfg).items()
                       if name not in free)
            if same and other["update"] == "random" != run.cfg.update:
                found.append(Lines(path.parent / "metrics.jsonl", repair=False).records)
        except (UserError, LookupError, TypeError, ValueError):
            continue        # no run, or one that can't be read
    return [metrics for metrics in found if metrics]


def curve(run) -> dict:
    """The shares over rounds: lines, levels, and the band of the control runs."""
    metrics = run.metrics.records
    if not metrics:
        return {}
    lines = []
    for kind in metrics[0]["eval_by_kind"]:
        lines.append({"name": f"its {kind} questions",
                      "shares": [m["eval_by_kind"].get(kind, 0) for m in metrics]})
    # What to compare with was measured once, but for the model without a self-edit.
    levels = {arm["name"]: arm["reward"] for arm in metrics[0]["baselines"]}
    levels["without a self-edit"] = levels.pop("un-adapted", metrics[0]["eval_unadapted"])
    band = []
    beside = controls(run)
    for row in zip(*beside):
        band.append({"mean": float(np.mean([m["eval_reward"] for m in row])),
                     "low": min(m["eval_ci"][0] for m in row),
                     "high": max(m["eval_ci"][1] for m in row)})
    return {"rounds": max(len(metrics) - 1, run.cfg.iterations, 1), "lines": lines,
            "shares": [m["eval_reward"] for m in metrics],
            "intervals": [m["eval_ci"] for m in metrics],
            "levels": levels, "band": band, "n_controls": len(beside)}


def made_of(run) -> list[dict]:
    """Groups of shares that exclude each other, with a bar per round: all lr are one choice."""
    made = [m["made_of"] for m in run.metrics.records]
    choice = {name: re.sub(r" [\d.e+-]+$", "", name) for shares in made for name in shares}
    # Others do so only if they add up to everything, as the forms of lines do.
    others = [name for name in choice if choice[name] == name]
    if all(abs(sum(shares.get(name, 0) for name in others) - 1) < 1e-6 for shares in made):
        choice |= dict.fromkeys(others, "its lines")
    examples = {}
    for r in run.rollouts.records:
        examples |= dict(zip(r.get("forms", []), r["text"].splitlines()))
    groups = {}
    for name, title in choice.items():
        part = {"name": name, "example": examples.get(name, ""),
                "shares": [shares.get(name, 0) for shares in made]}
        groups.setdefault(title, []).append(part)
    for parts in groups.values():
        # Values in their order; forms as they come, the most frequent first.
        numbers = [re.search(r" ([\d.e+-]+)$", part["name"]) for part in parts]
        if all(numbers):
            parts.sort(key=lambda part: float(part["name"].rpartition(" ")[2]))
        for part, colour in zip(parts, COLOURS * len(parts)):
            part["colour"] = colour
    return [{"title": title, "parts": parts} for title, parts in groups.items()]


def form_colours(groups: list[dict]) -> dict[str, str]:
    """{form of a line: its colour in the bars}."""
    return {part["name"]: part["colour"] for group in groups for part in group["parts"]}


# ------------------------------------------------------------------------------- tasks

def card(r: dict) -> dict:
    """A self-edit for the page: its record, and its lines with their forms."""
    lines = r["text"].splitlines()
    forms = r.get("forms") or [""] * len(lines)
    choices = [f"{name} {value}" for name, value in r["directives"].items()]
    return r | {"lines": list(zip(forms, lines))[:40], "choices": choices + r["tools"]}


def rivals(run) -> dict:
    """The best and the worst self-edit of that training task of the last round whose rewards
    differ most."""
    train = [r["iteration"] for r in run.rollouts.records if r["split"] == "train"]
    tasks = {}
    for r in run.rollouts.of(max(train, default=0), "train"):
        tasks.setdefault(r["task"], []).append(r)
    if not tasks:
        return {}
    edits = max(tasks.values(), key=lambda edits: np.ptp([r["reward"] for r in edits]))
    # As in `select`: without documents nothing is learned, and of equal rewards the first is best.
    edits.sort(key=lambda r: (not r["documents"], -r["reward"]))
    return {"edits": [card(r) for r in edits], "round": max(train) + 1}


def held_out(run) -> dict:
    """A task before the first round and after the last, and the rewards of all."""
    # The model's own self-edits have no name in outer_loop.py, and these in eval.py.
    arms = re.compile(r"(its own self-edits|self-edits after round \d+)?")
    own = {}
    for r in sorted(run.rollouts.records, key=place_of):
        if r["split"] == "eval" and arms.fullmatch(r.get("arm", "")):
            own.setdefault((r["task"], r["iteration"]), []).append(r)
    if not own:
        return {}
    tasks, rounds = (sorted(set(numbers)) for numbers in zip(*own))
    i, why, order = tasks[0], "the first one", []
    if run.metrics.records:
        i, why = telling_task(run, "arc" in run.cfg.domain)
        order = kinds_by_change(run.metrics.records)
    ends = [own[i, t][0] for t in rounds if (i, t) in own]
    ends = ends[:1] + ends[1:][-1:]
    kinds = ends[0].get("kinds") or [""] * len(ends[0]["questions"])
    rank = [order.index(kind) if kind in order else len(order) for kind in kinds]
    rows = []
    for q in sorted(range(len(kinds)), key=lambda q: rank[q]):
        rows.append({"question": ends[0]["questions"][q], "gold": ends[0]["gold"][q],
                     "kind": kinds[q], "answers": [verdict(r, q) for r in ends]})
    every = []
    for task in tasks:
        means = [float(np.mean([r["reward"] for r in own[task, t]])) if (task, t) in own else None
                 for t in rounds]
        title = next(edits[0]["title"] for (number, _), edits in own.items() if number == task)
        every.append({"title": title, "means": means})
    return {"why": why, "ends": [card(r) for r in ends], "rows": rows, "all": every,
            "rounds": rounds}


def verdict(r: dict, q: int) -> dict:
    """The first inner loop's answer to question q, and of all how many are right."""
    if not r["right"]:
        return {"text": "no answer", "right": 0, "of": 1}
    return {"text": r["answers"][0][q], "right": sum(row[q] for row in r["right"]),
            "of": len(r["right"])}


def grids(text: str) -> list[list[str]]:
    """The grids of digits that a text is, as their rows; none if it is something else."""
    found = [grid.split("\n") for grid in text.split("\n\n")]
    return found if re.fullmatch(r"\d{1,30}(\n{1,2}\d{1,30}){0,90}", text) else []


# ------------------------------------------------------------------------------- other programs

def credit(run) -> dict:
    """What `python -m lab.credit RUN_DIR` found, if it was asked: documents by questions."""
    path = run.path / "credit.json"
    return read_json(path, FIELDS["credit"]) if path.exists() else {}


def continual(run) -> list[dict]:
    """eval.py continual: accuracy on each passage after so many edits, the mean over streams."""
    records = Lines(run.path / "continual.jsonl", repair=False).records
    return [{"edit": r["edit"], "means": np.mean(r["accuracy"], axis=0).tolist()} for r in records]


def pictures(run) -> list[tuple[str, str]]:
    """eval.py arc's. An SVG that is an image can't run a script."""
    return [(path.stem, base64.b64encode(path.read_bytes()).decode())
            for path in sorted(run.path.glob("*.svg"))[:100]]


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("run_dir", help="a run's folder")
    print(write(ap.parse_args().run_dir))


if __name__ == "__main__":
    cli(main)
