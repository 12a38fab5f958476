"""Judges: whether an answer is right.

The paper asks GPT-4.1 (`--judge openai`). A rule stands in for it by default, and
tests/test_judges.py says how well. A judge sees many (question, gold answer, prediction)
triples at once (selfedit.Judge); an empty prediction is wrong before any judge sees it.
"""
import json
import os
import re
import string
import time
import unicodedata
import urllib.request
from collections import Counter
from concurrent import futures
from http.client import HTTPException
from threading import Thread
from urllib.parse import urlsplit

import torch

from engine.device import in_halves, to_device
from engine.ribbon import Ribbon
from support.files import Lines, UserError, printable

# ------------------------------------------------------------------------------- rules

def each(rule):
    """A judge made of a rule for one (question, gold, prediction)."""
    return lambda triples: [bool(rule(*triple)) for triple in triples]


# Scripts that put no blanks between words: Thai, Lao, Tibetan, Burmese, Khmer, Chinese, Japanese.
NO_BLANKS = re.compile("[\u0e00-\u109f\u1780-\u17ff\u3005-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
                       "\u4e00-\u9fff\U00020000-\U0003ffff]")
APOSTROPHES = str.maketrans("\u00b4\u02bc", "''")     # these two are no punctuation in Unicode


def normalise(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles; a list of words.

    As in MLQA's for other languages, any punctuation of Unicode counts, and in a script without
    blanks each character is a word. Two ways to encode the same text are made one (NFKC)."""
    text = unicodedata.normalize("NFKC", text.translate(APOSTROPHES)).lower()
    text = "".join(c for c in text if not is_punctuation(c))
    return NO_BLANKS.sub(r" \g<0> ", re.sub(r"\b(a|an|the)\b", " ", text)).split()


def is_punctuation(c):
    # Cf: what is not seen, such as the marks of a writing direction.
    return c in string.punctuation or unicodedata.category(c)[0] == "P" or (
        unicodedata.category(c) == "Cf")


def by_words(rule):
    """A rule for (question, gold, prediction) of a rule for the words of the last two. A gold
    answer that has no word, such as "A" or "+", is compared as it is."""
    def judge(question, gold, prediction):
        words = normalise(gold)
        if not words:
            return as_it_is(gold) == as_it_is(prediction)
        return rule(words, normalise(prediction))
    return each(judge)


def as_it_is(text):
    return unicodedata.normalize("NFKC", text).strip().lower()


def recall(gold, prediction):
    """Right if at least .8 of the gold answer's words are in the prediction; more may be there."""
    return (Counter(gold) & Counter(prediction)).total() >= 0.8 * len(gold)


SMALL_WORDS = set("""
as at by for from in of on or to with and is are was were be been it its his her their that this
which who
""".split())


def gist(gold, prediction):
    """Right if at least .6 of the gold answer's words, small ones left out, are there."""
    gold = [word for word in gold if word not in SMALL_WORDS] or gold
    return (Counter(gold) & Counter(prediction)).total() >= 0.6 * len(gold)


def substring(gold, prediction):
    """Right if the gold answer's words stand in the prediction, whole and in this order."""
    return f" {' '.join(gold)} " in f" {' '.join(prediction)} "


# NOTE(paper): GPT-4.1 judges there. The rule agrees with it in .89 of the answers and is stricter;
# gist, chosen on half of the passages, in .91 of the other half's, where the rule has .89.
RULES = {"rule": by_words(recall), "gist": by_words(gist), "substring": by_words(substring)}


class Remembered:
    """A slow judge that is asked about nothing twice. With `lines`, its verdicts are kept there,
    under its `name`: another judge's are not taken for its own. `stream`, if given, is asked
    instead of `judge` and gives (triple, verdict)s as they come."""

    def __init__(self, judge, lines: Lines | None = None, name="", stream=None):
        self.stream = stream or (lambda triples: zip(triples, judge(triples)))
        self.lines = lines
        self.name = name
        self.known = {}         # triple -> verdict
        for record in lines.records if lines else ():
            match record:       # what has another form is of an older version: asked again
                case {"judge": self.name, "triple": [str(), str(), str()] as triple,
                      "verdict": bool(verdict)}:
                    self.known[tuple(triple)] = verdict

    def __call__(self, triples):
        new = [triple for triple in dict.fromkeys(triples) if triple not in self.known]
        for i in range(0, len(new), 256):
            for triple, verdict in self.stream(new[i:i + 256]):
                self.known[triple] = verdict
                if self.lines:      # at once: a later failure loses none
                    self.lines.add({"judge": self.name, "triple": list(triple), "verdict": verdict})
        return [self.known[triple] for triple in triples]


# ------------------------------------------------------------------------------- models

# The official criteria, in our words: convey the gold answer fully, contradict nothing in it.
GRADING = ("You grade an answer to a question.\nQuestion: {}\nCorrect answer: {}\n"
           "Given answer: {}\nThe given answer is right if it at least fully conveys the correct "
           "answer and does not contradict it; it may say more. Is it right? Reply yes or no.\n")


def model_judge(model, tok, triples):
    """Verdicts of a local model, without adapters."""
    return yes_or_no(model, tok, [GRADING.format(*triple) for triple in triples])


@torch.inference_mode()
def yes_or_no(model, tok, texts, at_once=32):
    """What the model says to each text: is a yes likelier to follow, or a no?"""
    first_tokens = {}
    for word in ("yes", "no"):
        forms = (word, word.title(), f" {word}", f" {word.title()}")
        first_tokens[word] = [tok.encode(form)[0] for form in forms]

    def read(prompts):
        """The verdicts of some prompts, read in one pass."""
        ribbon = Ribbon([len(prompt) for prompt in prompts], model.device)
        ids = to_device(torch.tensor([t for prompt in prompts for t in prompt]), model.device)
        h = model.hidden(ids, ribbon.position, ribbon.attend)[ribbon.last]
        log_p = model.lm_head(h).float().log_softmax(-1)                # (prompts, V)
        yes = log_p[:, first_tokens["yes"]].logsumexp(-1)
        no = log_p[:, first_tokens["no"]].logsumexp(-1)
        return (yes > no).tolist()

    prompts, verdicts = [tok.prompt(text) for text in texts], []
    for i in range(0, len(prompts), at_once):
        verdicts += in_halves(read, prompts[i:i + at_once])
    return verdicts


BACK_OFF = 1.0      # seconds before the second try
DEADLINE = 60.0     # seconds for a request and its whole reply
LONGEST = 2 ** 20   # bytes of a reply that are read


def openai(triples):
    """Verdicts of a chat model behind any OpenAI-compatible endpoint. Environment: OPENAI_API_KEY,
    OPENAI_BASE_URL (https://api.openai.com/v1), OPENAI_JUDGE (the model, gpt-4.1)."""
    verdicts = dict(openai_verdicts(triples))
    return [verdicts[triple] for triple in triples]


def check_openai():
    """(base URL, model, key) of --judge openai. UserError if one can't be right; URL and key are
    not shown, as either may hold a secret. Nothing is sent."""
    base = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").strip().rstrip("/")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise UserError("--judge openai needs OPENAI_API_KEY in the environment")
    if not re.fullmatch("[!-~]+", key):
        raise UserError("OPENAI_API_KEY (not shown here) has a character that no key has: a blank, "
                        "a line break, a letter that is not ASCII")
    try:
        url = urlsplit(base)
        usable = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:      # a port that is no number, half an IPv6 address
        usable = False
    if not usable or "@" in url.netloc or not re.fullmatch("[!-~]+", base):
        raise UserError("OPENAI_BASE_URL must be like https://api.openai.com/v1: http or https, a "
                        "host, no user, no blank")
    return base, os.environ.get("OPENAI_JUDGE", "gpt-4.1"), key


def openai_judge(lines):
    """`openai`, remembered. Another model, or another endpoint, is another judge."""
    base, model, _ = check_openai()
    return Remembered(openai, lines, f"{model} at {base}", openai_verdicts)


def openai_verdicts(triples, at_once=16):
    """(triple, verdict)s of `openai`, as they come. After a failure nothing more is asked, but what
    is on its way is waited for: it may be paid for."""
    base, model, key = check_openai()
    left, asked, failure = list(triples), {}, None      # asked: Future -> triple
    while left or asked:
        while left and len(asked) < at_once:
            triple = left.pop(0)
            asked[in_thread(openai_verdict, base, model, key, triple)] = triple
        # Never for long: where a wait can't be interrupted, Ctrl-C takes effect after it.
        done, _ = futures.wait(asked, timeout=0.5, return_when=futures.FIRST_COMPLETED)
        for future in done:
            triple = asked.pop(future)
            if future.exception():
                failure, left = future.exception(), []
            else:
                yield triple, future.result()
    if failure:
        raise failure


def in_thread(function, *args):
    """A Future of function(*args). The thread is a daemon: Python does not wait for it at exit, as
    it would for that of an executor."""
    future = futures.Future()

    def work():
        try:
            future.set_result(function(*args))
        except Exception as e:
            future.set_exception(e)

    Thread(target=work, daemon=True).start()
    return future


def openai_verdict(base, model, key, triple, tries=6):
    """One verdict. As in the official code the reply must have the word yes in it, and not no.

    What time may mend (429, 5xx, no connection, no sense) is tried again, each time after twice as
    long."""
    body = {"model": model, "temperature": 0,
            "messages": [{"role": "user", "content": GRADING.format(*triple)}]}
    for attempt in range(tries):
        reply = b""
        try:
            # A timeout of sockets is for each read. A thread that is late is left to itself.
            request = in_thread(post, f"{base}/chat/completions", key, json.dumps(body).encode())
            status, reason, reply = request.result(DEADLINE)
            if 200 <= status < 300:
                text = json.loads(reply)["choices"][0]["message"]["content"]
                if text is None:
                    return False    # it refuses to judge, and would again
                words = re.findall(r"\w+", text.lower())
                return "yes" in words and "no" not in words
            problem = f"HTTP {status} {reason}: {reply.decode(errors='replace')}"
            if status < 500 and status not in (408, 429):
                break
        except futures.TimeoutError:
            problem = f"no whole reply within {DEADLINE:g} s"
        except (HTTPException, OSError, ValueError, LookupError, TypeError, AttributeError,
                RecursionError) as e:       # no connection, or a reply of another form
            problem = f"{type(e).__name__}: {e}. {reply.decode(errors='replace')}"
        if attempt < tries - 1:
            time.sleep(BACK_OFF * 2 ** attempt)
    # The problem is in others' words. The key goes first: cut in two it would not be found.
    base, problem = (" ".join(text.split()).replace(key, "KEY") for text in (base, problem))
    raise UserError(f"the judge at {base} does not answer ({printable(problem)[:200]}); nothing is "
                    "lost: mend it and repeat the command")


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hands over every reply as it is. So no redirect is followed: the key stays with its host."""
    http_response = https_response = lambda self, request, reply: reply


def post(url, key, body):
    """(status, reason, the first LONGEST bytes) of the reply to a JSON body."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, body, headers)
    with urllib.request.build_opener(AnyStatus).open(request, timeout=DEADLINE) as reply:
        # Not read(LONGEST): a chunk that says its length is -1 would be read without end.
        text = bytearray(LONGEST)
        return reply.status, reply.reason, text[:reply.readinto(text)]
