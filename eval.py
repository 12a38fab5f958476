"""The paper's tables, with the statistics they lack.

    python eval.py single --preset knowledge --model DIR_OR_HUB_ID --eval-data FILE [--run RUN_DIR]
    python eval.py cpt --preset cpt-v1 --model DIR_OR_HUB_ID --eval-data FILE
    python eval.py continual --preset knowledge --model DIR_OR_HUB_ID --eval-data FILE
    python eval.py arc --preset arc --model DIR_OR_HUB_ID [--run RUN_DIR]

single: the left of the paper's Table 2. cpt: its right. continual: Figure 6. arc: Table 1. They
take outer_loop.py's flags (--preset tiny is the default) and keep what they did in --run-dir; the
same command resumes. The table is printed, and written as JSON. torchrun shares out single and arc.
"""
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save

from data import knowledge
from data.arc import write_pictures
from data.tasks import load_passages, load_tasks
from engine.decode import Sampling, collect
from engine.train import sft
from inner_loop import answering, ask, grade_all, in_prompt, inner_recipe, make_job
from lora import Adapters, Job
from model import load_pretrained
from outer_loop import sample, score, unadapted, verdicts
from selfedit import SelfEdit, Task, read_self_edit, sample_self_edits, seed_for, write_asked
from support import page, ranks
from support.config import add_flags, read_flags, read_settings
from support.files import Lines, Parser, UserError, as_json, cli, positive, replace_file
from support.ranks import Meter
from support.report import table_lines
from support.run import Run, print_of_data, print_of_model
from support.stats import forgetting, share_changed

# ------------------------------------------------------------------------------- rows of a table

class Table:
    """The rows of a table. Each self-edit gets an adapter of its own, and its answers are kept in
    the run's folder."""

    def __init__(self, run: Run, tasks: list[Task], first_row="no adaptation"):
        self.run, self.tasks = run, tasks
        self.base = verdicts(run, run.load(0), tasks)       # without adaptation, per task
        self.without = [float(np.mean(row)) for row in self.base]
        self.rows = [{"row": first_row, "accuracy": self.without}]

    def add(self, name: str, edits: list[list[SelfEdit]], t=0, folder=None) -> dict:
        """A row: theta_t (of the run in another folder) trained on each task's self-edits."""
        run, model = self.run, self.run.load(t, folder)
        score(run, model, self.tasks, edits, t, "eval", self.without, run.cfg.seeds, arm=name)
        self.rows.append(row_of(name, run.rollouts.of(t, "eval", name), self.base))
        return self.rows[-1]

    def add_rounds(self, folder, k: int):
        """A row for k self-edits of each checkpoint of the run in another folder."""
        rounds = len(list(Path(folder).glob("iter_*[0-9]")))
        for t in range(1, rounds + 1):
            model = self.run.load(t, folder)
            edits = sample(self.run, model, self.tasks, t, "eval", k)
            self.add(f"self-edits after round {t}", edits, t, folder)


def prints_of_rounds(run: Run, folder) -> dict[str, str]:
    """{iter_1: its fingerprint, ...} of the run in another folder, of the same domain."""
    if not folder:
        return {}
    rounds = sorted(Path(folder).glob("iter_*[0-9]"))
    domain = read_settings(folder)["domain"]
    if not rounds or domain != run.cfg.domain:
        raise UserError(f"{folder}: {len(rounds)} checkpoints iter_1, ... of {domain}; this table "
                        f"is of {run.cfg.domain}")
    return {path.name: print_of_model(path) for path in rounds}


def row_of(name: str, records: list[dict], base: list[list[bool]]) -> dict:
    """A row of a table, from rollouts; `base` are the verdicts without adaptation."""
    # A task's accuracy is the mean over its self-edits, whose reward is the mean over seeds.
    accuracy = []
    for i in range(len(base)):
        accuracy.append(float(np.mean([r["reward"] for r in records if r["task"] == i])))
    # (right before, right after) of every question, seed and self-edit.
    pairs = []
    for r in records:
        for right in r["right"]:
            pairs += zip(base[r["task"]], right)
    replies = sum(r["replies"] for r in records)
    seconds = [r["seconds"] / max(1, len(r["right"])) for r in records]
    return {"row": name, "accuracy": accuracy,
            "gained": share_changed(pairs, known=False),
            "lost": share_changed(pairs, known=True),
            "cut": sum(r["cut"] for r in records) / max(1, replies),
            "documents": float(np.mean([r["documents"] for r in records])),
            "tokens": float(np.mean([len(r["token_ids"]) for r in records])),
            "seconds": float(np.mean(seconds))}


def finish(table: Table, name: str, reference: dict):
    """Print a table, differences from the `reference` row in pairs, and write it as JSON."""
    run = table.run
    run.log(f"\n{len(table.tasks)} tasks, {sum(map(len, table.base))} questions, {run.cfg.seeds} "
            "seeds; means over tasks, differences in pairs")
    run.log(table_lines(table.rows, reference))
    path = run.folder / f"{name}.json"
    if ranks.RANK == 0:
        replace_file(path, as_json({"seed": run.cfg.seed, "rows": table.rows}, indent=1))
        page.refresh(run)
    run.log("gained: of the questions missed without adaptation, now right; lost: of the known "
            f"ones, now wrong; cut: answers at the cap. Also in {path}")


# ------------------------------------------------------------------------------- one passage

STEP_MATCHED = "passage only, step-matched"

def single(args, run: Run):
    """One adapter per passage (the paper's Table 2, left)."""
    cfg = run.cfg
    tasks = load_passages(run)[:cfg.eval_tasks]
    given = knowledge.read_edits(args.edits_from, tasks)
    run.settle("eval single", edits_from=[print_of_data(file) for file in args.edits_from],
               run=prints_of_rounds(run, args.run))
    table = Table(run, tasks)
    model = run.load(0)
    own_edits = sample(run, model, tasks, 0, "eval", 1)
    passage = [[task.references["passage only"]] for task in tasks]
    table.add("passage only", passage)

    # A self-edit has more documents than the passage, and so takes more optimiser steps. Therefore
    # the passage alone is also trained for as many steps as the self-edit.
    matched = []
    for (edit,), (alone,) in zip(own_edits, passage):
        matched.append([for_steps(model, run, alone, steps_of(model, run, edit))])
    reference = table.add(STEP_MATCHED, matched)
    table.add("its own self-edits", own_edits)

    for name, texts in given.items():
        edits = [[read_self_edit(task, text, run.tok.encode(text))]
                 for task, text in zip(tasks, texts)]
        if cfg.own_text:
            seeds = [[seed_for(cfg.seed, name, i)] for i in range(len(tasks))]
            own = Sampling(cfg.max_edit_tokens, 1, cfg.temperature, cfg.top_p, max_rows=cfg.rows)
            list(write_asked(model, run.tok, tasks, edits, own, seeds))
            edits = ranks.gather(edits)[0]      # the same texts for all ranks
        table.add(name, edits)
    table.rows.append({"row": "passage in the prompt",
                       "accuracy": unadapted(run, run.load(0), in_prompt(tasks))})
    if args.run:
        table.add_rounds(args.run, 1)
    finish(table, "single", reference)


def steps_of(model, run, edit: SelfEdit) -> int:
    """Optimiser steps of a self-edit's training; 1 if nothing can be learned from it."""
    try:
        return make_job(model, run.tok, edit, 0, inner_recipe(run.cfg)).steps
    except ValueError:
        return 1


def for_steps(model, run, edit: SelfEdit, steps: int) -> SelfEdit:
    """A self-edit that is trained for as many epochs as come closest to so many steps."""
    once = replace(edit, directives=edit.directives | {"epochs": 1})
    epochs = max(1, round(steps / steps_of(model, run, once)))
    return replace(edit, directives=edit.directives | {"epochs": epochs})


# ------------------------------------------------------------------------------- puzzles

def arc(args, run: Run):
    """Success on puzzles (the paper's Table 1): in context, self-edits before RL, the oracle. A
    picture of each puzzle is written."""
    cfg = run.cfg
    tasks = load_tasks(run, cfg.eval_data)[:cfg.eval_tasks]
    if tasks[0].context:
        raise UserError("this experiment is about puzzles; for passages: python eval.py single")
    run.settle("eval arc", run=prints_of_rounds(run, args.run))
    table = Table(run, tasks, first_row="in-context learning")
    own_edits = sample(run, run.load(0), tasks, 0, "eval", cfg.eval_edits)
    reference = table.add("its own self-edits", own_edits)
    for name in tasks[0].references:
        table.add(name, [[task.references[name]] for task in tasks])
    if args.run:
        table.add_rounds(args.run, cfg.eval_edits)
    finish(table, "arc", reference)
    if ranks.RANK == 0:
        write_pictures(run.folder, tasks, run.rollouts.records)
        run.log(f"pictures of the puzzles: {run.folder}/*.svg")


# ------------------------------------------------------------------------------- continual

def continual(args, run: Run):
    """Passages in a row, each learned by a self-edit on top of the ones before (the paper's Figure
    6); many such streams are learned side by side."""
    cfg, length = run.cfg, args.length
    tasks = load_passages(run)
    if cfg.weight_decay:
        raise UserError("--weight-decay: it would shrink what the earlier edits have taught")
    if length > len(tasks):
        raise UserError(f"--length {length}: there are {len(tasks)} passages")
    run.settle("eval continual", streams=args.streams, length=length)
    streams = []
    for s in range(args.streams):
        rng = random.Random(seed_for(cfg.seed, s, "stream"))
        streams.append(rng.sample(tasks, length))
    done = Lines(run.folder / "continual.jsonl")
    for r in done.records:
        # Before any edit all passages were asked about, then those that were learned.
        sizes = [len(row) for row in r["accuracy"]]
        if sizes != [r["edit"] or length] * args.streams or r["edit"] > length:
            raise UserError(f"{done.path}: edit {r['edit']} does not fit {args.streams} streams of "
                            f"{length} passages; restore it, or name another --run-dir")
    model = run.load(0)
    if not done.records:
        done.add({"edit": 0, "accuracy": [unadapted(run, model, row) for row in streams]})

    # What a stream has learned is a sum of low-rank terms, one for each edit, so it is one adapter
    # of rank length * r: after k edits the first k * r rows of A (and columns of B) are trained and
    # fixed, and the others are zero. That equals merging after every edit, and all streams share
    # the base.
    one = inner_recipe(cfg).lora
    lora = replace(one, rank=length * one.rank, alpha=length * one.alpha)
    learned = Adapters(model, lora, args.streams)
    k = len(done.records) - 1
    if k > 0:
        path = run.folder / f"after_{k}.safetensors"
        kept = load_file(path).get("flat")
        if kept is None or kept.shape != learned.flat.shape:
            raise UserError(f"{path}: not what this run has learned; restore it")
        learned.flat.copy_(kept)
    for k in range(k, length):
        texts = learn_next(run, model, learned, streams, k)
        # Every passage so far is asked about, each stream under its own adapter.
        seen = [row[:k + 1] for row in streams]
        accuracy = []
        for row, answers in zip(seen, ask(model, run.tok, seen, answering(cfg), learned)):
            right = grade_all(row, [answer.texts for answer in answers])
            accuracy.append([float(np.mean(own)) for own in right])
        (run.folder / f"after_{k + 1}.safetensors").write_bytes(save({"flat": learned.flat}))
        done.add({"edit": k + 1, "accuracy": accuracy, "texts": texts})
        newest = np.mean([row[-1] for row in accuracy])
        run.log(f"edit {k + 1} of {length}: just learned {newest:.3f}, all so far "
                f"{np.mean(accuracy):.3f}")

    result = forgetting([r["accuracy"] for r in done.records])
    run.log(f"\n{args.streams} streams; accuracy on each passage after so many edits, mean (and "
            "standard error over streams)")
    for k, (mean, error) in enumerate(result.pop("matrix")):
        run.log(f"{k:>4}  " + "  ".join(f"{m:.3f} ({e:.3f})" for m, e in zip(mean, error)))
    for what, (mean, error) in result.items():
        run.log(f"{what:>44} {mean:7.3f} ({error:.3f})")
    replace_file(run.folder / "continual.json", as_json({"seed": cfg.seed, **result}, indent=1))
    page.refresh(run)


def learn_next(run, model, learned: Adapters, streams: list[list[Task]], k: int) -> list[str]:
    """Each stream's k-th edit: it writes a self-edit of its k-th passage and is trained on it, all
    that it learned before being fixed. Returns the texts."""
    cfg = run.cfg
    length, tasks = len(streams[0]), [row[k] for row in streams]
    rank = inner_recipe(run.cfg).lora.rank
    sampling = Sampling(cfg.max_edit_tokens, 1, cfg.temperature, cfg.top_p)
    seeds = [[seed_for(cfg.seed, s, k, "edit")] for s in range(len(tasks))]
    edits = collect(sample_self_edits(model, run.tok, tasks, sampling, seeds, learned,
                                       Meter("self-edits")))

    # Only the k-th part of the adapter is free: these rows of A and columns of B, as B A is a sum
    # over them. It begins as a fresh adapter does.
    fresh = Adapters(model, learned.lora, 1)
    free = torch.zeros_like(fresh.flat, dtype=torch.bool)
    for A, B in fresh.pairs(free):
        A[:, k * rank:(k + 1) * rank] = True
        B[:, :, k * rank:(k + 1) * rank] = True
    recipe = replace(inner_recipe(run.cfg), lora=learned.lora)
    jobs, owner = [], []
    for s, (edit,) in enumerate(edits):
        seed = seed_for(cfg.seed, s, k, "adapter")
        try:
            job = make_job(model, run.tok, edit, seed, recipe)
        except ValueError:
            continue        # nothing to learn: the stream stays as it is
        fresh.init(0, seed)
        jobs.append(replace(job, start=learned.flat[s] + (fresh.flat * free)[0], free=free[0]))
        owner.append(s)
    for j, trained in sft(model, jobs, Meter(f"steps of edit {k + 1} of {length}")):
        if not trained.diverged:
            learned.flat[owner[j]] = trained.weights
    return [edit.text for edit, in edits]


# ------------------------------------------------------------------------------- all passages

def cpt(args, run: Run):
    """All passages learned at once by one adapter (the paper's Table 2, continued pretraining). A
    document is a whole self-edit, not a piece of one: --edits of each passage, and the passage."""
    cfg = run.cfg
    if cfg.directives:
        raise UserError("--directives: there is one training here, and no self-edit chooses it")
    tasks = load_passages(run)[:cfg.eval_tasks]
    given = knowledge.read_edits(args.edits_from, tasks)
    run.settle("eval cpt", edits_from=[print_of_data(file) for file in args.edits_from])
    model = run.load(0)
    edits = sample(run, model, tasks, 0, "eval", cfg.edits)
    contexts = [text for task in tasks for text in task.context]
    own = [edit.text for row in edits for edit in row if edit.text]
    corpora = {"passages": contexts, "passages and its own self-edits": contexts + own}
    for kind, texts in given.items():
        corpora[f"passages and {kind}"] = contexts + texts

    table = Table(run, tasks)
    done = Lines(run.folder / "cpt.jsonl")
    sizes = [len(row) for row in table.base]
    for r, name in zip(done.records, [*corpora, ""]):
        # One line for each corpus, in their order: a verdict per seed, passage and question.
        right = [[len(row) for row in of_seed] for of_seed in r["right"]]
        if r["row"] != name or right != [sizes] * cfg.seeds:
            raise UserError(f"{done.path}: {r['row']!r} is not what this run has measured there; "
                            "restore it, or name another --run-dir")
    for name in list(corpora)[len(done.records):]:
        done.add(learn_all(run, model, tasks, name, corpora[name]))
    for r in done.records:
        table.rows.append(cpt_row(r, table.base, cfg.seeds))
    finish(table, "cpt", table.rows[1])


def learn_all(run, model, tasks: list[Task], name: str, texts: list[str]) -> dict:
    """One adapter per seed for all texts: a line of cpt.jsonl."""
    begin = time.time()
    documents = [run.tok.document(text)[:model.config.max_len] for text in texts]
    examples = [(ids, [True] * len(ids)) for ids in documents]
    right, losses = [], []
    for seed in range(run.cfg.seeds):
        job = Job(examples, seed_for(run.cfg.seed, "cpt", seed, "adapter"), inner_recipe(run.cfg))
        ((_, trained),) = sft(model, [job], Meter(f"steps, {name}"))
        adapter = Adapters.stack(model, inner_recipe(run.cfg).lora, [trained.weights])
        right.append(verdicts(run, model, tasks, adapter))
        losses.append(trained.losses)
    run.log(f"{name}: {len(documents)} documents, {len(losses[0])} steps, "
            f"loss {losses[0][0]:.3f} -> {losses[0][-1]:.3f}")
    return {"row": name, "right": right, "documents": len(documents),
            "tokens": sum(map(len, documents)), "steps": len(losses[0]),
            "losses": [[curve[0], curve[-1]] for curve in losses],
            "seconds": time.time() - begin}


def cpt_row(record: dict, base: list[list[bool]], seeds: int) -> dict:
    """A row of the table, from a line of cpt.jsonl."""
    accuracy, pairs = [], []
    for right in record["right"]:                           # per seed
        accuracy.append([np.mean(row) for row in right])
        for before, after in zip(base, right):              # per task
            pairs += zip(before, after)
    return {name: record[name] for name in ("row", "documents", "tokens")} | {
        "accuracy": np.mean(accuracy, axis=0).tolist(), "seconds": record["seconds"] / seeds,
        "gained": share_changed(pairs, known=False), "lost": share_changed(pairs, known=True)}


# ------------------------------------------------------------------------------- command line

def main():
    ap = Parser(description=__doc__.split("\n")[0])
    commands = ap.add_subparsers(dest="table", required=True, metavar="TABLE")
    for command in (single, cpt, continual, arc):
        summary = " ".join(command.__doc__.split())
        parser = commands.add_parser(command.__name__, help=summary, description=summary)
        own = parser.add_argument_group("of this table")
        if command in (single, arc):
            own.add_argument("--run", "--from-run", metavar="RUN_DIR",
                             help="a row for each of its checkpoints (under torchrun: --from-run)")
        if command in (single, cpt):
            own.add_argument("--edits-from", nargs="+", default=[], metavar="FILE",
                             help='JSON lists of {"title", "context", "edits": {kind: text}}')
        if command is continual:
            own.add_argument("--streams", type=positive, default=8, help="sequences (default: 8)")
            own.add_argument("--length", type=positive, default=8, help="passages each (default 8)")
        add_flags(parser)
        preset = "tiny-arc" if command is arc else "tiny"
        parser.set_defaults(command=command, preset=preset, folder=command.__name__)
    args = ap.parse_args()
    if ranks.SIZE > 1 and args.command in (cpt, continual):
        raise UserError(f"{args.table} runs on one GPU: without torchrun")
    args.command(args, Run(read_flags(args, needed=("model", "eval_data")), load_pretrained))


if __name__ == "__main__":
    cli(main)
