"""Several processes, a GPU each, and the records that they share.

    torchrun --nproc-per-node 8 outer_loop.py ...

Every rank is the whole program. It takes its share of a phase's work, keeps what it finishes on
disk at once, and hears of the others' at the phase's end; rank 0 writes the run's files. No draw
depends on who makes it. Without torchrun there is rank 0 alone, and all of this does nothing. On
several machines the run's folder must be one that all of them see.
"""
import os
import time
from datetime import timedelta
from functools import cached_property, partial

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.files import Lines, UserError

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: str):
    """Meet the other ranks; on CUDA this process uses the GPU of its number. UserError if there are
    fewer GPUs."""
    if SIZE == 1 or dist.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    if device != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"this machine has {torch.cuda.device_count()} GPUs, and each process "
                            "takes one: --nproc-per-node is too high")
        torch.cuda.set_device(local)
    # gloo, as only records are exchanged. A rank may work for hours while the others wait; torchrun
    # sees to it that none waits for a dead one.
    dist.init_process_group("gloo", timeout=timedelta(days=30))


def share_of(costs: list[float]) -> list[int]:
    """The numbers of the items that this rank works on: the dearest first, each to the rank that
    has the least to do so far."""
    loads, owner = [0.0] * SIZE, {}
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += costs[i]
    return [i for i in range(len(costs)) if owner[i] == RANK]


def gather(x) -> list:
    """The x of every rank, in their order."""
    if SIZE == 1:
        return [x]
    everyone = [None] * SIZE
    try:
        dist.all_gather_object(everyone, x)
    except RuntimeError as e:
        why = str(e).splitlines()[0][:100]
        raise UserError(f"another rank has ended ({why}); nothing is lost: the same command "
                        "resumes") from None
    return everyone


wait = partial(gather, None)    # until all ranks are here


# ------------------------------------------------------------------------------- progress

class Meter:
    """meter(done, total) shows how far a phase is: a bar, or in a log a line every ten seconds. Of
    several ranks the first one speaks, of its own share."""

    def __init__(self, what, start=0):
        """start: how much an earlier process has done, which says nothing of this one's speed."""
        self.what = what
        self.start = start
        self.begin = self.said = time.time()
        # None: no bar where there is no terminal.
        self.bar = tqdm(desc=what, disable=True if RANK else None, leave=False, mininterval=0.5)

    def __call__(self, done, total):
        self.bar.total = total
        self.bar.update(done - self.bar.n)
        if done == total:
            return self.bar.close()
        now = time.time()
        # The first few say little about how long the rest will take.
        begun = done - self.start > total / 50
        if self.bar.disable and RANK == 0 and begun and now - self.said > 10:
            eta = (now - self.begin) / max(1, done - self.start) * (total - done)
            print(f"    {done}/{total} {self.what}, eta {eta:.0f}s", flush=True)
            self.said = now


# ------------------------------------------------------------------------------- records

class SharedLines(Lines):
    """Lines to which every rank adds. Rank 0's are in the file itself; those of another rank are in
    a part beside it until all ranks `exchange`, and a part that a kill left is taken in later.

    A reader (repair False) takes the file as it is, as another process may be writing it."""

    def __init__(self, path, repair=True):
        if not repair:
            return super().__init__(path, repair=False)
        if RANK == 0:
            super().__init__(path)
            for part in sorted(path.parent.glob(f"{path.stem}.part*{path.suffix}")):
                self.add(*[r for r in Lines(part).records if r not in self.records])
                part.unlink()
        wait()
        if RANK:
            super().__init__(path)
            self.path = path.with_name(f"{path.stem}.part{RANK}{path.suffix}")
        wait()
        self.exchanged = len(self.records)

    def exchange(self):
        """Every rank gets the others' new records; rank 0 writes them to the file."""
        everyone = gather(self.records[self.exchanged:])
        others = [r for rank, records in enumerate(everyone) if rank != RANK for r in records]
        if RANK == 0:
            self.add(*others)
        wait()
        if RANK:
            self.records += others
            self.path.unlink(missing_ok=True)
        # No part is left when a rank goes on: rank 0 may then write the records otherwise.
        wait()
        self.exchanged = len(self.records)


class Records(SharedLines):
    """Lines that belong to an iteration, a split (train or eval), an arm (what the model is trained
    on, "" for its own self-edits), a task and a self-edit: one for each, found by these."""

    def check(self, record):
        super().check(record)
        where = place_of(record)
        if where in self.places:
            raise ValueError("a second one for iteration {}, {} {!r}, task {}, self-edit {}"
                             .format(*where))
        self.places.add(where)
        # A rollout has an answer and a verdict for each question, and that for each seed.
        if "right" in record:
            rows = [record["gold"], *record["answers"], *record["right"]]
            seeds = {len(record[name]) for name in ("answers", "right", "losses")}
            if len(seeds) > 1 or {len(row) for row in rows} != {len(record["questions"])}:
                raise ValueError("its answers do not fit its questions")

    @cached_property
    def places(self):
        return set()

    def at(self, t, split, arm="") -> dict:
        """{(task, edit): its record}."""
        return {place_of(r)[3:]: r for r in self.records if place_of(r)[:3] == (t, split, arm)}

    def of(self, t, split, arm="") -> list[dict]:
        """In the order of tasks and self-edits, whatever the order in which they were made."""
        return sorted(self.at(t, split, arm).values(), key=place_of)


def place_of(record) -> tuple:
    return (record["iteration"], record["split"], record.get("arm", ""), record["task"],
            record["edit"])
