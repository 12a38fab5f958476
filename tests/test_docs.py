"""README and docs: every command can be parsed, every name exists; every change of EXTENDING.md
applies to a copy of the project and does what it says; notebook and slides are made anew."""
import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import features
from tests.helpers import ROOT, python, read_lines

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PLACEHOLDERS = {"S": "0", "N": "1", "L": "1"}


def commands_of(path):
    text = path.read_text().replace("\\\n", " ")
    shown = re.findall(r"^(?:    )?(python .*)$", text, re.MULTILINE)    # in a block
    shown += re.findall(r"`(?:[^`\n]*&& )?(python [^`]+)`", text)       # in a line
    commands = [shlex.split(command.split("  #")[0])[1:] for command in shown]
    return [[PLACEHOLDERS.get(word, word) for word in words] for words in commands
            if words[:2] != ["-m", "pytest"] and not words[0].startswith("docs/")]


ALL_COMMANDS = [(path.name, command) for path in DOCS for command in commands_of(path)]
assert len(ALL_COMMANDS) > 15


class Parsed(Exception):
    pass


@pytest.mark.parametrize("document, words", ALL_COMMANDS, ids=lambda x: " ".join(x)[:60])
def test_a_command_can_be_parsed(document, words, monkeypatch):
    """The program's own parser takes it, and would go on from there."""
    name, words = (words[1], words[1:]) if words[0] == "-m" else (Path(words[0]).stem, words)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr("sys.argv", words)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        importlib.import_module(name).main()


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
    ("README.md", 130, 1300), ("docs/EXTENDING.md", 230, float("inf"))])
def test_what_should_be_short_is(document, lines, words):
    text = (ROOT / document).read_text()
    assert len(text.splitlines()) <= lines
    assert len(text.split()) <= words
    assert max(len(line) for line in text.splitlines()) <= 125


EXTENDING = ROOT / "docs" / "EXTENDING.md"
# What a copy is made of: no runs, no .git, nothing that an editor left.
FOLDERS = ("support", "engine", "tools", "data", "docs", "tests")
# Heading -> a word that the change brings, else its test could pass without it; what its commands
# print. One more in the document, without a test here, is noticed.
CHANGES = {
    "A prompt": ("teacher", "selfedit.py",
                 r"^You will teach the following passage to a pupil(.|\n)*\nLesson:\n\n"
                 r"--- self-edit 0"),
    "A reward": ("* len(edit.token_ids)", "inner_loop.py", r"after round 1: held-out reward "),
    "An update rule": ("softmax", "support/config.py", r"M-step: \d self-edits, "),
    "A domain": ("reversal", "support/config.py", r"every fact turned round \d"),
    "A family of models": ("Mistral", "support/checkpoint.py", "Answer:")}


def blocks():
    found = re.findall(r"^## (.*?)\n.*?^```diff\n(.*?)^```$", EXTENDING.read_text(),
                       re.MULTILINE | re.DOTALL)
    return dict(found)


def commands_to_try(block):
    head = block[:block.index("diff --git")].replace("\\\n", " ")
    return [shlex.split(line.removeprefix("Try: ")) for line in head.splitlines()]


def change(folder, heading):
    """A copy of the project with one change in it (git apply): what its commands print. Nothing is
    skipped: without git it fails."""
    block, printed = blocks()[heading], ""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name,
                        ignore=shutil.ignore_patterns("__pycache__", "*.tmp"))
    # A folder above may be a repository: then git would look for the files there.
    subprocess.run(["git", "apply"], cwd=folder, input=block, text=True, check=True,
                   env=os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)})
    for command in commands_to_try(block):
        assert command[0] == "python"
        printed += python(*command[1:], cwd=folder).stdout
    return printed


def ask(folder, program):
    """The `answer` of a few lines of Python in this copy, which may be any JSON."""
    program += "import json\nprint(json.dumps(answer))"
    return json.loads(python("-c", program, cwd=folder).stdout.splitlines()[-1])


def test_every_change_has_a_test_and_is_not_there_already():
    assert list(blocks()) == list(CHANGES)
    assert all(commands_to_try(block) for block in blocks().values())
    for word, file, _ in CHANGES.values():
        assert word not in (ROOT / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("heading", CHANGES)
def test_a_change_does_what_it_says(heading, tmp_path):
    printed = change(tmp_path, heading)
    assert re.search(CHANGES[heading][2], printed), printed
    if heading == "A reward":
        for r in read_lines(tmp_path / "runs/shorter/rollouts.jsonl"):
            penalty = 0.001 * len(r["token_ids"])
            assert r["reward"] == (pytest.approx(np.mean(r["right"]) - penalty) if r["documents"]
                                   else 0)
    if heading == "A domain":
        # Every answer is the town itself, in the baselines as well.
        for r in read_lines(tmp_path / "runs/reversal/rollouts.jsonl"):
            assert r["gold"] == [r["title"]] * 4
    if heading == "An update rule":
        # Two readable ones and one that isn't; a task of which none can be read.
        (*first, one), (*second, other) = ask(tmp_path, """
from outer_loop import weigh
from selfedit import SelfEdit
from support.config import Config
good, bad = SelfEdit(documents=["a"]), SelfEdit()
answer = weigh(Config(update="softmax"), [[0.5, 0.4, 0], [0, 0, 0]],
               [[good, good, bad], [bad] * 3], [0, 0], 0)
""")
        assert [first, second] == [[0, 0], [0, 1]]
        assert one + other == pytest.approx(3)
        assert one / other == pytest.approx(np.e)
    if heading == "A family of models":
        # Within the sliding window it is theirs; beyond it ours would be another model.
        within, beyond, window = ask(tmp_path, """
import torch
from transformers import MistralForCausalLM
from model import load_pretrained
model = load_pretrained("runs/mistral", "cpu", torch.float64)
theirs = MistralForCausalLM.from_pretrained("runs/mistral", dtype=torch.float64)
ids = torch.randint(0, 256, (1, 600))
with torch.no_grad():
    gap = (model(ids) - theirs(ids).logits)[0].abs().amax(1)
answer = [gap[:512].max().item(), gap[512:].max().item(), model.config.max_len]
""")
        assert window == 512
        assert within < 1e-4        # both compute RoPE's angles in float32
        assert beyond > 1e-2


NOTEBOOK = ROOT / "docs" / "nanoseal.ipynb"
FIGURES = [ROOT / "docs" / "loops.svg", ROOT / "docs" / "ribbon.svg"]
BOOK = json.loads(NOTEBOOK.read_text())
CODE = [cell for cell in BOOK["cells"] if cell["cell_type"] == "code"]
SCRIPT = "\n".join("".join(cell["source"]) for cell in CODE)


def printed_by(cells):
    """What these cells print; pictures differ between versions of matplotlib."""
    outputs = [output for cell in cells for output in cell["outputs"]]
    return "".join("".join(output.get("text", "")) for output in outputs)


@pytest.mark.slow
def test_the_notebook_prints_what_is_saved_in_it(tmp_path):
    """Else: python docs/notebook.py. On one thread and with its seeds nothing varies."""
    pytest.importorskip("matplotlib")
    python("docs/notebook.py", tmp_path / "again.ipynb")
    again = json.loads((tmp_path / "again.ipynb").read_text())
    cells = [cell for cell in again["cells"] if cell["cell_type"] == "code"]
    assert printed_by(cells) == printed_by(CODE)


def numbers(pattern, text):
    """The groups of the one place where the pattern is found, as numbers."""
    (found,) = re.findall(pattern, text)
    return [float(number) for number in found] if isinstance(found, tuple) else float(found)


def test_what_is_saved_in_the_notebook_is_what_its_text_says():
    printed = printed_by(CODE)

    # The reversal curse: each time the forward question, then the reverse one.
    answers = re.findall(r"(?:called|which town)\? +(\w+)", printed_by(CODE[:1]))
    assert answers[1] != "Halmora"
    assert [answers[0], *answers[2:]] == ["Tarwen", "Tarwen", "Halmora"]

    before, asked = numbers(r"right before: (\d+) of (\d+)", printed)
    after, asked_again = numbers(r"right after the self-edit: (\d+) of (\d+)", printed)
    alone, _ = numbers(r"right after the passage alone: (\d+) of (\d+)", printed)
    assert asked == asked_again == 11
    assert before <= 2
    assert after > alone >= before + 2

    found = re.findall(r"^self-edit \d: reward (\S+) \(", printed, re.MULTILINE)
    rewards = [float(reward) for reward in found]
    best = numbers(r"--- best: self-edit \d, reward (\S+)", printed)
    worst = numbers(r"--- worst: self-edit \d, reward (\S+)", printed)
    assert len(rewards) == 8
    assert (best, worst) == (max(rewards), min(rewards))
    assert best >= worst + .1
    # The notes that it suggests are good.
    mine, passage = numbers(r"my notes: reward (\S+), the passage alone: (\S+)", printed)
    assert mine >= passage + .1


def test_the_notebook_is_short_and_was_run_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    assert all(cell["outputs"] for cell in CODE)
    assert NOTEBOOK.stat().st_size < 150_000
    assert 8 <= len(CODE) <= 12
    assert max(len(cell["source"]) for cell in CODE) <= 25
    assert max(len(line) for line in SCRIPT.splitlines()) <= 100
    assert NOTEBOOK.read_text() == (
        json.dumps(BOOK, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    text = "".join("".join(cell["source"]) for cell in BOOK["cells"] if cell not in CODE)
    local = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert {path.name for path in FIGURES} <= set(local)
    assert [target for target in local if not (ROOT / "docs" / target).exists()] == []


def test_the_slides_are_what_their_program_makes(tmp_path):
    """Else: python docs/slides.py"""
    python("docs/slides.py", tmp_path / "slides.html")
    made = (tmp_path / "slides.html").read_text()
    assert made == (ROOT / "docs" / "slides.html").read_text()
    # Ten pages, of at most 30 words and one figure each; an id names one thing.
    pages = re.sub(r"<svg.*?</svg>", "", made, flags=re.DOTALL).split("<section>")[1:]
    shown = [re.sub(r"<h1>.*</h1>|<pre>.*</pre>|<[^>]+>", " ", page, flags=re.DOTALL)
             for page in [page.split("<footer>")[0] for page in pages]]
    assert len(pages) == 10
    assert max(len(re.findall(r"[A-Za-z][\w-]*", words)) for words in shown) <= 30
    ids = re.findall(r'\bid="([^"]+)"', made)
    assert len(set(ids)) == len(ids)


def texts_of(svg):
    return re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)


@pytest.mark.slow
def test_the_figures_are_what_their_program_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    python("docs/figures.py", tmp_path)
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


def test_the_table_of_what_is_done_and_refused_is_that_of_the_tests():
    """Else: python -m tests.features"""
    assert features.BEGIN + features.table() + features.END in features.INTEROP.read_text()
