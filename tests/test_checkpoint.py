"""A checkpoint is found, read and written. Whatever is in its folder: it can be used, or it is
refused in one line, and soon."""
import importlib
import json
import re
import shutil
import struct
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import model as program
from model import load_pretrained
from support import checkpoint
from support.checkpoint import fetch, read_config
from support.files import UserError, cli, read_json, replace_file
from support.tokenizer import Tokenizer
from tests.helpers import CASES, LLAMA3_ROPE
from tests.make_checkpoint import make_checkpoint

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------- errors

@pytest.mark.parametrize("error, line", [
    (UserError("that is wrong"), "error: that is wrong$"),
    (KeyboardInterrupt(), "error: interrupted; what a run has finished")])
def test_what_the_user_can_mend_is_one_line_and_a_bug_keeps_its_traceback(error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli(main)
    # Python prints a text that a program exits with on stderr, and returns 1.
    assert re.match(line, stopped.value.code)
    with pytest.raises(ZeroDivisionError):
        cli(lambda: 1 / 0)


def test_programs_print_no_traceback():
    command = [sys.executable, "model.py", "--model", "/nowhere"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == "error: /nowhere: no such folder (a hub id looks like owner/name)\n"


@pytest.mark.parametrize("name", ["model", "lora", "selfedit", "inner_loop"])
def test_every_small_program_refuses_a_folder_that_is_not_there(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--model", "/nowhere"])
    with pytest.raises(SystemExit) as stopped:
        cli(importlib.import_module(name).main)
    assert stopped.value.code.startswith("error: /nowhere: no such folder")


# ------------------------------------------------------------------------------- files

def test_json_files_are_read_or_refused_in_one_line(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(error.value) == f"{path} is missing"

    for content in (b"", b"{", b'{"a": 1}}', b'"\xff"'):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            read_json(path)
        assert str(error.value).startswith(f"{path}: not readable as JSON (")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="not readable as JSON"):
        read_json(tmp_path)     # a folder

    path.write_text('{"a": ["é", 1]}', encoding="utf-8")
    assert read_json(path) == {"a": ["é", 1]}


def test_a_file_is_replaced_whole_or_keeps_its_content(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, "first")
    replace_file(path, "second, é")
    assert path.read_text(encoding="utf-8") == "second, é"
    assert list(tmp_path.iterdir()) == [path]

    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "third \ud800")      # no such character: it can't be written
    assert path.read_text(encoding="utf-8") == "second, é"


# ------------------------------------------------------------------------------- the hub

def test_a_folder_is_taken_as_it_is_and_a_file_is_refused(tiny_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    for name in (tiny_folder, str(tiny_folder), f"~/{tiny_folder.name}"):
        assert fetch(name) == tiny_folder
    with pytest.raises(UserError, match="config.json is a file; a checkpoint is a folder of saf"):
        fetch(tiny_folder / "config.json")


@pytest.mark.parametrize("name", ["/nowhere", "nowhere", "a/b/c", "owner/na me", "~nobody/x",
                                  "../nowhere", "a\0b", pytest.param("x" * 5000, id="long")])
def test_what_is_no_folder_and_no_hub_id(name):
    with pytest.raises(UserError) as error:
        fetch(name)
    assert str(error.value) == f"{name}: no such folder (a hub id looks like owner/name)"


@pytest.mark.parametrize("problem, words", [
    (ConnectionError("no route\nto host"),
     "no such folder, and the hub can't be reached (ConnectionError: no route)"),
    (TimeoutError(), "no such folder, and the hub can't be reached (TimeoutError: )"),
    # Without __init__, which wants an answer of the hub.
    (GatedRepoError.__new__(GatedRepoError),
     "it is gated: accept its licence on its hub page, then run `hf auth login`"),
    (RepositoryNotFoundError.__new__(RepositoryNotFoundError),
     "no such folder, and no such model on the hub")])
def test_hub_errors_are_one_line(problem, words, monkeypatch):
    def download(name, allow_patterns):
        raise problem
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    with pytest.raises(UserError) as error:
        load_pretrained("owner/name")

    assert str(error.value) == f"owner/name: {words}"


def test_hub_download_asks_for_what_is_needed(monkeypatch, tiny_folder):
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tiny_folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    assert load_pretrained("owner/name", "cpu").folder == tiny_folder

    def wanted(file):
        return any(fnmatch(file, pattern) for pattern in asked["owner/name"])
    for file in ("config.json", "model.safetensors", "model-00001-of-00004.safetensors",
                 "model.safetensors.index.json", "tokenizer.json"):
        assert wanted(file)
    for file in ("original/consolidated.00.pth", "original/tokenizer.model", "pytorch_model.bin",
                 "onnx/model.onnx", "README.md"):
        assert not wanted(file)


# ------------------------------------------------------------------------------- used or refused

RANDOM = bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).tolist())
INDEX = "model.safetensors.index.json"
DELETED = "deleted"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small chat model, with every file that is read."""
    folder = make_checkpoint(tmp_path_factory.mktemp("sound") / "m", end="<|im_end|>")
    names = load_file(folder / "model.safetensors")
    write(folder / INDEX,
          {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")})
    write(folder / "generation_config.json", {"eos_token_id": [256, 258]})
    write(folder / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    return folder


@pytest.fixture()
def folder(sound, tmp_path):
    """A copy of it, for a test to damage."""
    return shutil.copytree(sound, tmp_path / "m")


def write(path, value):
    path.write_text(json.dumps(value))


def change_config(folder, changes):
    config = read_json(folder / "config.json") | changes
    write(folder / "config.json", {k: v for k, v in config.items() if v is not DELETED})


def refusals(folder):
    """The lines in which the folder is refused, as a model and as a tokenizer. Fails if it is
    neither refused nor of any use."""
    begin = time.monotonic()
    loaded, lines = [], []
    for load in (lambda: load_pretrained(folder, "cpu"), lambda: Tokenizer.from_pretrained(folder)):
        try:
            loaded.append(load())
        except UserError as e:
            assert "\n" not in str(e)
            assert len(str(e)) < 1000
            lines.append(str(e))
    if not lines:
        model, tok = loaded
        ids = tok.prompt("The town, 12\n")
        assert model(torch.tensor([ids])).isfinite().all()
        assert all(0 <= i < model.config.vocab_size for i in (*ids, *tok.stop))
    assert time.monotonic() - begin < 5
    return lines


# ------------------------------------------------------------------------------- JSON

JSON_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
              INDEX, "special_tokens_map.json"]
NO_JSON = [b"", b"{", b"\xff\xfe", b"\0" * 100, b'{"a": "\\ud800"}', b"[" * 100_000,
           b'{"vocab_size": ' + b"9" * 5000 + b"}"]
OTHER_JSON = [*[(content, "not readable as JSON") for content in NO_JSON], (b"{}", ""),
              *[(content, "not a JSON object")
                for content in (b"[]", b"null", b"true", b'"x"', b"12")]]
WRONG = [None, [], {}, "x", "12", "a\nb", -1, 0, 1.5, float("inf"), float("nan"), True, False,
         2**31, 10**30, [[]], ["x"], [-1], {"content": 1}]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content, problem", OTHER_JSON, ids=lambda value: repr(value[:12]))
def test_a_json_file_with_other_content(name, content, problem, folder):
    (folder / name).write_bytes(content)
    lines = refusals(folder)
    # Nothing is read from that one.
    assert lines or name == "special_tokens_map.json" or content == b"{}"
    assert all(line.startswith(str(folder)) and problem in line for line in lines)


@pytest.mark.parametrize("name", [*JSON_FILES, "tokenizer.model", "chat_template.jinja"])
def test_a_file_that_is_missing_or_a_folder(name, folder):
    (folder / name).unlink(missing_ok=True)
    assert all(name in line for line in refusals(folder))
    (folder / name).mkdir()
    refusals(folder)


def places(value, path=()):
    """The path of every value in a JSON document; of long lists and objects, of the first few."""
    keys = []
    if isinstance(value, dict):
        keys = list(value)[:40]
        if len(value) > 40:
            keys = keys[:2]
    if isinstance(value, list):
        keys = range(min(len(value), 1))
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def changed(document, path, value):
    """A copy of a JSON document with another value at a path."""
    document = json.loads(json.dumps(document))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if value is DELETED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return document


@pytest.mark.parametrize("name", JSON_FILES)
def test_every_value_of_another_kind(name, folder):
    """Hundreds of folders."""
    document = read_json(folder / name)
    for path in places(document):
        for value in (*WRONG, DELETED):
            write(folder / name, changed(document, path, value))
            refusals(folder)


LLAMA3 = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_every_value_of_rope_of_another_kind(where, folder):
    document = read_json(folder / "config.json") | {where: LLAMA3}
    write(folder / "config.json", document)
    assert refusals(folder) == []

    for key in LLAMA3:
        for value in (*WRONG, DELETED):
            write(folder / "config.json", changed(document, (where, key), value))
            refusals(folder)


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+b", "(", r"\p{Nonsense}", "", 1, None])
def test_an_expression_of_the_folder_is_never_run(pattern, folder):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False}
    words = {"type": "ByteLevel", "use_regex": False}
    document = read_json(folder / "tokenizer.json")
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, words]}
    write(folder / "tokenizer.json", document)

    (line,) = refusals(folder)

    assert "or its expression is not" in line


@pytest.mark.parametrize("content", [
    b"", b"\n\n", b"YQ== 0\nYg== 0\n", b"YQ== 0\nYg== 1\n", b"YQ== -1\n", b"YQ== x\n", b"YQ==\n",
    b"YQ== 1 2\n", b"YQ== " + b"9" * 5000, b"YQ== 99999999999\n", b"\xff\xfe\x00", RANDOM])
def test_rank_files(content, folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    write(folder / "tokenizer_config.json", {})
    lines = refusals(folder)
    assert lines == [] if content == b"YQ== 0\nYg== 1\n" else "tokenizer.model: no" in lines[0]


# ------------------------------------------------------------------------------- config.json

LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize("changes, words", [
    ({"architectures": ["MambaForCausalLM"]}, "'Mamba"), ({"architectures": None}, r"'\?' "),
    *[({"architectures": names}, "") for names in ("MambaForCausalLM", [], {}, [[]], [1], "a\nb")],
    ({"hidden_act": "gelu"}, "'gelu'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "RoPE type 'yarn'"),
    ({"rope_parameters": None, "rope_scaling": LINEAR}, "RoPE type 'linear'"),
    *[({"rope_parameters": None, "rope_scaling": rope}, "RoPE type ")
      for rope in ([8.0], "yarn", 8.0, True)],
    ({"use_sliding_window": True}, "sliding-window attention"),
    ({"attention_bias": True}, "attention/mlp_bias"), ({"mlp_bias": True}, "attention/mlp_bias"),
    ({"quantization_config": {"bits": 4}}, "quantised weights")])
def test_what_is_not_implemented_is_one_line(changes, words, folder):
    change_config(folder, changes)
    assert re.search("unsupported architecture: " + words, refusals(folder)[0])


@pytest.mark.parametrize("changes, words", [
    *[({key: DELETED}, f"'{key}' is missing")
      for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                  "vocab_size")],
    ({"num_hidden_layers": "12"},
     "num_hidden_layers must be a whole number from 1 to 1000, not '12'"),
    ({"num_hidden_layers": 10**7},
     "num_hidden_layers must be a whole number from 1 to 1000, not 10000000"),
    ({"vocab_size": True}, "vocab_size must be a whole number from 1 to 16777216, not True"),
    ({"hidden_size": 2.0}, "hidden_size must be a whole number from 1 to 1048576, not 2.0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads must be a whole number from 1 to 65536"),
    ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"hidden_size": 1, "head_dim": None}, "head_dim must be a whole number from 2 to 65536"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a number from 1e-30 to 1, not 0"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number from 1e-30 to 1, not nan"),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a number from 1e-30 to 1e.30, n"),
    ({"rope_theta": -1.0, "rope_parameters": {}}, "rope_theta must be a number from 1e-30"),
    ({"rope_theta": "1e4", "rope_parameters": {}}, "rope_theta must be a number from 1e-30"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
    ({"rope_parameters": LLAMA3_ROPE | {"factor": None}}, "'factor' is missing"),
    ({"rope_parameters": LLAMA3_ROPE | {"factor": "8"}}, "factor must be a number from"),
    ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}},
     "low_freq_factor must be below high_freq_factor")])
def test_a_field_that_is_missing_or_of_another_kind_is_one_line(changes, words, folder):
    change_config(folder, changes)
    assert re.search("config.json: " + words, refusals(folder)[0])


@pytest.mark.parametrize("changes, words", [
    ({"num_hidden_layers": 1}, "unexpected tensor .model.layers.1"),
    ({"num_hidden_layers": 3}, "tensor model.layers.2.* is missing"),
    ({"intermediate_size": 128}, "has shape")])
def test_weights_that_do_not_fit_are_one_line(changes, words, folder):
    change_config(folder, changes)
    assert re.search(words, refusals(folder)[0])


def test_layers_are_counted_before_a_model_is_built(folder, monkeypatch):
    change_config(folder, {"num_hidden_layers": 1000})
    monkeypatch.setattr(program, "Transformer", None)
    (line,) = refusals(folder)
    assert "tensor model.layers.2.* is missing: num_hidden_layers is 1000" in line


OPTIONAL = ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
            "max_position_embeddings", "tie_word_embeddings"]
SCALING = {key: value for key, value in LLAMA3_ROPE.items() if key.endswith(("factor", "dings"))}


@pytest.mark.parametrize("changes, meaning", [
    # As many keys as heads, of 48 / 4 numbers each.
    (dict.fromkeys(OPTIONAL, DELETED), dict(n_kv_head=4, head_dim=12, norm_eps=1e-6, tied=False,
                                            rope_theta=10000.0, max_len=2048)),
    (dict.fromkeys(["num_key_value_heads", "head_dim", "rope_scaling"]),
     dict(n_kv_head=4, head_dim=12, rope_scaling=None)),
    # RoPE as transformers 5 and 4 write it.
    ({"rope_parameters": LLAMA3_ROPE, "rope_theta": DELETED},
     dict(rope_theta=500000.0, rope_scaling=SCALING)),
    ({"rope_scaling": SCALING | {"rope_type": "llama3"}, "rope_theta": 500000.0},
     dict(rope_theta=500000.0, rope_scaling=SCALING)),
    # What sets the architectures apart.
    ({"architectures": ["LlamaForCausalLM"]}, dict(qkv_bias=False, qk_norm=False)),
    ({"architectures": ["Qwen2ForCausalLM"]}, dict(qkv_bias=True, qk_norm=False)),
    ({"architectures": ["Qwen3ForCausalLM"]}, dict(qkv_bias=False, qk_norm=True))])
def test_what_a_config_means(changes, meaning, folder):
    change_config(folder, changes)
    assert meaning.items() <= read_config(folder).items()


# ------------------------------------------------------------------------------- weights

def replaced(pattern, name):
    """Remove files; in their place comes one that is no safetensors."""
    def damage(folder):
        for path in folder.glob(pattern):
            path.unlink()
        (folder / name).write_bytes(b"PK")
    return damage


def shard_of(folder):
    (shard,) = folder.glob("model-00002*")
    return shard


@pytest.mark.parametrize("damage, words", [
    (shutil.rmtree, "no such folder"),
    (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
    (lambda folder: shard_of(folder).unlink(),
     "model-00002.* is missing; download the checkpoint again"),
    (lambda folder: shard_of(folder).write_bytes(b"\x10" * 100), "model-00002.* is damaged"),
    # A pickle is not even looked for.
    (replaced("model*", "pytorch_model.bin"),
     "model.safetensors is missing; .* no help: weights are read from safetensors only"),
    (replaced("*", "model.gguf"),
     "config.json is missing; 'model.gguf' is no help: weights are read from safetensors only")
], ids=["no folder", "no config", "no shard", "damaged shard", "pickle", "gguf"])
def test_a_folder_that_is_not_whole_says_what_to_do(damage, words, tmp_path):
    """Transformers writes the weights in several shards."""
    CASES["llama-mha"]().save_pretrained(tmp_path / "m", max_shard_size="120KB")
    load_pretrained(tmp_path / "m", "cpu")
    damage(tmp_path / "m")
    assert re.search(words, refusals(tmp_path / "m")[0])


def cut(part):
    """Keep a part of the file: a share of its bytes, or all but some of the last."""
    def damage(path):
        data = path.read_bytes()
        path.write_bytes(data[:int(part * len(data))] if part < 1 else data[:-part])
    return damage


def content(data):
    return lambda path: path.write_bytes(data)


def added(data):
    return lambda path: path.write_bytes(path.read_bytes() + data)


def header(text, data=b"\0" * 64):
    return content(struct.pack("<Q", len(text)) + text + data)


def first_tensor(change):
    """Write the file again, its first tensor changed."""
    def damage(path):
        tensors = load_file(path)
        name = min(tensors)
        tensors[name] = change(tensors[name])
        save_file(tensors, path, {"format": "pt"})
    return damage


def with_value(value, dtype):
    return first_tensor(lambda t: t.to(dtype).index_fill(0, torch.tensor([5]), value))


def renamed(old, new):
    def damage(path):
        tensors = {name.replace(old, new): t for name, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return damage


def folder_instead(path):
    path.unlink()
    path.mkdir()


def link_to_nowhere(path):
    path.unlink()
    path.symlink_to("nowhere")


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
ENTRY = '{"model.layers.0.x": {"dtype": "%s", "shape": %s, "data_offsets": %s}}'
DAMAGED = {
    **{f"cut to {part}": cut(part) for part in (0.001, 0.01, 0.5, 0.99)},
    **{f"cut by {part}": cut(part) for part in (1, 7, 4096)},
    "empty": content(b""), "short": content(b"\x01" * 5), "zeros": content(b"\0" * 1000),
    "random": content(RANDOM), "pickle": content(b"PK\x03\x04" + RANDOM),
    "oversized": added(b"\0"), "doubled": added(RANDOM),
    "huge header": content(b"\xff" * 8 + RANDOM), "no header": header(b""),
    "header of another kind": header(b"[]"), "header with a null": header(b'{"a": null}'),
    "header of text": header(b"x" * 50), "header of brackets": header(b"[" * 50_000),
    "unknown type": header((ENTRY % ("X\\n9", "[2]", "[0, 8]")).encode()),
    "negative shape": header((ENTRY % ("F32", "[-2]", "[0, 8]")).encode()),
    "huge shape": header((ENTRY % ("F32", "[9999999999999999999]", "[0, 64]")).encode()),
    "beyond the end": header((ENTRY % ("F32", "[2000]", "[0, 8000]")).encode())}
OTHER_SHAPE_OR_TYPE = {
    **{f"{dtype}": first_tensor(lambda t, dtype=dtype: t.to(dtype))
       for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64,
                     torch.float8_e4m3fn, torch.float8_e5m2)},
    "another shape": first_tensor(lambda t: t[1:].clone()),
    "a scalar": first_tensor(lambda t: t.sum()),
    "no numbers": first_tensor(lambda t: t[:0].clone())}
NOT_FINITE = {"too large for float32": with_value(1e300, torch.float64)}
for number in ("nan", "inf", "-inf"):
    for dtype in FLOATS:
        NOT_FINITE[f"{number} {dtype}"] = with_value(float(number), dtype)
OTHER_LAYERS = {
    "three layers": renamed("layers.1.mlp", "layers.2.mlp"),
    "far layer": renamed("layers.1.", "layers.%s." % ("9" * 5000))}
TOO_FEW_LAYERS = {
    "other names": renamed("model.", "a\nb."), "one layer": renamed("layers.1.", "layers.0.x."),
    "six bits": header((ENTRY % ("F6_E2M3", "[64]", "[0, 48]")).encode(), b"\0" * 48)}
MISSING = {"a folder": folder_instead, "a broken link": link_to_nowhere, "missing": Path.unlink}
REFUSED = []
for words, kind in [
        ("/model.safetensors is damaged .*; download the checkpoint again", DAMAGED),
        ("/model.safetensors: model.embed_tokens.weight has .*it must be .* F16, BF16, F32 or F64",
         OTHER_SHAPE_OR_TYPE),
        ("/model.safetensors: model.embed_tokens.weight holds NaN or infinity", NOT_FINITE),
        ("/model.safetensors: unexpected tensor 'model.layers.[29]", OTHER_LAYERS),
        (": tensor model.layers.[01].* is missing: num_hidden_layers is 2", TOO_FEW_LAYERS),
        ("/model.safetensors is missing; download the checkpoint again", MISSING)]:
    REFUSED += [pytest.param(damage, words, id=name) for name, damage in kind.items()]


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("damage, words", REFUSED)
def test_damaged_weights(damage, words, with_index, folder):
    if not with_index:
        (folder / INDEX).unlink()
    damage(folder / "model.safetensors")
    (line,) = refusals(folder)      # the model's; the tokenizer is sound
    assert re.match(f"{folder}{words}", line)


@pytest.mark.parametrize("dtype", FLOATS)
def test_floating_point_weights_are_read(dtype, folder):
    """float32 is what the folder has: all that is damaged here was sound."""
    first_tensor(lambda t: t.to(dtype))(folder / "model.safetensors")
    assert refusals(folder) == []


@pytest.mark.parametrize("file", [
    "../other.safetensors", "/etc/passwd", "/tmp/a.safetensors", "a/b.safetensors", "a.bin", "..",
    "", "a\0.safetensors", "x" * 5000 + ".safetensors", 1, None, []])
def test_an_index_that_leads_elsewhere(file, folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    names = read_json(folder / INDEX)["weight_map"]
    write(folder / INDEX, {"weight_map": dict.fromkeys(names, file)})
    (line,) = refusals(folder)
    assert re.search("index.json: .* is no name of a safetensors file", line)


@pytest.mark.parametrize("file, damage", [
    ("config.json", content(b"")), ("model.safetensors", cut(0.5)),
    ("model.safetensors", Path.unlink)], ids=["config", "half the weights", "no weights"])
def test_a_run_s_own_checkpoint_is_made_again(file, damage, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "iter_2")
    damage(folder / file)
    assert "; download the checkpoint again" in refusals(folder)[0]     # no sign of a run
    (tmp_path / "rollouts.jsonl").touch()
    assert refusals(folder)[0].endswith(f"; delete {folder} and repeat the command")


# ------------------------------------------------------------------------------- writing

def test_a_checkpoint_is_written_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    """Also after a first try that left half a checkpoint behind, or a file in place of a draft."""
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    out = tmp_path / "runs" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError):
            tiny.save_pretrained(out)
    assert not out.exists()

    tiny.save_pretrained(out)
    (tmp_path / "runs" / "next.tmp").write_text("x")
    tiny.save_pretrained(tmp_path / "runs" / "next")

    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"out", "next"}
    ids = torch.randint(0, 256, (1, 20))
    for folder in (tmp_path / "runs").iterdir():
        assert torch.equal(load_pretrained(folder, "cpu")(ids), tiny(ids))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tiny, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append((path, out.exists())))
    out = tmp_path / "iter_1"

    tiny.save_pretrained(out)

    draft = tmp_path / "iter_1.tmp"
    before = {path for path, named in synced if not named}
    assert before == {draft, *(draft / path.name for path in out.iterdir())}
    assert synced[-2:] == [(draft, False), (tmp_path, True)]


def test_a_folder_in_place_of_a_tokenizer_s_file_is_not_copied(tiny_folder, tmp_path):
    source = shutil.copytree(tiny_folder, tmp_path / "m")
    (source / "special_tokens_map.json").mkdir()
    load_pretrained(source, "cpu").save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()
