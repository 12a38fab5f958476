"""A stream of towns, and what may keep old ones known. For lab/forgetting.py and lab/skill.py.

See remember.py, too.
"""
import random
from dataclasses import dataclass, replace

import numpy as np

from data import tinyworld
from engine.decode import collect
from engine.train import sft
from inner_loop import make_job
from lab.remember import last_layers, recall, scaled, with_old
from lab.tiny import RECIPE, WRITING, or_passage
from lora import Adapters, Job, dialogue
from model import Transformer
from selfedit import SelfEdit, Task, sample_self_edits, seed_for
from support.tokenizer import Tokenizer

GRID = [1, .7, .5, .35, .25, 0]     # scales that a gate chooses among


@dataclass
class Stream:
    """Towns that a model learns one after the other, each by its self-edit."""
    model: Transformer
    tok: Tokenizer
    towns: list[Task]
    edits: list[SelfEdit]
    seed: int


@dataclass
class Arm:
    """How a town is learned on top of the others."""
    scale: float = 1.0      # W <- W + scale (alpha / r) B A
    layers: int = 4         # adapters on the last ones only
    replay: int = 0         # earlier towns to rehearse beside the new one
    kept: bool = False      # rehearse their self-edits as they were; else what the model remembers
    generic: int = 0        # self-edits of other towns, by the model as it is: KL to that model
    gate: bool = False      # choose the scale by the loss; what is recalled is then not learned
    lr: float = RECIPE.lr


GENTLE = Arm(scale=.5, layers=2)    # half of each merge, on half of the layers


def write_all(model, tok, towns, seed: int) -> list[SelfEdit]:
    """A self-edit of each town."""
    seeds = [[seed_for(seed, i, "edit")] for i in range(len(towns))]
    return [edit for (edit,) in collect(sample_self_edits(model, tok, towns, WRITING, seeds))]


def learn_town(stream: Stream, arm: Arm, k: int) -> dict[str, float]:
    """Train the stream's model on town k, and merge that: by which scale, and what it cost in
    tokens."""
    # As it is learned, so it is rehearsed.
    stream.edits[k] = or_passage(stream.towns[k], stream.edits[k])
    # The new self-edit, and beside it what is to keep the old ones.
    recipe = replace(RECIPE, lr=arm.lr)
    seed = seed_for(stream.seed, k, "adapter")
    job = make_job(stream.model, stream.tok, stream.edits[k], seed, recipe)
    old = rehearsal(stream, arm, k)
    generic = own_texts(stream.model, stream.tok, arm.generic,
                        seed_for(stream.seed, k, "generic"))
    job = with_old(job, generic if arm.gate else old + generic)
    written = 0
    for _, learn in generic if arm.kept else old + generic:
        written += sum(learn)

    # Adapters on the last layers: the others' gradients are zero, and so their B stays zero.
    adapter = Adapters(stream.model, recipe.lora, 1)
    adapter.init(0, job.seed)
    job = replace(job, start=adapter.flat[0], free=last_layers(adapter, arm.layers))
    ((_, trained),) = sft(stream.model, [job])
    scale = best_scale(stream.model, job, trained.weights, old) if arm.gate else arm.scale
    if not trained.diverged:
        adapter.flat[0] = scaled(trained.weights, scale)
        adapter.merge(0)
    return {"scale": scale, "trained": job.tokens, "written": written}


def rehearsal(stream: Stream, arm: Arm, k: int) -> list:
    """Examples: self-edits of towns before the k-th, as they were or as the model remembers them.
    """
    # All arms rehearse the same towns.
    draw = random.Random(seed_for(stream.seed, k, "earlier"))
    chosen = draw.sample(range(k), min(k, arm.replay))
    old = [stream.edits[i] for i in chosen]
    if chosen and not arm.kept:
        towns = [stream.towns[i] for i in chosen]
        seeds = [seed_for(stream.seed, k, i, "recall") for i in chosen]
        (old,) = recall(stream.model, stream.tok, [towns], WRITING, seeds)
    examples = []
    for edit in old:
        examples += make_job(stream.model, stream.tok, edit, 0, RECIPE).examples
    return examples


def own_texts(model, tok, n: int, seed: int) -> list:
    """Examples: self-edits of n training towns, as the model writes them now, after the passage.

    The loss on a sample of the old model is, in the mean, KL(old || new) and a constant."""
    towns = random.Random(seed).sample(tinyworld.load("train"), n)
    seeds = [[seed_for(seed, i)] for i in range(n)]
    # Samples of the model's own distribution, which neither temperature nor a nucleus changes.
    as_it_is = replace(WRITING, temperature=1, top_p=1)
    examples = []
    for town, (edit,) in zip(towns, collect(sample_self_edits(model, tok, towns, as_it_is, seeds))):
        examples.append(dialogue(tok.prompt(town.prompt), edit.token_ids))
    return examples


def best_scale(model, job: Job, weights, old: list) -> float:
    """The scale with the least loss on the new documents and on what was recalled, each a mean."""
    # A step with learning rate 0 changes nothing, and says the loss before it.
    still = replace(job.recipe, lr=0, epochs=1, batch=10 ** 6)
    totals = np.zeros(len(GRID))
    # The first towns have nothing old beside them.
    for examples in filter(None, (job.examples, old)):
        tried = replace(job, examples=examples, recipe=still)
        jobs = [replace(tried, start=scaled(weights, scale)) for scale in GRID]
        for i, outcome in sft(model, jobs):
            totals[i] += outcome.losses[0]
    return GRID[int(np.argmin(totals))]
