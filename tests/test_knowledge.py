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
from tests.helpers import SMALL as SMALL_RUN, WRONG, changed, places, run_it
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
    begin = "Let's answer a question directly and concisely.\nQuestion: Topic: Town 0\n"
    assert task.queries == [begin + "Which river?\nAnswer:\n", begin + "Who founded it?\nAnswer:\n"]
    # The passage alone is there to compare with.
    assert task.references.keys() == {"passage only"}
    assert task.references["passage only"].documents == [PASSAGE]


def test_the_prompt_and_the_judge_may_be_others(passages):
    judge = judges.RULES["gist"]
    other = knowledge.load(passages, prompt="self-qa", judge=judge)[0]
    assert other.prompt.endswith(f"Passage:\n{PASSAGE}\n\nQuestion 1: ")
    assert other.judge is judge
    assert knowledge.load(passages)[0].judge is judges.RULES["rule"]


@pytest.mark.parametrize("text, max_documents, documents, note", [
    (" a\nb ", 0, ["Town 0\na", "Town 0\nb", PASSAGE], ""), (" \n ", 0, [], EMPTY),
    ("a\nb\nc\nd", 2, ["Town 0\na", "Town 0\nb", PASSAGE], "")])
def test_documents_are_the_pieces_under_the_title_and_the_passage(
        text, max_documents, documents, note, passages):
    edit = read_self_edit(knowledge.load(passages, max_documents=max_documents)[0], text)
    assert edit.documents == documents
    assert edit.note == note


def test_example_passages_hold_their_answers():
    tasks = [knowledge.load(EXAMPLES / f"example_{name}.json") for name in ("train", "eval")]
    assert min(map(len, tasks)) > 1
    for task in sum(tasks, []):
        assert len(task.questions) == 3
        for answer in task.answers:
            assert judges.RULES["substring"]([("", answer, task.context[0])]) == [True]


# ------------------------------------------------------------------------------- data files

def asked(question, *answers, **more):
    """A question as SQuAD has it."""
    given = [{"text": answer, "answer_start": 0} for answer in answers]
    return {"id": f"id of {question}", "question": question, "answers": given} | more


def article(title, *paragraphs):
    """An article as SQuAD has it. A paragraph is (context, its questions)."""
    return {"title": title, "paragraphs": [{"context": context, "qas": list(qas)}
                                           for context, qas in paragraphs]}


IMPOSSIBLE = asked("Who never died?", is_impossible=True,
                   plausible_answers=[{"text": "He", "answer_start": 0}])
# SQuAD is made by hand: a blank does not make all the rest unreadable.
ARTICLES = [
    article("Nikola_Tesla",
            ("He was born in Smiljan.", [asked("Where was he born?", "Smiljan", "in Smiljan")]),
            ("He died in 1943.", [IMPOSSIBLE, asked(" When did he die? ", "1943"),
                                  asked(" ", "He"), asked("Who lived?"), asked("Who?", "He")])),
    article("Ob", ("The Ob is a river.", [asked("What is the Ob?", "a river")])),
    article("None_left", ("He died.", [IMPOSSIBLE]))]
QUESTION = asked("Q?", "A")
PARAGRAPH = {"context": "C", "qas": [QUESTION]}
GOOD = {"title": "T", "context": "C", "questions": [{"question": "Q?", "answer": "Ob"}]}


def squad(*paragraphs, title="T"):
    return {"data": [{"title": title, "paragraphs": list(paragraphs)}]}


# The second record is number 1. A question of SQuAD's that is left out counts.
@pytest.mark.parametrize("content, words", [
    ("{", "not readable as JSON"), ({}, "not a JSON list"), ([], "not a JSON list"),
    ([3], "record 0: not an object"),
    ([GOOD, GOOD | {"title": 5}], 'record 1: "title"'),
    ([GOOD | {"context": " "}], 'record 0: "context"'),
    ([GOOD, GOOD | {"context": "a " * 500_001}], 'record 1: "context" .* 1,000,000 characters'),
    ([{"title": "T", "context": "C"}], 'record 0: "questions"'),
    *[([GOOD | {"questions": [question]}], "record 0: question 0 must have")
      for question in ("Q?", {"question": "Q?"}, {"question": "", "answer": "A"})],
    ([GOOD | {"questions": []}], "no passage has questions"),
    ({"data": []}, "no passage has questions"),
    ({"data": 3}, '"data" must be a list'), ({"data": [3]}, 'data 0: "paragraphs" must be a list'),
    ({"data": [ARTICLES[0], {"title": "T"}]}, 'data 1: "paragraphs" must be a list'),
    (squad(3), 'paragraphs 0: "qas" must be'),
    (squad(PARAGRAPH, {"context": "C", "qas": {}}), 'paragraphs 1: "qas" must be'),
    (squad(PARAGRAPH, title=5), 'data 0: paragraphs 0: "title" must be'),
    (squad(PARAGRAPH | {"context": " "}), 'data 0: paragraphs 0: "context" must be'),
    (squad(PARAGRAPH | {"qas": ["Q?"]}), 'qas 0: "answers" must be'),
    (squad(PARAGRAPH | {"qas": [QUESTION | {"answers": "A"}]}), 'qas 0: "answers" must be'),
    (squad(PARAGRAPH | {"qas": [IMPOSSIBLE, asked(None, "A")]}), 'qas 1: "question" and "text"'),
    (squad(PARAGRAPH | {"qas": [asked("Q?", 5)]}), 'qas 0: "question" and "text"'),
    (squad(PARAGRAPH | {"qas": [QUESTION | {"answers": ["A"]}]}), 'qas 0: "question" and "text"')
], ids=range(25))
def test_what_is_wrong_with_a_data_file_is_one_line(content, words, path):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=f"^{path}.*{words}.*$"):
        loaded(path)


@pytest.mark.parametrize("name", ["notes.txt", "NOTES.MD"])
def test_plain_text_is_for_another_program_and_what_is_not_there_is_said(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(UserError, match=f"{name} is missing"):
        knowledge.load(path)
    path.write_text("The Ob is a river.\n")
    with pytest.raises(UserError, match=f"no questions.*python -m tools.learn {path}"):
        knowledge.load(path)


def test_a_passage_without_questions_is_skipped_and_said_as_far_as_it_can_be_printed(path):
    title = "\x1b[2J\n" + "long " * 1000
    path.write_text(json.dumps([GOOD | {"title": title, "questions": []}, GOOD]))
    tasks, (line,) = loaded(path)
    assert len(tasks) == 1
    assert line.startswith(f"skipped: {path}: record 0 ")
    assert line.isprintable()
    assert len(line) < 200 + len(str(path))


@pytest.mark.parametrize("answer", ["the", "!!!", "a - an"])
def test_a_gold_answer_without_a_word_is_said_and_compared_as_it_is(answer, path):
    question = {"question": "Q?", "answer": answer}
    path.write_text(json.dumps([GOOD, GOOD | {"questions": [question]}]))
    tasks, (line,) = loaded(path)
    assert len(tasks) == 2
    assert line.startswith(f"note: {path}: record 1, question 0: gold answer {answer!r} has no")
    assert judges.RULES["rule"]([("Q?", answer, answer), ("Q?", answer, "x")]) == [True, False]
    # A model that judges may find it.
    assert loaded(path, judge=lambda triples: [True] * len(triples))[1] == []


def test_squads_own_json_is_read_as_it_is_and_what_has_no_answer_is_not_asked(path):
    path.write_text(json.dumps({"version": "2.0", "data": ARTICLES}))
    (born, died, river), lines = loaded(path)
    assert [born.name, died.name, river.name] == ["Nikola Tesla", "Nikola Tesla", "Ob"]
    assert died.context == ["Nikola Tesla\nHe died in 1943."]
    assert died.questions == ["When did he die?", "Who?"]
    assert died.answers == ["1943", "He"]
    assert born.answers == ["Smiljan"]
    assert lines == [f"skipped: {path}: data 2: paragraphs 0 ('None left') has no questions"]
    # So is a file of the official release.
    path.write_text(json.dumps([GOOD | {"released_edits": [{"text": "1. x"}], "released_pick": 0}]))
    assert loaded(path)[0][0].answers == ["Ob"]


# ------------------------------------------------------------------------------- to fetch SQuAD

@pytest.fixture()
def publish(monkeypatch, tmp_path):
    """A function that puts a split on a folder in place of SQuAD's site, and makes it known."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr(knowledge, "SITE", site.as_uri())

    def put(split, articles):
        path = site / f"{split}.json"
        path.write_text(json.dumps({"version": "1.1", "data": articles}))
        known = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
        monkeypatch.setitem(knowledge.SQUAD, split, (path.name, known))
        return path
    return put


@pytest.fixture()
def fetch(monkeypatch, tmp_path):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["knowledge", "fetch", "squad", *map(str, words)])
        knowledge.main()

    monkeypatch.chdir(tmp_path)
    return call


def test_fetched_passages_are_a_data_file(publish, fetch, tmp_path, capsys):
    publish("train", ARTICLES)
    publish("validation", ARTICLES[1:])
    fetch()

    path = tmp_path / "squad_train.json"
    assert json.loads(path.read_text())[1] == {
        "title": "Nikola Tesla", "context": "He died in 1943.",
        "questions": [{"question": "When did he die?", "answer": "1943"},
                      {"question": "Who?", "answer": "He"}]}
    assert len(knowledge.load(path)) == 3
    assert "squad_train.json: 3 of 3 passages (SQuAD v1.1, CC" in capsys.readouterr().out
    # The other split.
    fetch("--split", "validation", "--out", "mine.json")
    assert [task.name for task in knowledge.load(tmp_path / "mine.json")] == ["Ob"]


def test_a_passage_that_is_there_twice_is_one(publish, fetch):
    publish("train", [article("T", ("C", [asked("One?", "1")]), ("D", [asked("Two?", "2")]),
                              ("C", [asked("Three?", "3")]))])
    fetch("--out", "mine.json")
    first, second = knowledge.load("mine.json")
    assert first.questions == ["One?", "Three?"]
    assert second.questions == ["Two?"]


def test_passages_are_drawn_by_the_seed_and_stay_in_order(publish, fetch):
    publish("train", [article("T", *((f"{i}.", [asked("Q?", "A")]) for i in range(100)))])

    def drawn(seed, name):
        fetch("--passages", 20, "--seed", seed, "--out", name)
        return [int(record["context"][:-1]) for record in json.loads(Path(name).read_text())]

    one, again, other = drawn(1, "a.json"), drawn(1, "b.json"), drawn(2, "c.json")
    assert one == again != other
    assert one == sorted(set(one))
    assert len(one) == 20


def test_a_file_that_can_not_be_had_is_said(publish, fetch, tmp_path, monkeypatch):
    path = publish("train", ARTICLES)
    with pytest.raises(UserError, match="--passages 4: there are 3"):
        fetch("--passages", 4)
    path.write_text("<html>Please log in to this network</html>")
    with pytest.raises(UserError, match="its SHA-256 is not the known one"):
        fetch()
    path.unlink()
    with pytest.raises(UserError, match="could not be fetched .URLError"):
        fetch()
    # What can't be written is said before anything is downloaded.
    monkeypatch.setattr(urllib.request, "urlopen", None)
    with pytest.raises(UserError, match="none/squad.json: can't be written"):
        (tmp_path / "none").touch()
        fetch("--out", "none/squad.json")
    (tmp_path / "mine.json").touch()
    with pytest.raises(UserError, match="mine.json exists already"):
        fetch("--out", "mine.json")
    assert not (tmp_path / "squad_train.json").exists()


@pytest.mark.parametrize("problem", [
    OSError("no network\nat all"), IncompleteRead(b"{"), ValueError("bad proxy" * 1000)],
    ids=lambda problem: type(problem).__name__)
def test_without_a_network_it_says_what_to_do(problem, fetch, tmp_path, monkeypatch):
    def urlopen(url, timeout):
        raise problem

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match=f"^https.*{type(problem).__name__}.* --train-data.*$") as e:
        fetch()
    line = str(e.value)
    assert line.startswith("https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json ")
    assert len(line) < 500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["fetch"], ["fetch", "arc"], ["get", "squad"],
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


KAGGLE = {"arc_challenges": CHALLENGES, "arc_solutions": SOLUTIONS}
# the file that is damaged -> (what reads it, the whole files)
KINDS = {
    "passages": (lambda folder: loaded(folder / "passages.json"), {"passages": PASSAGES}),
    "edits": (load_edits, {"edits": EDITS}),
    "aa": (lambda folder: arc.load(str(folder)), {"aa": PUZZLE}),
    "arc_challenges": (lambda folder: arc.load(f"{folder}/arc_challenges.json"), KAGGLE),
    "arc_solutions": (lambda folder: arc.load(f"{folder}/arc_challenges.json"), KAGGLE)}
# In place of a whole file.
CONTENTS = ["", "{", "null", "3", "[]", "{}", "[null]", '"text"', "[" * 100_000, "1" * 5000,
            '["\\ud800"]', b"\xff\xfe[]"]


def damaged(value, rng):
    """A copy of a JSON value, as text, with one thing in it replaced or lost."""
    other = rng.choice([*WRONG, "x" * 2_000_000, [0] * 1_000_000])
    return json.dumps(changed(value, rng.choice(list(places(value))), other))


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
    (3, "it must be an object"), ({"edits": {"x": "y"}}, "'title' is missing"),
    ({"title": "A", "edits": {"x": "y"}}, "'context' is missing"),
    (A | {"edits": {"x": ["y"]}}, "each item of 'edits' must be a text"),
    (A | {"edits": None}, "'edits' must be an object"),
    (A | {"edits": {"\x1b[2J": "y"}}, "can be printed"),
    (A | {"released": {"x": "y"}}, "each item of 'released' must be"),
    (A | {"released": {"x": {"edit": 5}}}, "'edit' must be a text")])
def test_what_is_wrong_with_an_exchanged_self_edit_is_said(record, words, path):
    path.write_text(json.dumps([A | {"edits": {"x": "y"}}, record]))
    with pytest.raises(UserError, match=f"data.json: record 1: .*{words}"):
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
    for _ in range(3000):
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
