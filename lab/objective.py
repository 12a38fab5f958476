"""Objective or data? The same texts, learned by other objectives in as many steps.

    python -m lab.objective RUN_DIR [RUN_DIR ...] --out FILE.jsonl

Who learns a passage as plain text can seldom say its facts the other way round. SEAL's answer is
other text: notes that turn them round. Others change what is learned of a text:

* masked: the learner reads it with words missing, and learns to write it whole (arXiv 2510.09885);
* in view: the next word is to be as likely as with the passage in the prompt.

theta_0 learns each text in each way, in 10 steps with all of a town in one batch. The notes are by
theta_0, or by theta_3 of finished runs. 4 minutes a seed for all arms.
"""
import random
from dataclasses import replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from data import tinyworld
from engine.ribbon import Ribbon
from lab.experiment import Question, mean_of, over_seeds, print_table
from lab.tiny import RECIPE, by_direction, load, or_passage, train, verdicts, write
from lora import Job, dialogue
from selfedit import seed_for
from support.files import cli

# text -> t of the theta_t whose self-edit stands beside the passage
TEXTS = {"the passage": None, "and untrained notes": 0, "and notes of round 3": 3}
# objectives -> learning rate; chosen on 12 `tune` towns from .01, .02, .04 (and .08 for masked)
RATES = {"plain": 2e-2, "masked": 4e-2, "in view": 2e-2, "plain, masked": 2e-2,
         "in view, masked": 2e-2}
ARMS = {f"{text}: {ways}": (TEXTS[text], ways) for text, ways in product(TEXTS, RATES)}
COLUMNS = ("accuracy", "forward", "reversed")

# An example is (ids (T,), targets (T, V)): at each token a distribution q over the one that
# follows. Where the row is zero, nothing is learned. The loss is
#
#     - mean_s sum_w q_s(w) log p_theta'(w | y_<s)
#
# the usual one if q has the token itself only, else KL(q || p) up to a constant.

MASKINGS, SHARE = 4, 0.3        # of each document, and of the words that are missing in each


def hard(model, ids, learn):
    """The token itself has all of the probability."""
    targets = torch.zeros(len(ids), model.config.vocab_size)
    targets[:-1] = F.one_hot(torch.tensor(ids[1:]), model.config.vocab_size)
    return ids, targets * torch.tensor([*learn[1:], False])[:, None]


# Each makes the examples of one document about a task. rng: for masks.

def plain(model, tok, task, document, rng):
    """The document, after nothing."""
    ids = tok.document(document)
    return [hard(model, ids, [True] * len(ids))]


def masked(model, tok, task, document, rng):
    """The document, after itself with words missing. What is read is not learned."""
    examples = []
    for _ in range(MASKINGS):
        words = ["_" if rng.random() < SHARE else word for word in document.split()]
        read = tok.prompt(" ".join(words) + "\n\n")
        examples.append(hard(model, *dialogue(read, [*tok.encode(document), tok.eos])))
    return examples


@torch.no_grad()
def in_view(model, tok, task, document, rng):
    """The document, each token as likely as to the model that reads the task's passage before."""
    read, ids = tok.prompt(task.prompt), tok.document(document)
    targets = model(torch.tensor([read + ids]))[0, len(read):].softmax(-1)
    # What is after the document is not learned.
    targets[-1] = 0
    return [(ids, targets)]


MAKE = {"plain": plain, "masked": masked, "in view": in_view}


def learn(model, job: Job) -> torch.Tensor:
    """The adapter (P,) of a town, trained with cross-entropy to the targets."""
    # All texts lie on one ribbon, and are all in every step.
    ribbon = Ribbon([len(ids) for ids, _ in job.examples], model.device)
    ids = torch.tensor([token for ids, _ in job.examples for token in ids])
    targets = torch.cat([targets for _, targets in job.examples])

    def loss(adapter, batch):
        with adapter.route([len(ids)]):
            logits = model.lm_head(model.hidden(ids, ribbon.position, ribbon.attend))
        return -(targets * logits.log_softmax(-1)).sum() / targets.sum()

    return train(model, job, loss).flat[0]


def measure(arm: str, seed: int, folders: dict, n: int) -> dict:
    """A line: what the first n held-out towns are answered, once they are learned in this way."""
    writer, ways = ARMS[arm]
    recipe = replace(RECIPE, lr=RATES[ways], batch=10 ** 6)
    model, tok = load(0)
    towns = tinyworld.load("eval")[:n]
    documents = [town.context for town in towns]
    if writer is not None:
        edits = write(writer, folders[seed], towns, seed, 1)
        # The passage is one of a self-edit's documents.
        documents = [or_passage(town, edit).documents for town, (edit,) in zip(towns, edits)]

    rows, tokens = [], 0
    for i, (town, own) in enumerate(zip(towns, documents)):
        rng = random.Random(seed_for(seed, "words", i))
        examples = []
        for way, document in product(ways.split(", "), own):
            examples += MAKE[way](model, tok, town, document, rng)
        job = Job(examples, seed_for(seed, "adapter", i), recipe)
        tokens += job.tokens / n
        rows.append(learn(model, job))

    found = map(by_direction, towns, verdicts(model, tok, towns, rows))
    return mean_of(list(found)) | {"tokens": round(tokens)}


def show(arms: dict[str, list[dict]]):
    """Accuracies, with intervals over seeds."""
    rows = []
    for arm, lines in arms.items():
        values = [[line[name] for name in COLUMNS] for line in lines]
        tokens = np.mean([line["tokens"] for line in lines])
        rows.append([*arm.split(": "), *over_seeds(values), f"{tokens:.0f}"])
    print_table(["text", "objective", *COLUMNS, "tokens trained a town"], rows)


def main():
    Question(ARMS, measure, show, None, {"towns": 12}, of_runs=True).ask(__doc__)


if __name__ == "__main__":
    cli(main)
