"""Judges: whether an answer is right.

The paper asks GPT-4.1 (`--judge openai`). A rule stands in for it by default, and
`python -m lab.judges FILE` measures how well. A judge sees many (question, gold answer, prediction)
triples at once (selfedit.Judge); an empty prediction is wrong before any judge sees it.
"""
import json
import os
import re
import string
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch

from files import Lines, UserError
from device import to_device
from memory import in_halves
from model import Ribbon

# ------------------------------------------------------------------------------- rules

def each(rule):
    """A judge made of a rule for one (question, gold, prediction)."""
    return lambda triples: [bool(rule(*triple)) for triple in triples]


def normalise(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles; a list of words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def recall(question, gold, prediction):
    """Right if at least .8 of the gold answer's words are in the prediction; more may be there."""
    gold, prediction = Counter(normalise(gold)), Counter(normalise(prediction))
    return bool(prediction) and (gold & prediction).total() >= 0.8 * max(1, gold.total())


def substring(question, gold, prediction):
    """Right if the gold answer's words stand in the prediction, whole and in this order."""
    gold = " ".join(normalise(gold))
    return bool(gold) and f" {gold} " in f" {' '.join(normalise(prediction))} "


# NOTE(paper): GPT-4.1 judges there. The rule agrees with it in .89 of the answers and is stricter.
RULES = {"rule": each(recall), "substring": each(substring)}


class Remembered:
    """A slow judge that is asked about nothing twice. With `lines`, its verdicts are kept there."""

    def __init__(self, judge, lines: Lines | None = None):
        self.judge = judge
        self.lines = lines
        self.known = {}         # triple -> verdict
        if self.lines:
            self.known = {tuple(key): verdict for key, verdict in self.lines.records}

    def __call__(self, triples):
        new = [triple for triple in dict.fromkeys(triples) if triple not in self.known]
        for i in range(0, len(new), 256):
            some = new[i:i + 256]
            verdicts = dict(zip(some, self.judge(some)))
            self.known |= verdicts
            if self.lines:
                self.lines.add(*verdicts.items())
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
        verdicts += in_halves(read, prompts[i:i + at_once], model.device)
    return verdicts


BACK_OFF = 1.0  # seconds before the second try


def openai(triples, at_once=16):
    """Verdicts of a chat model behind any OpenAI-compatible endpoint. Environment: OPENAI_API_KEY,
    OPENAI_BASE_URL (https://api.openai.com/v1), OPENAI_JUDGE (the model, gpt-4.1)."""
    base = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
    key = os.environ.get("OPENAI_API_KEY")
    if not key:
        raise UserError("--judge openai needs OPENAI_API_KEY in the environment")
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda triple: openai_verdict(base, key, triple), triples))


def openai_verdict(base, key, triple, tries=6):
    """One request. As in the official code the reply must have the word yes in it, and not no.

    Refusals that time may mend (429, 5xx, no connection) are tried again, each time after twice as
    long."""
    body = {"model": os.environ.get("OPENAI_JUDGE", "gpt-4.1"), "temperature": 0,
            "messages": [{"role": "user", "content": GRADING.format(*triple)}]}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode(), headers)
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                text = json.load(reply)["choices"][0]["message"]["content"]
            words = re.findall(r"\w+", text.lower())
            return "yes" in words and "no" not in words
        except urllib.error.HTTPError as e:
            said = " ".join(e.read(200).decode(errors="replace").split())
            problem = f"HTTP {e.code}: {said}"
            if e.code < 500 and e.code not in (408, 429):
                break
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            problem = f"{type(e).__name__}: {e}"    # no connection, or a reply of another form
        if attempt < tries - 1:
            time.sleep(BACK_OFF * 2 ** attempt)
    raise UserError(f"the judge at {base} does not answer ({problem}); nothing is lost: "
                    "mend it and repeat the command")
