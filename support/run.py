"""A run's folder, in which nothing is computed twice.

It holds config.json; edits.jsonl, what was sampled; rollouts.jsonl, a line per self-edit with its
text, answers, verdicts and reward; metrics.jsonl, a line per iteration; iter_N/, the weights after
round N, which any Hugging Face program opens. The same command resumes it.
"""
import dataclasses
import json
import time
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import judges, knowledge, tinyworld
from engine.decode import Sampling
from engine.memory import is_out_of_memory
from inner_loop import ask, grade_all, update_and_score
from model import ModelConfig, Transformer, load_pretrained
from selfedit import SelfEdit, Task, read_self_edit, room_for_self_edit, sample_self_edits, seed_for
from support import ranks
from support.checkpoint import fetch
from support.config import DOMAINS, FREE, Config, inner_recipe
from support.files import Lines, UserError, fingerprint, lock, printable, read_json, replace_file
from support.progress import Meter
from support.ranks import SharedLines
from support.tokenizer import Tokenizer

# ------------------------------------------------------------------------------- records

class Records(SharedLines):
    """Lines that belong to an iteration, a split (train or eval), an arm (what the model is trained
    on, "" for its own self-edits), a task and a self-edit: one for each, found by these."""

    def check(self, record):
        where = place_of(record)
        if where in self.places:
            raise ValueError("a second one for iteration {}, {} {!r}, task {}, self-edit {}"
                             .format(*where))
        self.places.add(where)

    @cached_property
    def places(self):
        return set()

    def of(self, t, split, arm=""):
        """In the order of tasks and self-edits, whatever the order in which they were made."""
        own = [r for r in self.records if place_of(r)[:3] == (t, split, arm)]
        return sorted(own, key=place_of)


def place_of(record) -> tuple:
    """KeyError or TypeError if it has none."""
    numbers = record["iteration"], record["task"], record["edit"]
    if not all(type(number) is int for number in numbers):
        raise TypeError("iteration, task and edit must be whole numbers")
    return (record["iteration"], record["split"], record.get("arm", ""), record["task"],
            record["edit"])


class Metrics(Lines):
    """A line for each iteration."""

    def check(self, record):
        if record["iteration"] != len(self.records):
            raise ValueError(f"iteration {record['iteration']} after {len(self.records)} lines")
        float(record["eval_reward"])


# ------------------------------------------------------------------------------- the folder

def read_settings(folder):
    """config.json of a run, in today's names: `update` was called `select` until 2026-11-24."""
    found = read_json(Path(folder) / "config.json")
    if not isinstance(found, dict):
        return found        # who asks says what is wrong with it
    return {"update" if name == "select" else name: value for name, value in found.items()}



class Run:
    """What a run has done so far, on disk: settings, self-edits, rewards, metrics, weights."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.begin = time.time()
        if cfg.judge == "openai":
            judges.check_openai()
        ranks.join(cfg.device)
        self.folder = Path(cfg.run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        # No other process works here meanwhile; of several ranks the first one holds the lock.
        self.lock = lock(self.folder) if ranks.RANK == 0 else None
        self.edits = Records(self.folder / "edits.jsonl")
        self.rollouts = Records(self.folder / "rollouts.jsonl")
        self.metrics = Metrics(self.folder / "metrics.jsonl")

        self.tok = Tokenizer.from_pretrained(cfg.model)
        self.domain = DOMAINS[cfg.domain]
        self.recipe = inner_recipe(cfg)
        self.answering = Sampling(cfg.max_answer_tokens, newline_stops=cfg.stop == "newline",
                                  max_rows=cfg.rows)
        self.loaded = None      # (source, model) of the one model that is held

    def log(self, line):
        """Print a line, without tearing a progress bar. Of several ranks the first one does."""
        if ranks.RANK == 0:
            tqdm.write(line)

    def exchange(self):
        """At a phase's end: what the other ranks have finished."""
        for lines in (self.edits, self.rollouts):
            lines.exchange()
        if isinstance(self.judge, judges.Remembered) and self.judge.lines:
            self.judge.lines.exchange()

    def settle(self, program: str, **own):
        """Before anything is computed, and after the inputs were found good: write down what this
        run is, or refuse to go on with another. own: a program's flags that change results."""
        cfg = self.cfg
        mine = dataclasses.asdict(cfg) | {"program": program, "own": own, "content": {
            "model": print_of_model(cfg.model), "train_data": print_of_data(cfg.train_data),
            "eval_data": print_of_data(cfg.eval_data)}}
        path = self.folder / "config.json"
        theirs = read_settings(self.folder) if path.exists() else mine
        if not isinstance(theirs, dict):
            raise UserError(f"{path}: not the settings of a run; restore it, or name another "
                            "--run-dir")
        # A run that has computed nothing yet may become another.
        if self.edits.records or self.rollouts.records or self.metrics.records:
            differ = differences(mine, theirs)
            if differ:
                raise UserError(f"{self.folder} holds a run with other settings "
                                f"({', '.join(differ)}); use the same, or another --run-dir")
        ranks.wait()     # until all have compared
        if ranks.RANK == 0:
            replace_file(path, json.dumps(mine, indent=2))

    # Weights.

    def load(self, t: int, folder=None) -> Transformer:
        """theta_t of this run, or of the run in another folder; theta_0 is the base. One model is
        held at a time."""
        source = Path(folder or self.folder) / f"iter_{t}" if t else self.cfg.model
        if self.loaded is None or self.loaded[0] != source:
            self.loaded = None      # never two copies of the weights
            self.loaded = source, self.read_model(source)
        return self.loaded[1]

    def read_model(self, source):
        dtype = getattr(torch, self.cfg.dtype) if self.cfg.dtype else None
        model = load_pretrained(source, self.cfg.device, dtype)
        model.recompute = self.cfg.recompute
        return model

    def save(self, t: int, model: Transformer):
        """The model has become theta_t. Other ranks read it from disk."""
        folder = self.folder / f"iter_{t}"
        model.save_pretrained(folder)
        self.loaded = folder, model

    def last_checkpoint(self) -> int:
        """The last iteration whose weights are there; the base's always are."""
        for t in range(self.cfg.iterations, 0, -1):
            if (self.folder / f"iter_{t}").is_dir():
                return t
        return 0

    # Tasks.

    def tasks(self, source) -> list[Task]:
        """The tasks of a source that fit in the model's context window."""
        # From config.json alone: the weights are read when something is to be computed.
        window = ModelConfig.from_folder(fetch(self.cfg.model)).max_len
        if self.cfg.pad_to > window:
            raise UserError(f"--pad-to {self.cfg.pad_to}: the model's window is {window}")
        tasks = []
        for task in self.read_tasks(source):
            texts = (task.prompt, *task.context, *task.queries)
            longest = max(len(self.tok.prompt(text)) for text in texts)
            if 2 * longest <= window:  # half of it is for what the model writes
                tasks.append(task)
            else:
                self.log(f"skipped: {task.name[:80]!r}: {longest} tokens are more than half of the "
                         f"model's window of {window}")
        if not tasks:
            raise UserError(f"{source}: nothing fits in the model's context window")
        return tasks

    def read_tasks(self, source):
        """A domain is a source of tasks, by name and settings. The loops ask nothing else of it."""
        cfg = self.cfg
        if cfg.domain == "knowledge":
            return knowledge.load(source, cfg.prompt, self.judge, cfg.max_documents, self.log)
        if cfg.domain == "tinyworld":
            return tinyworld.load(source, cfg.directives)
        return self.domain.load(source, seed=cfg.seed, batch=cfg.inner_batch,
                                max_examples=cfg.max_examples, n_views=cfg.views)

    @cached_property
    def judge(self):
        """The judge of this run's answers."""
        if self.cfg.judge == "openai":
            return judges.openai_judge(SharedLines(self.folder / "judge.jsonl"))
        if self.cfg.judge == "model":
            base = cache(self.yardstick)
            return judges.Remembered(
                lambda triples: judges.model_judge(base(), self.tok, triples))
        return judges.RULES[self.cfg.judge]


    def yardstick(self) -> Transformer:
        """The model that judges: theta_0 in every iteration, as a yardstick must not move. So it is
        a second copy of the weights; on the host, if the device has no room."""
        try:
            return self.read_model(self.cfg.model)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
        self.log("out of memory: the judge works on the host, slowly (--judge rule is faster)")
        return load_pretrained(self.cfg.model, "cpu")


def differences(mine: dict, theirs: dict) -> list[str]:
    """What another run has otherwise. A setting that it lacks, as it is older, has its default."""
    defaults = dataclasses.asdict(Config())
    differ = []
    for name in mine.keys() - FREE - {"own", "content"}:
        other = theirs.get(name, defaults.get(name, mine[name]))
        if other != mine[name]:
            differ.append(f"{name}: {other!r}")
    for part in ("own", "content"):
        for name, value in mine[part].items():
            # A flag that an older program did not write down was off; the oldest wrote none.
            other = theirs[part].get(name) if theirs.get(part) else value
            if (other or None) != (value or None):
                differ.append(f"{name}: {other if isinstance(other, int) else 'another'}")
    return sorted(differ)


def print_of_model(name) -> str:
    """A fingerprint of a checkpoint: its JSON files, and pieces of its weights."""
    parts = []
    for path in sorted(fetch(name).iterdir()):
        if path.suffix == ".json":
            parts += [path.name, path]
        elif path.suffix == ".safetensors":
            size = path.stat().st_size
            with path.open("rb") as f:
                for i in range(64):
                    f.seek(i * size // 64)
                    parts.append(f.read(1024))
            parts.append(str(size))
    return fingerprint(*parts)


def print_of_data(source) -> str:
    """A fingerprint of a file, of all files of a folder, or of a name."""
    path = Path(source)
    if not source or not path.exists():
        return source
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return fingerprint(*files)


# ------------------------------------------------------------------------------- the E-step, kept

def sample_edits(run: Run, model, tasks: list[Task], t: int, split: str,
                 k: int) -> list[list[SelfEdit]]:
    """k self-edits of each task by theta_t. A task's are on disk as soon as they are written."""
    # What was sampled before is read back. Every draw has a seed of its own, so a task of which any
    # is missing is sampled anew, to the same texts.
    cfg = run.cfg
    saved = {(r["task"], r["edit"]) for r in run.edits.of(t, split)}
    missing = [i for i in range(len(tasks)) if any((i, j) not in saved for j in range(k))]
    if missing:
        begin = time.time()
        room = room_for_self_edit(model, run.tok, tasks)
        sampling = Sampling(min(cfg.max_edit_tokens, room), k, cfg.temperature, cfg.top_p,
                            max_rows=cfg.rows)
        mine = [missing[n] for n in ranks.share_of([len(tasks[i].prompt) for i in missing])]
        seeds = [[seed_for(cfg.seed, t, split, i, j, "edit") for j in range(k)] for i in mine]

        def keep(n, row):
            run.edits.add(*[{"iteration": t, "split": split, "task": mine[n], "edit": j,
                             "text": edit.text, "token_ids": edit.token_ids}
                            for j, edit in enumerate(row) if (mine[n], j) not in saved])

        sample_self_edits(model, run.tok, [tasks[i] for i in mine], sampling, seeds,
                          progress=Meter("self-edits"), keep=keep)
        run.exchange()
        tokens = sum(len(r["token_ids"]) for r in run.edits.of(t, split))
        run.log(f"iteration {t}, {split}: {len(tasks)} x {k} self-edits, {tokens} tokens in "
                f"{time.time() - begin:.0f} s")
    found = {(r["task"], r["edit"]): r for r in run.edits.of(t, split)}
    edits = []
    for i, task in enumerate(tasks):
        row = [found[i, j] for j in range(k)]
        edits.append([read_self_edit(task, r["text"], r["token_ids"]) for r in row])
    return edits


def verdicts(run: Run, model, tasks: list[Task], adapter=None) -> list[list[bool]]:
    """Which questions the model, as it is or under one adapter, answers correctly, per task."""
    mine = ranks.share_of([len(task.queries) for task in tasks])
    own_tasks = [tasks[i] for i in mine]
    (answers,) = ask(model, run.tok, [own_tasks], run.answering, adapter)
    right = grade_all(own_tasks, [answer.texts for answer in answers])
    found = {}
    for part in ranks.gather(dict(zip(mine, right))):
        found |= part
    return [found[i] for i in range(len(tasks))]


def unadapted(run: Run, model, tasks: list[Task]) -> list[float]:
    """Accuracy of the model as it is, on each task."""
    return [float(np.mean(right)) for right in verdicts(run, model, tasks)]


def score_edits(run: Run, model, tasks: list[Task], edits: list[list[SelfEdit]], t: int, split: str,
                without: list[float], n_seeds: int, arm="") -> list[list[float]]:
    """The reward of every self-edit of theta_t. without: the un-adapted accuracies, for the record.

    arm names the self-edits if they are not the model's own. No draw depends on it: all arms begin
    from the same adapters, so that they differ in what they are trained on alone. Each reward is on
    disk as soon as it is known, and those on disk are not computed again."""
    # What is on disk already, by (task, edit), and what is left to do.
    known = {(r["task"], r["edit"]): r["reward"] for r in run.rollouts.of(t, split, arm)}
    todo = []
    for i, row in enumerate(edits):
        todo += [(i, j) for j in range(len(row)) if (i, j) not in known]
    if not todo:
        return [[known[i, j] for j in range(len(row))] for i, row in enumerate(edits)]

    # Outcomes come in the order in which trainings end. Each is written down at once.
    begin = time.time()
    mine = [todo[n] for n in ranks.share_of([training_cost(edits[i][j]) for i, j in todo])]
    seeds = [[seed_for(run.cfg.seed, t, split, i, j, s, "adapter") for s in range(n_seeds)]
             for i, j in mine]
    outcomes = update_and_score(
        model, run.tok, [tasks[i] for i, _ in mine], [edits[i][j] for i, j in mine], seeds,
        run.recipe, run.answering, Meter("optimiser steps"))
    for number, outcome in outcomes:
        i, j = mine[number]
        record = rollout(tasks[i], edits[i][j], outcome)
        run.rollouts.add({"iteration": t, "split": split, "arm": arm, "task": i, "edit": j,
                          "unadapted": without[i]} | record)
        if run.cfg.verbose:
            run.log(f"  {printable(tasks[i].name[:24])} {i}.{j}: reward {outcome.reward:.2f} "
                    f"(un-adapted {without[i]:.2f}), {len(edits[i][j].documents)} documents, "
                    f"{outcome.note or outcome.losses} | {edits[i][j].text[:60]!r}")
    run.exchange()
    known = {(r["task"], r["edit"]): r["reward"] for r in run.rollouts.of(t, split, arm)}
    run.log(f"iteration {t}, {arm or split}: {len(todo)} rewards, mean "
            f"{np.mean(list(known.values())):.3f}, in {time.time() - begin:.0f} s")
    return [[known[i, j] for j in range(len(row))] for i, row in enumerate(edits)]


def training_cost(edit: SelfEdit) -> int:
    """Characters to train on, over all epochs: what to share out over ranks by."""
    characters = sum(len("".join(document)) for document in edit.documents)
    return characters * edit.directives.get("epochs", 1)


def rollout(task, edit, outcome):
    """A line of rollouts.jsonl, but for where it belongs."""
    return {"title": task.name, "reward": outcome.reward, "text": edit.text,
            "token_ids": edit.token_ids, "directives": edit.directives, "tools": edit.tools,
            "documents": len(edit.documents), "questions": task.questions, "gold": task.answers,
            "answers": outcome.answers, "right": outcome.right, "losses": outcome.losses,
            "cut": outcome.cut, "replies": len(outcome.right) * len(task.queries),
            "seconds": round(outcome.seconds, 2), "note": outcome.note}
