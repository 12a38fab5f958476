"""Tiny puzzles in ARC's form, so that the second domain runs on a laptop in minutes, too.

A rule exchanges the five colours of a 3 x 3 grid among each other. The embedded model (made by
data/pretrain_tiny.py) copies grids, writes self-edits at random, and knows no rule: it has to be
trained on one. How, matters: too little changes nothing, too much breaks the model, and the tools
that make larger grids are no help. Everything follows from a seed. Half of the rules, by hash, are
in no text of pretraining, and the puzzles given out here have those.
"""
import hashlib
import random

import numpy as np

from data.arc import arc_task, describe  # noqa: F401 (the same statistics)
from support.files import UserError

# which seeds; hyper-parameters were chosen on 'tune'
SPLITS = {"train": (0, 200), "eval": (200, 300), "tune": (300, 400)}
ORACLE = dict(tools=[], completion_only=True, lr=0.01, epochs=8)    # the best on 'tune'


def held_out(rule):
    """Whether a rule is kept out of pretraining."""
    return hashlib.sha256(repr(sorted(rule.items())).encode()).digest()[0] % 2 == 0


def make_rule(rng, out, colours=5):
    """{colour: another}, a permutation, held `out` or not."""
    while True:
        palette = rng.sample(range(10), colours)
        rule = dict(zip(palette, rng.sample(palette, colours)))
        moves_all = all(a != b for a, b in rule.items())
        if held_out(rule) == out and moves_all:
            return rule


def make_puzzle(rule, rng, pairs=4, height=3, width=3):
    """Pairs of random grids, all by this rule. Every colour shows what becomes of it."""
    names = np.arange(10, dtype=np.int8)
    names[list(rule)] = list(rule.values())
    puzzle = []
    while len(puzzle) < pairs:
        rows = [rng.choices(list(rule), k=width) for _ in range(height)]
        grid = np.array(rows, dtype=np.int8)
        if set(rule) <= set(grid.flat):
            puzzle.append((grid, names[grid]))
    return puzzle


def load(split, **settings):
    """The puzzles of a split ('train', 'eval' or 'tune') as Tasks."""
    if split not in SPLITS:
        raise UserError(f"the tiny puzzles are {', '.join(SPLITS)}, not {split!r}; "
                        "for a source of puzzles: --preset arc")
    tasks = []
    for i in range(*SPLITS[split]):
        rng = random.Random(i)
        rule = make_rule(rng, out=True)
        *pairs, test = make_puzzle(rule, rng)
        name = " ".join(f"{a}>{b}" for a, b in rule.items())
        tasks.append(arc_task(name, pairs, [test], oracle=ORACLE, **settings))
    return tasks
