"""The lecture's notebook runs from top to bottom; docs/figures.py draws the figures."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTEBOOK = DOCS / "nanoseal.ipynb"
FIGURES = ("loops.svg", "ribbon.svg")
# One thread, and no window for the plot.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def cells(kind):
    book = json.loads(NOTEBOOK.read_text())
    return [cell for cell in book["cells"] if cell["cell_type"] == kind]


def script():
    """All code cells, one after the other."""
    return "\n".join("".join(cell["source"]) for cell in cells("code"))


def run(*words, **options):
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240,
                          env=ENVIRONMENT, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed():
    """What the notebook prints when it is run from docs, as Jupyter does."""
    return run("-", cwd=DOCS, input=script())


def numbers(pattern, text):
    """The groups of the one place where the pattern is found, as numbers."""
    (found,) = re.findall(pattern, text)
    return [float(number) for number in found] if isinstance(found, tuple) else float(found)


@pytest.mark.slow
def test_the_model_knows_more_afterwards(printed):
    before, asked = numbers(r"right before: (\d+) of (\d+)", printed)
    after, asked_again = numbers(r"right after: (\d+) of (\d+)", printed)

    assert asked == asked_again == 11
    assert before <= 2
    assert after >= before + 2


@pytest.mark.slow
def test_self_edits_differ_in_their_reward(printed):
    rewards = [float(r) for r in re.findall(r"^self-edit \d: reward (\S+)$", printed, re.MULTILINE)]
    best = numbers(r"--- best: self-edit \d, reward (\S+)", printed)
    worst = numbers(r"--- worst: self-edit \d, reward (\S+)", printed)

    assert len(rewards) == 8
    assert (best, worst) == (max(rewards), min(rewards))
    assert best >= worst + .1
    # It prints two decimals of each.
    mean = numbers(r"J, estimated from 8 self-edits of one task: (\S+)", printed)
    assert mean == pytest.approx(sum(rewards) / 8, abs=.011)


@pytest.mark.slow
def test_the_notes_that_it_suggests_are_good(printed):
    mine = numbers(r"my notes: reward (\S+)", printed)
    passage = numbers(r"the passage alone: reward (\S+)", printed)

    assert mine >= passage + .1


def test_it_is_committed_without_outputs():
    for cell in cells("code"):
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


def test_it_is_clean_json():
    text = NOTEBOOK.read_text()
    book = json.loads(text)
    ids = [cell["id"] for cell in book["cells"]]

    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    assert text == json.dumps(book, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_its_cells_are_short():
    code = cells("code")

    assert 8 <= len(code) <= 12
    assert max(len(cell["source"]) for cell in code) <= 25
    assert max(len(line) for line in script().splitlines()) <= 100


def test_its_links_and_pictures_exist():
    text = "".join("".join(cell["source"]) for cell in cells("markdown"))
    local = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]

    assert set(FIGURES) <= set(local)
    assert [target for target in local if not (DOCS / target).exists()] == []


def texts_of(svg):
    return re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)


def test_the_figures_are_what_their_program_draws(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")

    run(str(DOCS / "figures.py"), str(tmp_path))

    for name in FIGURES:
        drawn, kept = (tmp_path / name).read_text(), (DOCS / name).read_text()
        assert texts_of(drawn) == texts_of(kept) != []
        # Drawn by this version; others may write the same drawing in other bytes.
        if matplotlib.__version__ == "3.11.2":
            assert drawn == kept


def test_every_function_in_a_figure_exists():
    named = []
    for name in FIGURES:
        for text in texts_of((DOCS / name).read_text()):
            named += re.findall(r"\b([a-z_]+)\.([A-Za-z_]+)", text)

    folders = {path.stem: ".".join(path.relative_to(DOCS.parent).with_suffix("").parts)
               for folder in ("", "engine/") for path in DOCS.parent.glob(f"{folder}*.py")}
    missing = [f"{module}.{function}" for module, function in named
               if not hasattr(importlib.import_module(folders[module]), function)]

    assert len(named) >= 10
    assert missing == []
