"""What a choice among self-edits is worth, by seeds of the inner loop that did not choose. For
lab/choosing.py."""
import itertools
from dataclasses import dataclass, replace

import numpy as np

from lab.halving import Rung, race
from selfedit import seed_for
from support.files import read_json


def released(file) -> np.ndarray:
    """(passages, K, 3): the accuracies of the authors' three seeds, from mean and deviation."""
    found = []
    for record in read_json(file):
        # All accuracies that three seeds can have on n questions.
        n = len(record["questions"])
        possible = np.array(list(itertools.combinations_with_replacement(range(n + 1), 3))) / n
        means, deviations = possible.mean(axis=1), possible.std(axis=1, ddof=1)
        rows = []
        for edit in record["released_edits"]:
            miss = abs(means - edit["adapter_mean"]) + abs(deviations - edit["adapter_std"])
            rows.append(possible[miss.argmin()])
        found.append(rows)
    return np.array(found)


@dataclass
class Tried:
    """Self-edits that were tried with many seeds, and how a choice among them is judged."""
    whole: np.ndarray   # (tasks, K, seeds): accuracies
    half: np.ndarray    # (tasks, K, seeds): the same after half of the training steps
    keep: int           # self-edits of a task that are chosen
    judges: int         # seeds that judge the choice, and do not choose

    def first(self, k: int) -> "Tried":
        """With k self-edits of each task alone."""
        return replace(self, whole=self.whole[:, :k], half=self.half[:, :k])


def worth(rungs: list[Rung], tried: Tried, draws=100) -> tuple[np.ndarray, float]:
    """(what the chosen are worth (tasks,), by seeds that did not choose; inner loops per task)."""
    n, k, seeds = tried.whole.shape
    rng, values = np.random.default_rng(seed_for("race") % 2 ** 32), np.zeros(n)
    for _ in range(draws):
        # Which seed comes first is by chance, for each self-edit anew. The last ones judge.
        mixed = rng.permuted(tried.whole, axis=2)

        def run_rung(pairs, rung, first):
            known = mixed if rung.steps == 1 else tried.half
            return [known[i, j, first:first + rung.seeds].tolist() for i, j in pairs]

        scores, loops = race(rungs, n, k, run_rung)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, :tried.keep]
        judged = mixed[:, :, seeds - tried.judges:].mean(axis=2)
        values += np.take_along_axis(judged, chosen, axis=1).mean(axis=1)
    return values / draws, loops / n
