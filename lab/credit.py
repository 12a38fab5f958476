"""Which line of a self-edit taught which answer? Its lines are left out, and the answers change.

    python -m lab.credit RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE --town 5]

A self-edit by the writer of a finished run (`python outer_loop.py --seed S`) is learned by theta_0
from many subsets of its documents, all side by side, and the answers are regressed on which
documents were there: with one left out, with only one, or random halves. The answers are their
verdicts or the probability of the gold answer. What is best is judged by the truth, as the tiny
world knows which fact a line states, and in which direction. AUC: how often a line that states an
answer has more credit for it than a line that does not. 1.5 minutes for a writer and a seed.
"""
from itertools import product

import numpy as np

from data import tinyworld as world
from lab.credit_of_run import DESIGNS, credit
from lab.experiment import complete, each, flags, groups, mean_of
from lab.show import of_seeds, print_table, pyplot, save
from lab.tiny import RECIPE, add_runs, by_seed, load
from lab.truth import SCORES, judge_credit, truth
from lab.writers import write
from selfedit import seed_for
from support.files import at_least, cli, positive

WRITERS = {"untrained": 0, "round 3": 3}    # t of the theta_t that writes; theta_0 learns


def measure(writer: str, seed: int, folder, n: int) -> dict:
    """A line: how well credit agrees with the truth, in self-edits of the first n held-out towns.
    """
    tasks = world.load("eval")[:n]
    edits = write(WRITERS[writer], folder, tasks, seed, 1)
    model, tok = load(0, folder)
    found = []
    for i, (task, (edit,)) in enumerate(zip(tasks, edits)):
        # One of which no line states an answer can't be judged.
        if truth(task, edit).any():
            found.append(judge_credit(model, tok, task, edit, seed_for(seed, "credit", i)))
    return {"judged": len(found), "auc": mean_of(found)}


# ------------------------------------------------------------------------------- what came out

def show(writers: dict[str, list[dict]]):
    """AUCs, with intervals over seeds."""
    rows = []
    for design, what in product(DESIGNS, SCORES):
        rows.append([f"{design}, {what}"])
        for lines in writers.values():
            aucs = [line["auc"][f"{design}, {what}"] for line in lines]
            rows[-1].append(of_seeds(aucs))
    print_table(["subsets of documents, score", *writers], rows)


def draw(folder, town: int, file):
    """A self-edit by the writer after round 3: its documents by the questions. A frame: a line
    that states the answer."""
    task = world.load("eval")[town]
    ((edit,),) = write(WRITERS["round 3"], folder, [task], 0, 1)
    matrix = credit(*load(0, folder), task, edit, RECIPE)
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


def main():
    ap = flags(__doc__)
    add_runs(ap)
    ap.add_argument("--towns", type=positive, default=12, help="held-out ones (default: 12)")
    ap.add_argument("--town", type=at_least(0), default=0, help="which is drawn (default: 0)")
    args = ap.parse_args()
    folders = by_seed(args.runs)

    def measure_one(line):
        return measure(line["writer"], line["seed"], folders[line["seed"]], args.towns)

    wanted = each("writer", WRITERS, sorted(folders))
    records = complete(ap, args, wanted, measure_one, settings=["towns"])
    show(groups(records, "writer", WRITERS))
    if args.svg:
        draw(args.runs[0], args.town, args.svg)


if __name__ == "__main__":
    cli(main)
