"""Half of the reward's cost: does SEAL learn as much from cheaper rewards?

    python -m lab.race --out FILE.jsonl [--rules RULE ...]

ReST-EM in the tiny world, with its rewards from a race, or from products of gradients and no inner
loop. lab/choosing.py asks what a single choice is worth. 2 to 8 minutes for a rule and a seed.
"""
import math
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch

from data.tasks import load_tasks
from inner_loop import answering, inner_recipe, make_job, update_and_score
from lab.experiment import Question, arrows, differences, gain, last_reward, of_seeds, print_table
from lab.tiny import RECIPE, SETTINGS, gold, log_probs, one_round, start
from lora import Adapters
from outer_loop import evaluate
from selfedit import seed_for
from support.files import cli
from support.ranks import Meter
from support.run import Run

# ------------------------------------------------------------------------------- successive halving

# Successive halving (arXiv 1502.07943): further inner loops go to the contenders alone. A race
# gives one inner loop to every self-edit of a task, and the others to the best of them. Or the
# first one takes half of the training steps. Or what is saved goes to more self-edits. The cost
# is in inner loops; half of the steps are half a loop.

@dataclass
class Rung:
    """A stage of a race."""
    share: float        # of a task's self-edits that are still in it
    seeds: int          # further inner loops of each of these
    steps: float = 1    # of an inner loop's training steps, the share that is taken


# name -> (self-edits, as a multiple of the usual K; the stages)
RULES = {
    "one seed": (1, [Rung(1, 1)]),
    "two seeds": (1, [Rung(1, 2)]),
    "three seeds": (1, [Rung(1, 3)]),
    "one, two more for 3/8": (1, [Rung(1, 1), Rung(3 / 8, 2)]),
    "one, one more for 1/2": (1, [Rung(1, 1), Rung(1 / 2, 1)]),
    "half the steps": (1, [Rung(1, 1, 1 / 2)]),
    "half the steps, one seed for 1/2": (1, [Rung(1, 1, 1 / 2), Rung(1 / 2, 1)]),
    "twice the self-edits, one seed": (2, [Rung(1, 1)]),
    "twice the self-edits, half the steps": (2, [Rung(1, 1, 1 / 2)]),
    "twice the self-edits, half the steps, one seed for 1/4":
        (2, [Rung(1, 1, 1 / 2), Rung(1 / 4, 1)]),
}
USUAL = "three seeds"
PRODUCT = "inner product of gradients"


def race(rungs: list[Rung], n_tasks: int, k: int, run_rung) -> tuple[np.ndarray, float]:
    """(scores (n_tasks, k), inner loops taken). Whoever drops out is scored below all others.

    run_rung((task, self-edit)s, rung, seeds so far) -> for each of them a list of accuracies."""
    scores, found = np.zeros((n_tasks, k)), defaultdict(list)
    left = {i: list(range(k)) for i in range(n_tasks)}
    tried, steps, loops = 0, 0, 0.0
    for rung in rungs:
        pairs = []
        for i in left:
            # Sorting is stable: of equals the first goes on.
            ranked = sorted(left[i], key=lambda j: -scores[i, j])
            left[i] = sorted(ranked[:math.ceil(rung.share * k)])
            # An accuracy is at most 1, so that all others are now below them.
            scores[i] -= 1
            scores[i, left[i]] += 1
            pairs += [(i, j) for j in left[i]]
        # What was measured after fewer steps decides who goes on, and is then forgotten.
        if rung.steps > steps:
            found.clear()
        for pair, accuracies in zip(pairs, run_rung(pairs, rung, tried)):
            found[pair] += accuracies
            scores[pair] = np.mean(found[pair])
        tried, steps = tried + rung.seeds, rung.steps
        loops += len(pairs) * rung.seeds * rung.steps
    return scores, loops


def trainer(run: Run, model, tasks, edits, t: int):
    """run_rung for `race`: inner loops, with the seeds that outer_loop.score would use."""
    def run_rung(pairs, rung, first):
        usual = inner_recipe(run.cfg)
        recipe = replace(usual, epochs=round(usual.epochs * rung.steps))
        asked, learned, seeds = [], [], []
        for i, j in pairs:
            asked.append(tasks[i])
            learned.append(edits[i][j])
            seeds.append([seed_for(run.cfg.seed, t, "train", i, j, s, "adapter")
                          for s in range(first, first + rung.seeds)])
        outcomes = dict(update_and_score(model, run.tok, asked, learned, seeds, recipe,
                                         answering(run.cfg), Meter("optimiser steps")))
        # Nothing to learn from is no accuracy, and a reward of 0.
        return [outcomes[n].accuracy or [0.0] * rung.seeds for n in range(len(pairs))]
    return run_rung


# --------------------------------------------------------------------------- products of gradients

# To first order, a small step down the gradient g of a self-edit's loss changes the loss L of the
# gold answers by
#
#     L(theta - eps g) - L(theta) = -eps <g, grad L>
#
# so the product of two gradients at theta may rank self-edits, as TracIn (arXiv 2002.08484) and
# LESS (2402.04333) rank training examples by it.

LAST = -1e6     # of a self-edit from which nothing can be learned


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


def learn(rule: str, seed: int) -> dict:
    """A line: outer_loop.rest_em with other rewards."""
    times, rungs = RULES.get(rule, (1, []))
    loops = 0.0
    with tempfile.TemporaryDirectory() as folder:       # of which only the line is kept
        run, train = start(folder, seed, edits=times * SETTINGS["edits"])
        cfg = run.cfg
        held_out = load_tasks(run, cfg.eval_data)[:cfg.eval_tasks]
        for t in range(cfg.iterations):
            model = run.load(t)
            evaluate(cfg, run, model, held_out, t)

            def reward(tasks, edits):
                nonlocal loops
                if rule == PRODUCT:
                    return [[product for product, _ in products(model, run.tok, task, row)]
                            for task, row in zip(tasks, edits)]
                # Who dropped out of the race is below all others, and is not kept.
                run_rung = trainer(run, model, tasks, edits, t)
                scores, taken = race(rungs, len(tasks), cfg.edits, run_rung)
                loops += taken
                return scores

            one_round(run, model, train, t, reward)
        evaluate(cfg, run, run.load(cfg.iterations), held_out, cfg.iterations)
        return {"inner loops": loops, "reward": [m["eval_reward"] for m in run.metrics.records]}


def show(rules: dict[str, list[dict]]):
    """Held-out rewards, with intervals over seeds, and differences seed by seed."""
    rows = []
    for rule, lines in rules.items():
        more = differences(lines, rules.get(USUAL, []), last_reward)
        loops = np.mean([line["inner loops"] for line in lines])
        rewards = np.mean([line["reward"] for line in lines], axis=0)
        gains = [gain(line) for line in lines]
        rows.append([rule, f"{loops:.0f}", arrows(rewards), of_seeds(gains, "+.3f"),
                     of_seeds(more, "+.3f")])
    print_table(["rewards", "inner loops", "held-out reward, by round", "gain",
                 f"last round, against {USUAL}"], rows)


def main():
    Question([*RULES, PRODUCT], learn, show, draw=None, kind="rule").ask(
        __doc__, default=[USUAL, "one seed"])


if __name__ == "__main__":
    cli(main)
