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
import re
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class UserError(Exception):
    """Something the user can mend; programs print its one line and no traceback."""


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

    def __init__(self, lengths, device):
        n, self.L = len(lengths), max(lengths, default=0)
        self.shape, self.lengths = (n, self.L), lengths
        self.even = all(length == self.L for length in lengths)  # then unrolling is a reshape
        length = torch.tensor(lengths)
        ends = length.cumsum(0)
        row = torch.repeat_interleave(torch.arange(n), length)
        position = torch.arange(row.numel()) - (ends - length)[row]
        self.position = to_device(position, device)             # (T,) place in its own sequence
        self.cell = to_device(row * self.L + position, device)  # (T,) place in the (n * L,) view
        self.last = to_device(ends - 1, device)                 # (n,) each sequence's last token
        self.ends = to_device(ends.int(), device)               # (n,) as grouped_mm wants them

    def unroll(self, x):
        """(T, ...) -> (n, L, ...), zeros to the right of each sequence."""
        if not self.even:  # index_copy's backward is a gather; an indexed assignment's would sort
            zeros = x.new_zeros(math.prod(self.shape), *x.shape[1:])
            x = zeros.index_copy(0, self.cell, x)
        return x.view(*self.shape, *x.shape[1:])

    def roll(self, y):
        """(n, L, ...) -> (T, ...)."""
        y = y.reshape(-1, *y.shape[2:])
        return y if self.even else y.index_select(0, self.cell)

    def attend(self, layer, q, k, v):
        """Causal attention within each sequence. q (T, H, E), k and v (T, K, E) -> (T, H, E)."""
        q, k, v = (self.unroll(t).transpose(1, 2) for t in (q, k, v))  # (n, H or K, L, E)
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return self.roll(y.transpose(1, 2))


class Cache:
    """Keys and values of every row's tokens so far, per layer (rows, K, S, E).

    S grows in blocks of 256. Rows are the ribbon's prompts, each `copies` times."""

    def __init__(self, ribbon, copies):
        self.ribbon, self.copies, self.kv = ribbon, copies, {}
        self.longest = ribbon.L
        self.size = round_up(self.longest + 1, 256)
        length = torch.tensor(ribbon.lengths).repeat_interleave(copies)
        self.length = to_device(length, ribbon.cell.device)  # (rows,) tokens so far

    def prefill(self, layer, q, k, v):
        """Attend within the prompts; store their keys and values once for each copy."""
        room = (0, 0, 0, self.size - self.ribbon.L)
        self.kv[layer] = tuple(F.pad(self.ribbon.unroll(t).transpose(1, 2), room)
                               .repeat_interleave(self.copies, 0) for t in (k, v))
        return self.ribbon.attend(layer, q, k, v)

    def decode(self, layer, q, k, v):
        """One new token per row: store its k, v (rows, K, E), attend to all so far -> like q."""
        K, V = self.kv[layer]
        row = torch.arange(len(q), device=q.device)
        K[row, :, self.length], V[row, :, self.length] = k, v
        S = min(round_up(self.longest + 1, 64), self.size)  # a prefix that covers every row
        seen = torch.arange(S, device=q.device) <= self.length[:, None]
        q = q.view(len(q), k.shape[1], -1, q.shape[-1])  # heads that share a key take the L axis
        y = F.scaled_dot_product_attention(q, K[:, :, :S], V[:, :, :S], seen[:, None, None])
        return y.flatten(1, 2)

    def advance(self):
        """Every row has one token more."""
        self.length += 1
        self.longest += 1
        if self.longest == self.size:
            self.size += 256
            grow = lambda t: F.pad(t, (0, 0, 0, 256))
            self.kv = {layer: (grow(k), grow(v)) for layer, (k, v) in self.kv.items()}

    def keep(self, rows):
        """Drop all but the given rows (LongTensor)."""
        self.length = self.length[rows]
        self.kv = {layer: (k[rows], v[rows]) for layer, (k, v) in self.kv.items()}


def round_up(n, block):
    return -(-n // block) * block


# ------------------------------------------------------------------------------- the transformer

class Linear(nn.Linear):
    """A linear layer that lora.py can add a low-rank term to: y = W x + b (+ delta(x))."""
    delta = None

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        return y if self.delta is None else y + self.delta(x)


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

    def __init__(self, config, folder=None):
        super().__init__()
        self.config, self.folder = config, folder
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.dim),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            "norm": RMSNorm(config.dim, config.norm_eps)})
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.tie()

    device = property(lambda self: self.lm_head.weight.device)
    dtype = property(lambda self: self.lm_head.weight.dtype)

    def tie(self):
        if self.config.tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, ids, position, attend):
        """The residual stream after the last norm: ids, position (T,) -> (T, D).

        `attend` mixes the tokens: Ribbon.attend, Cache.prefill or Cache.decode."""
        x = self.model.embed_tokens(ids)
        angle = position[:, None, None] * rope_frequencies(self.config, ids.device)  # (T, 1, E/2)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin, attend)
        return self.model.norm(x)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        ribbon = Ribbon([ids.shape[1]] * len(ids), ids.device)
        h = self.hidden(ids.flatten(), ribbon.position, ribbon.attend)
        return self.lm_head(h).view(*ids.shape, -1)

    def save_pretrained(self, folder):
        """Write a folder that load_pretrained, transformers and vLLM open, whole or not at all."""
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

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, OSError) as e:
        raise UserError(f"{path}: not readable as JSON ({e})") from None


def fetch(name_or_path):
    """A local folder as it is, or a hub id (owner/name): its config, tokenizer and safetensors."""
    if (path := Path(name_or_path).expanduser()).is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        raise UserError(f"{name_or_path}: no such folder (a hub id looks like owner/name)")
    import huggingface_hub as hub
    wanted = ["config.json", "model*.safetensors*", *TOKENIZER_FILES]
    try:
        return Path(hub.snapshot_download(name_or_path, allow_patterns=wanted))
    except hub.errors.GatedRepoError:
        problem = "it is gated: accept its licence on its hub page, then run `hf auth login`"
    except hub.errors.RepositoryNotFoundError:
        problem = "no such folder, and no such model on the hub"
    except Exception as e:  # every transport has its own exceptions
        why = (str(e).strip().splitlines() or [""])[0][:150]
        problem = f"no such folder, and the hub can't be reached ({type(e).__name__}: {why})"
    raise UserError(f"{name_or_path}: {problem}")


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

def sample(logits, temperature, top_p, u):
    """One token per row from the nucleus, the likeliest tokens whose mass reaches top_p.

    logits (B, V); u (B,), uniform in [0, 1), is the only randomness. Temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    top, index = p.topk(min(1024, p.shape[-1]))  # on a CPU ten times faster than sorting all
    if p.is_cuda or (top.sum(-1) < top_p).any():
        top, index = p.sort(-1, descending=True)
    before = top.cumsum(-1) - top
    mass = (top * (before < top_p)).cumsum(-1)  # cut a token if those before it reach top_p
    pick = (mass < u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)  # the inverse of the CDF, at u
    return index.gather(-1, pick)[:, 0]


@torch.inference_mode()
def generate(model, prompts, max_new, stop, n=1, temperature=0.0, top_p=1.0, seeds=None,
             late_stop=(), banned=None, adapters=None, slots=None, max_rows=None,
             progress=lambda done, total: None):
    """Continue each prompt (a list of ids) n times: len(prompts) * n lists of new ids.

    Greedy at temperature 0, else from the nucleus, and row i draws from its own generator, seeded
    seeds[i]: its text does not depend on its neighbours. `stop` ids end a row and are part of it;
    `late_stop` ids too, unless they come first. `banned` (V,) marks ids that must not be drawn.
    With `adapters` (lora.Adapters), prompt j is read under slot slots[j]; slots ascend.
    `max_rows` rows are decoded at a time; `progress` hears how many have ended."""
    device, results = model.device, []
    late_stop = torch.tensor(sorted({*stop, *late_stop}), device=device)
    stop = torch.tensor(sorted(stop), device=device)
    slots = slots or [0] * len(prompts)
    assert all(prompts) and slots == sorted(slots), "empty prompt, or not sorted by adapter"

    def route(slots, tokens):  # each adapter attached to its own stretch of the ribbon
        if adapters is None:
            return nullcontext()
        counts = [0] * adapters.n
        for slot, count in zip(slots, tokens):
            counts[slot] += count
        return adapters.route(counts)

    step_rows = max(1, (max_rows or (256 if device.type == "cuda" else 32)) // n)
    for start in range(0, len(prompts), step_rows):
        batch, slot = prompts[start:start + step_rows], slots[start:start + step_rows]
        ribbon = Ribbon([len(p) for p in batch], device)
        cache = Cache(ribbon, n)
        ids = to_device(torch.tensor([i for p in batch for i in p]), device)
        with route(slot, ribbon.lengths):  # a prompt is read once, however many rows continue it
            h = model.hidden(ids, ribbon.position, cache.prefill)[ribbon.last]
        h = h.repeat_interleave(n, 0)  # (rows, D)
        slot = [s for s in slot for _ in range(n)]
        rows = torch.arange(len(slot), device=device)  # those the cache still holds
        out = torch.full((len(slot), max_new), -1, device=device)
        finished = torch.zeros(len(slot), dtype=torch.bool, device=device)
        u = torch.zeros(len(slot), max_new)
        for row in range(len(slot) if temperature else 0):
            own = torch.Generator().manual_seed(seeds[start * n + row])
            u[row] = torch.rand(max_new, generator=own)
        u, here = to_device(u, device), route(slot, [1] * len(slot))

        for step in range(max_new):
            if step % 16 == 0:  # the only wait for the device: have rows ended? then make room
                live = (~finished).nonzero()[:, 0]
                if not len(live):
                    break
                if len(live) <= len(rows) // 2:
                    cache.keep(live)
                    rows, finished, h = rows[live], finished[live], h[live]
                    slot = [slot[i] for i in live.tolist()]
                    here = route(slot, [1] * len(slot))
                    progress(start * n + len(out) - len(slot), len(prompts) * n)
            logits = model.lm_head(h)
            if banned is not None:
                logits = logits.masked_fill(banned, -torch.inf)
            token = sample(logits, temperature, top_p, u[rows, step])
            out[rows, step] = torch.where(finished, -1, token)
            finished |= torch.isin(token, late_stop if step else stop)
            if step + 1 < max_new:
                with here:
                    h = model.hidden(token, cache.length, cache.decode)
                cache.advance()
        progress(start * n + len(out), len(prompts) * n)
        results += [[i for i in row if i >= 0] for row in out.tolist()]
    return results


# ------------------------------------------------------------------------------- command line

def cli(main):
    """Run a program's main; what the user can mend is one line on stderr, with no traceback."""
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def main():
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
