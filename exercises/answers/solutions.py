"""Reference solutions. Where the project has the function, it is called, not copied.

    EXERCISES=solutions python -m pytest exercises/check.py
"""
import re
from types import SimpleNamespace

import numpy as np
import torch

import lora
import outer_loop
from data import tinyworld
from engine import decode, ribbon, train
from model import Linear
from selfedit import NOTES, SelfEdit, Task
from support import stats
from support.config import Config

# 1: a question has the direction of the test's question, so that both are asked for in both.
def notes(passage):
    town, facts = tinyworld.read_passage(passage)
    lines = []
    for name, value in facts.items():
        relation = tinyworld.RELATIONS[name]
        lines.append(relation.ask[0].format(t=town, v=value) + f" {value}.")
        for question in relation.ask_back[:1]:      # everyday facts have none
            lines.append(question.format(t=town, v=value) + f" {town}.")
    return "\n".join(lines)


# 2
def reinforce_loss(log_p, rewards):
    terms = []
    for row, own_rewards in zip(log_p, rewards):
        terms += [reward * tokens.sum() for tokens, reward in zip(row, own_rewards)]
    return -torch.stack(terms).mean()


def factor(lengths, rewards):
    # SFT divides by the number of kept tokens, Eq. 3 by the number of self-edits.
    return float((np.array(lengths) * np.array(rewards)).sum() / np.array(rewards).size)


# 3
def select(rewards, usable, without, how="best", keep=1, strict=False):
    edits = [[SelfEdit(documents=["text"] * good) for good in row] for row in usable]
    cfg = Config(update=how, keep=keep, strict=strict)
    return outer_loop.select(cfg, rewards, edits, without, t=0)


# 4
def adamw(p, g, m, v, lr, t, clip, weight_decay):
    p, g, m, v = (x.clone() for x in (p, g, m, v))
    train.adamw_(p, g, m, v, lr, t, p, clip, weight_decay)
    return p, m, v


# 5
def loss_and_gradient(h, W, labels):
    return train.nll_and_gradient(h, W, labels[:, None], h.dtype)


# 6
def lay_out(slots):
    running = []
    for texts in slots:
        examples = [ribbon.Example.of(ids, learn) for ids, learn in texts]
        # A slot's only micro-batch is all of its texts.
        batches = iter([range(len(examples))])
        running.append(SimpleNamespace(examples=examples, batches=batches) if texts else None)
    step = ribbon.pack(running, torch.device("cpu"), torch.float64)
    parts = (step.ribbon.position, step.source, step.labels, step.weight)
    return tuple(part.tolist() for part in parts)


# 7
def m_step_example(prompt, edit):
    return lora.dialogue(prompt, edit, completion_only=True)


# 8: `python -m lab.reliability` reports the same.
def luck(accuracy):
    noise, true, chosen, held_out = [], [], [], []
    for rewards in accuracy:
        mean = rewards.mean(axis=1)
        noise.append(rewards.var(axis=1, ddof=1).mean())
        true.append(mean.var(ddof=1) - noise[-1] / rewards.shape[1])
        chosen.append(mean.max())
        for seed in range(rewards.shape[1]):
            others = np.delete(rewards, seed, axis=1).mean(axis=1)
            held_out.append(rewards[others.argmax(), seed])
    return (np.mean(noise) ** 0.5, max(0.0, np.mean(true)) ** 0.5, np.mean(chosen),
            np.mean(held_out))


# 9
def low_rank(x, A, B, scale, counts):
    segments = lora.Segments(counts, x.device)
    term = ribbon.LowRank(A, B, scale, segments, grouped=False)
    return term(x, x.new_zeros(len(x), B.shape[1]))


def merge(W, A, B, scale):
    # Adapters merges into a model: here into one of a single layer.
    layer = Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype).requires_grad_(False)
    layer.weight.copy_(W)
    model = torch.nn.ModuleDict({"q_proj": layer})
    model.device, model.dtype = W.device, W.dtype
    shape = lora.Lora(rank=len(A), alpha=scale * len(A), targets=["q_proj"])
    row = torch.cat([A.flatten(), B.flatten()])
    lora.Adapters.stack(model, shape, [row]).merge(0)
    return layer.weight


# 10
def sample(logits, temperature, top_p, u):
    return decode.sample(logits, temperature, top_p, u)


# 11: the project has no such domain.
def operator_task(name, shown, asked):
    lines = [f"{a} # {b} = {c}" for a, b, c in shown]
    queries = [f"{a} # {b} =" for a, b, _ in asked]
    known = {(a, b) for a, b, _ in shown}

    def read(text):
        equations = [line for line in text.splitlines() if re.fullmatch(r"\d # \d = \d", line)]
        if not equations:
            raise ValueError("no equation in this self-edit")
        return SelfEdit(documents=equations + lines)

    context = "\n".join(lines)
    return Task(
        name=name, prompt=NOTES.format(context=context), context=[context],
        questions=queries, queries=queries, answers=[str(c) for _, _, c in asked],
        judge=tinyworld.exact_judge, read=read,
        kinds=["seen" if (a, b) in known else "unseen" for a, b, _ in asked])


# 12
def forgetting(accuracy):
    found = stats.forgetting(accuracy)
    names = ("gain just after its own edit", "what is left of it after the last edit",
             "forgotten since its own edit")
    return tuple(found[name][0] for name in names)     # (mean, standard error over streams)
