"""The paper's tables and figures, with the statistics they lack.

    python eval.py single --preset knowledge --model DIR_OR_HUB_ID --eval-data FILE [--run RUN_DIR]
    python eval.py cpt --preset cpt-v1 --model DIR_OR_HUB_ID --eval-data FILE
    python eval.py continual --preset knowledge --model DIR_OR_HUB_ID --eval-data FILE
    python eval.py arc --preset arc --model DIR_OR_HUB_ID [--run RUN_DIR]

They take outer_loop.py's flags, --preset tiny being the default there as well,
and keep what they did in --run-dir; the same command resumes. The table is printed, and written as
JSON beside it.
"""
import argparse
import json
import random
import re
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from checkpoint import UserError, cli, read_json, replace_file
from data.arc import picture
from inner_loop import ask, grade_all, make_job
from lora import Adapters
from run import Lines, Meter, Run, in_prompt, parse_args
from selfedit import read_self_edit, sample_self_edits, seed_for
from sft import Example, Running, pack, sft
from stats import bootstrap_ci, forgetting, share


# ------------------------------------------------------------------------------- one passage

class Table:
    """Rows for self-edits: an adapter each, of which the run's folder keeps what it answered."""

    def __init__(self, run, tasks):
        self.run, self.tasks = run, tasks
        self.base = run.verdicts(run.load(0), tasks)
        self.without = [float(np.mean(row)) for row in self.base]
        self.rows = [{"row": "no adaptation", "accuracy": self.without}]

    def add(self, name, edits, t=0):
        """A row: theta_t trained on each task's self-edits."""
        run = self.run
        run.rewards(run.load(t), self.tasks, edits, t, name, self.without, run.cfg.seeds)
        self.rows.append(row_of(name, run.rollouts.of(t, name), self.base))
        return self.rows[-1]

    def add_rounds(self, folder, k):
        """A row for k self-edits of each checkpoint of another run."""
        run = self.run
        run.checkpoints = Path(folder)
        rounds = len(list(run.checkpoints.glob("iter_*[0-9]")))
        if not rounds:
            raise UserError(f"{folder}: no checkpoint iter_1 there")
        for t in range(1, rounds + 1):
            edits = run.sample(run.load(t), self.tasks, t, "eval", k)
            self.add(f"self-edits after round {t}", edits, t)


def passages(run):
    """The held-out passages, with which some experiments alone can do anything."""
    tasks = run.tasks(run.cfg.eval_data)
    if not tasks[0].context:
        raise UserError("this experiment is about passages; for puzzles: python eval.py arc")
    return tasks


def single(argv):
    """One adapter per passage (the paper's Table 2, left). --run RUN_DIR adds a row for each of its
    checkpoints, --edits-from FILE [FILE ...] one for each kind of self-edit in JSON files (a record
    has "title", "context" and "edits": {kind: text}, or the "released" ones of the authors)."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--run")
    own.add_argument("--edits-from", nargs="+", default=[])
    mine, rest = own.parse_known_args(argv)
    cfg = parse_args(["--run-dir", "runs/single", *rest], single.__doc__, ("model", "eval_data"))
    run = Run(cfg)
    tasks = passages(run)[:cfg.eval_tasks]
    table, model = Table(run, tasks), run.load(0)
    own_edits = run.sample(model, tasks, 0, "eval", 1)
    steps = [max(1, make_job(model, run.tok, edit, 0, run.recipe).steps) for edit, in own_edits]
    passage = [[task.references["passage only"]] for task in tasks]
    table.add("passage only", passage)
    reference = table.add("passage only, step-matched", [
        [replace(edit, directives={"epochs": n})] for (edit,), n in zip(passage, steps)])
    table.add("its own self-edits", own_edits)
    for name, texts in imported(mine.edits_from, tasks).items():
        table.add(name, [[read_self_edit(task, text, run.tok.encode(text))]
                         for task, text in zip(tasks, texts)])
    table.rows.append({"row": "passage in the prompt",
                       "accuracy": run.unadapted(run.load(0), in_prompt(tasks))})
    if mine.run:
        table.add_rounds(mine.run, 1)
    report(run, "single", argv, table, reference)


# ------------------------------------------------------------------------------- puzzles

def arc(argv):
    """Success on puzzles (the paper's Table 1): in-context learning, self-edits before RL and, with
    --run RUN_DIR, after each round of it, and the oracle. A picture of each puzzle is written."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--run")
    mine, rest = own.parse_known_args(argv)
    cfg = parse_args(["--preset", "tiny-arc", "--run-dir", "runs/arc", *rest], arc.__doc__,
                     ("model", "eval_data"))
    run = Run(cfg)
    tasks = run.tasks(cfg.eval_data)[:cfg.eval_tasks]
    if tasks[0].context:
        raise UserError("this experiment is about puzzles; for passages: python eval.py single")
    table = Table(run, tasks)
    table.rows[0]["row"] = "in-context learning"
    reference = table.add("its own self-edits", run.sample(run.load(0), tasks, 0, "eval",
                                                           cfg.eval_edits))
    for name in tasks[0].references:
        table.add(name, [[task.references[name]] for task in tasks])
    if mine.run:
        table.add_rounds(mine.run, cfg.eval_edits)
    report(run, "arc", argv, table, reference)
    for i, task in enumerate(tasks):
        attempts = {f"{r['split']} {r['edit']}": r["answers"][0] for r in run.rollouts.records
                    if r["task"] == i and r["answers"]}
        name = re.sub(r"[^\w-]+", "_", f"{i}_{task.name}")
        replace_file(run.folder / f"{name}.svg", picture(task, attempts))
    run.log(f"pictures of the puzzles: {run.folder}/*.svg")


# ------------------------------------------------------------------------------- rows

def row_of(name, records, base):
    """A row of the table, from the rollouts of each task's self-edits; `base` are the verdicts
    without adaptation."""
    rewards = [[r["reward"] for r in records if r["task"] == i] for i in range(len(base))]
    pairs = [(before, after) for r in records for right in r["right"]
             for before, after in zip(base[r["task"]], right)]
    return {"row": name, "accuracy": [float(np.mean(row)) for row in rewards],
            "gained": share(pairs, False), "lost": share(pairs, True),
            "cut": sum(r["cut"] for r in records) / max(1, sum(r["replies"] for r in records)),
            "documents": float(np.mean([r["documents"] for r in records])),
            "tokens": float(np.mean([len(r["token_ids"]) for r in records])),
            "seconds": float(np.mean([r["seconds"] / max(1, len(r["right"])) for r in records]))}


def imported(files, tasks):
    """{kind: [a text per task]} of the self-edits that JSON files hold for these passages."""
    found = defaultdict(dict)
    for file in files:
        for record in read_json(file):
            kinds = record.get("edits") or {
                kind: x["edit"] for kind, x in record.get("released", {}).items() if x.get("edit")}
            for kind, text in kinds.items():
                found[kind][record["title"] + "\n" + record["context"]] = text
    for kind, texts in found.items():
        if lacking := [task.name for task in tasks if task.context[0] not in texts]:
            raise UserError(f"no {kind} self-edit of {lacking[0]!r} in {', '.join(files)}")
    return {kind: [texts[task.context[0]] for task in tasks] for kind, texts in found.items()}


def report(run, name, argv, table, reference):
    """Print a table, differences from the `reference` row in pairs, and write it as JSON."""
    rows = table.rows
    head = (f"{'':>32}  {'accuracy [95 % CI]':<24}   {'over ' + reference['row']:<33}"
            "gained   lost    cut  docs  tokens  s/adapter")
    run.log(f"\n{len(table.tasks)} tasks, {sum(map(len, table.base))} questions, {run.cfg.seeds} "
            f"seeds; means over tasks, differences in pairs\n{head}")
    interval = lambda x: "{:6.3f} [{:6.3f}, {:6.3f}]".format(np.mean(x), *bootstrap_ci(x))
    for row in rows:
        row["mean"], row["ci"] = float(np.mean(row["accuracy"])), bootstrap_ci(row["accuracy"])
        line = f"{row['row']:>32}  {interval(row['accuracy'])}  "
        if row is not reference:
            difference = np.subtract(row["accuracy"], reference["accuracy"])
            row["difference"] = float(difference.mean())
            row["difference_ci"] = bootstrap_ci(difference)
            line += f" {interval(difference)}"
        if "gained" in row:
            line = (f"{line:<92}{row['gained']:6.3f} {row['lost']:6.3f} {row['cut']:6.3f} "
                    f"{row['documents']:5.1f} {row['tokens']:7.0f} {row['seconds']:10.1f}")
        run.log(line)
    replace_file(run.folder / f"{name}.json", json.dumps(
        {"command": ["eval.py", name, *argv], "seed": run.cfg.seed, "rows": rows}, indent=1))
    run.log("gained: of the questions missed without adaptation; lost: of those known; "
            f"cut: answers at the cap. Also in {run.folder / name}.json")


# ------------------------------------------------------------------------------- continual

def continual(argv):
    """Passages in a row, each learned by a self-edit on top of the ones before (the paper's Figure
    6). --streams N sequences of --length L passages are learned side by side."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--streams", type=int, default=8)
    own.add_argument("--length", type=int, default=8)
    mine, rest = own.parse_known_args(argv)
    cfg = parse_args(["--run-dir", "runs/continual", *rest], continual.__doc__,
                     ("model", "eval_data"))
    run, length = Run(cfg), mine.length
    tasks = passages(run)
    if length > len(tasks):
        raise UserError(f"--length {length}: there are {len(tasks)} passages")
    model, steps = run.load(0), Lines(run.folder / "continual.jsonl")
    streams = [random.Random(seed_for(cfg.seed, s, "stream")).sample(tasks, length)
               for s in range(mine.streams)]
    # What a stream has learned is a sum of low-rank terms: one adapter of rank length * r, whose
    # first k * r components are trained and fixed after k edits, and whose last are zero.
    r = run.recipe.rank
    wide = replace(run.recipe, rank=length * r, alpha=length * run.recipe.alpha)
    stack = Adapters(model, mine.streams, wide.rank, wide.alpha, wide.targets)
    if edited := len(steps.records) - 1 if steps.records else 0:
        stack.flat.copy_(load_file(run.folder / f"after_{edited}.safetensors")["flat"])
    if not steps.records:
        steps.add({"edit": 0, "accuracy": [run.unadapted(model, row) for row in streams]})
    for k in range(edited, length):
        now = [row[k] for row in streams]
        edits = sample_self_edits(model, run.tok, now, 1,
                                  [[seed_for(cfg.seed, s, k, "edit")] for s in range(len(now))],
                                  cfg.temperature, cfg.top_p, cfg.max_edit_tokens,
                                  Meter("self-edits"), adapters=stack)
        free, fresh = stack.part(k * r, k * r + r), Adapters(model, 1, wide.rank, 1, wide.targets)
        jobs, owner = [], []
        for s, (edit,) in enumerate(edits):
            if edit.documents:
                job = make_job(model, run.tok, edit, seed_for(cfg.seed, s, k, "adapter"), wide)
                fresh.init(0, job.seed)
                jobs.append(replace(job, start=stack.flat[s] + fresh.flat[0] * free, free=free))
                owner.append(s)
        for j, trained in sft(model, jobs, wide, Meter(f"steps of edit {k + 1} of {length}")):
            if not trained.diverged:
                stack.flat[owner[j]] = trained.weights
        right = examine(run, model, [row[:k + 1] for row in streams], list(stack.flat), wide)
        accuracy = [[float(np.mean(verdicts)) for verdicts in row] for row in right]
        save_file({"flat": stack.flat}, run.folder / f"after_{k + 1}.safetensors")
        steps.add({"edit": k + 1, "accuracy": accuracy, "texts": [edit.text for edit, in edits]})
        run.log(f"edit {k + 1} of {length}: just learned "
                f"{np.mean([row[-1] for row in accuracy]):.3f}, all so far {np.mean(accuracy):.3f}")
    result = forgetting([r["accuracy"] for r in steps.records[:length + 1]])
    run.log(f"\n{mine.streams} streams; accuracy on each passage after so many edits, mean (and "
            "standard error over streams)")
    for k, (mean, error) in enumerate(result.pop("matrix")):
        run.log(f"{k:>4}  " + "  ".join(f"{m:.3f} ({e:.3f})" for m, e in zip(mean, error)))
    for what, (mean, error) in result.items():
        run.log(f"{what:>44} {mean:7.3f} ({error:.3f})")
    replace_file(run.folder / "continual.json", json.dumps(
        {"command": ["eval.py", "continual", *argv], "seed": cfg.seed, **result}, indent=1))


def examine(run, model, groups, weights, recipe):
    """Verdicts on groups of tasks, each group under one adapter: a list per task, per group."""
    together = [replace(tasks[0], queries=[q for task in tasks for q in task.queries])
                for tasks in groups]
    answers, _ = ask(model, run.tok, together, weights, recipe, **run.asking)
    return [grade_all(tasks, [[next(texts) for _ in task.queries] for task in tasks])
            for tasks, texts in zip(groups, map(iter, answers))]


# ------------------------------------------------------------------------------- all passages

def cpt(argv):
    """All passages learned at once (the paper's Table 2, continued pretraining): by one adapter, as
    --preset cpt-v1 says, or with all weights (--preset cpt-v2 --full). A document is a whole
    self-edit, not a piece of one: --edits of each passage, and the passage itself."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--full", action="store_true")
    own.add_argument("--edits-from", nargs="+", default=[])
    mine, rest = own.parse_known_args(argv)
    cfg = parse_args(["--run-dir", "runs/cpt", *rest], cpt.__doc__, ("model", "eval_data"))
    run, model = Run(cfg), None
    tasks, done = passages(run)[:cfg.eval_tasks], Lines(run.folder / "cpt.jsonl")
    contexts = [text for task in tasks for text in task.context]
    edits = run.sample(run.load(0), tasks, 0, "eval", cfg.edits)
    corpora = {"passages": [], "passages and its own self-edits":
               [edit.text for row in edits for edit in row if edit.text]}
    corpora |= {f"passages and {kind}": texts
                for kind, texts in imported(mine.edits_from, tasks).items()}
    table = Table(run, tasks)
    for name, texts in corpora.items():
        if any(r["row"] == name for r in done.records):
            continue
        documents = [run.tok.document(text)[:run.load(0).config.max_len]
                     for text in contexts + texts]
        right, losses, begin = [], [], time.time()
        for seed in range(cfg.seeds):
            model, meter = run.load(0), Meter(f"steps, {name}")
            job = run.recipe.job([(ids, [True] * len(ids)) for ids in documents],
                                 seed_for(cfg.seed, name, seed, "adapter"))
            if mine.full:
                losses.append(tune_all(model, job, run.recipe, meter))
                right.append(run.verdicts(model, tasks))
                run.loaded = None, None  # its weights are no longer those of the checkpoint
            else:
                ((_, trained),) = sft(model, [job], run.recipe, meter)
                losses.append(trained.losses)
                right += examine(run, model, [tasks], [trained.weights], run.recipe)
        done.add({"row": name, "right": right, "documents": len(documents),
                  "tokens": sum(map(len, documents)), "steps": len(losses[0]),
                  "losses": [[x[0], x[-1]] for x in losses], "seconds": time.time() - begin})
        run.log(f"{name}: {len(documents)} documents, {len(losses[0])} steps, "
                f"loss {losses[0][0]:.3f} -> {losses[0][-1]:.3f}")
    for r in done.records:
        pairs = [(before, after) for seed in r["right"] for own_row, row in zip(table.base, seed)
                 for before, after in zip(own_row, row)]
        table.rows.append({
                     "row": r["row"], "documents": r["documents"], "tokens": r["tokens"],
                     "accuracy": np.mean([[np.mean(row) for row in seed] for seed in r["right"]],
                                         axis=0).tolist(),
                     "gained": share(pairs, False), "lost": share(pairs, True), "cut": np.nan,
                     "seconds": r["seconds"] / cfg.seeds})
    report(run, "cpt", argv, table, table.rows[1])


def tune_all(model, job, recipe, progress):
    """SFT of all weights, in place, by torch's own AdamW; the learning rate rises over the first
    3 % of the steps (v2 of the paper) and falls linearly to 0. Returns the losses."""
    model.requires_grad_(True)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=job.lr, weight_decay=0), []
    examples = [Example.prepare(*example) for example in job.examples]
    order, warmup = list(job.micro_batches()), 0.03 * job.steps
    for step, batch in enumerate(order):
        run = Running(0, job, iter([batch]), examples, 0)
        ribbon, _, ids, source, labels, _, _ = pack([run], model.device)
        h = model.hidden(ids, ribbon.position, ribbon.attend)[source]
        loss = torch.nn.functional.cross_entropy(model.lm_head(h).float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.param_groups[0]["lr"] = job.lr * min(
            (step + 1) / max(1, warmup), (job.steps - step) / (job.steps - warmup))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        progress(step + 1, job.steps)
    model.requires_grad_(False)
    return torch.stack(losses).tolist()


# ------------------------------------------------------------------------------- reliability


# ------------------------------------------------------------------------------- judges


def main():
    commands = {f.__name__: f for f in (single, cpt, continual, arc)}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        raise UserError(f"usage: python eval.py {{{','.join(commands)}}} ... (-h explains each)")
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    cli(main)
