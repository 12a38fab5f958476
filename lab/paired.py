"""Paired differences between kinds of self-edits, of runs on the same held-out passages.

    python -m lab.paired RUN_DIR [RUN_DIR ...] --save results.json
    python -m lab.paired results.json --against base

A run of `eval.py single` has a kind for each row of its table. One of outer_loop.py has one for the
self-edits of each round; of several runs a kind is named by its run as well. Each passage is
compared with itself under another kind, so that hard passages do not widen the interval. A long
answer may hold the gold one by reciting the passage; the first sentence alone is therefore judged
as well, by the rule judge. --save keeps what the tables need, without any text.
"""
from collections import defaultdict
from pathlib import Path

import numpy as np

from data.judges import RULES
from data.text import sentences
from lab.show import over_passages, print_table, save_numbers
from support.files import Parser, UserError, cli, read_json
from support.records import Lines


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
    means = defaultdict(list)
    for passage in sorted(passages):
        rows = [values_of(r) for r in passages[passage]]
        for what in rows[0]:
            means[what].append(float(np.mean([row[what] for row in rows])))
    return dict(means)


def values_of(rollout: dict) -> dict[str, float]:
    """What is compared, of one self-edit."""
    # The answers of all seeds; an empty one if nothing was trained.
    texts = []
    for of_seed in rollout["answers"]:
        texts += of_seed
    words = [len(text.split()) for text in texts or [""]]
    return {"reward": rollout["reward"], "first sentence": first_sentences(rollout),
            "words": np.mean(words), "documents": rollout["documents"],
            "seconds": rollout["seconds"], "no adaptation": rollout["unadapted"]}


def first_sentences(rollout) -> float:
    """The share of questions whose answer is right by its first sentence alone."""
    triples = []
    for texts in rollout["answers"]:
        for question, gold, text in zip(rollout["questions"], rollout["gold"], texts):
            first = (sentences(text) or [""])[0]
            triples.append((question, gold, first))
    return float(np.mean(RULES["rule"](triples))) if triples else 0.0


def show(kinds, against):
    """A Markdown row per kind: rewards, and their differences from one kind."""
    if against not in kinds:
        raise UserError(f"--against {against!r}: choose among {', '.join(kinds)}")
    first = next(iter(kinds.values()))
    rows = [["no adaptation", over_passages(first["no adaptation"]), "", "", "", "", ""]]
    for name, of in kinds.items():
        # Passage by passage.
        difference = np.subtract(of["reward"], kinds[against]["reward"])
        rows.append([name, over_passages(of["reward"]),
                     "" if name == against else over_passages(difference, "+.3f"),
                     over_passages(of["first sentence"]), f"{np.mean(of['words']):.0f}",
                     f"{np.mean(of['documents']):.1f}", f"{np.mean(of['seconds']):.0f}"])
    head = ["kind", "reward", f"minus {against}", "first sentence", "words", "documents", "s"]
    print_table(head, rows)


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
        rounded = {}
        for name, of in kinds.items():
            rounded[name] = {what: np.round(values, 4).tolist() for what, values in of.items()}
        save_numbers(args.save, rounded)
    show(kinds, args.against or next(iter(kinds)))


if __name__ == "__main__":
    cli(main)
