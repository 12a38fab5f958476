"""Passages: data files, what a task asks, and the documents of a self-edit."""
import json
from pathlib import Path

import pytest

from files import UserError
from data import judges, knowledge
from selfedit import EMPTY, read_self_edit

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


@pytest.mark.parametrize("name", ["train", "eval"])
def test_example_passages_hold_their_answers(name):
    tasks = knowledge.load(EXAMPLES / f"example_{name}.json")

    assert len(tasks) > 1
    for task in tasks:
        assert len(task.questions) == 3
        for answer in task.answers:
            assert judges.substring("", answer, task.context[0])
