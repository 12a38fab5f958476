"""The paper's tables and figures, with the statistics they lack.

    python eval.py single --preset knowledge --model DIR_OR_HUB_ID --eval-data FILE [--run RUN_DIR]
    python eval.py cpt --preset cpt-v1 --model DIR_OR_HUB_ID --eval-data FILE
    python eval.py continual --preset knowledge --model DIR_OR_HUB_ID --eval-data FILE
    python eval.py arc --preset arc --model DIR_OR_HUB_ID [--run RUN_DIR]
    python eval.py reliability RUN_DIR             # how far a reward, and best-of-K, can be trusted
    python eval.py judges FILE                     # agreement with GPT-4.1 on released verdicts
    python eval.py curve RUN_DIR [RUN_DIR ...] --svg FILE   # held-out reward over iterations

The first four take outer_loop.py's flags, --preset tiny being the default there as well,
and keep what they did in --run-dir; the same command resumes. The table is printed, and written as
JSON beside it.
"""
import argparse
import html
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

from data import knowledge
from data.arc import BETWEEN
from inner_loop import Example, Running, ask, grade_all, make_job, pack, sft
from lora import Adapters
from model import UserError, cli, load_pretrained, read_json
from outer_loop import (Lines, Meter, Run, bootstrap_ci, in_prompt, model_judge,
                        parse_args, replace_file)
from selfedit import read_self_edit, sample_self_edits, seed_for
from tokenizer import Tokenizer


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


# As ARC's own site shows the colours 0 to 9.
COLOURS = "#000 #0074d9 #ff4136 #2ecc40 #ffdc00 #aaa #f012be #ff851b #7fdbff #870c25".split()


def picture(task, attempts, cell=14, gap=24):
    """An SVG of a puzzle: for each grid to find a line with the input and the truth, then lines of
    attempts, two for each self-edit. attempts {name: [an answer per question]}."""
    lines = []
    for q, (x, y) in enumerate(zip(task.questions, task.answers)):
        tries = [(f"{name}, {'first' if k == 0 else 'second'}{' (right)' * (text == y)}", text)
                 for name, answers in attempts.items()
                 for k, text in enumerate(answers[q].split(BETWEEN)) if text]
        lines += [[("input", x), ("truth", y)], *(tries[i:i + 4] for i in range(0, len(tries), 4))]
    parts, top, width = [], 0, 0
    for line in lines:
        left = 0
        for words, text in line:
            rows = text.split("\n")
            parts.append(f'<text x="{left}" y="{top + 12}">{html.escape(words)}</text>')
            parts += [f'<rect x="{left + cell * j}" y="{top + 18 + cell * i}" width="{cell}" '
                      f'height="{cell}" fill="{COLOURS[int(c)]}" stroke="#555"/>'
                      for i, row in enumerate(rows) for j, c in enumerate(row)]
            left += max(cell * len(rows[0]), 6 * len(words)) + gap
        top += cell * max(text.count("\n") + 1 for _, text in line) + gap + 18
        width = max(width, left)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" '
            f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" '
            f'fill="white"/>' + "".join(parts) + "</svg>\n")


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


def share(pairs, known):
    """Of the questions that were known (or missed) before, the share whose verdict changed."""
    changed = [after != known for before, after in pairs if before == known]
    return float(np.mean(changed or [np.nan]))


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


def forgetting(accuracy):
    """What a row of edits did; accuracy[k][stream][passage], after k edits, of the passages seen
    (of all for k = 0). Values are (mean, standard error over streams)."""
    def over_streams(values):
        values = np.asarray(values, float)  # (streams, ...)
        n = len(values)
        error = values.std(0, ddof=1) / n ** 0.5 if n > 1 else np.full_like(values[0], np.nan)
        return values.mean(0).tolist(), error.tolist()
    before, final = np.array(accuracy[0]), np.array(accuracy[-1])             # (streams, passages)
    learned = np.stack([np.array(a)[:, -1] for a in accuracy[1:]], axis=1)    # just after its edit
    return {"matrix": [over_streams(a) for a in accuracy],
            "before any edit": over_streams(before.mean(1)),
            "just after its own edit": over_streams(learned.mean(1)),
            "after the last edit": over_streams(final.mean(1)),
            "gain just after its own edit": over_streams((learned - before).mean(1)),
            "what is left of it after the last edit": over_streams((final - before).mean(1)),
            "forgotten since its own edit": over_streams((learned - final).mean(1))}


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

def reliability(argv):
    """Print how far a run's rewards can be trusted: between the seeds of the inner loop, and what
    the best of K is worth by seeds that did not choose it."""
    ap = argparse.ArgumentParser(description=reliability.__doc__)
    ap.add_argument("run", help="a run's folder")
    rollouts = Lines(Path(ap.parse_args(argv).run) / "rollouts.jsonl").records
    rows = defaultdict(dict)  # (iteration, passage) -> {self-edit: record}
    for r in rollouts:
        if r["split"] == "train" and r["right"]:
            rows[r["iteration"], r["task"]][r["edit"]] = r
    groups = [list(edits.values()) for edits in rows.values()]
    if not groups:
        raise UserError("no rewards of training self-edits in this run")
    accuracy = [np.array([[np.mean(right) for right in r["right"]] for r in group])
                for group in groups]  # per passage (K, seeds)
    seeds = min(a.shape[1] for a in accuracy)
    print(f"{len(groups)} passages, {sum(map(len, groups))} self-edits, {seeds} seeds each")
    if seeds > 1:
        for what, value in variance_components(accuracy).items():
            print(f"  {what:<66} {value:6.3f}")
    everything = [r for group in groups for r in group]
    reward = [r["reward"] for r in everything]
    for what, x in (("tokens", [len(r["token_ids"]) for r in everything]),
                    ("documents", [r["documents"] for r in everything])):
        print(f"  correlation of the reward with the number of {what:<18} "
              f"{np.corrcoef(reward, x)[0, 1] if np.std(x) and np.std(reward) else np.nan:10.3f}")


def variance_components(accuracy):
    """Statistics of rewards; accuracy: per passage (K, seeds).

    The variance between the self-edits of a passage is measured by the covariance of two seeds, in
    which the seeds' own noise is absent (the mean square between minus within, over all pairs).
    Reliability is that of the mean over all seeds (Spearman-Brown)."""
    noise, true, chosen, held = [], [], [], []
    for a in accuracy:
        k, n = a.shape
        noise.append(a.var(axis=1, ddof=1).mean())
        if k > 1:
            true.append(a.mean(axis=1).var(ddof=1) - noise[-1] / n)
        chosen.append(a.mean(axis=1).max())
        for out in range(n):  # choose without one seed, and ask that seed what the choice is worth
            held.append(a[np.delete(a, out, axis=1).mean(axis=1).argmax(), out])
    within, between, n = np.mean(noise), max(0.0, np.mean(true or [0])), accuracy[0].shape[1]
    return {"standard deviation of one inner loop, over seeds": within ** 0.5,
            "true standard deviation between the self-edits of a passage": between ** 0.5,
            f"reliability of a {n}-seed mean, among the edits of a passage":
                between / (between + within / n) if between + within else np.nan,
            "mean reward": np.mean([a.mean() for a in accuracy]),
            "the best of K, by the seeds that chose it": np.mean(chosen),
            "the best of K, chosen without one seed, by that seed": np.mean(held)}


# ------------------------------------------------------------------------------- judges

def agreement(a, b):
    """(share of equal verdicts, Cohen's kappa: how far that is beyond chance)."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    observed = (a == b).mean()
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return observed, (observed - chance) / (1 - chance) if chance < 1 else 1.0


def judges(argv):
    """Print how far judges agree with the released verdicts of GPT-4.1, by method: the rules, and
    with --model DIR_OR_HUB_ID that model; --openai adds the endpoint of --judge openai."""
    ap = argparse.ArgumentParser(description=judges.__doc__)
    ap.add_argument("file", help="JSON list of passages, each with released: {method: {answers: "
                    "[{question, gold, baseline, baseline_ok, adapter, adapter_ok}]}}")
    ap.add_argument("--model", help="folder or hub id of a model that judges")
    ap.add_argument("--openai", action="store_true", help="ask an OpenAI-compatible endpoint, too")
    ap.add_argument("--limit", type=int, help="only so many answers of each method")
    args = ap.parse_args(argv)
    file, one_by_one = args.file, lambda judge: lambda triples: [judge(*t) for t in triples]
    every = {name: one_by_one(judge) for name, judge in knowledge.JUDGES.items()}
    if args.model:
        model = load_pretrained(args.model)
        tok = Tokenizer.from_pretrained(model.folder)
        every["model"] = lambda triples: model_judge(model, tok, triples)
    if args.openai:
        every["openai"] = knowledge.openai_judge
    records = read_json(file)
    try:
        methods = {method: [(x["question"], x["gold"], x[arm], x[f"{arm}_ok"])
                            for r in records for x in r["released"][method]["answers"]
                            for arm in ("baseline", "adapter")][:args.limit]
                   for method in records[0]["released"]}
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(f"{file}: no released verdicts ({type(e).__name__}: {e})") from None
    print("by GPT-4.1's verdicts; means over passages [95 % CI]; gained: of the questions missed "
          "without adaptation, lost: of those known")
    for method, row in released(records).items():
        print("{:>12}  {:.3f} [{:.3f}, {:.3f}]  gained {:.3f}  lost {:.3f}".format(
            method, np.mean(row["accuracy"]), *bootstrap_ci(row["accuracy"]), row["gained"],
            row["lost"]))
    print()
    print(f"{'answers of':>12} {'n':>6} {'GPT-4.1':>8}"
          + "".join(f" | {name:>10} says right, agrees, kappa" for name in every))
    said = {name: [] for name in every}  # of all methods so far: (verdict, GPT-4.1's)

    def show(label, n):
        line = f"{label:>12} {n:>6} {np.mean([ok for _, ok in said['rule'][-n:]]):8.3f}"
        for pairs in said.values():
            ours, gpt = zip(*pairs[-n:])
            line += " | {:>21.3f}  {:6.3f}  {:5.3f}".format(np.mean(ours), *agreement(ours, gpt))
        print(line, flush=True)

    for method, rows in methods.items():
        for name, judge in every.items():
            verdicts = judge([(q, gold, p) for q, gold, p, _ in rows])
            said[name] += [(bool(p.strip()) and right, ok)
                           for (*_, p, ok), right in zip(rows, verdicts)]
        show(method, len(rows))
    show("all", len(said["rule"]))


def released(records):
    """{method: its row of the paper's table, from the released verdicts alone}."""
    rows = {}
    for method in records[0]["released"]:
        answers = [r["released"][method]["answers"] for r in records]
        pairs = [(x["baseline_ok"], x["adapter_ok"]) for row in answers for x in row]
        rows[method] = {"accuracy": [float(np.mean([x["adapter_ok"] for x in row]))
                                     for row in answers],
                        "gained": share(pairs, False), "lost": share(pairs, True)}
    return rows


def mean_ci(rows):
    """(mean, half of the 95 % interval) over runs, by Student's t. rows (runs, columns)."""
    rows = np.asarray(rows, float)
    n = len(rows)
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}.get(n, 2.26)
    half = t * rows.std(0, ddof=1) / n ** 0.5 if n > 1 else np.full(rows.shape[1], np.nan)
    return rows.mean(0), half


def curve(argv):
    """Print, and draw as SVG, held-out reward over iterations, runs of several seeds together."""
    ap = argparse.ArgumentParser(description=curve.__doc__)
    ap.add_argument("runs", nargs="+", help="run folders, of several seeds")
    ap.add_argument("--svg", help="file to draw to")
    args = ap.parse_args(argv)
    runs = []
    for folder in map(Path, args.runs):
        cfg, metrics = read_json(folder / "config.json"), Lines(folder / "metrics.jsonl").records
        if len(metrics) <= cfg["iterations"]:
            raise UserError(f"{folder}: this run has not ended; repeat its command to resume it")
        runs.append((cfg, metrics))
    differ = [key for key in runs[0][0] if key not in ("seed", "run_dir", "model")
              and any(cfg[key] != runs[0][0][key] for cfg, _ in runs)]
    groups = {}
    for cfg, metrics in runs:  # runs that differ in the seed alone belong together
        said = {key: cfg[key] for key in differ if cfg[key] is not False}
        name = ", ".join(key if value is True else f"{key} {value}" for key, value in said.items())
        groups.setdefault(name or "all runs", []).append(metrics)
    lines = {}
    for name, runs in groups.items():
        reward, half = mean_ci([[m["eval_reward"] for m in run] for run in runs])
        lines[name] = reward, half
        gains = [run[-1]["eval_reward"] - run[0]["eval_reward"] for run in runs]
        gain, gain_half = mean_ci(np.reshape(gains, (-1, 1)))
        arrows = lambda mean, half: " -> ".join(f"{r:.3f} ±{h:.3f}" for r, h in zip(mean, half))
        print(f"{name}, {len(runs)} seeds: {arrows(reward, half)}")
        each = " ".join(f"{g:+.3f}" for g in gains)
        print(f"    gain {gain[0]:+.3f} ±{gain_half[0]:.3f}, by seed {each}")
        for kind in runs[0][0]["eval_by_kind"]:
            by_kind = [[m["eval_by_kind"][kind] for m in run] for run in runs]
            print(f"    {kind} questions: {arrows(*mean_ci(by_kind))}")
        for what, key in ("lines", "forms"), ("chosen", "directives"):
            for item in dict.fromkeys(item for run in runs for m in run for item in m[key]):
                shares = np.mean([[m[key].get(item, 0) for m in run] for run in runs], axis=0)
                if max(shares) >= .02:
                    print(f"    {item} {what}: {' -> '.join(f'{share:.0%}' for share in shares)}")
    if args.svg:
        floor = [b["reward"] for runs in groups.values() for run in runs
                 for b in run[0]["baselines"] if b["name"] == "passage only"]
        Path(args.svg).write_text(draw(lines, np.mean(floor) if floor else None))


def draw(lines, floor):
    """An SVG of {name: (means, half-intervals)} over iterations; `floor` is a dashed line."""
    x = lambda t: 60 + 130 * t
    n = max(len(mean) for mean, _ in lines.values())
    lines = {name: (mean, np.nan_to_num(half)) for name, (mean, half) in lines.items()}
    low = min([floor or 1.0] + [min(mean - half) for mean, half in lines.values()]) - 0.03
    high = max(max(mean + half) for mean, half in lines.values()) + 0.03
    y = lambda r: 300 - 270 * (r - low) / (high - low)
    text = lambda px, py, words, more="": (
        f'<text x="{px:.0f}" y="{py:.0f}" {more}>{html.escape(words)}</text>')
    path = lambda d, colour, more="": f'<path d="{d}" fill="none" stroke="{colour}" {more}/>'
    end = x(n - 1)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{end + 240}" height="350" '
             'font-family="sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="white"/>',
             text(60, 18, "held-out reward (95 % interval over seeds)"),
             text(x((n - 1) / 2), 342, "iteration of ReST-EM", 'text-anchor="middle"')]
    parts += [text(x(t), 322, str(t), 'text-anchor="middle"') for t in range(n)]
    for tick in np.arange(np.ceil(low * 10) / 10, high, 0.1):
        parts += [path(f"M60 {y(tick):.1f}H{end}", "#ddd"),
                  text(28, y(tick) + 4, f"{tick + 0.0:.1f}")]
    if floor is not None:
        parts += [path(f"M60 {y(floor):.1f}H{end}", "#777", 'stroke-dasharray="5"'),
                  text(end + 12, y(floor) + 4, f"passage only {floor:.2f}", 'fill="#777"')]
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
    for (name, (mean, half)), colour in zip(lines.items(), colours):
        points = " L".join(f"{x(t)} {y(r):.1f}" for t, r in enumerate(mean))
        parts.append(path("M" + points, colour, 'stroke-width="2.5"'))
        for t, (r, h) in enumerate(zip(mean, half)):
            parts.append(path(f"M{x(t)} {y(r - h):.1f}V{y(r + h):.1f}", colour))
        parts.append(text(x(len(mean) - 1) + 12, y(mean[-1]) + 4, f"{name} {mean[-1]:.2f}",
                          f'fill="{colour}"'))
    return "\n".join([*parts, "</svg>\n"])


def main():
    commands = {f.__name__: f for f in (single, cpt, continual, arc, reliability, judges, curve)}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        raise UserError(f"usage: python eval.py {{{','.join(commands)}}} ... (-h explains each)")
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    cli(main)
