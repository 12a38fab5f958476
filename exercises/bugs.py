"""Eight silent bugs: each changes the project's behaviour, and nothing raises.

    python -m exercises.bugs 3 --run-dir runs/bug3      # outer_loop.py with bug 3

Find each from what a run prints and writes (metrics.jsonl, rollouts.jsonl), beside a run without
it. Do not read this file before: the functions are the answers. The folder
exercises/answers, which a teacher leaves out of students' copies, has them in words.

All patch a name where it is looked up, and put it back at the end of `with`.
"""
import copy
import sys
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch

import inner_loop
import outer_loop
from data import tinyworld
from data.judges import each
from lora import Adapters
from selfedit import SelfEdit

PADS = 64


@contextmanager
def pads_learned():
    """Every training document is filled up with EOS, and the fill is learned."""
    make_job = inner_loop.make_job

    def padded(model, tok, edit, seed, recipe):
        job = make_job(model, tok, edit, seed, recipe)
        examples = [(ids + [tok.eos] * PADS, learn + [True] * PADS) for ids, learn in job.examples]
        return replace(job, examples=examples)

    with patch.object(inner_loop, "make_job", padded):
        yield


@contextmanager
def eos_missing():
    """Kept self-edits are learned without the EOS that was sampled: the policy forgets to stop."""
    dialogue = outer_loop.dialogue

    def without_last(prompt, completion, completion_only=True, weight=True):
        return dialogue(prompt, completion[:-1], completion_only, weight)

    with patch.object(outer_loop, "dialogue", without_last):
        yield


@contextmanager
def merge_in_bfloat16():
    """The M-step's update is added in bfloat16, which has three digits."""
    def merge(self, i):
        for (A, B), layer in zip(self.pairs(self.flat[i:i + 1]), self.layers.values()):
            update = (self.scale * B[0] @ A[0]).bfloat16()
            layer.weight.copy_(layer.weight.bfloat16() + update)

    with patch.object(Adapters, "merge", torch.no_grad()(merge)):
        yield


@contextmanager
def stale_policy():
    """Self-edits are always sampled from the model that the run began with."""
    sample = outer_loop.sample
    first = []

    def stale(run, model, *args):
        if not first:
            first.append(copy.deepcopy(model))
        return sample(run, first[0], *args)

    with patch.object(outer_loop, "sample", stale):
        yield


@contextmanager
def question_leaked():
    """The document that every self-edit is trained with holds the test's questions and answers."""
    town_task = tinyworld.town_task

    def leaky(town, directives=False):
        task = town_task(town, directives)
        leaked = [f"{query} {answer}" for query, answer in zip(task.queries, task.answers)]

        def read(text):
            edit = task.read(text)
            return replace(edit, documents=edit.documents + leaked)

        references = {"passage only": SelfEdit(documents=[town.passage] + leaked)}
        return replace(task, read=read, references=references)

    with patch.object(tinyworld, "town_task", leaky):
        yield


@contextmanager
def ties_by_position():
    """Self-edits are ranked in the order in which they ended, so of equals the shortest is kept."""
    select = outer_loop.select

    def shortest_first(cfg, scores, edits, without, t):
        orders = [sorted(range(len(row)), key=lambda j: len(row[j].token_ids)) for row in edits]
        scores = [[row[j] for j in order] for row, order in zip(scores, orders)]
        edits = [[row[j] for j in order] for row, order in zip(edits, orders)]
        return [(i, orders[i][j]) for i, j in select(cfg, scores, edits, without, t)]

    with patch.object(outer_loop, "select", shortest_first):
        yield


@contextmanager
def wrong_scale():
    """An adapter's term is scaled by alpha, not by alpha / rank."""
    init = Adapters.__init__

    def scaled_by_alpha(self, model, lora, n):
        init(self, model, lora, n)
        self.scale = lora.alpha

    with patch.object(Adapters, "__init__", scaled_by_alpha):
        yield


@contextmanager
def hacked_judge():
    """An answer is right if it has a letter pair of the gold answer: almost any word will do."""
    def lenient(question, gold, prediction):
        pairs = {gold[k:k + 2].lower() for k in range(len(gold) - 1)}
        return any(pair in prediction.lower() for pair in pairs)

    # The tasks look the judge up when they are made.
    with patch.object(tinyworld, "exact_judge", each(lenient)):
        yield


# Students know the numbers only, so the numbers say nothing.
BUGS = {1: wrong_scale, 2: stale_policy, 3: hacked_judge, 4: pads_learned,
        5: ties_by_position, 6: question_leaked, 7: merge_in_bfloat16, 8: eos_missing}


def main():
    number = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if number not in map(str, BUGS):
        sys.exit("which bug? 1 to 8, then the flags of outer_loop.py")
    with BUGS[int(number)]():
        outer_loop.main()


if __name__ == "__main__":
    main()
