"""What are a run's self-edits about passages made of? Every line is held against its passage, by a
rule.

    python -m lab.lines RUN_DIR [RUN_DIR ...] [--arm base iter2 ...] [--save FILE.json] [--show 2]

copied: (nearly) a piece of a sentence of the passage. supported: all its numbers and names, and at
least .7 of its content words, stand there. beyond: its numbers and names do, and about half of its
words: it says more. wrong: it has a number or a name that the passage lacks, or some and hardly
another word from there. vague: general talk. A rule compares words: that a line says the contrary
of the passage, or mixes up who did what, it can't see.

The self-edits that a run (of outer_loop.py or eval.py single) sampled are grouped by iteration; of
those it was given (--edits-from), say the names by --arm.
"""
import json
import random
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import knowledge
from data.judges import normalise
from files import Lines, Parser, UserError, at_least, cli, printable, read_json, replace_file
from outer_loop import next_tasks
from run import read_settings
from selfedit import Task, read_self_edit, seed_for
from stats import bootstrap_ci

KINDS = ("copied", "supported", "beyond", "vague", "wrong")
SUPPORTED, BEYOND = 0.5, 0.3    # of a line's content words
COPIED = 0.7                    # of its runs of three words
STOP_WORDS = set("""
a about after all also although an and another any are as at be became because been before being
between both but by can could did do does during each either for from had has have he her him his
how however if in into is it its itself many may might more most much must no nor not of often on
one only or other others our over own she should since so some such than that the their them then
there these they this those through thus to under until up upon us was we were what when where
which while who whom whose why will with within without would you your passage question answer
""".split())


# ------------------------------------------------------------------------------- the rule

def stem(word: str) -> str:
    """Forms of a word are alike: its first letters, without an ending."""
    return re.sub(r"(?<=..)(['’]s|ies|ing|ed|es|s|e|y)$", "", word)[:6]


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)


def stems(text: str) -> set[str]:
    return {stem(word) for word in words_of(text.lower()) if word not in STOP_WORDS}


def numbers(text: str) -> set[str]:
    return {found.replace(",", "") for found in re.findall(r"\d+(?:[.,]\d+)*", text)}


def names(text: str) -> set[str]:
    """Stems of capitalised words, but for those that are so because a sentence begins."""
    found = set()
    for sentence in re.split(r"[.!?:]\W+", text):
        for word in words_of(sentence)[1:]:
            if word[0].isupper() and word.lower() not in STOP_WORDS:
                found.add(stem(word.lower()))
    return found


def plain(text: str) -> str:
    """A text without a bullet or number at its begin, without its label, and the dots of U.S."""
    text = re.sub(r"^\W*(\d+[.)])?\W*", "", text)
    # "Wider Effects: It ..." and "Question 3: Who ..."
    text = re.sub(r"^[^.:]{1,60}:\W*(?=\w)", "", text)
    return re.sub(r"(?<=\b[A-Z])\.", "", text)


def threes(text: str) -> list[tuple]:
    """All runs of three words."""
    words = normalise(text)
    return list(zip(words, words[1:], words[2:]))


def is_heading(line: str) -> bool:
    """Or a stump that the token cap left: no sentence's end, and hardly a word in lower case."""
    content = [word for word in words_of(line) if word.lower() not in STOP_WORDS]
    return not re.search(r"[.!?]\W*$", line) and sum(map(str.islower, content)) < 2


def classify(line: str, passage: str) -> str:
    """One of KINDS."""
    title, line, passage = (plain(text) for text in (passage.split("\n")[0], line, passage))
    if is_heading(line):
        return "vague"
    # UK is a name of the passage if United Kingdom is.
    initials = "".join(word[0] for word in words_of(passage) if word[0].isupper()).lower()
    known = stems(passage)
    specific = names(line) | numbers(line)
    if any(it not in initials for it in specific - known - numbers(passage)):
        return "wrong"
    # The title's words say nothing: each line is trained on with the title before it.
    content = stems(line) - stems(title)
    share = len(content & known) / max(1, len(content))
    if share >= SUPPORTED:
        runs, there = threes(line), set(threes(passage))
        return "copied" if sum(map(there.__contains__, runs)) >= COPIED * len(runs) else "supported"
    return "beyond" if specific or share >= BEYOND else "vague"


# ------------------------------------------------------------------------------- a run's self-edits

def tasks_of(folder, config: dict, split: str, t: int, data=None) -> list[Task]:
    """The passages of a run, in the order by which its files number them."""
    tasks = knowledge.load(data or config[f"{split}_data"], log=lambda line: None)
    if split == "eval":
        return tasks
    # As outer_loop.rest_em draws them.
    random.Random(seed_for(config["seed"], "order of the passages")).shuffle(tasks)
    return next_tasks(tasks, t, config["tasks"])


def read_groups(folder, args) -> dict[str, list[dict]]:
    """{group: records of self-edits}: by iteration what the run sampled, by arm what it was given.
    Each record gets its `passage` and its `lines`."""
    config = read_settings(folder)
    rollouts = Lines(Path(folder) / "rollouts.jsonl", repair=False).records
    titles = {(r["iteration"], r["task"]): r["title"] for r in rollouts if r["split"] == args.split}
    chosen = [(r["arm"], r) for r in rollouts if r["arm"] in args.arm]
    for r in Lines(Path(folder) / "edits.jsonl", repair=False).records:
        chosen.append((f"iteration {r['iteration']}", r))
    groups = defaultdict(list)
    for name, r in chosen:
        t = r["iteration"]
        if r["split"] != args.split or args.iteration not in (None, t):
            continue
        task = tasks_of(folder, config, args.split, t, args.data)[r["task"]]
        if titles.get((t, r["task"]), task.name) != task.name:
            raise UserError(f"{folder}: task {r['task']} is not about {task.name!r}; name the file "
                            "of its passages by --data")
        lines = [line.split("\n", 1)[1] for line in read_self_edit(task, r["text"]).documents[:-1]]
        groups[f"{Path(folder).name}, {name}"].append(
            {"passage": task.context[0], "text": r["text"], "lines": lines, "task": r["task"],
             "cut": len(r["token_ids"]) >= config["max_edit_tokens"]})
    if not groups:
        raise UserError(f"{folder}: no self-edits of {args.split} passages there")
    return groups


def measure(edit: dict) -> dict:
    """What one self-edit is made of; shares of its lines, if it has any."""
    lines = edit["lines"]
    found = {"lines": len(lines), "cut": float(edit["cut"])}
    if lines:
        kinds = [classify(line, edit["passage"]) for line in lines]
        found |= {kind: kinds.count(kind) / len(lines) for kind in KINDS}
        found["words"] = float(np.mean([len(line.split()) for line in lines]))
        found["distinct"] = len(set(map(str.strip, lines))) / len(lines)
    return found


def over_passages(edits: list[dict]) -> dict[str, list[float]]:
    """{what: a value per passage}, the mean over its self-edits."""
    by_passage = defaultdict(lambda: defaultdict(list))
    for edit in edits:
        for what, value in measure(edit).items():
            by_passage[what][edit["task"]].append(value)
    return {what: [float(np.mean(values)) for _, values in sorted(of.items())]
            for what, of in by_passage.items()}


# ------------------------------------------------------------------------------- output

def table(groups: dict[str, dict]) -> str:
    """A Markdown row per group: means and intervals over passages."""
    columns = [*KINDS, "lines", "words", "distinct", "cut"]
    rows = [f"| self-edits | passages | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, of in groups.items():
        cells = []
        for what in columns:
            form = "{:.1f} [{:.1f}, {:.1f}]" if what in ("lines", "words") else \
                "{:.2f} [{:.2f}, {:.2f}]"
            values = of.get(what, [np.nan])
            cells.append(form.format(np.mean(values), *bootstrap_ci(values)))
        rows.append(f"| {name} | {len(of['lines'])} | {' | '.join(cells)} |")
    return "\n".join(rows)


def show(groups: dict[str, list[dict]], n: int):
    """The first n passages, and under each its first self-edit of every group, line by line."""
    for task in sorted({edit["task"] for edits in groups.values() for edit in edits})[:n]:
        own = {}
        for name, edits in groups.items():
            own |= {name: edit for edit in reversed(edits) if edit["task"] == task}
        for number, (name, edit) in enumerate(own.items()):
            if number == 0:
                print(printable(f"\n=== {edit['passage']}"))
            print(f"--- {name}")
            for line in edit["lines"]:
                print(printable(f"{classify(line, edit['passage']):>9}  {line}"))


def main():
    ap = Parser(description=" ".join(__doc__.split("\n\n")[0].split()))
    ap.add_argument("runs", nargs="+", help="run folders, about passages")
    ap.add_argument("--iteration", type=at_least(0), help="this one only (default: all)")
    ap.add_argument("--split", default="eval", choices=("eval", "train"))
    ap.add_argument("--arm", nargs="+", default=[], metavar="NAME",
                    help="self-edits that the run was given, by their names in rollouts.jsonl")
    ap.add_argument("--data", metavar="FILE", help="the passages, if they are elsewhere now")
    ap.add_argument("--save", metavar="FILE", help="keep the numbers of each passage, as JSON")
    ap.add_argument("--show", type=at_least(0), default=0, metavar="N",
                    help="print the self-edits of N passages, each line with its kind")
    args = ap.parse_args()
    groups = {}
    for folder in args.runs:
        groups |= read_groups(folder, args)
    values = {name: over_passages(edits) for name, edits in groups.items()}
    show(groups, args.show)
    if args.save:
        replace_file(args.save, json.dumps(values, indent=1))
    print(table(values))


if __name__ == "__main__":
    cli(main)
