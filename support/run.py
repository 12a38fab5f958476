"""A run's folder, in which nothing is computed twice.

It holds config.json; edits.jsonl, what was sampled; rollouts.jsonl, a line per self-edit with its
text, answers, verdicts and reward; metrics.jsonl, a line per iteration; iter_N/, the weights after
round N, which any Hugging Face program opens. The same command resumes it.
"""
import dataclasses
import json
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support import page, ranks
from support.checkpoint import fetch
from support.config import FREE, Config, read_settings
from support.files import (FIELDS, Lines, UserError, as_lines, fingerprint, lock, printable,
                           replace_file)
from support.ranks import Meter, Records
from support.report import iteration_line
from support.tokenizer import Tokenizer


class Run:
    """What a run has done so far, on disk: settings, self-edits, rewards, metrics, weights."""
    meter = Meter       # run.meter("steps") shows how far a phase is

    def __init__(self, cfg: Config, load_pretrained):
        """load_pretrained(folder or hub id, device, dtype): how a model is loaded."""
        self.cfg = cfg
        self.load_pretrained = load_pretrained
        self.begin = time.time()
        ranks.join(cfg.device)
        self.folder = Path(cfg.run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        # No other process works here meanwhile; of several ranks the first one holds the lock.
        self.lock = lock(self.folder) if ranks.RANK == 0 else None
        self.edits = Records(self.folder / "edits.jsonl")
        self.rollouts = Records(self.folder / "rollouts.jsonl")
        self.metrics = Lines(self.folder / "metrics.jsonl")
        self.shared = [self.edits, self.rollouts]   # lines that ranks exchange after a phase
        self.tok = Tokenizer.from_pretrained(cfg.model)
        self.judge = None       # of the answers: data/tasks.py sets it
        self.loaded = None      # (source, model) of the one model that is held
        self.whole = None       # a Meter of the whole run, and how many self-edits it tries out

    def log(self, line):
        """Print a line, without tearing a progress bar. Of several ranks the first one does."""
        if ranks.RANK == 0:
            tqdm.write(printable(line, 10 ** 6))

    def settle(self, program: str, **own):
        """Before anything is computed, and after the inputs were found good: write down what this
        run is, or refuse to go on with another. own: a program's flags that change results."""
        cfg = self.cfg
        content = {"model": print_of_model(cfg.model), "train_data": print_of_data(cfg.train_data),
                   "eval_data": print_of_data(cfg.eval_data)}
        mine = dataclasses.asdict(cfg) | {
            "program": program, "command": sys.orig_argv, "own": own, "content": content,
            "code": print_of_code()}
        path = self.folder / "config.json"
        theirs = read_settings(self.folder) if path.exists() else mine
        # A run that has computed nothing yet may become another.
        kept = [self.folder / f"{name}.jsonl" for name in FIELDS]
        if any(file.exists() and file.stat().st_size for file in kept):
            differ = differences(mine, theirs)
            if differ:
                raise UserError(f"{self.folder} holds a run with other settings "
                                f"({', '.join(differ)}); use the same, or another --run-dir")
            # What this run began with is kept, as it made what is read back.
            began, now = theirs.get("code", mine["code"]), mine["code"]
            mine["code"] = began
            if changed := sorted(file for file in now if began.get(file) != now[file]):
                self.log(f"note: {', '.join(changed)} changed since this run began. What is "
                         "computed is kept; to compute it anew, name another --run-dir.")
        self.check_whole()
        ranks.wait()     # until all have compared
        if ranks.RANK == 0:
            replace_file(path, json.dumps(mine, indent=2))

    def check_whole(self):
        """UserError if a rollout is gone that no round will make again."""
        cfg = self.cfg
        for m in self.metrics.records:
            t = m["iteration"]
            # Baselines have one self-edit of each task.
            arms = {r["arm"] for r in self.rollouts.records if r.get("arm") and not t}
            sizes = {(0, "eval", arm): (m["eval_tasks"], 1) for arm in arms}
            sizes[t, "eval", ""] = m["eval_tasks"], cfg.eval_edits
            if t:
                sizes[t - 1, "train", ""] = cfg.tasks, cfg.edits
            for place, (n, k) in sizes.items():
                if self.rollouts.at(*place).keys() != set(product(range(n), range(k))):
                    raise UserError(f"{self.rollouts.path}: iteration {place[0]}, "
                                    f"{place[2] or place[1]}: these are not the {k} self-edits of "
                                    f"{n} tasks; restore it")

    def remember(self, lines: Records, where: tuple, groups: list[list[tuple]], costs: list[float],
                 compute) -> dict:
        """{(task, edit): its record}, each computed once and for all.

        This is all there is of resuming, of surviving a kill, and of several GPUs. Without it,
        `compute(range(len(groups)))` gives the same records. where: (iteration, split, arm).
        groups: the (task, edit)s that are computed together. compute(numbers): yields (a group's
        number, the records of its places) as they end. costs: of each group, to share out by."""
        # What is on disk is read back. A group of which any record is missing is made anew.
        known = lines.at(*where)
        t, split, arm = where
        strange = known.keys() - set().union(*groups)
        if strange:
            raise UserError(f"{lines.path}: iteration {t}, {arm or split}: there is no (task, "
                            f"self-edit) {min(strange)} in this run; restore it")
        missing = [n for n, group in enumerate(groups) if not known.keys() >= set(group)]
        if not missing:
            return known

        # The other groups are shared out among the ranks. What is made is on disk at once.
        begin = time.time()
        mine = ranks.share_of([costs[number] for number in missing])
        for number, records in compute([missing[m] for m in mine]):
            new = []
            for (task, edit), record in zip(groups[number], records):
                if (task, edit) not in known:
                    new.append({"iteration": t, "split": split, "arm": arm, "task": task,
                                "edit": edit} | record)
            lines.add(*new)
            if self.whole and lines is self.rollouts:
                meter, total = self.whole
                meter(len(lines.records), total)
        # The phase has ended: what the other ranks have finished.
        for shared in self.shared:
            shared.exchange()
        done = f"{len(missing)} self-edits tried out"
        if lines is self.edits:
            done = f"self-edits of {len(missing)} tasks written"
        self.log(f"    {arm + ': ' if arm else ''}{done} in {time.time() - begin:.0f} s")
        return lines.at(*where)

    def expect(self, held_out: list):
        """Count the self-edits of the whole run, so that a bar shows what is left of it."""
        cfg = self.cfg
        arms = len(held_out[0].references) if cfg.baselines else 0
        of_a_task = (cfg.iterations + 1) * cfg.eval_edits + arms
        total = cfg.iterations * cfg.tasks * cfg.edits + of_a_task * len(held_out)
        done = len(self.rollouts.records)
        self.whole = Meter("self-edits of the whole run tried out", done), total

    def keep_weights(self, t: int, chosen: list[tuple]):
        """Note in round t's rollouts how much the M-step weighs each self-edit; 0: not kept."""
        weights = {(task, edit): weight for task, edit, weight in chosen}
        for place, record in self.rollouts.at(t, "train").items():
            record["weight"] = weights.get(place, 0.0)
        if ranks.RANK == 0:
            replace_file(self.rollouts.path, as_lines(self.rollouts.records))

    def show_round(self, t: int, tasks, edits, rewards, without, chosen):
        """Self-edits of the first task, the best first; then what the round's were worth."""
        self.log(f"for example, of {printable(tasks[0].name, 60)}:")
        for score, edit in sorted(zip(rewards[0], edits[0]), key=lambda pair: -pair[0]):
            text = " / ".join(edit.text.split("\n"))
            self.log(f"    {score:.2f}  {printable(text, 100) or '(nothing)'}")
        # Policy gradients weigh some self-edits below 0, so that they become less likely.
        wanted = [rewards[i][j] for i, j, weight in chosen if weight > 0]
        avoided = len(chosen) - len(wanted)
        self.log(f"round {t + 1}: mean reward {np.mean(rewards):.3f}, without a self-edit "
                 f"{np.mean(without):.3f}; kept {len(wanted)} self-edits with mean reward "
                 f"{np.mean(wanted or [0]):.3f}" + (f", and {avoided} to avoid" if avoided else ""))

    def record(self, metrics: dict):
        """A line of metrics.jsonl, which is shown. report.html is brought up to date."""
        if ranks.RANK == 0:
            self.metrics.add(metrics)
            page.refresh(self)
        else:
            self.metrics.records.append(metrics)
        self.log(iteration_line(metrics))

    # Weights.

    def load(self, t: int, folder=None):
        """theta_t of this run, or of the run in another folder; theta_0 is the base. One model is
        held at a time."""
        source = Path(folder or self.folder) / f"iter_{t}" if t else self.cfg.model
        if self.loaded is None or self.loaded[0] != source:
            self.loaded = None      # never two copies of the weights
            self.loaded = source, self.read_model(source)
        return self.loaded[1]

    def read_model(self, source):
        dtype = getattr(torch, self.cfg.dtype) if self.cfg.dtype else None
        model = self.load_pretrained(source, self.cfg.device, dtype)
        model.recompute = self.cfg.recompute
        return model

    def make(self, t: int, start: int, train):
        """theta_t, by train(theta_start), which changes the model in place. Rank 0 does it; the
        others wait, and read the result from disk."""
        folder = self.folder / f"iter_{t}"
        # It is there already if only metrics were lost.
        if ranks.RANK == 0 and not folder.is_dir():
            model = self.load(start)
            train(model)
            model.save_pretrained(folder)
            self.loaded = folder, model
        ranks.wait()

    def last_checkpoint(self) -> int:
        """The last iteration whose weights are there, and all before it measured; the base's always
        are."""
        measured = range(1, min(self.cfg.iterations, len(self.metrics.records)) + 1)
        return max((t for t in measured if (self.folder / f"iter_{t}").is_dir()), default=0)


# ------------------------------------------------------------------------------- fingerprints

def differences(mine: dict, theirs: dict) -> list[str]:
    """What another run has otherwise. What it does not say is taken to be the same."""
    differ = []
    for name in (mine | theirs).keys() - FREE - {"own", "content", "code"}:
        if theirs.get(name, mine.get(name)) != mine.get(name):
            differ.append(f"{name}: {theirs[name]!r}")
    for part in ("own", "content"):
        for name, value in mine[part].items():
            # A flag that was not given may be None, empty, or not there.
            other = theirs.get(part, mine[part]).get(name)
            if (other or None) != (value or None):
                differ.append(f"{name}: {other if isinstance(other, int) else 'another'}")
    return sorted(differ)


def print_of_code() -> dict[str, str]:
    """{file: its fingerprint} of the files that make a run what it is."""
    root, found = Path(__file__).resolve().parent.parent, {}
    for room in ("", "engine/", "support/", "data/"):
        for path in sorted(root.glob(f"{room}*.py")):
            found[room + path.name] = fingerprint(path)
    return found


def print_of_model(name) -> str:
    """A fingerprint of a checkpoint: its JSON files, and pieces of its weights."""
    folder = fetch(name)
    parts = sorted(folder.glob("*.json"))
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        parts.append(str(size))
        with path.open("rb") as f:
            for i in range(64):
                f.seek(i * size // 64)
                parts.append(f.read(1024))
    return fingerprint(*parts)


def print_of_data(source) -> str:
    """A fingerprint of a file, of all files of a folder, or of a name."""
    path = Path(source)
    if not source or not path.exists():
        return source
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return fingerprint(*files)
