"""Is it only more compute? Accuracy against the number of self-edits of a town that are learned.

    python -m lab.compute RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]

Writers that no reinforcement trained may catch up (SPA, arXiv 2603.22213). k self-edits of a
held-out town, the passage with each, are learned by ONE adapter in the preset's 10 steps, with all
documents in each: only the tokens of a step grow with k. 1.5 minutes for an arm and a seed.
"""
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np

from data import tinyworld
from engine.decode import collect
from engine.train import sft
from lab.experiment import Question, arrows, draw_lines, mean_of, over_seeds, print_table
from lab.tiny import (RECIPE, best_notes, by_direction, load, one_form, rephrased, verdicts,
                      write)
from lora import Job
from selfedit import SelfEdit, Task, seed_for
from support.files import cli
from support.ranks import Meter
from support.stats import mean_ci, with_interval

KS = (1, 2, 4, 8, 16, 32)
# arm -> who writes (lab/tiny.py); theta_0 learns
ARMS = {"untrained writer": 0, "untrained, given a beginning": "begun", "SEAL, round 1": 1,
        "SEAL, round 2": 2, "SEAL, round 3": 3, "rephrased passages": rephrased,
        "fixed forms": one_form, "best notes": best_notes}
SEAL = "SEAL, round 3"


def crossing(ks, curve, other) -> float | None:
    """The k from which a curve stays at or above another. None: it is below at the last k."""
    # The last k at which it is below decides, as an early lead may be chance.
    above = np.subtract(curve, other)
    below = np.flatnonzero(above < 0)
    if len(below) == 0:
        return ks[0]
    i = below[-1]
    if i == len(ks) - 1:
        return None
    # Between two measured k, a straight line over their logarithms.
    part = above[i] / (above[i] - above[i + 1])
    return ks[i] * (ks[i + 1] / ks[i]) ** part


def crossings(ks, pairs) -> str:
    """The geometric mean of where curves cross, with its 95 % interval, in words.

    pairs: (curve, other) of each seed."""
    found = [crossing(ks, curve, other) for curve, other in pairs]
    if not found:
        return ""
    logs = [[np.log(k)] for k in found if k is not None]
    if not logs:
        return f"in none of {len(found)}"
    (mean,), (half,) = mean_ci(logs)
    words = f"{np.exp(mean):.1f}"
    # A single seed has no interval.
    if not np.isnan(half):
        words = with_interval(np.exp(mean), np.exp([mean - half, mean + half]), ".1f")
    return f"{words}, in {len(logs)} of {len(found)}"


def of_town(edits: list[SelfEdit], passage: str) -> dict[str, float]:
    """How alike all self-edits of a town are, and the share of its facts that they state."""
    # An empty self-edit is an empty line.
    lines = "\n".join(edit.text for edit in edits).splitlines() or [""]
    text = "\n".join(lines).encode()
    # Their size over that of their zip is larger the more they repeat.
    found = {"compression": len(text) / len(zlib.compress(text, 9)),
             "distinct lines": len(set(lines)) / len(lines)}
    stated = {tinyworld.taught(line, passage) for line in set(lines)}
    for kind in ("forward", "reversed"):
        facts = [fact for fact in tinyworld.asked(passage).values() if fact[1] == kind]
        found[f"facts covered, {kind}"] = np.mean([fact in stated for fact in facts])
    return found


def learn(model, tok, tasks: list[Task], edits: list[list[SelfEdit]], seed: int) -> dict:
    """What all self-edits of a town, as one adapter, teach: means over the towns."""
    jobs, found = [], []
    for i, (task, row) in enumerate(zip(tasks, edits)):
        # The passage is there once for each self-edit, so that its weight does not fall with k.
        # Of empty self-edits nothing can be learned but the passage.
        documents = sum([edit.documents for edit in row], []) or task.context
        jobs.append(one_job(model, tok, documents, seed_for(seed, "adapter", i)))
        found.append(of_town(row, task.context[0]))

    adapters = [one.weights for one in collect(sft(model, jobs, Meter("steps")))]
    for task, right, row in zip(tasks, verdicts(model, tok, tasks, adapters), found):
        row |= by_direction(task, right)
    return mean_of(found)


def one_job(model, tok, documents: list[str], seed: int) -> Job:
    """All documents in every step. One that is there n times is read once, and weighs n times as
    much in the loss: that is the same, and faster."""
    examples = []
    for text, n in Counter(documents).items():
        ids = tok.document(text)[:model.config.max_len]
        examples.append((ids, [n] * len(ids)))
    # As in the tiny preset, but for all documents in every step.
    return Job(examples, seed, replace(RECIPE, batch=10_000))


def measure(arm: str, seed: int, folders: dict, n: int) -> dict:
    """A line: what each k of an arm teaches the first n held-out towns, a list over KS."""
    tasks = tinyworld.load("eval")[:n]
    edits = write(ARMS[arm], folders[seed], tasks, seed, KS[-1])
    model, tok = load(0)
    means = []
    for k in KS:
        # A few self-edits are learned by up to four groups of them, as chance is larger there.
        n_groups = max(1, min(4, KS[-1] // (2 * k)))
        rows = []
        for g in range(n_groups):
            rows += [row[g * k:(g + 1) * k] for row in edits]
        means.append(learn(model, tok, tasks * n_groups, rows, seed))
    return {name: [row[name] for row in means] for name in means[0]}


def show(arms: dict[str, list[dict]]):
    """Accuracy, where arms without reinforcement pass SEAL, and what the texts are like."""
    kept = ("facts covered, forward", "facts covered, reversed", "compression", "distinct lines")
    seal = {line["seed"]: line["accuracy"] for line in arms.get(SEAL, [])}
    accuracy, passing, texts = [], [], []
    for arm, lines in arms.items():
        accuracy.append([arm, *over_seeds([line["accuracy"] for line in lines])])
        texts.append([arm])
        for name in kept:
            means = np.mean([line[name] for line in lines], axis=0)
            texts[-1].append(arrows([means[0], means[-1]], ".3g"))
        if "round" not in arm:
            pairs = [(line["accuracy"], seal[line["seed"]]) for line in lines
                     if line["seed"] in seal]
            first = [(curve, other[:1]) for curve, other in pairs]
            passing.append([arm, crossings(KS, pairs), crossings(KS, first)])
    print_table(["", *KS], accuracy, "Accuracy, by the number k of self-edits")
    print_table(["", f"{SEAL}, at the same k", "one self-edit of it"], passing,
                "From which k on an arm passes")
    print_table(["", *kept], texts, f"One self-edit -> {KS[-1]} of them")


def draw(arms: dict[str, list[dict]], file):
    # As words, the k are one beside the other.
    ks = list(map(str, KS))
    drawn = {arm: (ks, [line["accuracy"] for line in lines]) for arm, lines in arms.items()}
    draw_lines(file, ("self-edits of a town, learned together",
                      "held-out accuracy (95 % interval over seeds)"), drawn, ylim=(0.4, 1.02))


def main():
    Question(ARMS, measure, show, draw, {"towns": 12}, of_runs=True).ask(__doc__)


if __name__ == "__main__":
    cli(main)
