"""A checkpoint is found, read and written. Whatever is in its folder: it can be used, or it is
refused in one line, and soon."""
import json
import re
import runpy
import shutil
import struct
import sys
import time
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from model import load_pretrained
from support import checkpoint
from support.checkpoint import FAMILIES, fetch, read_config
from support.files import UserError, cli, read_json, replace_file
from support.tokenizer import Tokenizer
from tests.features import CONFIG_DONE, CONFIG_REFUSED, pairs_of
from tests.helpers import CASES, DELETED, LLAMA3_ROPE, ROOT, WRONG, changed, model_of, places
from tests.make_checkpoint import make_checkpoint


@pytest.mark.parametrize("error, kind, line", [
    (UserError("that is wrong"), SystemExit, "^error: that is wrong$"),
    (KeyboardInterrupt(), SystemExit, "^error: interrupted$"),
    (ZeroDivisionError(), ZeroDivisionError, "^$")])
def test_what_the_user_can_mend_is_one_line_and_a_bug_keeps_its_traceback(error, kind, line,
                                                                          monkeypatch):
    monkeypatch.setattr("support.files.HELD", {})       # as if no other test had a run
    with pytest.raises(kind, match=line):
        cli(Mock(side_effect=error))


@pytest.mark.parametrize("name", ["model", "lora", "selfedit", "inner_loop"])
def test_every_small_program_refuses_a_folder_that_is_not_there(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--model", "/nowhere"])
    with pytest.raises(SystemExit, match="^error: /nowhere: no such folder .*$"):
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


def test_a_json_file_is_read_as_written_and_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="a.json is missing$"):
        read_json(path)
    replace_file(path, '{"a": ["é", 1]}')
    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "3 \ud800")      # no such character: it can't be written
    assert read_json(path) == {"a": ["é", 1]}


def test_a_folder_is_taken_as_it_is_and_a_file_is_refused(tiny_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    for name in (tiny_folder, str(tiny_folder), f"~/{tiny_folder.name}"):
        assert fetch(name) == tiny_folder
    with pytest.raises(UserError, match="config.json is a file"):
        fetch(tiny_folder / "config.json")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "owner/na me", "~nobody/x", "../nowhere",
                                  "a\0b", pytest.param("x" * 5000, id="long")])
def test_what_is_no_folder_and_no_hub_id(name):
    with pytest.raises(UserError, match=f"^{name}: no such folder .a hub id looks like"):
        fetch(name)


@pytest.mark.parametrize("problem, words", [
    (ConnectionError("no route\nto host"), "the hub can't be reached .ConnectionError..no route"),
    (GatedRepoError.__new__(GatedRepoError), "accept its licence"),
    (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "no such model on the hub")])
def test_hub_errors_are_one_line(problem, words, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=problem))
    with pytest.raises(UserError, match=f"^owner/name: .*{words}.*$"):
        load_pretrained("owner/name")


def test_hub_download_asks_for_what_is_needed(monkeypatch, tiny_folder):
    download = Mock(return_value=str(tiny_folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_pretrained("owner/name", "cpu").folder == tiny_folder
    needed = ["config.json", "adapter_config.json", "model.safetensors",
              "model-00001-of-00004.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    others = ["original/consolidated.00.pth", "original/tokenizer.model", "pytorch_model.bin",
              "onnx/model.onnx", "README.md"]
    patterns = download.call_args.kwargs["allow_patterns"]
    for file in needed + others:
        assert any(fnmatch(file, pattern) for pattern in patterns) == (file in needed)


# ------------------------------------------------------------------------------- used or refused

RANDOM = bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0)).tolist())
INDEX = "model.safetensors.index.json"
WEIGHTS = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small chat model, with every file that is read."""
    folder = make_checkpoint(tmp_path_factory.mktemp("sound") / "m", end="<|im_end|>")
    names = load_file(folder / "model.safetensors")
    write(folder / INDEX,
          {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, WEIGHTS)})
    (folder / "model.safetensors").rename(folder / WEIGHTS)
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
    """The lines in which the folder is refused, as a model and as a tokenizer."""
    begin = time.monotonic()
    loaded, lines = [], []
    for load in (lambda: load_pretrained(folder, "cpu"), lambda: Tokenizer.from_pretrained(folder)):
        try:
            loaded.append(load())
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 1000
            lines.append(str(e))
    if not lines:
        model, tok = loaded
        ids = tok.prompt("The town, 12\n")
        assert model(torch.tensor([ids])).isfinite().all()
        assert all(0 <= i < model.config.vocab_size for i in (*ids, *tok.stop))
    assert time.monotonic() - begin < 5
    return lines


OTHER_FILES = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", INDEX,
               "special_tokens_map.json"]
JSON_FILES = ["config.json", *OTHER_FILES]
OTHER_JSON = {
    "not readable as ": [b"", b"{", b"\xff\xfe", b'{"a": "\\ud800"}', b"[" * 100_000,
                         b'{"vocab_size": ' + b"9" * 5000 + b"}"],
    "it must be an object": [b"[]", b"null", b"12"], "": [b"{}"]}


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("problem, content", pairs_of(OTHER_JSON), ids=lambda x: repr(x[:12]))
def test_a_json_file_with_other_content(name, content, problem, folder):
    (folder / name).write_bytes(content)
    lines = refusals(folder)
    assert lines or content == b"{}"
    assert all(line.startswith(str(folder)) and problem in line for line in lines)


@pytest.mark.parametrize("name", [*JSON_FILES, "chat_template.jinja"])
def test_a_file_that_is_missing_or_a_folder(name, folder):
    (folder / name).unlink(missing_ok=True)
    assert all(name.removesuffix(".index.json") in line for line in refusals(folder))
    (folder / name).mkdir()
    refusals(folder)


LLAMA3 = LLAMA3_ROPE | {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 11])
@pytest.mark.parametrize("name, more", [
    ("config.json", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    ("config.json", {"rope_parameters": LLAMA3, "rope_theta": 500000.0}),
    *[(name, {}) for name in OTHER_FILES]])
def test_any_value_of_another_kind(name, more, every, folder):
    """Hundreds of folders. One in eleven has each place in the file, and each value."""
    document = read_json(folder / name) | more
    write(folder / name, document)
    assert refusals(folder) == []
    for path, value in list(product(places(document), WRONG))[::every]:
        write(folder / name, changed(document, path, value))
        refusals(folder)




# ------------------------------------------------------------------------------- config.json

BAD_CONFIGS = [
    *[({"architectures": names}, "unsupported architecture: model_type and architectures")
      for names in (["MambaForCausalLM"], ["a\nb"])],
    ({"architectures": None, "model_type": None}, r"architectures say \[\]"),
    ({"rope_scaling": "yarn"}, ".*'rope_scaling' must be an object"),
    *[({"rope_scaling": LLAMA3} | other, "contradict")
      for other in ({"rope_theta": 1e4}, {"rope_parameters": LLAMA3 | {"factor": 2.0}})],
    *[({key: DELETED}, f"'{key}' is missing")
      for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                  "vocab_size")],
    *[({"num_hidden_layers": value}, "num_hidden_layers must be a whole number from 1 to 1000")
      for value in ("12", 10**7, True, 2.0, 0)],
    ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
    ({"head_dim": 7}, ".*head_dim must be even"),
    ({"hidden_size": 1, "head_dim": None}, "head_dim must be a whole number from 1"),
    *[({"rms_norm_eps": number}, "rms_norm_eps must be a number") for number in (0, float("nan"))],
    ({"rope_theta": "1e4", "rope_parameters": {}}, "rope_theta must be a number"),
    ({"tie_word_embeddings": "no"}, "not readable .*tie_word_embeddings' must be true or false"),
    *[({"rope_theta": None, "rope_parameters": LLAMA3_ROPE | changes}, words)
      for changes, words in [({"factor": None}, "'factor' is missing"),
                             ({"factor": "8"}, "factor must be a number"),
                             ({"low_freq_factor": 4.0}, "must be below high_freq_")]]]


@pytest.mark.parametrize("changes, words", [
    *[(changes, f"/config.json: .*{words}") for changes, words in BAD_CONFIGS],
    ({"num_hidden_layers": 1}, "unexpected tensor .model.layers.1"),
    ({"num_hidden_layers": 3}, "tensor model.layers.2.* is missing .9 in all"),
    ({"intermediate_size": 128}, "has shape")])
def test_a_config_that_can_not_be_used(changes, words, folder):
    change_config(folder, changes)
    assert re.match(f"{folder}.*{words}", refusals(folder)[0])


OPTIONAL = ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
            "max_position_embeddings", "tie_word_embeddings"]
SCALING = {key: value for key, value in LLAMA3_ROPE.items() if key.endswith(("factor", "dings"))}


@pytest.mark.parametrize("changes, meaning", [
    # As many keys as heads, of 48 / 4 numbers each.
    (dict.fromkeys(OPTIONAL, DELETED), dict(n_kv_head=4, head_dim=12, norm_eps=1e-6, tied=False,
                                            rope_theta=10000.0, max_len=2048)),
    (dict.fromkeys(["num_key_value_heads", "head_dim", "rope_scaling"]),
     dict(n_kv_head=4, head_dim=12, rope_scaling=None)),
    # RoPE in both places, as files that serve transformers 4 and 5 have it.
    ({"rope_scaling": SCALING | {"rope_type": "llama3"}, "rope_parameters": LLAMA3_ROPE,
      "rope_theta": 500000.0}, dict(rope_theta=500000.0, rope_scaling=SCALING)),
    ({"architectures": ["Qwen3ForCausalLM"], "model_type": DELETED},
     dict(qkv_bias=False, qk_norm=True))])
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


@pytest.mark.parametrize("damage, words", [
    (lambda folder: next(folder.glob("model-00002*")).unlink(),
     "'model-00002.*' is missing; download the checkpoint again"),
    (replaced("model*", "pytorch_model.bin"),
     "'model.safetensors' is missing; download .*safetensors only"),
    (replaced("*", "model.gguf"), "config.json is missing; download .*safetensors only")
], ids=["no shard", "pickle", "gguf"])
def test_a_folder_that_is_not_whole_says_what_to_do(damage, words, tmp_path):
    CASES["llama-mha"]().save_pretrained(tmp_path / "m", max_shard_size="120KB")
    load_pretrained(tmp_path / "m", "cpu")
    damage(tmp_path / "m")
    assert re.search(words, refusals(tmp_path / "m")[0])


def bytes_as(change):
    """A damage, as those below: the file's bytes, changed."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def tensors_as(change):
    return lambda path: save_file(change(load_file(path)), path, {"format": "pt"})


def first_as(change):
    def damage(tensors):
        name = min(tensors)
        return tensors | {name: change(tensors[name])}
    return tensors_as(damage)


def renamed(old, new):
    return tensors_as(lambda all: {name.replace(old, new): t for name, t in all.items()})


def header(text):
    return bytes_as(lambda data: struct.pack("<Q", len(text)) + text + b"\0" * 64)


DAMAGED = {
    "half": bytes_as(lambda data: data[:len(data) // 2]), "empty": bytes_as(lambda data: b""),
    "pickle": bytes_as(lambda data: b"PK\x03\x04" + RANDOM), "brackets": header(b"[" * 50_000),
    "unknown": header(b'{"model.x": {"dtype": "X\\n9", "shape": [2], "data_offsets": [0, 8]}}'),
    "beyond": header(b'{"model.x": {"dtype": "F32", "shape": [20], "data_offsets": [0, 80]}}')}
OTHER_SHAPE_OR_TYPE = {
    **{f"{dtype}": first_as(lambda t, dtype=dtype: t.to(dtype))
       for dtype in (torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)},
    "another shape": first_as(lambda t: t[1:].clone()), "a scalar": first_as(lambda t: t.sum()),
    "no numbers": first_as(lambda t: t[:0].clone())}
NOT_FINITE = {
    f"{value} {dtype}": first_as(
        lambda t, value=value, dtype=dtype: t.to(dtype).index_fill(0, torch.tensor([5]), value))
    for value, dtype in [(torch.nan, torch.float16), (torch.inf, torch.bfloat16),
                         (-torch.inf, torch.float32), (torch.nan, torch.float64),
                         (1e300, torch.float64)]}     # the last is too large for float32
OTHER_NAMES = {
    "three layers": renamed("layers.1.mlp", "layers.2.mlp"),
    "far layer": renamed("layers.1.", "layers.%s." % ("9" * 5000)),
    "other names": renamed("model.", "a\nb."), "wrapped": renamed("model.", "module.model."),
    "one layer": renamed("layers.1.", "layers.0.x."), "bare": renamed("model.", ""),
    "quantised": renamed("q_proj.weight", "q_proj.qweight"),
    "a bias": renamed("model.norm.weight", "model.norm.bias")}
REFUSED = []
for words, kind in [
        (f"/{WEIGHTS} is damaged .*; download the checkpoint again", DAMAGED),
        (f"/{WEIGHTS}: model.embed_tokens.weight has .*it must be .* F16, BF16, F32 or F64",
         OTHER_SHAPE_OR_TYPE),
        (f"/{WEIGHTS}: model.embed_tokens.weight holds NaN or infinity", NOT_FINITE),
        (f"/{WEIGHTS}: unexpected tensor '(model|a..b|module|embed_tokens)", OTHER_NAMES),
        (f": '{WEIGHTS}' is missing; download the checkpoint again", {"no file": Path.unlink})]:
    REFUSED += [pytest.param(damage, words, id=name) for name, damage in kind.items()]


@pytest.mark.parametrize("damage, words", REFUSED)
def test_damaged_weights(damage, words, folder):
    damage(folder / WEIGHTS)
    (line,) = refusals(folder)      # the model's; the tokenizer is sound
    assert re.match(f"{folder}{words}", line)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_point_weights_are_read(dtype, folder):
    first_as(lambda t: t.to(dtype))(folder / WEIGHTS)
    assert refusals(folder) == []


@pytest.mark.parametrize("file", [
    "../other.safetensors", "/etc/passwd", "a/b.safetensors", "a.bin", "", "a\0.safetensors",
    "x" * 5000 + ".safetensors", None, []], ids=range(9))
def test_an_index_that_leads_elsewhere(file, folder):
    shutil.copy(folder / WEIGHTS, folder.parent / "other.safetensors")
    names = read_json(folder / INDEX)["weight_map"]
    write(folder / INDEX, {"weight_map": dict.fromkeys(names, file)})
    (line,) = refusals(folder)
    assert re.search("hold the names of files|index.json: .* must be a text|is missing; down", line)


@pytest.mark.parametrize("file, damage", [
    ("config.json", DAMAGED["empty"]), ("model.safetensors", DAMAGED["half"]),
    ("model.safetensors", Path.unlink)], ids=["config", "half the weights", "no weights"])
def test_a_run_s_own_checkpoint_is_made_again(file, damage, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "iter_2")
    damage(folder / file)
    assert "; download the checkpoint again" in refusals(folder)[0]     # no sign of a run
    (tmp_path / "rollouts.jsonl").touch()
    assert refusals(folder)[0].endswith(f"; delete {folder} and repeat the command")


def test_a_checkpoint_is_written_whole_or_not_at_all_and_never_over_another(tiny, tmp_path,
                                                                            monkeypatch):
    """Also after a first try that left half a checkpoint behind."""
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    runs = tmp_path / "runs"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError):
            tiny.save_pretrained(runs / "out")
    assert not (runs / "out").exists()

    ids = torch.randint(0, 256, (1, 20))
    for name in ("out", "next"):
        tiny.save_pretrained(runs / name)
        assert torch.equal(load_pretrained(runs / name, "cpu")(ids), tiny(ids))
    assert {path.name for path in runs.iterdir()} == {"out", "next"}

    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="exists already"):
        tiny.save_pretrained(tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tiny, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append((path, out.exists())))
    out = tmp_path / "iter_1"
    tiny.save_pretrained(out)
    draft = tmp_path / "iter_1.tmp"
    before = {path for path, named in synced if not named}
    assert before == {draft, *(draft / path.name for path in out.iterdir())}
    assert synced[-2:] == [(draft, False), (tmp_path, True)]


def test_the_tokenizer_s_files_are_saved_along_and_the_config_names_the_dtype(folder, tmp_path):
    out = tmp_path / "out"
    load_pretrained(folder, "cpu", torch.bfloat16).save_pretrained(out)
    copied = {"tokenizer.json", "tokenizer_config.json", "generation_config.json",
              "special_tokens_map.json"}
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"} | copied
    for name in copied:
        assert (out / name).read_text() == (folder / name).read_text()
    assert read_json(out / "config.json")["torch_dtype"] == "bfloat16"
    assert load_file(out / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def write_theirs(folder, kind, field=None, value=None):
    """A random model as transformers writes it, with a field of its config, or the field alone."""
    settings = {"head_dim": 16} if kind == "qwen3" else {}
    torch.manual_seed(0)
    if type(value) is int or field == "tie_word_embeddings":     # the tensors' shapes go with it
        settings[field] = value
    model_of(kind, **settings).save_pretrained(folder)
    if field is not None:
        change_config(folder, {field: value})


# Published files have these as well.
PUBLISHED = {"is_llama_config": [True], "unsloth_fixed": [True], "use_mrope": [False],
             "rope_interleaved": [False], "transformers.js_config": [{"dtype": {"q4": "float16"}}]}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("field, value", pairs_of(CONFIG_DONE | PUBLISHED))
def test_a_field_of_a_config_is_done_as_transformers_does_it(kind, field, value, tmp_path):
    write_theirs(tmp_path, kind, field, value)
    # Places that can't say two things.
    if field in ("rope_scaling", "rope_theta"):
        change_config(tmp_path, {"rope_parameters": DELETED, field: value})
    ids = torch.randint(0, 320, (1, 90))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(
            ids, return_dict=True).logits
    torch.testing.assert_close(load_pretrained(tmp_path, "cpu")(ids), theirs, atol=1e-3, rtol=1e-3)


OF_CONFIGS = set().union(*(AutoConfig.for_model(kind).to_dict() for kind in FAMILIES))
UNKNOWN = {field: [{"x": 1}] for field in OF_CONFIGS | {"a_field_of_tomorrow"}
           if field not in CONFIG_DONE | CONFIG_REFUSED | {"model_type": ""}}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("field, value", pairs_of(CONFIG_REFUSED) + pairs_of(UNKNOWN))
def test_a_field_of_a_config_is_refused_by_name(kind, field, value, tmp_path):
    write_theirs(tmp_path, kind)
    change_config(tmp_path, {field: value})
    with pytest.raises(UserError, match=f"config.json: .*{field}.*(implemented|contradict)"):
        load_pretrained(tmp_path, "cpu")


def logits_of(folder):
    return load_pretrained(folder, "cpu")(torch.arange(1, 10)[None])


def test_a_tensor_in_two_shards_is_one_tensor_or_refused_and_one_file_comes_before_shards(tmp_path):
    CASES["llama-mha"]().save_pretrained(tmp_path, max_shard_size="120KB")
    expected = logits_of(tmp_path)
    first, second, *_ = sorted(tmp_path.glob("model-0*"))
    save_file(load_file(second) | load_file(first), second, {"format": "pt"})
    assert torch.equal(logits_of(tmp_path), expected)
    first_as(lambda t: t + 1)(first)
    with pytest.raises(UserError, match="is there twice and differs"):
        load_pretrained(tmp_path, "cpu")
    # The index is of no use beside a whole file.
    CASES["llama-mha"]().save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path)
    assert torch.equal(logits_of(tmp_path), logits_of(tmp_path / "new"))


@pytest.mark.parametrize("names", [["lm_head"], ["model.embed_tokens"],
                                   ["lm_head", "model.embed_tokens"]])
def test_a_tied_head_lies_under_either_name_and_never_differs(names, tmp_path):
    """Old files hold the frequencies of RoPE as well."""
    CASES["llama-tied"]().save_pretrained(tmp_path)
    expected, path = logits_of(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    embedding = tensors.pop("model.embed_tokens.weight")
    copies = {f"{name}.weight": embedding.clone() for name in names}
    save_file(tensors | copies, path, {"format": "pt"})
    assert torch.equal(logits_of(tmp_path), expected)
    if len(names) == 2:
        copies["lm_head.weight"][0, 0] += 1
        save_file(tensors | copies, path, {"format": "pt"})
        with pytest.raises(UserError, match="is there twice and differs .lm_head.weight is"):
            load_pretrained(tmp_path, "cpu")
