"""The transformer (Llama 3, Qwen2, Qwen2.5, Qwen3), and its weights in and out of safetensors.

    python model.py --prompt "The capital of France is" --model HuggingFaceTB/SmolLM2-135M-Instruct

Everything runs on a *ribbon*: the tokens of many sequences lie end to end, (T, D), and nothing is
padded. Matrix products and norms treat each token alone, so they never see where a sequence ends.
Only attention does: it unrolls the ribbon into a padded view and rolls the result up again.

Modules keep Hugging Face's names, so loading is a `load_state_dict` and what we save opens there.
Not supported, and refused: RoPE of other types than 'default' and 'llama3', sliding windows, biases
other than those of Qwen2's q, k and v. There is no dropout.

Shapes: B rows, T tokens, D = dim, V vocabulary, H heads, K key/value heads, E = head_dim.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from engine.device import added, fused, together
from engine.ribbon import Ribbon
from support.checkpoint import (EMBEDDED, fetch, read_adapter, read_config, read_weights,
                                weight_files, write_checkpoint)
from support.files import Parser, UserError, cli, positive, printable
from support.tokenizer import Tokenizer

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


# ------------------------------------------------------------------------------- the transformer

class Linear(nn.Linear):
    """A linear layer y = W x + b, to which lora.py adds a low-rank term while one is routed."""
    delta = None

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.delta is None else self.delta(x, y)


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
    """RoPE: turn each pair (a, b) by its angle, to (a cos - b sin, b cos + a sin). x (T, H, E)."""
    # Hugging Face's layout: the two components of a pair lie half a head apart, not side by side.
    # `sin` is -sin in its first half (see `hidden`), and the roll swaps the halves of x.
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = Linear(c.dim, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.dim, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.dim, bias=False)
        self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def project(self, x, cos, sin):
        """(T, D) -> q (T, H, E), k and v (T, K, E): split into heads, which norms and RoPE work on.
        """
        T = len(x)
        q, k, v = [y.view(T, -1, self.head_dim)
                   for y in together(x, self.q_proj, self.k_proj, self.v_proj)]
        turn = fused(rotate, x)
        return turn(self.q_norm(q), cos, sin), turn(self.k_norm(k), cos, sin), v


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.dim, c.hidden_dim, bias=False)
        self.up_proj = Linear(c.dim, c.hidden_dim, bias=False)
        self.down_proj = Linear(c.hidden_dim, c.dim, bias=False)

    def forward(self, x, h):
        """x + W_down (silu(W_gate h) * W_up h), where h is x after its norm."""
        gate, up = together(h, self.gate_proj, self.up_proj)
        return added(x, self.down_proj, fused(swiglu, h)(gate, up))


def swiglu(gate, up):
    """One projection decides how much of the other passes."""
    return F.silu(gate) * up


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer = layer
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        # torch takes the sum of squares in float32, whatever the weights are.
        self.input_layernorm = nn.RMSNorm(c.dim, c.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, c.norm_eps)

    def forward(self, x, cos, sin, attend):
        # Pre-norm: the residual stream x itself is never normalised, only what each part reads.
        q, k, v = self.self_attn.project(self.input_layernorm(x), cos, sin)
        # `attend` is the only place where tokens meet. Before it and after it each is on its own.
        y = attend(self.layer, q, k, v)                     # (T, H, E)
        x = added(x, self.self_attn.o_proj, y.flatten(1))   # x + o_proj(y)
        return self.mlp(x, self.post_attention_layernorm(x))


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
            "norm": nn.RMSNorm(config.dim, config.norm_eps)})
        self.lm_head = Linear(config.dim, config.vocab_size, bias=False)
        self.tie()

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)

    def tie(self):
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids, position, attend):
        """The residual stream after the last norm: ids, position (T,) -> (T, D).

        `attend` mixes the tokens: Ribbon.attend, or one of decode.Rows that keeps a cache."""
        x = self.model.embed_tokens(ids)
        # Angles are computed in float32: bfloat16 cannot hold every integer above 256.
        angle = position[:, None, None] * rope_frequencies(self.config, ids.device)  # (T, 1, E/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)             # (T, 1, E)
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
    folder = fetch(name_or_path)
    config = ModelConfig(**read_config(folder))
    # Shapes only: load_state_dict(assign=True) puts the tensors that are read in their place.
    with torch.device("meta"):
        model = Transformer(config, folder)
    # named_parameters lists a tied lm_head once, as the embedding.
    shapes = {name: p.shape for name, p in model.named_parameters()}
    weights = read_weights(weight_files(folder), shapes, device, dtype, config.tied)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(False)


@torch.no_grad()
def add_adapter(model, folder):
    """W <- W + (alpha / r) B A, for an adapter in PEFT's layout. UserError if it does not fit."""
    rank, alpha, pairs = read_adapter(folder, dict(model.named_parameters()), model.folder)
    for name, (A, B) in pairs.items():
        W = model.get_parameter(f"{name}.weight")
        W.copy_(W.float() + (alpha / rank) * (B @ A).to(W.device))


@torch.no_grad()
def complete(model, prompt, max_new, stop=(), temperature=0.0, top_p=1.0, seed=0):
    """Continue a prompt (a list of ids): at most max_new ids. Temperature 0 is greedy.

    The plain way: a forward pass over the whole text for every token. engine/decode.py writes the
    same distribution of texts many times faster, and the tests hold it against this."""
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = list(prompt)
    for _ in range(max_new):
        # Only the last position's logits are needed; all others are computed again and again.
        logits = model(torch.tensor([ids], device=model.device))[0, -1]     # (V,)
        if temperature == 0:
            token = logits.argmax()
        else:
            # The nucleus: the fewest likeliest tokens that have top_p of the probability together.
            p, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
            mass_before = p.cumsum(-1) - p
            p[mass_before >= top_p] = 0
            token = order[p.multinomial(1, generator=generator)]
        ids.append(token.item())
        if ids[-1] in stop:
            break
    return ids[len(prompt):]


PROMPT = ("The town of Bramora lies on the river Dorwen.\n\n"
          "Question: What is the river at Bramora called?\nAnswer:")


def main():
    ap = Parser(description="Complete a prompt.")
    ap.add_argument("--model", default=EMBEDDED, help="folder or hub id (default: the embedded)")
    ap.add_argument("--adapter", metavar="DIR",
                    help="a LoRA adapter (folder or hub id), added to the weights")
    ap.add_argument("--prompt", default=PROMPT)
    ap.add_argument("--max-new", type=positive, default=48, help="tokens at most (default: 48)")
    args = ap.parse_args()
    model = load_pretrained(args.model)
    if args.adapter:
        add_adapter(model, args.adapter)
    tok = Tokenizer.from_pretrained(model.folder)
    prompt = tok.document(args.prompt, end=False)
    if not prompt:
        raise UserError("--prompt is empty")
    room = model.config.max_len - len(prompt)
    if room < 1:
        raise UserError(f"--prompt has {len(prompt)} tokens; the model's window has "
                        f"{model.config.max_len}")
    new = complete(model, prompt, min(args.max_new, room), tok.stop)
    print(printable(args.prompt + tok.decode(new)))


if __name__ == "__main__":
    cli(main)
