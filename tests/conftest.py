"""Checkpoints that the tests write, and the real ones if they can be had.

SmolLM2 is looked for in $NANOSEAL_SMOLLM2; without it, a script ../shared/tools/smollm2.py makes it where there is one. The measured
SQuAD passages are looked for in $NANOSEAL_DATA, or ../shared/data. Tests that need what is not there are skipped."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from tests.make_checkpoint import make_checkpoint  # noqa: E402
from model import load_pretrained  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random two-layer Llama with a byte vocabulary."""
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture()
def tiny(tiny_folder):
    return load_pretrained(tiny_folder, "cpu")


@pytest.fixture(scope="session")
def tok(tiny_folder):
    return Tokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def passages(tmp_path_factory):
    """A small data file."""
    path = tmp_path_factory.mktemp("data") / "passages.json"
    path.write_text(json.dumps([
        {"title": f"Town {i}", "context": f"The river of town {i} is the Ob{i}. It was founded by Ana{i} Reis.", "extra": 1,
         "questions": [{"question": "Which river?", "answer": f"Ob{i}"}, {"question": "Who founded it?", "answer": f"Ana{i} Reis"}]}
        for i in range(6)]))
    return path


@pytest.fixture(scope="session")
def shared_data():
    folder = Path(os.environ.get("NANOSEAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "squad_val_60.json").exists():
        pytest.skip("the released passages are not here (NANOSEAL_DATA)")
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """Folder of a real pretrained checkpoint, SmolLM2-135M-Instruct in float32."""
    if folder := os.environ.get("NANOSEAL_SMOLLM2"):
        return Path(folder)
    script, folder = ROOT.parent / "shared" / "tools" / "smollm2.py", Path(tempfile.gettempdir()) / "nanoseal-smollm2"
    if not script.exists():
        pytest.skip("SmolLM2 is not here (NANOSEAL_SMOLLM2)")
    if not (folder / "tokenizer_config.json").exists():
        made = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"SmolLM2 could not be made: {made.stderr[-300:]}")
    return folder
