"""LoRA: n adapters over one frozen base, side by side in one batch.

    python lora.py --model HuggingFaceTB/SmolLM2-135M-Instruct     # teach one sentence

LoRA (arXiv 2106.09685) replaces W x by W x + (alpha / r) B A x, with A (r, in) random, B (out, r)
zero at first, and only A and B trained. Here n adapters are trained or used at once: the ribbon's
tokens lie sorted by adapter, every frozen matmul runs once over all of them, and only the low-rank
products go segment by segment. All parameters of all adapters are one float32 matrix `flat` (n, P),
a row each, so that an optimiser step is a handful of operations however many layers there are; each
A and B is a view of it.

Shapes: n adapters (slots), r rank, T tokens, P parameters per adapter.
Simplified: no LoRA dropout (the paper's is 0), no bias, no variants.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from checkpoint import UserError, cli
from model import Linear, Ribbon, load_pretrained

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapters:
    """n adapters of rank r on every linear layer whose last name is in `targets`."""

    def __init__(self, model, n, rank, alpha, targets):
        if unknown := set(targets) - set(PROJECTIONS):
            raise UserError(f"no layer is called {', '.join(sorted(unknown))}; "
                            f"choose among {' '.join(PROJECTIONS)}")
        self.model, self.n, self.rank, self.scale = model, n, rank, alpha / rank
        self.targets = list(targets)
        self.layers = {name: m for name, m in model.named_modules()
                       if isinstance(m, Linear) and name.rpartition(".")[2] in targets}
        self.sizes = [rank * width for m in self.layers.values()  # A, B, A, B, ...
                      for width in (m.in_features, m.out_features)]
        self.flat = torch.zeros(n, sum(self.sizes), device=model.device,
                                dtype=torch.promote_types(model.dtype, torch.float32))
        # grouped_mm takes the segments as they lie: one kernel in bfloat16 on Hopper and later, a
        # loop in C++ on a CPU. Elsewhere a padded batched matmul does the same job.
        fast = (model.dtype == torch.bfloat16 and
                torch.cuda.get_device_capability(model.device) >= (9, 0)
                if model.device.type == "cuda" else model.dtype != torch.float64)
        aligned = all(width % 8 == 0 for m in self.layers.values()
                      for width in (rank, m.in_features, m.out_features))
        self.grouped = fast and aligned

    @torch.no_grad()
    def init(self, slot, seed):
        """A fresh adapter: A uniform in +-1/sqrt(in), as PEFT's, and B zero: it changes nothing."""
        generator, row = torch.Generator().manual_seed(seed), torch.zeros(1, self.flat.shape[1])
        for (a, _), m in zip(self.pairs(row), self.layers.values()):
            a.uniform_(-m.in_features ** -0.5, m.in_features ** -0.5, generator=generator)
        self.flat[slot] = row[0]

    def pairs(self, flat):
        """(A (n, r, in), B (n, out, r)) of each layer, as views of flat (n, P)."""
        pieces = iter(flat.split(self.sizes, 1))  # one split, whose backward is one concatenation
        return [(next(pieces).view(len(flat), self.rank, m.in_features),
                 next(pieces).view(len(flat), m.out_features, self.rank))
                for m in self.layers.values()]

    def part(self, low, high):
        """(P,) bool: the parameters of the components low .. high - 1 of every adapter's rank."""
        mask = torch.zeros(1, self.flat.shape[1], dtype=torch.bool, device=self.flat.device)
        for a, b in self.pairs(mask):
            a[:, low:high], b[:, :, low:high] = True, True
        return mask[0]

    def route(self, counts):
        """`with adapters.route(counts):` the ribbon's first counts[0] tokens go through adapter 0,
        the next counts[1] through adapter 1, and so on."""
        return Route(self, counts)

    @torch.no_grad()
    def merge(self, slot):
        """W <- W + (alpha / r) B A, in float32 (or float64), rounded to the weights' dtype once."""
        for (a, b), m in zip(self.pairs(self.flat[slot:slot + 1]), self.layers.values()):
            m.weight.copy_(m.weight.to(a.dtype) + self.scale * b[0] @ a[0])

    def save(self, slot, folder):
        """Write one adapter as a folder that PEFT opens."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"base_model.model.{name}.lora_{which}.weight": t[0].detach().clone()
                 for name, pair in zip(self.layers, self.pairs(self.flat[slot:slot + 1]))
                 for which, t in zip("AB", pair)}
        save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank,
            "lora_alpha": self.scale * self.rank, "lora_dropout": 0.0, "bias": "none",
            "target_modules": self.targets, "base_model_name_or_path": str(self.model.folder)}))


class Route:
    """While entered, the base's linear layers add the adapters' terms. It can be entered again."""

    def __init__(self, adapters, counts):
        assert len(counts) == adapters.n
        segments, scale = Ribbon(counts, adapters.model.device, split=False), adapters.scale

        def low_rank(A, B):
            """x (T, in) -> (alpha / r) B A x (T, out), each token under its own segment's A, B."""
            if adapters.grouped and not segments.even:
                mm = lambda x, w: F.grouped_mm(x, w, offs=segments.ends)
                return lambda x: mm(mm(x, A.mT) * scale, B.mT)
            return lambda x: segments.roll([(segments.unroll(x)[0] @ A.mT * scale) @ B.mT])

        pairs = adapters.pairs(adapters.flat.to(adapters.model.dtype))
        self.deltas = [(m, low_rank(A, B)) for m, (A, B) in zip(adapters.layers.values(), pairs)]

    def __enter__(self):
        for linear, delta in self.deltas:
            linear.delta = delta

    def __exit__(self, *_):
        for linear, _ in self.deltas:
            linear.delta = None


def main():
    from tokenizer import Tokenizer
    ap = argparse.ArgumentParser(description="Teach one sentence, by LoRA and torch's own AdamW.")
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--sentence", default="The lighthouse of Velmora was built by Ines Tarrow.")
    ap.add_argument("--steps", type=int, default=12)
    args = ap.parse_args()
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    adapters = Adapters(model, n=1, rank=8, alpha=16, targets=["q_proj", "v_proj"])
    adapters.init(slot=0, seed=0)
    optimizer = torch.optim.AdamW([adapters.flat.requires_grad_()], lr=2e-3, weight_decay=0)
    ids = torch.tensor([tok.document(args.sentence)], device=model.device)
    for step in range(args.steps + 1):
        with adapters.route([ids.numel()]):
            loss = F.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:])
        print(f"step {step:3d}  loss {loss.item():.3f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    cli(main)
