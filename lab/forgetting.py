"""Memory that survives: what keeps old towns known while new ones are learned on top of them?

    python outer_loop.py        # a model that writes good self-edits: runs/tiny/iter_3
    python -m lab.forgetting --model runs/tiny/iter_3 --out forgetting.jsonl --svg forgetting.svg

A stream of 32 towns. The model reads all their passages and writes all self-edits before it learns
the first one, so that every arm learns the same texts. Then it is trained on one after the other,
and each adapter is merged into the weights before the next begins: 10 steps of one batch a town, in
every arm. Arms differ in how much they merge, where the adapters are, and in what stands in the
batch beside the new self-edit: see Arm and remember.py. "plain merge" is the paper's way. Settings
were chosen on `tune` towns. About 8 minutes a seed on one core. Several processes may share the
work: each with its own --seeds and --out, which `cat` joins.
"""
import random
import time
from dataclasses import dataclass, replace

import numpy as np

from files import Lines, Parser, cli, positive
from checkpoint import EMBEDDED
from data import tinyworld
from generate import Sampling
from inner_loop import TINY, ask, grade_all, make_job
from lab.curve import pyplot, save, with_interval
from lora import Adapters
from model import load_pretrained
from progress import Meter
from remember import last_layers, recall, scaled, with_old
from selfedit import sample_self_edits, seed_for
from sft import Job, dialogue, sft
from stats import mean_ci
from tokenizer import Tokenizer


@dataclass
class Arm:
    """How a town is learned on top of the others."""
    scale: float = 1.0      # W <- W + scale (alpha / r) B A
    layers: int = 4         # adapters on the last ones only
    replay: int = 0         # earlier towns to rehearse beside the new one
    kept: bool = False      # rehearse their self-edits as they were; else what the model remembers
    generic: int = 0        # self-edits of other towns, by the model as it is: KL to that model
    gate: bool = False      # choose the scale by the loss; what is recalled is then not learned
    lr: float = TINY.lr


ARMS = {
    "plain merge": Arm(),
    "lower rate": Arm(lr=1e-2),
    "half": Arm(scale=.5),
    "layers": Arm(layers=2),
    "gate": Arm(replay=8, gate=True),
    "KL": Arm(generic=8),
    "own replay": Arm(replay=8),
    "kept replay": Arm(replay=8, kept=True),
    "half, layers": Arm(.5, layers=2),
    "half, own replay": Arm(.5, replay=8),
    "layers, own replay": Arm(layers=2, replay=8),
    "half, layers, KL": Arm(.5, layers=2, generic=8),
    "half, layers, own replay": Arm(.5, layers=2, replay=8),
    "half, layers, kept replay": Arm(.5, layers=2, replay=8, kept=True),
}
SHOWN = ("plain merge", "half", "layers", "KL", "own replay", "half, layers",
         "half, layers, own replay", "half, layers, kept replay")      # in the figure
GRID = [1, .7, .5, .35, .25, 0]     # scales that a gate chooses among
WRITING = Sampling(max_new=160, temperature=.8, top_p=.95)
ANSWERING = Sampling(max_new=12, newline_stops=True)


# ------------------------------------------------------------------------------- one arm, one seed

def learn_stream(args, name: str, seed: int) -> dict:
    """A line of the file: a stream learned from its first town to its last."""
    begin = time.time()
    arm = ARMS[name]
    recipe = replace(TINY, lr=arm.lr)
    model = load_pretrained(str(args.model).replace("{seed}", str(seed)))
    tok = Tokenizer.from_pretrained(model.folder)
    towns = random.Random(seed_for(seed, "stream")).sample(tinyworld.load(args.towns), args.length)
    seeds = [[seed_for(seed, i, "edit")] for i in range(args.length)]
    edits = []
    for town, (edit,) in zip(towns, sample_self_edits(model, tok, towns, WRITING, seeds)):
        edits.append(edit if edit.documents else town.references["passage only"])

    meter = Meter(f"towns, {name}, seed {seed}")
    just_after, scales, read, written = [], [], 0, 0
    for k, (town, edit) in enumerate(zip(towns, edits)):
        # The new self-edit, and beside it what is to keep the old ones.
        job = make_job(model, tok, edit, seed_for(seed, k, "adapter"), recipe)
        chosen = random.Random(seed_for(seed, k, "earlier")).sample(range(k), min(k, arm.replay))
        old = [edits[i] for i in chosen]
        if chosen and not arm.kept:
            seeds = [seed_for(seed, k, i, "recall") for i in chosen]
            (old,) = recall(model, tok, [[towns[i] for i in chosen]], WRITING, seeds)
        old = [example for one in old for example in make_job(model, tok, one, 0, recipe).examples]
        beside = own_texts(model, tok, arm.generic, seed_for(seed, k, "generic"))
        job = with_old(job, beside if arm.gate else old + beside)
        read += job.tokens
        written += sum(sum(learn) for _, learn in beside + ([] if arm.kept else old))

        # Adapters on the last layers: the others' gradients are zero, and so their B stays zero.
        adapter = Adapters(model, recipe.lora, 1)
        adapter.init(0, job.seed)
        job = replace(job, start=adapter.flat[0], free=last_layers(adapter, arm.layers))
        ((_, trained),) = sft(model, [job])
        scales.append(best_scale(model, job, trained.weights, old) if arm.gate else arm.scale)
        if not trained.diverged:
            adapter.flat[0] = scaled(trained.weights, scales[-1])
            adapter.merge(0)
        just_after += accuracy(model, tok, [town])
        meter(k + 1, args.length)
    return {"arm": name, "seed": seed, "just after": just_after,
            "at the end": accuracy(model, tok, towns), "scale": float(np.mean(scales)),
            "trained": read / args.length, "written": written / args.length,
            "seconds": round(time.time() - begin, 1)}


def own_texts(model, tok, n: int, seed: int) -> list:
    """Examples: self-edits of n training towns, as the model writes them now, after the passage.

    The loss on a sample of the old model is, in the mean, KL(old || new) and a constant."""
    towns = random.Random(seed).sample(tinyworld.load("train"), n)
    seeds = [[seed_for(seed, i)] for i in range(n)]
    edits = sample_self_edits(model, tok, towns, replace(WRITING, temperature=1, top_p=1), seeds)
    return [dialogue(tok.prompt(town.prompt), edit.token_ids)
            for town, (edit,) in zip(towns, edits)]


def best_scale(model, job: Job, weights, old: list) -> float:
    """The scale with the least loss on the new documents and on what was recalled, each a mean."""
    # A step with learning rate 0 changes nothing, and says the loss before it.
    still = replace(job.recipe, lr=0, epochs=1, batch=10 ** 6)
    totals = np.zeros(len(GRID))
    for examples in filter(None, (job.examples, old)):
        jobs = [replace(job, examples=examples, recipe=still, start=scaled(weights, scale))
                for scale in GRID]
        for i, trained in sft(model, jobs):
            totals[i] += trained.losses[0]
    return GRID[int(np.argmin(totals))]


def accuracy(model, tok, towns) -> list[float]:
    """On the questions of each town, without its passage."""
    (answers,) = ask(model, tok, [towns], ANSWERING)
    return [float(np.mean(row)) for row in grade_all(towns, [one.texts for one in answers])]


# ------------------------------------------------------------------------------- what came out

def table(records: list[dict]) -> str:
    """Markdown: a row per arm, with 95 % intervals over seeds."""
    lines = ["| arm | just after its own edit | of all towns, at the end | seeds | scale "
             "| tokens trained on per town | tokens written for it | s |",
             "|---|---|---|---|---|---|---|---|"]
    for name, own in by_arm(records).items():
        rows = [[np.mean(r["just after"]), np.mean(r["at the end"])] for r in own]
        cells = [with_interval(m, h, ".3f") for m, h in zip(*mean_ci(rows))]
        cells += [str(len(own)), f"{np.mean([r['scale'] for r in own]):.2f}"]
        for key in ("trained", "written", "seconds"):
            cells.append(f"{np.mean([r[key] for r in own]):.0f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_arm(records):
    groups = {name: [r for r in records if r["arm"] == name] for name in ARMS}
    return {name: own for name, own in groups.items() if own}


def draw(records, file):
    """Accuracy at the end against the number of towns learned since, in bins of four towns."""
    figure, axes = pyplot().subplots(figsize=(6, 4.5), layout="constrained")
    for name, own in by_arm(records).items():
        if name not in SHOWN:
            continue
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
    save(figure, file)


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
