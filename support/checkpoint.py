"""A checkpoint is found, read and written.

A checkpoint is a folder in Hugging Face's layout (config.json, safetensors, tokenizer files) or the
id of one on the hub. Weights are read from safetensors only: a pickle could run code.
"""
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.files import UserError, read_json, sync

EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "tiny"    # ships with the project
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "generation_config.json", "chat_template.jinja")
# The numbers of config.json: their kind, the smallest and the largest. The last four are RoPE's.
FIELDS = {
    "hidden_size": (int, 1, 2**20), "intermediate_size": (int, 1, 2**24),
    "num_hidden_layers": (int, 1, 1000), "num_attention_heads": (int, 1, 2**16),
    "num_key_value_heads": (int, 1, 2**16), "head_dim": (int, 2, 2**16),
    "vocab_size": (int, 1, 2**24), "max_position_embeddings": (int, 1, 2**24),
    "rms_norm_eps": (float, 1e-30, 1), "rope_theta": (float, 1e-30, 1e30),
    "factor": (float, 1e-6, 1e6), "low_freq_factor": (float, 1e-6, 1e6),
    "high_freq_factor": (float, 1e-6, 1e6), "original_max_position_embeddings": (int, 1, 2**24)}


def fetch(name_or_path, wanted=("config.json", "model*.safetensors*", *TOKENIZER_FILES)):
    """The local folder of a checkpoint; of a hub id (owner/name) the wanted files are downloaded
    first: by default the config, the tokenizer and the safetensors. UserError says what failed."""
    path = os.path.expanduser(name_or_path)     # pathlib's would raise for ~nobody
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise UserError(f"{name_or_path} is a file; a checkpoint is a folder of safetensors")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name_or_path)):
        raise UserError(f"{name_or_path}: no such folder (a hub id looks like owner/name)")

    import huggingface_hub as hub
    from huggingface_hub import errors
    try:
        return Path(hub.snapshot_download(name_or_path, allow_patterns=list(wanted)))
    except errors.GatedRepoError:
        problem = "it is gated: accept its licence on its hub page, then run `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = "no such folder, and no such model on the hub"
    except Exception as e:  # every transport has exceptions of its own
        first_line = (str(e).strip().splitlines() or [""])[0][:150]
        why = f"{type(e).__name__}: {first_line}"
        problem = f"no such folder, and the hub can't be reached ({why})"
    raise UserError(f"{name_or_path}: {problem}")


def remedy(folder):
    """What to do about a checkpoint that is not whole."""
    if re.fullmatch(r"iter_\d+", folder.name) and (folder.parent / "rollouts.jsonl").exists():
        return f"delete {folder} and repeat the command"    # a run wrote it, and can again
    others = [*folder.glob("*.gguf"), *folder.glob("*.bin")]
    if others and not any(folder.glob("*.safetensors")):
        return f"{min(others).name!r} is no help: weights are read from safetensors only"
    return "download the checkpoint again, or name another folder"


def read_object(path):
    """The object that a JSON file of a checkpoint holds. UserError if it is anything else."""
    try:
        value = read_json(path)
    except UserError as e:
        raise UserError(f"{e}; {remedy(path.parent)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object; {remedy(path.parent)}")
    return value


def number(raw, path, key, default=None):
    """raw[key], or the default if it is absent or null. UserError if FIELDS does not allow it."""
    kind, low, high = FIELDS[key]
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise UserError(f"{path}: {key!r} is missing")
    if type(value) not in (int, kind) or not low <= value <= high:      # type(): True is an int
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{path}: {key} must be {what} from {low} to {high}, not {value!r:.80}")
    return kind(value)


def read_config(folder):
    """config.json as the fields of a model.ModelConfig.

    UserError if it is malformed or asks for what model.py does not implement."""
    path = Path(folder) / "config.json"
    raw = read_object(path)
    names = raw.get("architectures") or ["?"]
    architecture = names[0] if isinstance(names, list) else names
    # transformers 5 writes rope_parameters, transformers 4 wrote rope_scaling and rope_theta.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if what := not_implemented(raw, architecture, rope_type):
        raise UserError(f"{folder}: unsupported architecture: {what} is not implemented")
    llama3 = None
    if rope_type == "llama3":
        llama3 = {key: number(rope, path, key) for key in list(FIELDS)[-4:]}
        if llama3["low_freq_factor"] >= llama3["high_freq_factor"]:
            raise UserError(f"{path}: low_freq_factor must be below high_freq_factor")
    dim, n_head = number(raw, path, "hidden_size"), number(raw, path, "num_attention_heads")
    n_kv_head = number(raw, path, "num_key_value_heads", n_head)
    head_dim = number(raw, path, "head_dim", dim // n_head)
    tied = raw.get("tie_word_embeddings") or False
    if n_head % n_kv_head:
        raise UserError(f"{path}: num_attention_heads must be a multiple of num_key_value_heads")
    if head_dim % 2:
        raise UserError(f"{path}: head_dim must be even")
    if not isinstance(tied, bool):
        raise UserError(f"{path}: tie_word_embeddings must be true or false")
    return dict(
        dim=dim, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, tied=tied, raw=raw,
        n_layer=number(raw, path, "num_hidden_layers"),
        hidden_dim=number(raw, path, "intermediate_size"),
        vocab_size=number(raw, path, "vocab_size"),
        max_len=number(raw, path, "max_position_embeddings", 2048),
        norm_eps=number(raw, path, "rms_norm_eps", 1e-6),
        rope_theta=number(rope, path, "rope_theta", number(raw, path, "rope_theta", 10000.0)),
        rope_scaling=llama3, qkv_bias=architecture.startswith("Qwen2"),
        qk_norm=architecture.startswith("Qwen3"))


def not_implemented(raw, architecture, rope_type):
    """What a config.json asks for that model.py does not implement, or None."""
    if architecture not in ARCHITECTURES:
        return f"{architecture!r} (Llama, Qwen2/2.5 and Qwen3 are)"
    if rope_type not in ("default", "llama3"):
        return f"RoPE type {rope_type!r}"
    if raw.get("hidden_act", "silu") != "silu":
        return f"{raw.get('hidden_act')!r}"
    if raw.get("use_sliding_window"):
        return "sliding-window attention"
    if raw.get("attention_bias") or raw.get("mlp_bias"):
        return "attention/mlp_bias"
    if "quantization_config" in raw:
        return "quantised weights"
    return None


def shards(folder, device="cpu"):
    """(path, open file) of each of a checkpoint's safetensors. UserError if one can't be read."""
    index = folder / "model.safetensors.index.json"
    weight_map = {"all": "model.safetensors"}
    if index.exists():
        weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: no weight_map {{tensor: file}} in it")
    for file in sorted({str(file) for file in weight_map.values()}):
        # A name, as a path could lead out of the folder.
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,200}\.safetensors", file):
            raise UserError(f"{index}: {file!r:.80} is no name of a safetensors file")
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing; {remedy(folder)}")
        try:
            with safe_open(path, "pt", device=str(device)) as shard:
                yield path, shard
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} is damaged ({str(e)!r:.200}); {remedy(folder)}") from None


def check_layers(folder, n_layer):
    """UserError if the weights, by their headers, have fewer layers: none is built in vain."""
    names = "\n".join(name for _, shard in shards(folder) for name in shard.keys())
    found = len(set(re.findall(r"^model\.layers\.(\d+)\.", names, re.MULTILINE)))
    if found < n_layer:
        raise UserError(f"{folder}: tensor model.layers.{found}.* is missing: num_hidden_layers is "
                        f"{n_layer} in config.json; {remedy(folder)}")


def read_weights(folder, shapes, device, dtype, unused=()):
    """The tensors of a checkpoint, {name: tensor} on the device, as dtype.

    shapes {name: shape} is what they must be; a name that contains a string of `unused` is skipped.
    UserError: a tensor is missing, unexpected, of another shape or kind, or not finite."""
    tensors = {}
    for path, shard in shards(folder, device):
        for name in shard.keys():
            if any(part in name for part in unused):
                continue
            if name not in shapes:
                raise UserError(f"{path}: unexpected tensor {name!r:.90}; wrong config.json?")
            header = shard.get_slice(name)
            shape, kind = header.get_shape(), header.get_dtype()
            if shape != list(shapes[name]) or kind not in ("F16", "BF16", "F32", "F64"):
                raise UserError(f"{path}: {name} has shape {shape} and type {kind}; it must be "
                                f"{list(shapes[name])} by config.json, and F16, BF16, F32 or F64")
            tensors[name] = shard.get_tensor(name).to(dtype)
            # Either end is NaN if any number is. Unlike isfinite() of them all it takes no memory.
            if not all(end.isfinite() for end in tensors[name].aminmax()):
                raise UserError(f"{path}: {name} holds NaN or infinity; {remedy(folder)}")
    missing = shapes.keys() - tensors.keys()
    if missing:
        raise UserError(f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all); "
                        f"{remedy(folder)}")
    return tensors


def write_checkpoint(folder, config, tensors, tokenizer_from=None):
    """Write a checkpoint whole or not at all, a power cut included. UserError if the folder exists.

    config: config.json as a dict. tensors {name: tensor}. tokenizer_from: a folder whose tokenizer
    files are copied."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; nothing was overwritten")
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.unlink(missing_ok=True)
    draft.mkdir(parents=True)

    config = dict(config)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):    # as transformers 5 and 4 call it
        if key in config:
            config[key] = dtype
    (draft / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, draft / "model.safetensors", {"format": "pt"})
    for name in TOKENIZER_FILES:
        if tokenizer_from and (Path(tokenizer_from) / name).is_file():
            shutil.copy(Path(tokenizer_from) / name, draft)
    for path in (*draft.iterdir(), draft):
        sync(path)
    draft.rename(folder)
    sync(folder.parent)


def read_adapter(folder):
    """A LoRA adapter in PEFT's layout: (rank, alpha, targets, {layer: (A (r, in), B (out, r))}).

    UserError if it is none, or does what lora.py does not."""
    folder = Path(folder)
    config = read_object(folder / "adapter_config.json")
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    plain = (config.get("peft_type") == "LORA" and not config.get("use_rslora")
             and not config.get("use_dora") and not config.get("rank_pattern")
             and not config.get("alpha_pattern") and config.get("bias", "none") == "none")
    sound = (type(rank) is int and rank > 0 and type(alpha) in (int, float)
             and isinstance(targets, list) and targets and all(type(t) is str for t in targets))
    if not (plain and sound):
        raise UserError(f"{folder}/adapter_config.json: not a plain LoRA adapter (r, lora_alpha, a "
                        "list of target_modules; no biases, no variants)")
    halves = {}
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing; an adapter is read from safetensors only")
    try:
        with safe_open(path, "pt") as f:
            for name in f.keys():
                layer, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
                halves.setdefault(layer, {})[half] = f.get_tensor(name).float()
        layers = {layer: (half["A.weight"], half["B.weight"]) for layer, half in halves.items()}
    except (SafetensorError, KeyError) as e:
        raise UserError(f"{path} is damaged ({str(e)!r:.200})") from None
    if not all(half.isfinite().all() for pair in layers.values() for half in pair):
        raise UserError(f"{path} holds NaN or infinity")
    return rank, alpha, targets, layers


def write_adapter(folder, rank, alpha, targets, pairs, base):
    """Write what `read_adapter` reads, for PEFT, too. UserError if the folder exists.

    base: the folder of the model that the adapter belongs to."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; nothing was overwritten")
    folder.mkdir(parents=True)
    # PEFT's names: base_model.model is its wrapper around the model.
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.detach().clone()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.detach().clone()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
        "lora_dropout": 0.0, "bias": "none", "target_modules": list(targets),
        "base_model_name_or_path": str(base)}))
