"""The tiny world for the exercises: the embedded model, and rewards with the preset's settings."""
import importlib
import os
from functools import cache

import torch

from data import tinyworld
from inner_loop import answering, inner_recipe, update_and_score
from model import load_pretrained
from selfedit import read_self_edit
from support.checkpoint import EMBEDDED
from support.config import PRESETS, Config
from support.tokenizer import Tokenizer

CONFIG = Config(**PRESETS["tiny"])
RECIPE = inner_recipe(CONFIG)
ANSWERING = answering(CONFIG)


def answers_of(module):
    """The module with a student's functions; EXERCISES=solutions: the one with the project's."""
    if os.environ.get("EXERCISES") == "solutions":
        module = "answers.solutions"
    return importlib.import_module(f"exercises.{module}")


@cache
def load(dtype=torch.float32):
    """(model, tokenizer). The model is frozen, and nobody may change it."""
    return load_pretrained(EMBEDDED, "cpu", dtype), Tokenizer.from_pretrained(EMBEDDED)


def towns(n, split="tune"):
    """The first n towns of a split, as Tasks. Settings were chosen on 'tune', nothing reported."""
    return tinyworld.load(split)[:n]


def outcomes_of(tasks, texts, recipe=RECIPE):
    """The inner loop: what each text is worth as a self-edit of the task beside it."""
    model, tok = load()
    edits = [read_self_edit(task, text) for task, text in zip(tasks, texts)]
    seeds = [[i] for i in range(len(tasks))]
    found = dict(update_and_score(model, tok, tasks, edits, seeds, recipe, ANSWERING))
    return [found[i] for i in range(len(tasks))]


def accuracy(tasks, outcomes, kind=None):
    """The share of right answers, of one kind of question or of all."""
    right = []
    for task, outcome in zip(tasks, outcomes):
        for verdicts in outcome.right:
            right += [r for r, k in zip(verdicts, task.kinds) if kind in (None, k)]
    return sum(right) / len(right)
