"""What did a run's self-edits teach, paired by passage, and what are they made of?

    python -m lab.paired RUN_DIR [RUN_DIR ...] [--against base] [--save FILE.json]
    python -m lab.paired RUN_DIR [RUN_DIR ...] --lines [base iter2 ...] [--save FILE.json]
    python -m lab.paired FILE.json [--lines]        # what --save wrote: no text, only numbers

A kind of self-edits is a row of `eval.py single`'s table, or a round of outer_loop.py. Each passage
is compared with itself under another kind, so that hard passages do not widen the interval. A long
answer may hold the gold one by reciting the passage: so its first sentence is judged alone as well.

--lines: a table of the kinds of lines in them. Copied: nearly a piece of the passage, word by word.
Supported: half of its content words are the passage's, and all its names and numbers. Beyond: its
names and numbers are, but it says more. Vague: general talk, or a heading. Wrong: a name or a
number that the passage lacks. Self-edits that a run sampled are grouped by iteration; those that it
was given (--edits-from) are asked for by their names.
"""
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import knowledge
from data.judges import RULES, normalise
from data.text import sentences
from lab.experiment import over_passages, parser, print_table
from selfedit import Task, read_self_edit
from support.files import Lines, UserError, cli, read_json, replace_file


def by_passage(passages: dict[int, list[dict]]) -> dict[str, list[float]]:
    """{what: [a value per passage]} of {passage: what was measured of its self-edits}, a mean over
    these, where one has it."""
    means = defaultdict(list)
    for _, rows in sorted(passages.items()):
        for what in dict.fromkeys(what for row in rows for what in row):
            means[what].append(float(np.mean([row[what] for row in rows if what in row])))
    return dict(means)


# ------------------------------------------------------------------------------- what they teach

def collect(folders) -> dict[str, dict[str, list[float]]]:
    """{kind: {what: [a value per passage]}} of runs. Kinds without all passages are left out."""
    kinds = defaultdict(lambda: defaultdict(list))      # kind -> passage -> values of rollouts
    for folder in map(Path, folders):
        for r in Lines(folder / "rollouts.jsonl", repair=False).records:
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


# -------------------------------------------------------------------------- what kind of line it is

# The thresholds were chosen on 120 lines of the paper's release (base, iter2, gpt4_1) and of
# SmolLM2-135M. On 60 others the rule says what a reader said of .72 (kappa .62), and of .90 whether
# a line stands in the passage (copied or supported) or not. As it compares words, it finds half of
# what a reader calls wrong: it can't see that a line says the contrary, or mixes up who did what.

KINDS = ("copied", "supported", "beyond", "vague", "wrong")
COPIED = 0.7                    # of a line's runs of three words
SUPPORTED, BEYOND = 0.5, 0.3    # of a line's content words
STOP_WORDS = set("""
a about after all also although an and another any are as at be became because been before being
between both but by can could did do does during each either for from had has have he her him his
how however if in into is it its itself many may might more most much must no nor not of often on
one only or other others our over own she should since so some such than that the their them then
there these they this those through thus to under until up upon us was we were what when where
which while who whom whose why will with within without would you your passage question answer
""".split())


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)


def stem(word: str) -> str:
    """Forms of a word are alike: its first letters, without an ending."""
    return re.sub(r"(?<=..)(['’]s|ies|ing|ed|es|s|e|y)$", "", word)[:6]


def stems(text: str) -> set[str]:
    """Of its content words."""
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


def undotted(text: str) -> str:
    """U.S. is US."""
    return re.sub(r"(?<=\b[A-Z])\.", "", text)


def plain(line: str) -> str:
    """Without its number and its label: "1. Wider effects: It ...", "Question 3: Who ..."."""
    line = re.sub(r"^\W*(\d+[.)])?\W*", "", line)
    return undotted(re.sub(r"^[^.:]{1,60}:\W+(?=\w)", "", line))


def is_heading(line: str) -> bool:
    """Or a stump that the token cap left: no sentence's end, and hardly a word in lower case."""
    content = [word for word in words_of(line) if word.lower() not in STOP_WORDS]
    return not re.search(r"[.!?]\W*$", line) and sum(map(str.islower, content)) < 2


def threes(text: str) -> list[tuple]:
    """All runs of three words."""
    words = normalise(text)
    return list(zip(words, words[1:], words[2:]))


def share_in(parts, there) -> float:
    """How many of the parts are there."""
    return sum(part in there for part in parts) / len(parts) if parts else 0.0


def classify(line: str, passage: str) -> str:
    """One of KINDS. The passage begins with its title."""
    line, passage = plain(line), undotted(passage)
    if is_heading(line):
        return "vague"
    specific = names(line) | numbers(line)
    foreign = specific - stems(passage) - numbers(passage)
    # UK is a name of the passage if United Kingdom is.
    initials = "".join(word[0] for word in words_of(passage) if word[0].isupper()).lower()
    if any(name not in initials for name in foreign):
        return "wrong"
    # The title's words say nothing: each line is trained on with the title before it.
    content = stems(line) - stems(passage.split("\n")[0])
    share = share_in(content, stems(passage))
    if share >= SUPPORTED:
        copied = share_in(threes(line), set(threes(passage))) >= COPIED
        return "copied" if copied else "supported"
    return "beyond" if specific or share >= BEYOND else "vague"


# ------------------------------------------------------------------------------- lines of a run

class Edits(Lines):
    """edits.jsonl or rollouts.jsonl: where a self-edit belongs, and its text."""

    def check(self, r):
        kinds = {int: [r["iteration"], r["task"]], list: [r["token_ids"]],
                 str: [r["split"], r["text"], r.get("arm", ""), r.get("title", "")]}
        for kind, values in kinds.items():
            if not all(type(value) is kind for value in values):
                raise ValueError("a value of another kind than a run writes")


def made_of(folder, arms=(), data=None) -> dict[str, dict[str, list[float]]]:
    """{group: {what: [a value per passage]}} of held-out self-edits: by iteration what a run
    sampled, by arm what it was given. data: a file of the passages, if it is elsewhere now."""
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict) or config.get("domain") != "knowledge":
        raise UserError(f"{folder}: not a run about passages")
    rollouts = Edits(Path(folder) / "rollouts.jsonl", repair=False).records
    sampled = Edits(Path(folder) / "edits.jsonl", repair=False).records
    chosen = [(f"iteration {r['iteration']}", r) for r in sampled]
    chosen += [(r["arm"], r) for r in rollouts if r.get("arm") in arms]
    titles = {r["task"]: r.get("title") for r in rollouts if r["split"] == "eval"}
    tasks = knowledge.load(data or config["eval_data"], log=lambda line: None,
                           max_documents=config.get("max_documents", 0))

    found = defaultdict(lambda: defaultdict(list))      # group -> passage -> its self-edits
    for name, r in chosen:
        if r["split"] != "eval":
            continue
        i = r["task"]
        if i >= len(tasks) or titles.get(i, tasks[i].name) != tasks[i].name:
            raise UserError(f"{folder}: its task {i} is not the passage of that number in its data "
                            "file; name the right file by --data")
        measured = measure(tasks[i], r["text"])
        # What the run wrote itself may have been cut off by its cap.
        if not r.get("arm"):
            measured["cut"] = float(len(r["token_ids"]) >= config["max_edit_tokens"])
        found[f"{folder}, {name}"][i].append(measured)
    if not found:
        raise UserError(f"{folder}: no such self-edits there")
    return {name: by_passage(passages) for name, passages in found.items()}


def measure(task: Task, text: str) -> dict[str, float]:
    """What one self-edit is made of; shares of its lines, if it has any."""
    # Its documents, without their title and without the passage.
    documents = read_self_edit(task, text).documents[:-1]
    lines = [document.split("\n", 1)[1] for document in documents]
    # How many answers stand in a line: what can be learned from it of what will be asked.
    said = [any(RULES["rule"]([("", answer, line) for line in lines])) for answer in task.answers]
    found = {"lines": len(lines), "answers": float(np.mean(said))}
    if lines:
        kinds = [classify(line, task.context[0]) for line in lines]
        found |= {kind: kinds.count(kind) / len(lines) for kind in KINDS}
        found["words"] = float(np.mean([len(line.split()) for line in lines]))
        found["distinct"] = len({plain(line) for line in lines}) / len(lines)
    return found


def show_lines(groups: dict[str, dict]):
    """A Markdown row per group: means and intervals over passages."""
    columns = [*KINDS, "answers", "lines", "words", "distinct", "cut"]
    rows = []
    for name, of in groups.items():
        rows.append([name, len(of["lines"])])
        for what in columns:
            form = ".1f" if what in ("lines", "words") else ".2f"
            rows[-1].append(over_passages(of[what], form) if of.get(what) else "")
    print_table(["self-edits", "passages", *columns], rows)


def main():
    ap = parser(__doc__)
    ap.add_argument("sources", nargs="+", metavar="SOURCE",
                    help="folders of runs, or a file that --save wrote")
    ap.add_argument("--against", help="kind to compare with (default: the first)")
    ap.add_argument("--lines", nargs="*", metavar="NAME", help="what self-edits are made of; names "
                    "in rollouts.jsonl of those that a run was given")
    ap.add_argument("--data", metavar="FILE", help="the passages, if they are elsewhere now")
    ap.add_argument("--save", metavar="FILE", help="keep the numbers, a small JSON")
    args = ap.parse_args()
    if Path(args.sources[0]).is_file():
        found = read_json(args.sources[0])
    elif args.lines is None:
        found = collect(args.sources)
    else:
        found = {}
        for folder in args.sources:
            found |= made_of(folder, args.lines, args.data)
    if args.save:
        lines = []
        for name, of in found.items():
            rounded = {what: np.round(values, 4).tolist() for what, values in of.items()}
            lines.append(f"{json.dumps(name)}: {json.dumps(rounded)}")
        replace_file(args.save, "{\n" + ",\n".join(lines) + "\n}\n")
    if args.lines is None:
        show(found, args.against)
    else:
        show_lines(found)


if __name__ == "__main__":
    cli(main)
