"""To learn on top of what was learned, and keep it. For lab/forgetting.py and lab/vector.py.

Three things, alone and together, may keep old towns of a stream known:

* a merge by half: W <- W + (alpha / 2 r) B A;
* adapters on the last layers only (arXiv 2605.07076);
* rehearsal: before it learns a town, the model writes what it remembers of a few earlier ones, and
  a self-edit of each. It is given their first words alone. Both are learned once more, beside the
  new self-edit, and count as much in the loss as that does.
"""
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import torch

from data import tinyworld
from engine.decode import Sampling, collect, in_groups, write
from engine.train import sft
from inner_loop import make_job
from lab.tiny import RECIPE, WRITING, or_passage
from lora import Adapters, Job, dialogue
from model import Transformer
from selfedit import SelfEdit, Task, read_self_edit, room_for_self_edit, sample_self_edits, seed_for
from support.tokenizer import Tokenizer

GRID = [1, .7, .5, .35, .25, 0]     # scales that a gate chooses among
FIRST_WORDS = 4                     # of a passage: what is kept of it


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
    generic = own_texts(stream.model, stream.tok, arm.generic, seed_for(stream.seed, k, "generic"))
    job = with_old(job, generic if arm.gate else old + generic)
    written = sum(sum(learn) for _, learn in (generic if arm.kept else old + generic))

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


# ------------------------------------------------------------------------------- adapters

def last_layers(adapters: Adapters, n: int) -> torch.Tensor:
    """(P,) bool: True at the parameters of the model's last n layers."""
    mask = torch.zeros_like(adapters.flat[:1], dtype=torch.bool)
    first = adapters.model.config.n_layer - n
    for name, (A, B) in zip(adapters.layers, adapters.pairs(mask)):
        number = int(name.split(".")[2])        # model.layers.3.self_attn.q_proj
        A[:] = B[:] = number >= first
    return mask[0]


def scaled(weights: torch.Tensor, scale: float) -> torch.Tensor:
    """An adapter of which B A is `scale` times as large."""
    return weights * scale ** .5


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


# ------------------------------------------------------------------------------- beside a new town

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
        old = recall(stream.model, stream.tok, towns, WRITING, seeds)
    examples = []
    for edit in old:
        examples += make_job(stream.model, stream.tok, edit, 0, RECIPE).examples
    return examples


def recall(model, tok, towns: list[Task], writing: Sampling, seeds: list[int]) -> list[SelfEdit]:
    """What the model remembers of towns: self-edits, each with the passage as it remembers it.

    Nothing is read of a town but the first words of its passage, and how it asks for a self-edit.
    So what the model has forgotten, or mixes up, is rehearsed as it is."""
    # The likeliest words, as temperature 0 takes them. There must be room to write about them.
    likeliest = Sampling(max_new=min(writing.max_new, model.config.max_len // 4))
    cues = [" ".join(town.context[0].split()[:FIRST_WORDS]) for town in towns]
    (replies,) = in_groups(write(model, tok, [cues], likeliest), [cues])
    # The same towns, with the passage in the prompt as the model remembers it.
    asked = []
    for town, cue, reply in zip(towns, cues, replies):
        passage = f"{cue} {reply.text}"
        prompt = town.prompt.replace(town.context[0], passage)
        asked.append(replace(town, prompt=prompt, context=[passage]))
    room = room_for_self_edit(model, tok, asked)
    writing = replace(writing, n=1, max_new=min(writing.max_new, room))
    prompts = [town.prompt for town in asked]
    (replies,) = in_groups(write(model, tok, [prompts], writing, seeds), [prompts])

    edits = []
    for town, remembered, reply in zip(towns, asked, replies):
        edit = read_self_edit(remembered, reply.text)
        # `read` adds the true passage, which the model is not to see again.
        pieces = [document for document in edit.documents if document not in town.context]
        edits.append(replace(edit, documents=pieces + remembered.context))
    return edits


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


def with_old(job: Job, old: list) -> Job:
    """The job with these examples beside its own, in as many steps, with as much weight in all."""
    own = sum(sum(learn) for _, learn in job.examples)
    weight = own / max(1, sum(sum(learn) for _, learn in old))
    examples = list(job.examples)
    for ids, learn in old:
        examples.append((ids, [weight * learned for learned in learn]))
    # Larger batches, so that there are as many steps.
    batches = math.ceil(len(job.examples) / job.recipe.batch)
    recipe = replace(job.recipe, batch=math.ceil(len(examples) / batches))
    return replace(job, examples=examples, recipe=recipe)
