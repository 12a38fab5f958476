"""To learn on top of what was learned, and keep it. For lab/forgetting.py, skill.py and vector.py.

Three things, alone and together, may keep old towns of a stream known:

* a merge by half: W <- W + (alpha / 2 r) B A;
* adapters on the last layers only (arXiv 2605.07076);
* rehearsal: before it learns a passage, the model writes what it remembers of a few earlier ones,
  and a self-edit of each. It is given their first words alone. Both are learned once more, beside
  the new self-edit, and count as much in the loss as that does.
"""
import math
import random
import re
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from data import tinyworld
from engine.decode import Sampling, collect, write
from engine.train import sft
from inner_loop import make_job
from lab.tiny import RECIPE, WRITING, or_passage
from lora import Adapters, Job, dialogue
from model import Transformer
from selfedit import SelfEdit, Task, read_self_edit, room_for_self_edit, sample_self_edits, seed_for
from support.files import UserError
from support.tokenizer import Tokenizer

GRID = [1, .7, .5, .35, .25, 0]     # scales that a gate chooses among
FIRST_WORDS = 4                     # of a passage: what is kept of it


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


# ------------------------------------------------------------------------------- rehearsal

def recall(model, tok, groups: list[list[Task]], writing: Sampling, seeds: list[int],
           adapters=None) -> list[list[SelfEdit]]:
    """What the model remembers of passages: self-edits, each with the passage as it remembers it.
    With `adapters`, group i is written under adapter i. seeds: one per passage.

    Nothing is read of a task but the first words of its passage, and how it asks for a self-edit.
    So what the model has forgotten, or mixes up, is rehearsed as it is."""
    cues = [[first_words(task) for task in tasks] for tasks in groups]
    # The likeliest words, as temperature 0 takes them. There must be room to write about them.
    likeliest = Sampling(max_new=min(writing.max_new, model.config.max_len // 4))
    replies = write(model, tok, cues, likeliest, adapters=adapters)

    # The same tasks, with the passage in the prompt as the model remembers it.
    asked = []
    for tasks, own_cues, own_replies in zip(groups, cues, replies):
        asked.append([])
        for task, cue, reply in zip(tasks, own_cues, own_replies):
            passage = f"{cue} {reply.text}"
            prompt = task.prompt.replace(task.context[0], passage)
            asked[-1].append(replace(task, prompt=prompt, context=[passage]))
    room = room_for_self_edit(model, tok, list(chain.from_iterable(asked)))
    writing = replace(writing, n=1, max_new=min(writing.max_new, room))
    prompts = [[task.prompt for task in tasks] for tasks in asked]
    replies = write(model, tok, prompts, writing, seeds, adapters)

    edits = []
    for tasks, own_asked, own_replies in zip(groups, asked, replies):
        edits.append([])
        for task, remembered, reply in zip(tasks, own_asked, own_replies):
            edit = read_self_edit(remembered, reply.text)
            # `read` adds the true passage, which the model is not to see again.
            pieces = [document for document in edit.documents if document not in task.context]
            edits[-1].append(replace(edit, documents=pieces + remembered.context))
    return edits


def first_words(task: Task) -> str:
    """How a task's passage begins. UserError if that can't be taken out of its prompt."""
    if task.prompt.count(task.context[0]) != 1:
        raise UserError("a prompt must have the title and the passage in it once, one "
                        "after the other, so that what the model remembers can take their place")
    return re.match(r"\s*" + r"\S+\s+" * (FIRST_WORDS - 1) + r"\S+|.*", task.context[0])[0]


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


# ------------------------------------------------------------------------------- a stream

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
