"""README and docs: every command can be parsed, every name exists; every change of EXTENDING.md
applies to a copy of the project and does what it says; the lecture's notebook runs."""
import argparse
import importlib
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

from tests import features
from tests.helpers import read_lines

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# ------------------------------------------------------------------------------- commands and names

# What stands for something of the reader's own.
PLACEHOLDERS = {"S": "0", "N": "1", "L": "1"}


def commands_of(path):
    """The `python ...` commands of a document, a list of words each."""
    text = path.read_text().replace("\\\n", " ")
    shown = re.findall(r"^(?:    )?(python .*)$", text, re.MULTILINE)    # in a block
    shown += re.findall(r"`(?:[^`\n]*&& )?(python [^`]+)`", text)       # in a line
    commands = [shlex.split(command.split("  #")[0])[1:] for command in shown]
    return [[PLACEHOLDERS.get(word, word) for word in words] for words in commands
            if words[:2] != ["-m", "pytest"]]


ALL_COMMANDS = [(path.name, command) for path in DOCS for command in commands_of(path)]


class Parsed(Exception):
    pass


@pytest.mark.parametrize("document, words", ALL_COMMANDS, ids=lambda x: " ".join(x)[:60])
def test_a_command_can_be_parsed(document, words, monkeypatch):
    """The program's own parser takes it, and would go on from there."""
    if words[0] == "-m":
        program, words = importlib.import_module(words[1]), words[1:]
    else:
        program = importlib.import_module(Path(words[0]).stem)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        program.main()


def test_there_are_commands_to_parse():
    assert len(ALL_COMMANDS) > 15


def owners():
    """{name: one of our modules, or one of the classes that documents name}."""
    found = {}
    for folder in ("", "engine/", "support/", "tools/", "data/"):
        for file in ROOT.glob(f"{folder}[a-z]*.py"):
            found[file.stem] = importlib.import_module(folder.replace("/", ".") + file.stem)
    return found | {"Outcome": found["inner_loop"].Outcome, "Task": found["selfedit"].Task,
                    "Tokenizer": found["tokenizer"].Tokenizer}


def missing_names(names, ours):
    """The `outer_loop.rest_em`s, `Outcome.reward`s that are not in the module or class of ours."""
    split = [name.split(".") for name in names]
    return [words for words in split
            if words[0] in ours and len(words) > 1 and words[1] not in ("", "py", "json", "html")
            and not hasattr(ours[words[0]], words[1])]


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_every_file_function_and_link_exists(document):
    made_by_a_run = {"report.html", "config.json", "edits.jsonl", "rollouts.jsonl", "metrics.jsonl"}
    text = document.read_text()
    names = set(re.findall(r"`([\w./]+)`", text))
    files = {name for name in names if re.search(r"\.(py|json|jsonl|svg|md)$", name)}
    links = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text)
             if not target.startswith("http")]
    assert [name for name in files - made_by_a_run if not (ROOT / name).exists()] == []
    assert missing_names(names, owners()) == []
    assert [target for target in links if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document, lines, words", [
    ("README.md", 130, 1200), ("docs/EXTENDING.md", 230, float("inf"))])
def test_what_should_be_short_is(document, lines, words):
    text = (ROOT / document).read_text()
    assert len(text.splitlines()) <= lines
    assert len(text.split()) <= words
    assert max(len(line) for line in text.splitlines()) <= 125


# ------------------------------------------------------------------------------- EXTENDING.md

EXTENDING = ROOT / "docs" / "EXTENDING.md"
# What a copy is made of: no runs, no .git, nothing that an editor left.
FOLDERS = ("support", "engine", "tools", "data", "docs", "tests")
# Their headings, and a word that a change brings: else its test could pass without it. One more in
# the document, without a test here, is noticed.
CHANGES = {"A prompt": ("teacher", "selfedit.py"), "A reward": None,
           "An update rule": ("softmax", "support/config.py"),
           "A domain": ("reversal", "support/config.py"),
           "A family of models": ("Mistral", "support/checkpoint.py")}


def blocks():
    """{heading: the diff block below it}."""
    found = re.findall(r"^## (.*?)\n.*?^```diff\n(.*?)^```$", EXTENDING.read_text(),
                       re.MULTILINE | re.DOTALL)
    return dict(found)


def commands_to_try(block):
    """The commands at the head of a block, a list of words each."""
    head = block[:block.index("diff --git")].replace("\\\n", " ")
    return [shlex.split(line.removeprefix("Try: ")) for line in head.splitlines()]


class Changed:
    """A copy of the project with one change in it (git apply), and what its commands printed.
    Nothing is skipped: without git it fails."""

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
        for command in commands_to_try(block):
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


@pytest.mark.slow
def test_every_change_has_a_test_and_is_not_there_already():
    assert list(blocks()) == list(CHANGES)
    assert all(commands_to_try(block) for block in blocks().values())
    for word, file in filter(None, CHANGES.values()):
        assert word not in (ROOT / file).read_text()


@pytest.mark.slow
def test_a_prompt(tmp_path):
    changed = Changed(tmp_path, "A prompt")
    # The passage stands in the prompt of that name, and a self-edit follows.
    before, after = changed.printed.split("--- self-edit 0")
    assert before.startswith("You will teach the following passage to a pupil")
    assert "Passage:\nSable Mountain Railway\n" in before
    assert before.endswith("\n\nLesson:\n\n")
    assert "tokens" in after


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_family_of_models(tmp_path):
    changed = Changed(tmp_path, "A family of models")
    written = json.loads((tmp_path / "runs/mistral/config.json").read_text())

    assert written["architectures"] == ["MistralForCausalLM"]
    assert "Answer:" in changed.printed
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


# ------------------------------------------------------------------------------- the notebook

NOTEBOOK = ROOT / "docs" / "nanoseal.ipynb"
FIGURES = [ROOT / "docs" / "loops.svg", ROOT / "docs" / "ribbon.svg"]
BOOK = json.loads(NOTEBOOK.read_text())
CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
SCRIPT = "\n".join("".join(cell["source"]) for cell in CODE)


def run(*words, **options):
    """A Python program with one thread, and no window for the plot: what it prints."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern, text):
    """The groups of the one place where the pattern is found, as numbers."""
    (found,) = re.findall(pattern, text)
    return [float(number) for number in found] if isinstance(found, tuple) else float(found)


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_it_says():
    """From docs, as Jupyter does."""
    printed = run("-", cwd=ROOT / "docs", input=SCRIPT)

    # The model knows more afterwards.
    before, asked = numbers(r"right before: (\d+) of (\d+)", printed)
    after, asked_again = numbers(r"right after: (\d+) of (\d+)", printed)
    assert asked == asked_again == 11
    assert before <= 2
    assert after >= before + 2

    # Self-edits differ in their reward.
    rewards = [float(r) for r in re.findall(r"^self-edit \d: reward (\S+)$", printed, re.MULTILINE)]
    best = numbers(r"--- best: self-edit \d, reward (\S+)", printed)
    worst = numbers(r"--- worst: self-edit \d, reward (\S+)", printed)
    assert len(rewards) == 8
    assert (best, worst) == (max(rewards), min(rewards))
    assert best >= worst + .1
    # It prints two decimals of each.
    mean = numbers(r"J, estimated from 8 self-edits of one task: (\S+)", printed)
    assert mean == pytest.approx(sum(rewards) / 8, abs=.011)

    # The notes that it suggests are good.
    mine = numbers(r"my notes: reward (\S+)", printed)
    passage = numbers(r"the passage alone: reward (\S+)", printed)
    assert mine >= passage + .1


def test_the_notebook_is_clean_short_and_without_outputs():
    for cell in CODE:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
    assert 8 <= len(CODE) <= 12
    assert max(len(cell["source"]) for cell in CODE) <= 25
    assert max(len(line) for line in SCRIPT.splitlines()) <= 100
    ids = [cell["id"] for cell in BOOK["cells"]]
    assert (BOOK["nbformat"], BOOK["nbformat_minor"]) == (4, 5)
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    assert NOTEBOOK.read_text() == (
        json.dumps(BOOK, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def test_the_notebook_s_links_and_pictures_exist():
    text = "".join("".join(cell["source"]) for cell in BOOK["cells"]
                   if cell["cell_type"] == "markdown")
    local = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert {path.name for path in FIGURES} <= set(local)
    assert [target for target in local if not (ROOT / "docs" / target).exists()] == []


def texts_of(svg):
    return re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)


def test_the_figures_are_what_their_program_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    run(str(ROOT / "docs" / "figures.py"), str(tmp_path))
    for path in FIGURES:
        drawn, kept = (tmp_path / path.name).read_text(), path.read_text()
        assert texts_of(drawn) == texts_of(kept) != []
        # Drawn by this version; others may write the same drawing in other bytes.
        if matplotlib.__version__ == "3.11.2":
            assert drawn == kept


def test_every_function_in_a_figure_exists():
    texts = [text for path in FIGURES for text in texts_of(path.read_text())]
    named = re.findall(r"\b([a-z_]+)\.([A-Za-z_]+)", "\n".join(texts))
    ours = owners()
    assert len(named) >= 10
    assert [names for names in named if not hasattr(ours[names[0]], names[1])] == []


# ------------------------------------------------------------------------------- INTEROP.md

def test_the_table_of_what_is_done_and_refused_is_that_of_the_tests():
    """Else: python -m tests.features"""
    assert features.BEGIN + features.table() + features.END in features.INTEROP.read_text()
