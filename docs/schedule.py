"""The steps that a GPU would take, without one: the table in docs/results/speed.md.

    python docs/schedule.py

The engine's own scheduler runs over the lengths of the released self-edits (data/lengths.json),
with steps that compute nothing. So its counts are exact: they depend on lengths and slots alone.
"""
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine import train
from engine.device import auto_slots
from engine.train import Engine, sft
from lora import Job
from model import Transformer
from tools.bench import RECIPE
from tools.plan import CARDS, GIB, LENGTHS, empty_model


class Schedule(Engine):
    """An engine without adapters, which counts its steps by kind."""

    def __init__(self, model, recipe, n):
        # One number stands for all parameters of an adapter.
        self.flat = self.read = self.m = self.v = torch.zeros(n, 1)
        self.adapters = mock.Mock()
        self.n = n
        self.running = [None] * n
        self.losses = []
        self.room = self.recorded = None
        COUNTED.clear()

    def step(self):
        step = train.pack(self.running, "cpu", torch.float32, self.room)
        self.losses.append(torch.zeros(self.n))
        COUNTED["steps"] += 1
        COUNTED["tokens"] += len(step.ids)
        shape = (len(step.ids), len(step.labels))
        # As device.Recorded does it: the first of a shape runs plainly, the second is recorded.
        kind = "plain"
        if step.fixed:
            COUNTED[shape] += 1
            kind = {1: "plain", 2: "recorded"}.get(COUNTED[shape], "replayed")
        COUNTED[kind] += 1


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
        list(sft(model, [replace(job, recipe=replace(RECIPE, slots=slots)) for job in jobs]))
    steps = COUNTED["steps"]
    counts = [steps, COUNTED["recorded"], COUNTED["plain"], COUNTED["replayed"]]
    print(f"| {name} | {n_jobs} | {slots} | {' | '.join(map(str, counts))} "
          f"| {COUNTED['tokens'] / steps:,.0f} |", flush=True)


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
