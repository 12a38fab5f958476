"""The house: imports run downhill, the top level is six files, lines are short."""
import ast
from pathlib import Path

import pytest

from data.judges import RULES
from data.tasks import DOMAINS
from support import config

ROOT = Path(__file__).resolve().parent.parent
SIX = {"model", "selfedit", "lora", "inner_loop", "outer_loop", "eval"}
# From the ground up. A file imports from its own floor and from those below.
FLOORS = [{"support"}, {"engine"}, {"model", "selfedit"}, {"lora", "data"}, {"inner_loop"},
          {"outer_loop"}, {"eval", "tools", "lab", "exercises"}]
HEIGHT = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PATHS = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("exercises/*/*.py")]
FILES = [path.relative_to(ROOT) for path in sorted(PATHS)]


def rooms_imported(path) -> set[str]:
    """The folders and files of the top level that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & HEIGHT.keys()


def test_the_top_level_is_the_six_files_that_the_user_named():
    assert {path.stem for path in ROOT.glob("*.py")} == SIX


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0].removesuffix(".py") in HEIGHT],
                         ids=str)
def test_imports_run_downhill(path):
    room = path.parts[0].removesuffix(".py")
    above = {other for other in rooms_imported(path) if HEIGHT[other] > HEIGHT[room]}
    # `outer_loop.py --plan` hands over to tools/plan.py, which counts what the loop would do, and
    # `python selfedit.py` reads a passage as all programs do.
    assert above <= {"outer_loop": {"tools"}, "selfedit": {"data"}}.get(room, set())
    assert room == "lab" or "lab" not in rooms_imported(path)


@pytest.mark.parametrize("name", sorted(SIX))
def test_a_core_file_is_read_in_one_sitting(name):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) <= 420


def test_lines_are_short():
    for path in FILES:
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            assert len(line) <= 100, f"{path}:{number}"


def test_the_settings_name_every_domain_and_judge():
    assert config.DOMAINS == tuple(DOMAINS)
    assert config.JUDGES == (*RULES, "model", "openai")
