"""Rules by which a model learns from its self-edits: for lab/update_rule.py and lab/outer_rate.py.

In the tiny world every self-edit beats the un-adapted model, which knows nothing. So Eq. 2 to the
letter keeps all of them, and `--keep 2 --strict` is the same as `--keep 2`.
"""
import math
import re
import time
from pathlib import Path

from lab.diversity import of_run
from lab.grpo import clipped_m_step
from lab.tiny import SETTINGS
from outer_loop import m_step, rest_em
from support.config import Config
from support.files import UserError
from support.records import Lines
from support.run import Run

# name -> (how it differs from lab.tiny.SETTINGS, which keep the 2 best of 8 for 4 epochs; its outer
# learning rate). All K of a rule share the rate of K = 8. One epoch of 160 self-edits is as many
# steps as four of the 40 best. Rates were chosen by lab/outer_rate.py, by the last reward of seeds
# 10 and 11 (of seed 10 alone for Eq. 2, for a restart from the base, and with clip and KL).
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
    run = Run(cfg)
    rule = clipped_m_step(eps=0.2, beta=0.04) if arm == CLIPPED else m_step     # DeepSeekMath's
    # What an M-step costs is not among the things that a run keeps.
    m_steps = Lines(folder / "m_steps.jsonl")

    def learn(cfg, run, model, learned, t):
        begin = time.time()
        rule(cfg, run, model, learned, t)
        m_steps.add({"round": t, "self-edits": len(learned), "seconds": time.time() - begin})

    print(f"\n=== {split}: {arm}, outer learning rate {lr:g}, seed {seed}", flush=True)
    try:
        rest_em(cfg, run, learn)
    except UserError as e:
        if "diverged" not in str(e):
            raise
    # A model that diverged writes nothing: its rewards are 0.
    rewards = [m["eval_reward"] for m in run.metrics.records]
    rewards += [0.0] * (cfg.iterations + 1 - len(rewards))
    found = {"reward": rewards, "diverged": len(run.metrics.records) <= cfg.iterations,
             "by kind": [m["eval_by_kind"] for m in run.metrics.records]}
    return found | cost(cfg, run, m_steps.records) | of_run(run)


def cost(cfg: Config, run: Run, m_steps: list[dict]) -> dict:
    """Optimiser steps of both loops and the seconds that they took, without the evaluation."""
    inner, outer, seconds = 0, 0, 0.0
    for r in run.rollouts.records:
        if r["split"] == "train":
            steps = cfg.inner_epochs * math.ceil(r["documents"] / cfg.inner_batch)
            inner += len(r["right"]) * steps
            seconds += r["seconds"]
    # A round that was killed and begun again is in the file twice.
    last = {r["round"]: r for r in m_steps}
    for r in last.values():
        outer += cfg.outer_epochs * math.ceil(r["self-edits"] / cfg.outer_batch)
        seconds += r["seconds"]
    return {"inner steps": inner, "outer steps": outer, "seconds": round(seconds)}
