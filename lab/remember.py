"""To learn on top of what was learned, and keep it: `python eval.py continual --remember`.

Three things, which lab/forgetting.py compares, alone and together:

* a merge by half: W <- W + (alpha / 2 r) B A;
* adapters on the last layers only (arXiv 2605.07076);
* rehearsal: before it learns a passage, the model writes what it remembers of a few earlier ones,
  and a self-edit of each. It is given their first words alone. Both are learned once more, beside
  the new self-edit, and count as much in the loss as that does.
"""
import math
import re
from dataclasses import replace
from itertools import chain

import torch

from engine.decode import Sampling, write
from lora import Adapters, Job
from selfedit import SelfEdit, Task, read_self_edit, room_for_self_edit
from support.files import UserError

SCALE = .5          # of a merge
EARLIER = 8         # passages to rehearse, at most
FIRST_WORDS = 4     # of a passage: what is kept of it


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
        raise UserError("--remember: a prompt must have the title and the passage in it once, one "
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
