"""ReST-EM against its neighbours: which update rule learns to write better self-edits?

    python -m lab.update_rule --out FILE.jsonl --runs FOLDER [--svg FILE]
    python -m lab.update_rule --tune --out FILE.jsonl --runs FOLDER

Each rule runs in the tiny world, at the learning rate that did best on other towns (--tune). A run
of a rule with a seed is an ordinary run of outer_loop.py, in a folder below --runs. 1 to 3 minutes
each, on one thread.
"""
import math
import re
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.tasks import load_data
from lab.experiment import (arrows, complete, differences, gain, last_reward, new_figure, of_seeds,
                            parser, print_table, save, where)
from lab.tiny import SETTINGS
from lora import Adapters, Job, dialogue
from model import load_pretrained
from outer_loop import m_step, outer_recipe, rest_em
from selfedit import seed_for
from support.config import Config
from support.files import UserError, cli
from support.run import Run
from support.stats import mean_ci

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


def measure(runs: Path, line: dict, **settings) -> dict:
    """The rest of a line: a run of a rule at an outer learning rate, with a seed, asked about the
    held-out towns of a split. It is in a folder below runs, and goes on there after a kill.

    settings: how it differs from the rule's other runs."""
    split, arm, lr, seed = line["split"], line["arm"], line["lr"], line["seed"]
    own, _ = RULES[arm]
    folder = runs / re.sub(r"[^\w.]+", "-", f"{split} {arm} {lr} {seed}")
    cfg = Config(**SETTINGS | own | settings | {
        "outer_lr": lr, "seed": seed, "eval_data": split, "baselines": False,
        "run_dir": str(folder)})
    run = Run(cfg, load_pretrained)
    print(f"\n=== {split}: {arm}, outer learning rate {lr:g}, seed {seed}", flush=True)
    try:
        rest_em(run, *load_data(run), clipped_m_step if arm == CLIPPED else m_step)
    except UserError as e:
        if "diverged" not in str(e):
            raise
    # A model that diverged writes nothing: its rewards are 0.
    rewards = [m["eval_reward"] for m in run.metrics.records]
    rewards += [0.0] * (cfg.iterations + 1 - len(rewards))
    return {"reward": rewards, "distinct": distinct(run)} | cost(cfg, run)


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

def log_probs(model, adapter, example) -> torch.Tensor:
    """(N,) of a self-edit's tokens, given those before them."""
    ids, learn = example
    ids = torch.tensor(ids, device=model.device)
    written = torch.tensor(learn, device=model.device)[1:].bool()
    with adapter.route([len(ids)]):
        logits = model(ids[None])[0, :-1]
    return -F.cross_entropy(logits[written].float(), ids[1:][written], reduction="none")


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
    job = Job(examples, seed_for(cfg.seed, t, "M-step"), recipe)
    adapter = Adapters(model, recipe.lora, n=1)
    adapter.init(0, job.seed)
    # A new adapter changes nothing, so these are theta_t's.
    with torch.no_grad():
        old = [log_probs(model, adapter, example) for example in examples]

    weights = adapter.flat.requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=recipe.lr, weight_decay=recipe.weight_decay)
    for step, batch in enumerate(job.micro_batches()):
        optimizer.zero_grad()
        for i in batch:
            new = log_probs(model, adapter, examples[i])
            value = objective(new, old[i], advantages[i], eps, beta)
            (-value / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_([weights], recipe.clip)
        optimizer.param_groups[0]["lr"] = job.lr_at(step)
        optimizer.step()
    weights.requires_grad_(False)
    if not weights.isfinite().all():
        raise UserError(f"the M-step of round {t + 1} diverged; try a lower learning rate")
    adapter.merge(0)


GRID = (2e-3, 4e-3, 8e-3)
# rule -> a factor: lower rates for two rules that take four times as many steps unclipped.
FACTORS = {USUAL: 1, "all that help (Eq. 2)": 1 / 2, "all of reward .7 and above": 1,
           "best 2 of 8, from the base": 1, "reinforce, K = 8": 1, "grpo, K = 8": 1,
           "grpo, K = 8, 4 epochs": 1 / 4, CLIPPED: 1}
# Choosing is shorter: fewer passages, and one self-edit of each held-out one.
SHORT = {"tasks": 15, "eval_edits": 1, "eval_tasks": 24, "iterations": 2}


def show_rates(records: list[dict]):
    """The last reward at each rate that was tried."""
    for arm in RULES:
        tried = where(records, split="tune", arm=arm)
        for lr in sorted({line["lr"] for line in tried}):
            last = [line["reward"][-1] for line in where(tried, lr=lr)]
            print(f"{arm}, outer learning rate {lr:g}: {np.mean(last):.3f} ({len(last)} seeds)")


def measured_rules(records: list[dict]) -> dict:
    """{(rule, outer learning rate): its lines}, in the order of RULES."""
    found = {}
    for arm in RULES:
        for line in where(records, split="eval", arm=arm):
            found.setdefault((arm, line["lr"]), []).append(line)
    return found


def show(rules: dict):
    """A row per rule and learning rate, with intervals over seeds."""
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


def draw(rules: dict, file):
    """Gains: a point per seed, the mean and its interval."""
    figure, axes = new_figure("gain of held-out reward after 3 rounds, 95 % intervals", "", (7, 5))
    for y, lines in enumerate(rules.values()):
        gains = [[gain(line)] for line in lines]
        mean, half = mean_ci(gains)
        axes.plot(gains, [y] * len(lines), ".", color="#bbb")
        axes.errorbar(mean, [y], xerr=np.nan_to_num(half), color="#1f77b4", marker="o", capsize=3)
    # No gain.
    axes.axvline(0, color="#777", linestyle="--")
    axes.set_yticks(range(len(rules)), [f"{arm}, {lr:g}" for arm, lr in rules])
    axes.invert_yaxis()
    save(figure, file)


def main():
    ap = parser(__doc__)
    ap.add_argument("--out", required=True, type=Path, help="JSON lines, as they are known")
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    ap.add_argument("--runs", required=True, type=Path, help="where the runs' folders go")
    ap.add_argument("--arms", nargs="+", choices=RULES, metavar="RULE", help="default: all")
    ap.add_argument("--seeds", type=int, nargs="+", help="default: 0 to 4, with --tune 10 and 11")
    ap.add_argument("--tune", action="store_true", help="choose the outer learning rates")
    args = ap.parse_args()
    if args.tune:
        split, own, seeds = "tune", SHORT, args.seeds or [10, 11]
        rates = {arm: [lr * factor for lr in GRID] for arm, factor in FACTORS.items()}
    else:
        split, own, seeds = "eval", {}, args.seeds or range(5)
        rates = {arm: [lr] for arm, (_, lr) in RULES.items()}
    # The split and the rate are part of what is wanted, as a file has lines of several.
    wanted = []
    for seed, arm in product(seeds, args.arms or rates):
        wanted += [{"split": split, "arm": arm, "lr": lr, "seed": seed} for lr in rates[arm]]
    records = complete(ap, args, wanted, lambda line: measure(args.runs, line, **own))
    if args.tune:
        return show_rates(records)
    rules = measured_rules(records)
    show(rules)
    if args.svg:
        draw(rules, args.svg)


if __name__ == "__main__":
    cli(main)
