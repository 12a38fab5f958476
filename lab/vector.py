"""A skill as a vector: can what RL changed be added to a model that was not there?

    python -m lab.vector RUN_DIR [RUN_DIR ...] --out FILE.jsonl

v = theta_3 - theta_0 of a finished run is what three M-steps merged into the weights. PaST (arXiv
2601.11258) adds such a difference to models that have learned facts by other means. An arm is a
model, which writes and learns. 2 minutes a seed for all arms.
"""
import itertools
import random
from functools import lru_cache

import numpy as np
import torch

from data import tinyworld
from engine.decode import collect
from engine.train import sft
from inner_loop import make_job
from lab.experiment import Question, of_seeds, over_seeds, print_table
from lab.forgetting import GENTLE, Stream, learn_town
from lab.tiny import RECIPE, load, or_passage, score, verdicts, write_all
from lora import Adapters
from selfedit import Task, seed_for
from support.files import cli

SCALES = (0, .5, 1, 1.5, 2, 3)
MEAN, STREAM, THEN = "mean of the runs' v", "a stream of towns", "a stream of towns, then v"
# arm -> the scale of v
ARMS = {f"{scale:g} v": scale for scale in SCALES} | {MEAN: 1, STREAM: 0, THEN: 1}
LENGTH, N_TOWNS = 32, 24            # towns that are learned before, and towns to write about


def difference(after, before) -> dict[str, torch.Tensor]:
    """{name: change} of the weights that two models do not share."""
    found = {}
    for (name, new), old in zip(after.named_parameters(), before.parameters()):
        if not torch.equal(new, old):
            found[name] = new.detach() - old.detach()
    return found


@torch.no_grad()
def add(model, v, scale: float):
    """theta <- theta + scale v"""
    for name, change in v.items():
        model.get_parameter(name).add_(scale * change)


def cosine(v, w) -> float:
    """Between two changes of a model. Weights that one of them leaves alone are 0 in it."""
    product = sum((v[name] * w[name]).sum() for name in v.keys() & w.keys())
    lengths = [sum((change ** 2).sum() for change in x.values()).sqrt() for x in (v, w)]
    return (product / lengths[0] / lengths[1]).item()


def towns_of(seed: int) -> tuple[list[Task], list[Task]]:
    """(towns to write about, towns that are learned before)."""
    towns = tinyworld.load("eval")
    random.Random(seed_for(seed, "vector")).shuffle(towns)
    return towns[:N_TOWNS], towns[N_TOWNS:N_TOWNS + LENGTH]


@lru_cache(maxsize=1)       # the arms of a seed follow one another, and share them
def adapters_of(seed: int) -> list[torch.Tensor]:
    """The weights (P,) of an adapter for each old town, by theta_0 and its own self-edit."""
    model, tok = load(0)
    _, towns = towns_of(seed)
    jobs = []
    for i, (town, edit) in enumerate(zip(towns, write_all(model, tok, towns, seed))):
        jobs.append(make_job(model, tok, or_passage(town, edit), seed_for(seed, i), RECIPE))
    return [one.weights for one in collect(sft(model, jobs))]


def cosines(vectors: dict, seed: int, base, rows) -> dict[str, float]:
    """How alike a run's v is to those of others, and to what the inner loop changes for a town."""
    changes = []
    for row in rows:
        model, _ = load(0)
        Adapters.stack(model, RECIPE.lora, [row]).merge(0)
        changes.append(difference(model, base))
    v = vectors[seed]
    found = {"v of two runs": [cosine(v, w) for s, w in vectors.items() if s != seed],
             "v and a town": [cosine(v, change) for change in changes],
             "two towns": [cosine(*pair) for pair in itertools.combinations(changes, 2)]}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def measure(arm: str, seed: int, folders: dict) -> dict:
    """A line: the reward of an arm's own self-edits, and what it knows of towns learned before."""
    base, tok = load(0)
    model, _ = load(0)
    new, old = towns_of(seed)
    vectors = {s: difference(load(3, folder)[0], base) for s, folder in folders.items()}

    # The old towns are learned first: one on top of the other, or each as an adapter of theta_0,
    # which is then asked on the arm's model.
    rows = []
    if arm in (STREAM, THEN):
        stream = Stream(model, tok, old, write_all(base, tok, old, seed), seed)
        for k in range(len(old)):
            learn_town(stream, GENTLE, k)
    else:
        rows = adapters_of(seed)
    if arm == MEAN:
        for v in vectors.values():
            add(model, v, 1 / len(vectors))
    else:
        add(model, vectors[seed], ARMS[arm])

    known = verdicts(model, tok, old, rows)
    edits = write_all(model, tok, new, seed)
    found = {"reward": float(np.mean(score(model, tok, new, edits, seed))),
             "known": float(np.mean(known))}
    if arm == "1 v":
        found["cosines"] = cosines(vectors, seed, base, rows[:8])
    return found


def show(arms: dict[str, list[dict]]):
    """Rewards and what is known, with intervals over seeds; cosines."""
    rows = []
    for arm, lines in arms.items():
        rows.append([arm, *over_seeds([[line["reward"], line["known"]] for line in lines])])
    print_table(["theta_0 and", "reward of its self-edits", "known of 32 towns"], rows)
    found = [line["cosines"] for line in arms.get("1 v", [])]
    rows = [[name, of_seeds([one[name] for one in found])] for name in found[0]] if found else []
    print_table(["between", "cosine"], rows, "Directions in weight space")


def main():
    Question(ARMS, measure, show, None, of_runs=True).ask(__doc__)


if __name__ == "__main__":
    cli(main)
