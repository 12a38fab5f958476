"""Judges: the rules, verdicts that are remembered, an OpenAI-compatible service, a local model."""
import json
import re
import signal
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from threading import Event, Thread
from types import SimpleNamespace

import pytest
import torch

from data import judges
from data.judges import (GRADING, RULES, Remembered, check_openai, model_judge, openai,
                         openai_judge)
from support.files import Lines, UserError
from tests.features import pairs_of
from tests.helpers import ROOT, read_lines

# gold answer, prediction, and the verdicts of recall, gist and substring
CASES = [
    # More words may stand around the answer; words count whole.
    ("Belgrade", "It was sent to belgrade.", True, True, True),
    ("Belgrade", "Belgradeless", False, False, False),
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
    ("it", "It is it.", True, True, True),
    # A word that the gold answer has three times must be there as often.
    ("no no no", "no", False, False, False),
    ("Paris", " \n", False, False, False),
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


@pytest.mark.parametrize("rule, agrees, kappa", [("rule", .887, .73), ("gist", .899, .77),
                                                 ("substring", .876, .71)])
def test_how_far_the_rules_agree_with_gpt(rule, agrees, kappa, shared_data):
    """With its verdicts on the released answers: the numbers of docs/results/official.md."""
    mine, gpt = [], []
    for record in json.loads((shared_data / "squad_val_60.json").read_text()):
        for x in chain(*(method["answers"] for method in record["released"].values())):
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


class Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, triples):
        self.calls.append([prediction for _, _, prediction in triples])
        return [prediction.startswith("x") for _, _, prediction in triples]


def triples_of(*predictions):
    return [("q", "gold", prediction) for prediction in predictions]


def test_a_slow_judge_is_asked_about_nothing_twice():
    slow = Recorder()
    judge = Remembered(slow)
    assert judge(triples_of("x", "y", "x")) == [True, False, True]
    assert judge(triples_of("y", "z", "x")) == [False, False, True]
    assert slow.calls == [["x", "y"], ["z"]]
    judge([("other q", "gold", "x"), ("q", "other gold", "x")])
    assert len(slow.calls[2]) == 2


@pytest.mark.parametrize("line", [
    # What a kill may leave.
    '{"judge": "", "triple": ["q", "gold", "xx"], "verdict": false',
    # Of an older version, or of another form.
    '[["q", "gold", "xx"], false]\n',
    '{"judge": "", "triple": ["q", "gold"], "verdict": false}\n',
    '{"judge": "", "triple": ["q", "gold", "xx"], "verdict": null}\n',
    '{"judge": "strict", "triple": ["q", "gold", "xx"], "verdict": false}\n'])
def test_verdicts_are_kept_in_a_file_and_what_is_none_there_is_asked_again(line, tmp_path):
    path = tmp_path / "judge.jsonl"
    Remembered(Recorder(), Lines(path))(triples_of("x", "y"))
    with path.open("a") as f:
        f.write(line)
    triples = triples_of("x", "y", "xx")
    # The new verdict is on a line of its own: a third run knows all.
    for asked in ([["xx"]], []):
        slow = Recorder()
        assert Remembered(slow, Lines(path))(triples) == [True, False, True]
        assert slow.calls == asked


OK = b"HTTP/1.1 200 OK\r\n\r\n"
ANSWER = b'{"choices": [{"message": {"content": "yes"}}]}'


def reply(body, head=OK):
    """The bytes of a reply with this body; an object is over several lines, as OpenAI does it."""
    return head + (body if isinstance(body, bytes) else json.dumps(body, indent=2).encode())


def saying(content):
    return reply({"choices": [{"message": {"content": content}}]})


def status_line(status):
    return b"HTTP/1.1 %d No\r\n\r\n" % status


class Stub(ThreadingHTTPServer):
    """An OpenAI-compatible service. `answer` is a function of the text that is asked: what it
    returns is the reply, or all that goes over the wire: bytes, or an iterator of them, each sent
    after a moment."""
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
    log_message = Stub.handle_error     # nothing is said

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "null")
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.answer(body["messages"][0]["content"] if body else "")
        if isinstance(answer, str):
            answer = saying(answer)
        for some in [answer] if isinstance(answer, bytes) else answer:
            self.wfile.write(some)
            if self.server.over.wait(0.02):
                break

    do_GET = do_POST    # what a redirect makes of it


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
    for name in ("OPENAI_JUDGE", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(judges, "BACK_OFF", 0.0)
    yield start
    for stub in stubs:
        stub.stop()


def test_the_request_is_what_the_service_expects(serve, monkeypatch):
    stub = serve(lambda text: "yes" if "The Ob." in text else "no")
    monkeypatch.setenv("OPENAI_JUDGE", "another")
    triple, other = ("Which river?", "Ob", "The Ob."), ("Which river?", "Ob", "Another.")
    assert openai([other, triple]) == [False, True]
    path, headers, body = max(stub.requests, key=lambda request: "The Ob." in str(request))
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert headers["Content-Type"] == "application/json"
    (message,) = body.pop("messages")
    assert message == {"role": "user", "content": GRADING.format(*triple)}
    assert "Correct answer: Ob\nGiven answer: The Ob.\n" in message["content"]
    assert body == {"model": "another", "temperature": 0}


@pytest.mark.parametrize("status", [408, 429, 503])
def test_what_time_may_mend_is_tried_again_each_time_after_twice_as_long(
        status, serve, monkeypatch):
    replies = iter([status_line(status)] * 4 + ["no"])
    stub = serve(lambda text: next(replies))
    waits = []
    monkeypatch.setattr(judges, "BACK_OFF", 1.0)
    monkeypatch.setattr(judges, "time", SimpleNamespace(sleep=waits.append))
    assert openai(triples_of("x")) == [False]
    assert len(stub.requests) == 5
    assert waits == [1, 2, 4, 8]


def refused():
    """The line that the judge says; it must be one, fit for a terminal, and without the key."""
    with pytest.raises(UserError, match="does not answer.*nothing is lost") as error:
        openai(triples_of("x"))
    line = str(error.value)
    assert line.isprintable() and len(line) < 320
    assert "secret" not in line
    return line


CHUNKED = OK[:-2] + b"Transfer-Encoding: chunked\r\n\r\n"
# A part of the line that is said -> what comes over the wire.
NO_REPLIES = {
    "IndexError": reply({"choices": []}),
    "TypeError": reply(None),
    "AttributeError": saying(7),
    "JSONDecodeError": reply(b'{"x": "' + b"x" * 3_000_000 + b'", ' + ANSWER[1:]),
    "RemoteDisconnected": b"",
    "RecursionError": reply(b"[" * 100_000),
    # Of a chunk with the length -1 http.client's read(n) would read all.
    "LineTooLong": reply(b"-1\r\n" + b"x" * 3_000_000, CHUNKED),
    # Statuses, with the service's own words: in colour, over lines, cut, with the key.
    "HTTP 503 .*not now": status_line(503) + b"not now",
    "HTTP 404 .*such": status_line(404) + b"\x1b[2Jno\r\nsuch\n\0page" * 99,
    "HTTP 401 .*KEY": status_line(401) + b"x" * 170 + b"secret" * 999}


@pytest.mark.parametrize("said", NO_REPLIES)
def test_what_is_no_reply_is_one_line(said, serve):
    stub = serve(lambda text: NO_REPLIES[said])
    assert re.search(said, refused())
    assert len(stub.requests) == (1 if said.startswith("HTTP 4") else 6)


@pytest.mark.parametrize("what, right", [
    ("**Yes**, it is.", True), ("", False), ("No, yes and no.", False), ("Yesterday.", False),
    (reply({"choices": [{"message": {"content": None, "refusal": "I can't."}}]}), False),
    (saying("yes\ud800"), True),
    (reply(ANSWER, b"HTTP/1.1 201 Created\r\n\r\n"), True)], ids=lambda value: repr(value)[:50])
def test_replies_are_verdicts(what, right, serve):
    serve(lambda text: what)
    assert openai(triples_of("x")) == [right]


@pytest.mark.parametrize("status", [302, 307])
def test_no_redirect_is_followed(status, serve):
    other = serve(lambda text: "yes")
    head = f"HTTP/1.1 {status} Moved\r\nLocation: http://127.0.0.1:{other.server_port}/\r\n\r\n"
    stub = serve(lambda text: head.encode())
    assert f"HTTP {status} Moved" in refused()
    assert len(stub.requests) == 1
    assert other.requests == []


@pytest.mark.parametrize("begin", [OK, b""])
def test_a_reply_without_end_is_given_up(begin, serve, monkeypatch):
    """Each byte is in time: only the whole is not."""
    monkeypatch.setattr(judges, "DEADLINE", 0.1)
    endless = begin + b"HTTP/1.1" + b" " * 10_000
    serve(lambda text: (bytes([byte]) for byte in endless))
    assert "no whole reply within 0.1 s" in refused()


def test_what_was_answered_before_a_failure_is_in_the_file(serve, tmp_path):
    path = tmp_path / "judge.jsonl"
    triples = triples_of(*(f"x{i}" if i != 20 else "z" for i in range(200)))
    answered = []

    def answer(text):
        if "Given answer: z" in text:
            return status_line(401)
        answered.append(text)
        return "yes"

    stub = serve(answer)
    with pytest.raises(UserError, match="HTTP 401"):
        openai_judge(Lines(path))(triples)

    # Those that were under way as well, and no others were begun.
    kept = read_lines(path)
    assert 20 <= len(kept) == len(answered) < 199
    assert {GRADING.format(*record["triple"]) for record in kept} == set(answered)
    stub.requests.clear()
    stub.answer = lambda text: "yes"
    assert openai_judge(Lines(path))(triples) == [True] * 200
    assert len(stub.requests) == 200 - len(kept)


HANGING = """
import signal
from data import judges
from support.files import cli
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores it
cli(lambda: judges.openai([("q", "gold", str(i)) for i in range(40)]))
"""


@pytest.mark.slow
def test_ctrl_c_ends_a_judge_that_hangs(serve):
    asked = Event()
    stub = serve(lambda text: asked.set() or stub.over.wait(30) or "yes")
    process = subprocess.Popen([sys.executable, "-c", HANGING], stderr=subprocess.PIPE, text=True,
                               cwd=ROOT)
    try:
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 1
    assert said.startswith("error: interrupted") and said.count("\n") == 1


BAD = {"OPENAI_API_KEY": ["", "sec\nret", "sec\udcffret"],
       "OPENAI_BASE_URL": ["foo", "", "ftp://host/v1", "http:///v1", "http://host:port/v1",
                           "http://host:0", "http://[::1", "http://a b/v1", "http://höst/v1",
                           "http://me:secret@host/v1"]}


@pytest.mark.parametrize("name, value", pairs_of(BAD))
def test_what_can_not_be_right_is_refused_and_not_shown(name, value, serve, monkeypatch):
    stub = serve(lambda text: "yes")
    monkeypatch.setenv(name, value)
    for ask in (check_openai, lambda: openai(triples_of("x"))):
        with pytest.raises(UserError, match=name) as error:
            ask()
        assert "sec" not in str(error.value) and str(error.value).isprintable()
    assert stub.requests == []


def test_white_space_around_a_key_goes_and_another_model_or_endpoint_is_another_judge(serve,
                                                                                      monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " \tsecret\r\n")
    assert openai_judge(None).name == "gpt-4.1 at https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_JUDGE", "another")
    monkeypatch.setenv("OPENAI_BASE_URL", " http://[::1]:8000/\n")
    assert openai_judge(None).name == "another at http://[::1]:8000"
    assert check_openai() == ("http://[::1]:8000", "another", "secret")


def test_a_model_says_what_the_next_token_s_logits_say(tiny, tok):
    """All that a yes or a no may begin with counts."""
    triples = triples_of(*(chr(ord("a") + i % 24) * i for i in range(1, 40)))
    expected = []
    for triple in triples:
        p = tiny(torch.tensor([tok.prompt(GRADING.format(*triple))]))[0, -1].softmax(-1)
        yes, no = (sum(p[ord(letter)] for letter in letters) for letters in ("yY", "nN"))
        expected.append(bool(yes > no))
    # So many that the last batch is not full.
    assert model_judge(tiny, tok, triples) == expected
    assert set(expected) == {True, False}
