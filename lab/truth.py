"""The truth about a self-edit: which line states which answer, as the tiny world knows, and how
well credit agrees with it. For lab/credit.py."""
import numpy as np

from data import tinyworld as world
from inner_loop import ask, grade_all
from lab.credit_of_run import DESIGNS, gold_probability, learn, regress, subsets
from lab.tiny import ANSWERING, RECIPE
from selfedit import SelfEdit, Task

SCORES = ("probability", "verdict")         # of the gold answer; of the model's own


def truth(task: Task, edit: SelfEdit):
    """(lines, questions) bool: which line states the answer to which question. The last document is
    the passage, and no line."""
    passage = task.context[0]
    asked = [world.asked(passage)[question] for question in task.questions]
    stated = []
    for line in edit.documents[:-1]:
        fact = world.taught(line, passage)
        stated.append([fact == other for other in asked])
    return np.array(stated, bool).reshape(-1, len(asked))


def auc(credits, stated):
    """How often a stated pair has more credit than another; equal credits count as half."""
    above = credits[stated][:, None] - credits[~stated][None]
    return float(np.mean((above > 0) + 0.5 * (above == 0)))


def judge_credit(model, tok, task: Task, edit: SelfEdit, seed: int) -> dict[str, float]:
    """{design, score: AUC} of a self-edit."""
    stated = truth(task, edit)
    # The subsets of all designs are trained and asked together, which is faster.
    designs = [subsets(name, len(edit.documents), seed) for name in DESIGNS]
    adapters = learn(model, tok, edit, np.vstack(designs), RECIPE, seed)
    likely = gold_probability(model, tok, task, adapters)
    answers = ask(model, tok, [[task]] * adapters.n, ANSWERING, adapters)
    right = grade_all([task] * adapters.n, [answer.texts for (answer,) in answers])
    scores = {"probability": likely, "verdict": np.array(right, float)}
    found, begin = {}, 0
    for name, design in zip(DESIGNS, designs):
        # Each design has the scores of its own subsets.
        end = begin + len(design)
        for what in SCORES:
            credits = regress(design, scores[what][begin:end])
            # The passage is no line: its credit, the last one, is left out.
            found[f"{name}, {what}"] = auc(credits[:len(stated)], stated)
        begin = end
    return found
