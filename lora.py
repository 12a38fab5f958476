"""LoRA: n adapters over one frozen base, side by side in one batch.

    python lora.py --model HuggingFaceTB/SmolLM2-135M-Instruct        # teach one sentence, by gradient descent

LoRA (arXiv 2106.09685) replaces W x by W x + (alpha / r) B A x, with A (r, in) random, B (out, r) zero at first, and
only A and B trained. Here n adapters are trained or used at once: the ribbon's tokens lie sorted by adapter, every
frozen matmul runs once over all of them, and only the low-rank products go segment by segment, each segment through its own
adapter. All parameters of all adapters are one float32 matrix `flat` (n, P), a row each, so that an optimiser step is a handful
of operations however many layers there are; A and B are views of it.

Shapes: n adapters (slots), r rank, T tokens, P parameters per adapter.
Simplified: no LoRA dropout (the paper uses 0), no bias, no rsLoRA or DoRA.
"""
import argparse, json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from model import Linear, Ribbon, UserError, cli, load_pretrained


class Adapters:
    """n adapters of rank r on every linear layer whose last name is in `targets` (such as 'q_proj')."""

    def __init__(self, model, n, rank, alpha, targets):
        self.model, self.n, self.rank, self.alpha, self.targets = model, n, rank, alpha, list(targets)
        linears = {name: m for name, m in model.named_modules() if isinstance(m, Linear)}
        if unknown := set(targets) - {name.rpartition(".")[2] for name in linears}:
            raise UserError(f"no layer is called {', '.join(sorted(unknown))}; choose among q_proj k_proj v_proj o_proj gate_proj up_proj down_proj")
        self.layers = {name: m for name, m in linears.items() if name.rpartition(".")[2] in targets}
        self.sizes = [rank * width for m in self.layers.values() for width in (m.in_features, m.out_features)]  # A, B, A, B, ...
        self.flat = torch.zeros(n, sum(self.sizes), device=model.device, dtype=torch.promote_types(model.dtype, torch.float32))
        # one fused kernel for all segments exists for bf16 on Hopper and later; elsewhere a padded batched matmul does the same job
        self.fused = model.dtype == torch.bfloat16 and model.device.type == "cuda" and torch.cuda.get_device_capability(model.device) >= (9, 0)

    def init(self, slot, seed):
        """Fresh adapter in a slot: A uniform in +-1/sqrt(in) (PEFT's default), B zero, so that it changes nothing yet."""
        generator = torch.Generator().manual_seed(seed)
        row = torch.zeros(self.flat.shape[1])
        for (a, _), m in zip(self.pairs(row[None]), self.layers.values()):
            a.uniform_(-m.in_features ** -0.5, m.in_features ** -0.5, generator=generator)
        with torch.no_grad():
            self.flat[slot] = row

    def pairs(self, flat):
        """(A (n, r, in), B (n, out, r)) of each layer, as views of flat (n, P). One split: its backward is one concatenation."""
        pieces = iter(flat.split(self.sizes, 1))
        return [(next(pieces).view(len(flat), self.rank, m.in_features), next(pieces).view(len(flat), m.out_features, self.rank))
                for m in self.layers.values()]

    def route(self, counts):
        """`with adapters.route(counts):` sends the ribbon's first counts[0] tokens through adapter 0, the next counts[1] through 1, ..."""
        return Route(self, counts)

    @torch.no_grad()
    def merge(self, slot):
        """W <- W + (alpha / r) B A, computed in float32 (or float64) and rounded to the weights' dtype once."""
        for (a, b), m in zip(self.pairs(self.flat[slot:slot + 1]), self.layers.values()):
            m.weight.copy_(m.weight.to(a.dtype) + self.alpha / self.rank * b[0] @ a[0])

    def save(self, slot, folder):
        """Write one adapter as a folder that PEFT and vLLM open."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {f"base_model.model.{name}.lora_{which}.weight": t[0].detach().clone()
                 for name, ab in zip(self.layers, self.pairs(self.flat[slot:slot + 1])) for which, t in zip("AB", ab)}
        save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(self.model.folder), "r": self.rank,
            "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none", "target_modules": self.targets}, indent=2))


class Route:
    """While entered, the base's linear layers add the adapters' terms. Made once, it can be entered again and again (decoding)."""

    def __init__(self, adapters, counts):
        assert len(counts) == adapters.n
        segments, scale = Ribbon(counts, adapters.model.device), adapters.alpha / adapters.rank

        def low_rank(A, B):  # x (T, in) -> (alpha / r) B A x (T, out), each token under its own segment's A and B
            if adapters.fused:
                offs = segments.ends
                return lambda x: F.grouped_mm(F.grouped_mm(x, A.mT, offs=offs) * scale, B.mT, offs=offs)
            return lambda x: segments.roll(torch.bmm(torch.bmm(segments.unroll(x), A.mT) * scale, B.mT))

        pairs = adapters.pairs(adapters.flat.to(adapters.model.dtype))
        self.deltas = [(m, low_rank(A, B)) for (A, B), m in zip(pairs, adapters.layers.values())]

    def __enter__(self):
        for linear, delta in self.deltas:
            linear.delta = delta

    def __exit__(self, *_):
        for linear, _ in self.deltas:
            linear.delta = None


def main():
    from tokenizer import Tokenizer
    ap = argparse.ArgumentParser(description="Teach a model one sentence with LoRA and torch.optim.AdamW.")
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--sentence", default="The lighthouse of Velmora was built by Ines Tarrow in 1873.")
    ap.add_argument("--steps", type=int, default=12)
    ap.add_argument("--device")
    args = ap.parse_args()
    model = load_pretrained(args.model, args.device)
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
