"""Judges: whether an answer is right. Rules, the model itself, an OpenAI-compatible endpoint."""
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

from checkpoint import UserError
from model import Ribbon, to_device


def normalise(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles; a list of words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def recall_judge(question, gold, prediction):
    """Right if at least .8 of the gold answer's words are in the prediction; more may be there."""
    gold, prediction = Counter(normalise(gold)), Counter(normalise(prediction))
    return bool(prediction) and (gold & prediction).total() >= 0.8 * max(1, gold.total())


def substring_judge(question, gold, prediction):
    """Right if the gold answer's words stand in the prediction, whole and in this order."""
    gold = " ".join(normalise(gold))
    return bool(gold) and f" {gold} " in f" {' '.join(normalise(prediction))} "


JUDGES = {"rule": recall_judge, "substring": substring_judge}


# The official criteria, in our words: convey the gold answer fully, contradict nothing in it.
GRADING = ("You grade an answer to a question.\nQuestion: {}\nCorrect answer: {}\n"
           "Given answer: {}\nThe given answer is right if it at least fully conveys the correct "
           "answer and does not contradict it; it may say more. Is it right? Reply yes or no.\n")


class SlowJudge:
    """A judge that sees many answers at once and asks for none twice: `many` takes a list of
    (question, gold, prediction) and returns verdicts. It remembers them in `path`, a JSON-lines
    file; without one, the last lot only."""

    def __init__(self, many, path=None):
        self.many, self.path, self.known = many, path, {}
        if path and path.exists():
            lines = path.read_text().splitlines()
            self.known = {tuple(key): verdict for key, verdict in
                          (json.loads(line) for line in lines if line.endswith("]"))}

    def prepare(self, triples):
        """Grade what is not known yet."""
        if not self.path:
            self.known = {}
        new = [t for t in dict.fromkeys(triples) if t not in self.known and t[2].strip()]
        for i in range(0, len(new), 256):
            verdicts = dict(zip(new[i:i + 256], self.many(new[i:i + 256])))
            self.known |= verdicts
            if self.path:
                with self.path.open("a") as f:
                    f.write("".join(json.dumps([k, v]) + "\n" for k, v in verdicts.items()))

    def __call__(self, *triple):
        if triple not in self.known:
            self.prepare([triple])
        return self.known[triple]


def openai_judge(triples, at_once=16, tries=6):
    """Verdicts of a chat model behind any OpenAI-compatible endpoint. Environment: OPENAI_API_KEY,
    OPENAI_BASE_URL (https://api.openai.com/v1), OPENAI_JUDGE (the model, gpt-4.1).

    As in the official code, the reply must have the word yes in it, and not no. Refusals that time
    may mend (429, 5xx, no connection) are tried again, each time after twice as long."""
    base = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
    if not (key := os.environ.get("OPENAI_API_KEY")):
        raise UserError("--judge openai needs OPENAI_API_KEY in the environment")

    def verdict(triple):
        body = {"model": os.environ.get("OPENAI_JUDGE", "gpt-4.1"), "temperature": 0,
                "messages": [{"role": "user", "content": GRADING.format(*triple)}]}
        request = urllib.request.Request(
            f"{base}/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {key}"})
        for attempt in range(tries):
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    text = json.load(reply)["choices"][0]["message"]["content"]
                words = re.findall(r"\w+", text.lower())
                return "yes" in words and "no" not in words
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code}: {e.read(200).decode(errors='replace')}"
                if e.code < 500 and e.code not in (408, 429):
                    break
            except (OSError, ValueError, KeyError, IndexError, TypeError) as e:
                problem = f"{type(e).__name__}: {e}"
            time.sleep(BACK_OFF * 2 ** attempt)
        raise UserError(f"the judge at {base} does not answer ({problem}); nothing is lost: "
                        "mend it and repeat the command")

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(verdict, triples))


BACK_OFF = 1.0  # seconds before the second try


@torch.inference_mode()
def yes_or_no(model, tok, texts, at_once=32):
    """What the model, without adapters, says to each text: is a yes likelier to follow, or a no?"""
    ids = {word: [tok.encode(form)[0] for form in (word, word.title(), f" {word}",
                                                   f" {word.title()}")] for word in ("yes", "no")}
    prompts, verdicts = [tok.prompt(text) for text in texts], []
    for i in range(0, len(prompts), at_once):
        some = prompts[i:i + at_once]
        ribbon = Ribbon([len(p) for p in some], model.device)
        flat = to_device(torch.tensor([t for p in some for t in p]), model.device)
        h = model.hidden(flat, ribbon.position, ribbon.attend)[ribbon.last]
        log_p = model.lm_head(h).float().log_softmax(-1)
        yes, no = (log_p[:, ids[word]].logsumexp(-1) for word in ("yes", "no"))
        verdicts += (yes > no).tolist()
    return verdicts


def model_judge(model, tok, triples):
    """Verdicts of the model itself on (question, gold, prediction)s."""
    return yes_or_no(model, tok, [GRADING.format(*triple) for triple in triples])
