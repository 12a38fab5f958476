"""Which line of a self-edit taught which answer? Its lines are left out, and the answers change.

    python -m lab.credit RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--seeds 3] [--svg FILE --town 5]

RUN_DIR: finished runs of `python outer_loop.py --seed S`. A self-edit is learned again from subsets
of its documents, all side by side, and how well each question is answered is regressed on which
documents were there. Three designs of subsets are compared by the truth, which the tiny world
knows: which fact a line states, and in which direction. AUC: how often a line that states an answer
has more credit for it than one that does not. --svg draws the credit of one town's self-edit by the
writer after round 3. A line per writer and seed; the same command resumes. 6 minutes per seed.
"""
import io
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from config import PRESETS, Config, inner_recipe
from data import tinyworld as world
from files import Lines, Parser, UserError, at_least, cli, positive, replace_file
from generate import Sampling
from inner_loop import ask, grade_all, make_job
from lab.curve import with_interval
from lora import Adapters
from model import load_pretrained
from progress import Meter
from ribbon import Ribbon
from run import read_settings
from selfedit import sample_self_edits, seed_for
from sft import sft
from stats import mean_ci
from tokenizer import Tokenizer

TINY = Config(**PRESETS["tiny"])
RECIPE = inner_recipe(TINY)
WRITING = Sampling(TINY.max_edit_tokens, 1, TINY.temperature, TINY.top_p)
ANSWERING = Sampling(TINY.max_answer_tokens, newline_stops=True)
WRITERS = {"untrained": 0, "round 3": 3}
PAIRS = 20      # of random halves


# ------------------------------------------------------------------------------- credit

def subsets(design, n, seed):
    """(subsets, n) of 0 and 1: which of n documents are learned."""
    if design == "leave one out":
        return np.vstack([np.ones(n), 1 - np.eye(n)])
    if design == "only one":
        return np.vstack([np.zeros(n), np.eye(n)])
    # Random halves, each with the other half, so that every document is there as often as not.
    halves = np.random.default_rng(seed).integers(0, 2, (PAIRS, n))
    return np.vstack([halves, 1 - halves])


def learn(model, tok, edit, design, recipe, seed):
    """The weights (P,) that each subset of a self-edit's documents teaches, from one beginning."""
    jobs = {}
    for i, row in enumerate(design):
        documents = [document for document, there in zip(edit.documents, row) if there]
        if documents:
            jobs[i] = make_job(model, tok, replace(edit, documents=documents), seed, recipe)
    trained = dict(sft(model, list(jobs.values()), Meter("steps")))
    # Without a document nothing is learned: an adapter of zeros changes nothing.
    weights = torch.zeros(len(design), Adapters(model, recipe.lora, 1).flat.shape[1])
    for number, i in enumerate(jobs):
        weights[i] = trained[number].weights
    return weights


@torch.no_grad()
def gold_probability(model, tok, task, adapters):
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
    log_p = model.lm_head(h[:-1]).float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    # What a token predicts is the next one: log_p[j] is of ids[j + 1].
    found, end = [], 0
    for start, length in zip(starts * adapters.n, lengths * adapters.n):
        found.append(log_p[end + start - 1:end + length - 1].sum().exp().item())
        end += length
    return np.reshape(found, (adapters.n, len(texts)))


def regress(design, scores):
    """(documents, questions): what a document adds to a score, by least squares. Of `leave one out`
    and `only one` it is the plain difference."""
    x = np.hstack([np.ones((len(design), 1)), design])
    return np.linalg.lstsq(x, scores, rcond=None)[0][1:]


def credit(model, tok, task, edit, recipe=RECIPE, seed=0):
    """(documents, questions): how much likelier a gold answer is for a document of a self-edit."""
    design = subsets("random halves", len(edit.documents), seed)
    weights = learn(model, tok, edit, design, recipe, seed)
    adapters = Adapters.stack(model, recipe.lora, list(weights))
    return regress(design, gold_probability(model, tok, task, adapters))


# ------------------------------------------------------------------------------- the truth

def truth(task, edit):
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


DESIGNS = ("leave one out", "only one", "random halves")


def judge_credit(model, tok, task, edit, seed):
    """{design, score: AUC} of a self-edit; empty if none of its lines states an answer."""
    stated = truth(task, edit)
    found = {}
    if not stated.any():
        return found
    # The subsets of all designs are trained and asked together.
    designs = [subsets(name, len(edit.documents), seed) for name in DESIGNS]
    weights = learn(model, tok, edit, np.vstack(designs), RECIPE, seed)
    adapters = Adapters.stack(model, RECIPE.lora, list(weights))
    likely = gold_probability(model, tok, task, adapters)
    answers = ask(model, tok, [[task]] * adapters.n, ANSWERING, adapters)
    right = grade_all([task] * adapters.n, [answer.texts for (answer,) in answers])
    for what, scores in (("probability", likely), ("verdict", np.array(right, float))):
        begin = 0
        for name, design in zip(DESIGNS, designs):
            own = scores[begin:begin + len(design)]
            begin += len(design)
            lines = regress(design, own)[:len(stated)]
            found[f"{name}, {what}"] = auc(lines, stated)
    return found


def write(t, folder, tasks, seed):
    """A self-edit of each task by theta_t of a run."""
    model = load_pretrained(Path(folder) / f"iter_{t}" if t else TINY.model, "cpu")
    tok = Tokenizer.from_pretrained(model.folder)
    seeds = [[seed_for(seed, "credit", i)] for i in range(len(tasks))]
    return [edit for (edit,) in sample_self_edits(model, tok, tasks, WRITING, seeds)]


def measure(writer, seed, folder, n):
    """A line: how well the credit in self-edits of the first n held-out towns agrees with the
    truth. All are learned by theta_0."""
    begin = time.time()
    tasks = world.load("eval")[:n]
    edits = write(WRITERS[writer], folder, tasks, seed)
    model = load_pretrained(TINY.model, "cpu")
    tok = Tokenizer.from_pretrained(model.folder)
    found = []
    for i, (task, edit) in enumerate(zip(tasks, edits)):
        found.append(judge_credit(model, tok, task, edit, seed_for(seed, "credit", i, "adapter")))
    found = [aucs for aucs in found if aucs]
    means = {name: float(np.mean([aucs[name] for aucs in found])) for name in found[0]}
    return {"writer": writer, "seed": seed, "towns": n, "with answers": len(found), "auc": means,
            "seconds": round(time.time() - begin)}


# ------------------------------------------------------------------------------- results

def show(records):
    """AUCs with intervals over seeds, as a Markdown table."""
    names = list(records[0]["auc"])
    print("| writer | " + " | ".join(names) + " |")
    print("|---" * (1 + len(names)) + "|")
    for writer in WRITERS:
        rows = [[r["auc"][name] for name in names] for r in records if r["writer"] == writer]
        if rows:
            cells = [with_interval(mean, half, ".3f") for mean, half in zip(*mean_ci(rows))]
            print(f"| {writer} | " + " | ".join(cells) + " |")


def draw(folder, town, file):
    """One town's self-edit by the last writer, document by question; true pairs have a frame."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nanoSEAL"    # the same file each time
    from matplotlib import pyplot as plt
    task = world.load("eval")[town]
    (edit,) = write(WRITERS["round 3"], folder, [task], 0)
    model = load_pretrained(TINY.model, "cpu")
    matrix = credit(model, Tokenizer.from_pretrained(model.folder), task, edit)
    figure, axes = plt.subplots(figsize=(8, 1.8 + 0.3 * len(matrix)), layout="constrained")
    image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    figure.colorbar(image, label="credit: probability of the gold answer")
    for line, question in np.argwhere(truth(task, edit)):
        axes.add_patch(plt.Rectangle((question - .5, line - .5), 1, 1, fill=False, linewidth=2))
    labels = [*edit.documents[:-1], "(the passage)"]
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xticks(range(len(task.questions)), task.questions, fontsize=8, rotation=30, ha="right")
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    replace_file(file, drawing.getvalue())


def main():
    ap = Parser(description=" ".join(__doc__.split("\n\n")[0].split()))
    ap.add_argument("runs", nargs="+", help="folders of finished runs, one for each seed")
    ap.add_argument("--out", required=True, type=Path, help="JSON lines, one per writer and seed")
    ap.add_argument("--seeds", type=int, nargs="+", help="work on these alone (default: all runs')")
    ap.add_argument("--towns", type=positive, default=24, help="held-out ones (default: 24)")
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    ap.add_argument("--town", type=at_least(0), default=0, help="which is drawn (default: 0)")
    args = ap.parse_args()
    folders = {read_settings(folder)["seed"]: folder for folder in args.runs}
    missing = set(args.seeds or ()) - folders.keys()
    if missing:
        raise UserError(f"--seeds {min(missing)}: no run of this seed is named")
    done = Lines(args.out)
    if any(r["towns"] != args.towns for r in done.records):
        raise UserError(f"{args.out} has lines of another --towns; name another --out")
    known = {(r["writer"], r["seed"]) for r in done.records}
    for seed in args.seeds or sorted(folders):
        for writer in WRITERS:
            if (writer, seed) not in known:
                done.add(measure(writer, seed, folders[seed], args.towns))
    show(done.records)
    if args.svg:
        draw(folders[min(folders)], args.town, args.svg)


if __name__ == "__main__":
    cli(main)
