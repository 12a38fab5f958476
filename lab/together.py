"""Many self-edits of a town, learned by one adapter. For lab/compute.py."""
from collections import Counter
from dataclasses import replace

from engine.train import sft
from inner_loop import answer_each, grade_all
from lab.diversity import of_town
from lab.experiment import mean_of
from lab.tiny import ANSWERING, RECIPE, by_direction
from lora import Job
from selfedit import SelfEdit, Task, seed_for
from support.progress import Meter

# As in the tiny preset, but for all documents in every step.
ALL_AT_ONCE = replace(RECIPE, batch=10_000)


def learn(model, tok, tasks: list[Task], edits: list[list[SelfEdit]], seed: int) -> dict:
    """What all self-edits of a town, as one adapter, teach: means over the towns."""
    jobs, found = [], []
    for i, (task, row) in enumerate(zip(tasks, edits)):
        # The passage is there once for each self-edit, so that its weight does not fall with k.
        documents = []
        for edit in row:
            documents += edit.documents
        # Of empty self-edits nothing can be learned but the passage.
        documents = documents or task.context
        jobs.append(one_job(model, tok, documents, seed_for(seed, "adapter", i)))
        tokens = sum(len(tok.document(document)) for document in documents)
        found.append({"tokens": tokens} | of_town(row, task.context[0]))

    trained = dict(sft(model, jobs, Meter("steps")))
    pairs = [(task, trained[i]) for i, task in enumerate(tasks)]
    answers = answer_each(model, tok, pairs, RECIPE.lora, ANSWERING)
    verdicts = grade_all(tasks, [answer.texts for answer in answers])
    for task, right, row in zip(tasks, verdicts, found):
        row |= by_direction(task, right)
    return mean_of(found)


def one_job(model, tok, documents: list[str], seed: int) -> Job:
    """All documents in every step. One that is there n times is read once, and weighs n times as
    much in the loss: that is the same, and faster."""
    examples = []
    for text, n in Counter(documents).items():
        ids = tok.document(text)[:model.config.max_len]
        examples.append((ids, [n] * len(ids)))
    return Job(examples, seed, ALL_AT_ONCE)
