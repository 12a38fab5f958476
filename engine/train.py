"""Supervised fine-tuning of many adapters at once: the one trainer of both loops.

    theta' <- SFT(theta, SE)

The inner loop gives `sft` hundreds of small jobs, the M-step of the outer loop a single larger one.
lora.sft_one is the textbook, one adapter trained by torch's own AdamW. `sft` gives the same for
many: at every step the next micro-batches of n jobs lie in one ribbon, and when a job ends its slot
takes the next one (continuous batching, for training). An adapter's parameters touch its own tokens
only, so each adapter gets exactly the gradient, clipping and update that it would get alone, with
its own learning rate, number of steps and loss mask.

Shapes: n slots, T tokens of a step, N of them with a label, D = dim, V vocabulary, P parameters of
an adapter.
"""
import time
from dataclasses import dataclass
from typing import Iterator

import torch

from engine.decode import quiet
from engine.gpu import Recorded, has_flash, has_graphs, to_device
from engine.memory import (activation_memory, auto_slots, free_memory, give_back_memory,
                           is_out_of_memory, less_memory, recompute_if_short, tokens_per_step)
from engine.packing import Example, Packed, Room, pack
from engine.update import FrozenHeadLoss, adamw_all


@dataclass
class Trained:
    weights: torch.Tensor   # (P,) a row of Adapters.flat
    losses: list[float]     # one per step
    seconds: float          # its share of the steps that it took part in
    diverged: bool          # some weight is not finite


# ------------------------------------------------------------------------------- the engine

@dataclass
class Running:
    """A job that is being trained, and how far it is."""
    number: int             # of the job
    job: object             # a lora.Job
    examples: list[Example]
    batches: Iterator       # what is left of job.micro_batches()
    first: int              # which step of the engine was its first
    step: int = 0
    seconds: float = 0.0


def sft(model, jobs: list, progress=quiet) -> Iterator[tuple[int, Trained]]:
    """Train an adapter for every job: yields (its number, Trained) as jobs end. The longest begin
    first.

    The model stays as it is. `progress` hears of the optimiser steps. When memory runs out, it goes
    on with half the slots (see less_memory): jobs under way begin again, and end the same."""
    # Longest first: a long job that began last would run alone in the end.
    waiting = sorted(range(len(jobs)), key=lambda i: -jobs[i].steps)
    waiting = [i for i in waiting if jobs[i].steps]
    recompute = model.recompute
    try:
        yield from train_waiting(model, jobs, waiting, progress)
    finally:
        model.recompute = recompute


def train_waiting(model, jobs, waiting, progress):
    """sft, of the jobs whose numbers are in `waiting`; model.recompute may change."""
    total = sum(job.steps for job in jobs)
    slots = jobs[waiting[0]].recipe.slots if waiting else 0
    if waiting:
        recompute_if_short(model, jobs)
    while waiting:
        slots = min(slots or auto_slots(model, jobs), len(waiting))
        ran_out = False
        try:
            # fill_slots empties its copy of `waiting`; this one keeps what has not ended.
            for i, trained in fill_slots(model, jobs, list(waiting), slots,
                                         lambda left: progress(total - left, total)):
                waiting.remove(i)
                yield i, trained
        except (RuntimeError, MemoryError) as e:
            ran_out = is_out_of_memory(e)
            if not ran_out:
                raise
        # Not within `except`, as the error holds on to what was in use.
        if ran_out:
            slots = less_memory(model, slots)
            give_back_memory(model.device)


def fill_slots(model, jobs, waiting, n, progress):
    """Train the waiting jobs, n side by side, the first ones first: yields (number, Trained).

    `progress` hears how many optimiser steps are left."""
    engine = Engine(model, jobs[0].recipe, n)
    if can_record(engine.adapters, jobs, n):
        engine.room = Room.of(jobs, n)
    left = sum(jobs[i].steps for i in waiting)
    ended = []
    while True:
        begin = time.time()
        engine.take_jobs(jobs, waiting)
        active = [running for running in engine.running if running]
        if active:
            engine.step()
        # Jobs that ended a step ago are read now: a GPU is busy with this step meanwhile.
        trained = [read_ended(*job) for job in ended]

        # The time of a step is shared by the jobs in it.
        for running in active:
            running.step += 1
            running.seconds += (time.time() - begin) / len(active)
        ended = engine.take_out()
        if active:
            left -= len(active)
            progress(left)
        yield from trained
        if not active:
            return


def read_ended(running, weights, curve) -> tuple[int, Trained]:
    *losses, finite = curve.tolist()
    return running.number, Trained(weights, losses, running.seconds, diverged=not finite)


def can_record(adapters, jobs, slots: int) -> bool:
    """Whether the jobs' steps can be CUDA graphs: if no shape depends on how long a single text is,
    nothing that a step does depends on who is in which slot, and there is room for it."""
    model = adapters.model
    heads = torch.empty(0, 1, model.config.head_dim, device=model.device, dtype=model.dtype)
    plain = all(job.free is None and not job.recipe.pad_to for job in jobs)
    if not (has_graphs(model.device) and adapters.grouped and has_flash(heads) and plain):
        return False
    # Graphs keep memory of their own, beside what the steps take that just run: both hold what the
    # backward pass needs. Twice the mean, as some steps are longer.
    tokens = 2 * slots * tokens_per_step(jobs)
    return 2 * activation_memory(model, adapters.lora, tokens) < free_memory(model.device)


class Engine:
    """n slots, an adapter in each."""

    def __init__(self, model, recipe, n: int):
        self.model = model
        self.recipe = recipe
        self.n = n
        # The parameters of all adapters and AdamW's two moments, a row of (n, P) for each slot.
        self.adapters = recipe.lora.adapters(model, n)
        self.flat = self.adapters.flat
        # What the products read, and what has a gradient: of a bfloat16 model a copy, which the
        # update writes, so that nothing is cast in a step; else `flat` itself.
        self.read = self.flat.to(model.dtype).detach().requires_grad_()
        self.m = torch.zeros_like(self.flat)
        self.v = torch.zeros_like(self.flat)
        # Who is in each slot, and the losses (n,) of every step. They stay on the device until a
        # job ends, as reading one would wait for the step.
        self.running: list[Running | None] = [None] * n
        self.losses: list[torch.Tensor] = []
        # If there is a Room, steps are recorded as CUDA graphs.
        self.room: Room | None = None
        self.recorded = Recorded()

    def take_jobs(self, jobs, waiting):
        """Continuous batching: an empty slot takes the next job, out of `waiting`."""
        for slot in range(self.n):
            if self.running[slot] or not waiting:
                continue
            # AdamW's moments are zero: give_back cleared them.
            number = waiting.pop(0)
            job = jobs[number]
            if job.start is None:
                self.adapters.init(slot, job.seed)
            else:
                self.flat[slot] = job.start
            self.read.detach()[slot] = self.flat[slot]
            examples = [Example.of(ids, learn, job.recipe.pad_to) for ids, learn in job.examples]
            self.running[slot] = Running(number, job, examples, job.micro_batches(),
                                         first=len(self.losses))

    def step(self):
        """A step of AdamW for every running job, on its next micro-batch."""
        step = self.next_step()
        if self.room:
            losses = self.recorded(self.compute, step)
        else:
            losses = self.compute(step)
        self.losses.append(losses)

    def next_step(self) -> Packed:
        step = pack(self.running, self.model.device, self.flat.dtype, self.room)
        # An empty slot holds zeros and has no gradient: its step changes nothing.
        lr = torch.zeros(self.n, 1, dtype=self.flat.dtype)
        t = torch.ones(self.n, 1, dtype=self.flat.dtype)
        for slot, active in enumerate(self.running):
            if active:
                lr[slot] = active.job.lr_at(active.step)
                t[slot] = active.step + 1
        step.lr, step.t = to_device(lr, self.model.device), to_device(t, self.model.device)
        return step

    def compute(self, step: Packed):
        """All that a GPU does in a step: the losses (n,)."""
        losses = self.forward_backward(step)
        self.update(step)
        return losses

    def forward_backward(self, step: Packed):
        """The gradients of all adapters, by one pass over the ribbon: the losses (n,).

        An adapter's loss is the mean over its micro-batch's labels. Their sum is back-propagated:
        each adapter appears in its own term only."""
        self.read.grad = None
        # Only tokens that predict a label go through the output layer. The backward pass is within
        # the route as well: with `recompute` it runs the blocks again, adapters included.
        with self.adapters.along(step.segments, self.read):
            h = self.model.hidden(step.ids, step.ribbon.position, step.ribbon.attend)   # (T, D)
            h = h.index_select(0, step.source)                                          # (N, D)
            nll = FrozenHeadLoss.apply(h, self.model.lm_head.weight, step.labels)
            nll = nll * step.weight
            nll.sum().backward()
        # For the record: each slot's loss is the sum of its labels' weighted losses.
        losses = self.flat.new_zeros(self.n)
        return losses.index_add(0, step.slot, nll.detach().to(losses.dtype))

    def update(self, step: Packed):
        """An AdamW step of every adapter, each with its own learning rate and step number."""
        for slot, active in enumerate(self.running):
            if active and active.job.free is not None:
                self.read.grad[slot] *= active.job.free
        adamw_all(self.flat, self.read.grad, self.m, self.v, step.lr, step.t, self.read.detach(),
                  clip=self.recipe.clip, weight_decay=self.recipe.weight_decay)

    def take_out(self):
        """Empty the slots whose job has ended: a list of (running, its weights, its losses and
        whether the weights are finite), on the device."""
        ended = []
        for slot, active in enumerate(self.running):
            if not active or active.step < active.job.steps:
                continue
            weights = self.flat[slot].detach().clone()
            losses = torch.stack(self.losses[active.first:])[:, slot]
            # One pass, where isfinite takes five: a sum is finite only if all its terms are.
            finite = weights.sum().isfinite().to(losses.dtype)
            # In one piece, as reading waits for the device: once per job.
            ended.append((active, weights, torch.cat([losses, finite[None]])))
            # An empty slot has no tokens, and stays at zero.
            self.running[slot] = None
            for state in (self.flat, self.read, self.m, self.v):
                state.detach()[slot] = 0
        return ended
