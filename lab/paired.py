"""What did a run's self-edits teach, paired by passage?

    python -m lab.paired RUN_DIR [RUN_DIR ...] [--against base] [--save FILE.json]
    python -m lab.paired FILE.json [--lines]        # what --save wrote: no text, only numbers

A kind of self-edits is a row of `eval.py single`'s table, or a round of outer_loop.py. Each passage
is compared with itself under another kind, so that hard passages do not widen the interval. A long
answer may hold the gold one by reciting the passage: so its first sentence is judged alone as well.
"""
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from data.judges import RULES
from data.text import sentences
from lab.experiment import over_passages, parser, print_table
from support.files import UserError, cli, read_json, replace_file
from support.ranks import Records


def by_passage(passages: dict[int, list[dict]]) -> dict[str, list[float]]:
    """{what: [a value per passage]} of {passage: what was measured of its self-edits}."""
    means = defaultdict(list)
    for _, rows in sorted(passages.items()):
        for what in rows[0]:
            means[what].append(float(np.mean([row[what] for row in rows])))
    return dict(means)


def collect(folders) -> dict[str, dict[str, list[float]]]:
    """{kind: {what: [a value per passage]}} of runs. Kinds without all passages are left out."""
    kinds = defaultdict(lambda: defaultdict(list))      # kind -> passage -> values of rollouts
    for folder in map(Path, folders):
        for r in Records(folder / "rollouts.jsonl", repair=False).records:
            if r["split"] == "eval":
                kind = r["arm"] or f"round {r['iteration']}"
                if len(folders) > 1:
                    kind = f"{folder.name}, {kind}"
                kinds[kind][r["task"]].append(values_of(r))
    if not kinds:
        raise UserError(f"{', '.join(map(str, folders))}: no rollouts of held-out passages there")
    most = max(map(len, kinds.values()))
    return {kind: by_passage(passages) for kind, passages in kinds.items() if len(passages) == most}


def values_of(rollout: dict) -> dict[str, float]:
    """What is compared, of one self-edit."""
    # The answers of all seeds; an empty one if nothing was trained.
    texts, triples = [], []
    for of_seed in rollout["answers"]:
        texts += of_seed
        for question, gold, text in zip(rollout["questions"], rollout["gold"], of_seed):
            triples.append((question, gold, (sentences(text) or [""])[0]))
    first = float(np.mean(RULES["rule"](triples))) if triples else 0.0
    words = [len(text.split()) for text in texts or [""]]
    return {"reward": rollout["reward"], "first sentence": first, "words": np.mean(words),
            "documents": rollout["documents"], "seconds": rollout["seconds"],
            "no adaptation": rollout["unadapted"]}


def show(kinds, against):
    """A Markdown row per kind: rewards, and their differences from one kind."""
    against = against or next(iter(kinds))
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


def show_lines(groups: dict[str, dict]):
    """A Markdown row per group: means and intervals over passages of all that was counted."""
    columns, rows = list(next(iter(groups.values()))), []
    for name, of in groups.items():
        rows.append([name])
        for what in columns:
            rows[-1].append(over_passages(of[what], ".2f") if of.get(what) else "")
    print_table(["self-edits", *columns], rows)


def main():
    ap = parser(__doc__)
    ap.add_argument("sources", nargs="+", metavar="SOURCE",
                    help="folders of runs, or a file that --save wrote")
    ap.add_argument("--against", help="kind to compare with (default: the first)")
    ap.add_argument("--lines", action="store_true", help="a file of what self-edits are made of")
    ap.add_argument("--save", metavar="FILE", help="keep the numbers, a small JSON")
    args = ap.parse_args()
    saved = Path(args.sources[0]).is_file()
    found = read_json(args.sources[0]) if saved else collect(args.sources)
    if args.save:
        lines = []
        for name, of in found.items():
            rounded = {what: np.round(values, 4).tolist() for what, values in of.items()}
            lines.append(f"{json.dumps(name)}: {json.dumps(rounded)}")
        replace_file(args.save, "{\n" + ",\n".join(lines) + "\n}\n")
    if args.lines:
        show_lines(found)
    else:
        show(found, args.against)


if __name__ == "__main__":
    cli(main)
