"""What goes to the hub: the files that belong, a card that nothing can break, no path, no token."""
import json
import re
import shutil
import sys
from types import SimpleNamespace

import huggingface_hub
import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import push as program
from files import UserError
from lora import Adapters, Lora
from model import load_pretrained
from push import hub_id, push

TOKEN = "hf_abcdefSECRETsecret0123"


class Hub:
    """Records what HfApi is asked for, and keeps a copy of what is uploaded."""

    def __init__(self, store):
        self.store = store
        self.calls = []
        self.public = False         # what a repository that exists already is
        self.error = None           # what an upload raises

    def __call__(self):
        return self

    def create_repo(self, name, **options):
        self.calls.append(("create_repo", name, options))
        return f"https://huggingface.co/{name}"

    def model_info(self, name):
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, repo_id, folder_path, allow_patterns):
        if self.error:
            raise self.error
        self.calls.append(("upload_folder", repo_id, sorted(allow_patterns)))
        shutil.copytree(folder_path, self.store)    # links become files


@pytest.fixture()
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return hub


@pytest.fixture()
def adapter(tiny, tmp_path):
    adapters = Adapters(tiny, Lora(4, 8, ["q_proj", "down_proj"]), 1)
    adapters.flat.normal_(std=0.1)
    adapters.save(0, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture()
def iter_1(tiny_folder, tmp_path):
    """A checkpoint in a run's folder, among all that a run has."""
    run = tmp_path / "home" / "me" / "runs" / "tiny"
    shutil.copytree(tiny_folder, run / "iter_1")
    settings = {"model": str(tiny_folder), "iterations": 2, "program": "outer_loop",
                "train_data": "/home/me/secret project/train.json", "run_dir": str(run)}
    (run / "config.json").write_text(json.dumps(settings))
    lines = [{"iteration": t, "eval_reward": 0.25 + t / 8, "eval_ci": [0.1, 0.9]} for t in (0, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("rollouts.jsonl", "edits.jsonl", ".lock"):
        (run / name).write_text("{}\n")
        (run / "iter_1" / name).write_text("{}\n")
    (run / "iter_1" / "token").write_text(TOKEN)
    return run / "iter_1"


def snapshot(folder):
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


def read_card(hub):
    """(front matter, text) of the card that was uploaded."""
    card = (hub.store / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    return yaml.safe_load(front), text


def rename_base(adapter, base):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (adapter / "adapter_config.json").write_text(json.dumps(config))


# ------------------------------------------------------------------------------- adapters

def test_an_adapter_of_a_hub_model(adapter, hub, capsys):
    rename_base(adapter, "owner/base-model")
    before = snapshot(adapter)

    assert push(adapter, "me/mine") == "https://huggingface.co/me/mine"

    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert hub.calls == [("create_repo", "me/mine", {"private": None, "exist_ok": True}),
                         ("upload_folder", "me/mine", files)]
    assert sorted(path.name for path in hub.store.iterdir()) == files
    for name in files[1:]:
        assert (hub.store / name).read_bytes() == (adapter / name).read_bytes()
    front, text = read_card(hub)
    assert front["base_model"] == "owner/base-model"
    assert front["library_name"] == "peft"
    assert "python model.py --model owner/base-model --adapter FOLDER" in text
    assert '"r": 4' in text and '"q_proj"' in text
    assert snapshot(adapter) == before
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and TOKEN not in out and "needs its --model" not in out


def test_an_adapter_of_a_local_model_tells_no_path(adapter, hub, tiny, tiny_folder, capsys):
    before = snapshot(adapter)

    push(adapter, "me/mine")

    front, text = read_card(hub)
    assert "base_model" not in front        # the hub would link to another
    assert "Base model: `tiny`, a folder of its author's" in text
    assert "needs its --model" in capsys.readouterr().out
    for path in hub.store.iterdir():
        assert str(tiny_folder.parent).encode() not in path.read_bytes()
    assert snapshot(adapter) == before
    # PEFT opens what was sent, with the base named.
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).eval()
    theirs = peft.PeftModel.from_pretrained(base, hub.store)
    assert theirs.peft_config["default"].base_model_name_or_path == "tiny"
    ids = torch.randint(0, 256, (1, 9))
    with Adapters.load(tiny, adapter).route([9]), torch.no_grad():
        torch.testing.assert_close(tiny(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_base_in_the_hubs_cache_is_named_by_its_id():
    cached = "/home/me/.cache/huggingface/hub/models--Owner--Some-Model.1/snapshots/0a1b2c"

    assert hub_id(cached) == "Owner/Some-Model.1"
    assert hub_id(cached.replace("/", "\\")) == "Owner/Some-Model.1"
    assert hub_id("Owner/Some-Model.1") == "Owner/Some-Model.1"
    for local in ("/home/me/m", "./m", "~/m", "../a/b", "C:\\me\\m", "m", "", "runs/x", "a/b/c"):
        assert hub_id(local) is None


def test_a_readme_of_the_users_is_neither_sent_nor_changed(adapter, hub):
    (adapter / "README.md").write_text("my own words")

    push(adapter, "me/mine")

    assert (adapter / "README.md").read_text() == "my own words"
    assert "my own words" not in (hub.store / "README.md").read_text()


# ------------------------------------------------------------------------------- checkpoints

@torch.no_grad()
def test_a_checkpoint_of_a_run(iter_1, hub, tiny):
    before = snapshot(iter_1.parent)

    push(iter_1, "me/mine", private=True)

    assert hub.calls[0] == ("create_repo", "me/mine", {"private": True, "exist_ok": True})
    assert {path.name for path in hub.store.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    front, text = read_card(hub)
    assert front["library_name"] == "transformers"
    assert "python outer_loop.py" in text and '"iterations": 2' in text
    assert '"eval_reward": 0.375' in text and '"eval_reward": 0.25' not in text
    assert '"train_data": "train.json"' in text
    assert "secret project" not in text and str(iter_1.parent) not in text
    assert snapshot(iter_1.parent) == before
    ids = torch.randint(0, 256, (1, 9))
    assert torch.equal(load_pretrained(hub.store, "cpu")(ids), tiny(ids))


def test_a_checkpoint_of_its_own_in_shards(hub, tiny_folder, tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder)
    theirs.save_pretrained(tmp_path / "out", max_shard_size="50KB")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["_name_or_path"] = "/home/me/models/base"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))

    push(tmp_path / "out", "me/mine")

    sent = {path.name for path in hub.store.iterdir()}
    assert {path.name for path in (tmp_path / "out").glob("model*")} <= sent
    assert len(list(hub.store.glob("*.safetensors"))) > 1
    assert "/home/me" not in (hub.store / "config.json").read_text()
    assert "Base model: `base`" in read_card(hub)[1]


def test_a_run_that_was_not_evaluated_yet(iter_1, hub):
    (iter_1.parent / "metrics.jsonl").unlink()

    push(iter_1, "me/mine")

    assert "held-out reward" not in read_card(hub)[1]


# ------------------------------------------------------------------------------- hostile files

HOSTILE = ['"\n---\nlicense: mit\n---\n# Owned', "x\n```\n<script>alert(1)</script>", "`rm -rf`",
           "a: b # c", "{front}", "\x1b[31m\u202e\u2028```", "[a](javascript:b)", "```", "\\"]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_files_cannot_break_the_card(text, adapter, iter_1, hub):
    rename_base(adapter, text)
    settings = {"model": text, text: [text, {"a": text}], "deep": 1}
    (iter_1.parent / "config.json").write_text(json.dumps(settings))
    (iter_1.parent / "metrics.jsonl").write_text(
        json.dumps({"iteration": 1, "eval_reward": text}) + "\n5\n")

    for folder in (adapter, iter_1):
        shutil.rmtree(hub.store, ignore_errors=True)
        push(folder, "me/mine")

        front, card = read_card(hub)
        assert front.keys() == {"library_name", "tags"}
        # Outside of blocks of code only a few lines of ours are left, the base among them.
        outside = re.sub(r"```json\n.*?\n```\n", "", card, flags=re.DOTALL)
        for sign in ("```", "<", "\x1b", "\u202e", "\u2028", "# ", "(javascript"):
            assert sign not in outside
        assert outside.count("`") % 2 == 0


def test_nesting_without_end_is_no_crash(iter_1, hub):
    deep = "[" * 400 + "]" * 400
    (iter_1.parent / "config.json").write_text('{"model": "a/b", "deep": ' + deep + "}")

    push(iter_1, "me/mine")

    assert read_card(hub)[0]["base_model"] == "a/b"


# ------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize("name", [
    "mine", "me/", "/mine", "a/b/c", "me/my model", "me/-x", "me/x.git", "me/a--b", "../x",
    "me/x\n", "me/" + "x" * 99, "mé/x", ""])
def test_a_name_that_is_none(name, adapter, hub):
    with pytest.raises(UserError, match="OWNER/NAME"):
        push(adapter, name)
    assert hub.calls == []


NEITHER = ["empty", "run", "missing", "file", "cut", "no weights", "adapter"]


@pytest.mark.parametrize("what", NEITHER)
def test_a_folder_that_is_neither(what, adapter, iter_1, hub, tmp_path):
    folder = {"run": iter_1.parent, "cut": iter_1, "no weights": iter_1, "adapter": adapter,
              "file": tmp_path / "file"}.get(what, tmp_path / what)
    if what == "empty":
        folder.mkdir()
    if what == "file":
        folder.write_text("")
    if what == "cut":
        (folder / "model.safetensors").write_bytes(b"12")
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    if what == "adapter":
        (folder / "adapter_model.safetensors").unlink()

    with pytest.raises(UserError) as stopped:
        push(folder, "me/mine")
    assert len(str(stopped.value).splitlines()) == 1
    assert hub.calls == []


def test_without_a_token(adapter, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)

    with pytest.raises(UserError, match="hf auth login"):
        push(adapter, "me/mine")
    assert hub.calls == []


@pytest.mark.parametrize("error", [
    ConnectionError(f"no route\nAuthorization: Bearer {TOKEN}"), ValueError(f"{TOKEN}" * 20),
    PermissionError("403 Forbidden: you may not write to me; your token is hf_another0123456789")])
def test_what_the_hub_says_is_one_line_without_the_token(error, adapter, hub, monkeypatch, capsys):
    hub.error = error
    monkeypatch.setattr(sys, "argv", ["push.py", str(adapter), "--push", "me/mine"])

    with pytest.raises(SystemExit) as stopped:
        program.cli(program.main)

    line = str(stopped.value)
    assert len(line.splitlines()) == 1
    assert "hf auth login" in line and type(error).__name__ in line
    for said in (line, *capsys.readouterr()):
        assert "SECRET" not in said and "hf_a" not in said


def test_private_is_refused_where_the_repository_is_public(adapter, hub, monkeypatch):
    hub.public = True

    with pytest.raises(UserError, match="exists and is public"):
        push(adapter, "me/mine", private=True)
    assert not hub.store.exists()
    push(adapter, "me/mine")
