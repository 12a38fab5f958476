"""What training changed of a model, as vectors in weight space. For lab/vector.py."""
import itertools
import random
from functools import lru_cache

import numpy as np
import torch

from data import tinyworld
from engine.train import sft
from inner_loop import make_job
from lab.keeping import write_all
from lab.tiny import RECIPE, load, or_passage
from lora import Adapters
from selfedit import Task, seed_for

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
    trained = dict(sft(model, jobs))
    return [trained[i].weights for i in range(len(jobs))]


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
