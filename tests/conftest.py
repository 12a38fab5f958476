"""Fixtures: checkpoints that the tests write, small data files, and real ones if they are there.

NANOSEAL_SMOLLM2 may name the folder of a real checkpoint (SmolLM2-135M-Instruct, float32), and
NANOSEAL_DATA a folder with squad_val_60.json and squad_train_50.json (the authors' released
self-edits). Tests that need what is not there are skipped."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from data import judges, tinyworld
from data.judges import each
from model import load_pretrained
from support.checkpoint import EMBEDDED
from support.tokenizer import Tokenizer
from tests.helpers import CASES, SMALL, even_length, varied_run
from tests.make_checkpoint import make_checkpoint
from tests.strict import StrictPatch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture()
def monkeypatch():
    """pytest's own, but a patch in vain is an error (tests/strict.py)."""
    patch = StrictPatch()
    yield patch
    patch.undo()
    patch.check()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random two-layer Llama with a byte vocabulary."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session", params=CASES)
def peer(request, tmp_path_factory):
    """A random model of every kind that transformers wrote, in several shards: (folder, itself).

    Biases begin as 0 and norms as 1: here they matter."""
    torch.manual_seed(1)
    reference = CASES[request.param]().eval()
    for p in reference.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    reference.save_pretrained(folder, max_shard_size="120KB")
    return folder, reference


@pytest.fixture(scope="session")
def words():
    """The embedded checkpoint's tokenizer."""
    return Tokenizer.from_pretrained(EMBEDDED)


@pytest.fixture(scope="session")
def towns():
    """Three towns of the tiny world."""
    return tinyworld.load("tune")[:3]


@pytest.fixture()
def tiny(tiny_folder):
    return load_pretrained(tiny_folder, "cpu")


@pytest.fixture(scope="session")
def model64(tiny_folder):
    """The same in float64, in which rounding hides nothing. Tests leave it as it is."""
    return load_pretrained(tiny_folder, "cpu", torch.float64)


@pytest.fixture(scope="session")
def tok(tiny_folder):
    return Tokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def passages(tmp_path_factory):
    """A data file of six passages with two questions each."""
    records = [{
        "title": f"Town {i}",
        "context": f"The river of town {i} is the Ob{i}. It was founded by Ana{i} Reis.",
        "extra": 1,
        "questions": [{"question": "Which river?", "answer": f"Ob{i}"},
                      {"question": "Who founded it?", "answer": f"Ana{i} Reis"}]}
        for i in range(6)]
    path = tmp_path_factory.mktemp("data") / "passages.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture()
def argv(tiny_folder, passages, tmp_path):
    """Flags of a small run on the random model: 2 rounds of 2 passages with 3 self-edits each."""
    return ["--model", str(tiny_folder), "--train-data", str(passages),
            "--eval-data", str(passages), "--run-dir", str(tmp_path / "run"), *SMALL.split()]


@pytest.fixture(scope="session")
def whole(tiny_folder, passages, tmp_path_factory):
    """A run of two rounds with baselines, whose rewards differ. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return varied_run(tiny_folder, passages, folder, "--baselines")


@pytest.fixture()
def finished_run(tmp_path):
    """A run in the tiny world whose model after round 3 is still the untrained one."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"seed": 7}))
    shutil.copytree(EMBEDDED, folder / "iter_3")
    return folder


@pytest.fixture()
def varied_rewards(monkeypatch):
    """Rewards that differ on a random model."""
    monkeypatch.setitem(judges.RULES, "rule", each(even_length))


def named_folder(variable, file):
    """The folder that an environment variable names, in which this file must be."""
    folder = Path(os.environ.get(variable, "nowhere"))
    if not (folder / file).exists():
        pytest.skip(f"{variable} names no folder with {file}")
    return folder


@pytest.fixture(scope="session")
def shared_data():
    return named_folder("NANOSEAL_DATA", "squad_val_60.json")


@pytest.fixture(scope="session")
def smollm2():
    return named_folder("NANOSEAL_SMOLLM2", "config.json")
