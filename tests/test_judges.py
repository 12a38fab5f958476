"""Judges: the rules, verdicts that are remembered, an OpenAI-compatible service, a local model."""
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch

from data import judges, knowledge
from data.judges import (GRADING, RULES, Remembered, check_openai, each, model_judge, openai,
                         openai_judge, openai_verdicts, post, yes_or_no)
from inner_loop import grade_all
from support.files import Lines, UserError
from tests.helpers import read_lines

# ------------------------------------------------------------------------------- rules

# gold answer, prediction, and the verdicts of recall, gist and substring
CASES = [
    # More words may stand around the answer; words count whole, in lower case.
    ("Belgrade", "It was sent to Belgrade.", True, True, True),
    ("Belgrade", "belgrade", True, True, True),
    ("Belgrade", "Belgradeless", False, False, False),
    ("a", "b", False, False, False),
    # Punctuation and articles do not count: 'yorks' is another word than 'york', though.
    ("1,000", "1000 people", True, True, True),
    ("the Duke of York", "York's duke", False, False, False),
    # The order counts for one rule only.
    ("Sava Kosanović", "Kosanović, Sava", True, True, False),
    # Four words of five are .8, three of four .75, one of two .5.
    ("one two three four five", "five four three two", True, True, False),
    ("one two three four", "one two three", False, True, False),
    ("one two", "one", False, False, False),
    # The gist has no small words, unless there is nothing else to go by.
    ("the Duke of York", "the duke in York", False, True, False),
    ("the Duke of York", "of the", False, False, False),
    ("it", "It is it.", True, True, True),
    # A word that the gold answer has three times must be there as often.
    ("no no no", "no", False, False, False),
    # Nothing is said.
    ("Paris", "", False, False, False),
    ("Paris", "  \n", False, False, False),
    # Any script's punctuation, and either form of a letter.
    *((gold, prediction, True, True, True) for gold, prediction in [
        ("华北平原", "北京位于华北平原。"), ("東京", "答えは「東京」です"),
        ("القاهرة", "القاهرة،"), ("Beyonc\u00e9", "Beyonce\u0301"), ("don't", "don\u2019t"),
        ("don't", "don\u02bct"), ("１９４５年", "1945年"), ("दिल्ली", "दिल्ली।"),
        ("1963–64", "the 1963-64"),
        ("กรุงเทพ", "เมืองหลวงคือกรุงเทพ"), ("¿Qué?", "«Qué»"), ("서울", "서울\u200b!")]),
    ("東京", "京東", True, True, False), ("東京都", "大阪", False, False, False),
    # What has no word is compared as it is.
    ("A", "a ", True, True, True), ("A", "a town", False, False, False),
    ("+", "-", False, False, False),
]


@pytest.mark.parametrize("gold, prediction, recall, gist, substring", CASES)
def test_the_judges_of_a_run_are_these_rules(gold, prediction, recall, gist, substring):
    verdicts = {name: judge([("?", gold, prediction)]) for name, judge in RULES.items()}
    assert verdicts == {"rule": [recall], "gist": [gist], "substring": [substring]}


def test_a_rule_for_one_makes_a_judge_of_many():
    def ends_alike(question, gold, prediction):
        return gold[-1:] == prediction[-1:] and len(question)

    verdicts = each(ends_alike)([("q", "ab", "xb"), ("q", "ab", "ba"), ("", "ab", "ab")])
    # They are bools, whatever the rule returns: they go into a JSON file.
    assert [type(verdict) for verdict in verdicts] == [bool, bool, bool]
    assert verdicts == [True, False, False]


@pytest.mark.parametrize("rule, agrees, kappa", [("rule", .887, .73), ("gist", .899, .77),
                                                 ("substring", .876, .71)])
def test_how_far_the_rules_agree_with_gpt(rule, agrees, kappa, shared_data):
    """With its verdicts on the released answers: the numbers of docs/results/official.md."""
    mine, gpt = [], []
    for record in json.loads((shared_data / "squad_val_60.json").read_text()):
        for method in record["released"].values():
            for x in method["answers"]:
                for arm in ("baseline", "adapter"):
                    (verdict,) = RULES[rule]([(x["question"], x["gold"], x[arm])])
                    mine.append(verdict and bool(x[arm].strip()))
                    gpt.append(x[f"{arm}_ok"])

    observed = sum(a == b for a, b in zip(mine, gpt)) / len(gpt)
    # Cohen's kappa: how far that is beyond chance.
    p, q = sum(mine) / len(mine), sum(gpt) / len(gpt)
    chance = p * q + (1 - p) * (1 - q)
    assert len(gpt) == 2830 and observed == pytest.approx(agrees, abs=5e-4)
    assert (observed - chance) / (1 - chance) == pytest.approx(kappa, abs=5e-3)


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


@pytest.fixture()
def path(tmp_path):
    return tmp_path / "judge.jsonl"


def test_a_slow_judge_is_asked_about_nothing_twice():
    slow = Recorder()
    judge = Remembered(slow)
    assert judge(triples_of("x", "y", "x")) == [True, False, True]
    assert judge(triples_of("y", "z", "x")) == [False, False, True]
    assert slow.calls == [triples_of("x", "y"), triples_of("z")]
    # Another question is another matter.
    judge([("other q", "gold", "x"), ("q", "other gold", "x")])
    assert len(slow.calls[2]) == 2


@pytest.mark.parametrize("line", [
    "",
    # What a kill may leave: cut within the triple, after it, before the last letter.
    '{"judge": "", "triple": ["q", "gold", "xx',
    '{"judge": "", "triple": ["q", "gold", "xx"]',
    '{"judge": "", "triple": ["q", "gold", "xx"], "verdict": false',
    # Of an older version, or of another form.
    '[["q", "gold", "xx"], false]\n',
    '{"triple": ["q", "gold", "xx"], "verdict": false}\n',
    '{"judge": "", "verdict": false}\n',
    '{"judge": "", "triple": ["q", "gold"], "verdict": false}\n',
    '{"judge": "", "triple": ["q", "gold", ["xx"]], "verdict": false}\n',
    '{"judge": "", "triple": ["q", "gold", "xx"], "verdict": null}\n',
    "null\n",
])
def test_verdicts_are_kept_in_a_file_and_what_is_none_there_is_asked_again(line, path):
    Remembered(Recorder(), Lines(path))(triples_of("x", "y"))
    with path.open("a") as f:
        f.write(line)
    slow, unasked = Recorder(), Recorder()
    triples = triples_of("x", "y", "xx")
    assert Remembered(slow, Lines(path))(triples) == [True, False, True]
    assert slow.calls == [triples_of("xx")]
    # The new verdict is on a line of its own: a third run knows all.
    assert Remembered(unasked, Lines(path))(triples) == [True, False, True]
    assert unasked.calls == []


def test_verdicts_are_in_the_file_before_all_are_known(path):
    triples = triples_of(*(f"x{i}" for i in range(300)))
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


def test_each_verdict_of_a_stream_is_in_the_file_before_the_next_is_asked_for(path):
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


def test_another_judges_verdicts_are_not_its_own(path):
    slow, unasked = Recorder(), Recorder()
    Remembered(each(lambda *_: False), Lines(path), "strict")(triples_of("x"))
    assert Remembered(slow, Lines(path), "mild")(triples_of("x")) == [True]
    assert slow.calls == [triples_of("x")]
    # Both are kept, each for its own judge.
    assert read_lines(path) == [
        {"judge": "strict", "triple": ["q", "gold", "x"], "verdict": False},
        {"judge": "mild", "triple": ["q", "gold", "x"], "verdict": True}]
    assert Remembered(unasked, Lines(path), "strict")(triples_of("x")) == [False]
    assert unasked.calls == []


def test_no_judge_is_asked_about_an_empty_answer(passages):
    slow = Recorder()
    task = replace(knowledge.load(passages)[0], judge=slow)
    assert grade_all([task], [["x", " \n"]]) == [[True, False]]
    assert slow.calls == [[("Which river?", "Ob0", "x")]]


# ------------------------------------------------------------------------------- a service

OK = b"HTTP/1.1 200 OK\r\n\r\n"
ANSWER = b'{"choices": [{"message": {"content": "yes"}}]}'


def whole(body, head=OK):
    """The bytes of a reply with this body; an object is over several lines, as OpenAI does it."""
    return head + (body if isinstance(body, bytes) else json.dumps(body, indent=2).encode())


def saying(content):
    return whole({"choices": [{"message": {"content": content}}]})


class Stub(ThreadingHTTPServer):
    """An OpenAI-compatible service. `answer` is a function of the text that is asked: what it
    returns is the reply, or an HTTP status (a number) to refuse with, or all that goes over the
    wire: bytes, or an iterator of them, each sent after a moment."""
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
        if isinstance(answer, str):
            answer = saying(answer)
        if isinstance(answer, int):
            answer = b"HTTP/1.1 %d No\r\n\r\nnot now" % answer
        for some in [answer] if isinstance(answer, bytes) else answer:
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


def test_the_request_is_what_the_service_expects(serve, monkeypatch):
    stub = serve(lambda text: "yes")
    openai([("Which river?", "Ob", "The Ob.")])
    monkeypatch.setenv("OPENAI_JUDGE", "another")
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")
    openai(triples_of("x"))

    (path, headers, body), (_, other_headers, other_body) = stub.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == other_headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "model": "gpt-4.1",
        "temperature": 0,
        "messages": [{"role": "user",
                      "content": GRADING.format("Which river?", "Ob", "The Ob.")}]}
    assert other_body["model"] == "another"


def test_many_requests_come_back_in_their_order(serve):
    stub = serve(lambda text: "yes" if "Given answer: x" in text else "no")
    triples = [(f"q{i}?", "gold", "x" if i % 3 else "y") for i in range(40)]
    assert openai(triples) == [bool(i % 3) for i in range(40)]
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


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_time_may_mend_is_tried_again_each_time_after_twice_as_long(
        status, serve, monkeypatch):
    replies = iter([status] * 4 + ["no"])
    stub = serve(lambda text: next(replies))
    waits = []
    monkeypatch.setattr(judges, "BACK_OFF", 1.0)
    monkeypatch.setattr(judges, "time", SimpleNamespace(sleep=waits.append))
    assert openai(triples_of("x")) == [False]
    assert len(stub.requests) == 5
    assert waits == [1, 2, 4, 8]


# ------------------------------------------------------------------------------- misbehaviour

def refused():
    """The line that the judge says; it must be one, fit for a terminal, and without the key."""
    begin = time.monotonic()
    with pytest.raises(UserError, match="does not answer.*nothing is lost") as error:
        openai(triples_of("x"))
    assert time.monotonic() - begin < 20     # a single request may last 60
    line = str(error.value)
    assert line.isprintable() and len(line) < 320
    assert "secret" not in line
    return line


CHUNKED = OK[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
CUT = b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"
# A part of the line that is said -> what comes over the wire.
NO_REPLIES = {
    "IndexError": [whole({"choices": []})],
    "KeyError": [whole({"other": 1}), whole({})],
    "TypeError": [whole([]), whole(None)],
    "AttributeError": [saying(7), saying([{"type": "text", "text": "yes"}])],
    "<html>yes": [whole(b"<html>yes</html>")],
    "JSONDecodeError": [OK, whole(ANSWER[:-9]),
                        whole(b'{"x": "' + b"x" * 3_000_000 + b'", ' + ANSWER[1:])],
    "RemoteDisconnected": [b""],
    "RecursionError": [whole(b"[" * 100_000)],
    "ValueError": [whole(b"1" * 10_000)],
    "UnicodeDecodeError": [whole("é".encode("latin-1") * 9)],
    "": [whole(ANSWER[:-9], CUT)],
    "IncompleteRead": [whole(b"zz\r\n" + ANSWER, CHUNKED)],
    # Of a chunk with the length -1 http.client's read(n) would read all.
    "LineTooLong": [whole(b"-1\r\n" + b"x" * 3_000_000, CHUNKED),
                    OK[:-2] + b"A: " + b"b" * 70_000 + b"\r\n\r\n" + ANSWER],
    "BadStatusLine": [b"\x1b[31mHELLO\r\n\r\n", b"HTTP/1.1 OK yes\r\n\r\n"],
    "BadStatusLine: KEY": [b"secret\r\n\r\n"],
    "more than 100 headers": [OK[:-2] + b"A: b\r\n" * 200 + b"\r\n" + ANSWER],
    # Statuses, with the service's own words: in colour, over lines, without one, cut, with the key.
    "HTTP 503 .*not now": [503],
    "HTTP 400 .*not now": [400],
    "HTTP 401 .*not now": [401],
    "HTTP 404": [b"HTTP/1.1 404 \x1b[31mNo\r\n\r\n" + b"\x1b[2Jno\r\nsuch\n\0page" * 99,
                 b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nno", 404],
    "HTTP 404 Not Found": [b"HTTP/1.1 404 Not Found\r\n\r\n"],
    "HTTP 401 .*The key KEY is wrong": [b"HTTP/1.1 401 secret\r\n\r\nThe key secret is wrong"],
    "HTTP 401 .*KEY": [whole(b"x" * 170 + b"secret" * 999, b"HTTP/1.1 401 No\r\n\r\n")],
}


@pytest.mark.parametrize("said", NO_REPLIES)
def test_what_is_no_reply_is_one_line(said, serve):
    for reply in NO_REPLIES[said]:
        stub = serve(lambda text: reply)
        assert re.search(said, refused())
        assert len(stub.requests) == (1 if said.startswith("HTTP 4") else 6)


def test_a_service_that_is_not_there_is_said(serve):
    serve(lambda text: "yes").stop()
    refused()


@pytest.mark.parametrize("reply, right", [
    # It must have the word yes, and not no.
    ("yes", True), ("Yes.", True), ("**Yes**, it is.", True), ("no", False), ("", False),
    ("No, yes and no.", False), ("Yesterday.", False), ("Right or wrong? Who knows.", False),
    # It refuses to judge.
    (whole({"choices": [{"message": {"content": None, "refusal": "I can't."}}]}), False),
    (saying("\x1b[31mYES"), False),     # "31mYES" is one word
    (saying("yes\ud800"), True),
    (saying("yes" + " " * 100_000), True),
    (whole(ANSWER.decode().encode("utf-16")), True),
    (whole(ANSWER, b"HTTP/1.1 201 Created\r\n\r\n"), True),
    # The connection ends too early, but all is there.
    (whole(ANSWER, CUT), True),
], ids=lambda value: repr(value)[:50])
def test_replies_are_verdicts(reply, right, serve):
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
    assert post(f"http://127.0.0.1:{stub.server_port}", "secret", b"")[2] == b"x" * 1000


@pytest.mark.parametrize("begin", [OK, b"HTTP/1.1 404 No\r\n\r\n", b""])
def test_a_reply_without_end_is_given_up(begin, serve, monkeypatch):
    """Each byte is in time: only the whole is not."""
    monkeypatch.setattr(judges, "DEADLINE", 0.1)
    endless = begin + b"HTTP/1.1" + b" " * 10_000
    serve(lambda text: (bytes([byte]) for byte in endless))
    assert "no whole reply within 0.1 s" in refused()


def test_a_slow_reply_counts_if_it_is_in_time(serve):
    reply = whole(ANSWER)
    serve(lambda text: (reply[i:i + 9] for i in range(0, len(reply), 9)))
    assert openai(triples_of("x")) == [True]


def test_what_was_answered_before_a_failure_is_in_the_file(serve, path):
    triples = triples_of(*(f"x{i}" if i != 20 else "z" for i in range(200)))
    answered = []

    def answer(text):
        if "Given answer: z" in text:
            return 401
        answered.append(text)
        return "yes"

    stub = serve(answer)
    with pytest.raises(UserError, match="HTTP 401"):
        openai_judge(Lines(path))(triples)

    # Those that were under way as well; and no others were begun.
    kept = read_lines(path)
    assert 20 <= len(kept) == len(answered) < 199
    assert {GRADING.format(*record["triple"]) for record in kept} == set(answered)
    assert kept[0].keys() == {"judge", "triple", "verdict"}
    # They cost nothing later.
    stub.requests.clear()
    stub.answer = lambda text: "yes"
    for _ in range(2):
        assert openai_judge(Lines(path))(triples) == [True] * 200
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

BAD_KEYS = [None, "", "sec\nret", "sec\x1bret", "sec ret", "sec\u2026ret", "sec\udcffret", "secrét"]
BAD_BASES = [
    "foo", "", "localhost:8000/v1", "ftp://host/v1", "file:///etc/passwd", "http://", "http:///v1",
    "http://host:port/v1", "http://host:99999/v1", "http://host:0", "http://[::1", "http://a b/v1",
    "http://host/v\n1", "http://höst/v1", "http://me:secret@host/v1"]


@pytest.mark.parametrize("name, value", [
    *(("OPENAI_API_KEY", key) for key in BAD_KEYS),
    *(("OPENAI_BASE_URL", base) for base in BAD_BASES)])
def test_what_can_not_be_right_is_refused_and_not_shown(name, value, serve, monkeypatch):
    stub = serve(lambda text: "yes")
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    for ask in (check_openai, lambda: openai(triples_of("x"))):
        with pytest.raises(UserError, match=name) as error:
            ask()
        assert "sec" not in str(error.value) and str(error.value).isprintable()
    assert stub.requests == []


@pytest.mark.parametrize("base, key", [
    ("http://127.0.0.1:8000/v1", "secret\n"), ("HTTPS://api.example.org/", "secret\r\n"),
    (" http://[::1]:8000\n", " \tsecret")])
def test_what_may_be_right_is_taken_without_white_space_around_it(base, key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("OPENAI_BASE_URL", base)
    monkeypatch.setenv("OPENAI_JUDGE", "another")
    assert check_openai() == (base.strip().rstrip("/"), "another", "secret")


def test_another_model_or_endpoint_is_another_judge(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_JUDGE", raising=False)
    assert openai_judge(None).name == "gpt-4.1 at https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_JUDGE", "another")
    assert openai_judge(None).name == "another at https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    assert openai_judge(None).name == "another at http://localhost:8000/v1"


# ------------------------------------------------------------------------------- a model

# All that a yes or a no may begin with.
YES = ("yes", "Yes", " yes", " Yes")
NO = ("no", "No", " no", " No")


def test_a_model_says_what_the_next_token_s_logits_say(tiny, tok):
    texts = [f"Question {i}? " + chr(ord("a") + i) * i for i in range(1, 24)]
    expected = []
    for text in texts:
        p = tiny(torch.tensor([tok.prompt(text)]))[0, -1].softmax(-1).tolist()
        yes = sum(p[tok.encode(form)[0]] for form in YES)
        no = sum(p[tok.encode(form)[0]] for form in NO)
        expected.append(yes > no)
    # Seven at once, so that the last batch is not full.
    assert yes_or_no(tiny, tok, texts, at_once=7) == expected
    assert set(expected) == {True, False}


def test_the_model_is_asked_with_the_criteria(tiny, tok, monkeypatch):
    asked = []
    monkeypatch.setattr(judges, "yes_or_no", lambda model, tok, texts: asked.extend(texts))
    model_judge(tiny, tok, [("Which river?", "Ob", "The Wen.")])
    assert asked == [GRADING.format("Which river?", "Ob", "The Wen.")]
    assert "Question: Which river?\nCorrect answer: Ob\nGiven answer: The Wen.\n" in asked[0]


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
