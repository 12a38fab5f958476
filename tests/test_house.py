"""The house: imports run downhill, no core file is too large, lines are short."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up. A file may import from those before it, in its functions as well.
FLOORS = ["support.files", "support.ranks", "support.records", "support.checkpoint",
          "support.progress", "engine.gpu", "engine.memory", "support.stats",
          "support.tokenizer", "engine.ribbon", "model", "engine.decode",
          "engine.padding", "engine.packing", "engine.update", "engine.train", "lora",
          "selfedit", "data.judges", "data.knowledge", "data.text", "data.arc",
          "data.tinyworld", "data.tinyarc", "data.pretrain_tiny", "inner_loop",
          "support.config", "support.report", "support.page", "support.run", "tools.plan",
          "outer_loop", "eval", "tools.bench", "lab.show", "lab.experiment", "lab.tiny",
          "lab.writers", "lab.keeping", "lab.curve", "lab.reliability", "lab.judges",
          "lab.recipe", "lab.paired", "lab.imitate", "lab.lines", "lab.forgetting",
          "lab.skill", "lab.vector", "lab.objective", "lab.retention_reward",
          "lab.compute", "lab.credit", "lab.update_rule", "lab.choosing", "lab.proxy",
          "lab.proxy_run", "lab.race", "lab.speedrun", "lab.teacher"]
CORE = ["outer_loop", "inner_loop", "selfedit", "lora", "model"]


def path_of(name):
    return ROOT / (name.replace(".", "/") + ".py")


def our_imports(path):
    """The files of ours that a file imports anywhere, by their names in FLOORS."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
            # `from data import arc` imports data.arc
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found & set(FLOORS)


def test_every_file_has_a_floor():
    files = [*ROOT.glob("*.py")]
    for folder in ("support", "engine", "data", "tools", "lab"):
        files += ROOT.glob(f"{folder}/*.py")
    names = {str(f.relative_to(ROOT).with_suffix("")).replace("/", ".") for f in files}
    assert {name for name in names if not name.endswith("__init__")} == set(FLOORS)


def test_the_top_level_is_the_six_files_that_the_user_named():
    assert {path.stem for path in ROOT.glob("*.py")} == {
        "model", "lora", "selfedit", "inner_loop", "outer_loop", "eval"}


@pytest.mark.parametrize("name", FLOORS)
def test_imports_run_downhill(name):
    below = FLOORS[:FLOORS.index(name)]
    assert our_imports(path_of(name)) <= set(below)


def test_nothing_imports_the_lab():
    for name in FLOORS:
        if not name.startswith("lab."):
            assert not any(other.startswith("lab.") for other in our_imports(path_of(name)))


@pytest.mark.parametrize("name", CORE)
def test_a_core_file_is_read_in_one_sitting(name):
    assert len(path_of(name).read_text().splitlines()) <= 420


def test_lines_are_short():
    long = []
    for folder in ("", "support", "engine", "data", "tools", "lab", "tests"):
        for path in (ROOT / folder).glob("*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if len(line) > 100:
                    long.append(f"{path.relative_to(ROOT)}:{number}")
    assert long == []
