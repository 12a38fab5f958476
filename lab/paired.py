"""Paired differences between kinds of self-edits, of a run of `python eval.py single`.

    python -m lab.paired RUN_DIR --save results.json
    python -m lab.paired results.json --against base

Each passage is compared with itself under another kind, so that hard passages do not widen the
interval. A long answer may hold the gold one by reciting the passage; the first sentence alone is
therefore judged as well, by the rule judge. --save keeps what the tables need, without any text.
"""
import json
from pathlib import Path

import numpy as np

from data.judges import RULES
from data.text import sentences
from files import Lines, Parser, UserError, cli, read_json, replace_file
from stats import bootstrap_ci


def collect(folder) -> dict[str, dict[str, list[float]]]:
    """{kind: {what: [a value per passage]}} of a run. Kinds without all passages are left out."""
    kinds = {}
    for r in Lines(Path(folder) / "rollouts.jsonl", repair=False).records:
        if (r["split"], r["edit"]) == ("eval", 0) and r["arm"]:
            kinds.setdefault(r["arm"], {})[r["task"]] = r
    if not kinds:
        raise UserError(f"{folder}: no rollouts of `eval.py single` there")
    most = max(map(len, kinds.values()))
    found = {}
    for name, rollouts in kinds.items():
        if len(rollouts) == most:
            rows = [rollouts[task] for task in sorted(rollouts)]
            found[name] = {
                "reward": [r["reward"] for r in rows],
                "first sentence": [first_sentences(r) for r in rows],
                "words": [np.mean([len(text.split()) for text in texts_of(r)]) for r in rows],
                "documents": [r["documents"] for r in rows],
                "seconds": [r["seconds"] for r in rows],
                "no adaptation": [r["unadapted"] for r in rows]}
    return found


def texts_of(rollout) -> list[str]:
    """The answers of all seeds; empty ones if nothing was trained."""
    return [text for texts in rollout["answers"] for text in texts] or [""]


def first_sentences(rollout) -> float:
    """The share of questions whose answer is right by its first sentence alone."""
    triples = []
    for texts in rollout["answers"]:
        for question, gold, text in zip(rollout["questions"], rollout["gold"], texts):
            triples.append((question, gold, (sentences(text) or [""])[0]))
    return float(np.mean(RULES["rule"](triples))) if triples else 0.0


def interval(values, form="{:.3f}") -> str:
    low, high = bootstrap_ci(list(values))
    return f"{form} [{form}, {form}]".format(np.mean(values), low, high)


def table(kinds, against) -> str:
    """A Markdown row per kind: rewards, and their differences from one kind."""
    if against not in kinds:
        raise UserError(f"--against {against!r}: choose among {', '.join(kinds)}")
    lines = [f"| kind | reward | minus {against} | first sentence | words | documents | s |",
             "|---|---|---|---|---|---|---|"]
    first = next(iter(kinds.values()))
    lines.append(f"| no adaptation | {interval(first['no adaptation'])} | | | | | |")
    for name, of in kinds.items():
        difference = np.array(of["reward"]) - np.array(kinds[against]["reward"])
        cells = [name, interval(of["reward"]),
                 "" if name == against else interval(difference, "{:+.3f}"),
                 interval(of["first sentence"]), f"{np.mean(of['words']):.0f}",
                 f"{np.mean(of['documents']):.1f}", f"{np.mean(of['seconds']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("source", help="a run's folder, or what --save wrote")
    ap.add_argument("--against", default="passage only", help="kind to compare with")
    ap.add_argument("--save", metavar="FILE", help="keep the numbers, a small JSON")
    args = ap.parse_args()
    folder = Path(args.source)
    kinds = collect(folder) if folder.is_dir() else read_json(folder)
    if args.save:
        rounded = {name: {what: [round(float(x), 4) for x in values]
                          for what, values in of.items()} for name, of in kinds.items()}
        lines = [f"{json.dumps(name)}: {json.dumps(of)}" for name, of in rounded.items()]
        replace_file(args.save, "{\n" + ",\n".join(lines) + "\n}\n")
    print(table(kinds, args.against))


if __name__ == "__main__":
    cli(main)
