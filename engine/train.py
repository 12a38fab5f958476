"""Supervised fine-tuning of many adapters at once: the trainer of the inner loop.

    theta' <- SFT(theta, SE)

lora.sft_one is the textbook, one adapter trained by torch's own AdamW. `sft` gives the same for
hundreds of small jobs. At every step the next micro-batches of n jobs lie in one ribbon, and when a
job ends its slot takes the next one (continuous batching, for training). An adapter's parameters
touch its own tokens only, so each adapter gets exactly the gradient, clipping and update that it
would get alone, with its own learning rate, number of steps and loss mask.

Shapes: n slots, T tokens of a step, N of them with a label, D = dim, V vocabulary, P parameters of
an adapter.
"""
import time
from dataclasses import dataclass
from functools import partial
from typing import Iterable, Iterator

import torch

from engine.device import (Recorded, auto_slots, fused, has_flash, has_graphs, less_memory,
                           to_device, try_memory)
from engine.ribbon import Example, Packed, Room, pack


@dataclass
class Trained:
    weights: torch.Tensor   # (P,) a row of Adapters.flat
    losses: list[float]     # one per step
    seconds: float          # its share of the steps that it took part in
    diverged: bool          # some weight is not finite


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


def sft(model, jobs: list, progress=None) -> Iterator[tuple[int, Trained]]:
    """Train an adapter for every job: yields (its number, Trained) as jobs end. The longest begin
    first.

    The model stays as it is. progress(done, total) is called after each step. If memory runs out,
    unfinished jobs restart with half as many slots; the result is the same."""
    # Longest first: a long job that began last would run alone in the end.
    waiting = sorted(range(len(jobs)), key=lambda i: -jobs[i].steps)
    waiting = [i for i in waiting if jobs[i].steps]
    if not waiting:
        return
    total = sum(job.steps for job in jobs)
    slots = jobs[0].recipe.slots
    recompute = model.recompute
    # A CPU's system that runs out kills the process, and there is nothing to catch.
    if model.device.type == "cpu" and not recompute and not auto_slots(model, jobs):
        print("memory is short: activations are recomputed", flush=True)
        model.recompute = True
    try:
        while waiting:
            slots = min(slots or auto_slots(model, jobs) or 1, len(waiting))
            # fill_slots empties its copy of `waiting`; this one keeps what has not ended.
            training = fill_slots(model, jobs, list(waiting), slots, total, progress)
            ok, ended = try_memory(lambda: next(training, None))
            while ended:
                waiting.remove(ended[0])
                yield ended
                ok, ended = try_memory(lambda: next(training, None))
            if not ok:
                slots = less_memory(model, slots)
    finally:
        model.recompute = recompute


def batched(items: Iterable, size: int, seconds=60.0) -> Iterator[list]:
    """Group items into lists of `size`, as they come. A list is also closed after `seconds`: a kill
    loses at most a minute of work."""
    batch, begin = [], time.time()
    for item in items:
        batch.append(item)
        if len(batch) == size or time.time() - begin > seconds:
            yield batch
            batch, begin = [], time.time()
    if batch:
        yield batch


def fill_slots(model, jobs, waiting, n, total, progress):
    """Train the waiting jobs, n side by side, the first ones first: yields (number, Trained).

    total: the optimiser steps of all jobs, of which `progress` hears how many are done."""
    engine = Engine(model, jobs[0].recipe, n)
    if has_graphs(model.device) and can_record(engine.adapters, jobs):
        # Of larger steps the host's part is small beside the GPU's.
        most = int(4e12 / sum(p.numel() for p in model.parameters()))
        engine.room, engine.recorded = Room.of(jobs, n, most), Recorded()
    left = sum(jobs[i].steps for i in waiting)
    ended = []
    while True:
        begin = time.time()
        engine.take_jobs(jobs, waiting)
        active = [running for running in engine.running if running]
        if active:
            engine.step()
        # Jobs that ended a step ago are read now: a GPU is busy with this step meanwhile.
        trained = []
        for running, weights, curve in ended:
            *losses, finite = curve.tolist()
            trained.append((running.number,
                            Trained(weights, losses, running.seconds, diverged=not finite)))

        # The time of a step is shared by the jobs in it.
        for running in active:
            running.step += 1
            running.seconds += (time.time() - begin) / len(active)
        ended = engine.take_out()
        if active:
            left -= len(active)
            if progress:
                progress(total - left, total)
        yield from trained
        if not active:
            return


def can_record(adapters, jobs) -> bool:
    """Whether the jobs' steps can be CUDA graphs: if no shape depends on how long a single text is,
    and nothing that a step does depends on who is in which slot."""
    model = adapters.model
    heads = torch.empty(0, 1, model.config.head_dim, device=model.device, dtype=model.dtype)
    plain = all(job.free is None and not job.recipe.pad_to for job in jobs)
    return adapters.grouped and has_flash(heads) and plain


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
        # Where steps are recorded as CUDA graphs: their shapes, and the graphs.
        self.room: Room | None = None
        self.recorded: Recorded | None = None

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
        step = pack(self.running, self.model.device, self.flat.dtype, self.room)
        # An empty slot holds zeros and has no gradient: its step changes nothing.
        lr, t = [0.0] * self.n, [1.0] * self.n
        for slot, active in enumerate(self.running):
            if active:
                lr[slot], t[slot] = active.job.lr_at(active.step), active.step + 1
        step.lr, step.t = (to_device(torch.tensor(values, dtype=self.flat.dtype)[:, None],
                                     self.model.device) for values in (lr, t))
        compute = partial(self.recorded, self.compute) if step.fixed else self.compute
        self.losses.append(compute(step))

    def compute(self, step: Packed):
        """All that a GPU does in a step: the losses (n,), the gradients of all adapters by one pass
        over the ribbon, and AdamW.

        An adapter's loss is the mean over its micro-batch's labels. Their sum is back-propagated:
        each adapter appears in its own term only."""
        self.read.grad = None
        # Only tokens that predict a label go through the output layer. The backward pass is within
        # the route as well: with `recompute` it runs the blocks again, adapters included.
        with self.adapters.route(step.segments, self.read):
            h = self.model.hidden(step.ids, step.ribbon.position, step.ribbon.attend)   # (T, D)
            h = h.index_select(0, step.source)                                          # (N, D)
            nll = FrozenHeadLoss.apply(h, self.model.lm_head.weight, step.labels)
            nll = nll * step.weight
            nll.sum().backward()
        for slot, active in enumerate(self.running):
            if active and active.job.free is not None:
                self.read.grad[slot] *= active.job.free
        # Each adapter has its own learning rate and step number.
        fused(adamw_, self.flat)(
            self.flat, self.read.grad, self.m, self.v, step.lr, step.t, self.read.detach(),
            clip=self.recipe.clip, weight_decay=self.recipe.weight_decay)
        # For the record: each slot's loss is the sum of its labels' weighted losses.
        losses = self.flat.new_zeros(self.n)
        return losses.index_add(0, step.slot, nll.detach().to(losses.dtype))

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


# ------------------------------------------------------------------------------- loss and AdamW

# Written out, as the output layer is frozen and as each adapter has its own learning rate, step
# number and clipping. lora.sft_one uses torch's own.

class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a frozen output layer: h (N, D), W (V, D), labels (N,) -> nll (N,).

    The logits (N, V) never exist at once. As W needs no gradient, d nll / dh = (softmax - onehot) W
    is computed in the forward pass, chunk by chunk, and the backward pass only scales it."""

    @staticmethod
    def forward(ctx, h, W, labels):
        nll = torch.empty(len(h), device=h.device, dtype=torch.promote_types(h.dtype, torch.float))
        grad = torch.empty_like(h)
        # A chunk has at most 2^27 logits (2^24 on a CPU): .5 GiB in float32.
        size = max(1, (2 ** 27 if h.is_cuda else 2 ** 24) // len(W))
        loss_of = fused(nll_and_gradient, h)
        for i in range(0, len(h), size):
            chunk = slice(i, i + size)
            nll[chunk], grad[chunk] = loss_of(h[chunk], W, labels[chunk, None], nll.dtype)
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, g):
        (grad,) = ctx.saved_tensors
        return grad * g[:, None].to(grad.dtype), None, None


def nll_and_gradient(h, W, label, dtype):
    """nll (N,) of labels (N, 1), computed in this dtype, and d nll / dh (N, D)."""
    p = (h @ W.T).to(dtype).log_softmax(-1)             # (N, V), logarithms
    nll = -p.gather(1, label)[:, 0]
    # d nll / d logits = softmax - onehot, in the place of the logarithms.
    p = p.exp_()
    if p.is_cuda:       # pointwise, so that it is one kernel with what stands around it
        p = p - (torch.arange(p.shape[1], device=p.device) == label).to(p.dtype)
    else:
        p.scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))
    return nll, p.to(h.dtype) @ W


@torch.no_grad()
def adamw_(p, g, m, v, lr, t, copy, clip, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """One AdamW step (arXiv 1711.05101) of n adapters, in place, each gradient clipped by its norm.

    p, g, m, v (n, P); lr and the step's number t, from 1, (n, 1): each adapter has its own. copy:
    of p in the model's dtype, which is written as well (or p itself); g is in that dtype."""
    g = g.to(p.dtype)
    norm = g.norm(dim=1, keepdim=True)
    # Clip: shorten a gradient whose norm exceeds `clip`, as torch's clip_grad_norm_ does.
    g = g.mul_((clip / (norm + 1e-6)).clamp(max=1))
    # Running means of the gradient and of its square. They start at 0: m_hat, v_hat correct that.
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    m_hat = m / (1 - betas[0] ** t)
    v_hat = v / (1 - betas[1] ** t)
    # Decoupled weight decay: it acts on the values themselves, not through the gradient.
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.sub_(m_hat.div_(v_hat.sqrt_().add_(eps)).mul_(lr))
    if copy.dtype != p.dtype:
        copy.copy_(p)
