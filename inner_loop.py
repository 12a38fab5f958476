"""The inner loop: theta' <- SFT(theta, SE) for many self-edits at once, and the reward r of each.

    python inner_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/example_eval.json  # one passage, before and after

`sft` is the only trainer here. A job is one adapter to train: the inner loop gives it hundreds of small ones, the M-step
of the outer loop a single larger one. At every step the next micro-batch of each of n jobs lies in one ribbon; when a job
ends, its slot takes the next one, longest job first: continuous batching, for training. Each adapter gets exactly
the gradient, clipping and AdamW step it would get alone, with its own learning rate, number of steps and loss mask.

Shapes: n slots, T tokens in a step, N of them with a label, D = dim, V vocabulary, P parameters per adapter.
"""
import argparse, os, random, time
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from lora import Adapters
from model import UserError, Ribbon, cli, generate, load_pretrained
from selfedit import sample_self_edits, seed_for


@dataclass
class Recipe:
    """Hyper-parameters of an SFT; a job may override lr and epochs."""
    rank: int
    alpha: float
    targets: list[str]
    lr: float               # decays linearly to 0 over the job's steps, no warm-up
    epochs: int
    batch: int              # documents per step
    clip: float = 1.0       # of the adapter's gradient norm
    weight_decay: float = 0.0
    slots: int = 0          # adapters trained side by side; 0: as many as fill a step and fit in memory


@dataclass
class Job:
    """One adapter to train: examples are (ids, learn) pairs of lists; the loss is on the tokens where learn is True."""
    examples: list
    seed: int               # of the adapter's initial values and of the order of its examples
    lr: float
    epochs: int
    batch: int

    def __post_init__(self):
        self.steps = self.epochs * -(-len(self.examples) // self.batch)

    def micro_batches(self):
        """Example indices of every step, shuffled afresh for each epoch."""
        rng, order = random.Random(self.seed), list(range(len(self.examples)))
        for _ in range(self.epochs):
            rng.shuffle(order)
            yield from (order[i:i + self.batch] for i in range(0, len(order), self.batch))


@dataclass
class Trained:
    weights: torch.Tensor   # (P,) a row of Adapters.flat
    losses: list[float]     # one per step
    seconds: float          # in its slot, beside the others
    diverged: bool          # some value is not finite


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy of each labelled token through a frozen output layer: h (N, D), weight (V, D), labels (N,) -> nll (N,).

    The logits (N, V) never exist at once: the gradient by h is computed chunk by chunk in the forward pass,
    d nll / dh = (softmax - onehot) W, and the backward pass only scales it."""

    @staticmethod
    def forward(ctx, h, weight, labels):
        nll = torch.empty(len(h), device=h.device, dtype=torch.promote_types(h.dtype, torch.float32))
        grad = torch.empty_like(h)
        chunk = max(1, (2 ** 27 if h.is_cuda else 2 ** 24) // len(weight))
        for i in range(0, len(h), chunk):
            part = slice(i, i + chunk)
            logits = (h[part] @ weight.T).to(nll.dtype)
            label = labels[part, None]
            log_p = logits.log_softmax(-1)
            nll[part] = -log_p.gather(1, label)[:, 0]
            p = log_p.exp_()
            p.scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))
            grad[part] = p.to(h.dtype) @ weight
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, g):
        (grad,) = ctx.saved_tensors
        return grad * g[:, None].to(grad.dtype), None, None


@torch.no_grad()
def adamw_(p, g, m, v, lr, t, clip, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """One AdamW step (arXiv 1711.05101) of n adapters, in place. p, g, m, v (n, P); lr and t, the step's number from 1, (n, 1)."""
    g = g * (clip / (g.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)  # each adapter's own norm
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    p.sub_(lr * (m_hat / (v_hat.sqrt() + eps) + weight_decay * p))


def auto_slots(model, jobs, recipe):
    """How many adapters to train side by side: enough to fill a step with tokens, few enough to fit in memory."""
    tokens = sum(len(ids) * j.epochs for j in jobs for ids, _ in j.examples) / sum(j.steps for j in jobs)  # a job's mean step
    full = 4096 if model.device.type == "cuda" else 256  # a CPU is busy with a few hundred tokens, a GPU with a few thousand
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    per_adapter = 18 * Adapters(model, 0, recipe.rank, recipe.alpha, recipe.targets).flat.shape[1]  # 4 bytes each for value, gradient, m and v; 2 in bf16
    return max(1, min(len(jobs), round(full / tokens), int(free / 3 / per_adapter)))


def sft(model, jobs, recipe, progress=lambda done, total: None):
    """Train an adapter for every job; yields (index, Trained) as jobs end. The model itself is left as it was.
    `progress` hears how many of all optimiser steps are done.

    The loss of an adapter is the mean over its micro-batch's labelled tokens. The sum over adapters is back-propagated; as
    each adapter's parameters touch its own tokens only, each gets the gradient it would get alone."""
    waiting = sorted((i for i, job in enumerate(jobs) if job.steps), key=lambda i: -jobs[i].steps)  # longest first
    if not waiting:
        return
    n = min(recipe.slots or auto_slots(model, jobs, recipe), len(waiting))
    adapters = Adapters(model, n, recipe.rank, recipe.alpha, recipe.targets)
    flat = adapters.flat.requires_grad_()
    m, v = torch.zeros_like(flat), torch.zeros_like(flat)
    running, losses, tokenised = [None] * n, [], {}  # slot -> [job index, its micro-batches, steps done, first loss's index, start]
    pin = (lambda t: t.pin_memory()) if model.device.type == "cuda" else (lambda t: t)
    to_device = lambda t: pin(t).to(model.device, non_blocking=True)

    def refill(slot):
        with torch.no_grad():
            m[slot], v[slot], flat[slot] = 0, 0, 0  # an empty slot has no tokens, and stays at zero
        running[slot] = None
        if waiting:
            i = waiting.pop(0)
            adapters.init(slot, jobs[i].seed)
            tokenised[slot] = [prepare(*example) for example in jobs[i].examples]
            running[slot] = [i, jobs[i].micro_batches(), 0, len(losses), time.time()]

    for slot in range(n):
        refill(slot)
    done, total = 0, sum(job.steps for job in jobs)
    while any(running):
        # Pack: the ribbon of this step, sorted by slot. All on the host, with no Python per token.
        ids, lengths, source, labels, weight, owner, lr, t = [], [], [], [], [], [], [0.0] * n, [1] * n
        counts, begin = [0] * n, 0
        for slot, run in enumerate(running):
            if run is None:
                continue
            job, batch = jobs[run[0]], [tokenised[slot][e] for e in next(run[1])]
            total = sum(len(s) for _, s in batch)  # labelled tokens of this adapter's micro-batch
            for x, s in batch:
                ids.append(x), lengths.append(len(x)), source.append(s + begin), labels.append(x[s + 1])
                weight.append(torch.full((len(s),), 1 / max(1, total))), owner.append(torch.full((len(s),), slot))
                counts[slot] += len(x)
                begin += len(x)
            lr[slot], t[slot] = job.lr * (1 - run[2] / job.steps), run[2] + 1
            run[2] += 1
        ids, source, labels, owner, weight = (to_device(torch.cat(x)) for x in (ids, source, labels, owner, weight))
        ribbon = Ribbon(lengths, model.device)
        # Step: every adapter's gradient in one backward pass, then one AdamW for all of them.
        flat.grad = None
        with adapters.route(counts):
            h = model.hidden(ids, ribbon.position, ribbon.attend)
            nll = FrozenHeadLoss.apply(h.index_select(0, source), model.lm_head.weight, labels) * weight
            nll.sum().backward()
        losses.append(flat.new_zeros(n).index_add(0, owner, nll.detach().to(flat.dtype)))
        column = lambda x: to_device(torch.tensor(x, dtype=flat.dtype))[:, None]
        adamw_(flat, flat.grad, m, v, column(lr), column(t), recipe.clip, recipe.weight_decay)
        done += sum(run is not None for run in running)
        progress(done, total)
        # Hand over the adapters that are done, and their slots to the next jobs.
        for slot, run in enumerate(running):
            if run and run[2] == jobs[run[0]].steps:
                curve = torch.stack(losses[run[3]:])[:, slot].tolist()
                weights = flat.detach()[slot].clone()
                yield run[0], Trained(weights, curve, time.time() - run[4], not weights.isfinite().all().item())
                refill(slot)


def prepare(ids, learn):
    """(ids, positions whose *next* token carries loss), as tensors."""
    return torch.tensor(ids), torch.tensor(learn, dtype=torch.bool)[1:].nonzero()[:, 0]


# ------------------------------------------------------------------------------------------------ reward

def ask(model, tok, tasks, weights=None, recipe=None, max_new=64, newline=True, max_rows=None):
    """Greedy answers to each task's questions, without its context: a list of strings per task.

    With `weights`, task i is answered by the model under adapter weights[i] (P,), all of them in one batch. Generation stops at
    EOS and, with `newline`, at a line break too. NOTE(paper): the official code stops at EOS only (--stop eos imitates it)."""
    adapters, slots = None, None
    if weights is not None:
        adapters = Adapters(model, len(weights), recipe.rank, recipe.alpha, recipe.targets)
        torch.stack(weights, out=adapters.flat)
        slots = [i for i, task in enumerate(tasks) for _ in task.queries]
    rows = generate(model, [tok.prompt(q) for task in tasks for q in task.queries], max_new, tok.stop, banned=tok.banned(model),
                    late_stop=tok.newlines() if newline else (), adapters=adapters, slots=slots, max_rows=max_rows)
    texts = iter(tok.decode(row).strip() for row in rows)
    return [[next(texts).split("\n")[0] if newline else next(texts) for _ in task.queries] for task in tasks]


def grade(task, predictions):
    """Which of the task's questions are answered rightly; an empty answer is wrong. The mean of this is the accuracy."""
    return [bool(p.strip()) and task.grade(q, a, p) for q, a, p in zip(task.questions, task.answers, predictions)]


@dataclass
class Outcome:
    """What a self-edit was worth: one entry per seed of the inner loop, and their mean, the reward."""
    reward: float = 0.0
    accuracy: list = field(default_factory=list)    # per seed
    answers: list = field(default_factory=list)     # per seed, per question
    right: list = field(default_factory=list)       # per seed, per question
    losses: list = field(default_factory=list)      # per seed: [first, last]
    seconds: float = 0.0
    note: str = ""


def make_job(model, tok, edit, seed, recipe):
    """The SFT job of one self-edit: loss on all tokens of all documents; its directives override the recipe.

    NOTE(paper): a document ends with one EOS, which is learned. The official code pads every row to 2048 tokens with EOS and learns all
    of them, 98 % of its targets; that is not imitated yet."""
    examples = [(ids, [True] * len(ids)) for ids in (tok.document(d)[:model.config.max_len] for d in edit.documents)]
    return Job(examples, seed, edit.directives.get("lr", recipe.lr), edit.directives.get("epochs", recipe.epochs), recipe.batch)


def update_and_score(model, tok, tasks, edits, seeds, recipe, progress=lambda done, total: None, **asking):
    """theta' <- SFT(theta, SE); Ans ~ LM_theta'(. | tau); r(Ans, tau): for all pairs (tasks[i], edits[i]) at once.

    Each is updated once per seed in seeds[i]; the reward is the mean over them. Yields (i, Outcome) as they are known. An edit with
    no documents, or whose adapter diverges, has reward 0 and a note."""
    outcomes, jobs, owner = defaultdict(Outcome), [], []
    for i, edit in enumerate(edits):
        if not edit.documents:
            yield i, Outcome(note="nothing to learn from in this self-edit")
        for seed in seeds[i] if edit.documents else ():
            jobs.append(make_job(model, tok, edit, seed, recipe))
            owner.append(i)
    done, in_batch = [], 64 if model.device.type == "cuda" else 8
    for count, (j, trained) in enumerate(sft(model, jobs, recipe, progress), 1):
        done.append((owner[j], trained))
        if len(done) < in_batch and count < len(jobs):  # answer for several finished adapters together
            continue
        healthy = [(i, trained) for i, trained in done if not trained.diverged]
        answers = iter(ask(model, tok, [tasks[i] for i, _ in healthy], [x.weights for _, x in healthy], recipe, **asking) if healthy else [])
        for i, trained in done:
            outcome = outcomes[i]
            predictions = [""] * len(tasks[i].questions) if trained.diverged else next(answers)
            outcome.answers.append(predictions)
            outcome.right.append(grade(tasks[i], predictions))
            outcome.accuracy.append(sum(outcome.right[-1]) / len(predictions))
            outcome.losses.append([round(x, 4) for x in (trained.losses[0], trained.losses[-1])])
            outcome.seconds += trained.seconds
            if trained.diverged:
                outcome.note = "diverged: the adapter is not finite; reward 0 for this seed"
            if len(outcome.accuracy) == len(seeds[i]):
                outcome.reward = sum(outcome.accuracy) / len(outcome.accuracy)
                yield i, outcomes.pop(i)
        done = []


def main():
    from data import knowledge
    from tokenizer import Tokenizer
    ap = argparse.ArgumentParser(description="Incorporate one passage with one self-edit; ask about it before and after.")
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--data", required=True, help="JSON list of passages")
    ap.add_argument("--index", type=int, default=0, help="which passage")
    ap.add_argument("--max-new", type=int, default=200, help="tokens of the self-edit")
    ap.add_argument("--save-adapter", metavar="DIR", help="write the adapter in PEFT's layout")
    args = ap.parse_args()
    tasks = knowledge.load(args.data)
    if not 0 <= args.index < len(tasks):
        raise UserError(f"--index {args.index}: {args.data} has passages 0 to {len(tasks) - 1}")
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    task, recipe = tasks[args.index], Recipe(rank=32, alpha=64, targets=["q_proj", "v_proj"], lr=1e-3, epochs=10, batch=1)
    edit = sample_self_edits(model, tok, [task], 1, [[seed_for(0)]], max_new=args.max_new)[0][0]
    print(f"{task.context[0]}\n\n--- self-edit\n{edit.text}\n")
    (before,) = ask(model, tok, [task])
    (_, trained), = sft(model, [make_job(model, tok, edit, 0, recipe)], recipe)
    (after,) = ask(model, tok, [task], [trained.weights], recipe)
    print(f"--- {len(trained.losses)} steps, loss {trained.losses[0]:.2f} -> {trained.losses[-1]:.2f}, {trained.seconds:.0f} s")
    for q, gold, *answers in zip(task.questions, task.answers, before, after):
        print(f"{q} ({gold})\n" + "".join(f"  {when}: {a!r}\n" for when, a in zip(("before", "after"), answers)), end="")
    print(f"right: {sum(grade(task, before))} -> {sum(grade(task, after))} of {len(task.questions)}")
    if args.save_adapter:
        adapters = Adapters(model, 1, recipe.rank, recipe.alpha, recipe.targets)
        adapters.flat[0] = trained.weights
        adapters.save(0, args.save_adapter)


if __name__ == "__main__":
    cli(main)
