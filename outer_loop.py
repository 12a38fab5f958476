"""SEAL's outer loop: ReST-EM teaches a model to write the self-edits that teach it best (Algorithm 1 of arXiv 2506.10943).

    python outer_loop.py --preset knowledge --model DIR_OR_HUB_ID --train-data FILE --eval-data FILE

    for t = 1, 2, ...        sample contexts; sample K self-edits of each          selfedit.sample_self_edits
        E-step               update the model on each, ask, reward                 inner_loop.update_and_score
        M-step               SFT on the best self-edit of each context; merge      m_step
                             evaluate on held-out contexts                         evaluate

A run is a folder: config.json, edits.jsonl (what was sampled), rollouts.jsonl (a line per self-edit: text, answers,
verdicts, reward), metrics.jsonl (a line per iteration), iter_N/ (weights, for any Hugging Face program). The same command resumes it.
Simplified: one process, one device.
"""
import argparse, dataclasses, inspect, json, os, random, re, resource, shlex, sys, time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import knowledge
from inner_loop import Job, Recipe, ask, grade, sft, update_and_score
from lora import Adapters
from model import ModelConfig, UserError, cli, fetch, load_pretrained
from selfedit import PROMPTS, read_self_edit, sample_self_edits, seed_for
from tokenizer import Tokenizer

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Config:
    model: str = ""                 # folder or hub id of a Llama, Qwen2/2.5 or Qwen3 checkpoint
    train_data: str = ""            # JSON list of passages to learn from
    eval_data: str = ""             # JSON list of held-out passages
    run_dir: str = ""               # the run's folder; default runs/PRESET
    iterations: int = 2             # ReST-EM rounds
    tasks: int = 50                 # training passages per round, new ones each round
    edits: int = 5                  # K, self-edits per passage
    seeds: int = 3                  # inner loops per self-edit; the reward is their mean
    eval_tasks: int = 200           # held-out passages, one self-edit and one inner loop each
    seed: int = 0                   # of everything drawn at random
    device: str = ""                # cuda or cpu; default cuda if there is one
    dtype: str = ""                 # weights: float32, bfloat16 or float64; default bfloat16 on cuda, else float32
    prompt: str = "implications"    # how a self-edit is asked for: implications, -long, -very-long, rewrite, self-qa, none
    temperature: float = 1.0        # of sampling self-edits
    top_p: float = 0.95             # nucleus of sampling self-edits
    max_edit_tokens: int = 2048     # longest self-edit
    max_documents: int = 0          # pieces kept of a self-edit; 0: all (v2 of the paper: 30)
    inner_rank: int = 32            # LoRA of the inner loop
    inner_alpha: float = 64         # LoRA scale is alpha / rank
    inner_targets: list = field(default_factory=lambda: ["q_proj", "v_proj"])  # layers that get an adapter
    inner_lr: float = 1e-3          # decays linearly to 0
    inner_epochs: int = 10          # passes over a self-edit's documents
    inner_batch: int = 1            # documents per step
    outer_rank: int = 64            # LoRA of the M-step
    outer_alpha: float = 128        # LoRA scale is alpha / rank
    outer_targets: list = field(default_factory=lambda: list(ALL))  # layers that get an adapter
    outer_lr: float = 3e-4          # decays linearly to 0
    outer_epochs: int = 2           # passes over the kept self-edits
    outer_batch: int = 10           # self-edits per step
    clip: float = 1.0               # gradient norm, inner and outer
    weight_decay: float = 0.0       # AdamW's, inner and outer
    max_answer_tokens: int = 64     # longest answer
    stop: str = "newline"           # an answer ends at EOS or a line break; 'eos': at EOS only (official)
    judge: str = "rule"             # rule (gold-word recall >= .8) or substring
    strict: bool = False            # keep a self-edit only if it beats the un-adapted model (Eq. 2); the official code keeps the best of K
    restart: bool = False           # each M-step starts from the base model (original ReST-EM), not from the last checkpoint
    slots: int = 0                  # adapters trained side by side; 0: automatic
    rows: int = 0                   # sequences decoded side by side; 0: 256 on cuda, 32 on a CPU


PRESETS = {
    "knowledge": {},  # the paper's knowledge incorporation; its values are the defaults above
}


# ------------------------------------------------------------------------------------------------ Algorithm 1

def rest_em(cfg, run):
    """Train; returns the metrics, one dict per iteration from 0 (the untrained policy)."""
    train, held_out = run.tasks(cfg.train_data), run.tasks(cfg.eval_data)[:cfg.eval_tasks]
    if cfg.iterations * cfg.tasks > len(train):
        run.log(f"note: {cfg.iterations} rounds of {cfg.tasks} passages from {len(train)}: some will be seen again")
    random.Random(seed_for(cfg.seed, "order of the passages")).shuffle(train)
    for t in range(run.last_checkpoint(), cfg.iterations + 1):
        model = run.load(t)                                                             # theta_t
        evaluate(cfg, run, model, held_out, t)
        if t == cfg.iterations:
            return run.metrics
        tasks = [train[i % len(train)] for i in range(t * cfg.tasks, (t + 1) * cfg.tasks)]  # (C, tau) ~ D
        edits = run.sample(model, tasks, t, "train", cfg.edits)                         # SE ~ LM_theta(. | C)
        without = run.unadapted(model, tasks)                                           # what theta knows already
        rewards = run.rewards(model, tasks, edits, t, "train", without, cfg.seeds)      # r(SE, tau, theta)
        kept = select(rewards, edits, without if cfg.strict else None)
        run.log(f"round {t + 1}: mean reward {np.mean(rewards):.3f}, kept {len(kept)} self-edits with mean reward "
                f"{np.mean([rewards[i][j] for i, j in kept] or [0]):.3f}, un-adapted {np.mean(without):.3f}")
        if cfg.restart:
            del model
            model = run.load(0)
        m_step(cfg, run, model, [(tasks[i], edits[i][j]) for i, j in kept], t)          # theta_t+1
        run.save(t + 1, model)


def select(rewards, edits, floor=None):
    """Indices (task, edit) of each task's best self-edit, the first of equals; with `floor`, only where it beats floor[task].

    NOTE(paper): Eq. 2 gives reward 1 only if the update improves the model; the official code keeps the best of K regardless. So do we,
    unless --strict. A self-edit with nothing to learn from is never kept."""
    kept = []
    for i, row in enumerate(rewards):
        j = max(range(len(row)), key=lambda j: (bool(edits[i][j].documents), row[j]))
        if edits[i][j].documents and (floor is None or row[j] > floor[i]):
            kept.append((i, j))
    return kept


def m_step(cfg, run, model, kept, t):
    """theta_t+1 <- SFT(theta_t, {(prompt, self-edit)}): on the completion only, as it was sampled, EOS included; then merge.

    NOTE(paper): an edit that ran to the cap has no EOS, and none is added here: the official code teaches the model to stop there."""
    if not kept:
        run.log("M-step: no self-edit was kept; the model stays as it is")
        return
    examples = []
    for task, edit in kept:
        prompt = run.tok.prompt(task.prompt)
        examples.append((prompt + edit.token_ids, [False] * len(prompt) + [True] * len(edit.token_ids)))
    recipe = make_recipe(cfg, "outer")
    (_, trained), = sft(model, [Job(examples, seed_for(cfg.seed, t, "M-step"), recipe.lr, recipe.epochs, recipe.batch)], recipe,
                         Meter("M-step steps"))
    if trained.diverged:
        raise UserError(f"the M-step of round {t + 1} diverged; try a lower --outer-lr (this run keeps its own settings, so use a new --run-dir)")
    adapters = Adapters(model, 1, recipe.rank, recipe.alpha, recipe.targets)
    adapters.flat[0] = trained.weights
    adapters.merge(0)
    run.log(f"M-step: {len(kept)} self-edits, {len(trained.losses)} steps, loss {trained.losses[0]:.3f} -> {trained.losses[-1]:.3f}, {trained.seconds:.0f} s")


def evaluate(cfg, run, model, tasks, t):
    """Held-out reward of the policy theta_t: one self-edit per passage, one inner loop each. Adds a line to metrics.jsonl."""
    if any(m["iteration"] == t for m in run.metrics):
        return  # a resumed run has it already
    edits = run.sample(model, tasks, t, "eval", 1)
    without = run.unadapted(model, tasks)
    rewards = np.array(run.rewards(model, tasks, edits, t, "eval", without, 1))[:, 0]
    trained_on = [r["reward"] for r in run.rollouts.records if (r["iteration"], r["split"]) == (t - 1, "train")]
    run.metric_lines.add({
        "iteration": t, "eval_reward": float(rewards.mean()), "eval_ci": bootstrap_ci(rewards), "eval_unadapted": float(np.mean(without)),
        "eval_tasks": len(tasks), "train_reward": float(np.mean(trained_on)) if trained_on else None, "seconds": round(time.time() - run.start, 1)})
    run.log(run.metrics_line(run.metrics[-1]))


def bootstrap_ci(values, level=0.95, draws=10_000):
    """[low, high] of the mean, by resampling the passages."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    return [float(x) for x in np.quantile(means, [(1 - level) / 2, (1 + level) / 2])]


def make_recipe(cfg, loop):
    """The Recipe of the inner or the outer loop, from the fields that begin with its name."""
    get = lambda name: getattr(cfg, f"{loop}_{name}")
    return Recipe(get("rank"), get("alpha"), get("targets"), get("lr"), get("epochs"), get("batch"), cfg.clip, cfg.weight_decay, cfg.slots)


# ------------------------------------------------------------------------------------------------ a run and its files

class Lines:
    """A JSON-lines file that survives being killed: a torn last line is dropped, whole ones are kept."""

    def __init__(self, path):
        self.path, self.records = path, []
        if path.exists():
            data = path.read_bytes()
            whole = data[:data.rfind(b"\n") + 1]
            self.records = [json.loads(line) for line in whole.splitlines()]
            if whole != data:
                replace(path, whole.decode())

    def add(self, *records):
        with self.path.open("a", encoding="utf-8") as f:
            f.write("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        self.records += records


def replace(path, text):
    """Write a file beside and rename it: it is there whole or not at all."""
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


class Meter:
    """Progress of one long step: a bar on a terminal, a line every ten seconds in a log, and the seconds left in `eta`."""

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


class Run:
    """What a run has done so far, on disk, so that nothing is done twice; and how it talks."""

    def __init__(self, cfg):
        self.cfg, self.folder, self.start = cfg, Path(cfg.run_dir), time.time()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check_config()
        self.edits, self.rollouts = Lines(self.folder / "edits.jsonl"), Lines(self.folder / "rollouts.jsonl")
        self.metric_lines = Lines(self.folder / "metrics.jsonl")
        self.tok = Tokenizer.from_pretrained(cfg.model)
        self.recipe = make_recipe(cfg, "inner")
        self.asking = dict(max_new=cfg.max_answer_tokens, newline=cfg.stop == "newline", max_rows=cfg.rows or None)
        self.loaded = None, None

    metrics = property(lambda self: self.metric_lines.records)

    def log(self, line):
        tqdm.write(line)
        sys.stdout.flush()

    def check_config(self):
        """Refuse to continue a run under other settings; only more iterations may be asked for."""
        mine, path = dataclasses.asdict(self.cfg), self.folder / "config.json"
        if path.exists():
            theirs = json.loads(path.read_text())
            differ = [k for k in mine if mine[k] != theirs.get(k) and k not in ("iterations", "run_dir")]
            if differ:
                raise UserError(f"{self.folder} holds a run with other settings ({', '.join(f'{k}: {theirs.get(k)!r}' for k in differ)}); "
                                "use the same, or another --run-dir")
        replace(path, json.dumps(mine, indent=2))

    def tasks(self, path):
        """The tasks of a data file that fit in the model's context window."""
        window, tasks = ModelConfig.from_folder(fetch(self.cfg.model)).max_len, []
        for task in knowledge.load(path, self.cfg.prompt, self.cfg.judge, self.cfg.max_documents, self.log):
            longest = max(len(self.tok.prompt(text)) for text in (task.prompt, *task.context, *task.queries))
            if 2 * longest > window:  # half the window is for what the model writes
                self.log(f"skipped: {task.name!r}: {longest} tokens are more than half of the model's window of {window}")
            else:
                tasks.append(task)
        if not tasks:
            raise UserError(f"{path}: no passage fits in the model's context window")
        return tasks

    def load(self, t):
        """theta_t, from iter_t; theta_0 is the base. One model is held at a time."""
        if self.loaded[0] != t:
            self.loaded = None, None
            source = self.folder / f"iter_{t}" if t else self.cfg.model
            self.loaded = t, load_pretrained(source, self.cfg.device or None, getattr(torch, self.cfg.dtype) if self.cfg.dtype else None)
        return self.loaded[1]

    def save(self, t, model):
        """The model is theta_t now: write it, and hold it as such."""
        model.save_pretrained(self.folder / f"iter_{t}")
        self.loaded = t, model

    def last_checkpoint(self):
        """Where to begin: the last iteration whose weights are there."""
        done = [t for t in range(1, self.cfg.iterations + 1) if (self.folder / f"iter_{t}").is_dir()]
        return max(done, default=0)

    def sample(self, model, tasks, t, split, k):
        """k self-edits of each task; on disk as soon as they are sampled."""
        saved = [r for r in self.edits.records if (r["iteration"], r["split"]) == (t, split)]
        if len(saved) < len(tasks) * k:
            seeds = [[seed_for(self.cfg.seed, t, split, i, j, "edit") for j in range(k)] for i in range(len(tasks))]
            self.log(f"iteration {t}, {split}: sampling {len(tasks)} x {k} self-edits")
            begin = time.time()
            edits = sample_self_edits(model, self.tok, tasks, k, seeds, self.cfg.temperature, self.cfg.top_p,
                                      self.cfg.max_edit_tokens, Meter("self-edits"))
            tokens = sum(len(e.token_ids) for row in edits for e in row)
            self.log(f"  {tokens} tokens in {time.time() - begin:.0f} s")
            have = len(saved)  # more than 0 only if the run was killed while it wrote them
            saved = [{"iteration": t, "split": split, "task": i, "edit": j, "text": e.text, "token_ids": e.token_ids}
                     for i, row in enumerate(edits) for j, e in enumerate(row)]
            self.edits.add(*saved[have:])
        flat = [read_self_edit(tasks[r["task"]], r["text"], r["token_ids"]) for r in saved]
        return [flat[i * k:(i + 1) * k] for i in range(len(tasks))]

    def unadapted(self, model, tasks):
        """Accuracy of the model as it is on each task, asked without its context."""
        answers = ask(model, self.tok, tasks, **self.asking)
        return [float(np.mean(grade(task, a))) for task, a in zip(tasks, answers)]

    def rewards(self, model, tasks, edits, t, split, without, n_seeds):
        """Reward of every self-edit, as rows; each is on disk as soon as it is known, and those on disk are not computed again."""
        k = len(edits[0])
        known = {(r["task"], r["edit"]): r["reward"] for r in self.rollouts.records if (r["iteration"], r["split"]) == (t, split)}
        todo = [(i, j) for i in range(len(tasks)) for j in range(k) if (i, j) not in known]
        seeds = [[seed_for(self.cfg.seed, t, split, i, j, s, "adapter") for s in range(n_seeds)] for i, j in todo]
        meter = Meter("optimiser steps")
        for count, (at, o) in enumerate(update_and_score(model, self.tok, [tasks[i] for i, _ in todo], [edits[i][j] for i, j in todo], seeds,
                                                         self.recipe, meter, **self.asking), 1):
            i, j = todo[at]
            task, edit = tasks[i], edits[i][j]
            self.rollouts.add({
                "iteration": t, "split": split, "task": i, "edit": j, "title": task.name, "reward": o.reward, "unadapted": without[i],
                "text": edit.text, "token_ids": edit.token_ids, "directives": edit.directives, "documents": len(edit.documents),
                "questions": task.questions, "gold": task.answers, "answers": o.answers, "right": o.right,
                "losses": o.losses, "seconds": round(o.seconds, 2), "note": o.note})
            known[i, j] = o.reward
            loss = " -> ".join(f"{x:.2f}" for x in o.losses[0]) if o.losses else "-"
            self.log(f"  {count}/{len(todo)} eta {meter.eta:.0f}s | {task.name[:24]} {i}.{j}: reward {o.reward:.2f} (un-adapted {without[i]:.2f}), "
                     f"{len(edit.documents)} documents, loss {loss}{', ' + o.note if o.note else ''} | {edit.text[:60]!r}")
        return [[known[i, j] for j in range(k)] for i in range(len(tasks))]

    @staticmethod
    def metrics_line(m):
        return (f"iteration {m['iteration']}: held-out reward {m['eval_reward']:.3f} [{m['eval_ci'][0]:.3f}, {m['eval_ci'][1]:.3f}] on {m['eval_tasks']} passages, "
                f"un-adapted {m['eval_unadapted']:.3f}" + (f", training reward on the way {m['train_reward']:.3f}" if m["train_reward"] is not None else ""))


# ------------------------------------------------------------------------------------------------ command line

def parse_args(argv=None, description=__doc__.split("\n")[0], needed=("model", "train_data", "eval_data")):
    """Config from the command line; the flags are Config's fields, their help the comments beside them."""
    comments = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(Config), re.M))
    ap = argparse.ArgumentParser(description=description, allow_abbrev=False)
    ap.add_argument("--preset", default="knowledge", choices=PRESETS, help="a set of defaults (default: knowledge)")
    for f in dataclasses.fields(Config):
        default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        if f.type is bool:
            kind = {"action": "store_true"}
        else:
            kind = {"nargs": "+" if f.type is list else None, "type": str if f.type is list else f.type, "metavar": f.type.__name__.upper()}
        shown = "" if default == "" or default is False else f" (default: {' '.join(default) if f.type is list else default})"
        ap.add_argument("--" + f.name.replace("_", "-"), default=None, help=(comments[f.name] + shown).replace("%", "%%"), **kind)
    args = vars(ap.parse_args(argv))
    preset = args.pop("preset")
    cfg = Config(**PRESETS[preset] | {k: v for k, v in args.items() if v is not None})
    cfg.run_dir = cfg.run_dir or f"runs/{preset}"
    for name, choices in (("stop", ("newline", "eos")), ("judge", tuple(knowledge.JUDGES)), ("prompt", tuple(PROMPTS)),
                          ("dtype", ("", "float32", "bfloat16", "float64"))):
        if getattr(cfg, name) not in choices:
            raise UserError(f"--{name} {getattr(cfg, name)!r}: choose among {', '.join(filter(None, choices))}")
    for name in needed:
        if not getattr(cfg, name):
            raise UserError(f"--{name.replace('_', '-')} is missing (-h explains)")
    for f in dataclasses.fields(cfg):
        if f.type in (int, float) and f.name not in ("seed", "iterations", "max_documents", "slots", "rows", "temperature", "weight_decay") and getattr(cfg, f.name) <= 0:
            raise UserError(f"--{f.name.replace('_', '-')} {getattr(cfg, f.name)}: must be more than 0")
    return cfg


def main():
    cfg = parse_args()
    run = Run(cfg)
    run.log("\n".join(f"{k:>18} {v}" for k, v in dataclasses.asdict(cfg).items()))
    metrics = rest_em(cfg, run)
    run.log("")
    for m in metrics:
        run.log(run.metrics_line(m))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run.log(f"{time.time() - run.start:.0f} s, peak memory {peak / 2 ** 30:.1f} GiB; everything is in {run.folder}; next: "
            f"less {shlex.quote(str(run.folder / 'rollouts.jsonl'))}")


if __name__ == "__main__":
    cli(main)
