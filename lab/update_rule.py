"""ReST-EM against its neighbours: which update rule learns to write better self-edits?

    python -m lab.update_rule --out update_rule.jsonl --runs RUNS [--seeds 0 1 2 3 4] [--svg FILE]
    python -m lab.update_rule --out update_rule.jsonl --runs RUNS --choose      # learning rates

The paper says that GRPO and PPO were unstable, and shows no figure. Here each rule runs in the tiny
world, at the learning rate that did best on other towns. A run (a rule and a seed) is an ordinary
run of outer_loop.py, in a folder below --runs. About 20 minutes per seed on one thread, and as long
to choose with a seed.

In the tiny world every self-edit beats the un-adapted model, which knows nothing. So Eq. 2 to the
letter keeps all of them, and `--keep 2 --strict` is the same as `--keep 2`.
"""
import math
import re
import time
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np

from config import PRESETS, Config
from files import Lines, Parser, UserError, cli
from lab.curve import pyplot, save
from lab.grpo import clipped_m_step
from outer_loop import m_step, rest_em
from run import Run
from stats import mean_ci

# name -> (how it differs from `--preset tiny`, which keeps the 2 best of 8 for 4 epochs; its outer
# learning rate). All K of a rule share the rate of K = 8. One epoch of 160 self-edits is as many
# steps as four of the 40 best. Rates were chosen by --choose, by the last reward of seeds 10 and 11
# (of seed 10 alone for Eq. 2, for a restart from the base, and with clip and KL).
ONE_EPOCH = {"outer_epochs": 1}
PRESET, USUAL = "the preset itself (best 2 of 8)", "best 2 of 8"
CONTROL = "any 2 of 8 (control)"
CLIPPED = "grpo, K = 8, 4 epochs, clip and KL"
ARMS = {
    PRESET: ({}, 2e-3),
    "best 1 of 2": ({"edits": 2, "keep": 1}, 4e-3),
    "best 2 of 4": ({"edits": 4}, 4e-3),
    USUAL: ({}, 4e-3),
    "best 2 of 16": ({"edits": 16}, 4e-3),
    CONTROL: ({"update": "random"}, 4e-3),
    "all that help (Eq. 2)": ({"strict": True, "keep": 8}, 2e-3),
    "all of reward .7 and above": ({"update": "solved", "solved_at": 0.7}, 4e-3),
    "best 2 of 8, from the base": ({"restart": True}, 8e-3),
    "reinforce, K = 8": ({"update": "reinforce"} | ONE_EPOCH, 4e-3),
    "grpo, K = 2": ({"update": "grpo", "edits": 2} | ONE_EPOCH, 4e-3),
    "grpo, K = 4": ({"update": "grpo", "edits": 4} | ONE_EPOCH, 4e-3),
    "grpo, K = 8": ({"update": "grpo"} | ONE_EPOCH, 4e-3),
    "grpo, K = 16": ({"update": "grpo", "edits": 16} | ONE_EPOCH, 4e-3),
    "grpo, K = 8, 4 epochs": ({"update": "grpo"}, 1e-3),
    CLIPPED: ({"update": "grpo"}, 4e-3),
}
# What --choose tries. Two rules take four times as many steps, with nothing to hold them back, so
# that lower rates are tried for them, by these factors.
GRID = (2e-3, 4e-3, 8e-3)
LONG = {"all that help (Eq. 2)": 1 / 2, "grpo, K = 8, 4 epochs": 1 / 4}
TO_CHOOSE = [name for name, (own, _) in ARMS.items()
             if "edits" not in own and name not in (PRESET, CONTROL)]
# Choosing is shorter: fewer passages, and one self-edit of each held-out one.
SHORT = {"tasks": 15, "eval_edits": 1, "eval_tasks": 24, "iterations": 2}


def measure(runs: Path, split: str, arm: str, lr: float, seed: int) -> dict:
    """A line: a rule's run with a seed, on the held-out towns of a split."""
    own = ARMS[arm][0] | {"outer_lr": lr, "seed": seed, "eval_data": split, "baselines": False}
    if split == "tune":
        own |= SHORT
    name = re.sub(r"[^\w.]+", "-", f"{split} {arm} {lr} {seed}")
    begin_alike(runs / name, list(runs.glob(f"{split}-*-{seed}/edits.jsonl")))
    cfg = Config(**PRESETS["tiny"] | own | {"run_dir": str(runs / name)})
    run = Run(cfg)
    rule = clipped_m_step(eps=0.2, beta=0.04) if arm == CLIPPED else m_step     # DeepSeekMath's
    kept = Lines(run.folder / "m_steps.jsonl")

    def learn(cfg, run, model, learned, t):
        begin = time.time()
        rule(cfg, run, model, learned, t)
        kept.add({"round": t, "self-edits": len(learned), "seconds": time.time() - begin})

    print(f"\n=== {split}: {arm}, outer learning rate {lr:g}, seed {seed}", flush=True)
    try:
        rest_em(cfg, run, learn)
    except UserError as e:
        if "diverged" not in str(e):
            raise
    # A model that diverged writes nothing: its rewards are 0.
    rewards = [m["eval_reward"] for m in run.metrics.records]
    rewards += [0.0] * (cfg.iterations + 1 - len(rewards))
    record = {"split": split, "arm": arm, "lr": lr, "seed": seed, "reward": rewards,
              "diverged": len(run.metrics.records) <= cfg.iterations,
              "by kind": [m["eval_by_kind"] for m in run.metrics.records]}
    return record | cost(cfg, run, kept) | diversity(run)


def begin_alike(folder, others):
    """Before the first update all rules do the same: copy what another run with this seed did.
    others: edits.jsonl of such runs, of which the largest has the most self-edits per town."""
    if folder.exists() or not others:
        return
    folder.mkdir(parents=True)
    source = max(others, key=lambda path: path.stat().st_size).parent
    for name in ("edits.jsonl", "rollouts.jsonl", "metrics.jsonl"):
        records = Lines(source / name, repair=False).records
        Lines(folder / name).add(*[r for r in records if r["iteration"] == 0])


def cost(cfg, run, kept) -> dict:
    """Optimiser steps of both loops and the seconds that they took, without the evaluation."""
    inner, outer, seconds = 0, 0, 0.0
    for r in run.rollouts.records:
        if r["split"] == "train" and r["edit"] < cfg.edits:
            steps = cfg.inner_epochs * math.ceil(r["documents"] / cfg.inner_batch)
            inner += len(r["right"]) * steps
            seconds += r["seconds"]
    # A round that was killed and begun again is in the file twice.
    for r in {r["round"]: r for r in kept.records}.values():
        outer += cfg.outer_epochs * math.ceil(r["self-edits"] / cfg.outer_batch)
        seconds += r["seconds"]
    return {"inner steps": inner, "outer steps": outer, "seconds": round(seconds)}


def diversity(run) -> dict:
    """Of the self-edits of held-out towns, after each round: how far zlib compresses them, and how
    many different lines there are when names and years are all the same."""
    compression, distinct = [], []
    for m in run.metrics.records:
        records = run.edits.of(m["iteration"], "eval")
        text = "\n".join(r["text"] for r in records)
        compression.append(round(len(text) / len(zlib.compress(text.encode())), 3))
        # A line's first word is the template's, and capital in any case.
        lines = {re.sub(r"(?<!^)\b([A-Z]\w+|\d+)", "_", line) for line in text.splitlines()}
        distinct.append(len(lines))
    return {"compression": compression, "distinct": distinct}


def groups_of(records, split) -> dict:
    """{(rule, learning rate): its lines}, in the order of ARMS."""
    groups = defaultdict(list)
    for arm in ARMS:
        for r in records:
            if (r["split"], r["arm"]) == (split, arm):
                groups[arm, r["lr"]].append(r)
    return groups


def table(records):
    """What was measured, as Markdown."""
    for (arm, lr), rows in groups_of(records, "tune").items():
        final = np.mean([r["reward"][-1] for r in rows])
        print(f"tune: {arm}, outer learning rate {lr:g}: {final:.3f} ({len(rows)} seeds)")
    print(f"\n| rule | outer lr | held-out reward, by round | gain | last round, against {USUAL} | "
          "s.d. | worst seed | inner steps | outer steps | seconds | compression | "
          "distinct lines |\n|---|---|---|---|---|---|---|---|---|---|---|---|")
    groups = groups_of(records, "eval")
    usual = {r["seed"]: r["reward"][-1] for r in groups.get((USUAL, ARMS[USUAL][1]), [])}
    for (arm, lr), rows in groups.items():
        rewards = np.array([r["reward"] for r in rows])
        gains = rewards[:, -1:] - rewards[:, :1]
        (gain,), (half,) = mean_ci(gains)
        spread = gains.std(ddof=1) if len(rows) > 1 else math.nan
        cells = [arm, f"{lr:g}", " -> ".join(f"{x:.3f}" for x in rewards.mean(0)),
                 f"{gain:+.3f} ±{half:.3f}", "", f"{spread:.3f}", f"{gains.min():+.3f}"]
        # Seed by seed, as a seed has the same towns and the same first self-edits for all rules.
        pairs = [[r["reward"][-1] - usual[r["seed"]]] for r in rows if r["seed"] in usual]
        if pairs and arm != USUAL:
            (more,), (half,) = mean_ci(pairs)
            cells[4] = f"{more:+.3f} ±{half:.3f}"
        for what in ("inner steps", "outer steps", "seconds"):
            cells.append(f"{np.mean([r[what] for r in rows]):.0f}")
        for what, form in (("compression", ".2f"), ("distinct", ".0f")):
            first, last = (np.mean([r[what][i] for r in rows]) for i in (0, -1))
            cells.append(f"{first:{form}} -> {last:{form}}")
        print(f"| {' | '.join(cells)} |")


def draw(records, file):
    """A figure of gains: a point per seed, the mean and its interval."""
    groups = groups_of(records, "eval")
    figure, axes = pyplot().subplots(figsize=(7, 5), layout="constrained")
    for y, rows in enumerate(groups.values()):
        gains = np.array([[r["reward"][-1] - r["reward"][0]] for r in rows])
        mean, half = mean_ci(gains)
        axes.plot(gains[:, 0], [y] * len(rows), ".", color="#bbb")
        axes.errorbar(mean, [y], xerr=np.nan_to_num(half), color="#1f77b4", marker="o", capsize=3)
    axes.axvline(0, color="#777", linestyle="--")
    axes.set_yticks(range(len(groups)), [arm for arm, _ in groups])
    axes.invert_yaxis()
    axes.set_xlabel("gain of held-out reward after 3 rounds, 95 % intervals")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("--out", required=True, help="JSON lines, one per rule and seed")
    ap.add_argument("--runs", required=True, type=Path, help="where the runs' folders go")
    ap.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 3 4; to choose: 10 11")
    ap.add_argument("--arms", nargs="+", choices=ARMS, metavar="RULE", help="default: all")
    ap.add_argument("--choose", action="store_true", help="try learning rates on the tune towns")
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    args = ap.parse_args()
    split = "tune" if args.choose else "eval"
    units = []
    for seed in args.seeds or ([10, 11] if args.choose else range(5)):
        for arm in args.arms or (TO_CHOOSE if args.choose else ARMS):
            rates = [ARMS[arm][1]]
            if args.choose:
                rates = [lr * LONG.get(arm, 1) for lr in GRID]
            units += [(split, arm, lr, seed) for lr in rates]

    done = Lines(args.out)
    known = {(r["split"], r["arm"], r["lr"], r["seed"]) for r in done.records}
    for unit in units:
        if unit not in known:
            done.add(measure(args.runs, *unit))
    table(done.records)
    if args.svg:
        draw(done.records, args.svg)


if __name__ == "__main__":
    cli(main)
