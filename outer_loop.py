"""SEAL's outer loop: ReST-EM teaches a model to write the self-edits that teach it best.

    python outer_loop.py                        # a tiny world, in minutes on a laptop
    python outer_loop.py --preset knowledge --model DIR_OR_HUB_ID --train-data FILE --eval-data FILE

Algorithm 1 of the paper (arXiv 2506.10943) is `rest_em` below. A run is a folder: config.json;
edits.jsonl, what was sampled; rollouts.jsonl, a line per self-edit with its text, answers, verdicts
and reward; metrics.jsonl, a line per iteration; iter_N/, the weights after round N, which any
Hugging Face program opens. The same command resumes it. Simplified: one process on one device.
"""
import dataclasses
import random
import resource
import time
from collections import Counter

import numpy as np
import torch

from checkpoint import UserError, cli
from lora import Adapters
from run import Meter, Run, make_recipe, parse_args
from selfedit import seed_for
from sft import dialogue, sft
from stats import bootstrap_ci

# ------------------------------------------------------------------------------- Algorithm 1

def rest_em(cfg, run):
    """Train; returns the held-out tasks. What was measured is in run.metrics."""
    train, held_out = run.tasks(cfg.train_data), run.tasks(cfg.eval_data)[:cfg.eval_tasks]
    random.Random(seed_for(cfg.seed, "order of the passages")).shuffle(train)
    if cfg.iterations * cfg.tasks > len(train):
        run.log(f"note: {cfg.iterations} rounds of {cfg.tasks} tasks, but there are "
                f"{len(train)}: some will be seen again")
    for t in range(run.last_checkpoint(), cfg.iterations + 1):
        model = run.load(t)                                                      # theta_t
        evaluate(cfg, run, model, held_out, t)
        if t == cfg.iterations:
            return held_out
        batch = [i % len(train) for i in range(t * cfg.tasks, (t + 1) * cfg.tasks)]
        tasks = [train[i] for i in batch]                                        # (C, tau) ~ D
        edits = run.sample(model, tasks, t, "train", cfg.edits)                  # SE ~ LM(. | C)
        without = run.unadapted(model, tasks)                                    # theta on tau
        rewards = run.rewards(model, tasks, edits, t, "train", without, cfg.seeds)  # theta' on tau
        kept = select(rewards, edits, cfg.select, cfg.keep, without if cfg.strict else None,
                      random.Random(seed_for(cfg.seed, t, "select")))
        run.log(f"round {t + 1}: mean reward {np.mean(rewards):.3f}, un-adapted "
                f"{np.mean(without):.3f}; kept {len(kept)} self-edits with mean reward "
                f"{np.mean([rewards[i][j] for i, j in kept] or [0]):.3f}")
        if cfg.restart:
            del model  # never two copies of the weights
            model = run.load(0)
        m_step(cfg, run, model, [(tasks[i], edits[i][j]) for i, j in kept], t)   # theta_t+1
        run.save(t + 1, model)


def select(rewards, edits, how="best", keep=1, floor=None, rng=None):
    """(task, edit) indices of the self-edits to learn from: each task's best ones, the first of
    equals; all those with reward 1 (Eq. 4); or any.

    NOTE(paper): Eq. 2 gives a reward of 1 only if the update improves the model; the official code
    keeps the best of K regardless, and so do we, unless each task has a `floor` (--strict). A
    self-edit with nothing to learn from is never kept."""
    kept = []
    for i, row in enumerate(rewards):
        usable = [j for j in range(len(row)) if edits[i][j].documents]
        if how == "solved":
            chosen = [j for j in usable if row[j] == 1]
        else:
            order = lambda j: rng.random() if how == "random" else -row[j]
            chosen = sorted(usable, key=order)[:keep]
        kept += [(i, j) for j in chosen if floor is None or row[j] > floor[i]]
    return kept


def m_step(cfg, run, model, kept, t):
    """theta_t+1 <- SFT(theta_t, kept (prompt -> self-edit) pairs), merged into the weights.

    The loss is on the completion only, exactly as it was sampled, EOS included.
    NOTE(paper): an edit that ran to the cap has no EOS, and none is added: the official code adds
    one, and so teaches the model to stop there."""
    if not kept:
        run.log("M-step: no self-edit was kept; the model stays as it is")
        return
    recipe, examples = make_recipe(cfg, "outer"), []
    for task, edit in kept:
        examples.append(dialogue(run.tok.prompt(task.prompt), edit.token_ids))
    job = recipe.job(examples, seed_for(cfg.seed, t, "M-step"))
    ((_, trained),) = sft(model, [job], recipe, Meter("steps of the M-step"))
    if trained.diverged:
        raise UserError(f"the M-step of round {t + 1} diverged; try a lower --outer-lr, "
                        "in a new --run-dir")
    adapters = Adapters(model, 1, recipe.rank, recipe.alpha, recipe.targets)
    adapters.flat[0] = trained.weights
    adapters.merge(0)
    run.log(f"M-step: {len(kept)} self-edits, {len(trained.losses)} steps, "
            f"{trained.seconds:.0f} s, loss {trained.losses[0]:.3f} -> {trained.losses[-1]:.3f}")


def evaluate(cfg, run, model, tasks, t):
    """Held-out reward of theta_t, with an inner loop per self-edit: a line of metrics.jsonl."""
    if any(m["iteration"] == t for m in run.metrics):
        return  # a resumed run has it already
    edits = run.sample(model, tasks, t, "eval", cfg.eval_edits)
    without = run.unadapted(model, tasks)
    baselines = run.baselines(model, tasks, without) if cfg.baselines and t == 0 else []
    rewards = np.mean(run.rewards(model, tasks, edits, t, "eval", without, 1), axis=1)
    before = [r["reward"] for r in run.rollouts.of(t - 1, "train")]
    forms = Counter(tasks[i].form(line) for i, row in enumerate(edits) for edit in row
                    for line in edit.text.splitlines() if tasks[i].form)
    chosen = Counter(name if value is True else f"{name} {value}" for row in edits for edit in row
                     for name, value in edit.directives.items() if value is not False)
    shares = lambda counter, n: {name: count / n for name, count in counter.most_common()}
    run.metrics_lines.add({
        "iteration": t, "eval_reward": float(np.mean(rewards)), "eval_ci": bootstrap_ci(rewards),
        "eval_by_kind": run.by_kind(tasks, t, "eval"), "eval_unadapted": float(np.mean(without)),
        "eval_tasks": len(tasks), "baselines": baselines,
        "train_reward": float(np.mean(before)) if before else None,  # of the round that led here
        "forms": shares(forms, forms.total()), "directives": shares(chosen, np.size(edits)),
        "seconds": round(time.time() - run.begin, 1)})
    run.log(describe(run.metrics[-1]))


def describe(m):
    """A line of metrics.jsonl, for people."""
    low, high = m["eval_ci"]
    return (f"iteration {m['iteration']}: held-out reward {m['eval_reward']:.3f} "
            f"[{low:.3f}, {high:.3f}]{by_kind(m['eval_by_kind'])} on {m['eval_tasks']} tasks, "
            f"un-adapted {m['eval_unadapted']:.3f}")


def by_kind(accuracy):
    """' (forward .81, reversed .05)', or nothing."""
    kinds = ", ".join(f"{kind} {share:.3f}" for kind, share in accuracy.items())
    return f" ({kinds})" if kinds else ""


def summary(run, held_out):
    """What the run showed: a line of figures each for the baselines, the reward, what self-edits
    are made of and what they choose; then a passage's self-edit before and after."""
    first, last, lines = run.metrics[0], run.metrics[-1], []
    arrows = lambda values: " -> ".join(f"{value:.3f}" for value in values)
    if first["baselines"]:
        lines.append(", ".join(f"{b['name']} {b['reward']:.3f}{by_kind(b['by_kind'])}"
                               for b in first["baselines"]))
    kinds = ", ".join(f"{kind} {arrows(m['eval_by_kind'][kind] for m in run.metrics)}"
                      for kind in first["eval_by_kind"])
    lines.append(f"with a self-edit {arrows(m['eval_reward'] for m in run.metrics)}"
                 + f" ({kinds})" * bool(kinds))
    for what, key in ("lines of self-edits", "forms"), ("directives", "directives"):
        names = list(dict.fromkeys([*first[key], *last[key]]))[:24]
        shares = ", ".join(f"{name} {first[key].get(name, 0):.0%} -> {last[key].get(name, 0):.0%}"
                           for name in names)
        lines += [f"{what}: {shares}"] if shares else []
    shown = "\n".join(held_out[0].context or held_out[0].queries[:1])
    lines.append(f"\nA task it was not trained on:\n{shown}")
    for m in (first, last):
        r = next(r for r in run.rollouts.of(m["iteration"], "eval") if not r["task"] + r["edit"])
        lines.append(f"\nits self-edit at iteration {m['iteration']}, reward {r['reward']:.2f}:\n"
                     + "".join(c if c.isprintable() or c == "\n" else "?" for c in r["text"]))
    return "\n".join(lines)


# ------------------------------------------------------------------------------- a run


# ------------------------------------------------------------------------------- command line


def main():
    cfg = parse_args()
    run = Run(cfg)
    run.log("\n".join(f"{name:>18} {value}" for name, value in dataclasses.asdict(cfg).items()))
    held_out = rest_em(cfg, run)
    run.log("\n" + summary(run, held_out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    run.log(f"{time.time() - run.begin:.0f} s, peak memory {peak / 2 ** 30:.1f} GiB; "
            f"everything is in {run.folder}: read its rollouts.jsonl")


if __name__ == "__main__":
    cli(main)
