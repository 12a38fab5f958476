"""Judges: the rules, verdicts that are remembered, an OpenAI-compatible service, a local model."""
import json
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
import torch

from files import Lines, UserError
from data import judges, knowledge
from data.judges import (GRADING, RULES, Remembered, each, model_judge, openai, recall, substring,
                         yes_or_no)
from inner_loop import grade_all

# ------------------------------------------------------------------------------- rules


@dataclass
class Case:
    """An answer to judge, and the two rules' verdicts on it."""
    gold: str
    prediction: str
    recall: bool
    substring: bool


CASES = [
    # More words may stand around the answer; words count whole, in lower case.
    Case("Belgrade", "It was sent to Belgrade.", recall=True, substring=True),
    Case("Belgrade", "belgrade", recall=True, substring=True),
    Case("Belgrade", "Belgradeless", recall=False, substring=False),
    Case("a", "b", recall=False, substring=False),
    # Punctuation and articles do not count: 'yorks' is another word than 'york', though.
    Case("1,000", "1000 people", recall=True, substring=True),
    Case("the Duke of York", "York's duke", recall=False, substring=False),
    # The order counts for one rule only.
    Case("Sava Kosanović", "Kosanović, Sava", recall=True, substring=False),
    # Four words of five are .8, three of four are less.
    Case("one two three four five", "five four three two", recall=True, substring=False),
    Case("one two three four", "one two three", recall=False, substring=False),
    # A word that the gold answer has three times must be there as often.
    Case("no no no", "no", recall=False, substring=False),
    # Nothing is said.
    Case("Paris", "", recall=False, substring=False),
    Case("Paris", "  \n", recall=False, substring=False),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_rules(case):
    assert recall("?", case.gold, case.prediction) is case.recall
    assert substring("?", case.gold, case.prediction) is case.substring


def test_the_judges_of_a_run_are_these_rules():
    triples = [("?", case.gold, case.prediction) for case in CASES]

    assert RULES["rule"](triples) == [case.recall for case in CASES]
    assert RULES["substring"](triples) == [case.substring for case in CASES]
    assert RULES.keys() == {"rule", "substring"}


def test_a_rule_for_one_makes_a_judge_of_many():
    def ends_alike(question, gold, prediction):
        return gold[-1:] == prediction[-1:] and len(question)

    judge = each(ends_alike)

    verdicts = judge([("q", "ab", "xb"), ("q", "ab", "ba"), ("", "ab", "ab")])
    # They are bools, whatever the rule returns: they go into a JSON file.
    assert [type(verdict) for verdict in verdicts] == [bool, bool, bool]
    assert verdicts == [True, False, False]


# ------------------------------------------------------------------------------- memory

class Recorder:
    """A judge that remembers what it was asked; right are the predictions that begin with x."""

    def __init__(self):
        self.calls = []

    def __call__(self, triples):
        self.calls.append(list(triples))
        return [prediction.startswith("x") for _, _, prediction in triples]


def triples_of(*predictions):
    return [("q", "gold", prediction) for prediction in predictions]


def test_a_slow_judge_is_asked_about_nothing_twice():
    slow = Recorder()
    judge = Remembered(slow)

    first = judge(triples_of("x", "y", "x"))
    second = judge(triples_of("y", "z", "x"))

    assert first == [True, False, True]
    assert second == [False, False, True]
    assert slow.calls == [triples_of("x", "y"), triples_of("z")]


def test_another_question_is_another_matter():
    slow = Recorder()
    judge = Remembered(slow)

    judge([("q", "gold", "x"), ("other q", "gold", "x"), ("q", "other gold", "x")])

    assert len(slow.calls[0]) == 3


def test_verdicts_are_kept_in_a_file(tmp_path):
    path = tmp_path / "judge.jsonl"
    Remembered(Recorder(), Lines(path))(triples_of("x", "y"))
    slow = Recorder()

    again = Remembered(slow, Lines(path))(triples_of("x", "y", "z"))

    assert again == [True, False, False]
    assert slow.calls == [triples_of("z")]


# What a kill may leave of a line: cut within the key, after it, before its last letter.
@pytest.mark.parametrize("torn", [
    '[["q", "gold", "z',
    '[["q", "gold", "z"]',
    '[["q", "gold", "z"], false',
])
def test_a_line_that_was_cut_short_is_asked_again(torn, tmp_path):
    path = tmp_path / "judge.jsonl"
    Remembered(Recorder(), Lines(path))(triples_of("x"))
    with path.open("a") as f:
        f.write(torn)
    slow = Recorder()

    assert Remembered(slow, Lines(path))(triples_of("x", "z")) == [True, False]
    assert slow.calls == [triples_of("z")]
    # The new verdict is on a line of its own: a third run knows both.
    unasked = Recorder()
    assert Remembered(unasked, Lines(path))(triples_of("x", "z")) == [True, False]
    assert unasked.calls == []


def test_verdicts_are_in_the_file_before_all_are_known(tmp_path):
    path = tmp_path / "judge.jsonl"
    triples = [("q", "gold", f"x{i}") for i in range(300)]
    asked = []

    def fails_later(some):
        asked.append(len(some))
        if len(asked) == 2:
            raise UserError("the service is down")
        return [True] * len(some)

    with pytest.raises(UserError):
        Remembered(fails_later, Lines(path))(triples)

    rest = Recorder()
    assert Remembered(rest, Lines(path))(triples) == [True] * 300
    assert len(rest.calls[0]) == 300 - asked[0]


def test_no_judge_is_asked_about_an_empty_answer(passages):
    slow = Recorder()
    task = replace(knowledge.load(passages)[0], judge=slow)

    (right,) = grade_all([task], [["x", " \n"]])

    assert right == [True, False]
    assert slow.calls == [[("Which river?", "Ob0", "x")]]


# ------------------------------------------------------------------------------- a service

class Stub(ThreadingHTTPServer):
    """An OpenAI-compatible service. `answer` is a function of the text that is asked: what it
    returns is the reply, or an HTTP status (a number) to refuse with, or a whole body (a dict)."""
    request_queue_size = 64     # all of the judge's threads may knock at once

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.answer = answer
        self.requests = []      # (path, headers, body) of each
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()


class StubHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.answer(body["messages"][0]["content"])
        status, reply = 200, {"choices": [{"message": {"content": answer}}]}
        if isinstance(answer, dict):
            reply = answer
        if isinstance(answer, int):
            status, reply = answer, {"error": {"message": "not now", "code": answer}}
        self.send_response(status)
        self.end_headers()
        # Over several lines, as OpenAI does.
        self.wfile.write(json.dumps(reply, indent=2).encode())

    def log_message(self, *_):
        pass


@pytest.fixture()
def serve(monkeypatch):
    """serve(answer) starts a service that the judge talks to; no time passes before a retry."""
    stubs = []

    def start(answer):
        stubs.append(Stub(answer))
        # The slash at the end is what a user may well write.
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{stubs[-1].server_port}/v1/")
        return stubs[-1]

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_JUDGE", raising=False)
    monkeypatch.setattr(judges, "BACK_OFF", 0.0)
    yield start
    for stub in stubs:
        stub.stop()


class RefusesAtFirst:
    """Says no to everything, after `times` refusals with an HTTP status."""

    def __init__(self, status, times):
        self.status = status
        self.left = times

    def __call__(self, text):
        if self.left == 0:
            return "no"
        self.left -= 1
        return self.status


def test_the_request_is_what_the_service_expects(serve):
    stub = serve(lambda text: "yes")

    openai([("Which river?", "Ob", "The Ob.")])

    ((path, headers, body),) = stub.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "model": "gpt-4.1",
        "temperature": 0,
        "messages": [{"role": "user",
                      "content": GRADING.format("Which river?", "Ob", "The Ob.")}]}


def test_another_model_can_judge(serve, monkeypatch):
    stub = serve(lambda text: "yes")
    monkeypatch.setenv("OPENAI_JUDGE", "another")

    openai(triples_of("x"))

    _, _, body = stub.requests[0]
    assert body["model"] == "another"


@pytest.mark.parametrize("reply, right", [
    ("yes", True),
    ("Yes.", True),
    ("**Yes**, it is.", True),
    ("no", False),
    ("No, yes and no.", False),
    ("Yesterday.", False),
    ("", False),
])
def test_a_reply_must_have_the_word_yes_and_not_no(reply, right, serve):
    serve(lambda text: reply)

    assert openai(triples_of("x")) == [right]


def test_many_requests_come_back_in_their_order(serve):
    stub = serve(lambda text: "yes" if "Given answer: x" in text else "no")
    triples = [(f"q{i}?", "gold", "x" if i % 3 else "y") for i in range(40)]

    verdicts = openai(triples)

    assert verdicts == [bool(i % 3) for i in range(40)]
    assert len(stub.requests) == 40


def test_remembered_verdicts_cost_nothing(serve, tmp_path):
    stub = serve(lambda text: "yes")
    path = tmp_path / "judge.jsonl"
    triples = triples_of("x", "y", "z")
    Remembered(openai, Lines(path))(triples)

    again = Remembered(openai, Lines(path))(triples)

    assert again == [True, True, True]
    assert len(stub.requests) == 3


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_time_may_mend_is_tried_again(status, serve):
    stub = serve(RefusesAtFirst(status, times=2))

    assert openai(triples_of("x")) == [False]
    assert len(stub.requests) == 3


def test_each_wait_is_twice_as_long(serve, monkeypatch):
    serve(RefusesAtFirst(429, times=4))
    waits = []
    monkeypatch.setattr(judges, "BACK_OFF", 1.0)
    monkeypatch.setattr(judges, "time", SimpleNamespace(sleep=waits.append))

    openai(triples_of("x"))

    assert waits == [1, 2, 4, 8]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_time_does_not_mend_is_said_at_once(status, serve):
    stub = serve(RefusesAtFirst(status, times=100))

    with pytest.raises(UserError, match=f"does not answer .HTTP {status}"):
        openai(triples_of("x"))
    assert len(stub.requests) == 1


def test_a_service_that_never_answers_is_given_up(serve):
    stub = serve(RefusesAtFirst(503, times=100))

    with pytest.raises(UserError, match="does not answer .HTTP 503"):
        openai(triples_of("x"))
    assert len(stub.requests) == 6


def test_a_service_that_is_not_there_is_said(serve):
    serve(lambda text: "yes").stop()

    with pytest.raises(UserError, match="does not answer.*nothing is lost"):
        openai(triples_of("x"))


def test_a_refusal_is_one_line(serve):
    serve(RefusesAtFirst(401, times=100))

    with pytest.raises(UserError, match="nothing is lost") as error:
        openai(triples_of("x"))
    assert "not now" in str(error.value)    # the service's own words
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("body", [
    {"choices": []},
    {"other": 1},
    # What a model that refuses to speak says.
    {"choices": [{"message": {"content": None, "refusal": "I can't."}}]},
])
def test_a_reply_of_another_form_is_said(body, serve):
    serve(lambda text: body)

    with pytest.raises(UserError, match="does not answer"):
        openai(triples_of("x"))


def test_a_key_is_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        openai(triples_of("x"))


# ------------------------------------------------------------------------------- a model

# All that a yes or a no may begin with.
YES = ("yes", "Yes", " yes", " Yes")
NO = ("no", "No", " no", " No")


def test_a_model_says_what_the_next_token_s_logits_say(tiny, tok):
    texts = [f"Question {i}? " + chr(ord("a") + i) * i for i in range(1, 24)]
    expected = []
    for text in texts:
        logits = tiny(torch.tensor([tok.prompt(text)]))[0, -1]
        p = logits.softmax(-1).tolist()
        yes = sum(p[tok.encode(form)[0]] for form in YES)
        no = sum(p[tok.encode(form)[0]] for form in NO)
        expected.append(yes > no)

    # Seven at once, so that the last batch is not full.
    verdicts = yes_or_no(tiny, tok, texts, at_once=7)

    assert verdicts == expected
    assert set(verdicts) == {True, False}


def test_the_model_is_asked_with_the_criteria(tiny, tok, monkeypatch):
    asked = []
    monkeypatch.setattr(judges, "yes_or_no", lambda model, tok, texts: asked.extend(texts))

    model_judge(tiny, tok, [("Which river?", "Ob", "The Ob.")])

    assert asked == [GRADING.format("Which river?", "Ob", "The Ob.")]


def test_a_judge_that_runs_out_of_memory_reads_fewer_at_once(tiny, tok, monkeypatch):
    texts = [f"Is {i} a prime?" for i in range(9)]
    expected = yes_or_no(tiny, tok, texts)
    hidden = tiny.hidden

    def little(ids, position, attend):
        if (position == 0).sum() > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(ids, position, attend)

    monkeypatch.setattr(tiny, "hidden", little)

    assert yes_or_no(tiny, tok, texts) == expected


def test_the_criteria_name_question_gold_answer_and_prediction():
    text = GRADING.format("Which river?", "Ob", "The Wen.")

    assert "Question: Which river?\nCorrect answer: Ob\nGiven answer: The Wen.\n" in text
