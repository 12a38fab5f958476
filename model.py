"""The transformer (Llama 3, Qwen2, Qwen2.5, Qwen3), and its weights in and out of safetensors.

    python model.py --prompt "The capital of France is" --model HuggingFaceTB/SmolLM2-135M-Instruct

Everything runs on a *ribbon*: the tokens of many sequences lie end to end, (T, D), and nothing is
padded. Matrix products and norms treat each token alone, so they never see where a sequence ends.
Only attention does: it unrolls the ribbon into a padded view and rolls the result up again.

Modules keep Hugging Face's names, so loading is a `load_state_dict` and what we save opens there.
Simplified: RoPE 'default' or 'llama3', no sliding window, no biases but Qwen2's, no dropout. A
checkpoint that needs more is refused.

Shapes: B rows, T tokens, n sequences of a group, L the longest of them, D = dim, V vocabulary, H
heads, K key/value heads, E = head_dim.
"""
import argparse
import math
import sys
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from checkpoint import EMBEDDED, fetch, read_config, read_weights, write_checkpoint
from files import cli
from device import flash_attention, fused, has_flash, to_device
from tokenizer import Tokenizer

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
        return cls(**read_config(folder))


# ------------------------------------------------------------------------------- the ribbon

class Ribbon:
    """Sequences laid end to end: T = sum(lengths) tokens, and no padding.

    For lengths [3, 1, 2] and sequences a, b, c:

        ribbon       a0 a1 a2 b0 c0 c1
        row           0  0  0  1  2  2      which sequence a token belongs to
        position      0  1  2  0  0  1      its place in that sequence
        unrolled     a0 a1 a2 | b0 .. .. | c0 c1 ..        (3 sequences, L = 3)
        cell          0  1  2  3  6  7      a token's place in the unrolled view

    A ".." is padding. It stands to the right of its sequence, and attention is causal, so that no
    token ever sees it and no mask is needed.

    row, position, cell: (T,). last, each sequence's last token: (n,). bounds, 0 and one after each
    last token: (n + 1,) in int32, as flash attention wants them."""

    def __init__(self, lengths, device):
        """Sequences are unrolled in groups of like lengths."""
        self.lengths = lengths
        groups = like_lengths(lengths)

        # Each group is a block of n x L cells; the blocks lie one after the other.
        self.shapes = []                                    # (n, L) of each group
        self.cells = 0                                      # of all groups together
        begin = torch.zeros(len(lengths), dtype=torch.long)     # each sequence's first cell
        for members in groups:
            longest = max(lengths[i] for i in members)
            begin[members] = self.cells + longest * torch.arange(len(members))
            self.shapes.append((len(members), longest))
            self.cells += len(members) * longest
        self.masks = [None] * len(groups)                   # None: causal (see padding.py)

        # Where each token is: worked out on the host, so that nothing waits for the device.
        length = torch.tensor(lengths)
        ends = length.cumsum(0)
        row = torch.repeat_interleave(torch.arange(len(lengths)), length)
        position = torch.arange(row.numel()) - (ends - length)[row]
        self.row = to_device(row, device)
        self.position = to_device(position, device)
        self.cell = to_device(begin[row] + position, device)
        self.last = to_device(ends - 1, device)
        self.bounds = to_device(F.pad(ends, (1, 0)).int(), device)
        # Without padding the unrolled view has the ribbon's own order: unrolling is a reshape.
        self.even = len(groups) == 1 and self.cells == row.numel()

    def unroll(self, x):
        """(T, ...) -> [(n, L, ...) of each group], zeros where there is padding."""
        # index_copy, as its backward pass is a gather; an indexed assignment's would sort.
        if not self.even:
            x = x.new_zeros(self.cells, *x.shape[1:]).index_copy(0, self.cell, x)
        blocks = x.split([n * longest for n, longest in self.shapes])
        return [block.view(*shape, *x.shape[1:]) for block, shape in zip(blocks, self.shapes)]

    def roll(self, views):
        """[(n, L, ...) of each group] -> (T, ...), the inverse of `unroll`."""
        blocks = [view.reshape(-1, *view.shape[2:]) for view in views]
        x = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
        return x if self.even else x.index_select(0, self.cell)

    def attend(self, layer, q, k, v):
        """Causal attention within each sequence. q (T, H, E), k and v (T, K, E) -> (T, H, E).

        `layer` is not used here: generate.Cache's attend needs it."""
        if has_flash(q) and not any(mask is not None for mask in self.masks):
            return flash_attention(q, k, v, self.bounds, max(self.lengths))
        # Grouped-query attention: several query heads share a key head.
        shared_heads = q.shape[1] != k.shape[1]
        # One call per group of like lengths. Within it sequences are a batch, and heads are too.
        outputs = []
        groups = zip(self.unroll(q), self.unroll(k), self.unroll(v), self.masks)
        for q_view, k_view, v_view, mask in groups:                         # (n, L, H or K, E)
            y = F.scaled_dot_product_attention(
                q_view.transpose(1, 2), k_view.transpose(1, 2), v_view.transpose(1, 2),
                attn_mask=mask, is_causal=mask is None, enable_gqa=shared_heads)
            outputs.append(y.transpose(1, 2))                               # (n, L, H, E)
        return self.roll(outputs)


def like_lengths(lengths):
    """Indices of sequences in groups: 1 to 32 tokens, 33 to 128, 129 to 512, ...

    One long sequence must not pad a hundred short ones to its own length."""
    # The number of binary digits of n - 1, halved.
    groups = {}
    for i, n in enumerate(lengths):
        size = (max(n, 16) - 1).bit_length() // 2
        groups.setdefault(size, []).append(i)
    return list(groups.values())


# ------------------------------------------------------------------------------- the transformer

class Linear(nn.Linear):
    """A linear layer y = W x + b, to which lora.py adds a low-rank term while one is routed."""
    delta = None

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        # In place: nothing needs y without the term.
        return y if self.delta is None else y.add_(self.delta(x))


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        # torch takes the sum of squares in float32, whatever x is.
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(c, device):
    """Radians per token of each pair of components, (E/2,), in float32.

    'llama3' extends the context window by dividing the low frequencies."""
    # The first pair turns fastest, by one radian a token; the last by 1 / theta.
    f = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, device=device).float() / c.head_dim)
    if c.rope_scaling:
        # High frequencies stay, low ones are divided by `factor`, those between are interpolated.
        # `turns`: how often a pair turns within the original window.
        s = c.rope_scaling
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        turns = s["original_max_position_embeddings"] * f / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        f = (1 - smooth) * f / s["factor"] + smooth * f
    return f


def rotate(x, cos, sin):
    """RoPE: turn each pair (x_i, x_{i+E/2}) by its angle. x (T, H, E); cos, sin (T, 1, E/2)."""
    # Hugging Face's layout: the two components of a pair lie half a head apart, not side by side.
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.dim, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.dim, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def project(self, x, cos, sin):
        """(T, D) -> q (T, H, E), k and v (T, K, E): split into heads, which norms and RoPE work on.
        """
        T = len(x)
        q = self.q_norm(self.q_proj(x).view(T, -1, self.head_dim))
        k = self.k_norm(self.k_proj(x).view(T, -1, self.head_dim))
        v = self.v_proj(x).view(T, -1, self.head_dim)
        return rotate(q, cos, sin), rotate(k, cos, sin), v


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x):
        # SwiGLU: one projection decides how much of the other passes.
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer = layer
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.dim, c.norm_eps)
        self.post_attention_layernorm = RMSNorm(c.dim, c.norm_eps)

    def forward(self, x, cos, sin, attend):
        # `attend` is the only place where tokens meet. Before it and after it each is on its own.
        before, after = fused(Block.before, x), fused(Block.after, x)
        q, k, v = before(self, x, cos, sin)
        return after(self, x, attend(self.layer, q, k, v))

    # Pre-norm: the residual stream x itself is never normalised, only what each part reads.

    def before(self, x, cos, sin):
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x, y):
        x = x + self.self_attn.o_proj(y.flatten(1))         # y (T, H, E), from attention
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """A decoder-only transformer. `folder` is where its weights came from: save_pretrained copies
    the tokenizer's files from there."""
    # Compute a block's activations again in the backward pass: less memory, a third more time.
    recompute = False

    def __init__(self, config, folder=None):
        super().__init__()
        self.config = config
        self.folder = folder
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

        `attend` mixes the tokens: Ribbon.attend, or what generate.Cache's methods return."""
        x = self.model.embed_tokens(ids)
        # Angles are computed in float32: bfloat16 cannot hold every integer above 256.
        angle = position[:, None, None] * rope_frequencies(self.config, ids.device)  # (T, 1, E/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.model.layers:
            # `checkpoint` keeps a block's input only, and runs the block again for its gradient.
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend)
        return self.model.norm(x)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        # Rows of equal length lie on the ribbon just as they do in a batch.
        ribbon = Ribbon([ids.shape[1]] * len(ids), ids.device)
        h = self.hidden(ids.flatten(), ribbon.position, ribbon.attend)
        return self.lm_head(h).view(*ids.shape, -1)

    def save_pretrained(self, folder):
        """Write a folder that load_pretrained and transformers open, whole or not at all."""
        tensors = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        write_checkpoint(folder, self.config.raw, tensors, tokenizer_from=self.folder)


# ------------------------------------------------------------------------------- use

def load_pretrained(name_or_path, device=None, dtype=None):
    """A Transformer from a local folder or a hub id, frozen.

    Default: bfloat16 on CUDA if there is one, else float32 on the CPU. The model is built without
    memory (meta device) and each tensor is put in place as it is read, so there is one copy."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if dtype == torch.bfloat16 and device.type == "cpu":
        print("note: bfloat16 is slow on most CPUs; float32 is faster", file=sys.stderr)

    # Shapes only: load_state_dict(assign=True) puts the tensors that are read in their place.
    folder = fetch(name_or_path)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_folder(folder), folder)
    # named_parameters lists a tied lm_head once, as the embedding. Some files hold it twice.
    shapes = {name: p.shape for name, p in model.named_parameters()}
    unused = ["rotary_emb"] + ["lm_head.weight"] * model.config.tied
    weights = read_weights(folder, shapes, device, dtype, unused)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(False)


@torch.no_grad()
def complete(model, prompt, max_new, stop=()):
    """The likeliest continuation of a prompt (a list of ids): at most max_new ids.

    The plain way: a forward pass over the whole text for every token. generate.py writes the same
    ids many times faster, and the tests hold it against this."""
    ids = list(prompt)
    for _ in range(max_new):
        # Only the last position's logits are needed; all others are computed again and again.
        logits = model(torch.tensor([ids], device=model.device))   # (1, T, V)
        ids.append(logits[0, -1].argmax().item())
        if ids[-1] in stop:
            break
    return ids[len(prompt):]


PROMPT = ("The town of Bramora lies on the river Dorwen.\n\n"
          "Question: What is the river at Bramora called?\nAnswer:")


def main():
    ap = argparse.ArgumentParser(description="Complete a prompt.")
    ap.add_argument("--model", default=EMBEDDED, help="folder or hub id (default: the embedded)")
    ap.add_argument("--prompt", default=PROMPT)
    ap.add_argument("--max-new", type=int, default=48, help="most tokens to write (default: 48)")
    args = ap.parse_args()
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    ids = complete(model, tok.document(args.prompt, end=False), args.max_new, tok.stop)
    print(args.prompt + tok.decode(ids))


if __name__ == "__main__":
    cli(main)
