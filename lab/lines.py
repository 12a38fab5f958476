"""What are a run's self-edits about passages made of? Each line is held against its passage.

    python -m lab.lines RUN_DIR [RUN_DIR ...] [--arm base iter2 ...] [--save FILE.json] [--show 2]
    python -m lab.lines FILE.json

A table of the kinds of lines in held-out self-edits: copied (nearly a piece of the passage, word by
word), supported (half of its content words are the passage's, and all its names and numbers),
beyond (its names and numbers are, but it says more), vague (general talk, or a heading) and wrong
(a name or a number that the passage lacks). Those that a run (of
outer_loop.py or eval.py single) sampled are grouped by iteration; those that it was given
(--edits-from) are asked for by their names.
"""
import re
from collections import defaultdict
from pathlib import Path

import numpy as np

from data import knowledge
from data.judges import RULES, normalise
from lab.show import over_passages, print_table, save_numbers
from selfedit import Task, read_self_edit
from support.files import Parser, UserError, at_least, cli, printable, read_json
from support.records import Lines

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


def initials(text: str) -> str:
    """Of its capitalised words, in a row."""
    return "".join(word[0] for word in words_of(text) if word[0].isupper()).lower()


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
    if any(name not in initials(passage) for name in foreign):
        return "wrong"
    # The title's words say nothing: each line is trained on with the title before it.
    content = stems(line) - stems(passage.split("\n")[0])
    share = share_in(content, stems(passage))
    if share >= SUPPORTED:
        copied = share_in(threes(line), set(threes(passage))) >= COPIED
        return "copied" if copied else "supported"
    return "beyond" if specific or share >= BEYOND else "vague"


class Edits(Lines):
    """edits.jsonl or rollouts.jsonl: where a self-edit belongs, and its text."""

    def check(self, r):
        kinds = {int: [r["iteration"], r["task"]], list: [r["token_ids"]],
                 str: [r["split"], r["text"], r.get("arm", ""), r.get("title", "")]}
        for kind, values in kinds.items():
            if not all(type(value) is kind for value in values):
                raise ValueError("a value of another kind than a run writes")


def read_groups(folder, arms=(), data=None) -> dict[str, list[dict]]:
    """{group: its held-out self-edits}: by iteration what a run sampled, by arm what it was given.

    data: a file of the passages, if it is elsewhere now."""
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

    groups = defaultdict(list)
    for name, r in chosen:
        if r["split"] != "eval":
            continue
        i = r["task"]
        if i >= len(tasks) or titles.get(i, tasks[i].name) != tasks[i].name:
            raise UserError(f"{folder}: its task {i} is not the passage of that number in its data "
                            "file; name the right file by --data")
        edit = {"number": i, "task": tasks[i], "lines": lines_of(tasks[i], r["text"])}
        # What the run wrote itself may have been cut off by its cap.
        if not r.get("arm"):
            edit["cut"] = len(r["token_ids"]) >= config["max_edit_tokens"]
        groups[f"{folder}, {name}"].append(edit)
    if not groups:
        raise UserError(f"{folder}: no such self-edits there")
    return groups


def lines_of(task: Task, text: str) -> list[str]:
    """The documents of a self-edit, without their title and without the passage."""
    documents = read_self_edit(task, text).documents[:-1]
    return [document.split("\n", 1)[1] for document in documents]


def measure(edit: dict) -> dict:
    """What one self-edit is made of; shares of its lines, if it has any."""
    task, lines = edit["task"], edit["lines"]
    # How many answers stand in a line: what can be learned from it of what will be asked.
    said = []
    for answer in task.answers:
        said.append(any(RULES["rule"]([("", answer, line) for line in lines])))
    found = {"lines": len(lines), "answers": float(np.mean(said))}
    if "cut" in edit:
        found["cut"] = float(edit["cut"])
    if lines:
        kinds = [classify(line, task.context[0]) for line in lines]
        found |= {kind: kinds.count(kind) / len(lines) for kind in KINDS}
        found["words"] = float(np.mean([len(line.split()) for line in lines]))
        found["distinct"] = len({plain(line) for line in lines}) / len(lines)
    return found


def by_passage(edits: list[dict]) -> dict[str, list[float]]:
    """{what: a value per passage}, the mean over its self-edits."""
    found = defaultdict(lambda: defaultdict(list))      # what -> passage -> values
    for edit in edits:
        for what, value in measure(edit).items():
            found[what][edit["number"]].append(value)
    means = {}
    for what, passages in found.items():
        means[what] = [float(np.mean(passages[number])) for number in sorted(passages)]
    return means


# ------------------------------------------------------------------------------- output

def show(groups: dict[str, dict]):
    """A Markdown row per group: means and intervals over passages."""
    columns = [*KINDS, "answers", "lines", "words", "distinct", "cut"]
    rows = []
    for name, of in groups.items():
        rows.append([name, len(of["lines"])])
        for what in columns:
            form = ".1f" if what in ("lines", "words") else ".2f"
            rows[-1].append(over_passages(of[what], form) if of.get(what) else "")
    print_table(["self-edits", "passages", *columns], rows)


def show_lines(groups: dict[str, list[dict]], n: int):
    """The first n passages, and under each the first self-edit of every group, line by line."""
    firsts = defaultdict(dict)      # passage -> group -> self-edit
    for name, edits in groups.items():
        for edit in edits:
            firsts[edit["number"]].setdefault(name, edit)
    for number in sorted(firsts)[:n]:
        passage = next(iter(firsts[number].values()))["task"].context[0]
        print(printable(f"\n=== {passage}"))
        for name, edit in firsts[number].items():
            print(f"--- {name}")
            for line in edit["lines"]:
                kind = classify(line, edit["task"].context[0])
                print(printable(f"{kind:>9}  {line}"))


def main():
    ap = Parser(description=" ".join(__doc__.split("\n\n")[0].split()))
    ap.add_argument("runs", nargs="+", metavar="RUN",
                    help="run folders, about passages; or a file that --save wrote")
    ap.add_argument("--arm", nargs="+", default=[], metavar="NAME",
                    help="self-edits that the run was given, by their names in rollouts.jsonl")
    ap.add_argument("--data", metavar="FILE", help="the passages, if they are elsewhere now")
    ap.add_argument("--save", metavar="FILE", help="keep the numbers of each passage, as JSON")
    ap.add_argument("--show", type=at_least(0), default=0, metavar="N",
                    help="print the self-edits of N passages, each line with its kind")
    args = ap.parse_args()
    if Path(args.runs[0]).is_file():
        return show(read_json(args.runs[0]))
    groups = {}
    for folder in args.runs:
        groups |= read_groups(folder, args.arm, args.data)
    show_lines(groups, args.show)
    values = {name: by_passage(edits) for name, edits in groups.items()}
    if args.save:
        save_numbers(args.save, values)
    show(values)


if __name__ == "__main__":
    cli(main)
