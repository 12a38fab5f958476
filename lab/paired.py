"""Paired differences between kinds of self-edits, of runs on the same held-out passages.

    python -m lab.paired RUN_DIR [RUN_DIR ...] --save results.json
    python -m lab.paired results.json --against base

A run of `eval.py single` has a kind for each row of its table. One of outer_loop.py has one for the
self-edits of each round; of several runs a kind is named by its run as well. Each passage is
compared with itself under another kind, so that hard passages do not widen the interval. A long
answer may hold the gold one by reciting the passage; the first sentence alone is therefore judged
as well, by the rule judge. --save keeps what the tables need, without any text.
"""
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from data.judges import RULES
from data.text import sentences
from files import Lines, Parser, UserError, cli, read_json, replace_file
from stats import bootstrap_ci


def collect(folders) -> dict[str, dict[str, list[float]]]:
    """{kind: {what: [a value per passage]}} of runs. Kinds without all passages are left out."""
    kinds = defaultdict(lambda: defaultdict(list))      # kind -> passage -> rollouts
    for folder in map(Path, folders):
        for r in Lines(folder / "rollouts.jsonl", repair=False).records:
            if r["split"] == "eval":
                kind = r["arm"] or f"round {r['iteration']}"
                if len(folders) > 1:
                    kind = f"{folder.name}, {kind}"
                kinds[kind][r["task"]].append(r)
    if not kinds:
        raise UserError(f"{', '.join(map(str, folders))}: no rollouts of held-out passages there")
    most = max(map(len, kinds.values()))
    return {kind: measured(passages) for kind, passages in kinds.items() if len(passages) == most}


def measured(passages) -> dict[str, list[float]]:
    """{what: [a value per passage]} of {passage: its rollouts}: means over its self-edits."""
    values = defaultdict(list)
    for _, rollouts in sorted(passages.items()):
        values["reward"].append(mean_of(rollouts, lambda r: r["reward"]))
        values["first sentence"].append(mean_of(rollouts, first_sentences))
        values["words"].append(mean_of(rollouts, words_of))
        values["documents"].append(mean_of(rollouts, lambda r: r["documents"]))
        values["seconds"].append(mean_of(rollouts, lambda r: r["seconds"]))
        values["no adaptation"].append(mean_of(rollouts, lambda r: r["unadapted"]))
    return dict(values)


def mean_of(rollouts, value) -> float:
    return float(np.mean([value(r) for r in rollouts]))


def words_of(rollout) -> float:
    return float(np.mean([len(text.split()) for text in texts_of(rollout)]))


def texts_of(rollout) -> list[str]:
    """The answers of all seeds; an empty one if nothing was trained."""
    found = []
    for texts in rollout["answers"]:
        found += texts
    return found or [""]


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
    ap.add_argument("sources", nargs="+", metavar="SOURCE",
                    help="folders of runs, or a file that --save wrote")
    ap.add_argument("--against", help="kind to compare with (default: the first)")
    ap.add_argument("--save", metavar="FILE", help="keep the numbers, a small JSON")
    args = ap.parse_args()
    (first, *_) = args.sources
    kinds = collect(args.sources) if Path(first).is_dir() else read_json(first)
    if args.save:
        rounded = {name: {what: [round(float(x), 4) for x in values]
                          for what, values in of.items()} for name, of in kinds.items()}
        lines = [f"{json.dumps(name)}: {json.dumps(of)}" for name, of in rounded.items()]
        replace_file(args.save, "{\n" + ",\n".join(lines) + "\n}\n")
    print(table(kinds, args.against or next(iter(kinds))))


if __name__ == "__main__":
    cli(main)
