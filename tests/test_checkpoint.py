"""A checkpoint is found, read and written; what is wrong with it is one line and no traceback."""
import importlib
import json
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

import model
from model import load_pretrained
from support import checkpoint
from support.checkpoint import fetch, read_config
from support.files import UserError, cli, read_json, replace_file
from tests.helpers import CASES, LLAMA3_ROPE
from tests.make_checkpoint import CONFIG

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------- errors

def test_an_error_of_the_user_is_one_line_and_exit_status_1():
    def main():
        raise UserError("that is wrong")

    with pytest.raises(SystemExit) as stopped:
        cli(main)

    # Python prints a text that a program exits with on stderr, and returns 1.
    assert stopped.value.code == "error: that is wrong"


def test_an_interrupted_program_prints_no_traceback():
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli(main)

    assert stopped.value.code.startswith("error: interrupted; what a run has finished")


def test_a_bug_keeps_its_traceback():
    def main():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli(main)


def test_programs_print_no_traceback():
    command = [sys.executable, "model.py", "--model", "/nowhere"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert run.returncode == 1
    assert run.stderr == ("error: /nowhere: no such folder "
                          "(a hub id looks like owner/name)\n")


@pytest.mark.parametrize("name", ["model", "engine.decode", "lora", "support.tokenizer"])
def test_every_small_program_refuses_a_folder_that_is_not_there(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--model", "/nowhere"])

    with pytest.raises(SystemExit) as stopped:
        cli(importlib.import_module(name).main)

    assert stopped.value.code.startswith("error: /nowhere: no such folder")


# ------------------------------------------------------------------------------- files

def test_read_json(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ["é", 1]}', encoding="utf-8")

    assert read_json(tmp_path / "a.json") == {"a": ["é", 1]}


def test_a_missing_json_file_is_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json")

    assert str(error.value) == f"{tmp_path}/a.json is missing"


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}}', b'"\xff"'])
def test_what_is_not_json_is_one_line(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)

    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json")

    assert str(error.value).startswith(f"{tmp_path}/a.json: not readable as JSON (")
    assert "\n" not in str(error.value)


def test_a_folder_is_not_readable_as_json(tmp_path):
    with pytest.raises(UserError, match="not readable as JSON"):
        read_json(tmp_path)


def test_replace_file(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, "first")

    replace_file(path, "second, é")

    assert path.read_text(encoding="utf-8") == "second, é"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_whose_writing_fails_keeps_its_content(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("first")

    with pytest.raises(UnicodeEncodeError):
        replace_file(path, "second \ud800")     # no such character: it can't be written

    assert path.read_text() == "first"


# ------------------------------------------------------------------------------- the hub

def test_a_folder_is_taken_as_it_is(tiny_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))

    assert fetch(tiny_folder) == tiny_folder
    assert fetch(str(tiny_folder)) == tiny_folder
    assert fetch(f"~/{tiny_folder.name}") == tiny_folder


@pytest.mark.parametrize("name", ["/nowhere", "nowhere", "a/b/c", "owner/na me"])
def test_what_is_no_folder_and_no_hub_id(name):
    with pytest.raises(UserError) as error:
        fetch(name)

    assert str(error.value) == f"{name}: no such folder (a hub id looks like owner/name)"


@pytest.mark.parametrize("name", ["~nobody/x", "../nowhere", "a\0b", "x" * 5000])
def test_a_name_that_is_hardly_one(name):
    with pytest.raises(UserError, match="no such folder"):
        fetch(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    with pytest.raises(UserError, match="model.gguf is a file; a checkpoint is a folder of safete"):
        fetch(tmp_path / "model.gguf")


class Gated(GatedRepoError):
    def __init__(self):     # the real one wants an answer of the hub
        pass


class NotFound(RepositoryNotFoundError):
    def __init__(self):
        pass


@pytest.mark.parametrize("problem, words", [
    (ConnectionError("no route\nto host"),
     "no such folder, and the hub can't be reached (ConnectionError: no route)"),
    (TimeoutError(),
     "no such folder, and the hub can't be reached (TimeoutError: )"),
    (Gated(),
     "it is gated: accept its licence on its hub page, then run `hf auth login`"),
    (NotFound(),
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

    model = load_pretrained("owner/name", "cpu")

    def wanted(file):
        return any(fnmatch(file, pattern) for pattern in asked["owner/name"])
    assert model.folder == tiny_folder
    for file in ("config.json", "model.safetensors", "model-00001-of-00004.safetensors",
                 "model.safetensors.index.json", "tokenizer.json"):
        assert wanted(file)
    for file in ("original/consolidated.00.pth", "original/tokenizer.model", "pytorch_model.bin",
                 "onnx/model.onnx", "README.md"):
        assert not wanted(file)


# ------------------------------------------------------------------------------- damaged folders

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint that transformers wrote, in several shards."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    torch.manual_seed(0)
    CASES["llama-mha"]().save_pretrained(folder, max_shard_size="120KB")
    return folder


@pytest.fixture()
def folder(whole, tmp_path):
    """A copy of it, for a test to damage."""
    shutil.copytree(whole, tmp_path / "m")
    return tmp_path / "m"


def assert_refused(folder, words):
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(folder, "cpu")
    assert "\n" not in str(error.value)


def test_the_folder_that_is_damaged_below_is_sound(folder):
    load_pretrained(folder, "cpu")


def test_a_missing_folder_is_one_line(folder):
    shutil.rmtree(folder)

    assert_refused(folder, "no such folder")


def test_a_missing_shard_is_one_line(folder):
    (shard,) = folder.glob("model-00002*")
    shard.unlink()

    assert_refused(folder, "model-00002.* is missing; download the checkpoint again")


def test_weights_that_are_no_safetensors_are_one_line(folder):
    """A pickle is not even looked for."""
    for file in folder.glob("model*"):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")

    assert_refused(folder, "model.safetensors is missing.*weights are read from safetensors only")


def test_weights_of_another_format_are_named(folder):
    for file in folder.glob("*"):
        file.unlink()
    (folder / "model.gguf").write_bytes(b"GGUF")

    assert_refused(folder, "config.json is missing; 'model.gguf' is no help: weights are read from "
                           "safetensors only")


def test_weights_that_are_a_folder_are_one_line(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors").mkdir()

    assert_refused(tmp_path / "m", "model.safetensors is missing; download the checkpoint again")


@pytest.mark.parametrize("file", ["../a.safetensors", "/tmp/a.safetensors", "a.bin", 1, None])
def test_an_index_names_files_of_its_folder(file, folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": file}}))

    assert_refused(folder, "index.json: .* is no name of a safetensors file")


def test_layers_are_counted_before_a_model_is_built(folder, monkeypatch):
    config = read_json(folder / "config.json") | {"num_hidden_layers": 1000}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(model, "Transformer", None)

    assert_refused(folder, "tensor model.layers.3.. is missing: num_hidden_layers is 1000")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_weights_are_floating_point_numbers(dtype, tiny_folder, tmp_path):
    damage_norm(tiny_folder, tmp_path / "m", lambda norm: norm.to(dtype))

    assert_refused(tmp_path / "m", "model.safetensors: model.norm.weight has .*it must be .* F16, "
                                   "BF16, F32 or F64")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_finite(value, dtype, tiny_folder, tmp_path):
    damage_norm(tiny_folder, tmp_path / "m",
                lambda norm: norm.to(dtype).index_fill(0, torch.tensor([5]), value))

    assert_refused(tmp_path / "m", "model.safetensors: model.norm.weight holds NaN or infinity")


def damage_norm(source, folder, change):
    """Copy a checkpoint, one of its tensors changed."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def empty_config(folder):
    (folder / "config.json").write_text("")


def half_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:9000])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("damage", [empty_config, half_the_weights, no_weights])
def test_a_run_s_own_checkpoint_is_made_again(damage, tiny_folder, tmp_path):
    folder = tmp_path / "iter_2"
    shutil.copytree(tiny_folder, folder)
    damage(folder)
    assert_refused(folder, "; download the checkpoint again")   # nothing shows that a run wrote it

    (tmp_path / "rollouts.jsonl").touch()

    assert_refused(folder, f"; delete {folder} and repeat the command$")


def test_a_damaged_shard_is_one_line(folder):
    (shard,) = folder.glob("model-00002*")
    shard.write_bytes(b"\x10" * 100)

    assert_refused(folder, "model-00002.* is damaged")


def test_a_missing_config_is_one_line(folder):
    (folder / "config.json").unlink()

    assert_refused(folder, "config.json is missing")


def test_a_config_that_is_no_json_is_one_line(folder):
    (folder / "config.json").write_text("{")

    assert_refused(folder, "not readable as JSON")


def test_a_config_that_is_no_object_is_one_line(folder):
    (folder / "config.json").write_text("[]")

    assert_refused(folder, "config.json")


def test_an_index_without_its_map_is_one_line(folder):
    (folder / "model.safetensors.index.json").write_text("{}")

    assert_refused(folder, "model.safetensors.index.json")


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("change, words", [
    # What model.py does not implement.
    ({"architectures": ["MambaForCausalLM"]}, "unsupported architecture: .Mamba"),
    ({"architectures": None}, r"unsupported architecture: .\?. "),
    ({"hidden_act": "gelu"}, "unsupported architecture: 'gelu'"),
    ({"rope_parameters": YARN}, "unsupported architecture: RoPE type 'yarn'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
     "unsupported architecture: RoPE type 'linear'"),
    ({"use_sliding_window": True}, "unsupported architecture: sliding-window attention"),
    ({"attention_bias": True}, "unsupported architecture: attention/mlp_bias"),
    ({"mlp_bias": True}, "unsupported architecture: attention/mlp_bias"),
    ({"quantization_config": {"bits": 4}}, "unsupported architecture: quantised weights"),
    # What the weights do not fit.
    ({"num_hidden_layers": 2}, "unexpected tensor .model.layers.2"),
    ({"num_hidden_layers": 4}, "tensor model.layers.3.* is missing"),
    ({"intermediate_size": 128}, "has shape")])
def test_a_config_that_does_not_fit_is_one_line(change, words, folder):
    config = read_json(folder / "config.json") | change
    (folder / "config.json").write_text(json.dumps(config))

    assert_refused(folder, words)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "intermediate_size", "vocab_size"])
def test_a_config_without_a_key_is_one_line(key, folder):
    config = read_json(folder / "config.json")
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))

    assert_refused(folder, f"'{key}' is missing")


@pytest.mark.parametrize("change, words", [
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
def test_a_field_of_another_kind_is_one_line(change, words, folder):
    config = read_json(folder / "config.json") | change
    (folder / "config.json").write_text(json.dumps(config))

    assert_refused(folder, "config.json: " + words)


@pytest.mark.parametrize("names", ["MambaForCausalLM", [], {}, [[]], [1], "a\nb"])
def test_architectures_of_another_kind_are_one_line(names, folder):
    config = read_json(folder / "config.json") | {"architectures": names}
    (folder / "config.json").write_text(json.dumps(config))

    assert_refused(folder, "unsupported architecture: ")


@pytest.mark.parametrize("rope", [[8.0], "yarn", 8.0, True])
def test_rope_of_another_kind_is_one_line(rope, folder):
    config = read_json(folder / "config.json") | {"rope_parameters": None, "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(config))

    assert_refused(folder, "unsupported architecture: RoPE type ")


# ------------------------------------------------------------------------------- configurations

def config_of(folder, changes, without=()):
    """What read_config makes of the tests' config.json with these changes."""
    config = CONFIG | changes
    for key in without:
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder)


def test_defaults_of_a_config(tmp_path):
    config = config_of(tmp_path, {}, without=("num_key_value_heads", "head_dim", "rms_norm_eps",
                                              "rope_theta", "max_position_embeddings",
                                              "tie_word_embeddings"))

    assert config["n_kv_head"] == 4     # as many as heads
    assert config["head_dim"] == 12     # 48 / 4
    assert config["norm_eps"] == 1e-6
    assert config["rope_theta"] == 10000.0
    assert config["max_len"] == 2048
    assert config["tied"] is False


def test_a_config_may_say_null_for_what_it_leaves_open(tmp_path):
    config = config_of(tmp_path, {"num_key_value_heads": None, "head_dim": None,
                                  "rope_scaling": None})

    assert config["n_kv_head"] == 4
    assert config["head_dim"] == 12
    assert config["rope_scaling"] is None


def test_rope_as_transformers_4_and_5_write_it(tmp_path):
    scaling = dict(LLAMA3_ROPE)
    theta = scaling.pop("rope_theta")

    new = config_of(tmp_path, {"rope_parameters": LLAMA3_ROPE}, without=["rope_theta"])
    old = config_of(tmp_path, {"rope_scaling": scaling, "rope_theta": theta})

    assert new["rope_theta"] == 500000.0
    assert old["rope_theta"] == 500000.0
    assert new["rope_scaling"]["factor"] == 8.0
    assert old["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize("architecture, bias, norm", [
    ("LlamaForCausalLM", False, False),
    ("Qwen2ForCausalLM", True, False),
    ("Qwen3ForCausalLM", False, True)])
def test_what_sets_the_architectures_apart(architecture, bias, norm, tmp_path):
    config = config_of(tmp_path, {"architectures": [architecture]})

    assert config["qkv_bias"] == bias
    assert config["qk_norm"] == norm


# ------------------------------------------------------------------------------- writing

def test_a_checkpoint_is_written_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    """Also after a first try that left half a checkpoint behind."""
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError):
            tiny.save_pretrained(tmp_path / "runs" / "out")
    assert not (tmp_path / "runs" / "out").exists()

    tiny.save_pretrained(tmp_path / "runs" / "out")

    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["out"]
    ids = torch.randint(0, 256, (1, 20))
    again = load_pretrained(tmp_path / "runs" / "out", "cpu")
    assert torch.equal(again(ids), tiny(ids))


def test_a_draft_that_is_a_file_is_removed(tiny, tmp_path):
    (tmp_path / "iter_1.tmp").write_text("x")

    tiny.save_pretrained(tmp_path / "iter_1")

    assert [path.name for path in tmp_path.iterdir()] == ["iter_1"]
    load_pretrained(tmp_path / "iter_1", "cpu")


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
    shutil.copytree(tiny_folder, tmp_path / "m")
    (tmp_path / "m" / "special_tokens_map.json").mkdir()

    load_pretrained(tmp_path / "m", "cpu").save_pretrained(tmp_path / "out")

    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()
