"""Data from outside, damaged in every way: a file loads, or is refused in one line that names it.
And text that a model writes: a reader understands it or says ValueError."""
import json
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from data import arc, knowledge, tinyworld
from eval import imported
from selfedit import TOOLS, read_json_edit, split_documents, write_json_edit
from support.files import UserError

# ------------------------------------------------------------------------------- damaged files

PASSAGES = [{"title": f"Town {i}", "context": "It lies on the Ob.",
             "questions": [{"question": "Which river?", "answer": "Ob"}]} for i in range(2)]
EDITS = [{"title": "A", "context": "About a.", "edits": {"mine": "x"}},
         {"title": "A", "context": "About a.", "released": {"theirs": {"edit": "y"}}}]
PAIRS = [{"input": [[1, 2]], "output": [[2, 1]]}, {"input": [[3, 4]], "output": [[4, 3]]}]
PUZZLE = {"train": PAIRS, "test": PAIRS[:1]}
CHALLENGES = {"aa": {"train": PAIRS, "test": [{"input": [[5, 6]]}]}}
SOLUTIONS = {"aa": [[[6, 5]]]}


def load_passages(folder):
    knowledge.load(folder / "passages.json", log=lambda line: None)


def load_edits(folder):
    imported([folder / "edits.json"], [SimpleNamespace(name="A", context=["A\nAbout a."])])


def load_puzzle(folder):
    arc.load(str(folder))


def load_kaggle(folder):
    arc.load(str(folder / "arc_challenges.json"))


# kind of file -> (what reads it, the whole files, the one that is damaged)
KINDS = {
    "passages": (load_passages, {"passages": PASSAGES}, "passages"),
    "edits": (load_edits, {"edits": EDITS}, "edits"),
    "puzzle": (load_puzzle, {"aa": PUZZLE}, "aa"),
    "challenges": (load_kaggle, {"arc_challenges": CHALLENGES, "arc_solutions": SOLUTIONS},
                   "arc_challenges"),
    "solutions": (load_kaggle, {"arc_challenges": CHALLENGES, "arc_solutions": SOLUTIONS},
                  "arc_solutions")}
# In place of a whole file.
CONTENTS = ["", "{", "null", "3", "[]", "{}", "[null]", '"text"', "[" * 100_000, "1" * 5000,
            '["\\ud800"]', b"\xff\xfe[]"]
# In place of a value anywhere in it.
VALUES = [None, True, -1, 10 ** 40, 0.5, float("nan"), "", " ", "\ud800", "\0\x1b[2J\n", "!!!",
          "x" * 2_000_000, [], {}, [[]], [[1] * 31], [[[1]]], {"a": 1}, [0] * 1_000_000]


def places_in(value):
    """Every value inside a JSON value, as (what holds it, its key)."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = []
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += places_in(value[key])
    return found


def damaged(value, rng):
    """A copy of a JSON value with one thing in it replaced, lost or too often there."""
    value = json.loads(json.dumps(value))
    holder, key = rng.choice(places_in(value))
    way = rng.randrange(6)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, list):
        holder += holder[key:] * 40
    else:
        holder[key] = rng.choice(VALUES)
    return json.dumps(value)


HOSTILE = [(kind, content) for kind in KINDS for content in CONTENTS]
HOSTILE += [(kind, seed) for kind in KINDS for seed in range(20)]


@pytest.mark.parametrize("kind, content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_file_loads_or_is_refused_in_one_line(kind, content, tmp_path):
    load, whole, name = KINDS[kind]
    for other, value in whole.items():
        (tmp_path / f"{other}.json").write_text(json.dumps(value))
    if isinstance(content, int):
        content = damaged(whole[name], random.Random(f"{kind} {content}"))
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / f"{name}.json").write_bytes(content)

    begin = time.time()
    try:
        load(tmp_path)
    except UserError as e:
        assert str(tmp_path) in str(e)
        assert "\n" not in str(e)
        assert len(str(e)) < 1000
    assert time.time() - begin < 5


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_files_load(kind, tmp_path):
    load, whole, _ = KINDS[kind]
    for name, value in whole.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    load(tmp_path)


# ------------------------------------------------------------------------------- exchanged edits

A = {"title": "A", "context": "About a."}


@pytest.mark.parametrize("record, words", [
    (3, "not an object"),
    ({"edits": {"x": "y"}}, '"title" must be'),
    ({"title": "A", "edits": {"x": "y"}}, '"context" must be'),
    (A | {"edits": {"x": None}}, '"edits" must be'),
    (A | {"edits": {"x": ["y"]}}, '"edits" must be'),
    (A | {"edits": None}, '"edits" must be'),
    (A | {"edits": {"\x1b[2J": "y"}}, "can be printed"),
    (A | {"released": {"x": "y"}}, '"released" must be'),
    (A | {"released": {"x": {"edit": 5}}}, '"edits" must be'),
])
def test_what_is_wrong_with_an_exchanged_self_edit_is_said(record, words, tmp_path):
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([A | {"edits": {"x": "y"}}, record]))

    with pytest.raises(UserError, match=f"edits.json: record 1: .*{words}"):
        imported([path], [])


# ------------------------------------------------------------------------------- written by a model

TOWN = tinyworld.make_town(random.Random(0), out=True)
NOTES = [TOWN.say(relation, form, random.Random(0)) for relation, form in TOWN.notes()]
# reader -> texts that it understands
READERS = {
    split_documents: ["Sure:\n1. One.\n2. Two.", "a\n---\nb", "Question 1: A?\nAnswer: B.\n"],
    read_json_edit: [write_json_edit(list(TOOLS), True, 1e-4, 2), write_json_edit([], False, 1, 9)],
    arc.read_grid: ["1", "12\n34", "000\n999\n555"],
    lambda line: tinyworld.classify(line, TOWN.passage): NOTES + TOWN.sentences,
    tinyworld.read_directive: ["Study at rate 0.003 for 10 rounds."]}
PIECES = [*"019 \n\r\t\0\x1b\x85\u2028\"\\{}[]:,.-+eE", "１", "é", "\u202e", "\ud800", "😀",
          "null", "NaN", "true", "1e999", "Question 1:", "Answer:", "---", "\\ud800", "9" * 5000,
          "[" * 2000]


def garbled(text, rng):
    """A text with some of it lost, twice there, or in between others."""
    for _ in range(rng.randrange(5)):
        a, b = sorted(rng.choices(range(len(text) + 1), k=2))
        text = rng.choice([text[:a] + text[b:], text[:b] + text[a:],
                           text[:a] + rng.choice(PIECES) + text[a:], rng.choice(PIECES)])
    return text


@pytest.mark.parametrize("reader", READERS, ids=["passages", "puzzles", "grids", "notes", "study"])
def test_whatever_a_model_writes_is_understood_or_refused(reader):
    rng = random.Random(0)
    understood = 0
    for _ in range(10_000):
        text = garbled(rng.choice(READERS[reader]), rng)
        try:
            understood += reader(text) is not None
        except ValueError:
            pass
    assert 0 < understood


def test_what_is_read_as_a_grid_is_one():
    rng = random.Random(0)
    for _ in range(1000):
        grid = arc.read_grid(garbled("12\n34", rng))
        if grid is not None:
            assert grid.dtype == np.int8
            assert max(grid.shape) <= arc.MAX_SIDE
            assert set(grid.flat) <= set(range(10))
