"""Judges: the rules, verdicts that are remembered, an OpenAI-compatible service, a local model."""
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch

from data import judges, knowledge
from data.judges import (GRADING, RULES, Remembered, check_openai, each, gist, model_judge, openai,
                         openai_judge, openai_verdicts, post, recall, substring, yes_or_no)
from inner_loop import grade_all
from support.files import UserError
from support.records import Lines
from tests.helpers import read_lines

# ------------------------------------------------------------------------------- rules


@dataclass
class Case:
    """An answer to judge, and two rules' verdicts on it."""
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


@pytest.mark.parametrize("gold, prediction, right", [
    ("one two three four", "one two three", True),          # .75
    ("one two", "one", False),                              # .5
    ("the Duke of York", "the duke in York", True),         # "of" is small
    ("the Duke of York", "of the", False),
    ("it", "It is it.", True),                              # nothing else to go by
    ("Paris", "", False)])
def test_the_mild_rule(gold, prediction, right):
    assert gist("?", gold, prediction) is right


def test_the_judges_of_a_run_are_these_rules():
    triples = [("?", case.gold, case.prediction) for case in CASES]

    assert RULES["rule"](triples) == [case.recall for case in CASES]
    assert RULES["substring"](triples) == [case.substring for case in CASES]
    assert RULES.keys() == {"rule", "gist", "substring"}


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


# What a kill may leave of a line: cut within the triple, after it, before its last letter.
@pytest.mark.parametrize("torn", [
    '{"judge": "", "triple": ["q", "gold", "z',
    '{"judge": "", "triple": ["q", "gold", "z"]',
    '{"judge": "", "triple": ["q", "gold", "z"], "verdict": false',
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


def test_each_verdict_of_a_stream_is_in_the_file_before_the_next_is_asked_for(tmp_path):
    path = tmp_path / "judge.jsonl"
    seen = []

    def stream(triples):
        for triple in reversed(triples):    # in any order
            yield triple, triple[2] == "x"
            seen.append(len(read_lines(path)))
        raise UserError("the service is down")

    with pytest.raises(UserError):
        Remembered(None, Lines(path), stream=stream)(triples_of("x", "y", "z"))

    assert seen == [1, 2, 3]
    assert Remembered(None, Lines(path))(triples_of("x", "y", "z")) == [True, False, False]


def test_another_judges_verdicts_are_not_its_own(tmp_path):
    path = tmp_path / "judge.jsonl"
    Remembered(each(lambda *_: False), Lines(path), "strict")(triples_of("x"))
    slow = Recorder()

    assert Remembered(slow, Lines(path), "mild")(triples_of("x")) == [True]
    assert slow.calls == [triples_of("x")]
    # Both are kept, each for its own judge.
    assert read_lines(path) == [
        {"judge": "strict", "triple": ["q", "gold", "x"], "verdict": False},
        {"judge": "mild", "triple": ["q", "gold", "x"], "verdict": True}]
    unasked = Recorder()
    assert Remembered(unasked, Lines(path), "strict")(triples_of("x")) == [False]
    assert unasked.calls == []


@pytest.mark.parametrize("record", [
    [["q", "gold", "x"], False],    # of an older version
    {"triple": ["q", "gold", "x"], "verdict": False},
    {"judge": "", "verdict": False},
    {"judge": "", "triple": ["q", "gold"], "verdict": False},
    {"judge": "", "triple": ["q", "gold", ["x"]], "verdict": False},
    {"judge": "", "triple": ["q", "gold", "x"], "verdict": None},
    None,
])
def test_a_record_of_another_form_is_asked_again(record, tmp_path):
    path = tmp_path / "judge.jsonl"
    path.write_text(json.dumps(record) + "\n")
    slow = Recorder()

    assert Remembered(slow, Lines(path))(triples_of("x")) == [True]
    assert slow.calls == [triples_of("x")]


def test_no_judge_is_asked_about_an_empty_answer(passages):
    slow = Recorder()
    task = replace(knowledge.load(passages)[0], judge=slow)

    (right,) = grade_all([task], [["x", " \n"]])

    assert right == [True, False]
    assert slow.calls == [[("Which river?", "Ob0", "x")]]


# ------------------------------------------------------------------------------- a service

class Stub(ThreadingHTTPServer):
    """An OpenAI-compatible service. `answer` is a function of the text that is asked: what it
    returns is the reply, or an HTTP status (a number) to refuse with, or a whole body (a dict), or
    all that goes over the wire: bytes, or an iterator of them, each sent after a moment."""
    request_queue_size = 64     # all of the judge's threads may knock at once

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.answer = answer
        self.requests = []      # (path, headers, body) of each
        self.over = Event()
        Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """The judge need not read all."""


class StubHandler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.answer(body["messages"][0]["content"] if body else "")
        if isinstance(answer, (str, int, dict)):
            status, reply = 200, {"choices": [{"message": {"content": answer}}]}
            if isinstance(answer, dict):
                reply = answer
            if isinstance(answer, int):
                status, reply = answer, {"error": {"message": "not now", "code": answer}}
            self.send_response(status)
            self.end_headers()
            # Over several lines, as OpenAI does.
            answer = json.dumps(reply, indent=2).encode()
        if isinstance(answer, bytes):
            self.wfile.write(answer)
        else:
            for some in answer:
                self.wfile.write(some)
                if self.server.over.wait(0.02):
                    break

    do_GET = do_POST    # what a redirect makes of it

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


def test_verdicts_come_with_their_triples_in_any_order(serve):
    slow = Event()

    def answer(text):
        if "Given answer: x" in text:
            slow.wait(5)
            return "yes"
        return "no"

    serve(answer)
    stream = openai_verdicts(triples_of("x", "y", "z"))

    others = {next(stream), next(stream)}
    assert others == {(triple, False) for triple in triples_of("y", "z")}
    slow.set()
    assert list(stream) == [(triples_of("x")[0], True)]


def test_remembered_verdicts_cost_nothing(serve, tmp_path):
    stub = serve(lambda text: "yes")
    path = tmp_path / "judge.jsonl"
    triples = triples_of("x", "y", "z")
    openai_judge(Lines(path))(triples)

    again = openai_judge(Lines(path))(triples)

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


# ------------------------------------------------------------------------------- misbehaviour

OK = b"HTTP/1.1 200 OK\r\n\r\n"
ANSWER = b'{"choices": [{"message": {"content": "yes"}}]}'


def whole(body, head=OK):
    """The bytes of a reply with this body."""
    return head + (body if isinstance(body, bytes) else json.dumps(body).encode())


def saying(content):
    return whole({"choices": [{"message": {"content": content}}]})


def one_byte_at_a_time(text):
    return (bytes([c]) for c in text)


def refused(triples=(("q", "gold", "x"),)):
    """The line that the judge says; it must be one, fit for a terminal, and without the key."""
    begin = time.monotonic()
    with pytest.raises(UserError, match="does not answer.*nothing is lost") as error:
        openai(triples)
    assert time.monotonic() - begin < 20     # a single request may last 60
    line = str(error.value)
    assert line.isprintable() and len(line) < 320
    assert "secret" not in line
    return line


CHUNKED = OK[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
# What comes over the wire, and a part of the line that is said.
NO_REPLIES = {
    "no choices": (whole({"choices": []}), "IndexError"),
    "another object": (whole({"other": 1}), "KeyError"),
    "empty object": (whole({}), "KeyError"),
    "a list": (whole([]), "TypeError"),
    "null": (whole(None), "TypeError"),
    "a number for content": (saying(7), "AttributeError"),
    "a list for content": (saying([{"type": "text", "text": "yes"}]), "AttributeError"),
    "no JSON": (whole(b"<html>yes</html>"), "<html>yes"),
    "half of it": (whole(ANSWER[:-9]), "JSONDecodeError"),
    "nothing": (OK, "JSONDecodeError"),
    "no bytes at all": (b"", "RemoteDisconnected"),
    "100,000 brackets": (whole(b"[" * 100_000), "RecursionError"),
    "a number of 10,000 digits": (whole(b"1" * 10_000), "ValueError"),
    "another encoding": (whole("é".encode("latin-1") * 9), "UnicodeDecodeError"),
    "cut": (whole(ANSWER[:-9], b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"), ""),
    "a broken chunk": (whole(b"zz\r\n" + ANSWER, CHUNKED), "IncompleteRead"),
    # http.client's read(n) would read all of it.
    "3 MB in a chunk of -1": (whole(b"-1\r\n" + b"x" * 3_000_000, CHUNKED), "LineTooLong"),
    "a bad status line": (b"\x1b[31mHELLO\r\n\r\n", "BadStatusLine"),
    "a bad status": (b"HTTP/1.1 OK yes\r\n\r\n", "BadStatusLine"),
    "200 headers": (OK[:-2] + b"A: b\r\n" * 200 + b"\r\n" + ANSWER, "more than 100 headers"),
    "a long header": (OK[:-2] + b"A: " + b"b" * 70_000 + b"\r\n\r\n" + ANSWER, "LineTooLong"),
    "3 MB": (whole(b'{"x": "' + b"x" * 3_000_000 + b'", ' + ANSWER[1:]), "JSONDecodeError"),
    "404 in colour, over lines": (
        b"HTTP/1.1 404 \x1b[31mNo\r\n\r\n" + b"\x1b[2Jno\r\nsuch\n\0page" * 99, "HTTP 404"),
    "404 without a word": (b"HTTP/1.1 404 Not Found\r\n\r\n", "HTTP 404 Not Found"),
    "404, cut": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nno", "HTTP 404"),
    "the key": (b"HTTP/1.1 401 secret\r\n\r\nThe key secret is wrong", "The key KEY is wrong"),
    "the key, later": (whole(b"x" * 170 + b"secret" * 999, b"HTTP/1.1 401 No\r\n\r\n"), "KEY"),
    "the key instead of HTTP": (b"secret\r\n\r\n", "BadStatusLine: KEY"),
}


@pytest.mark.parametrize("case", NO_REPLIES)
def test_what_is_no_reply_is_one_line(case, serve):
    reply, said = NO_REPLIES[case]
    stub = serve(lambda text: reply)

    assert said in refused()
    assert len(stub.requests) == (1 if reply[9:10] == b"4" else 6)


def test_a_model_that_refuses_to_judge_says_no(serve):
    refusal = {"choices": [{"message": {"content": None, "refusal": "I can't."}}]}
    serve(lambda text: whole(refusal))

    assert openai([("q", "gold", "x")]) == [False]


@pytest.mark.parametrize("reply, right", [
    (saying("Right or wrong? Who knows."), False),
    (saying("\x1b[31mYES"), False),     # "31mYES" is one word
    (saying("yes\ud800"), True),
    (saying("yes" + " " * 100_000), True),
    (whole(ANSWER.decode().encode("utf-16")), True),
    (whole(ANSWER, b"HTTP/1.1 201 Created\r\n\r\n"), True),
    # The connection ends too early, but all is there.
    (whole(ANSWER, b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"), True),
])
def test_odd_replies_are_verdicts(reply, right, serve):
    serve(lambda text: reply)

    assert openai(triples_of("x")) == [right]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(status, serve):
    other = serve(lambda text: "yes")
    head = f"HTTP/1.1 {status} Moved\r\nLocation: http://127.0.0.1:{other.server_port}/\r\n\r\n"
    stub = serve(lambda text: head.encode())

    assert f"HTTP {status} Moved" in refused()
    assert len(stub.requests) == 1
    assert other.requests == []


def test_no_more_is_read_of_a_reply_than_fits(serve, monkeypatch):
    monkeypatch.setattr(judges, "LONGEST", 1000)
    stub = serve(lambda text: OK + b"x" * 100_000)

    _, _, text = post(f"http://127.0.0.1:{stub.server_port}", "secret", b"")

    assert text == b"x" * 1000


@pytest.mark.parametrize("begin", [OK, b"HTTP/1.1 404 No\r\n\r\n", b""])
def test_a_reply_without_end_is_given_up(begin, serve, monkeypatch):
    """Each byte is in time: only the whole is not."""
    monkeypatch.setattr(judges, "DEADLINE", 0.1)
    serve(lambda text: one_byte_at_a_time(begin + b"HTTP/1.1" + b" " * 10_000))

    assert "no whole reply within 0.1 s" in refused()


def test_a_slow_reply_counts_if_it_is_in_time(serve):
    serve(lambda text: (saying("yes")[i:i + 9] for i in range(0, 99, 9)))

    assert openai(triples_of("x")) == [True]


def test_what_was_answered_before_a_failure_is_in_the_file(serve, tmp_path):
    path = tmp_path / "judge.jsonl"
    triples = [("q", "gold", f"x{i}" if i != 20 else "z") for i in range(200)]
    answered = []

    def answer(text):
        if "Given answer: z" in text:
            return 401
        answered.append(text)
        return "yes"

    serve(answer)
    with pytest.raises(UserError, match="HTTP 401"):
        openai_judge(Lines(path))(triples)

    # Those that were under way as well; and no others were begun.
    kept = read_lines(path)
    assert 20 <= len(kept) == len(answered) < 199
    assert {GRADING.format(*record["triple"]) for record in kept} == set(answered)
    assert kept[0].keys() == {"judge", "triple", "verdict"}
    stub = serve(lambda text: "yes")
    Remembered(None, Lines(path), kept[0]["judge"], openai_verdicts)(triples)
    assert len(stub.requests) == 200 - len(kept)


HANGING = """
import signal
from data import judges
from support.files import cli
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores it
cli(lambda: judges.openai([("q", "gold", str(i)) for i in range(40)]))
"""


def test_ctrl_c_ends_a_judge_that_hangs(serve):
    asked = Event()
    stub = serve(lambda text: asked.set() or stub.over.wait(30) or "yes")
    process = subprocess.Popen([sys.executable, "-c", HANGING], stderr=subprocess.PIPE, text=True,
                               cwd=Path(judges.__file__).parent.parent)
    try:
        assert asked.wait(60)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert time.monotonic() - begin < 5
    finally:
        process.kill()
    assert process.returncode == 1
    assert said.startswith("error: interrupted") and said.count("\n") == 1


# ------------------------------------------------------------------------------- the environment

def test_a_key_is_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        openai(triples_of("x"))
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        check_openai()


@pytest.mark.parametrize("key", ["secret\n", "secret\r\n", " \tsecret"])
def test_white_space_around_a_key_is_none_of_it(key, serve, monkeypatch):
    stub = serve(lambda text: "yes")
    monkeypatch.setenv("OPENAI_API_KEY", key)

    assert openai(triples_of("x")) == [True]
    assert stub.requests[0][1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("key", ["sec\nret", "sec\x1bret", "sec ret", "sec\u2026ret",
                                 "sec\udcffret", "secrét"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key, serve, monkeypatch):
    stub = serve(lambda text: "yes")
    monkeypatch.setenv("OPENAI_API_KEY", key)

    with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
        openai(triples_of("x"))
    assert "sec" not in str(error.value) and str(error.value).isprintable()
    assert stub.requests == []


@pytest.mark.parametrize("base", [
    "foo", "", "localhost:8000/v1", "ftp://host/v1", "file:///etc/passwd", "http://", "http:///v1",
    "http://host:port/v1", "http://host:99999/v1", "http://host:0", "http://[::1", "http://a b/v1",
    "http://host/v\n1", "http://höst/v1", "http://me:secret@host/v1"])
def test_a_base_url_must_be_one(base, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", base)

    with pytest.raises(UserError, match="OPENAI_BASE_URL") as error:
        check_openai()
    assert str(error.value).isprintable() and "secret" not in str(error.value)


@pytest.mark.parametrize("base", ["http://127.0.0.1:8000/v1", "HTTPS://api.example.org/",
                                  " http://[::1]:8000\n"])
def test_a_base_url_that_may_be_right_is_taken(base, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", base)
    monkeypatch.setenv("OPENAI_JUDGE", "another")

    assert check_openai() == (base.strip().rstrip("/"), "another", "secret")


def test_another_model_or_endpoint_is_another_judge(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_JUDGE", raising=False)
    names = [openai_judge(None).name]
    monkeypatch.setenv("OPENAI_JUDGE", "another")
    names.append(openai_judge(None).name)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    names.append(openai_judge(None).name)

    assert names == ["gpt-4.1 at https://api.openai.com/v1", "another at https://api.openai.com/v1",
                     "another at http://localhost:8000/v1"]


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
