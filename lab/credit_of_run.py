"""Which line of a self-edit taught which answer?

    python -m lab.credit_of_run RUN_DIR [--iteration 3 --task 5]       # of any run about passages

A self-edit is learned again from random halves of its documents, all side by side, and how likely
the gold answers become is regressed on which documents were there. The result is a table of
report.html. lab/credit.py holds it against the truth, which the tiny world knows.
"""
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

# Before what takes long to import, so that Ctrl-C is a line from here on.
from support.files import Parser, UserError, at_least, cli, read_json, replace_file

import numpy as np
import torch

from engine.ribbon import Ribbon
from engine.train import sft
from inner_loop import make_job
from lora import Adapters, Recipe
from selfedit import SelfEdit, Task, read_self_edit, seed_for
from support import page
from support.config import Config
from support.progress import Meter
from support.run import Run

DESIGNS = ("leave one out", "only one", "random halves")
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


def learn(model, tok, edit: SelfEdit, design, recipe: Recipe, seed: int) -> Adapters:
    """An adapter for each subset of a self-edit's documents. All begin from the same values."""
    jobs, places = [], []
    for i, row in enumerate(design):
        documents = [document for document, there in zip(edit.documents, row) if there]
        if documents:
            jobs.append(make_job(model, tok, replace(edit, documents=documents), seed, recipe))
            places.append(i)
    # Without a document nothing is learned: an adapter of zeros changes nothing.
    adapters = Adapters(model, recipe.lora, len(design))
    for number, trained in sft(model, jobs, Meter("steps")):
        adapters.flat[places[number]] = trained.weights
    return adapters


@torch.no_grad()
def gold_probability(model, tok, task: Task, adapters: Adapters):
    """(adapters, questions): the probability of each gold answer, given its question."""
    texts, starts = [], []
    for query, answer in zip(task.queries, task.answers):
        prompt = tok.prompt(query)
        texts.append(prompt + tok.encode(" " + answer))
        starts.append(len(prompt))
    # The same texts for every adapter, end to end on one ribbon.
    lengths = [len(ids) for ids in texts]
    ribbon = Ribbon(lengths * adapters.n, model.device)
    ids = torch.tensor(sum(texts, []) * adapters.n, device=model.device)
    with adapters.route([sum(lengths)] * adapters.n):
        h = model.hidden(ids, ribbon.position, ribbon.attend)
    # What a token predicts is the next one. The answers' tokens alone go through the output layer.
    answers, end = [], 0
    for start, length in zip(starts * adapters.n, lengths * adapters.n):
        answers.append(torch.arange(end + start, end + length, device=model.device))
        end += length
    places = torch.cat(answers)
    log_p = model.lm_head(h[places - 1]).float().log_softmax(-1).gather(1, ids[places, None])[:, 0]
    found = [own.sum().exp().item() for own in log_p.split([len(own) for own in answers])]
    return np.reshape(found, (adapters.n, len(texts)))


def regress(design, scores):
    """(documents, questions): what a document adds to a score, by least squares. Of `leave one out`
    and `only one` it is the plain difference."""
    # The column of ones is what is scored without any document.
    x = np.hstack([np.ones((len(design), 1)), design])
    return np.linalg.lstsq(x, scores, rcond=None)[0][1:]


def credit(model, tok, task: Task, edit: SelfEdit, recipe: Recipe, seed=0,
           by="random halves"):
    """(documents, questions): by how much a document of a self-edit raises the probability of a
    gold answer. by: one of DESIGNS. "only one" is the fastest, but shows no harm."""
    design = subsets(by, len(edit.documents), seed)
    adapters = learn(model, tok, edit, design, recipe, seed)
    return regress(design, gold_probability(model, tok, task, adapters))


# ------------------------------------------------------------------------------- of a run

def of_run(folder, t: int | None, i: int) -> dict:
    """The credit in the first held-out self-edit of task i by theta_t, which learns it again."""
    settings = read_json(Path(folder) / "config.json")
    names = {f.name for f in dataclasses.fields(Config)}
    run = Run(Config(**{name: settings[name] for name in settings.keys() & names}
                     | {"run_dir": str(folder)}))
    records = [r for r in run.edits.records if r["split"] == "eval" and r["edit"] == 0]
    if t is None:
        t = max((r["iteration"] for r in records), default=0)
    texts = {r["task"]: r for r in records if r["iteration"] == t}
    if i not in texts:
        raise UserError(f"{folder}: no held-out self-edit of task {i} in iteration {t}")
    task = run.tasks(run.cfg.eval_data)[i]
    if not task.context:
        raise UserError(f"{folder} is a run about puzzles; credit is for passages")
    edit = read_self_edit(task, texts[i]["text"], texts[i]["token_ids"])
    if not edit.documents:
        raise UserError(f"{folder}: nothing could be read in this self-edit: {edit.note}")
    seed = seed_for(run.cfg.seed, t, i, "credit")
    matrix = credit(run.load(t), run.tok, task, edit, run.recipe, seed)
    return {"iteration": t, "task": i, "title": task.name, "documents": edit.documents,
            "questions": task.questions, "gold": task.answers,
            "credit": [[round(float(x), 3) for x in row] for row in matrix]}


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("run_dir", type=Path, help="a run's folder, with its weights")
    ap.add_argument("--iteration", type=at_least(0), help="the self-edits after so many rounds "
                    "(default: the last)")
    ap.add_argument("--task", type=at_least(0), default=0, help="which held-out one (default: 0)")
    args = ap.parse_args()
    if not (args.run_dir / "config.json").exists():
        raise UserError(f"{args.run_dir} is no run's folder: it has no config.json")
    found = of_run(args.run_dir, args.iteration, args.task)
    replace_file(args.run_dir / "credit.json", json.dumps(found))
    for document, row in zip(found["documents"], found["credit"]):
        most = int(np.argmax(row))
        print(f"{row[most]:+.2f}  {document[:60]!r}: most for {found['questions'][most]!r}")
    print(page.write(args.run_dir))


if __name__ == "__main__":
    cli(main)
