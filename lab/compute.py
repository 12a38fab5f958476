"""Is it only more compute? Accuracy against the number of self-edits of a town that are learned.

    python -m lab.compute RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--seeds 3] [--svg FILE]

RUN_DIR: finished runs of `python outer_loop.py --seed S`, one for each seed. Their writers are
compared with writers that no reinforcement trained, as these may catch up (SPA, arXiv 2603.22213).
k self-edits of a held-out town, the passage with each, are learned by ONE adapter. Whatever k is,
it takes the preset's 10 steps, with all documents in each: the tokens of a step grow with k, and
their mean is in the table. A line per arm and seed; the same command resumes. 16 minutes per seed
on one thread.
"""
import random
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import PRESETS, Config, inner_recipe
from data import tinyworld as world
from files import Lines, Parser, UserError, cli, positive
from generate import Sampling, split_into
from inner_loop import answer_each, grade_all
from lab.curve import pyplot, save, with_interval
from model import load_pretrained
from progress import Meter
from run import read_settings
from selfedit import SelfEdit, Task, read_self_edit, sample_self_edits, seed_for
from sft import Job, sft
from stats import mean_ci
from tokenizer import Tokenizer

KS = (1, 2, 4, 8, 16, 32)
# Sampled, learned and answered as in the tiny preset, but for all documents in every step.
TINY = Config(**PRESETS["tiny"])
RECIPE = replace(inner_recipe(TINY), batch=10_000)
WRITING = Sampling(TINY.max_edit_tokens, 1, TINY.temperature, TINY.top_p)
ANSWERING = Sampling(TINY.max_answer_tokens, newline_stops=True)


# ------------------------------------------------------------------------------- writers

def rephrased(town, rng) -> list[str]:
    """The passage in other words, which turn no fact round."""
    return [world.reworded(town, rng).passage]


def one_form(town, rng) -> list[str]:
    """A note about each fact in one form, drawn: a statement or a question, onwards or back."""
    form = rng.choice(list(world.FORMS))
    return [town.say(relation, own, rng) for relation, own in town.notes() if own == form]


def best_notes(town, rng) -> list[str]:
    """A question in each direction about each fact: the best that is known."""
    return [town.say(relation, form, rng) for relation, form in town.notes()
            if form.startswith("question")]


# How notes are made to begin: in one form, in which they mostly go on.
BEGINNINGS = ("The river of", "The founder", "Who", "Which town")
# arm -> (who writes, t of the theta_t that learns). Writers: a theta_t; theta_0 after a given
# beginning; functions that know the world.
ARMS = {"untrained writer": (0, 0), "untrained, given a beginning": ("begun", 0),
        "SEAL, round 1": (1, 0), "SEAL, round 2": (2, 0), "SEAL, round 3": (3, 0),
        "round 1, own learner": (1, 1), "round 2, own learner": (2, 2),
        "round 3, own learner": (3, 3),
        "rephrased passages": (rephrased, 0), "fixed forms": (one_form, 0),
        "best notes": (best_notes, 0)}


def load(t: int, folder):
    """theta_t of a run, and its tokenizer."""
    model = load_pretrained(Path(folder) / f"iter_{t}" if t else TINY.model, "cpu")
    return model, Tokenizer.from_pretrained(model.folder)


def write(writer, folder, tasks: list[Task], seed: int, k: int) -> list[list[SelfEdit]]:
    """k self-edits of each task. The first ones of these are those of a smaller k."""
    # A draw has a seed of its own, the same for every writer.
    draws = []
    for i, task in enumerate(tasks):
        draws += [(task, seed_for(seed, "compute", i, j)) for j in range(k)]
    if callable(writer):
        texts = []
        for task, draw_seed in draws:
            town = world.Town(*world.read_passage(task.context[0]), [])
            texts.append("\n".join(writer(town, random.Random(draw_seed))))
    else:
        # What a note is made to begin with is part of its prompt, and of its text.
        beginnings = [""] * len(draws)
        if writer == "begun":
            beginnings = [random.Random(draw_seed).choice(BEGINNINGS) for _, draw_seed in draws]
        begun = [replace(task, prompt=task.prompt + beginning)
                 for (task, _), beginning in zip(draws, beginnings)]
        model, tok = load(0 if writer == "begun" else writer, folder)
        written = sample_self_edits(model, tok, begun, WRITING, [[s] for _, s in draws],
                                    progress=Meter("self-edits"))
        texts = [f"{beginning} {edit.text}".strip()
                 for beginning, (edit,) in zip(beginnings, written)]
    edits = [read_self_edit(task, text) for (task, _), text in zip(draws, texts)]
    return split_into(edits, [k] * len(tasks))


def mean_of(rows: list[dict]) -> dict[str, float]:
    """The mean of each value over dicts with the same keys."""
    means = np.mean([list(row.values()) for row in rows], axis=0)
    return {name: round(float(mean), 4) for name, mean in zip(rows[0], means)}


def diversity(edits: list[SelfEdit], passage: str) -> dict[str, float]:
    """What self-edits of a town are made of. Compression: their size over that of their zip."""
    lines = "\n".join(edit.text for edit in edits).splitlines() or [""]
    text = "\n".join(lines).encode()
    found = {"compression": len(text) / len(zlib.compress(text, 9)),
             "distinct lines": len(set(lines)) / len(lines)}
    stated = {world.taught(line, passage) for line in set(lines)}
    for kind in ("forward", "reversed"):
        facts = [fact for fact in world.asked(passage).values() if fact[1] == kind]
        found[f"facts covered, {kind}"] = np.mean([fact in stated for fact in facts])
    return found


# ------------------------------------------------------------------------------- learners

def one_job(model, tok, documents: list[str], seed: int) -> Job:
    """All documents in every step. One that is there n times is read once, and weighs n times as
    much in the loss: that is the same, and faster."""
    examples = []
    for text, n in Counter(documents).items():
        ids = tok.document(text)[:model.config.max_len]
        examples.append((ids, [n] * len(ids)))
    return Job(examples, seed, RECIPE)


def learn(model, tok, tasks: list[Task], edits: list[list[SelfEdit]], seed: int) -> dict:
    """What all self-edits of a town, as one adapter, teach: means over the towns."""
    jobs, found = [], []
    for i, (task, row) in enumerate(zip(tasks, edits)):
        # The passage is there once for each self-edit, so that its weight does not fall with k. Of
        # empty self-edits nothing can be learned but the passage.
        documents = [document for edit in row for document in edit.documents] or task.context
        jobs.append(one_job(model, tok, documents, seed_for(seed, "adapter", i)))
        tokens = sum(len(tok.document(document)) for document in documents)
        found.append({"tokens": tokens} | diversity(row, task.context[0]))
    trained = dict(sft(model, jobs, Meter("steps")))
    pairs = [(task, trained[i]) for i, task in enumerate(tasks)]
    answers = answer_each(model, tok, pairs, RECIPE.lora, ANSWERING)
    right = np.array(grade_all(tasks, [answer.texts for answer in answers]))
    # All towns have the same numbers of questions of each kind.
    back = np.array([task.kinds for task in tasks]) == "reversed"
    for i, row in enumerate(found):
        row |= {"accuracy": right[i].mean(), "forward": right[i][~back[i]].mean(),
                "reversed": right[i][back[i]].mean()}
    return mean_of(found)


def measure(arm: str, seed: int, folder, n: int) -> dict:
    """A line: what each k of an arm teaches the first n held-out towns."""
    begin = time.time()
    writer, learner = ARMS[arm]
    tasks = world.load("eval")[:n]
    edits = write(writer, folder, tasks, seed, KS[-1])
    model, tok = load(learner, folder)
    means = []
    for k in KS:
        # A few self-edits are learned by up to four groups of them, as chance is larger there.
        groups = max(1, min(4, KS[-1] // (2 * k)))
        rows = []
        for g in range(groups):
            rows += [row[g * k:(g + 1) * k] for row in edits]
        means.append(learn(model, tok, tasks * groups, rows, seed))
    curves = {name: [row[name] for row in means] for name in means[0]}
    return {"arm": arm, "seed": seed, "towns": n, **curves, "seconds": round(time.time() - begin)}


# ------------------------------------------------------------------------------- results

def of(records, arm, name, seeds=None):
    """(seeds, ks): a quantity of an arm, seed after seed; of all its seeds or of these."""
    own = {r["seed"]: r[name] for r in records if r["arm"] == arm}
    return np.array([own[seed] for seed in sorted(seeds or own)])


def crossing(curve, other):
    """The k from which a curve stays at or above another, between two measured ones by their
    logarithms. None: it is below at the last k."""
    # The last k at which it is below decides, as an early lead may be chance.
    above = np.subtract(curve, other)
    below = np.flatnonzero(above < 0)
    if not len(below):
        return KS[0]
    i = below[-1]
    if i == len(KS) - 1:
        return None
    part = above[i] / (above[i] - above[i + 1])
    return KS[i] * (KS[i + 1] / KS[i]) ** part


def crossings(curves, others) -> str:
    """Where curves cross, seed by seed: the geometric mean of k, with its interval."""
    found = [crossing(*pair) for pair in zip(curves, others)]
    logs = [[np.log(k)] for k in found if k]
    if not logs:
        return f"in none of {len(found)}"
    (mean,), (half,) = mean_ci(logs)
    interval = ""
    if not np.isnan(half):
        interval = f" [{np.exp(mean - half):.1f}, {np.exp(mean + half):.1f}]"
    return f"{np.exp(mean):.1f}{interval}, in {len(logs)} of {len(found)}"


def table(title, head, rows):
    print(f"\n{title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, row)) + " |")


def show(records, arms):
    """Accuracy, where the curves cross, and what the texts are like, as Markdown."""
    rows, texts = [], []
    kept = ("forward", "reversed", "tokens", "compression", "distinct lines",
            "facts covered, forward", "facts covered, reversed")
    for arm in arms:
        rows.append([arm])
        for mean, half in zip(*mean_ci(of(records, arm, "accuracy"))):
            rows[-1].append(with_interval(mean, half, ".3f"))
        texts.append([arm])
        for name in kept:
            mean = of(records, arm, name).mean(axis=0)
            texts[-1].append(f"{mean[0]:.3g} -> {mean[-1]:.4g}")
    table("Accuracy, by the number k of self-edits", ["", *KS], rows)

    # Where arms without reinforcement learning catch up with SEAL: with its accuracy at the same k,
    # and with that of its single self-edit.
    rows = []
    for seal in ("SEAL, round 3", "round 3, own learner"):
        for arm in arms:
            # Seed by seed, of the seeds that both have.
            seeds = ({r["seed"] for r in records if r["arm"] == arm}
                     & {r["seed"] for r in records if r["arm"] == seal})
            if seeds and "round" not in arm:
                own = of(records, arm, "accuracy", seeds)
                other = of(records, seal, "accuracy", seeds)
                rows.append([arm, seal, crossings(own, other), crossings(own, other[:, :1])])
    head = ["", "catches up with", "the same k", "k against one"]
    table("From which k on, and in how many seeds", head, rows)
    table(f"One self-edit -> {KS[-1]} of them", ["", *kept], texts)


def draw(records, arms, file):
    figure, axes = pyplot().subplots(figsize=(7, 5.2), layout="constrained")
    for i, arm in enumerate(arms):
        mean, half = mean_ci(of(records, arm, "accuracy"))
        # The rounds of SEAL are grey to black; dashed if they teach themselves.
        look = {"linestyle": "--" if "own learner" in arm else "-"}
        if "round" in arm:
            look["color"] = {"1": "#bbb", "2": "#777", "3": "#000"}[arm.split("round ")[1][0]]
        # Beside each other, not on top.
        axes.errorbar(np.array(KS) * 1.01 ** i, mean, np.nan_to_num(half), marker=".", capsize=2,
                      label=arm, **look)
    axes.set_xscale("log", base=2)
    axes.set_xticks(KS, map(str, KS))
    axes.set_xlabel("self-edits of a town, learned together")
    axes.set_ylabel("held-out accuracy (95 % interval over seeds)", fontsize=9)
    axes.set_ylim(0.4, 1.02)
    axes.grid(axis="y", color="#ddd")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    save(figure, file)


def add_flags(ap):
    """What this script and lab.credit ask for."""
    ap.add_argument("runs", nargs="+", help="folders of finished runs, one for each seed")
    ap.add_argument("--out", required=True, type=Path, help="JSON lines, as they are known")
    ap.add_argument("--seeds", type=int, nargs="+", help="work on these alone (default: all runs')")
    ap.add_argument("--towns", type=positive, default=24, help="held-out ones (default: 24)")
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")


def work(args, kind: str, names, measure) -> list[dict]:
    """The lines of all seeds and names of a kind; those that are missing are measured."""
    folders = {read_settings(folder)["seed"]: folder for folder in args.runs}
    missing = set(args.seeds or ()) - folders.keys()
    if missing:
        raise UserError(f"--seeds {min(missing)}: none of the runs has this seed")
    done = Lines(args.out)
    if any(r["towns"] != args.towns for r in done.records):
        raise UserError(f"{args.out} has lines of another --towns; name another --out")
    known = {(r["seed"], r[kind]) for r in done.records}
    for seed in args.seeds or sorted(folders):
        for name in names:
            if (seed, name) not in known:
                done.add(measure(name, seed, folders[seed], args.towns))
                print(f"seed {seed}, {name}: {done.records[-1]['seconds']} s", flush=True)
    return done.records


def main():
    ap = Parser(description=" ".join(__doc__.split("\n\n")[0].split()))
    add_flags(ap)
    ap.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    args = ap.parse_args()
    records = work(args, "arm", args.arms, measure)
    arms = [arm for arm in ARMS if any(r["arm"] == arm for r in records)]
    show(records, arms)
    if args.svg:
        draw(records, arms, args.svg)


if __name__ == "__main__":
    cli(main)
