"""Passages: data files, what a task asks, and the documents of a self-edit."""
import hashlib
import json
import sys
import urllib.request
from http.client import IncompleteRead
from pathlib import Path

import pytest

from data import judges, knowledge
from selfedit import EMPTY, read_self_edit
from support.files import UserError, cli

EXAMPLES = Path(__file__).resolve().parent.parent / "data"
# The first passage of the fixture `passages`.
PASSAGE = "Town 0\nThe river of town 0 is the Ob0. It was founded by Ana0 Reis."


@pytest.fixture()
def task(passages):
    return knowledge.load(passages)[0]


# ------------------------------------------------------------------------------- a task

def test_a_passage_is_shown_when_a_self_edit_is_asked_for(task):
    assert task.name == "Town 0"
    assert task.context == [PASSAGE]
    assert task.prompt.endswith(f"Passage:\n{PASSAGE}\n\nImplications:\n")


def test_the_prompt_can_be_another(passages):
    task = knowledge.load(passages, prompt="self-qa")[0]

    assert task.prompt.endswith(f"Passage:\n{PASSAGE}\n\nQuestion 1: ")


def test_questions_are_asked_without_the_passage(task):
    assert task.questions == ["Which river?", "Who founded it?"]
    assert task.answers == ["Ob0", "Ana0 Reis"]
    assert task.queries == [
        "Let's answer a question directly and concisely.\n"
        "Question: Topic: Town 0\nWhich river?\nAnswer:\n",
        "Let's answer a question directly and concisely.\n"
        "Question: Topic: Town 0\nWho founded it?\nAnswer:\n"]


def test_the_judge_is_the_rule_unless_another_is_given(passages):
    def none_is_right(triples):
        return [False] * len(triples)

    assert knowledge.load(passages)[0].judge is judges.RULES["rule"]
    assert knowledge.load(passages, judge=none_is_right)[0].judge is none_is_right


# ------------------------------------------------------------------------------- self-edits

def test_documents_are_the_pieces_under_the_title_and_the_passage(task):
    edit = read_self_edit(task, " a\nb ")

    assert edit.documents == ["Town 0\na", "Town 0\nb", PASSAGE]
    assert edit.note == ""


def test_a_self_edit_that_says_nothing_has_no_documents(task):
    edit = read_self_edit(task, " \n ")

    assert edit.documents == []
    assert edit.note == EMPTY


def test_at_most_so_many_pieces_and_the_passage(passages):
    task = knowledge.load(passages, max_documents=2)[0]

    edit = read_self_edit(task, "a\nb\nc\nd")

    assert edit.documents == ["Town 0\na", "Town 0\nb", PASSAGE]


def test_the_passage_alone_is_there_to_compare_with(task):
    assert task.references.keys() == {"passage only"}
    assert task.references["passage only"].documents == [PASSAGE]


# ------------------------------------------------------------------------------- data files

GOOD = {"title": "T", "context": "C", "questions": [{"question": "Q?", "answer": "Ob"}]}
MALFORMED = [
    # The file.
    ("", "not readable as JSON"),
    ("{}", "not a JSON list"),
    ("[]", "not a JSON list"),
    # A record. The second one is number 1.
    ([3], "record 0: not an object"),
    ([GOOD, GOOD | {"title": 5}], 'record 1: "title"'),
    ([GOOD | {"context": " "}], 'record 0: "context"'),
    ([GOOD, GOOD | {"context": "a " * 500_001}], 'record 1: "context" .* 1,000,000 characters'),
    ([GOOD | {"title": "a" * 1_000_001}], 'record 0: "title" .* 1,000,000 characters'),
    ([GOOD | {"title": "a\ud800"}], "not readable as JSON"),
    ([{"title": "T", "context": "C"}], 'record 0: "questions"'),
    # A question.
    ([GOOD | {"questions": ["Q?"]}], "record 0: question 0 must have"),
    ([GOOD | {"questions": [{"question": "Q?"}]}], "record 0: question 0 must have"),
    ([GOOD | {"questions": [{"question": "Q?", "answer": 5}]}], "record 0: question 0 must have"),
    ([GOOD | {"questions": [{"question": "", "answer": "A"}]}], "record 0: question 0 must have"),
    # Nothing is left.
    ([GOOD | {"questions": []}], "no passage has questions"),
]


def ignored(line):
    """A log that nobody reads."""


@pytest.mark.parametrize("content, words", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_wrong_with_a_data_file_is_one_line(content, words, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(UserError, match=words) as error:
        knowledge.load(path, log=ignored)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_data_file_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError, match="none.json is missing"):
        knowledge.load(tmp_path / "none.json")


def test_a_passage_without_questions_is_skipped_and_said(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD | {"questions": []}, GOOD]))
    lines = []

    tasks = knowledge.load(path, log=lines.append)

    assert len(tasks) == 1
    (line,) = lines
    assert "record 0" in line
    assert "no questions" in line


def test_a_title_is_shown_as_far_as_it_can_be_printed(tmp_path):
    path = tmp_path / "data.json"
    title = "\x1b[2J\n" + "long " * 1000
    path.write_text(json.dumps([GOOD | {"title": title, "questions": []}, GOOD]))
    lines = []

    knowledge.load(path, log=lines.append)

    assert lines[0].isprintable()
    assert len(lines[0]) < 200 + len(str(path))


def with_answers(*answers):
    return GOOD | {"questions": [{"question": "Q?", "answer": answer} for answer in answers]}


@pytest.mark.parametrize("answer", ["the", "A", "!!!", "$", "a - an"])
def test_a_gold_answer_that_no_rule_can_find_is_said(answer, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, with_answers("Ob", answer)]))
    lines = []

    tasks = knowledge.load(path, log=lines.append)

    assert len(tasks) == 2
    assert lines == [f"note: {path}: record 1, question 1: gold answer {answer!r} has no word in "
                     "it: no answer can be right"]
    assert judges.RULES["rule"]([("Q?", answer, answer)]) == [False]


def test_a_model_that_judges_may_find_an_answer_without_a_word(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([with_answers("$")]))
    lines = []

    knowledge.load(path, judge=lambda triples: [True] * len(triples), log=lines.append)

    assert lines == []


# ------------------------------------------------------------------------------- SQuAD's own JSON

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


def squad_file(path, articles):
    path.write_text(json.dumps({"version": "1.1", "data": articles}))
    return path


def test_squads_own_json_is_read_as_it_is(tmp_path):
    path = squad_file(tmp_path / "train-v1.1.json", ARTICLES)

    born, died, river = knowledge.load(path, log=ignored)

    assert [born.name, died.name, river.name] == ["Nikola Tesla", "Nikola Tesla", "Ob"]
    assert died.context == ["Nikola Tesla\nHe died in 1943."]
    assert died.questions == ["When did he die?", "Who?"]
    assert died.answers == ["1943", "He"]
    assert born.answers == ["Smiljan"]


def test_what_a_passage_does_not_answer_is_not_asked(tmp_path):
    # SQuAD is made by hand: a blank would not make all the rest unreadable.
    articles = [article("Mixed", ("He died.", [IMPOSSIBLE, asked("Who died?", "He"),
                                               asked(" ", "He"), asked("Who lived?")])),
                article("None_left", ("He died.", [IMPOSSIBLE]))]
    path = squad_file(tmp_path / "train-v2.0.json", articles)
    lines = []

    (task,) = knowledge.load(path, log=lines.append)

    assert task.questions == ["Who died?"]
    assert lines == [f"skipped: {path}: data 1: paragraphs 0 ('None left') has no questions"]


def test_a_file_of_the_official_release_is_read_as_it_is(tmp_path):
    path = tmp_path / "squad_val.json"
    path.write_text(json.dumps([GOOD | {"released_edits": [{"text": "1. x"}], "released_pick": 0}]))

    (task,) = knowledge.load(path)

    assert task.answers == ["Ob"]


PARAGRAPH = {"context": "C", "qas": [asked("Q?", "A")]}
NO_SQUAD = [
    (3, '"data" must be a list'),
    ({"title": "T"}, '"data" must be a list'),
    ([], "no passage has questions"),
    ([3], 'data 0: "paragraphs" must be a list'),
    ([ARTICLES[0], {"title": "T"}], 'data 1: "paragraphs" must be a list'),
    ([{"title": "T", "paragraphs": [3]}], 'data 0: paragraphs 0: "qas" must be a list'),
    ([{"title": "T", "paragraphs": [PARAGRAPH, {"context": "C", "qas": {}}]}],
     'data 0: paragraphs 1: "qas" must be a list'),
    ([{"title": 5, "paragraphs": [PARAGRAPH]}], 'data 0: paragraphs 0: "title" must be'),
    ([{"title": "T", "paragraphs": [PARAGRAPH | {"context": " "}]}],
     'data 0: paragraphs 0: "context" must be'),
    ([article("T", ("C", ["Q?"]))], 'data 0: paragraphs 0: qas 0: "answers" must be a list'),
    ([article("T", ("C", [asked("Q?", "A") | {"answers": "A"}]))],
     'data 0: paragraphs 0: qas 0: "answers" must be a list'),
    # One that is left out counts.
    ([article("T", ("C", [IMPOSSIBLE, asked(None, "A")]))],
     'data 0: paragraphs 0: qas 1: "question" and "text"'),
    ([article("T", ("C", [asked("Q?", 5)]))],
     'data 0: paragraphs 0: qas 0: "question" and "text"'),
    ([article("T", ("C", [asked("Q?", "A") | {"answers": ["A"]}]))],
     'data 0: paragraphs 0: qas 0: "question" and "text"'),
]


@pytest.mark.parametrize("articles, words", NO_SQUAD, ids=range(len(NO_SQUAD)))
def test_what_is_wrong_with_squads_json_is_one_line(articles, words, tmp_path):
    path = squad_file(tmp_path / "train-v1.1.json", articles)

    with pytest.raises(UserError, match=words) as error:
        knowledge.load(path, log=ignored)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["notes.txt", "NOTES.MD"])
def test_plain_text_is_for_another_program(name, tmp_path):
    path = tmp_path / name
    path.write_text("The Ob is a river.\n")

    with pytest.raises(UserError) as error:
        knowledge.load(path)
    assert f"python inner_loop.py --learn {path}" in str(error.value)
    assert "no questions" in str(error.value)


# ------------------------------------------------------------------------------- to fetch SQuAD

@pytest.fixture()
def site(monkeypatch, tmp_path):
    """A folder in place of SQuAD's site. What is in it is what is known."""
    folder = tmp_path / "site"
    folder.mkdir()
    squad = {}
    for split, articles in (("train", ARTICLES), ("validation", ARTICLES[1:])):
        path = squad_file(folder / f"{split}.json", articles)
        squad[split] = (path.name, hashlib.sha256(path.read_bytes()).hexdigest()[:32])
    monkeypatch.setattr(knowledge, "SITE", folder.as_uri())
    monkeypatch.setattr(knowledge, "SQUAD", squad)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture()
def fetch(monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["knowledge", "fetch", "squad", *map(str, words)])
        knowledge.main()
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


def test_the_other_split(site, fetch, tmp_path):
    fetch("--split", "validation", "--out", "mine.json")

    assert [task.name for task in knowledge.load(tmp_path / "mine.json")] == ["Ob"]


def test_a_passage_that_is_there_twice_is_one(site, fetch, tmp_path, monkeypatch):
    twice = [article("T", ("C", [asked("One?", "1")]), ("D", [asked("Two?", "2")]),
                     ("C", [asked("Three?", "3")]))]
    path = squad_file(site / "train.json", twice)
    known = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    monkeypatch.setitem(knowledge.SQUAD, "train", ("train.json", known))

    fetch("--out", "mine.json")

    first, second = knowledge.load(tmp_path / "mine.json")
    assert first.questions == ["One?", "Three?"]
    assert second.questions == ["Two?"]


def test_passages_are_drawn_by_the_seed_and_stay_in_order(site, fetch, tmp_path, monkeypatch):
    many = [article("T", *((f"{i}.", [asked("Q?", "A")]) for i in range(100)))]
    path = squad_file(site / "train.json", many)
    known = hashlib.sha256(path.read_bytes()).hexdigest()[:32]
    monkeypatch.setitem(knowledge.SQUAD, "train", ("train.json", known))

    def drawn(seed, name):
        fetch("--passages", 20, "--seed", seed, "--out", name)
        return [int(record["context"][:-1]) for record in json.loads(Path(name).read_text())]

    one, again, other = drawn(1, "a.json"), drawn(1, "b.json"), drawn(2, "c.json")
    assert one == again != other
    assert one == sorted(set(one))
    assert len(one) == 20


def test_more_passages_than_there_are(site, fetch, tmp_path):
    with pytest.raises(UserError, match="--passages 4: there are 3"):
        fetch("--passages", 4)
    assert nothing_new(tmp_path)


def test_a_file_that_is_there_is_not_overwritten(site, fetch, tmp_path, monkeypatch):
    (tmp_path / "squad_train.json").write_text("mine")
    # It is said before anything is downloaded.
    monkeypatch.setattr(urllib.request, "urlopen", None)

    with pytest.raises(UserError, match="squad_train.json exists already"):
        fetch()
    assert (tmp_path / "squad_train.json").read_text() == "mine"


def test_a_folder_that_is_not_there_is_said_first(site, fetch, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", None)

    with pytest.raises(UserError, match="none: no such folder"):
        fetch("--out", "none/squad.json")


@pytest.mark.parametrize("problem", [
    OSError("no network\nat all"), TimeoutError("timed out"), IncompleteRead(b"{"),
    ValueError("bad proxy" * 1000)], ids=lambda problem: type(problem).__name__)
def test_without_a_network_it_says_what_to_do(problem, fetch, tmp_path, monkeypatch, capsys):
    def urlopen(url, timeout):
        raise problem

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)

    with pytest.raises(UserError) as error:
        fetch()
    line = str(error.value)
    assert line.startswith("https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v1.1.json ")
    assert type(problem).__name__ in line
    assert "pass it as --train-data" in line
    assert "\n" not in line
    assert len(line) < 500
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_missing_at_the_site(site, fetch, tmp_path):
    (site / "train.json").unlink()

    with pytest.raises(UserError, match="could not be fetched .URLError"):
        fetch()
    assert nothing_new(tmp_path)


def test_another_file_than_the_known_one_is_refused(site, fetch, tmp_path):
    (site / "train.json").write_text("<html>Please log in to this network</html>")

    with pytest.raises(UserError, match="its SHA-256 is not the known one"):
        fetch()
    assert nothing_new(tmp_path)


@pytest.mark.parametrize("words", [[], ["fetch"], ["fetch", "arc"], ["get", "squad"],
                                   ["fetch", "squad", "--split", "test"],
                                   ["fetch", "squad", "--passages", "0"]])
def test_a_wrong_command_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["knowledge", *words])

    with pytest.raises(SystemExit) as end:
        cli(knowledge.main)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ------------------------------------------------------------------------------- examples

@pytest.mark.parametrize("name", ["train", "eval"])
def test_example_passages_hold_their_answers(name):
    tasks = knowledge.load(EXAMPLES / f"example_{name}.json")

    assert len(tasks) > 1
    for task in tasks:
        assert len(task.questions) == 3
        for answer in task.answers:
            assert judges.substring("", answer, task.context[0])
