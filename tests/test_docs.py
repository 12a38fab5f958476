"""README and docs: every command that they show can be parsed, every file and name exists."""
import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What stands for something of the reader's own.
PLACEHOLDERS = {"S": "0", "N": "1", "L": "1"}


def commands_of(path):
    """The `python ...` commands of a document, a list of words each."""
    text = path.read_text().replace("\\\n", " ")
    shown = re.findall(r"^(?:    )?(python .*)$", text, re.MULTILINE)    # in a block
    shown += re.findall(r"`(?:[^`\n]*&& )?(python [^`]+)`", text)       # in a line
    commands = []
    for command in shown:
        words = shlex.split(command.split("  #")[0])[1:]
        if words[:2] != ["-m", "pytest"]:
            commands.append([PLACEHOLDERS.get(word, word) for word in words])
    return commands


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


def names_of(path):
    """The words in backticks."""
    return set(re.findall(r"`([\w./]+)`", path.read_text()))


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_every_file_that_is_named_exists(document):
    made_by_a_run = {"report.html", "config.json", "edits.jsonl", "rollouts.jsonl", "metrics.jsonl"}
    files = {name for name in names_of(document) if re.search(r"\.(py|json|jsonl|svg|md)$", name)}

    missing = [name for name in files - made_by_a_run if not (ROOT / name).exists()]

    assert missing == []


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_every_function_that_is_named_exists(document):
    """`outer_loop.rest_em`, `Outcome.reward`: a module or class of ours, and a name in it."""
    import inner_loop
    import selfedit
    from support import tokenizer
    owners = {"Outcome": inner_loop.Outcome, "Task": selfedit.Task,
              "Tokenizer": tokenizer.Tokenizer}
    for folder in ("", "engine/", "support/", "tools/", "data/"):
        for file in ROOT.glob(f"{folder}[a-z]*.py"):
            owners[file.stem] = importlib.import_module(folder.replace("/", ".") + file.stem)

    missing = []
    for name in names_of(document):
        owner, _, attribute = name.partition(".")
        if owner in owners and attribute and attribute not in ("py", "json", "html"):
            if not hasattr(owners[owner], attribute.split(".")[0]):
                missing.append(name)

    assert missing == []


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    local = [target for target in targets if not target.startswith("http")]

    missing = [target for target in local if not (document.parent / target).exists()]

    assert missing == []


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()

    assert len(lines) <= 120
    assert sum(len(line.split()) for line in lines) <= 1200
    assert max(len(line) for line in lines) <= 110
