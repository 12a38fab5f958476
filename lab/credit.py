"""Which line of a self-edit taught which answer?

    python -m lab.credit RUN_DIR        # puts the answer into the run's report.html
    python -m lab.credit RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]

A self-edit is learned again from random halves of its documents, all side by side, and how likely
the gold answers become is regressed on which documents were there. With --out this is held against
the truth, as the tiny world knows which fact a line states. AUC: how often a line that states an
answer has more credit for it than another. 1.5 minutes for a writer and a seed.
"""
import json
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from data import tinyworld as world
from data.tasks import load_tasks
from engine.train import sft
from inner_loop import make_job
from lab.experiment import Question, mean_of, of_seeds, print_table, pyplot, save
from lab.tiny import RECIPE, gold, load, log_probs, run_of, verdicts, write
from lora import Adapters
from selfedit import SelfEdit, Task, read_self_edit, seed_for
from support import page
from support.files import UserError, cli, replace_file
from support.ranks import Meter
from support.report import before_and_after

WRITERS = {"untrained": 0, "round 3": 3}    # t of the theta_t that writes; theta_0 learns
SCORES = ("probability", "verdict")         # of the gold answer; of the model's own
DESIGNS = ("leave one out", "only one", "random halves")
DRAWN = 5       # the held-out town of the figure
PAIRS = 20      # of random halves: on 8 towns of the tiny world 10 of them order lines as well


def subsets(design: str, n: int, seed: int):
    """(subsets, n) of 0 and 1: which of n documents are learned."""
    if design == "leave one out":
        return np.vstack([np.ones(n), 1 - np.eye(n)])
    if design == "only one":
        return np.vstack([np.zeros(n), np.eye(n)])
    # Random halves, each with the other half, so that every document is there as often as not.
    halves = np.random.default_rng(seed).integers(0, 2, (PAIRS, n))
    return np.vstack([halves, 1 - halves])


def learn(model, tok, edit: SelfEdit, design, seed: int) -> Adapters:
    """An adapter for each subset of a self-edit's documents. All begin from the same values."""
    jobs, places = [], []
    for i, row in enumerate(design):
        documents = [document for document, there in zip(edit.documents, row) if there]
        if documents:
            jobs.append(make_job(model, tok, replace(edit, documents=documents), seed, RECIPE))
            places.append(i)
    # Without a document nothing is learned: an adapter of zeros changes nothing.
    adapters = Adapters(model, RECIPE.lora, len(design))
    for number, trained in sft(model, jobs, Meter("steps")):
        adapters.flat[places[number]] = trained.weights
    return adapters


@torch.no_grad()
def gold_probability(model, tok, task: Task, adapters: Adapters):
    """(adapters, questions): the probability of each gold answer, given its question."""
    found = []
    for weights in adapters.flat:
        one = Adapters.stack(model, adapters.lora, [weights])
        found.append([log_probs(model, one, example).sum().exp().item()
                      for example in gold(tok, task)])
    return np.array(found)


def regress(design, scores):
    """(documents, questions): what a document adds to a score, by least squares. Of `leave one out`
    and `only one` it is the plain difference."""
    # The column of ones is what is scored without any document.
    x = np.hstack([np.ones((len(design), 1)), design])
    return np.linalg.lstsq(x, scores, rcond=None)[0][1:]


def credit(model, tok, task: Task, edit: SelfEdit, seed=0):
    """(documents, questions): by how much a document of a self-edit raises the probability of a
    gold answer."""
    design = subsets("random halves", len(edit.documents), seed)
    adapters = learn(model, tok, edit, design, seed)
    return regress(design, gold_probability(model, tok, task, adapters))


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
    adapters = learn(model, tok, edit, np.vstack(designs), seed)
    likely = gold_probability(model, tok, task, adapters)
    right = verdicts(model, tok, [task] * adapters.n, list(adapters.flat))
    scores = {"probability": likely, "verdict": right.astype(float)}
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


def measure(writer: str, seed: int, folders: dict, n: int) -> dict:
    """A line: how well credit agrees with the truth, in self-edits of the first n held-out towns.
    """
    tasks = world.load("eval")[:n]
    edits = write(WRITERS[writer], folders[seed], tasks, seed, 1)
    model, tok = load(0)
    found = []
    for i, (task, (edit,)) in enumerate(zip(tasks, edits)):
        # One of which no line states an answer can't be judged.
        if truth(task, edit).any():
            found.append(judge_credit(model, tok, task, edit, seed_for(seed, "credit", i)))
    return {"judged": len(found), "auc": mean_of(found)}


def show(writers: dict[str, list[dict]]):
    """AUCs, with intervals over seeds."""
    rows = []
    for design, what in product(DESIGNS, SCORES):
        rows.append([f"{design}, {what}"])
        for lines in writers.values():
            aucs = [line["auc"][f"{design}, {what}"] for line in lines]
            rows[-1].append(of_seeds(aucs))
    print_table(["subsets of documents, score", *writers], rows)


def draw(folder, file):
    """A self-edit by the writer after round 3: its documents by the questions. A frame: a line
    that states the answer."""
    task = world.load("eval")[DRAWN]
    ((edit,),) = write(WRITERS["round 3"], folder, [task], 0, 1)
    matrix = credit(*load(0), task, edit)
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(9, 3 + 0.3 * len(matrix)), layout="constrained")
    image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    figure.colorbar(image, label="credit")
    for line, question in np.argwhere(truth(task, edit)):
        corner = question - 0.5, line - 0.5
        axes.add_patch(plt.Rectangle(corner, 1, 1, fill=False, linewidth=2))
    axes.set_yticks(range(len(matrix)), [*edit.documents[:-1], "(the passage)"], fontsize=8)
    names = [f"{question} {answer}" for question, answer in zip(task.questions, task.answers)]
    axes.set_xticks(range(len(names)), names, fontsize=8, rotation=35, ha="right")
    save(figure, file)


def show_on_page(folder):
    """The credit in the self-edit that a run's page shows, learned again by the model after the
    last round, as a table of that page."""
    run = run_of(folder)
    if run.cfg.domain != "tinyworld" or not run.metrics.records:
        raise UserError(f"{folder}: no finished run in the tiny world")
    record = before_and_after(run)["ends"][-1]
    task, t = load_tasks(run, run.cfg.eval_data)[record["task"]], record["iteration"]
    if record["questions"] != task.questions:
        raise UserError(f"{folder}: of {task.name} other things are asked now than in the run")
    edit = read_self_edit(task, record["text"])
    matrix = credit(run.load(t), run.tok, task, edit)
    replace_file(run.folder / "credit.json", json.dumps({
        "iteration": t, "title": task.name, "documents": edit.documents,
        "questions": task.questions, "gold": task.answers, "credit": matrix.round(3).tolist()}))
    print(page.write(run.folder))


def main():
    question = Question(WRITERS, measure, show, draw, {"towns": 12}, kind="writer", of_runs=True)
    ap = question.flags(__doc__, needs_out=False)
    args = ap.parse_args()
    if not args.out:
        for folder in args.runs:
            show_on_page(folder)
        return
    # It is drawn from a run, and not from lines.
    question.draw = lambda writers, file: draw(args.runs[0], file)
    question.answer(ap, args)


if __name__ == "__main__":
    cli(main)
