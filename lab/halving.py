"""Successive halving (arXiv 1502.07943): further inner loops go to the contenders alone.

A reward is the mean of three inner loops, each with a seed of its own. A race gives one to every
self-edit of a task, and the others to the best of them. Or the first one takes half of the training
steps. Or what is saved goes to more self-edits. The cost is in inner loops; half of the steps are
half a loop. For lab/choosing.py and lab/race.py.
"""
import math
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from inner_loop import update_and_score
from lab.tiny import SETTINGS
from outer_loop import in_order
from selfedit import seed_for
from support.config import Config
from support.progress import Meter
from support.run import Run


@dataclass
class Rung:
    """A stage of a race."""
    share: float        # of a task's self-edits that are still in it
    seeds: int          # further inner loops of each of these
    steps: float = 1    # of an inner loop's training steps, the share that is taken


# name -> (self-edits, as a multiple of the usual K; the stages)
RULES = {
    "one seed": (1, [Rung(1, 1)]),
    "two seeds": (1, [Rung(1, 2)]),
    "three seeds": (1, [Rung(1, 3)]),
    "one, two more for 3/8": (1, [Rung(1, 1), Rung(3 / 8, 2)]),
    "one, one more for 1/2": (1, [Rung(1, 1), Rung(1 / 2, 1)]),
    "half the steps": (1, [Rung(1, 1, 1 / 2)]),
    "half the steps, one seed for 1/2": (1, [Rung(1, 1, 1 / 2), Rung(1 / 2, 1)]),
    "twice the self-edits, one seed": (2, [Rung(1, 1)]),
    "twice the self-edits, half the steps": (2, [Rung(1, 1, 1 / 2)]),
    "twice the self-edits, half the steps, one seed for 1/4":
        (2, [Rung(1, 1, 1 / 2), Rung(1 / 4, 1)]),
}


def race(rungs: list[Rung], n_tasks: int, k: int, run_rung) -> tuple[np.ndarray, float]:
    """(scores (n_tasks, k), inner loops taken). Whoever drops out is scored below all others.

    run_rung((task, self-edit)s, rung, seeds so far) -> for each of them a list of accuracies."""
    scores, found = np.zeros((n_tasks, k)), defaultdict(list)
    left = {i: list(range(k)) for i in range(n_tasks)}
    tried, steps, loops = 0, 0, 0.0
    for rung in rungs:
        pairs = []
        for i in left:
            # Sorting is stable: of equals the first goes on.
            ranked = sorted(left[i], key=lambda j: -scores[i, j])
            left[i] = sorted(ranked[:math.ceil(rung.share * k)])
            # An accuracy is at most 1, so that all others are now below them.
            scores[i] -= 1
            scores[i, left[i]] += 1
            pairs += [(i, j) for j in left[i]]
        # What was measured after fewer steps decides who goes on, and is then forgotten.
        if rung.steps > steps:
            found.clear()
        for pair, accuracies in zip(pairs, run_rung(pairs, rung, tried)):
            found[pair] += accuracies
            scores[pair] = np.mean(found[pair])
        tried, steps = tried + rung.seeds, rung.steps
        loops += len(pairs) * rung.seeds * rung.steps
    return scores, loops


def start(seed: int, folder, times=1):
    """A run of the tiny preset with so many times its self-edits, and its training towns in order.
    """
    run = Run(Config(**SETTINGS | {"seed": seed, "baselines": False, "run_dir": folder,
                                   "edits": times * SETTINGS["edits"]}))
    return run, in_order(run.tasks(run.cfg.train_data), seed)


def trainer(run: Run, model, tasks, edits, t: int):
    """run_rung for `race`: inner loops, with the seeds that outer_loop.score would use."""
    def run_rung(pairs, rung, first):
        recipe = replace(run.recipe, epochs=round(run.recipe.epochs * rung.steps))
        asked, learned, seeds = [], [], []
        for i, j in pairs:
            asked.append(tasks[i])
            learned.append(edits[i][j])
            seeds.append([seed_for(run.cfg.seed, t, "train", i, j, s, "adapter")
                          for s in range(first, first + rung.seeds)])
        outcomes = dict(update_and_score(model, run.tok, asked, learned, seeds, recipe,
                                         run.answering, Meter("optimiser steps")))
        # Nothing to learn from is no accuracy, and a reward of 0.
        return [outcomes[n].accuracy or [0.0] * rung.seeds for n in range(len(pairs))]
    return run_rung
