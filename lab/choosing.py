"""Half of the reward's cost: what are the self-edits worth that cheaper rewards choose?

    python -m lab.choosing --out FILE.jsonl [--released PASSAGES.json]

Self-edits of the untrained model, each tried with six seeds, and with half of the steps. What are
the two best of a town worth, by seeds that did not choose them? The rules are those of
lab/choosing.py. 5 minutes per seed of the world, on one thread.

--released: the authors' verdicts, shared with SEAL's code: a list of passages with
"released_edits", each with "adapter_mean" and "adapter_std" of three seeds.
"""
import itertools
import math
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from inner_loop import update_and_score
from lab.experiment import add_seeds, complete, flags, where
from lab.show import over_passages, print_table
from lab.tiny import SETTINGS
from outer_loop import in_order, next_tasks, sample
from selfedit import seed_for
from support.config import Config
from support.files import cli, read_json
from support.progress import Meter
from support.run import Run

SEEDS = 6       # three to choose by, three to judge by


# ------------------------------------------------------------------------------- successive halving

# Successive halving (arXiv 1502.07943): further inner loops go to the contenders alone. A race
# gives one inner loop to every self-edit of a task, and the others to the best of them. Or the
# first one takes half of the training steps. Or what is saved goes to more self-edits. The cost
# is in inner loops; half of the steps are half a loop.

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


# --------------------------------------------------------------------------- what a choice is worth

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


def written(seed: int) -> tuple:
    """(run, model, tasks, edits): what the untrained model writes of the first round's tasks, with
    twice the usual K self-edits of each."""
    # Of the run's folder nothing is kept.
    with tempfile.TemporaryDirectory() as folder:
        run, train = start(seed, folder, times=2)
        tasks, model = next_tasks(train, 0, run.cfg.tasks), run.load(0)
        return run, model, tasks, sample(run, model, tasks, 0, "train", run.cfg.edits)


def try_often(seed: int) -> dict:
    """A line: accuracies (tasks, K, seeds) of the untrained model's self-edits."""
    run, model, tasks, edits = written(seed)
    run_rung = trainer(run, model, tasks, edits, 0)
    pairs = list(itertools.product(range(run.cfg.tasks), range(run.cfg.edits)))
    found = {}
    for name, rung in (("whole", Rung(1, SEEDS)), ("half", Rung(1, 1, 1 / 2))):
        accuracies = np.reshape(run_rung(pairs, rung, 0), (len(tasks), run.cfg.edits, -1))
        found[name] = accuracies.round(4).tolist()
    return found


def show(title: str, tried: Tried, k: int, names, against: str):
    """What the choice of each rule is worth, with intervals over tasks. k: the usual K."""
    values, loops = {}, {}
    for name in names:
        times, rungs = RULES[name]
        values[name], loops[name] = worth(rungs, tried.first(times * k))
    rows = [["any", 0, f"{tried.whole.mean():.3f}", ""]]
    for name, value in values.items():
        # Task by task.
        more = over_passages(value - values[against], "+.3f")
        rows.append([name, f"{loops[name]:.1f}", f"{value.mean():.3f}", more])
    print_table(["rule", "inner loops per task", "worth of the chosen", f"against {against}"],
                rows, title)


def main():
    ap = flags(__doc__)
    add_seeds(ap)
    ap.add_argument("--released", metavar="FILE", help="passages with the authors' verdicts")
    args = ap.parse_args()
    wanted = [{"part": "choosing", "seed": seed} for seed in args.seeds]
    records = complete(ap, args, wanted, lambda line: try_often(line["seed"]))
    if args.released:
        whole = released(args.released)
        # Half of the steps were never tried.
        authors = Tried(whole, half=whole[:, :, :0], keep=1, judges=1)
        show(f"the authors' {len(whole)} passages, the best self-edit", authors, whole.shape[1],
             ("one seed", "two seeds", "one, one more for 1/2"), against="two seeds")
    lines = where(records, part="choosing")
    whole, half = [np.concatenate([line[name] for line in lines]) for name in ("whole", "half")]
    # There are twice the usual K self-edits.
    show(f"{len(whole)} towns, the two best self-edits", Tried(whole, half, keep=2, judges=3),
         whole.shape[1] // 2, RULES, against="three seeds")


if __name__ == "__main__":
    cli(main)
