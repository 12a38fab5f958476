"""Passages: data files, what a task asks, the documents of a self-edit. What comes from outside,
damaged in every way, loads or is refused in one line; so is text that a model writes."""
import hashlib
import json
import random
import time
import urllib.request
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

import selfedit
from data import arc, judges, knowledge, study, tinyworld
from data.arc import TOOLS, read_json_edit, write_json_edit
from data.choices import write_choices
from data.knowledge import read_edits
from engine import decode
from selfedit import EMPTY, SelfEdit, read_self_edit, split_documents
from support.files import UserError
from tests.helpers import ROOT, SMALL, WRONG, call, changed, places, run_it
from tests.make_checkpoint import make_checkpoint

PASSAGE = "Town 0\nThe river of town 0 is the Ob0. It was founded by Ana0 Reis."


@pytest.fixture()
def path(tmp_path):
    return tmp_path / "data.json"


def loaded(path, **settings):
    """(the tasks of a data file, what is logged)."""
    lines = []
    return knowledge.load(path, log=lines.append, **settings), lines


def test_a_passage_is_shown_when_a_self_edit_is_asked_for_and_not_to_the_questions(passages):
    task = knowledge.load(passages)[0]
    assert task.name == "Town 0"
    assert task.context == [PASSAGE]
    assert task.prompt.endswith(f"Passage:\n{PASSAGE}\n\nImplications:\n")
    assert task.questions == ["Which river?", "Who founded it?"]
    assert task.answers == ["Ob0", "Ana0 Reis"]
    begin = "Let's answer a question directly and concisely.\nQuestion: Topic: Town 0\n"
    assert task.queries == [begin + "Which river?\nAnswer:\n", begin + "Who founded it?\nAnswer:\n"]
    assert task.references == {"passage only": SelfEdit(documents=[PASSAGE])}
    assert task.judge is judges.RULES["rule"]
    other = knowledge.load(passages, prompt="self-qa", judge=judges.RULES["gist"])[0]
    assert other.prompt.endswith(f"Passage:\n{PASSAGE}\n\nQuestion 1: ")
    assert other.judge is judges.RULES["gist"]


@pytest.mark.parametrize("text, max_documents, documents, note", [
    (" a\nb ", 0, ["Town 0\na", "Town 0\nb", PASSAGE], ""), (" \n ", 0, [], EMPTY),
    ("a\nb\nc\nd", 2, ["Town 0\na", "Town 0\nb", PASSAGE], "")])
def test_documents_are_the_pieces_under_the_title_and_the_passage(
        text, max_documents, documents, note, passages):
    edit = read_self_edit(knowledge.load(passages, max_documents=max_documents)[0], text)
    assert edit.documents == documents
    assert edit.note == note


@pytest.mark.parametrize("name", ["train", "eval"])
def test_example_passages_hold_their_answers(name):
    for task in knowledge.load(ROOT / "data" / f"example_{name}.json"):
        assert len(task.questions) == 3
        for answer in task.answers:
            assert judges.RULES["substring"]([("", answer, task.context[0])]) == [True]


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
    (squad(PARAGRAPH, 3), 'paragraphs 1: "qas" must be'),
    (squad(PARAGRAPH, title=5), 'data 0: paragraphs 0: "title" must be'),
    (squad(PARAGRAPH | {"context": " "}), 'data 0: paragraphs 0: "context" must be'),
    (squad(PARAGRAPH | {"qas": [QUESTION | {"answers": "A"}]}), 'qas 0: "answers" must be'),
    (squad(PARAGRAPH | {"qas": [IMPOSSIBLE, asked(None, "A")]}), 'qas 1: "question" and "text"'),
    (squad(PARAGRAPH | {"qas": [asked("Q?", 5)]}), 'qas 0: "question" and "text"')
], ids=range(22))
def test_what_is_wrong_with_a_data_file_is_one_line(content, words, path):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=f"^{path}.*{words}.*$"):
        loaded(path)


def test_plain_text_is_for_another_program_and_what_is_not_there_is_said(tmp_path):
    path = tmp_path / "NOTES.MD"
    with pytest.raises(UserError, match="NOTES.MD is missing"):
        knowledge.load(path)
    path.write_text("The Ob is a river.\n")
    with pytest.raises(UserError, match=f"no questions.*python -m tools.learn {path}"):
        knowledge.load(path)


def test_a_passage_without_questions_is_skipped_and_a_gold_answer_without_a_word_is_said(path):
    title, question = "\x1b[2J\n" + "long " * 1000, {"question": "Q?", "answer": "the"}
    path.write_text(json.dumps([GOOD | {"title": title, "questions": []},
                                GOOD | {"questions": [question]}]))
    (task,), (skipped, note) = loaded(path)
    assert skipped.startswith(f"skipped: {path}: record 0 ")
    assert skipped.isprintable() and len(skipped) < 200 + len(str(path))
    assert note.startswith(f"note: {path}: record 1, question 0: gold answer 'the' has no")
    # A model that judges may find it.
    assert loaded(path, judge=lambda triples: [True] * len(triples))[1] == [skipped]


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
    path.write_text(json.dumps([GOOD | {"released_edits": [{"text": "1. x"}]}]))
    assert loaded(path)[0][0].answers == ["Ob"]


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
    monkeypatch.chdir(tmp_path)
    return lambda *words: call(knowledge, "fetch", "squad", *words)


def test_fetched_passages_are_a_data_file_and_one_that_is_there_twice_is_one(publish, fetch):
    publish("train", ARTICLES)
    twice = article("T", ("C", [asked("One?", "1")]), ("D", [asked("Two?", "2")]),
                    ("C", [asked("Three?", "3")]))
    publish("validation", [twice])
    assert "squad_train.json: 3 of 3 passages (SQuAD v1.1, CC" in fetch()
    assert len(knowledge.load("squad_train.json")) == 3
    assert json.loads(Path("squad_train.json").read_text())[1] == {
        "title": "Nikola Tesla", "context": "He died in 1943.",
        "questions": [{"question": "When did he die?", "answer": "1943"},
                      {"question": "Who?", "answer": "He"}]}
    fetch("--split", "validation", "--out", "mine.json")
    first, second = knowledge.load("mine.json")
    assert first.questions == ["One?", "Three?"]
    assert second.questions == ["Two?"]


def test_passages_are_drawn_by_the_seed_and_stay_in_order(publish, fetch):
    publish("train", [article("T", *((f"{i}.", [asked("Q?", "A")]) for i in range(100)))])
    drawn = []
    for name, seed in [("a.json", 1), ("b.json", 1), ("c.json", 2)]:
        fetch("--passages", 20, "--seed", seed, "--out", name)
        drawn.append([int(record["context"][:-1]) for record in json.loads(Path(name).read_text())])
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 20


def test_a_file_that_can_not_be_had_is_said(publish, fetch, tmp_path, monkeypatch):
    path = publish("train", ARTICLES)
    with pytest.raises(UserError, match="--passages 4: there are 3"):
        fetch("--passages", 4)
    path.write_text("<html>Please log in to this network</html>")
    with pytest.raises(UserError, match="its SHA-256 is not the known one"):
        fetch()
    # What can't be written is said before anything is downloaded.
    monkeypatch.setattr(urllib.request, "urlopen", None)
    (tmp_path / "mine.json").touch()
    with pytest.raises(UserError, match="mine.json exists already"):
        fetch("--out", "mine.json")
    assert not (tmp_path / "squad_train.json").exists()


@pytest.mark.parametrize("problem", [
    OSError("no network\nat all"), IncompleteRead(b"{"), ValueError("bad proxy" * 1000)],
    ids=lambda problem: type(problem).__name__)
def test_without_a_network_it_says_what_to_do(problem, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=problem))
    with pytest.raises(UserError, match=f"^https.*{type(problem).__name__}.* --train-data.*$") as e:
        fetch()
    line = str(e.value)
    assert line.startswith("https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json ")
    assert len(line) < 500
    assert list(tmp_path.iterdir()) == []


PASSAGES = [{"title": f"Town {i}", "context": "It lies on the Ob.",
             "questions": [{"question": "Which river?", "answer": "Ob"}]} for i in range(2)]
A = {"title": "A", "context": "About a."}
EDITS = [A | {"edits": {"mine": "x"}}, A | {"released": {"theirs": {"edit": "y"}}}]
PAIR = {"input": [[1, 2]], "output": [[2, 1]]}
PUZZLE = {"train": [PAIR, PAIR], "test": [PAIR]}


def load_edits(folder):
    read_edits([folder / "edits.json"], [SimpleNamespace(name="A", context=["A\nAbout a."])])


# the file that is damaged -> (what reads it, its whole content)
KINDS = {
    "passages": (lambda folder: loaded(folder / "passages.json"), PASSAGES),
    "edits": (load_edits, EDITS),
    "aa": (lambda folder: arc.load(str(folder)), PUZZLE)}
CONTENTS = ["", "{", "null", "3", "[]", "{}", "[null]", '"text"', "[" * 100_000, "1" * 5000,
            '["\\ud800"]', b"\xff\xfe[]"]


def damaged(value, rng):
    """A copy of a JSON value, as text, with one thing in it replaced or lost."""
    other = rng.choice([*WRONG, "x" * 2_000_000, [0] * 1_000_000])
    return json.dumps(changed(value, rng.choice(list(places(value))), other))


# What is damaged, and its content or the seed of a damage.
HOSTILE = [(name, content) for name in KINDS for content in [*CONTENTS, *range(20)]]


@pytest.mark.parametrize("name, content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_damaged_file_loads_or_is_refused_in_one_line(name, content, tmp_path):
    load, whole = KINDS[name]
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(whole))
    load(tmp_path)
    if isinstance(content, int):
        content = damaged(whole, random.Random(f"{name} {content}"))
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    begin = time.time()
    try:
        load(tmp_path)
    except UserError as e:
        assert str(tmp_path) in str(e)
        assert "\n" not in str(e)
        assert len(str(e)) < 1000
    assert time.time() - begin < 5


@pytest.mark.parametrize("record, words", [
    (3, "it must be an object"), ({"edits": {"x": "y"}}, "'title' is missing"),
    ({"title": "A", "edits": {"x": "y"}}, "'context' is missing"),
    (A | {"edits": {"x": ["y"]}}, "each item of 'edits' must be a text"),
    (A | {"edits": {"\x1b[2J": "y"}}, "can be printed"),
    (A | {"released": {"x": {"edit": 5}}}, "'edit' must be a text")])
def test_what_is_wrong_with_an_exchanged_self_edit_is_said(record, words, path):
    path.write_text(json.dumps([A | {"edits": {"x": "y"}}, record]))
    with pytest.raises(UserError, match=f"data.json: record 1: .*{words}"):
        read_edits([path], [])


TOWN = tinyworld.make_town(random.Random(0), out=True)
NOTES = [TOWN.say(relation, form, random.Random(0)) for relation, form in TOWN.notes()]


def read_grid(text):
    grid = arc.read_grid(text)
    if grid is not None:
        assert grid.dtype == np.int8
        assert max(grid.shape) <= arc.MAX_SIDE and set(grid.flat) <= set(range(10))
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


STUDY = {"data_generation": {"use_passage": True, "use_sentences": False,
                             "use_titled_sentences": True, "use_windows": False},
         "training": {"learning_rate": 0.002, "num_train_epochs": 5, "batch_size": 4}}


def studied(passages, part, **values):
    """The first passage's self-edit with other values in one part."""
    task = study.directed(knowledge.load(passages)[0])
    return read_self_edit(task, json.dumps(STUDY | {part: STUDY[part] | values}))


def test_a_self_edit_chooses_documents_and_how_they_are_learned(passages):
    edit = studied(passages, "training")
    assert edit.documents == [PASSAGE, "Town 0\nThe river of town 0 is the Ob0.",
                              "Town 0\nIt was founded by Ana0 Reis."]
    assert edit.directives == {"lr": 0.002, "epochs": 5, "batch": 4}
    assert (edit.tools, edit.note) == (["passage", "titled_sentences"], "")


@pytest.mark.parametrize("tools, text, made", [
    (["passage"], "A b. C d. E.", ["T\nA b. C d. E."]),
    (["sentences"], "A b. C d. E.", ["A b.", "C d.", "E."]),
    (["titled_sentences"], "A b. C d. E.", ["T\nA b.", "T\nC d.", "T\nE."]),
    (["windows"], "A b. C d. E.", ["T\nA b. C d.", "T\nC d. E."]),
    (["windows"], "A b.", ["T\nA b."]),     # no neighbour
    (study.TOOLS, "A. A.", ["T\nA. A.", "A.", "T\nA."])])      # no document is there twice
def test_each_tool_makes_its_documents(tools, text, made):
    assert study.documents("T", text, tools) == made


@pytest.mark.parametrize("part, values, note", [
    ("training", {"learning_rate": 0.0021}, "learning_rate must be 0.0003 or 0.001 or"),
    ("training", {"num_train_epochs": 5.0}, "num_train_epochs must be 2 or 5 or 10"),
    ("training", {"batch_size": True}, "batch_size must be 1 or 4 or 16"),
    ("data_generation", {"use_passage": False, "use_titled_sentences": False}, EMPTY)])
def test_other_choices_are_refused_with_the_reason(passages, part, values, note):
    edit = studied(passages, part, **values)
    assert note in edit.note
    assert edit == SelfEdit(text=edit.text, note=edit.note)


def test_what_is_drawn_at_random_is_valid_and_the_same_for_a_seed(passages):
    texts = [study.random_edit(random.Random(seed)) for seed in range(60)]
    assert texts == [study.random_edit(random.Random(seed)) for seed in range(60)]
    tasks = [study.directed(task) for task in knowledge.load(passages)]
    edits = [read_self_edit(tasks[0], text) for text in texts]
    assert all(1 <= len(edit.tools) <= 2 and edit.documents for edit in edits)
    assert len(knowledge.describe(tasks, [edits])) == len(study.TOOLS) + 4 + 3 + 3
    # An example of its own for each passage, which can be read.
    shown = [task.prompt.splitlines()[-1] for task in tasks]
    assert len(set(shown)) > 1
    for task, text in zip(tasks, shown):
        assert read_self_edit(task, text).documents
        assert task.context[0] in task.prompt


def test_a_run_asks_for_choices_and_learns_by_them(passages, tmp_path):
    wide = make_checkpoint(tmp_path / "wide", max_position_embeddings=4096)
    argv = ["--model", wide, "--train-data", passages, "--eval-data", passages,
            *SMALL.split(), "--iterations", "0", "--directives", "--run-dir", tmp_path / "run"]
    directives = {"lr": 0.001, "epochs": 2, "batch": 4}
    chosen = write_choices(study.FORM, ["windows"], directives)
    # What the model wrote: one that chooses, and one that is text.
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "edits.jsonl").open("w") as file:
        for task, text in enumerate([chosen, "The river."]):
            record = {"iteration": 0, "split": "eval", "arm": "", "task": task, "edit": 0,
                      "token_ids": [1], "text": text}
            file.write(json.dumps(record) + "\n")
    good, bad = run_it(argv).rollouts.of(0, "eval")
    assert (good["directives"], good["tools"]) == (directives, ["windows"])
    assert good["documents"] == 1 and good["note"] == "" and good["losses"]
    assert (bad["documents"], bad["reward"]) == (0, 0) and "not JSON" in bad["note"]


def test_the_model_itself_is_a_tool_if_it_has_a_prompt(passages, tmp_path, monkeypatch):
    """What a chosen tool asks for is written by the same model, kept, and read again."""
    wide = make_checkpoint(tmp_path / "wide", max_position_embeddings=4096)
    argv = ["--model", wide, "--train-data", passages, "--eval-data", passages, *SMALL.split(),
            *"--iterations 0 --directives --own-text rewrite --run-dir".split(), tmp_path / "run"]
    directives = {"lr": 0.001, "epochs": 2, "batch": 4}
    chosen = [write_choices(study.WITH_OWN_TEXT, tools, directives)
              for tools in (["own_text", "passage"], ["passage"])]
    asked = []

    def write(model, tok, groups, sampling, seeds, adapters=None, progress=None):
        asked.append(groups)
        for n, (prompt,) in enumerate(filter(None, groups)):
            text = "One.\nTwo." if prompt.startswith("Let's") else chosen[n]
            yield n, [decode.Reply(text, [5, n], cut=False)]

    monkeypatch.setattr(selfedit, "write", write)
    own, none = run_it(argv).edits.of(0, "eval")
    assert asked[1] == [[selfedit.fill("rewrite", "Town 0", PASSAGE.split("\n")[1])], []]
    assert (own["made"], none["made"]) == ("One.\nTwo.", "")
    (tmp_path / "run" / "rollouts.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    first, second = run_it(argv).rollouts.of(0, "eval")
    assert len(asked) == 2      # what was written is not written again
    assert (first["documents"], second["documents"]) == (3, 1)
    assert (first["made"], first["tools"]) == ("One.\nTwo.", ["passage", "own_text"])
