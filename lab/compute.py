"""Is it only more compute? Accuracy against the number of self-edits of a town that are learned.

    python -m lab.compute RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--seeds 3] [--svg FILE]

RUN_DIR: finished runs of `python outer_loop.py --seed S`, whose writers are compared with writers
that no reinforcement trained (SPA, arXiv 2603.22213, finds that these catch up). k self-edits of a
held-out town, the passage with each, are learned by ONE adapter. Whatever k is, it takes the
preset's 10 steps, all documents in each: only the text grows. A line per arm and seed; the same
command resumes. About 12 minutes per seed on one thread.
"""
import io
import random
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import PRESETS, Config, inner_recipe
from data import tinyworld as world
from files import Lines, Parser, UserError, cli, positive, replace_file
from generate import Sampling, split_into
from inner_loop import answer_each, grade_all
from lab.curve import with_interval
from model import load_pretrained
from progress import Meter
from run import read_settings
from selfedit import read_self_edit, sample_self_edits, seed_for
from sft import Job, sft
from stats import mean_ci
from tokenizer import Tokenizer

KS = (1, 2, 4, 8, 16, 32)
# Texts are sampled, learned and answered as in the tiny preset, but for all documents in a step.
TINY = Config(**PRESETS["tiny"])
RECIPE = replace(inner_recipe(TINY), batch=10_000)
WRITING = Sampling(TINY.max_edit_tokens, 1, TINY.temperature, TINY.top_p)
ANSWERING = Sampling(TINY.max_answer_tokens, newline_stops=True)


# ------------------------------------------------------------------------------- writers

def one_form(town, rng):
    """Every fact that has it in one form, drawn: statements or questions, onwards or back."""
    form = rng.choice(list(world.FORMS))
    return [town.say(relation, own, rng) for relation, own in town.notes() if own == form]


def best_notes(town, rng):
    """A note for each question: the best that is known."""
    return [town.say(relation, form, rng) for relation, form in town.notes()
            if form.startswith("question")]


def rephrased(town, rng):
    """The same passage in other words, which turn no fact round."""
    return [world.reworded(town, rng).passage]


# How the untrained writer's notes are made to begin: in one form they mostly go on in it.
BEGINNINGS = ("The river of", "The founder", "Who", "Which town")
# arm -> (who writes, which theta_t learns): theta_t of a run, or a function that knows the world.
ARMS = {"untrained writer": (0, 0), "untrained, given a beginning": ("begun", 0),
        "SEAL, round 1": (1, 0), "SEAL, round 2": (2, 0), "SEAL, round 3": (3, 0),
        "round 1, own learner": (1, 1), "round 2, own learner": (2, 2),
        "round 3, own learner": (3, 3),
        "rephrased passages": (rephrased, 0), "fixed forms": (one_form, 0),
        "best notes": (best_notes, 0)}
# Arms without reinforcement learning, and what they are compared with.
PLAIN = ("untrained writer", "untrained, given a beginning", "rephrased passages", "fixed forms")
SEAL = ("SEAL, round 3", "round 3, own learner")


def write(writer, model, tok, tasks, seed):
    """The texts of 32 self-edits of each task. Those of a smaller k are the first ones of these."""
    texts, begun, seeds = [], [], []
    for i, task in enumerate(tasks):
        town = world.Town(*world.read_passage(task.context[0]), [])
        for j in range(KS[-1]):
            seeds.append(seed_for(seed, "compute", i, j))
            rng = random.Random(seeds[-1])
            if callable(writer):
                texts.append("\n".join(writer(town, rng)))
            else:
                beginning = rng.choice(BEGINNINGS) if writer == "begun" else ""
                begun.append((replace(task, prompt=task.prompt + beginning), beginning))
    if begun:
        edits = sample_self_edits(model, tok, [task for task, _ in begun], WRITING,
                                  [[seed] for seed in seeds], progress=Meter("self-edits"))
        texts = [f"{beginning} {edit.text}".strip()
                 for (_, beginning), (edit,) in zip(begun, edits)]
    return split_into(texts, [KS[-1]] * len(tasks))


def diversity(texts, passage):
    """What k self-edits of a town are made of. Compression: their size over that of their zip."""
    lines = "\n".join(texts).splitlines() or [""]
    packed = "\n".join(lines).encode()
    found = {world.taught(line, passage) for line in set(lines)} - {None}
    asked = world.asked(passage).values()
    kinds = {"compression": len(packed) / len(zlib.compress(packed, 9)),
             "distinct lines": len(set(lines)) / len(lines)}
    for kind in ("forward", "reversed"):
        own = [fact for fact in asked if fact[1] == kind]
        kinds[f"facts covered, {kind}"] = np.mean([fact in found for fact in own])
    return kinds


# ------------------------------------------------------------------------------- learners

def one_job(model, tok, documents, seed):
    """All documents in every step. One that is there n times is read once and weighs n times as
    much, which is the same."""
    examples = []
    for text, n in Counter(documents).items():
        ids = tok.document(text)[:model.config.max_len]
        examples.append((ids, [n] * len(ids)))
    return Job(examples, seed, RECIPE)


def learn(model, tok, tasks, texts, k, seed):
    """What k self-edits of each town teach: a record of means over the towns."""
    jobs = []
    for i, (task, row) in enumerate(zip(tasks, texts)):
        documents = []
        for text in row[:k]:
            documents += read_self_edit(task, text).documents
        # Of empty self-edits nothing can be learned but the passage.
        jobs.append(one_job(model, tok, documents or task.context, seed_for(seed, "adapter", i)))
    trained = dict(sft(model, jobs, Meter(f"steps, k = {k}")))
    pairs = [(task, trained[i]) for i, task in enumerate(tasks)]
    answers = answer_each(model, tok, pairs, RECIPE.lora, ANSWERING)
    right = np.array(grade_all(tasks, [answer.texts for answer in answers]))
    back = np.array([[kind == "reversed" for kind in task.kinds] for task in tasks])
    means = {"accuracy": right.mean(), "forward": right[~back].mean(),
             "reversed": right[back].mean()}
    rows = [diversity(row[:k], task.context[0]) for task, row in zip(tasks, texts)]
    for name in rows[0]:
        means[name] = np.mean([row[name] for row in rows])
    # Per town: tokens of all documents, those that are there several times included.
    means["tokens"] = np.mean([sum(sum(learn) for _, learn in job.examples) for job in jobs])
    return {name: round(float(value), 4) for name, value in means.items()}


def measure(arm, seed, folder, n):
    """A line: what each k of an arm teaches the first n held-out towns."""
    begin = time.time()
    writer, learner = ARMS[arm]
    tasks = world.load("eval")[:n]

    def theta(t):
        return load_pretrained(Path(folder) / f"iter_{t}" if t else TINY.model, "cpu")

    model = theta(writer if isinstance(writer, int) else 0)
    tok = Tokenizer.from_pretrained(model.folder)
    texts = write(writer, model, tok, tasks, seed)
    model = theta(learner)
    means = [learn(model, tok, tasks, texts, k, seed) for k in KS]
    return {"arm": arm, "seed": seed, "towns": n, "k": KS,
            **{name: [row[name] for row in means] for name in means[0]},
            "seconds": round(time.time() - begin)}


# ------------------------------------------------------------------------------- results

def of(records, arm, name):
    """(seeds, ks): a quantity of an arm, seed after seed."""
    own = [r for r in records if r["arm"] == arm]
    return np.array([r[name] for r in sorted(own, key=lambda r: r["seed"])])


def crossing(curve, other):
    """The k from which a curve stays at or above another, between two measured ones by their
    logarithms. None: it is below at the last k."""
    above = np.subtract(curve, other)
    below = np.flatnonzero(above < 0)
    if not len(below):
        return KS[0]
    i = below[-1]
    if i == len(KS) - 1:
        return None
    part = above[i] / (above[i] - above[i + 1])
    return KS[i] * (KS[i + 1] / KS[i]) ** part


def crossings(curves, others):
    """Where curves cross, seed by seed: the geometric mean of k, with its interval."""
    found = [crossing(*pair) for pair in zip(curves, others)]
    logs = [[np.log(k)] for k in found if k]
    if not logs:
        return f"in none of {len(found)}"
    (mean,), (half,) = mean_ci(logs)
    low, high = np.exp(mean - half), np.exp(mean + half)
    interval = "" if np.isnan(half) else f" [{low:.1f}, {high:.1f}]"
    return f"{np.exp(mean):.1f}{interval}, in {len(logs)} of {len(found)}"


def table(title, head, rows):
    print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def show(records, arms):
    """Accuracy, where the curves cross, and what the texts are like, as Markdown."""
    accuracy = {arm: of(records, arm, "accuracy") for arm in arms}
    rows = []
    for arm in arms:
        rows.append([arm])
        for mean, half in zip(*mean_ci(accuracy[arm])):
            rows[-1].append(with_interval(mean, half, ".3f"))
    table("Accuracy, by the number k of self-edits", ["", *map(str, KS)], rows)

    # A row of columns in pairs: SEAL with the same k, and SEAL with a single self-edit.
    rows, head = [], [""]
    for seal in SEAL:
        head += [f"{seal}, as many", f"{seal}, one"]
    for arm in PLAIN:
        row = [arm]
        for seal in SEAL:
            both = [accuracy.get(name, ()) for name in (arm, seal)]
            if len(both[0]) and len(both[0]) == len(both[1]):
                row += [crossings(*both), crossings(both[0], both[1][:, :1])]
        rows.append(row)
    title = "From which k on an arm is not below SEAL, and in how many seeds"
    table(title, head, rows)

    kept = ("forward", "reversed", "compression", "distinct lines", "facts covered, forward",
            "facts covered, reversed", "tokens")
    rows = []
    for arm in arms:
        rows.append([arm])
        for name in kept:
            mean = of(records, arm, name).mean(axis=0)
            rows[-1].append(f"{mean[0]:.3g} -> {mean[-1]:.3g}")
    table(f"One self-edit -> {KS[-1]} of them", ["", *kept], rows)


def draw(records, arms, file):
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nanoSEAL"    # the same file each time
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(6, 5.2), layout="constrained")
    for i, arm in enumerate(arms):
        mean, half = mean_ci(of(records, arm, "accuracy"))
        # Beside each other, not on top.
        axes.errorbar(np.array(KS) * 1.01 ** i, mean, np.nan_to_num(half), marker="o", capsize=2,
                      label=arm, linestyle="--" if "own learner" in arm else "-")
    axes.set_xscale("log", base=2)
    axes.set_xticks(KS, map(str, KS))
    axes.set_xlabel("self-edits of a town, learned together")
    axes.set_ylabel("held-out accuracy (95 % interval over seeds)", fontsize=9)
    axes.set_ylim(0, 1)
    axes.grid(axis="y", color="#ddd")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", metadata={"Date": None})
    replace_file(file, drawing.getvalue())


def main():
    ap = Parser(description=" ".join(__doc__.split("\n\n")[0].split()))
    ap.add_argument("runs", nargs="+", help="folders of finished runs, one for each seed")
    ap.add_argument("--out", required=True, type=Path, help="JSON lines, one per arm and seed")
    ap.add_argument("--seeds", type=int, nargs="+", help="work on these alone (default: all runs')")
    ap.add_argument("--towns", type=positive, default=24, help="held-out ones (default: 24)")
    ap.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    args = ap.parse_args()
    folders = {read_settings(folder)["seed"]: folder for folder in args.runs}
    missing = set(args.seeds or ()) - folders.keys()
    if missing:
        raise UserError(f"--seeds {min(missing)}: no run of this seed is named")
    done = Lines(args.out)
    if any(r["towns"] != args.towns for r in done.records):
        raise UserError(f"{args.out} has lines of another --towns; name another --out")
    known = {(r["arm"], r["seed"]) for r in done.records}
    for seed in args.seeds or sorted(folders):
        for arm in args.arms:
            if (arm, seed) not in known:
                done.add(measure(arm, seed, folders[seed], args.towns))
                print(f"seed {seed}, {arm}: {done.records[-1]['accuracy']}", flush=True)
    arms = [arm for arm in ARMS if any(r["arm"] == arm for r in done.records)]
    show(done.records, arms)
    if args.svg:
        draw(done.records, arms, args.svg)


if __name__ == "__main__":
    cli(main)
