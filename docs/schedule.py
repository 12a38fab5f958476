"""The steps that a GPU would take, without one: the table in docs/results/speed.md.

    python docs/schedule.py

The engine's own scheduler runs over the lengths of the released self-edits (data/lengths.json),
with steps that compute nothing. So its counts are exact: they depend on lengths and slots alone.
"""
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import train
from engine.device import auto_slots
from engine.ribbon import Example
from engine.train import Engine, Running, fill_slots
from lora import Job
from model import Transformer
from tools.bench import RECIPE
from tools.plan import CARDS, GIB, LENGTHS, empty_model


class Schedule(Engine):
    """An engine without adapters, which counts its steps by kind."""

    def __init__(self, model, recipe, n):
        self.model, self.recipe, self.n = model, recipe, n
        self.adapters = mock.Mock()
        self.flat = torch.zeros(0)
        self.running = [None] * n
        self.losses = []
        self.room = self.recorded = None
        COUNTED.clear()

    def take_jobs(self, jobs, waiting):
        for slot in range(self.n):
            if self.running[slot] is None and waiting:
                number = waiting.pop(0)
                job = jobs[number]
                examples = [Example.of(ids, learn) for ids, learn in job.examples]
                self.running[slot] = Running(number, job, examples, job.micro_batches(), first=0)

    def step(self):
        step = train.pack(self.running, "cpu", torch.float32, self.room)
        COUNTED["steps"] += 1
        COUNTED["tokens"] += len(step.ids)
        shape = (len(step.ids), len(step.labels))
        # As device.Recorded does it: the first of a shape runs plainly, the second is recorded.
        kind = "plain"
        if step.fixed:
            COUNTED[shape] += 1
            kind = {1: "plain", 2: "recorded"}.get(COUNTED[shape], "replayed")
        COUNTED[kind] += 1

    def take_out(self):
        ended = []
        for slot, active in enumerate(self.running):
            if active and active.step == active.job.steps:
                ended.append((active, torch.zeros(0), torch.ones(1)))
                self.running[slot] = None
        return ended


COUNTED = Counter()


def row(name, model, n_jobs, free):
    """A line of the table: n_jobs inner loops, with as many slots as a run would take."""
    jobs = []
    for seed in range(n_jobs):
        lengths = LENGTHS[seed % len(LENGTHS)]      # in a round each is trained three times
        jobs.append(Job([([0] * n, [True] * n) for n in lengths], seed, RECIPE))
    # The GPU's token target; the model itself has no memory and no device.
    with mock.patch.object(Transformer, "device", torch.device("cuda")):
        slots = auto_slots(model, jobs, free)
    with mock.patch.object(train, "Engine", Schedule), \
            mock.patch.object(train, "has_graphs", return_value=True), \
            mock.patch.object(train, "can_record", return_value=True):
        for _ in fill_slots(model, jobs, order(jobs), slots, lambda left: None):
            pass
    steps = COUNTED["steps"]
    counts = [steps, COUNTED["recorded"], COUNTED["plain"], COUNTED["replayed"]]
    print(f"| {name} | {n_jobs} | {slots} | {' | '.join(map(str, counts))} "
          f"| {COUNTED['tokens'] / steps:,.0f} |", flush=True)


def order(jobs: list[Job]) -> list[int]:
    """Longest first, as engine.train.sft begins them."""
    return sorted(range(len(jobs)), key=lambda i: -jobs[i].steps)


def main():
    print("| | inner loops | slots | steps | recorded | plain | replayed | tokens a step |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in ("qwen2.5-0.5b", "qwen2.5-7b"):
        model = empty_model(shape, torch.bfloat16)
        weights = sum(p.numel() * p.itemsize for p in model.parameters())
        free = CARDS[141].gib * GIB - weights
        for n_jobs in (750, 60, 200):
            row(shape, model, n_jobs, free)


if __name__ == "__main__":
    main()
