"""Memory that survives: what keeps old towns known while new ones are learned on top of them?

    python outer_loop.py                # a writer: runs/tiny/iter_3
    python -m lab.forgetting --model runs/tiny/iter_3 --out forgetting.jsonl --svg forgetting.svg

A stream of 32 towns. The model reads all passages and writes a self-edit of each before the first
is learned, so that every arm learns the same texts. Then it is trained on one self-edit after the
other, and each adapter is merged into the weights before the next one begins. All arms take the
same 10 optimiser steps a town, a whole batch each; they differ in the tokens of a step.

An arm is made of: a merge by less than 1; adapters on the last layers only (arXiv 2605.07076);
replay, which the model writes itself from the names of earlier towns, or which was kept; text about
other towns that the model writes and learns again, which is KL(previous || new) estimated from
samples; a gate, which merges by as much as its own loss on new and old advises. {"plain merge"} is
the paper's way. The settings were chosen on `tune` towns.
"""
import io
import random
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from files import Lines, Parser, UserError, cli, positive, replace_file
from checkpoint import EMBEDDED
from data import tinyworld
from generate import Sampling, write
from inner_loop import TINY, ask, grade_all, make_job
from lora import Adapters
from model import load_pretrained
from progress import Meter
from selfedit import NOTES, sample_self_edits, seed_for, split_documents
from sft import Job, dialogue, sft
from stats import mean_ci
from tokenizer import Tokenizer


@dataclass
class Arm:
    """How one town is learned on top of the others."""
    scale: float = 1.0      # W <- W + scale * (alpha / r) B A
    layers: int = 0         # adapters on the last layers only; 0: on all
    replay: int = 0         # earlier towns to rehearse beside the new one
    kept: bool = False      # rehearse their self-edits as they were; else what the model remembers
    generic: int = 0        # self-edits of other towns, by the model as it is: KL to that model
    gate: bool = False      # choose the scale by the loss; what is rehearsed is then only measured


ARMS = {
    "plain merge": Arm(),
    "half merge": Arm(scale=.5),
    "last 2 layers": Arm(layers=2),
    "gate": Arm(replay=4, gate=True),
    "KL on other towns": Arm(generic=4),
    "own replay": Arm(replay=8),
    "kept replay": Arm(replay=8, kept=True),
    "half merge, last 2 layers": Arm(scale=.5, layers=2),
    "half merge, last 2 layers, KL": Arm(scale=.5, layers=2, generic=4),
    "half merge, last 2 layers, own replay": Arm(scale=.5, layers=2, replay=8),
    "half merge, last 2 layers, kept replay": Arm(scale=.5, layers=2, replay=8, kept=True),
}
GRID = [1, .7, .5, .35, .25, 0]     # scales that a gate chooses among
WRITING = Sampling(max_new=160, temperature=.8, top_p=.95)
ANSWERING = Sampling(max_new=12, newline_stops=True)


# ------------------------------------------------------------------------------- one arm, one seed

def learn_stream(args, name: str, seed: int) -> dict:
    """A line of the file: a stream learned from its first town to its last."""
    begin = time.time()
    arm, recipe = ARMS[name], replace(TINY, batch=10 ** 6)
    model = load_pretrained(str(args.model).replace("{seed}", str(seed)))
    tok = Tokenizer.from_pretrained(model.folder)
    towns = random.Random(seed_for(seed, "stream")).sample(tinyworld.load(args.towns), args.length)
    seeds = [[seed_for(seed, i, "edit")] for i in range(args.length)]
    edits = [edit for edit, in sample_self_edits(model, tok, towns, WRITING, seeds)]

    meter = Meter(f"towns, {name}, seed {seed}")
    just_after, scales, read, written = [], [], 0, 0
    for k, (town, edit) in enumerate(zip(towns, edits)):
        # The new self-edit, and beside it what is to keep the old ones.
        job = make_job(model, tok, edit, seed_for(seed, k, "adapter"), recipe)
        chosen = random.Random(seed_for(seed, k, "replay")).sample(range(k), min(k, arm.replay))
        if arm.kept:
            old = [edits[i].documents for i in chosen]
        else:
            old = recall(model, tok, [towns[i] for i in chosen], seed_for(seed, k, "recall"))
        old = [as_example(tok, text) for texts in old for text in texts]
        generic = own_texts(model, tok, arm.generic, seed_for(seed, k, "generic"))
        beside = balanced(job.examples, generic if arm.gate else old + generic)
        written += sum(len(ids) for ids, _ in generic + ([] if arm.kept else old))

        # theta <- theta + scale * what SFT(theta, self-edit and replay) adds.
        weights, job = train(model, replace(job, examples=job.examples + beside), arm.layers)
        read += job.tokens
        scales.append(best_scale(model, job, weights, old) if arm.gate else arm.scale)
        Adapters.stack(model, recipe.lora, [scaled(weights, scales[-1])]).merge(0)
        just_after += accuracy(model, tok, [town])
        meter(k + 1, args.length)
    return {"arm": name, "seed": seed, "towns": args.towns, "just after": just_after,
            "at the end": accuracy(model, tok, towns), "scale": float(np.mean(scales)),
            "trained": read / args.length, "written": written / args.length,
            "seconds": round(time.time() - begin, 1)}


def train(model, job: Job, layers: int):
    """(weights, job): an adapter of the last `layers` layers, of all if this is 0."""
    if layers:
        # The others' gradients are zero, and so their B stays zero: they add nothing.
        adapter = Adapters(model, job.recipe.lora, 1)
        adapter.init(0, job.seed)
        free = torch.zeros_like(adapter.flat, dtype=torch.bool)
        for layer, (A, B) in zip(adapter.layers, adapter.pairs(free)):
            number = int(layer.split(".")[2])       # model.layers.3.self_attn.q_proj
            A[:] = B[:] = number >= model.config.n_layer - layers
        job = replace(job, start=adapter.flat[0], free=free[0])
    ((_, trained),) = sft(model, [job])
    if trained.diverged:
        raise UserError("an adapter diverged; choose another seed")
    return trained.weights, job


def scaled(weights, scale):
    """An adapter of which B A is `scale` times as large."""
    return weights * scale ** .5


def accuracy(model, tok, towns) -> list[float]:
    """On the questions of each town, without its passage."""
    (answers,) = ask(model, tok, [towns], ANSWERING)
    return [float(np.mean(row)) for row in grade_all(towns, [one.texts for one in answers])]


# ------------------------------------------------------------------------------- what keeps the old

def balanced(new: list, old: list) -> list:
    """The old examples, weighed so that they count as much in the loss as the new ones do."""
    weight = sum(sum(learn) for _, learn in new) / max(1, sum(sum(learn) for _, learn in old))
    return [(ids, [weight * learned for learned in learn]) for ids, learn in old]


def as_example(tok, text: str):
    ids = tok.document(text)
    return ids, [True] * len(ids)


def recall(model, tok, towns, seed: int) -> list[list[str]]:
    """What the model itself knows of towns, given their names alone: a passage, and notes on it.

    So nothing of an earlier town is kept but its name."""
    cues = ["The town of " + town.name for town in towns]
    (replies,) = write(model, tok, [cues], Sampling(max_new=120)) if cues else ([],)
    passages = [f"{cue} {reply.text}" for cue, reply in zip(cues, replies)]
    asked = [replace(town, prompt=NOTES.format(context=passage))
             for town, passage in zip(towns, passages)]
    edits = sample_self_edits(model, tok, asked, WRITING, [[seed_for(seed, i)]
                                                           for i in range(len(asked))])
    # Not edit.documents: these hold the true passage.
    return [[*split_documents(edit.text), passage] for passage, (edit,) in zip(passages, edits)]


def own_texts(model, tok, n: int, seed: int) -> list:
    """Examples: self-edits of n training towns, as the model writes them now, after the passage.

    The loss on a sample of the old model is, in the mean, KL(old || new) and a constant."""
    towns = random.Random(seed).sample(tinyworld.load("train"), n)
    sampling = replace(WRITING, temperature=1, top_p=1)
    seeds = [[seed_for(seed, i)] for i in range(n)]
    edits = sample_self_edits(model, tok, towns, sampling, seeds)
    return [dialogue(tok.prompt(town.prompt), edit.token_ids)
            for town, (edit,) in zip(towns, edits)]


def best_scale(model, job: Job, weights, old: list) -> float:
    """The scale with the least loss on the new documents and on the old ones, each a mean."""
    totals = np.zeros(len(GRID))
    for examples in (job.examples, old):
        # A step with learning rate 0 changes nothing, and says the loss before it.
        still = replace(job.recipe, lr=0, epochs=1)
        jobs = [replace(job, examples=examples, recipe=still, start=scaled(weights, scale))
                for scale in GRID]
        for i, trained in sft(model, jobs if examples else []):
            totals[i] += trained.losses[0]
    return GRID[int(np.argmin(totals))]


# ------------------------------------------------------------------------------- what came out

def table(records: list[dict]) -> str:
    """Markdown: a row per arm, with 95 % intervals over seeds."""
    lines = ["| arm | just after its own edit | of all towns, at the end | seeds | scale "
             "| tokens trained on per town | written | s |", "|---|---|---|---|---|---|---|---|"]
    for name, own in by_arm(records).items():
        rows = [[np.mean(r["just after"]), np.mean(r["at the end"])] for r in own]
        cells = [f"{m:.3f} ±{h:.3f}" for m, h in zip(*mean_ci(rows))]
        cells += [str(len(own)), f"{np.mean([r['scale'] for r in own]):.2f}"]
        cells += [f"{np.mean([r[key] for r in own]):.0f}"
                  for key in ("trained", "written", "seconds")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_arm(records):
    groups = {name: [r for r in records if r["arm"] == name] for name in ARMS}
    return {name: own for name, own in groups.items() if own}


def draw(records, file):
    """Accuracy at the end against the number of towns learned since, in bins of four towns."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nanoSEAL"    # the same file each time
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for name, own in by_arm(records).items():
        ages = np.array([r["at the end"][::-1] for r in own])
        bins = ages[:, :ages.shape[1] // 4 * 4].reshape(len(own), -1, 4).mean(2)
        mean, half = mean_ci(bins)
        axes.errorbar(4 * np.arange(len(mean)) + 1.5, mean, np.nan_to_num(half), marker="o",
                      markersize=3, capsize=2, label=name)
    axes.set_xlabel("towns learned since")
    axes.set_ylabel("accuracy at the end (95 % interval over seeds)", fontsize=9)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color="#ddd")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize=7, frameon=False, ncols=2)
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    replace_file(file, drawing.getvalue())


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", default=EMBEDDED, help="it writes and it learns: a folder, or the "
                    "folders of several seeds with {seed} in it (default: the embedded one)")
    ap.add_argument("--out", required=True, help="JSON lines, one per arm and seed")
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    ap.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="ARM")
    ap.add_argument("--length", type=positive, default=32, help="towns of a stream (default: 32)")
    ap.add_argument("--towns", default="eval", choices=tinyworld.SPLITS)
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    args = ap.parse_args()
    done = Lines(args.out)
    known = {(r["arm"], r["seed"]) for r in done.records}
    for seed in args.seeds:
        for name in args.arms:
            if (name, seed) not in known:
                done.add(learn_stream(args, name, seed))
    print(table(done.records))
    if args.svg:
        draw(done.records, args.svg)


if __name__ == "__main__":
    cli(main)
