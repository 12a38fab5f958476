"""A checkpoint is found, read and written.

A checkpoint is a folder in Hugging Face's layout (config.json, safetensors, tokenizer files) or the
id of one on the hub. Weights are read from safetensors only: a pickle could run code.
"""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.files import UserError, printable, read_json, sync

EMBEDDED = Path(__file__).resolve().parent.parent / "data" / "tiny"    # ships with the project
FAMILIES = ("llama", "qwen2", "qwen3")      # model_type of a config.json
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "generation_config.json", "chat_template.jinja")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What PEFT calls a tensor of an adapter: base_model.model is its wrapper around the model.
PEFT_NAME = "base_model.model.{}.lora_{}.weight"
# Numbers of these files: their kind, the smallest and the largest.
WHOLE, REAL = (int, 1, 2**20), (float, 1e-30, 1e30)
LLAMA3 = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]

# The fields that are known, for `refuse_unknown`: what they may say, or None where anything is
# read, checked elsewhere, or without effect on what a model computes.
ROPE = dict.fromkeys(["rope_theta", *LLAMA3]) | {
    "rope_type": ["default", "llama3"], "type": ["default", "llama3"], "partial_rotary_factor": [1]}
CONFIG = dict.fromkeys("""hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim vocab_size max_position_embeddings rms_norm_eps rope_theta
    model_type architectures bos_token_id eos_token_id pad_token_id dtype torch_dtype use_cache
    transformers_version _name_or_path initializer_range pretraining_tp output_attentions id2label
    output_hidden_states label2id problem_type max_window_layers sliding_window do_sample top_p
    max_sequence_length temperature max_length is_llama_config transformers.js_config
    unsloth_fixed unsloth_version _attn_implementation_autoset""".split()) | {
        "hidden_act": ["silu"], "is_causal": [True], "return_dict": [True],
        "layer_types": ["full_attention"], "partial_rotary_factor": [1],
        "tie_word_embeddings": [True, False], "rope_parameters": ROPE, "rope_scaling": ROPE}
ADAPTER = dict.fromkeys("""r lora_alpha use_rslora target_modules exclude_modules
    layers_to_transform lora_dropout inference_mode auto_mapping base_model_name_or_path revision
    peft_version megatron_core qalora_group_size""".split()) | {
        "peft_type": ["LORA"], "task_type": ["CAUSAL_LM"], "bias": ["none"],
        "init_lora_weights": [True, False, "gaussian", "orthogonal"],
        "layers_pattern": ["layers"]}


def fetch(name_or_path, wanted=("config.json", "model*.safetensors*", ADAPTER_FILES[0],
                                *TOKENIZER_FILES)):
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
    try:
        return Path(hub.snapshot_download(name_or_path, allow_patterns=list(wanted)))
    except hub.errors.GatedRepoError:
        problem = "it is gated: accept its licence on its hub page, then run `hf auth login`"
    except hub.errors.RepositoryNotFoundError:
        problem = "no such folder, and no such model on the hub"
    except Exception as e:  # every transport has exceptions of its own
        problem = f"no such folder, and the hub can't be reached ({e!r:.170})"
    raise UserError(f"{name_or_path}: {problem}")


def remedy(folder):
    """What to do about a checkpoint that is not whole."""
    if re.fullmatch(r"iter_\d+", folder.name) and (folder.parent / "rollouts.jsonl").exists():
        return f"delete {folder} and repeat the command"    # a run wrote it, and can again
    if (folder / ADAPTER_FILES[0]).exists():
        return "is it an adapter? Name its base as --model, and it as --adapter"
    return "download the checkpoint again (weights: safetensors only), or name another folder"


def read_object(path, default=None, kind={}):
    """The object that a JSON file of a checkpoint holds; the default, if one is given, of a file
    that is not there. UserError if it is anything else, or not of its kind (see files.FIELDS)."""
    if default is not None and not path.exists():
        return default
    try:
        return read_json(path, kind)
    except UserError as e:
        raise UserError(f"{e}; {remedy(path.parent)}") from None


def refuse_unknown(path, raw, known):
    """Fail closed: UserError for a field that is not known, unless its value is empty, and for one
    that says what is not done. known {field: a list of values, its own table, or None: any}."""
    for field, value in raw.items():
        allowed = known.get(field, [False, "", [], {}])
        if value is None or allowed is None:
            continue
        # Of a list that is known each item is looked at: layers' kinds, steps of a tokenizer.
        for item in value if isinstance(value, list) and field in known else [value]:
            if isinstance(item, dict) and isinstance(allowed, dict):
                refuse_unknown(f"{path}: {field}", item, allowed)
            elif isinstance(allowed, dict) or item not in allowed:
                raise UserError(f"{path}: {field} = {value!r:.80} is not implemented")


def number(raw, path, key, default=None, bounds=WHOLE):
    """raw[key], or the default if it is absent or null. UserError if it is not within bounds."""
    kind, least, most = bounds
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise UserError(f"{path}: {key!r} is missing")
    if type(value) not in (int, kind) or not least <= value <= most:    # type(): True is an int
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{path}: {key} must be {what} from {least} to {most}, not {value!r:.80}")
    return kind(value)


def read_config(folder):
    """config.json as the fields of a model.ModelConfig. UserError if it is malformed or asks for
    what model.py does not implement."""
    path = Path(folder) / "config.json"
    raw = read_object(path, kind={"architectures?": ([str],), "rope_parameters?": ({},),
                                  "rope_scaling?": ({},), "tie_word_embeddings?": (bool,)})
    if (path.parent / ADAPTER_FILES[0]).exists():
        raise UserError(f"{folder}: a model or an adapter? {ADAPTER_FILES[0]} lies in it, too")
    names = [raw.get("model_type"), *(raw.get("architectures") or [])]
    names = sorted({str(name).removesuffix("ForCausalLM").lower() for name in names if name})
    if len(names) != 1 or names[0] not in FAMILIES:
        raise UserError(f"{path}: unsupported architecture: model_type and architectures say "
                        f"{names!r:.80}; one of {', '.join(FAMILIES)} is implemented")
    refuse_unknown(path, raw, CONFIG)
    theta, llama3 = read_rope(raw, path)
    dim = number(raw, path, "hidden_size")
    n_head = number(raw, path, "num_attention_heads")
    n_kv_head = number(raw, path, "num_key_value_heads", n_head)
    head_dim = number(raw, path, "head_dim", dim // n_head)
    if n_head % n_kv_head or head_dim % 2:
        raise UserError(f"{path}: num_attention_heads must be a multiple of num_key_value_heads, "
                        "and head_dim must be even")
    return dict(
        dim=dim, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, raw=raw,
        tied=bool(raw.get("tie_word_embeddings")),
        n_layer=number(raw, path, "num_hidden_layers", bounds=(int, 1, 1000)),
        hidden_dim=number(raw, path, "intermediate_size"),
        vocab_size=number(raw, path, "vocab_size"),
        max_len=number(raw, path, "max_position_embeddings", 2048, (int, 1, 2**24)),
        norm_eps=number(raw, path, "rms_norm_eps", 1e-6, (float, 1e-30, 1)),
        rope_theta=theta, rope_scaling=llama3, qkv_bias=names == ["qwen2"],
        qk_norm=names == ["qwen3"])


def read_rope(raw, path):
    """RoPE's theta, and the four numbers of 'llama3' or None."""
    # transformers 5 writes rope_parameters; transformers 4 wrote rope_scaling and rope_theta. What
    # stands in several places must be the same there: readers differ in where they look.
    theta = raw.get("rope_theta")
    places = [raw[key] for key in ("rope_parameters", "rope_scaling") if raw.get(key)]
    said = []
    for place in places or [{}]:
        given = {key: value for key, value in place.items() if value is not None}
        said.append({"rope_theta": theta} | given)
    rope = said[0]
    if said[-1] != rope or theta not in (None, rope["rope_theta"]):
        raise UserError(f"{path}: rope_parameters, rope_scaling and rope_theta contradict each "
                        "other; delete what is wrong")
    llama3 = None
    if (rope.get("rope_type") or rope.get("type")) == "llama3":
        llama3 = {key: number(rope, path, key, bounds=REAL) for key in LLAMA3}
        if llama3["low_freq_factor"] >= llama3["high_freq_factor"]:
            raise UserError(f"{path}: low_freq_factor must be below high_freq_factor")
    return number(rope, path, "rope_theta", 10000.0, REAL), llama3


def weight_files(folder):
    """The paths of a checkpoint's safetensors: as in transformers one file comes before several."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file() or not index.exists():
        return [single]
    weight_map = read_object(index, kind={"weight_map": {str: str}})["weight_map"]
    names = sorted(set(weight_map.values()))
    if any(Path(name).name != name for name in names):      # one could lead out of the folder
        raise UserError(f"{index}: weight_map must hold the names of files")
    return [folder / name for name in names] or [single]


def opened(paths, device):
    """(path, open file) of each of some safetensors. UserError if one can't be read."""
    for path in paths:
        if not os.path.isfile(path):    # pathlib's would raise for a name that is too long
            raise UserError(f"{path.parent}: {path.name!r:.90} is missing; {remedy(path.parent)}")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                yield path, file
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} is damaged ({str(e)!r:.200}); {remedy(path.parent)}") from None


def read_weights(paths, shapes, device, dtype, tied=False):
    """The tensors of some safetensors, {name: tensor} on the device, as dtype. shapes {name: shape}
    is what they must be. tied: lm_head is the embedding. UserError: a tensor is missing,
    unexpected, there twice, of another shape or kind, or not finite."""
    tensors = {}
    for path, file in opened(paths, device):
        for name in file.keys():
            if name.endswith(".rotary_emb.inv_freq"):       # files of 2023; config.json tells it
                continue
            # A tied head lies under either name, or under both.
            key = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
            if key not in shapes:
                raise UserError(f"{path}: unexpected tensor {name!r:.90}; wrong config?")
            header = file.get_slice(name)
            shape = header.get_shape()
            kind = header.get_dtype()
            if shape != list(shapes[key]) or kind not in ("F16", "BF16", "F32", "F64"):
                raise UserError(f"{path}: {name} has shape {shape} and type {kind}; it must be "
                                f"{list(shapes[key])} by the config, and F16, BF16, F32 or F64")
            tensor = file.get_tensor(name).to(dtype)
            # Either end is NaN if any number is. Unlike isfinite() of them all it takes no memory.
            if not all(end.isfinite() for end in tensor.aminmax()):
                raise UserError(f"{path}: {name} holds NaN or infinity; {remedy(path.parent)}")
            other = tensors.setdefault(key, tensor)
            if other is not tensor and not torch.equal(other, tensor):
                raise UserError(f"{path}: {name} is there twice and differs (lm_head.weight is the "
                                "embedding where tie_word_embeddings is true in config.json)")
    missing = shapes.keys() - tensors.keys()
    if missing:
        raise UserError(f"{path}: tensor {min(missing)} is missing ({len(missing)} in all); "
                        f"{remedy(path.parent)}")
    return tensors


def write_folder(folder, names, config, tensors, tokenizer_from=None):
    """Write a config and tensors under these two names, and a copy of a tokenizer: whole or not at
    all, a power cut included. UserError if the folder exists."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; nothing was overwritten")
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    (draft / names[0]).write_text(json.dumps(config, indent=2))
    save_file(tensors, draft / names[1], {"format": "pt"})
    # safetensors lets nobody else read its files: they get the mode that texts have here.
    shutil.copymode(draft / names[0], draft / names[1])
    for name in TOKENIZER_FILES:
        if tokenizer_from and Path(tokenizer_from, name).is_file():
            shutil.copyfile(Path(tokenizer_from, name), draft / name)
    for path in (*draft.iterdir(), draft):
        sync(path)
    draft.rename(folder)
    sync(folder.parent)


def write_checkpoint(folder, config, tensors, tokenizer_from=None):
    """Write a checkpoint, as write_folder does. config: config.json as a dict."""
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    # As transformers 5 and 4 call it.
    config = config | {"dtype": dtype, "torch_dtype": dtype}
    write_folder(folder, ("config.json", "model.safetensors"), config, tensors, tokenizer_from)


def base_name(folder) -> str:
    """By which name others find the model in this folder: its hub id, or the path."""
    folder = Path(folder)
    # The hub's cache: models--owner--name/snapshots/commit.
    cache = folder.parent.parent.name if folder.parent.name == "snapshots" else ""
    return "/".join(cache.split("--")[1:]) or str(folder.absolute())


def read_adapter(name_or_path, weights, base):
    """A LoRA adapter in PEFT's layout, from a folder or hub id, for a model of these weights
    {name: W (out, in)} from the folder `base`: (rank, alpha, {layer: (A (r, in), B (out, r))}).
    UserError if it does not fit, or if it does what lora.py does not."""
    folder = fetch(name_or_path, ADAPTER_FILES)
    path = folder / ADAPTER_FILES[0]
    config = read_object(path)
    refuse_unknown(path, {"peft_type": "none"} | config, ADAPTER)
    trained_on = str(config.get("base_model_name_or_path") or "")
    own = base_name(base)
    if trained_on and Path(trained_on).name.lower() != Path(own).name.lower():
        print(f"note: {printable(path)} was trained on {printable(trained_on, 100)}, and this "
              f"model is {printable(own)}", file=sys.stderr)
    rank = number(config, path, "r")
    alpha = number(config, path, "lora_alpha", bounds=REAL)
    for key in ("target_modules", "exclude_modules"):
        # An expression that others wrote could run for ever.
        if not isinstance(config.get(key) or [], list):
            raise UserError(f"{path}: {key} = {config[key]!r:.80} is not implemented: write the "
                            "names of the layers out, as a list")
    # What the config names must be what is in the file, as PEFT drops the rest.
    layers, shapes = [], {}
    for name, W in weights.items():
        layer = name.removesuffix(".weight")
        if ".layers." in name and W.dim() == 2 and is_adapted(layer, config):
            layers.append(layer)
            shapes[PEFT_NAME.format(layer, "A")] = (rank, W.shape[1])
            shapes[PEFT_NAME.format(layer, "B")] = (W.shape[0], rank)
    tensors = read_weights([folder / ADAPTER_FILES[1]], shapes, "cpu", torch.float32)
    pairs = {}
    for layer in layers:
        pairs[layer] = [tensors[PEFT_NAME.format(layer, half)] for half in "AB"]
    # rsLoRA scales by alpha / sqrt(r) in place of alpha / r.
    return rank, alpha * rank**0.5 if config.get("use_rslora") else alpha, pairs


def is_adapted(layer, config):
    """Whether PEFT adapts the layer of this full name. A config has full names or ends of them."""
    def named(names):
        return any(f".{layer}".endswith(f".{name}") for name in names)

    targets = config.get("target_modules") or []
    numbers = config.get("layers_to_transform")
    numbers = numbers if isinstance(numbers, list) else [numbers]
    # A layer whose full name stands there is adapted whatever its number.
    chosen = numbers in ([], [None]) or int(layer.split(".")[2]) in numbers or layer in targets
    return chosen and named(targets) and not named(config.get("exclude_modules") or [])


def write_adapter(folder, rank, alpha, targets, pairs, base):
    """Write what `read_adapter` reads, for PEFT, too. UserError if the folder exists."""
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors[PEFT_NAME.format(name, "A")] = A.detach().clone()
        tensors[PEFT_NAME.format(name, "B")] = B.detach().clone()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha,
              "lora_dropout": 0.0, "bias": "none", "target_modules": list(targets),
              "base_model_name_or_path": base_name(base)}
    write_folder(folder, ADAPTER_FILES, config, tensors)
