"""docs/EXTENDING.md: every change applies to a copy of the project, and its command shows it.

A test applies one block with git apply, runs the commands at its head, and asks for a fact that
only the change can bring about. Nothing is skipped: without git it fails.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import read_lines

pytestmark = pytest.mark.slow      # each copies the project and runs it

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "EXTENDING.md"
# What a copy is made of: no runs, no .git, nothing that an editor left.
FOLDERS = ("support", "engine", "tools", "data", "docs", "tests")
# Their headings. One more in the document, without a test here, is noticed.
CHANGES = ["A prompt", "A reward", "An update rule", "A domain", "A family of models"]


def blocks():
    """{heading: the diff block below it}."""
    found = re.findall(r"^## (.*?)\n.*?^```diff\n(.*?)^```$", DOCUMENT.read_text(),
                       re.MULTILINE | re.DOTALL)
    return dict(found)


def commands_of(block):
    """The commands at the head of a block, a list of words each."""
    head = block[:block.index("diff --git")].replace("\\\n", " ")
    return [shlex.split(line.removeprefix("Try: ")) for line in head.splitlines()]


class Changed:
    """A copy of the project with one change in it, and what its commands printed."""

    def __init__(self, folder, heading):
        self.folder = folder
        block = blocks()[heading]
        for path in ROOT.glob("*.py"):
            shutil.copy(path, folder)
        for name in FOLDERS:
            shutil.copytree(ROOT / name, folder / name,
                            ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
        # A folder above may be a repository: then git would look for the files there.
        self.run(["git", "apply"], stdin=block, GIT_CEILING_DIRECTORIES=str(folder.parent))
        self.printed = ""
        for command in commands_of(block):
            assert command[0] == "python"
            self.printed += self.run([sys.executable, *command[1:]])

    def run(self, words, stdin="", **variables):
        """A command in this copy: what it printed."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.folder),
                                    "CUDA_VISIBLE_DEVICES": ""} | variables
        done = subprocess.run(words, cwd=self.folder, input=stdin, text=True, capture_output=True,
                              env=environment)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def ask(self, program):
        """What a few lines of Python print in this copy, as JSON."""
        return json.loads(self.run([sys.executable, "-c", program]).splitlines()[-1])


def test_every_change_has_a_test():
    assert list(blocks()) == CHANGES
    assert all(commands_of(block) for block in blocks().values())


def test_the_document_is_short():
    lines = DOCUMENT.read_text().splitlines()

    assert len(lines) <= 230
    assert max(len(line) for line in lines) <= 110


def test_a_change_says_nothing_of_what_is_there_already():
    """Else its test could pass without it."""
    for word, file in [("teacher", "selfedit.py"), ("softmax", "support/config.py"),
                       ("reversal", "support/config.py"), ("Mistral", "support/checkpoint.py")]:
        assert word not in (ROOT / file).read_text()


def test_a_prompt(tmp_path):
    changed = Changed(tmp_path, "A prompt")

    # The passage stands in the prompt of that name, and a self-edit follows.
    before, after = changed.printed.split("--- self-edit 0")
    assert before.startswith("You will teach the following passage to a pupil")
    assert "Passage:\nSable Mountain Railway\n" in before
    assert before.endswith("\n\nLesson:\n\n")
    assert "tokens" in after


def test_a_reward(tmp_path):
    changed = Changed(tmp_path, "A reward")
    rollouts = read_lines(tmp_path / "runs/shorter/rollouts.jsonl")
    metrics = read_lines(tmp_path / "runs/shorter/metrics.jsonl")

    assert len(rollouts) == 2 + 4 + 2
    readable = [r for r in rollouts if r["documents"]]
    assert readable
    for r in readable:
        accuracy = np.mean(r["right"])
        assert r["reward"] == pytest.approx(accuracy - 0.001 * len(r["token_ids"]))
    # What is shown is the mean of the new rewards.
    for t, m in enumerate(metrics):
        own = [r["reward"] for r in rollouts if r["iteration"] == t and r["split"] == "eval"]
        assert m["eval_reward"] == pytest.approx(np.mean(own))
        assert f"iteration {t}: held-out reward {m['eval_reward']:.3f}" in changed.printed


def test_an_update_rule(tmp_path):
    changed = Changed(tmp_path, "An update rule")
    rollouts = read_lines(tmp_path / "runs/softmax/rollouts.jsonl")

    # All that can be read are learned.
    readable = sum(r["split"] == "train" and r["documents"] > 0 for r in rollouts)
    assert f"M-step: {readable} self-edits, " in changed.printed

    # Two readable ones and one that isn't; a task of which none can be read.
    weights = changed.ask("""
import json
from outer_loop import weigh
from selfedit import SelfEdit
from support.config import Config

good, bad = SelfEdit(documents=["a"]), SelfEdit()
cfg = Config(update="softmax")
print(json.dumps(weigh(cfg, [[0.5, 0.4, 0], [0, 0, 0]], [[good, good, bad], [bad] * 3],
                       [0, 0], 0)))
""")
    assert [(i, j) for i, j, _ in weights] == [(0, 0), (0, 1)]
    first, second = [weight for *_, weight in weights]
    assert first + second == pytest.approx(3)
    assert first / second == pytest.approx(np.e)


def test_a_domain(tmp_path):
    changed = Changed(tmp_path, "A domain")
    rollouts = read_lines(tmp_path / "runs/reversal/rollouts.jsonl")

    # Every answer is the town itself, in the baselines as well.
    for r in rollouts:
        assert r["gold"] == [r["title"]] * 4
        assert all("which town" in question.lower() for question in r["questions"])
    assert {r["arm"] for r in rollouts} == {"", "passage only", "every fact turned round"}
    assert "forward" not in changed.printed.split("self-edits:")[0]

    # The reference is true: a note for each fact that is asked.
    forms = changed.ask("""
import json
from data import reversal, tinyworld

task = reversal.load("eval")[0]
documents = task.references["every fact turned round"].documents
print(json.dumps([tinyworld.classify(line, task.context[0]) for line in documents[:-1]]))
""")
    assert forms == ["reversed"] * 4


def test_a_family_of_models(tmp_path):
    changed = Changed(tmp_path, "A family of models")
    written = json.loads((tmp_path / "runs/mistral/config.json").read_text())

    assert written["architectures"] == ["MistralForCausalLM"]
    assert "4 of 4 texts the same" in changed.printed
    # A text that is longer than the sliding window: transformers masks what is too far back.
    within, beyond, kind, windows = changed.ask("""
import json
import torch
from transformers import AutoModelForCausalLM
from model import ModelConfig, load_pretrained
from tests.make_checkpoint import make_checkpoint

folder = "runs/mistral"
model = load_pretrained(folder, "cpu", torch.float64)
theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
ids = torch.randint(0, 256, (1, 600))
with torch.no_grad():
    gap = (model(ids) - theirs(ids).logits)[0].abs().amax(1)

kind = dict(architectures=["MistralForCausalLM"], model_type="mistral")
long = make_checkpoint("runs/long", **kind, max_position_embeddings=8192)
none = make_checkpoint("runs/none", **kind, max_position_embeddings=8192, sliding_window=None)
windows = [ModelConfig.from_folder(f).max_len for f in (folder, long, none)]
print(json.dumps([gap[:512].max().item(), gap[512:].max().item(), type(theirs).__name__,
                  windows]))
""")
    # Both compute RoPE's angles in float32. Beyond the window ours would be another model.
    assert within < 1e-4
    assert beyond > 1e-2
    assert kind == "MistralForCausalLM"
    # The window; transformers' default where none is named; null, which is none.
    assert windows == [512, 4096, 8192]
