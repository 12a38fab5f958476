"""A run as one HTML file, report.html in its folder: no script, nothing loaded from elsewhere.

    python -m support.page RUN_DIR      # of any run, finished or not: it reads files, not weights

How it looks is support/page.html, a Jinja template; here is what it is told.
"""
import base64
import re
import shlex
import time
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import Markup

from support.config import FREE, read_settings
from support.files import FIELDS, Lines, Parser, UserError, cli, printable, read_json, replace_file
from support.ranks import Records
from support.report import before_and_after, kinds_by_change, learned, when

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
            path=path, cfg=SimpleNamespace(**cfg),
            metrics=Lines(path / "metrics.jsonl", repair=False),
            rollouts=Records(path / "rollouts.jsonl", repair=False))
        # Each start of the program writes its settings down.
        started = time.localtime((path / "config.json").stat().st_mtime)
        page = env.get_template("page.html").render(
            name=path.resolve().name, started=time.strftime("%Y-%m-%d", started),
            command=shlex.join(map(last_part, cfg.get("command", []))), cfg=run.cfg,
            settings={name: last_part(value) for name, value in cfg.items() if name != "command"},
            puzzles="arc" in run.cfg.domain, learned=learned(run.cfg), when=when, colours=COLOURS,
            metrics=run.metrics.records, kinds=kinds_by_change(run.metrics.records),
            curve=curve(run), made_of=made_of(run), rivals=rivals(run),
            held_out=before_and_after(run), credit=credit(path), continual=continual(path),
            pictures=pictures(path))
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


def last_part(value) -> str:
    """A setting, or a word of the command, as text. People show their pages to others, so the end
    of a path is enough."""
    return re.sub(r"^(|[\w-]+=)/.*/", r"\1", str(value))


def grids(text: str) -> list[list[str]]:
    """The grids of digits that a text is, as their rows; none if it is something else."""
    found = [grid.split("\n") for grid in text.split("\n\n")]
    return found if re.fullmatch(r"\d{1,30}(\n{1,2}\d{1,30}){0,90}", text) else []


# ------------------------------------------------------------------------------- the rounds

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
        except UserError:
            continue        # no run, or one that can't be read
    return [metrics for metrics in found if metrics]


def curve(run) -> dict:
    """The shares over rounds: of all questions, of each kind, of the control runs; levels."""
    metrics = run.metrics.records
    if not metrics:
        return {}
    kinds = {}
    for kind in metrics[0]["eval_by_kind"]:
        kinds[kind] = [m["eval_by_kind"].get(kind, 0) for m in metrics]
    # What to compare with was measured once, but for the model without a self-edit.
    levels = {arm["name"]: arm["reward"] for arm in metrics[0]["baselines"]}
    levels["without a self-edit"] = levels.pop("un-adapted", metrics[0]["eval_unadapted"])
    # Of several control runs the mean, and the whole of their intervals.
    band = []
    beside = controls(run)
    for row in zip(*beside):
        band.append({"mean": float(np.mean([m["eval_reward"] for m in row])),
                     "low": min(m["eval_ci"][0] for m in row),
                     "high": max(m["eval_ci"][1] for m in row)})
    return {"rounds": max(len(metrics) - 1, run.cfg.iterations, 1), "kinds": kinds,
            "shares": [m["eval_reward"] for m in metrics], "levels": levels, "band": band,
            "n_controls": len(beside)}


def made_of(run) -> list[list[dict]]:
    """Groups of shares that exclude each other, with a bar per round: all lr are one choice, and
    the forms of lines another."""
    examples = {}
    for r in run.rollouts.records:
        examples |= dict(zip(r.get("forms", []), r["text"].splitlines()))
    made = [m["made_of"] for m in run.metrics.records]
    groups = {}
    for name in dict.fromkeys(chain(*made)):
        value = re.search(r" ([\d.e+-]+)$", name)
        title = name[:value.start()] if value else name
        part = {"name": name, "example": examples.get(name, ""),
                "value": float(value[1]) if value else 0,
                "shares": [shares.get(name, 0) for shares in made]}
        groups.setdefault("its lines" if name in examples else title, []).append(part)
    # Values in their order; forms as they come, the most frequent first.
    return [sorted(parts, key=lambda part: part["value"]) for parts in groups.values()]


def rivals(run) -> list[dict]:
    """The self-edits, the best first, of that training task of the last round whose rewards differ
    most."""
    tasks = {}
    for r in run.rollouts.records:
        if r["split"] == "train":
            tasks.setdefault((r["iteration"], r["task"]), []).append(r)
    of_last = [edits for (t, _), edits in sorted(tasks.items()) if t == max(tasks)[0]]
    widest = max(of_last, key=lambda edits: np.ptp([r["reward"] for r in edits]), default=[])
    # As in `select`: without documents nothing is learned, and of equal rewards the first is best.
    return sorted(widest, key=lambda r: (not r["documents"], -r["reward"], r["edit"]))


# ------------------------------------------------------------------------------- other programs

def credit(path) -> dict:
    """What `python -m lab.credit RUN_DIR` found, if it was asked: documents by questions."""
    file = path / "credit.json"
    return read_json(file, FIELDS["credit"]) if file.exists() else {}


def continual(path) -> list[dict]:
    """eval.py continual: accuracy on each passage after so many edits, the mean over streams."""
    records = Lines(path / "continual.jsonl", repair=False).records
    return [{"edit": r["edit"], "means": np.mean(r["accuracy"], axis=0).tolist()} for r in records]


def pictures(path) -> list[tuple[str, str]]:
    """eval.py arc's. An SVG that is an image can't run a script."""
    return [(file.stem, base64.b64encode(file.read_bytes()).decode())
            for file in sorted(path.glob("*.svg"))[:100]]


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("run_dir", help="a run's folder")
    print(write(ap.parse_args().run_dir))


if __name__ == "__main__":
    cli(main)
