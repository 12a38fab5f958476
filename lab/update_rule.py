"""ReST-EM against its neighbours: which update rule learns to write better self-edits?

    python -m lab.update_rule --out FILE.jsonl
    python -m lab.update_rule --tune 2e-3 4e-3 8e-3 --seeds 10 11 --out FILE.jsonl

Each rule runs in the tiny world, at the learning rate that did best on other towns (--tune). A line
is an ordinary run of outer_loop.py, of which nothing else is kept. 1 to 3 minutes each.
"""
import math
import re
import tempfile
from collections import Counter
from itertools import product

import numpy as np
import torch

from data.tasks import load_data
from lab.experiment import (Question, arrows, complete, differences, gain, last_reward, of_seeds,
                            print_table, where)
from lab.tiny import log_probs, start, train
from lora import Adapters, Job, dialogue
from outer_loop import m_step, outer_recipe, rest_em
from selfedit import seed_for
from support.config import Config
from support.files import UserError, cli
from support.run import Run

# In the tiny world every self-edit beats the un-adapted model, which knows nothing. So Eq. 2 to the
# letter keeps all of them, and `--keep 2 --strict` is the same as `--keep 2`.

# name -> (how it differs from lab.tiny.SETTINGS, which keep the 2 best of 8 for 4 epochs; its outer
# learning rate, chosen by --tune: all K of a rule share that of K = 8). One epoch of 160 self-edits
# is as many steps as four of the 40 best.
USUAL = "best 2 of 8"
CLIPPED = "grpo, K = 8, 4 epochs, clip and KL"
RULES = {
    "best 2 of 8, half the rate": ({}, 2e-3),
    "best 1 of 2": ({"edits": 2, "keep": 1}, 4e-3),
    "best 2 of 4": ({"edits": 4}, 4e-3),
    USUAL: ({}, 4e-3),
    "best 2 of 16": ({"edits": 16}, 4e-3),
    "any 2 of 8 (control)": ({"update": "random"}, 4e-3),
    "all that help (Eq. 2)": ({"strict": True, "keep": 8}, 2e-3),
    "all of reward .7 and above": ({"update": "solved", "solved_at": 0.7}, 4e-3),
    "best 2 of 8, from the base": ({"restart": True}, 8e-3),
    "reinforce, K = 8": ({"update": "reinforce", "outer_epochs": 1}, 4e-3),
    "grpo, K = 8": ({"update": "grpo", "outer_epochs": 1}, 4e-3),
    "grpo, K = 8, 4 epochs": ({"update": "grpo"}, 1e-3),
    CLIPPED: ({"update": "grpo"}, 4e-3),
}
# Choosing a rate is shorter: fewer passages and rounds, and one self-edit of each held-out one.
SHORT = {"tasks": 15, "eval_edits": 1, "eval_tasks": 24, "iterations": 2}


def measure(line: dict) -> dict:
    """The rest of a line: a run of a rule at an outer learning rate, with a seed, asked about the
    held-out towns of a split."""
    arm, split = line["arm"], line["split"]
    own = RULES[arm][0] | (SHORT if split == "tune" else {})
    with tempfile.TemporaryDirectory() as folder:       # of which only the line is kept
        run, _ = start(folder, line["seed"], **own, outer_lr=line["lr"], eval_data=split)
        try:
            rest_em(run, *load_data(run), clipped_m_step if arm == CLIPPED else m_step)
        except UserError as e:
            if "diverged" not in str(e):
                raise
        # A model that diverged writes nothing: its rewards are 0.
        rewards = [m["eval_reward"] for m in run.metrics.records]
        rewards += [0.0] * (run.cfg.iterations + 1 - len(rewards))
        return {"reward": rewards, "distinct": distinct(run)} | cost(run.cfg, run)


def cost(cfg: Config, run: Run) -> dict:
    """Optimiser steps of both loops, without the evaluation."""
    inner, learned = 0, Counter()
    for r in run.rollouts.records:
        if r["split"] == "train":
            batches = math.ceil(r["documents"] / cfg.inner_batch)
            inner += len(r["right"]) * cfg.inner_epochs * batches
            learned[r["iteration"]] += r["weight"] != 0
    outer = sum(cfg.outer_epochs * math.ceil(n / cfg.outer_batch) for n in learned.values())
    return {"inner steps": inner, "outer steps": outer}


def distinct(run) -> list[int]:
    """Kinds of lines in all held-out self-edits after each round of a run. Lines that differ in
    names and years alone are of one kind."""
    found = []
    for m in run.metrics.records:
        text = "\n".join(r["text"] for r in run.edits.of(m["iteration"], "eval"))
        # A line's first word is the template's, and capital in any case.
        kinds = {re.sub(r"(?<!^)\b([A-Z]\w+|\d+)", "_", line) for line in text.splitlines()}
        found.append(len(kinds))
    return found


# `--update grpo` weighs self-edits by GRPO's advantages and takes one epoch. DeepSeekMath (arXiv
# 2402.03300, equations 3 and 4) goes on for more epochs, with
#
#     rho_s = p_theta(y_s | y_<s, C) / p_theta_t(y_s | y_<s, C)
#
#     maximise  mean_s  min(rho_s A, clip(rho_s, 1 - eps, 1 + eps) A) - beta KL(theta || theta_t)
#
# so that a token's probability is pushed no further than eps from where it was. theta_t, which
# wrote the self-edits, is the reference as well, as in the iterative form of GRPO (Algorithm 1).

def objective(new, old, advantage, eps, beta) -> torch.Tensor:
    """Of one self-edit, the mean over its tokens; new and old (N,) are log-probabilities."""
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - eps, 1 + eps)
    # The worse of both: no reward for going beyond the clip, but none is lost on the way back.
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    # The estimate of KL(theta || theta_t) from theta_t's samples that is never negative.
    kl = (old - new).exp() - (old - new) - 1
    return (gain - beta * kl).mean()


def clipped_m_step(cfg, run, model, learned, t, eps=0.2, beta=0.04):
    """An M-step by DeepSeekMath's objective, with its eps and beta."""
    # As in outer_loop.m_step: the context is read, the self-edit is learned as it was sampled.
    examples, advantages = [], []
    for task, edit, advantage in learned:
        examples.append(dialogue(run.tok.prompt(task.prompt), edit.token_ids))
        advantages.append(advantage)
    recipe = outer_recipe(cfg)
    # An adapter of zeros changes nothing, so these are theta_t's.
    nothing = Adapters(model, recipe.lora, n=1)
    with torch.no_grad():
        old = [log_probs(model, nothing, example) for example in examples]

    def loss(adapter, batch):
        values = []
        for i in batch:
            new = log_probs(model, adapter, examples[i])
            values.append(objective(new, old[i], advantages[i], eps, beta))
        return -torch.stack(values).mean()

    adapter = train(model, Job(examples, seed_for(cfg.seed, t, "M-step"), recipe), loss)
    if not adapter.flat.isfinite().all():
        raise UserError(f"the M-step of round {t + 1} diverged; try a lower learning rate")
    adapter.merge(0)


def show_rates(records: list[dict]):
    """The last reward at each rate that was tried."""
    for arm in RULES:
        tried = where(records, split="tune", arm=arm)
        for lr in sorted({line["lr"] for line in tried}):
            last = [line["reward"][-1] for line in where(tried, lr=lr)]
            print(f"{arm}, outer learning rate {lr:g}: {np.mean(last):.3f} ({len(last)} seeds)")


def show(records: list[dict]):
    """A row per rule and learning rate, with intervals over seeds."""
    rules = {}
    for arm in RULES:
        for line in where(records, split="eval", arm=arm):
            rules.setdefault((arm, line["lr"]), []).append(line)
    usual = rules.get((USUAL, RULES[USUAL][1]), [])
    rows = []
    for (arm, lr), lines in rules.items():
        # A rule may gain much in the mean and yet break with some seed: hence its worst one.
        gains = [gain(line) for line in lines]
        spread = np.std(gains, ddof=1) if len(gains) > 1 else math.nan
        more = differences(lines, usual, last_reward)
        rewards = np.mean([line["reward"] for line in lines], axis=0)
        # A run that diverged has no last round: then its last one that there was.
        kinds = np.mean([[line["distinct"][0], line["distinct"][-1]] for line in lines], axis=0)
        rows.append([arm, f"{lr:g}", arrows(rewards), of_seeds(gains, "+.3f"),
                     of_seeds(more, "+.3f"), f"{spread:.3f}", f"{min(gains):+.3f}"])
        for what in ("inner steps", "outer steps"):
            rows[-1].append(f"{np.mean([line[what] for line in lines]):.0f}")
        rows[-1].append(arrows(kinds, ".0f"))
    head = ["rule", "outer lr", "held-out reward, by round", "gain",
            f"last round, against {USUAL}", "s.d.", "worst seed", "inner steps", "outer steps",
            "kinds of lines"]
    print_table(head, rows)


def main():
    ap = Question(RULES, measure, show, draw=None).flags(__doc__)
    ap.add_argument("--tune", type=float, nargs="+", metavar="LR",
                    help="choose outer learning rates: try these, on other towns")
    args = ap.parse_args()
    # The split and the rate are part of what is wanted, as a file has lines of several.
    split, wanted = "tune" if args.tune else "eval", []
    for seed, arm in product(args.seeds, args.arms):
        for lr in args.tune or [RULES[arm][1]]:
            wanted.append({"split": split, "arm": arm, "lr": lr, "seed": seed})
    records = complete(ap, args, wanted, measure)
    (show_rates if args.tune else show)(records)


if __name__ == "__main__":
    cli(main)
