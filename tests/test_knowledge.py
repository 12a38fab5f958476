"""Passages: data files, what a task asks, the documents of a self-edit. And all data from outside,
damaged in every way: a file loads, or is refused in one line; so is text that a model writes."""
import hashlib
import json
import random
import sys
import time
import urllib.request
from dataclasses import replace
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import arc, judges, knowledge, study, tinyworld
from data.arc import TOOLS, read_json_edit, write_json_edit
from data.choices import write_choices
from data.knowledge import read_edits
from inner_loop import SMALL, make_job
from selfedit import EMPTY, read_self_edit, split_documents
from support.files import UserError, cli
from tests.helpers import SMALL as SMALL_RUN, run_it
from tests.make_checkpoint import make_checkpoint

EXAMPLES = Path(__file__).resolve().parent.parent / "data"
# The first passage of the fixture `passages`.
PASSAGE = "Town 0\nThe river of town 0 is the Ob0. It was founded by Ana0 Reis."


@pytest.fixture()
def path(tmp_path):
    return tmp_path / "data.json"


def loaded(path, **settings):
    """(the tasks of a data file, what is logged)."""
    lines = []
    return knowledge.load(path, log=lines.append, **settings), lines


# ------------------------------------------------------------------------------- a task

def test_a_passage_is_shown_when_a_self_edit_is_asked_for_and_not_to_the_questions(passages):
    task = knowledge.load(passages)[0]

    assert task.name == "Town 0"
    assert task.context == [PASSAGE]
    assert task.prompt.endswith(f"Passage:\n{PASSAGE}\n\nImplications:\n")
    assert task.questions == ["Which river?", "Who founded it?"]
    assert task.answers == ["Ob0", "Ana0 Reis"]
    assert task.queries == [
        "Let's answer a question directly and concisely.\n"
        "Question: Topic: Town 0\nWhich river?\nAnswer:\n",
        "Let's answer a question directly and concisely.\n"
        "Question: Topic: Town 0\nWho founded it?\nAnswer:\n"]
    # The passage alone is there to compare with.
    assert task.references.keys() == {"passage only"}
    assert task.references["passage only"].documents == [PASSAGE]


def test_the_prompt_and_the_judge_may_be_others(passages):
    def none_is_right(triples):
        return [False] * len(triples)

    other = knowledge.load(passages, prompt="self-qa", judge=none_is_right)[0]
    assert other.prompt.endswith(f"Passage:\n{PASSAGE}\n\nQuestion 1: ")
    assert other.judge is none_is_right
    assert knowledge.load(passages)[0].judge is judges.RULES["rule"]


@pytest.mark.parametrize("text, max_documents, documents, note", [
    (" a\nb ", 0, ["Town 0\na", "Town 0\nb", PASSAGE], ""),
    ("a\nb\nc\nd", 2, ["Town 0\na", "Town 0\nb", PASSAGE], ""),
    (" \n ", 0, [], EMPTY)])
def test_documents_are_the_pieces_under_the_title_and_the_passage(
        text, max_documents, documents, note, passages):
    edit = read_self_edit(knowledge.load(passages, max_documents=max_documents)[0], text)
    assert edit.documents == documents
    assert edit.note == note


@pytest.mark.parametrize("name", ["train", "eval"])
def test_example_passages_hold_their_answers(name):
    tasks = knowledge.load(EXAMPLES / f"example_{name}.json")
    assert len(tasks) > 1
    for task in tasks:
        assert len(task.questions) == 3
        for answer in task.answers:
            assert judges.substring("", answer, task.context[0])


# ------------------------------------------------------------------------------- data files

def asked(question, *answers, **more):
    """A question as SQuAD has it."""
    given = [{"text": answer, "answer_start": 0} for answer in answers]
    return {"id": f"id of {question}", "question": question, "answers": given} | more


def article(title, *paragraphs):
    """An article as SQuAD has it. A paragraph is (context, its questions)."""
    return {"title": title, "paragraphs": [{"context": context, "qas": list(qas)}
                                           for context, qas in paragraphs]}


ARTICLES = [
    article("Nikola_Tesla",
            ("He was born in Smiljan.", [asked("Where was he born?", "Smiljan", "in Smiljan")]),
            ("He died in 1943.", [asked(" When did he die? ", "1943"), asked("Who?", "He")])),
    article("Ob", ("The Ob is a river.", [asked("What is the Ob?", "a river")]))]
IMPOSSIBLE = asked("Who never died?", is_impossible=True,
                   plausible_answers=[{"text": "He", "answer_start": 0}])
QUESTION = asked("Q?", "A")
PARAGRAPH = {"context": "C", "qas": [QUESTION]}


def asking(*questions):
    """A whole file of SQuAD's with these questions."""
    return {"version": "1.1", "data": [article("T", ("C", questions))]}


GOOD = {"title": "T", "context": "C", "questions": [{"question": "Q?", "answer": "Ob"}]}
# what is said -> the content of a file
MALFORMED = {
    "not readable as JSON": ["", json.dumps([GOOD | {"title": "a\ud800"}])],
    "not a JSON list": [{}, []],
    # The second record is number 1.
    "record 0: not an object": [[3]],
    'record 1: "title"': [[GOOD, GOOD | {"title": 5}]],
    'record 0: "context"': [[GOOD | {"context": " "}]],
    'record 1: "context" .* 1,000,000 characters': [[GOOD, GOOD | {"context": "a " * 500_001}]],
    'record 0: "title" .* 1,000,000 characters': [[GOOD | {"title": "a" * 1_000_001}]],
    'record 0: "questions"': [[{"title": "T", "context": "C"}]],
    "record 0: question 0 must have": [
        [GOOD | {"questions": [question]}] for question in (
            "Q?", {"question": "Q?"}, {"question": "Q?", "answer": 5},
            {"question": "", "answer": "A"})],
    "no passage has questions": [[GOOD | {"questions": []}], {"data": []}],
    # SQuAD's own JSON.
    '"data" must be a list': [{"data": 3}, {"data": {"title": "T"}}],
    'data 0: "paragraphs" must be a list': [{"data": [3]}],
    'data 1: "paragraphs" must be a list': [{"data": [ARTICLES[0], {"title": "T"}]}],
    'data 0: paragraphs 0: "qas" must be a list': [{"data": [{"title": "T", "paragraphs": [3]}]}],
    'data 0: paragraphs 1: "qas" must be a list': [
        {"data": [{"title": "T", "paragraphs": [PARAGRAPH, {"context": "C", "qas": {}}]}]}],
    'data 0: paragraphs 0: "title" must be': [{"data": [{"title": 5, "paragraphs": [PARAGRAPH]}]}],
    'data 0: paragraphs 0: "context" must be': [
        {"data": [{"title": "T", "paragraphs": [PARAGRAPH | {"context": " "}]}]}],
    'data 0: paragraphs 0: qas 0: "answers" must be a list': [
        asking("Q?"), asking(QUESTION | {"answers": "A"})],
    # A question that is left out counts.
    'data 0: paragraphs 0: qas 1: "question" and "text"': [asking(IMPOSSIBLE, asked(None, "A"))],
    'data 0: paragraphs 0: qas 0: "question" and "text"': [
        asking(asked("Q?", 5)), asking(QUESTION | {"answers": ["A"]})]}


@pytest.mark.parametrize("said", MALFORMED)
def test_what_is_wrong_with_a_data_file_is_one_line(said, path):
    for content in MALFORMED[said]:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(UserError, match=said) as error:
            loaded(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["notes.txt", "NOTES.MD"])
def test_plain_text_is_for_another_program_and_what_is_not_there_is_said(name, tmp_path):
    path = tmp_path / name
    path.write_text("The Ob is a river.\n")
    with pytest.raises(UserError, match="no questions") as error:
        knowledge.load(path)
    assert f"python -m tools.learn {path}" in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        knowledge.load(path)


def test_a_passage_without_questions_is_skipped_and_said(path):
    title = "\x1b[2J\n" + "long " * 1000
    path.write_text(json.dumps([GOOD | {"title": title, "questions": []}, GOOD]))
    tasks, (line,) = loaded(path)
    assert len(tasks) == 1
    assert "record 0" in line
    assert "no questions" in line
    # The title is shown as far as it can be printed.
    assert line.isprintable()
    assert len(line) < 200 + len(str(path))


@pytest.mark.parametrize("answer", ["the", "A", "!!!", "$", "a - an"])
def test_a_gold_answer_that_no_rule_can_find_is_said(answer, path):
    questions = [{"question": "Q?", "answer": gold} for gold in ("Ob", answer)]
    path.write_text(json.dumps([GOOD, GOOD | {"questions": questions}]))
    tasks, lines = loaded(path)
    assert len(tasks) == 2
    assert lines == [f"note: {path}: record 1, question 1: gold answer {answer!r} has no word in "
                     "it: no answer can be right"]
    assert judges.RULES["rule"]([("Q?", answer, answer)]) == [False]
    # A model that judges may find it.
    assert loaded(path, judge=lambda triples: [True] * len(triples))[1] == []


def test_squads_own_json_is_read_as_it_is(path):
    path.write_text(json.dumps({"version": "1.1", "data": ARTICLES}))
    (born, died, river), _ = loaded(path)
    assert [born.name, died.name, river.name] == ["Nikola Tesla", "Nikola Tesla", "Ob"]
    assert died.context == ["Nikola Tesla\nHe died in 1943."]
    assert died.questions == ["When did he die?", "Who?"]
    assert died.answers == ["1943", "He"]
    assert born.answers == ["Smiljan"]
    # So is a file of the official release.
    path.write_text(json.dumps([GOOD | {"released_edits": [{"text": "1. x"}], "released_pick": 0}]))
    assert loaded(path)[0][0].answers == ["Ob"]


def test_what_a_passage_does_not_answer_is_not_asked(path):
    # SQuAD is made by hand: a blank would not make all the rest unreadable.
    articles = [article("Mixed", ("He died.", [IMPOSSIBLE, asked("Who died?", "He"),
                                               asked(" ", "He"), asked("Who lived?")])),
                article("None_left", ("He died.", [IMPOSSIBLE]))]
    path.write_text(json.dumps({"version": "2.0", "data": articles}))
    (task,), lines = loaded(path)
    assert task.questions == ["Who died?"]
    assert lines == [f"skipped: {path}: data 1: paragraphs 0 ('None left') has no questions"]


# ------------------------------------------------------------------------------- to fetch SQuAD

def publish(folder, split, articles):
    """A file on the site: (its name, the hash that is known)."""
    path = folder / f"{split}.json"
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return path.name, hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@pytest.fixture()
def site(monkeypatch, tmp_path):
    """A folder in place of SQuAD's site. What is in it is what is known."""
    folder = tmp_path / "site"
    folder.mkdir()
    squad = {"train": publish(folder, "train", ARTICLES),
             "validation": publish(folder, "validation", ARTICLES[1:])}
    monkeypatch.setattr(knowledge, "SITE", folder.as_uri())
    monkeypatch.setattr(knowledge, "SQUAD", squad)
    return folder


@pytest.fixture()
def fetch(monkeypatch, tmp_path):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["knowledge", "fetch", "squad", *map(str, words)])
        knowledge.main()

    monkeypatch.chdir(tmp_path)
    return call


def nothing_new(folder):
    return [path.name for path in folder.iterdir()] == ["site"]


def test_fetched_passages_are_a_data_file(site, fetch, tmp_path, capsys):
    fetch()

    path = tmp_path / "squad_train.json"
    assert json.loads(path.read_text())[1] == {
        "title": "Nikola Tesla", "context": "He died in 1943.",
        "questions": [{"question": "When did he die?", "answer": "1943"},
                      {"question": "Who?", "answer": "He"}]}
    assert len(knowledge.load(path)) == 3
    assert capsys.readouterr().out == (
        "squad_train.json: 3 of 3 passages (SQuAD v1.1, CC BY-SA 4.0)\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["site", "squad_train.json"]
    # The other split.
    fetch("--split", "validation", "--out", "mine.json")
    assert [task.name for task in knowledge.load(tmp_path / "mine.json")] == ["Ob"]


def test_a_passage_that_is_there_twice_is_one(site, fetch, tmp_path, monkeypatch):
    twice = [article("T", ("C", [asked("One?", "1")]), ("D", [asked("Two?", "2")]),
                     ("C", [asked("Three?", "3")]))]
    monkeypatch.setitem(knowledge.SQUAD, "train", publish(site, "train", twice))
    fetch("--out", "mine.json")
    first, second = knowledge.load(tmp_path / "mine.json")
    assert first.questions == ["One?", "Three?"]
    assert second.questions == ["Two?"]


def test_passages_are_drawn_by_the_seed_and_stay_in_order(site, fetch, monkeypatch):
    many = [article("T", *((f"{i}.", [asked("Q?", "A")]) for i in range(100)))]
    monkeypatch.setitem(knowledge.SQUAD, "train", publish(site, "train", many))

    def drawn(seed, name):
        fetch("--passages", 20, "--seed", seed, "--out", name)
        return [int(record["context"][:-1]) for record in json.loads(Path(name).read_text())]

    one, again, other = drawn(1, "a.json"), drawn(1, "b.json"), drawn(2, "c.json")
    assert one == again != other
    assert one == sorted(set(one))
    assert len(one) == 20


def test_a_file_that_can_not_be_had_is_said(site, fetch, tmp_path):
    with pytest.raises(UserError, match="--passages 4: there are 3"):
        fetch("--passages", 4)
    (site / "train.json").write_text("<html>Please log in to this network</html>")
    with pytest.raises(UserError, match="its SHA-256 is not the known one"):
        fetch()
    (site / "train.json").unlink()
    with pytest.raises(UserError, match="could not be fetched .URLError"):
        fetch()
    assert nothing_new(tmp_path)


@pytest.mark.parametrize("out, said", [("mine.json", "mine.json exists already"),
                                       ("none/squad.json", "none: no such folder")])
def test_what_can_not_be_written_is_said_before_anything_is_downloaded(
        out, said, site, fetch, tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text("mine")
    monkeypatch.setattr(urllib.request, "urlopen", None)
    with pytest.raises(UserError, match=said):
        fetch("--out", out)
    assert (tmp_path / "mine.json").read_text() == "mine"


@pytest.mark.parametrize("problem", [
    OSError("no network\nat all"), TimeoutError("timed out"), IncompleteRead(b"{"),
    ValueError("bad proxy" * 1000)], ids=lambda problem: type(problem).__name__)
def test_without_a_network_it_says_what_to_do(problem, fetch, tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise problem

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match="pass it as --train-data") as error:
        fetch()
    line = str(error.value)
    assert line.startswith("https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json ")
    assert type(problem).__name__ in line
    assert "\n" not in line
    assert len(line) < 500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [[], ["fetch"], ["fetch", "arc"], ["get", "squad"],
                                   ["fetch", "squad", "--split", "test"],
                                   ["fetch", "squad", "--passages", "0"]])
def test_a_wrong_command_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["knowledge", *words])
    with pytest.raises(SystemExit) as end:
        cli(knowledge.main)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------- damaged files

PASSAGES = [{"title": f"Town {i}", "context": "It lies on the Ob.",
             "questions": [{"question": "Which river?", "answer": "Ob"}]} for i in range(2)]
EDITS = [{"title": "A", "context": "About a.", "edits": {"mine": "x"}},
         {"title": "A", "context": "About a.", "released": {"theirs": {"edit": "y"}}}]
PAIRS = [{"input": [[1, 2]], "output": [[2, 1]]}, {"input": [[3, 4]], "output": [[4, 3]]}]
PUZZLE = {"train": PAIRS, "test": PAIRS[:1]}
CHALLENGES = {"aa": {"train": PAIRS, "test": [{"input": [[5, 6]]}]}}
SOLUTIONS = {"aa": [[[6, 5]]]}


def load_edits(folder):
    read_edits([folder / "edits.json"], [SimpleNamespace(name="A", context=["A\nAbout a."])])


def load_kaggle(folder):
    arc.load(str(folder / "arc_challenges.json"))


KAGGLE = {"arc_challenges": CHALLENGES, "arc_solutions": SOLUTIONS}
# the file that is damaged -> (what reads it, the whole files)
KINDS = {
    "passages": (lambda folder: loaded(folder / "passages.json"), {"passages": PASSAGES}),
    "edits": (load_edits, {"edits": EDITS}),
    "aa": (lambda folder: arc.load(str(folder)), {"aa": PUZZLE}),
    "arc_challenges": (load_kaggle, KAGGLE),
    "arc_solutions": (load_kaggle, KAGGLE)}
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


# What is damaged, and its content or the seed of a damage; None leaves it whole.
HOSTILE = [(name, content) for name in KINDS for content in [None, *CONTENTS, *range(20)]]


@pytest.mark.parametrize("name, content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_file_loads_or_is_refused_in_one_line(name, content, tmp_path):
    load, whole = KINDS[name]
    for other, value in whole.items():
        (tmp_path / f"{other}.json").write_text(json.dumps(value))
    if content is None:
        load(tmp_path)
        return
    if isinstance(content, int):
        content = damaged(whole[name], random.Random(f"{name} {content}"))
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
        read_edits([path], [])


# ------------------------------------------------------------------------------- written by a model

TOWN = tinyworld.make_town(random.Random(0), out=True)
NOTES = [TOWN.say(relation, form, random.Random(0)) for relation, form in TOWN.notes()]


def read_grid(text):
    grid = arc.read_grid(text)
    if grid is not None:
        assert grid.dtype == np.int8
        assert max(grid.shape) <= arc.MAX_SIDE
        assert set(grid.flat) <= set(range(10))
    return grid


# reader -> texts that it understands
READERS = {
    split_documents: ["Sure:\n1. One.\n2. Two.", "a\n---\nb", "Question 1: A?\nAnswer: B.\n"],
    read_json_edit: [write_json_edit(list(TOOLS), True, 1e-4, 2), write_json_edit([], False, 1, 9)],
    read_grid: ["1", "12\n34", "000\n999\n555"],
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


# ------------------------------------------------------------------------------- how to study

RIVER, FOUNDER = "The river of town 0 is the Ob0.", "It was founded by Ana0 Reis."
STUDY = {"data_generation": {"use_passage": True, "use_sentences": False,
                             "use_titled_sentences": True, "use_windows": False},
         "training": {"learning_rate": 0.002, "num_train_epochs": 5, "batch_size": 4}}


def studied(passages, part, **values):
    """The first passage's self-edit with other values in one part."""
    task = study.directed(knowledge.load(passages)[0])
    return read_self_edit(task, json.dumps(STUDY | {part: STUDY[part] | values}))


def test_a_self_edit_chooses_documents_and_how_they_are_learned(passages):
    edit = studied(passages, "training")
    assert edit.documents == [PASSAGE, f"Town 0\n{RIVER}", f"Town 0\n{FOUNDER}"]
    assert edit.directives == {"lr": 0.002, "epochs": 5, "batch": 4}
    assert edit.tools == ["passage", "titled_sentences"]
    assert edit.note == ""


@pytest.mark.parametrize("tool, text, made", [
    ("passage", "A b. C d. E.", ["T\nA b. C d. E."]),
    ("sentences", "A b. C d. E.", ["A b.", "C d.", "E."]),
    ("titled_sentences", "A b. C d. E.", ["T\nA b.", "T\nC d.", "T\nE."]),
    ("windows", "A b. C d. E.", ["T\nA b. C d.", "T\nC d. E."]),
    ("windows", "A b.", ["T\nA b."])])     # no neighbour
def test_each_tool_makes_its_documents(tool, text, made):
    assert study.documents("T", text, [tool]) == made


def test_no_document_is_there_twice():
    assert study.documents("T", "A. A.", study.TOOLS) == ["T\nA. A.", "A.", "T\nA."]


@pytest.mark.parametrize("part, values, note", [
    ("training", {"learning_rate": 0.0021}, "learning_rate must be 0.0003 or 0.001 or"),
    ("training", {"learning_rate": "0.002"}, "learning_rate must be"),
    ("training", {"num_train_epochs": 5.0}, "num_train_epochs must be 2 or 5 or 10"),
    ("training", {"batch_size": True}, "batch_size must be 1 or 4 or 16"),
    ("training", {"batch_size": [4]}, "batch_size must be"),
    ("training", {"strategy": "train_using_all_tokens"}, "training must be an object with the"),
    ("data_generation", {"use_windows": 1}, "a tool must be true or false"),
    ("data_generation", {"use_passage": False, "use_titled_sentences": False}, EMPTY)])
def test_other_choices_are_refused_with_the_reason(passages, part, values, note):
    edit = studied(passages, part, **values)
    assert note in edit.note
    assert (edit.documents, edit.directives, edit.tools) == ([], {}, [])


def test_what_is_drawn_at_random_is_valid_and_the_same_for_a_seed(passages):
    texts = [study.random_edit(random.Random(seed)) for seed in range(60)]
    tasks = [study.directed(task) for task in knowledge.load(passages)]
    edits = [read_self_edit(tasks[0], text) for text in texts]
    assert all(1 <= len(edit.tools) <= 2 and edit.documents for edit in edits)
    assert texts == [study.random_edit(random.Random(seed)) for seed in range(60)]
    # Nothing that may be chosen is left out.
    shares = knowledge.describe(tasks, [edits])
    assert len(shares) == len(study.TOOLS) + 4 + 3 + 3
    # An example of its own for each passage, which can be read.
    shown = [task.prompt.splitlines()[-1] for task in tasks]
    assert len(set(shown)) > 1
    assert all(read_self_edit(task, text).documents for task, text in zip(tasks, shown))
    assert all(task.context[0] in task.prompt for task in tasks)


def test_a_budget_of_tokens_refuses_longer_training(passages, tiny, tok):
    short = studied(passages, "training", num_train_epochs=2)
    long = studied(passages, "training", num_train_epochs=10)
    tokens = make_job(tiny, tok, short, 0, SMALL).tokens
    within = replace(SMALL, max_tokens=tokens)
    assert make_job(tiny, tok, short, 0, within).recipe.batch == 4
    with pytest.raises(ValueError, match=f"asks for {5 * tokens} tokens of training"):
        make_job(tiny, tok, long, 0, within)


def test_a_run_asks_for_choices_and_learns_by_them(passages, tmp_path):
    # With room for the prompt in bytes.
    wide = make_checkpoint(tmp_path / "wide", max_position_embeddings=4096)
    argv = ["--model", wide, "--train-data", passages, "--eval-data", passages,
            *SMALL_RUN.split(), "--iterations", "0", "--directives", "--run-dir", tmp_path / "run"]
    chosen = write_choices(study.FORM, ["windows"], {"lr": 0.001, "epochs": 2, "batch": 4})
    record = {"iteration": 0, "split": "eval", "arm": "", "edit": 0, "token_ids": [1]}
    (tmp_path / "run").mkdir()
    # What the model wrote: one that chooses, and one that is text.
    (tmp_path / "run" / "edits.jsonl").write_text(
        json.dumps(record | {"task": 0, "text": chosen}) + "\n"
        + json.dumps(record | {"task": 1, "text": "The river."}) + "\n")

    good, bad = run_it(argv).rollouts.of(0, "eval")

    assert (good["directives"], good["tools"]) == (
        {"lr": 0.001, "epochs": 2, "batch": 4}, ["windows"])
    assert good["documents"] == 1 and good["note"] == "" and good["losses"]
    assert (bad["documents"], bad["reward"]) == (0, 0) and "not JSON" in bad["note"]
