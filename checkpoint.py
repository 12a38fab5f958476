"""A checkpoint is found, read and written.

A checkpoint is a folder in Hugging Face's layout (config.json, safetensors, tokenizer files) or the
id of one on the hub. Weights are read from safetensors only: a pickle could run code.
"""
import json
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from files import UserError, read_json

EMBEDDED = Path(__file__).resolve().parent / "data" / "tiny"    # ships with the project
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def fetch(name_or_path, wanted=("config.json", "model*.safetensors*", *TOKENIZER_FILES)):
    """The local folder of a checkpoint; of a hub id (owner/name) the wanted files are downloaded
    first: by default the config, the tokenizer and the safetensors. UserError says what failed."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
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


def read_config(folder):
    """config.json as the fields of a model.ModelConfig.

    UserError if it is malformed or asks for what model.py does not implement."""
    raw = read_json(Path(folder) / "config.json")
    if not isinstance(raw, dict):
        raise UserError(f"{folder}/config.json: not a JSON object")
    architecture = (raw.get("architectures") or ["?"])[0]
    # transformers 5 writes rope_parameters, transformers 4 wrote rope_scaling and rope_theta.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))

    lacking = not_implemented(raw, architecture, rope_type)
    if lacking:
        raise UserError(f"{folder}: unsupported architecture: {lacking} is not implemented")
    try:
        dim = raw["hidden_size"]
        n_head = raw["num_attention_heads"]
        return dict(
            dim=dim,
            n_layer=raw["num_hidden_layers"],
            n_head=n_head,
            n_kv_head=raw.get("num_key_value_heads") or n_head,
            head_dim=raw.get("head_dim") or dim // n_head,
            hidden_dim=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            max_len=raw.get("max_position_embeddings", 2048),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
            rope_scaling=rope if rope_type == "llama3" else None,
            tied=raw.get("tie_word_embeddings", False),
            qkv_bias=architecture.startswith("Qwen2"),
            qk_norm=architecture.startswith("Qwen3"),
            raw=raw)
    except KeyError as e:
        raise UserError(f"{folder}/config.json: {e} is missing") from None


def not_implemented(raw, architecture, rope_type):
    """What a config.json asks for that model.py does not implement, or None."""
    if architecture not in ARCHITECTURES:
        return f"{architecture} (Llama, Qwen2/2.5 and Qwen3 are)"
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


def read_weights(folder, shapes, device, dtype, unused=()):
    """The tensors of a checkpoint, {name: tensor} on the device, as dtype.

    shapes {name: shape} is what they must be; a name that contains a string of `unused` is skipped.
    UserError: a file is missing or damaged, a tensor is missing, unexpected or of another shape."""
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        try:
            files = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: no weight_map {{tensor: file}} in it") from None

    tensors = {}
    for file in files:
        try:
            with safe_open(folder / file, "pt", device=str(device)) as shard:
                for name in shard.keys():
                    if any(part in name for part in unused):
                        continue
                    tensor = shard.get_tensor(name)
                    if name not in shapes:
                        raise UserError(f"{folder}/{file}: unexpected tensor {name}; "
                                        "do config.json and the weights belong together?")
                    if tensor.shape != shapes[name]:
                        raise UserError(f"{folder}/{file}: {name} has shape {list(tensor.shape)}, "
                                        f"config.json says {list(shapes[name])}")
                    tensors[name] = tensor.to(dtype)
        except FileNotFoundError:
            raise UserError(f"{folder}/{file} is missing; download the checkpoint again "
                            "(weights are read from safetensors only)") from None
        except SafetensorError as e:
            raise UserError(f"{folder}/{file} is damaged ({e}); download it again") from None

    missing = shapes.keys() - tensors.keys()
    if missing:
        raise UserError(f"{folder}: tensor {min(missing)} is missing ({len(missing)} in all); "
                        "download the checkpoint again")
    return tensors


def write_checkpoint(folder, config, tensors, tokenizer_from=None):
    """Write a checkpoint whole or not at all. UserError if the folder exists.

    config: config.json as a dict. tensors {name: tensor}. tokenizer_from: a folder whose tokenizer
    files are copied."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; nothing was overwritten")
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)

    config = dict(config)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):    # as transformers 5 and 4 call it
        if key in config:
            config[key] = dtype
    (draft / "config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, draft / "model.safetensors", {"format": "pt"})
    for name in TOKENIZER_FILES:
        if tokenizer_from and (Path(tokenizer_from) / name).exists():
            shutil.copy(Path(tokenizer_from) / name, draft)
    draft.rename(folder)
