"""A reward for one backward pass: can a self-edit be judged without an inner loop?

    python -m lab.proxy --out FILE.jsonl [--svg FILE]

SEAL's reward costs ten optimiser steps and the answers to all questions. Do cheaper
scores choose as well? The judges are the six inner loops that lab/choosing.py gives to each
of 16 self-edits of a town, by the untrained model. If its lines are in --out, they are not measured
again, which spares 5 of the 7 minutes per seed, on one thread.
"""
from dataclasses import replace

import numpy as np
import torch

from inner_loop import make_job
from lab.choosing import try_often, written
from lab.credit import truth
from lab.experiment import complete, each, flags, where
from lab.show import new_figure, over_passages, print_table, save
from lab.tiny import RECIPE
from lab.update_rule import log_probs
from lora import Adapters, dialogue, sft_one
from selfedit import seed_for
from support.files import cli
from support.stats import bootstrap_ci

# --------------------------------------------------------------------- scores without an inner loop

# To first order, a small step down the gradient g of a self-edit's loss changes the loss L of the
# gold answers by
#
#     L(theta - eps g) - L(theta) = -eps <g, grad L>
#
# so the product of two gradients at theta may rank self-edits, as TracIn (arXiv 2002.08484) and
# LESS (2402.04333) rank training examples by it.

# score -> its cost per self-edit, in passes. A backward pass includes its forward pass.
SCORES = {"number of tokens": "none",
          "answers that its lines state": "the world's truth",
          "answers, notes in the prompt": "1 forward",
          "inner product of gradients": "1 backward",
          "answers after one step": "1 backward, 1 forward"}
LAST = -1e6     # of a self-edit from which nothing can be learned


def gold(tok, task, before="") -> list:
    """Examples (ids, learn) in which the gold answers alone are learned. before: read first."""
    examples = []
    for query, answer in zip(task.queries, task.answers):
        examples.append(dialogue(tok.prompt(before + query), tok.encode(" " + answer)))
    return examples


def loss(model, adapter, examples) -> torch.Tensor:
    """The mean over all tokens that are learned, as in lora.sft_one: a scalar."""
    return -torch.cat([log_probs(model, adapter, example) for example in examples]).mean()


def gradient(model, untrained, examples) -> torch.Tensor:
    """Of the loss, with regard to the weights of all adapted layers: one vector."""
    # Not with regard to an adapter's. Its B is zero at first, so that A has no gradient, and the
    # one of B is this one times a random A, which adds noise.
    weights = [layer.weight.requires_grad_() for layer in untrained.layers.values()]
    parts = torch.autograd.grad(loss(model, untrained, examples), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return torch.cat([part.flatten().float() for part in parts])


def products(model, tok, task, edits, recipe=RECIPE) -> list[tuple[float, float]]:
    """<g, grad L> of each self-edit, and the same as a cosine, in which the size of g does not
    count. LAST if nothing can be learned from it."""
    # An adapter of zeros changes nothing.
    untrained = Adapters(model, recipe.lora, 1)
    wanted = gradient(model, untrained, gold(tok, task))
    found = []
    for edit in edits:
        try:
            examples = make_job(model, tok, edit, 0, recipe).examples
        except ValueError:
            found.append((LAST, LAST))
            continue
        own = gradient(model, untrained, examples)
        product = (own @ wanted).item()
        found.append((product, product / (own.norm() * wanted.norm()).item()))
    return found


def score(model, tok, task, edits, seeds) -> list[dict[str, float]]:
    """{score: its value, the higher the better} of each self-edit. seeds: of the adapters."""
    untrained = Adapters(model, RECIPE.lora, 1)
    answers = gold(tok, task)
    # An epoch is one step here, as all documents are in one batch.
    one_step = replace(RECIPE, epochs=1)
    found = []
    for edit, seed, (product, _) in zip(edits, seeds, products(model, tok, task, edits)):
        try:
            job = make_job(model, tok, edit, seed, one_step)
        except ValueError:
            found.append(dict.fromkeys(SCORES, LAST))
            continue
        adapter = Adapters.stack(model, RECIPE.lora, [sft_one(model, job)])
        with torch.no_grad():
            after = loss(model, adapter, answers)
            # Without the passage, which is a document of every self-edit and has all answers.
            in_prompt = loss(model, untrained, gold(tok, task, edit.text + "\n\n"))
        found.append({"number of tokens": job.tokens,
                      "answers that its lines state": int(truth(task, edit).any(axis=0).sum()),
                      "answers, notes in the prompt": -in_prompt.item(),
                      "inner product of gradients": product,
                      "answers after one step": -after.item()})
    return found


# --------------------------------------------------------------------------- how well scores choose

KEEP = 2        # self-edits of a town that are learned in the preset


def others(whole):
    """(towns, K, inner loops): judge s is the mean of all inner loops but loop s. So no loop judges
    what it chose."""
    return (whole.sum(axis=2, keepdims=True) - whole) / (whole.shape[2] - 1)


def ranks(values):
    """Along the second axis, around 0: how many are lower minus how many are higher."""
    return np.sign(values[:, :, None] - values[:, None]).sum(axis=2)


def correlation(scores, judges):
    """(towns,) Spearman's, within a town, mean over judges; 0 where all are equal."""
    a, b = ranks(scores), ranks(judges)
    squares = (a ** 2).sum(axis=1) * (b ** 2).sum(axis=1)
    return ((a * b).sum(axis=1) / np.sqrt(np.maximum(squares, 1))).mean(axis=1)


def worth(scores, judges, k: int, keep=KEEP):
    """(towns,) what the best of k self-edits are worth, mean over groups of k and over judges."""
    found = []
    for first in range(0, judges.shape[1], k):
        group = slice(first, first + k)
        # Sorting is stable: of equals the first is chosen.
        ranked = np.argsort(-scores[:, group], axis=1, kind="stable")
        chosen = np.take_along_axis(judges[:, group], ranked[:, :keep], axis=1)
        found.append(chosen.mean(axis=(1, 2)))
    return np.mean(found, axis=0)


# ------------------------------------------------------------------------------- who may choose

LOOP = "an inner loop (SEAL)"
# Who chooses -> the cost per self-edit, in passes.
COSTS = SCORES | {"half of the steps": "5 backward, answers",
                  LOOP: "10 backward, answers",
                  "the five other inner loops": "50 backward, answers"}


def joined(lines, name):
    """What they have under this name, the towns of all seeds one after another."""
    return np.concatenate([line[name] for line in lines])


def choosers(records) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({who chooses: scores (towns, K, inner loops or 1)}, judges (towns, K, inner loops))."""
    scored = where(records, part="scores")
    tried = []
    for line in scored:
        tried += where(records, part="choosing", seed=line["seed"])
    scores = [line["scores"] for line in scored]
    whole = joined(tried, "whole")
    judges = others(whole)
    found = {}
    for name in SCORES:
        found[name] = joined(scores, name)[:, :, None]
    found["half of the steps"] = joined(tried, "half")
    found[LOOP] = whole
    # What the judges themselves would choose: nothing can be worth more.
    found["the five other inner loops"] = judges
    return found, judges


def measure(seed: int) -> dict:
    """A line: scores (towns, K) of the self-edits that try_often tries."""
    run, model, tasks, edits = written(seed)
    scores = {name: [] for name in SCORES}
    for i, task in enumerate(tasks):
        # Other seeds than those of the inner loops that judge.
        seeds = [seed_for(seed, "proxy", i, j) for j in range(len(edits[i]))]
        rows = score(model, run.tok, task, edits[i], seeds)
        for name, values in scores.items():
            values.append([round(row[name], 5) for row in rows])
    return {"scores": scores}


def show(found, judges):
    """What a choice among the usual K and among twice as many is worth, over towns."""
    towns, twice, _ = judges.shape
    k = twice // 2
    usual = worth(found[LOOP], judges, k)
    rows = [["any", "none", "", f"{judges.mean():.3f}", "", ""]]
    for name, scores in found.items():
        few = worth(scores, judges, k)
        many = worth(scores, judges, twice)
        alike = over_passages(correlation(scores, judges), ".2f")
        # Town by town.
        more = "" if name == LOOP else over_passages(few - usual, "+.3f")
        rows.append([name, COSTS[name], alike, f"{few.mean():.3f}", more, f"{many.mean():.3f}"])
    head = ["who chooses", "cost", "rank correlation", f"worth, {KEEP} of {k}",
            "against an inner loop", f"worth, {KEEP} of {twice}"]
    print_table(head, rows, f"{towns} towns, {twice} self-edits each")


def draw(found, judges, file):
    """What a choice among the usual K is worth."""
    figure, axes = new_figure("reward of the chosen (95 % interval over towns)", "", (7, 3.5))
    k = judges.shape[1] // 2
    for y, scores in enumerate(found.values()):
        values = worth(scores, judges, k)
        axes.plot(bootstrap_ci(values), [y, y], color="#1f77b4")
        axes.plot(values.mean(), y, "o", color="#1f77b4")
    axes.axvline(judges.mean(), color="#777", linestyle="--", label="any")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    save(figure, file)


def main():
    ap = flags(__doc__)
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = ap.parse_args()
    parts = {"choosing": try_often, "scores": measure}

    def measure_one(line):
        return parts[line["part"]](line["seed"])

    records = complete(ap, args, each("part", parts, args.seeds), measure_one)
    found, judges = choosers(records)
    show(found, judges)
    if args.svg:
        draw(found, judges, args.svg)


if __name__ == "__main__":
    cli(main)
