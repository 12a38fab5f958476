"""Supervised fine-tuning of many adapters at once: the one trainer of both loops."""
import math
import random
import time
from dataclasses import dataclass
from functools import cache
from typing import Iterator

import torch

from checkpoint import UserError
from lora import Adapters
from model import Ribbon, free_memory, slow_bf16, to_device


@dataclass
class Recipe:
    """Hyper-parameters of an SFT."""
    rank: int
    alpha: float
    targets: list[str]
    lr: float               # the highest, see Job.lr_at
    epochs: int
    batch: int              # examples per step
    schedule: str = "linear"        # of the learning rate, to 0; or cosine
    warmup: int = 0         # steps before, in which it rises from 0
    completion_only: bool = False   # loss on the completions of (prompt, completion) documents
    clip: float = 1.0       # of an adapter's gradient norm
    weight_decay: float = 0.0
    slots: int = 0          # adapters trained side by side; 0: as many as fill a step and fit
    pad_to: int = 0         # of self-edits' documents, see Job

    def job(self, examples, seed):
        return Job(examples, seed, self.lr, self.epochs, self.batch, self.schedule, self.warmup,
                   pad_to=self.pad_to)


@dataclass
class Job:
    """One adapter to train. examples: (ids, learn) lists; the loss is on ids[j] where learn[j]."""
    examples: list
    seed: int               # of the adapter's first values and of the order of its examples
    lr: float
    epochs: int
    batch: int
    schedule: str = "linear"
    warmup: int = 0
    start: torch.Tensor | None = None   # (P,) values to begin with, in place of fresh ones
    free: torch.Tensor | None = None    # (P,) which of them may change; all
    pad_to: int = 0         # as if rows were padded to so many tokens, and pads learned (`prepare`)

    @property
    def steps(self):
        return self.epochs * -(-len(self.examples) // self.batch)

    def lr_at(self, step):
        """The learning rate of a step, counted from 0: transformers' schedules."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        left = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.lr * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def micro_batches(self):
        """The indices of every step's examples, shuffled afresh for each epoch."""
        rng, order = random.Random(self.seed), list(range(len(self.examples)))
        for _ in range(self.epochs):
            rng.shuffle(order)
            yield from (order[i:i + self.batch] for i in range(0, len(order), self.batch))


@dataclass
class Trained:
    weights: torch.Tensor   # (P,) a row of Adapters.flat
    losses: list[float]     # one per step
    seconds: float          # its share of the steps that it took part in
    diverged: bool          # some weight is not finite


@dataclass
class Example:
    """A text to train on, as tensors on the host."""
    ids: torch.Tensor       # (L,)
    source: torch.Tensor    # (N,) the tokens that predict a label
    labels: torch.Tensor    # (N,)
    weight: torch.Tensor    # (N,) of each label's loss, before the mean over the micro-batch
    position: torch.Tensor  # (L,) for RoPE
    pads: int = 0           # the last tokens of ids, which stand for padding

    @classmethod
    def prepare(cls, ids, learn, pad_to=0, pads=8):
        """With `pad_to`, as the official code trains: the EOS at the end is the first of the pads
        that fill a row of pad_to tokens, and each is to predict the next one. A pad sees the
        content and no other pad (the padding mask hides those), so that pads differ by RoPE alone:
        a few, spread evenly over the row, are weighted to stand for all."""
        ids, learn = torch.tensor(ids), torch.tensor(learn)
        if 0 < pad_to < len(ids):
            ids, learn = ids[:pad_to], learn[:pad_to]
        source = learn[1:].nonzero()[:, 0]
        labels, weight, position = ids[source + 1], torch.ones(len(source)), torch.arange(len(ids))
        if len(ids) >= pad_to:
            return cls(ids, source, labels, weight, position)
        content = len(ids) - 1
        n = pad_to - 1 - content                    # pads that have a pad to predict
        pads = min(pads, n)
        at = content + ((torch.arange(pads) + 0.5) * n / pads).long()
        eos = ids[-1:].expand(pads)
        return cls(torch.cat([ids[:content], eos]),
                   torch.cat([source, torch.arange(content, content + pads)]),
                   torch.cat([labels, eos]),
                   torch.cat([weight, torch.full((pads,), n / pads)]),
                   torch.cat([position[:content], at]), pads)


@dataclass
class Running:
    """A job in a slot."""
    index: int
    job: Job
    batches: Iterator
    examples: list[Example]
    first: int              # which step of the engine was its first
    step: int = 0
    seconds: float = 0.0


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a frozen output layer: h (N, D), W (V, D), labels (N,) -> nll (N,).

    The logits (N, V) never exist at once. The gradient d nll / dh = (softmax - onehot) W is
    computed in the forward pass, chunk by chunk; the backward pass only scales it."""

    @staticmethod
    def forward(ctx, h, weight, labels):
        nll = torch.empty(len(h), device=h.device, dtype=torch.promote_types(h.dtype, torch.float))
        grad = torch.empty_like(h)
        if slow_bf16(h):
            h, weight = h.float(), weight.float()
        size = max(1, (2 ** 27 if h.is_cuda else 2 ** 24) // len(weight))
        for i in range(0, len(h), size):
            chunk, label = slice(i, i + size), labels[i:i + size, None]
            log_p = (h[chunk] @ weight.T).to(nll.dtype).log_softmax(-1)
            nll[chunk] = -log_p.gather(1, label)[:, 0]
            p = log_p.exp_()
            p.scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))
            grad[chunk] = (p.to(h.dtype) @ weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, g):
        (grad,) = ctx.saved_tensors
        return grad * g[:, None].to(grad.dtype), None, None


@torch.no_grad()
def adamw_(p, g, m, v, lr, t, clip, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """One AdamW step (arXiv 1711.05101) of n adapters, in place.

    p, g, m, v (n, P); lr and the step's number t, from 1, (n, 1): each adapter has its own."""
    g.mul_((clip / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1))
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.sub_(m_hat.div_(v_hat.sqrt_().add_(eps)).mul_(lr))


@cache
def compiled_adamw_():
    return torch.compile(adamw_, dynamic=False)  # pointwise, and its shapes stay: a kernel or two


def parameters(model, recipe):
    """P, of one adapter."""
    return Adapters(model, 0, recipe.rank, 1, recipe.targets).flat.shape[1]


def step_memory(model, recipe, slots, tokens):
    """Bytes of a training step: per adapter parameter 18 (value, gradient, m and v in float32, a
    copy in bfloat16), and per token what a block keeps for its backward pass."""
    c = model.config
    kept = 5 * c.dim + 2 * (c.n_head + c.n_kv_head) * c.head_dim + 4 * c.hidden_dim
    kept = kept if not model.recompute else c.dim
    return 18 * slots * parameters(model, recipe) + tokens * c.n_layer * kept * model.dtype.itemsize


def auto_slots(model, jobs, recipe):
    """How many adapters to train side by side: enough to fill a step, few enough to fit."""
    tokens = sum(len(ids) * job.epochs for job in jobs for ids, _ in job.examples)
    per_step = tokens / sum(job.steps for job in jobs)
    full = 4096 if model.device.type == "cuda" else 1024  # tokens that keep the device busy
    one = step_memory(model, recipe, 1, 2 * per_step)     # twice: some steps are longer
    return max(1, min(len(jobs), round(full / per_step), int(free_memory(model.device) / 2 / one)))


def pack(running, device):
    """Lay the next micro-batch of every running job end to end, sorted by slot.

    Returns the ribbon, the tokens per slot, and, as tensors on the device: ids (T,), source (N,)
    the positions that predict a label, labels (N,), weight (N,) one over its adapter's number of
    labels, owner (N,) its slot. On the host there is no work per token."""
    ids, source, labels, weight, owner = columns = [], [], [], [], []
    texts, counts, begin = [], [0] * len(running), 0
    for slot, run in enumerate(running):
        batch = [run.examples[e] for e in next(run.batches)] if run else []
        total = sum(x.weight.sum() for x in batch)
        for x in batch:
            ids.append(x.ids)
            source.append(begin + x.source)
            labels.append(x.labels)
            weight.append(x.weight / total.clamp(min=1))
            owner.append(torch.full((len(x.source),), slot))
            counts[slot] += len(x.ids)
            begin += len(x.ids)
        texts += batch
    ribbon = Ribbon([len(x.ids) for x in texts], device, pads=[x.pads for x in texts])
    if any(x.pads for x in texts):
        ribbon.position = to_device(torch.cat([x.position for x in texts]), device)
    return ribbon, counts, *(to_device(torch.cat(c), device) for c in columns)


def sft(model, jobs, recipe, progress=lambda done, total: None):
    """Train an adapter for every job: yields (index, Trained) as jobs end.

    The model stays as it is. `progress` hears of the optimiser steps. When memory runs out, it goes
    on with half the slots: jobs under way begin again, and end the same."""
    waiting = sorted((i for i, job in enumerate(jobs) if job.steps), key=lambda i: -jobs[i].steps)
    slots, total = recipe.slots, sum(job.steps for job in jobs)
    while waiting:
        slots = min(slots or auto_slots(model, jobs, recipe), len(waiting))
        try:
            for i, trained in fill_slots(model, jobs, list(waiting), slots, recipe,
                                         lambda left: progress(total - left, total)):
                waiting.remove(i)
                yield i, trained
        except torch.OutOfMemoryError:
            if slots == 1:
                raise UserError("out of memory with a single adapter; try --recompute, a smaller "
                                "batch or shorter documents") from None
            slots //= 2
            print(f"out of memory: going on with {slots} adapters side by side", flush=True)


def fill_slots(model, jobs, waiting, n, recipe, progress):
    """Train the waiting jobs, n side by side, the first ones first: yields (index, Trained).

    An adapter's loss is the mean over its micro-batch's labels. The sum over adapters is
    back-propagated; as an adapter's parameters touch its own tokens only, each gets the gradient it
    would get alone. `progress` hears how many optimiser steps are left."""
    adapters = Adapters(model, n, recipe.rank, recipe.alpha, recipe.targets)
    flat = adapters.flat.requires_grad_()                   # (n, P)
    m, v = torch.zeros_like(flat), torch.zeros_like(flat)   # AdamW's moments
    running, losses, left = [None] * n, [], sum(jobs[i].steps for i in waiting)
    # A GPU updates all adapters in one compiled kernel, a CPU one by one, within its cache.
    update, rows = (compiled_adamw_(), n) if model.device.type == "cuda" else (adamw_, 1)
    while waiting or any(running):
        begin = time.time()
        for slot in range(n):
            if waiting and not running[slot]:  # continuous batching: an empty slot takes a new job
                i = waiting.pop(0)
                if jobs[i].start is None:
                    adapters.init(slot, jobs[i].seed)
                else:
                    adapters.flat.data[slot] = jobs[i].start
                examples = [Example.prepare(*x, jobs[i].pad_to) for x in jobs[i].examples]
                running[slot] = Running(i, jobs[i], jobs[i].micro_batches(), examples,
                                        first=len(losses))
        ribbon, counts, ids, source, labels, weight, owner = pack(running, model.device)
        flat.grad = None
        with adapters.route(counts):
            h = model.hidden(ids, ribbon.position, ribbon.attend).index_select(0, source)
            nll = FrozenHeadLoss.apply(h, model.lm_head.weight, labels) * weight
            nll.sum().backward()
        for slot, run in enumerate(running):
            if run and run.job.free is not None:
                flat.grad[slot] *= run.job.free
        losses.append(flat.new_zeros(n).index_add(0, owner, nll.detach().to(flat.dtype)))
        lr_t = torch.tensor([[r.job.lr_at(r.step), r.step + 1] if r else [0, 1]
                             for r in running], dtype=flat.dtype)
        lr, t = to_device(lr_t, model.device).split(1, dim=1)
        for state in zip(*(x.split(rows) for x in (flat.detach(), flat.grad, m, v, lr, t))):
            update(*state, recipe.clip, recipe.weight_decay)

        seconds = (time.time() - begin) / sum(run is not None for run in running)
        for run in filter(None, running):
            run.step, run.seconds, left = run.step + 1, run.seconds + seconds, left - 1
        progress(left)
        for slot, run in enumerate(running):
            if run and run.step == run.job.steps:
                weights = flat.detach()[slot].clone()
                curve = torch.stack(losses[run.first:])[:, slot].tolist()
                yield run.index, Trained(weights, curve, run.seconds,
                                         diverged=not weights.isfinite().all())
                running[slot] = None
                with torch.no_grad():  # an empty slot has no tokens, and stays at zero
                    flat[slot], m[slot], v[slot] = 0, 0, 0


def dialogue(prompt, completion, completion_only=True):
    """(ids, learn) of what a model reads and what it is to write, lists of ids."""
    return prompt + completion, [not completion_only] * len(prompt) + [True] * len(completion)
