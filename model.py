"""The transformer (Llama 3, Qwen2/2.5, Qwen3), weights in and out of safetensors, `generate`.

    python model.py --model HuggingFaceTB/SmolLM2-135M-Instruct --prompt "The capital of France is"

Everything runs on a *ribbon*: the tokens of many sequences laid end to end, (T, dim), no padding.
Matmuls and norms don't care where a sequence ends; only attention does, so only attention unrolls
the ribbon into a right-padded (n_seq, n_head, L, head_dim) view and rolls it up again. Attention is
causal and the padding is on the right, so no real token ever sees a pad and no mask is needed.

Modules keep Hugging Face's names: loading is a `load_state_dict`, and what we save opens there.
Simplified: RoPE 'default' or 'llama3', no sliding window, no biases but Qwen2's, no dropout;
a checkpoint that needs more is refused.

Shapes: B sequences, T tokens, L longest sequence, D = dim, V vocabulary, H heads, K key/value
heads, E = head_dim.
"""
import argparse
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from checkpoint import TOKENIZER_FILES, UserError, cli, fetch, read_json


# ------------------------------------------------------------------------------- configuration

@dataclass
class ModelConfig:
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int           # need not be dim / n_head (Qwen3)
    hidden_dim: int
    vocab_size: int         # rows of the embedding; may exceed the tokenizer's vocabulary (Qwen)
    max_len: int            # context window
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    tied: bool              # lm_head shares the embedding's weight
    qkv_bias: bool          # Qwen2
    qk_norm: bool           # Qwen3
    raw: dict               # config.json as read, for save_pretrained

    @classmethod
    def from_folder(cls, folder):
        raw = read_json(Path(folder) / "config.json")
        arch = (raw.get("architectures") or ["?"])[0]
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, or 4
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
        for bad, what in ((arch not in known, f"{arch} (Llama, Qwen2/2.5 and Qwen3 are)"),
                          (kind not in ("default", "llama3"), f"RoPE type {kind!r}"),
                          (raw.get("hidden_act", "silu") != "silu", f"{raw.get('hidden_act')!r}"),
                          (raw.get("use_sliding_window"), "sliding-window attention"),
                          (raw.get("attention_bias") or raw.get("mlp_bias"), "attention/mlp_bias"),
                          ("quantization_config" in raw, "quantised weights")):
            if bad:
                raise UserError(f"{folder}: unsupported architecture: {what} is not implemented")
        try:
            dim, n_head = raw["hidden_size"], raw["num_attention_heads"]
            return cls(
                dim=dim, n_layer=raw["num_hidden_layers"], n_head=n_head,
                n_kv_head=raw.get("num_key_value_heads") or n_head,
                head_dim=raw.get("head_dim") or dim // n_head,
                hidden_dim=raw["intermediate_size"], vocab_size=raw["vocab_size"],
                max_len=raw.get("max_position_embeddings", 2048),
                norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
                rope_scaling=rope if kind == "llama3" else None,
                tied=raw.get("tie_word_embeddings", False),
                qkv_bias=arch.startswith("Qwen2"), qk_norm=arch.startswith("Qwen3"), raw=raw)
        except KeyError as e:
            raise UserError(f"{folder}/config.json: {e} is missing") from None


# ------------------------------------------------------------------------------- the ribbon

def to_device(tensor, device):
    """Copy to a device without waiting for it (from pinned memory, where that matters)."""
    pinned = tensor.pin_memory() if torch.device(device).type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


class Ribbon:
    """Sequences of the given lengths laid end to end, T = sum(lengths) tokens.

    Also used for the token segments of stacked adapters (lora.py): a segment may be empty."""

    def __init__(self, lengths, device, split=True, pads=()):
        """With `split`, sequences are unrolled in groups of like lengths (within a factor of four):
        one long sequence must not pad a hundred short ones. The last pads[i] tokens of sequence i
        see those before them, not each other, and no other token sees them."""
        groups = {}
        for i, n in enumerate(lengths):
            groups.setdefault((max(n, 16) - 1).bit_length() // 2 if split else 0, []).append(i)
        self.lengths, self.shapes, self.masks, self.cells = lengths, [], [], 0
        begin = torch.zeros(len(lengths), dtype=torch.long)     # each sequence's first cell
        for members in groups.values():
            L, mask = max(lengths[i] for i in members), None
            if any(pads):  # (n, 1, L, L): a key is no later than its query, and no pad
                seen = torch.tensor([lengths[i] - pads[i] for i in members])[:, None, None, None]
                mask = to_device(torch.ones(L, L).tril().bool() & (torch.arange(L) < seen), device)
            self.masks.append(mask)
            begin[members] = self.cells + L * torch.arange(len(members))
            self.shapes.append((len(members), L))
            self.cells += len(members) * L
        length = torch.tensor(lengths)
        ends = length.cumsum(0)
        row = torch.repeat_interleave(torch.arange(len(lengths)), length)
        position = torch.arange(row.numel()) - (ends - length)[row]
        self.even = len(groups) == 1 and self.cells == row.numel()  # then unrolling is a reshape
        self.row = to_device(row, device)                       # (T,) the sequence of each token
        self.position = to_device(position, device)             # (T,) its place in that sequence
        self.cell = to_device(begin[row] + position, device)    # (T,) its place when unrolled
        self.last = to_device(ends - 1, device)                 # (n,) each sequence's last token
        self.ends = to_device(ends.int(), device)               # (n,) as grouped_mm wants them

    def unroll(self, x):
        """(T, ...) -> [(n, L, ...) of each group], zeros to the right of each sequence."""
        if not self.even:  # index_copy's backward is a gather; an indexed assignment's would sort
            x = x.new_zeros(self.cells, *x.shape[1:]).index_copy(0, self.cell, x)
        views = x.split([n * L for n, L in self.shapes])
        return [view.view(*shape, *x.shape[1:]) for view, shape in zip(views, self.shapes)]

    def roll(self, views):
        """[(n, L, ...) of each group] -> (T, ...)."""
        views = [view.reshape(-1, *view.shape[2:]) for view in views]
        y = torch.cat(views) if len(views) > 1 else views[0]
        return y if self.even else y.index_select(0, self.cell)

    def attend(self, layer, q, k, v):
        """Causal attention within each sequence. q (T, H, E), k and v (T, K, E) -> (T, H, E)."""
        grouped = q.shape[1] != k.shape[1]
        views = zip(self.masks, *(self.unroll(t) for t in (q, k, v)))
        return self.roll([F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in view), mask, is_causal=mask is None, enable_gqa=grouped
        ).transpose(1, 2) for mask, *view in views])  # within: (n, H or K, L, E)


# ------------------------------------------------------------------------------- the transformer

def slow_bf16(x):
    """Whether this is bfloat16 on a CPU without arithmetic for it: float32 is many times faster."""
    return (x.dtype == torch.bfloat16 and x.device.type == "cpu"
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Widened(torch.autograd.Function):
    """x W^T in float32 for a frozen bfloat16 W, which is widened anew when it is needed."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return (x.float() @ weight.float().T).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (weight,) = ctx.saved_tensors
        return (g.float() @ weight.float()).to(g.dtype), None


class Linear(nn.Linear):
    """A linear layer that lora.py can add a low-rank term to: y = W x + b (+ delta(x))."""
    delta = None

    def forward(self, x):
        if slow_bf16(x) and not self.weight.requires_grad:
            y = Widened.apply(x, self.weight)
            y = y if self.bias is None else y + self.bias
        else:
            y = F.linear(x, self.weight, self.bias)
        return y if self.delta is None else y.add_(self.delta(x))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):  # the sum of squares is taken in float32 inside
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(c, device):
    """Radians per token of each pair (E/2,), in float32; 'llama3' slows those that turn too seldom
    within the window it was first trained on."""
    f = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if s := c.rope_scaling:
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        f = (1 - smooth) * f / s["factor"] + smooth * f
    return f


def rotate(x, cos, sin):
    """RoPE: turn each pair (x_i, x_{i+E/2}) by its angle. x (T, H, E); cos, sin (T, 1, E/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.q_proj = Linear(c.dim, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.dim, bias=False)
        norm = (lambda: RMSNorm(c.head_dim, c.norm_eps)) if c.qk_norm else nn.Identity
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x, cos, sin, attend):
        heads = lambda proj: proj(x).view(len(x), -1, self.head_dim)  # (T, H or K, E)
        q, k = self.q_norm(heads(self.q_proj)), self.k_norm(heads(self.k_proj))
        v = heads(self.v_proj)
        y = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)  # (T, H, E)
        return self.o_proj(y.flatten(1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """`folder` is where the weights came from: its tokenizer files are saved along."""
    recompute = False   # a block's activations in the backward pass: less memory, a third more time

    def __init__(self, config, folder=None):
        super().__init__()
        self.config, self.folder = config, folder
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.dim),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            "norm": RMSNorm(config.dim, config.norm_eps)})
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        self.tie()

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)

    def tie(self):
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids, position, attend):
        """The residual stream after the last norm: ids, position (T,) -> (T, D).

        `attend` mixes the tokens: Ribbon.attend, or what Cache.prefill or Cache.step returns."""
        x = self.model.embed_tokens(ids)
        angle = position[:, None, None] * rope_frequencies(self.config, ids.device)  # (T, 1, E/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend)
        return self.model.norm(x)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        ribbon = Ribbon([ids.shape[1]] * len(ids), ids.device)
        h = self.hidden(ids.flatten(), ribbon.position, ribbon.attend)
        return self.lm_head(h).view(*ids.shape, -1)

    def save_pretrained(self, folder):
        """Write a folder that load_pretrained and transformers open, whole or not at all."""
        folder = Path(folder)
        if folder.exists():
            raise UserError(f"{folder} exists already; nothing was overwritten")
        tmp = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        dtype = str(self.dtype).removeprefix("torch.")
        raw = self.config.raw | {k: dtype for k in ("dtype", "torch_dtype") if k in self.config.raw}
        (tmp / "config.json").write_text(json.dumps(raw, indent=2))
        state = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        save_file(state, tmp / "model.safetensors", {"format": "pt"})
        for file in TOKENIZER_FILES:
            if self.folder and (Path(self.folder) / file).exists():
                shutil.copy(Path(self.folder) / file, tmp)
        tmp.rename(folder)


# ------------------------------------------------------------------------------- weights in


def load_pretrained(name_or_path, device=None, dtype=None):
    """A Transformer from a local folder or a hub id, frozen.

    Default: bfloat16 on CUDA if there is one, else float32 on the CPU. The model is built without
    memory (meta device) and each tensor is put in place as it is read: one copy in all."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    folder = fetch(name_or_path)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_folder(folder), folder)
    want = {name: p.shape for name, p in model.named_parameters()}  # a tied lm_head is listed once
    index = folder / "model.safetensors.index.json"
    shards = {"": "model.safetensors"} if not index.exists() else read_json(index)["weight_map"]
    state = {}
    for file in sorted(set(shards.values())):
        try:
            with safe_open(folder / file, "pt", device=str(device)) as f:
                for name in f.keys():
                    if "rotary_emb" in name or (name == "lm_head.weight" and model.config.tied):
                        continue
                    tensor = f.get_tensor(name)
                    if name not in want:
                        raise UserError(f"{folder}/{file}: unexpected tensor {name}; "
                                        "do config.json and the weights belong together?")
                    if tensor.shape != want[name]:
                        raise UserError(f"{folder}/{file}: {name} has shape {list(tensor.shape)}, "
                                        f"config.json says {list(want[name])}")
                    state[name] = tensor.to(dtype)
        except FileNotFoundError:
            raise UserError(f"{folder}/{file} is missing; download the checkpoint again "
                            "(weights are read from safetensors only)") from None
        except SafetensorError as e:
            raise UserError(f"{folder}/{file} is damaged ({e}); download it again") from None
    if missing := want.keys() - state.keys():
        raise UserError(f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all); "
                        "download the checkpoint again")
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(False)


# ------------------------------------------------------------------------------- generation


def free_memory(device):
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS
    return os.sysconf(free) * os.sysconf("SC_PAGE_SIZE")


# ------------------------------------------------------------------------------- command line


def main():
    from generate import generate
    from tokenizer import Tokenizer
    ap = argparse.ArgumentParser(description="Complete a prompt.")
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--prompt", default="The capital of France is")
    ap.add_argument("--max-new", type=int, default=48)
    args = ap.parse_args()
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    prompt = tok.document(args.prompt, end=False)
    (ids,) = generate(model, [prompt], args.max_new, tok.stop, banned=tok.banned(model))
    print(args.prompt + tok.decode(ids))


if __name__ == "__main__":
    cli(main)
