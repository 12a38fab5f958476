"""Half of the reward's cost: do further seeds of the inner loop have to go to every self-edit?

    python -m lab.race --out race.jsonl [--seeds 0 1 2 3 4] [--released FILE] [--svg FILE]

A reward is the mean of three inner loops, each with a seed of its own. A race gives one to every
self-edit, and the others to the contenders alone (successive halving, arXiv 1502.07943). Or the
first one takes half of the training steps. Or what is saved goes to more self-edits. The cost is in
inner loops; half of the steps are half a loop. Two parts, about 5 and 16 minutes per seed on one
thread:

choosing  Self-edits of the untrained model, each tried with six seeds and with half of the steps.
          What are the two best of a town worth, by seeds that did not choose them?
learning  ReST-EM in the tiny world, with its rewards from a race: held-out reward, and the cost.

--released: the authors' verdicts, shared with SEAL's code: a list of passages with
"released_edits", each with "adapter_mean" and "adapter_std" of three seeds.
"""
import itertools
import math
import tempfile
from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from config import PRESETS, Config
from files import Lines, Parser, cli, read_json
from inner_loop import update_and_score
from lab.curve import pyplot, save
from outer_loop import evaluate, in_order, m_step, next_tasks, select
from progress import Meter
from run import Run, sample_edits
from selfedit import seed_for
from stats import bootstrap_ci, mean_ci


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
    "half the steps, two seeds for 1/2": (1, [Rung(1, 1, 1 / 2), Rung(1 / 2, 2)]),
    "twice the self-edits, one seed": (2, [Rung(1, 1)]),
    "twice the self-edits, half the steps": (2, [Rung(1, 1, 1 / 2)]),
    "twice the self-edits, half the steps, one seed for 1/4":
        (2, [Rung(1, 1, 1 / 2), Rung(1 / 4, 1)]),
}
LEARNING = ("three seeds", "one seed", "one, two more for 3/8", "half the steps",
            "twice the self-edits, half the steps",
            "twice the self-edits, half the steps, one seed for 1/4",
            "twice the self-edits, one seed")


def race(rungs: list[Rung], n_tasks: int, k: int, run_rung) -> tuple[np.ndarray, float]:
    """(scores (n_tasks, k), inner loops taken). Whoever drops out is scored below all others.

    run_rung((task, self-edit)s, rung, seeds so far) -> for each of them a list of accuracies."""
    scores, found = np.zeros((n_tasks, k)), defaultdict(list)
    left = {i: list(range(k)) for i in range(n_tasks)}
    tried, steps, loops = 0, 0, 0.0
    for rung in rungs:
        for i in left:
            # Sorting is stable: of equals the first goes on.
            ranked = sorted(left[i], key=lambda j: -scores[i, j])
            left[i] = sorted(ranked[:math.ceil(rung.share * k)])
            scores[i] -= 1
            scores[i, left[i]] += 1
        pairs = [(i, j) for i in left for j in left[i]]
        # What was measured after fewer steps decides who goes on, and is then forgotten.
        if rung.steps > steps:
            found.clear()
        for pair, accuracies in zip(pairs, run_rung(pairs, rung, tried)):
            found[pair] += accuracies
            scores[pair] = np.mean(found[pair])
        tried, steps = tried + rung.seeds, rung.steps
        loops += len(pairs) * rung.seeds * rung.steps
    return scores, loops


def trainer(run: Run, model, tasks, edits, t):
    """run_rung for `race`: inner loops, with the seeds that run.score_edits would use."""
    def run_rung(pairs, rung, first):
        recipe = replace(run.recipe, epochs=round(run.recipe.epochs * rung.steps))
        seeds = [[seed_for(run.cfg.seed, t, "train", i, j, s, "adapter")
                  for s in range(first, first + rung.seeds)] for i, j in pairs]
        outcomes = dict(update_and_score(
            model, run.tok, [tasks[i] for i, _ in pairs], [edits[i][j] for i, j in pairs], seeds,
            recipe, run.answering, Meter("optimiser steps")))
        # Nothing to learn from is no accuracy, and a reward of 0.
        return [outcomes[n].accuracy or [0.0] * rung.seeds for n in range(len(pairs))]
    return run_rung


# ------------------------------------------------------------------------------- choosing

SEEDS = 6       # three to choose by, three to judge by


def start(seed: int, folder, times=1):
    """A run of the preset with so many times its self-edits, its training towns in order, and those
    to evaluate on."""
    preset = PRESETS["tiny"]
    run = Run(Config(**preset | {"seed": seed, "baselines": False, "run_dir": folder,
                                 "edits": times * preset["edits"]}))
    train = in_order(run.tasks(run.cfg.train_data), seed)
    return run, train, run.tasks(run.cfg.eval_data)[:run.cfg.eval_tasks]


def try_often(seed: int) -> dict:
    """A line: accuracies (tasks, K, seeds) of the untrained model's self-edits."""
    with tempfile.TemporaryDirectory() as folder:
        run, train, _ = start(seed, folder, times=2)
        n, k = run.cfg.tasks, run.cfg.edits
        tasks, model = next_tasks(train, 0, n), run.load(0)
        edits = sample_edits(run, model, tasks, 0, "train", k)
        run_rung = trainer(run, model, tasks, edits, 0)
        pairs = list(itertools.product(range(n), range(k)))
        record = {"part": "choosing", "seed": seed}
        for name, rung in (("whole", Rung(1, SEEDS)), ("half", Rung(1, 1, 1 / 2))):
            record[name] = np.reshape(run_rung(pairs, rung, 0), (n, k, -1)).round(4).tolist()
        return record


def released(file) -> np.ndarray:
    """(passages, K, 3): the accuracies of the authors' three seeds, from mean and deviation."""
    found = []
    for record in read_json(file):
        n = len(record["questions"])
        possible = np.array(list(itertools.combinations_with_replacement(range(n + 1), 3))) / n
        rows = []
        for edit in record["released_edits"]:
            miss = (abs(possible.mean(1) - edit["adapter_mean"])
                    + abs(possible.std(1, ddof=1) - edit["adapter_std"]))
            rows.append(possible[miss.argmin()])
        found.append(rows)
    return np.array(found)


def worth(rungs, whole, half, keep, judges, draws=100) -> tuple[np.ndarray, float]:
    """(what the chosen are worth, per task, by seeds that did not choose; inner loops per task).

    whole (tasks, K, seeds); half: after half of the steps, or None."""
    n, k, seeds = whole.shape
    rng, values = np.random.default_rng(seed_for("race") % 2 ** 32), np.zeros(n)
    for _ in range(draws):
        # Which seed comes first is by chance, for each self-edit anew. The last ones judge.
        mixed = rng.permuted(whole, axis=2)

        def run_rung(pairs, rung, first):
            table = mixed if rung.steps == 1 else half
            return [table[i, j, first:first + rung.seeds].tolist() for i, j in pairs]

        scores, loops = race(rungs, n, k, run_rung)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
        judged = mixed[:, :, seeds - judges:].mean(2)
        values += np.take_along_axis(judged, chosen, axis=1).mean(1)
    return values / draws, loops / n


def choosing_table(title, k, whole, half, keep, judges, against):
    """Print what each rule's choice is worth, with intervals over tasks. k: the usual K."""
    def of_rule(times, rungs):
        some = None if half is None else half[:, :times * k]
        return worth(rungs, whole[:, :times * k], some, keep, judges)

    print(f"\n{title}\n\n| rule | inner loops per task | worth of the chosen | "
          f"against {against} |\n|---|---|---|---|\n| any | 0 | {whole.mean():.3f} | |")
    reference, _ = of_rule(*RULES[against])
    for name, (times, rungs) in RULES.items():
        # Not all rules can be tried on all data.
        seeds = judges + sum(rung.seeds for rung in rungs)
        short = any(rung.steps < 1 for rung in rungs)
        if times * k <= whole.shape[1] and seeds <= whole.shape[2] and not (short and half is None):
            value, loops = of_rule(times, rungs)
            low, high = bootstrap_ci(value - reference)
            print(f"| {name} | {loops:.1f} | {value.mean():.3f} | "
                  f"{np.mean(value - reference):+.4f} [{low:+.4f}, {high:+.4f}] |")


# ------------------------------------------------------------------------------- learning

def learn(rule: str, seed: int) -> dict:
    """A line: outer_loop.rest_em with rewards from a race."""
    times, rungs = RULES[rule]
    with tempfile.TemporaryDirectory() as folder:
        run, train, held_out = start(seed, folder, times)
        cfg, loops = run.cfg, 0.0
        print(f"\n=== {rule}, seed {seed}", flush=True)
        for t in range(cfg.iterations):
            model = run.load(t)
            evaluate(cfg, run, model, held_out, t)
            tasks = next_tasks(train, t, cfg.tasks)
            edits = sample_edits(run, model, tasks, t, "train", cfg.edits)
            run_rung = trainer(run, model, tasks, edits, t)
            scores, taken = race(rungs, cfg.tasks, cfg.edits, run_rung)
            loops += taken
            kept = select(cfg, scores.tolist(), edits, [0.0] * cfg.tasks, t)
            m_step(cfg, run, model, [(tasks[i], edits[i][j], 1.0) for i, j in kept], t)
            run.save(t + 1, model)
        evaluate(cfg, run, run.load(cfg.iterations), held_out, cfg.iterations)
        return {"part": "learning", "rule": rule, "seed": seed, "inner loops": loops,
                "reward": [m["eval_reward"] for m in run.metrics.records]}


def learning_table(records):
    """Print held-out rewards, with intervals over seeds, and differences seed by seed."""
    print("\n| rewards | inner loops | held-out reward, by round | gain | last round, against "
          f"{LEARNING[0]} |\n|---|---|---|---|---|")
    last = {(r["rule"], r["seed"]): r["reward"][-1] for r in records}
    for rule in LEARNING:
        rows = [r for r in records if r["rule"] == rule]
        both = [r["seed"] for r in rows if (LEARNING[0], r["seed"]) in last]
        if both:
            rewards = np.array([r["reward"] for r in rows])
            (gain,), (half,) = mean_ci(rewards[:, -1:] - rewards[:, :1])
            (less,), (ci,) = mean_ci([[last[rule, s] - last[LEARNING[0], s]] for s in both])
            loops = np.mean([r["inner loops"] for r in rows])
            means = " -> ".join(f"{x:.3f}" for x in rewards.mean(0))
            print(f"| {rule} | {loops:.0f} | {means} | {gain:+.3f} ±{half:.3f} | "
                  f"{less:+.3f} ±{ci:.3f} |")


def draw(records, file):
    """A figure: the gain of each rule over its cost."""
    figure, axes = pyplot().subplots(figsize=(6, 4.2), layout="constrained")
    for rule in LEARNING:
        rows = [r for r in records if r["rule"] == rule]
        gains = np.array([[r["reward"][-1] - r["reward"][0]] for r in rows])
        if rows:
            mean, half = mean_ci(gains)
            loops = [r["inner loops"] for r in rows]
            axes.plot(loops, gains[:, 0], ".", color="#bbb")
            axes.errorbar([np.mean(loops)], mean, np.nan_to_num(half), marker="o", capsize=3,
                          label=rule)
    axes.set_xlabel("inner loops of a run")
    axes.set_ylabel("gain of held-out reward (95 % interval over seeds)")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    save(figure, file)


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("--out", required=True, help="JSON lines, one per seed and rule")
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    ap.add_argument("--part", choices=("choosing", "learning"), help="default: both")
    ap.add_argument("--rules", nargs="+", choices=LEARNING, default=LEARNING, metavar="RULE",
                    help="to learn with (default: all)")
    ap.add_argument("--released", metavar="FILE", help="passages with the authors' verdicts")
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    args = ap.parse_args()
    done = Lines(args.out)
    known = {(r["seed"], r.get("rule")) for r in done.records}
    for seed in args.seeds:
        if args.part != "learning" and (seed, None) not in known:
            done.add(try_often(seed))
        for rule in args.rules:
            if args.part != "choosing" and (seed, rule) not in known:
                done.add(learn(rule, seed))

    if args.released:
        whole = released(args.released)
        choosing_table(f"the authors' {len(whole)} passages, the best self-edit", whole.shape[1],
                       whole, None, keep=1, judges=1, against="two seeds")
    tried = [r for r in done.records if r["part"] == "choosing"]
    if tried:
        whole, half = (np.concatenate([r[name] for r in tried]) for name in ("whole", "half"))
        choosing_table(f"{len(whole)} towns, the two best self-edits", whole.shape[1] // 2,
                       whole, half, keep=2, judges=3, against="three seeds")
    learned = [r for r in done.records if r["part"] == "learning"]
    if learned:
        learning_table(learned)
        if args.svg:
            draw(learned, args.svg)


if __name__ == "__main__":
    cli(main)
