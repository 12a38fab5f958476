"""Whatever is in a checkpoint's folder: it can be used, or it is refused in one line, and soon.

The folders are made from a sound one: every file holds something else, every key of every JSON file
has a value of another kind, and the weights are damaged in all the ways there are."""
import json
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import load_pretrained
from support.files import UserError
from support.tokenizer import Tokenizer
from tests.make_checkpoint import make_checkpoint

# ------------------------------------------------------------------------------- the property

@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small chat model, with every file that is read."""
    folder = make_checkpoint(tmp_path_factory.mktemp("sound") / "m", end="<|im_end|>")
    names = load_file(folder / "model.safetensors")
    write(folder / "model.safetensors.index.json",
          {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model.safetensors")})
    write(folder / "generation_config.json", {"eos_token_id": [256, 258]})
    write(folder / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    return folder


@pytest.fixture()
def folder(sound, tmp_path):
    """A copy of it, for a test to damage."""
    shutil.copytree(sound, tmp_path / "m")
    return tmp_path / "m"


def write(path, value):
    path.write_text(json.dumps(value))


def refusals(folder):
    """The lines in which the folder is refused. Fails if it is neither refused nor of any use."""
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


def test_the_folder_that_is_damaged_below_is_sound(folder):
    assert refusals(folder) == []


# ------------------------------------------------------------------------------- JSON

JSON_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
              "model.safetensors.index.json", "special_tokens_map.json"]
CONTENTS = [b"", b"{", b"{}", b"[]", b"null", b"true", b'"x"', b"12", b"\xff\xfe", b"\0" * 100,
            b'{"a": "\\ud800"}', b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}"]
WRONG = [None, [], {}, "x", "12", "a\nb", -1, 0, 1.5, float("inf"), float("nan"), True, False,
         2**31, 10**30, [[]], ["x"], [-1], {"content": 1}]
DELETED = "deleted"


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content[:12]))
def test_a_json_file_with_other_content(name, content, folder):
    (folder / name).write_bytes(content)

    lines = refusals(folder)

    # Nothing is read from that one.
    assert bool(lines) or name == "special_tokens_map.json" or content == b"{}"
    assert all(str(folder) in line for line in lines)


@pytest.mark.parametrize("name", [*JSON_FILES, "tokenizer.model", "chat_template.jinja"])
def test_a_folder_in_place_of_a_file(name, folder):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()

    refusals(folder)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_json_file_is_missing(name, folder):
    (folder / name).unlink()

    assert all(name in line for line in refusals(folder))


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
    document = json.loads((folder / name).read_text())

    for path in places(document):
        for value in (*WRONG, DELETED):
            write(folder / name, changed(document, path, value))
            refusals(folder)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_every_value_of_rope_of_another_kind(where, folder):
    document = json.loads((folder / "config.json").read_text()) | {where: LLAMA3}
    write(folder / "config.json", document)
    assert refusals(folder) == []

    for key in LLAMA3:
        for value in (*WRONG, DELETED):
            write(folder / "config.json", changed(document, (where, key), value))
            refusals(folder)


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
WORDS = {"type": "ByteLevel", "use_regex": False}


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|aa)+b", "(", r"\p{Nonsense}", "", 1, None])
def test_an_expression_of_the_folder_is_never_run(pattern, folder):
    document = json.loads((folder / "tokenizer.json").read_text())
    split = SPLIT | {"pattern": {"Regex": pattern}}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, WORDS]}
    write(folder / "tokenizer.json", document)

    (line,) = refusals(folder)

    assert "or its expression is not" in line


# ------------------------------------------------------------------------------- weights

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


def with_value(value, dtype=torch.float32):
    def change(tensor):
        tensor = tensor.to(dtype)
        tensor[0] = value
        return tensor
    return first_tensor(change)


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


RANDOM = bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).tolist())
ENTRY = '{"model.layers.0.x": {"dtype": "%s", "shape": %s, "data_offsets": %s}}'
DAMAGE = {
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
    "beyond the end": header((ENTRY % ("F32", "[2000]", "[0, 8000]")).encode()),
    "six bits": header((ENTRY % ("F6_E2M3", "[64]", "[0, 48]")).encode(), b"\0" * 48),
    **{f"{dtype}".removeprefix("torch."): first_tensor(lambda t, dtype=dtype: t.to(dtype))
       for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64,
                     torch.float8_e4m3fn, torch.float8_e5m2)},
    "nan": with_value(float("nan")), "inf": with_value(float("inf")),
    "-inf": with_value(float("-inf")), "bfloat16 nan": with_value(float("nan"), torch.bfloat16),
    "half inf": with_value(float("inf"), torch.float16),
    "too large for float32": with_value(1e300, torch.float64),
    "another shape": first_tensor(lambda t: t[1:].clone()),
    "a scalar": first_tensor(lambda t: t.sum()),
    "no numbers": first_tensor(lambda t: t[:0].clone()),
    "other names": renamed("model.", "a\nb."), "one layer": renamed("layers.1.", "layers.0.x."),
    "three layers": renamed("layers.1.mlp", "layers.2.mlp"),
    "far layer": renamed("layers.1.", "layers.%s." % ("9" * 5000)),
    "a folder": folder_instead, "a broken link": link_to_nowhere,
    "missing": lambda path: path.unlink()}


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_weights(damage, with_index, folder):
    if not with_index:
        (folder / "model.safetensors.index.json").unlink()
    damage(folder / "model.safetensors")

    (line,) = refusals(folder)      # the model's; the tokenizer is sound

    assert str(folder) in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_weights_are_read(dtype, folder):
    first_tensor(lambda t: t.to(dtype))(folder / "model.safetensors")

    assert refusals(folder) == []


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "..",
                                  "", "a\0.safetensors", "x" * 5000 + ".safetensors", 1, None, []])
def test_an_index_that_leads_elsewhere(file, folder):
    shutil.copy(folder / "model.safetensors", folder.parent / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    write(index, {"weight_map": dict.fromkeys(names, file)})

    (line,) = refusals(folder)

    assert "is no name of a safetensors file" in line


# ------------------------------------------------------------------------------- rank files

@pytest.mark.parametrize("content", [
    b"", b"\n\n", b"YQ== 0\nYg== 0\n", b"YQ== 0\nYg== 1\n", b"YQ== -1\n", b"YQ== x\n", b"YQ==\n",
    b"YQ== 1 2\n", b"YQ== " + b"9" * 5000, b"YQ== 99999999999\n", b"\xff\xfe\x00", RANDOM])
def test_rank_files(content, folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(content)
    write(folder / "tokenizer_config.json", {})

    lines = refusals(folder)

    assert lines == [] if content == b"YQ== 0\nYg== 1\n" else "tokenizer.model: no" in lines[0]
