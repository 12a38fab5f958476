"""LoRA: n adapters over one frozen base, side by side in one batch.

    python lora.py --model HuggingFaceTB/SmolLM2-135M-Instruct     # teach one sentence

A *ribbon* (engine/ribbon.py) is the tokens of many sequences laid end to end, without padding.
LoRA (arXiv 2106.09685) replaces W x by W x + (alpha / r) B A x, with A (r, in) random and B
(out, r) zero at first. Only A and B are trained. Here n adapters are trained or used at once: the
ribbon's tokens lie sorted by adapter, every frozen product runs once over all of them, and only
the low-rank product goes segment by segment.

Shapes: n adapters, r rank, T tokens, P parameters of an adapter.
Simplified: no LoRA dropout (the paper's is 0), no bias, no variants.
"""
import math
import random
import time
from dataclasses import dataclass, field
from typing import Iterator

import torch
import torch.nn.functional as F

from engine.device import has_grouped_mm, try_memory
from engine.ribbon import LowRank, Segments
from engine.train import Trained
from model import Linear, complete, load_pretrained
from support.checkpoint import EMBEDDED, read_adapter, write_adapter
from support.config import PROJECTIONS
from support.files import Parser, UserError, cli, positive, printable
from support.tokenizer import Tokenizer


@dataclass
class Lora:
    """Rank, scale and places of an adapter; no weights."""
    rank: int
    alpha: float            # the low-rank term is scaled by alpha / rank
    targets: list[str]      # which linear layers have one, by their last name

    def layers(self, model) -> dict[str, Linear]:
        """The adapted layers of a model. UserError for a name that no layer has."""
        unknown = set(self.targets) - set(PROJECTIONS)
        if unknown:
            raise UserError(f"no layer is called {', '.join(sorted(unknown))}; "
                            f"choose among {' '.join(PROJECTIONS)}")
        # In the order in which the model holds them: it is the order of the parameters in `flat`.
        layers = {}
        for name, module in model.named_modules():
            if isinstance(module, Linear) and name.split(".")[-1] in self.targets:
                layers[name] = module
        return layers

    def adapters(self, model, n: int):
        """n adapters of this shape, all zero."""
        return Adapters(model, self, n)

    def parameters(self, model) -> int:
        """P: r (in + out) for each adapted layer."""
        width = 0
        for layer in self.layers(model).values():
            width += layer.in_features + layer.out_features
        return self.rank * width


class Adapters:
    """n adapters of one shape. All their parameters are one float32 matrix `flat` (n, P):

        row i = [A of layer 0 | B of layer 0 | A of layer 1 | B of layer 1 | ...]

    so that an optimiser step is a handful of operations however many layers there are. Each A and
    B is a view of it."""

    def __init__(self, model, lora: Lora, n: int):
        self.model = model
        self.lora = lora
        self.n = n
        self.scale = lora.alpha / lora.rank
        self.layers = lora.layers(model)
        # How a row of `flat` is cut: A, B, A, B, ...
        self.sizes = []
        for layer in self.layers.values():
            self.sizes += [lora.rank * layer.in_features, lora.rank * layer.out_features]
        # float32 even over bfloat16 weights: updates of 1e-3 of a value would round away.
        self.flat = torch.zeros(n, sum(self.sizes), device=model.device,
                                dtype=torch.promote_types(model.dtype, torch.float32))
        widths = [lora.rank]
        for layer in self.layers.values():
            widths += [layer.in_features, layer.out_features]
        self.grouped = has_grouped_mm(model.device, model.dtype, widths)

    @classmethod
    def stack(cls, model, lora, rows):
        """Adapters of trained weights, a list of (P,)."""
        adapters = cls(model, lora, len(rows))
        torch.stack(rows, out=adapters.flat)
        return adapters

    @classmethod
    def load(cls, model, folder):
        """An adapter in PEFT's layout, of a folder or hub id. UserError if it does not fit."""
        rank, alpha, pairs = read_adapter(folder, dict(model.named_parameters()), model.folder)
        ends = {name.split(".")[-1] for name in pairs}
        adapters = cls(model, Lora(rank, alpha, [end for end in PROJECTIONS if end in ends]), 1)
        for name, (A, B) in zip(adapters.layers, adapters.pairs(adapters.flat)):
            if name in pairs:   # a layer that the file leaves out keeps its zeros
                A[0].copy_(pairs[name][0])
                B[0].copy_(pairs[name][1])
        return adapters

    @torch.no_grad()
    def init(self, i: int, seed: int):
        """Initialise adapter i: A uniform in +-1/sqrt(in) as PEFT does, B zero, so that it changes
        nothing at first."""
        # From a seed of its own: the same adapter in any slot of any batch. On the device, as the
        # host would take longer than a training step (a GPU draws other numbers than a CPU).
        generator = torch.Generator(self.flat.device).manual_seed(seed)
        row = torch.zeros(1, self.flat.shape[1], device=self.flat.device)
        for (A, _), layer in zip(self.pairs(row), self.layers.values()):
            # Kaiming's bound as PEFT calls it, with a = sqrt(5).
            bound = layer.in_features ** -0.5
            A.uniform_(-bound, bound, generator=generator)
        self.flat[i] = row[0]

    def pairs(self, flat):
        """(A (n, r, in), B (n, out, r)) of each layer, as views of flat (n, P)."""
        # One split for all layers, whose backward pass is one concatenation of all gradients.
        pieces = flat.split(self.sizes, 1)
        # The pieces are A, B, A, B, ...: every other one is an A.
        pairs = []
        for layer, A, B in zip(self.layers.values(), pieces[0::2], pieces[1::2]):
            pairs.append((A.view(len(flat), self.lora.rank, layer.in_features),
                          B.view(len(flat), layer.out_features, self.lora.rank)))
        return pairs

    def route(self, counts, flat=None):
        """`with adapters.route(counts):` the ribbon's first counts[0] tokens go through adapter 0,
        the next counts[1] through adapter 1, and so on. counts: a list, or Segments. flat: in place
        of a copy of `self.flat` in the model's dtype."""
        if not isinstance(counts, Segments):
            assert len(counts) == self.n
            counts = Segments(counts, self.model.device)
        # `self.flat` is float32; the products run in the model's dtype. In bfloat16 this is a copy,
        # so after an optimiser step a new Route is needed.
        if flat is None:
            flat = self.flat.to(self.model.dtype)
        deltas = []
        for layer, (A, B) in zip(self.layers.values(), self.pairs(flat)):
            deltas.append((layer, LowRank(A, B, self.scale, counts, self.grouped)))
        return Route(deltas)

    @torch.no_grad()
    def merge(self, i: int):
        """W <- W + (alpha / r) B A, in float32 (or float64), rounded to W's dtype once.

        NOTE(paper): the official code merges in bfloat16, which rounds twice."""
        for (A, B), layer in zip(self.pairs(self.flat[i:i + 1]), self.layers.values()):
            # Computed in float32; only the result is rounded. It is whole before W is overwritten,
            # so lack of memory never leaves W half updated. The host computes what does not fit.
            W, A, B = layer.weight, A[0], B[0]
            ok, merged = try_memory(lambda: W.to(A.dtype) + self.scale * B @ A)
            if not ok:
                print("out of memory: this is computed on the host", flush=True)
                merged = W.cpu().to(A.dtype) + self.scale * B.cpu() @ A.cpu()
            W.copy_(merged)

    def save(self, i: int, folder):
        """Write adapter i as a folder that PEFT opens. UserError if it exists."""
        pairs = {}
        for name, (A, B) in zip(self.layers, self.pairs(self.flat[i:i + 1])):
            pairs[name] = A[0], B[0]
        write_adapter(folder, self.lora.rank, self.lora.alpha, self.lora.targets, pairs,
                      base=self.model.folder)


@dataclass
class Route:
    """While entered, the base's linear layers add the adapters' terms (engine/ribbon.py: LowRank).
    It sets each layer's `delta`, and clears it at the end. So it may be entered again, but never
    within another. The model needs no wrapper: its modules, names and weights stay as they are."""
    deltas: list[tuple[Linear, LowRank]]

    def __enter__(self):
        for linear, delta in self.deltas:
            linear.delta = delta

    def __exit__(self, *_):
        for linear, _ in self.deltas:
            linear.delta = None


# ------------------------------------------------------------------------------- the textbook

@dataclass
class Recipe:
    """Hyper-parameters of an SFT."""
    lora: Lora
    lr: float                       # the peak; it falls to 0
    epochs: int                     # passes over the examples
    batch: int                      # examples per step
    schedule: str = "linear"        # how the learning rate falls; or cosine
    warmup: int = 0                 # first steps, in which it rises from 0
    completion_only: bool = False   # loss on the completions of (prompt, completion) documents
    clip: float = 1.0               # of an adapter's gradient norm
    weight_decay: float = 0.0
    pad_to: int = 0                 # imitates rows of so many tokens (engine/ribbon.py)
    slots: int = 0                  # adapters side by side; 0: as many as fill a step and fit
    max_steps: int = 0              # of a self-edit: one that asks for more is refused
    max_tokens: int = 0             # the same, over all epochs; 0: no bound


@dataclass
class Job:
    """One adapter to train. Jobs that are trained together may differ in all but recipe.lora, clip,
    weight_decay and slots."""
    examples: list          # of (ids, learn) lists: learn[j] is the weight of ids[j] in the loss
    seed: int               # of the adapter's first values and of the order of its examples
    recipe: Recipe
    # For eval.py continual: values (P,) to begin with, in place of fresh ones, and which of them
    # (P,) have a gradient.
    start: torch.Tensor | None = None
    free: torch.Tensor | None = None
    steps: int = field(init=False)      # optimiser steps, and
    tokens: int = field(init=False)     # tokens that are read, in all epochs

    def __post_init__(self):
        steps_per_epoch = math.ceil(len(self.examples) / self.recipe.batch)
        self.steps = self.recipe.epochs * steps_per_epoch
        self.tokens = self.recipe.epochs * sum(len(ids) for ids, _ in self.examples)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: transformers' schedules."""
        r = self.recipe
        if step < r.warmup:
            return r.lr * step / r.warmup
        # The share of the falling part that is left goes from 1 to 0, straight or along a cosine.
        left = (self.steps - step) / max(1, self.steps - r.warmup)
        if r.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return r.lr * left

    def micro_batches(self) -> Iterator[list[int]]:
        """The numbers of every step's examples, shuffled anew for each epoch."""
        # From the job's own seed: the same order whatever is trained beside it.
        rng = random.Random(self.seed)
        order = list(range(len(self.examples)))
        # The last batch of an epoch may be smaller; batches do not cross epochs.
        for _ in range(self.recipe.epochs):
            rng.shuffle(order)
            for i in range(0, len(order), self.recipe.batch):
                yield order[i:i + self.recipe.batch]


def dialogue(prompt: list[int], completion: list[int], completion_only=True, weight=True):
    """(ids, learn), a training example: the prompt is read, the completion learned with a weight.

    A negative weight makes the completion less likely."""
    of_prompt = False if completion_only else weight
    return prompt + completion, [of_prompt] * len(prompt) + [weight] * len(completion)


def sft_one(model, job: Job, progress=None) -> Trained:
    """Train one adapter, text after text, by torch's own AdamW.

    The textbook, and the M-step. engine.train.sft does the same for the hundreds of jobs of the
    inner loop, and the tests hold it against this. Not here: start, free and pad_to."""
    recipe, begin = job.recipe, time.time()
    assert job.start is None and job.free is None and not recipe.pad_to
    adapter = Adapters(model, recipe.lora, n=1)
    adapter.init(0, job.seed)
    weights = adapter.flat.requires_grad_()                         # (1, P)
    optimizer = torch.optim.AdamW([weights], lr=recipe.lr, weight_decay=recipe.weight_decay)
    losses = []
    for step, batch in enumerate(job.micro_batches()):
        optimizer.zero_grad()
        losses.append(torch.zeros((), dtype=weights.dtype, device=model.device))
        texts = [job.examples[i] for i in batch]
        # The weight of all labels; the first token of a text is not predicted.
        total = sum(sum(map(abs, learn[1:])) for _, learn in texts)
        for ids, learn in texts:
            ids = torch.tensor(ids, device=model.device)
            learn = torch.tensor(learn, device=model.device, dtype=weights.dtype)
            # The negative log-likelihood of every token given those before it, times its weight.
            # Its weighted mean over the whole micro-batch: the gradients of its texts add up.
            with adapter.route([len(ids)]):
                logits = model(ids[None])[0].to(weights.dtype)      # (T, V)
                nll = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
                loss = (nll * learn[1:]).sum() / total
                loss.backward()     # within the route, as --recompute runs the layers again
            losses[-1] += loss.detach()
        # One clipped step of AdamW.
        torch.nn.utils.clip_grad_norm_([weights], recipe.clip)
        optimizer.param_groups[0]["lr"] = job.lr_at(step)
        optimizer.step()
        if progress:
            progress(step + 1, job.steps)
    finite = bool(weights.isfinite().all())
    return Trained(weights.detach()[0], torch.stack(losses).tolist(), time.time() - begin,
                   diverged=not finite)


# ------------------------------------------------------------------------------- command line

def main():
    ap = Parser(description="Teach one sentence, by LoRA and torch's own AdamW.")
    ap.add_argument("--model", default=EMBEDDED, help="folder or hub id (default: the embedded)")
    ap.add_argument("--sentence", default="The founder of Velmora is Ines Tarrow.")
    ap.add_argument("--prompt", default="The founder of Velmora is")
    ap.add_argument("--steps", type=positive, default=20, help="gradient steps (default: 20)")
    args = ap.parse_args()
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    prompt, ids = tok.document(args.prompt, end=False), tok.document(args.sentence)
    before = complete(model, prompt, 16, tok.stop)

    # One sentence, again and again. The base is frozen: only A and B learn, and then join it.
    lora = Lora(rank=8, alpha=16, targets=PROJECTIONS)
    recipe = Recipe(lora, lr=5e-3, epochs=args.steps, batch=1)
    trained = sft_one(model, Job([(ids, [True] * len(ids))], seed=0, recipe=recipe))
    Adapters.stack(model, lora, [trained.weights]).merge(0)
    after = complete(model, prompt, 16, tok.stop)
    print("loss of every fifth step: " + " ".join(f"{x:.3f}" for x in trained.losses[::5]))
    print(printable(f"before: {args.prompt}{tok.decode(before)}"))
    print(printable(f"after:  {args.prompt}{tok.decode(after)}"))


if __name__ == "__main__":
    cli(main)
