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

import torch
from tqdm import tqdm

from data import judges, knowledge, tinyworld
from engine.decode import Sampling
from engine.memory import is_out_of_memory
from model import ModelConfig, Transformer, load_pretrained
from selfedit import Task
from support import page, ranks
from support.checkpoint import fetch
from support.config import DOMAINS, FREE, Config, inner_recipe
from support.files import UserError, fingerprint, lock, read_json, replace_file
from support.progress import Meter
from support.records import Metrics, Records, SharedLines
from support.report import curve, iteration_line
from support.tokenizer import Tokenizer


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
        theirs = read_json(path) if path.exists() else mine
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

    def remember(self, lines: Records, where: tuple, groups: list[list[tuple]], costs: list[float],
                 compute) -> dict:
        """{(task, edit): its record}, each computed once and for all.

        This is all there is of resuming, of surviving a kill, and of several GPUs. Without it,
        `compute(range(len(groups)))` gives the same records. where: (iteration, split, arm).
        groups: the (task, edit)s that are computed together. compute(numbers): yields (a group's
        number, the records of its places) as they end. costs: of each group, to share out by."""
        # What is on disk is read back. A group of which any record is missing is made anew.
        known = lines.at(*where)
        missing = []
        for number, group in enumerate(groups):
            if any(place not in known for place in group):
                missing.append(number)
        if not missing:
            return known

        # The other groups are shared out among the ranks. What is made is on disk at once.
        begin = time.time()
        t, split, arm = where
        mine = ranks.share_of([costs[number] for number in missing])
        for number, records in compute([missing[m] for m in mine]):
            new = []
            for (task, edit), record in zip(groups[number], records):
                if (task, edit) not in known:
                    new.append({"iteration": t, "split": split, "arm": arm, "task": task,
                                "edit": edit} | record)
            lines.add(*new)
        self.exchange()
        self.log(f"iteration {t}, {arm or split}: {lines.path.stem} of {len(missing)} "
                 f"in {time.time() - begin:.0f} s")
        return lines.at(*where)

    def keep_weights(self, t: int, learned: list[tuple]):
        """Note in round t's rollouts how much the M-step weighs each self-edit; 0: not kept."""
        weights = {(task, edit): weight for task, edit, weight in learned}
        for record in self.rollouts.of(t, "train"):
            record["weight"] = weights.get((record["task"], record["edit"]), 0.0)
        if ranks.RANK == 0:
            self.rollouts.rewrite()

    def record(self, metrics: dict):
        """A line of metrics.jsonl, which is shown. report.html is brought up to date."""
        if ranks.RANK == 0:
            self.metrics.add(metrics)
            page.refresh(self)
        else:
            self.metrics.records.append(metrics)
        self.log(iteration_line(metrics))
        if metrics["iteration"] > 0:
            self.log(curve(self.metrics.records))

    def meter(self, what: str) -> Meter:
        """Shows how far a phase is."""
        return Meter(what)

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

    def make(self, t: int, start: int, train):
        """theta_t, by train(theta_start), which changes the model in place. Rank 0 does it; the
        others wait, and read the result from disk."""
        if ranks.RANK == 0:
            model = self.load(start)
            train(model)
            self.save(t, model)
        ranks.wait()

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
    for name in theirs.keys() - mine.keys():
        differ.append(f"{name}: {theirs[name]!r}")
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
