"""What is forgotten while 32 towns are learned one on top of the other: old towns, or how to study?

    python -m lab.forgetting RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]
    python -m lab.forgetting --skill RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]

The model of round 3 of a finished run learns a stream of towns, 10 steps of one batch each, and
every adapter is merged into the weights before the next town begins. Arms differ in how they merge
(lab/keeping.py); "plain merge" is the paper's way. 7 and 4 minutes a seed, on one thread.

Old towns: it writes all self-edits before it learns the first, so that all arms learn the same.
--skill: it writes each when it comes to that town, and now and then of 12 towns that are not in the
stream, of which an inner loop says what that is worth. A reward may fall since the model writes
worse, or since it learns worse. So self-edits of the model as it is and of theta_3, from which the
stream began, are learned by the one and by the other.
"""
import random
import sys
from dataclasses import dataclass

import numpy as np

from data import tinyworld
from lab.experiment import Question, draw_lines, over_seeds, print_table
from lab.keeping import GENTLE, Arm, Stream, learn_town
from lab.tiny import load, score, verdicts, write_all
from selfedit import SelfEdit, seed_for
from support.files import cli
from support.ranks import Meter

LENGTH = 32     # towns of a stream

# ------------------------------------------------------------------------------- old towns

ARMS = {
    "plain merge": Arm(),
    "lower rate": Arm(lr=1e-2),
    "half": Arm(scale=.5),
    "layers": Arm(layers=2),
    "gate": Arm(replay=8, gate=True),
    "KL": Arm(generic=8),
    "half, layers": GENTLE,
    "half, own replay": Arm(.5, replay=8),
    "half, layers, own replay": Arm(.5, layers=2, replay=8),
    "half, layers, kept replay": Arm(.5, layers=2, replay=8, kept=True),
}
NOT_DRAWN = ("lower rate", "gate", "half, own replay")      # the figure would be crowded


def draw_towns(seed: int, split: str, n: int):
    return random.Random(seed_for(seed, "stream")).sample(tinyworld.load(split), n)


def learn_stream(name: str, seed: int, folders: dict, split: str) -> dict:
    """A line: a stream of a split's towns, learned from the first to the last."""
    model, tok = load(3, folders[seed])
    towns = draw_towns(seed, split, LENGTH)
    stream = Stream(model, tok, towns, write_all(model, tok, towns, seed), seed)
    meter = Meter(f"towns, {name}, seed {seed}")
    just_after, costs = [], []
    for k, town in enumerate(towns):
        costs.append(learn_town(stream, ARMS[name], k))
        just_after.append(float(verdicts(model, tok, [town]).mean()))
        meter(k + 1, LENGTH)
    at_the_end = verdicts(model, tok, towns).mean(axis=1).tolist()
    means = {what: float(np.mean([cost[what] for cost in costs])) for what in costs[0]}
    return {"just after": just_after, "at the end": at_the_end} | means


def show(arms: dict[str, list[dict]]):
    """Accuracy just after and at the end, with intervals over seeds, and what it costs."""
    rows = []
    for name, lines in arms.items():
        learned = [[np.mean(line["just after"]), np.mean(line["at the end"])] for line in lines]
        rows.append([name, *over_seeds(learned)])
        for key, form in (("scale", ".2f"), ("trained", ".0f"), ("written", ".0f")):
            rows[-1].append(format(np.mean([line[key] for line in lines]), form))
    print_table(["arm", "just after its own edit", "all towns, at the end", "scale",
                 "tokens trained a town", "tokens written for it"], rows)


def draw(arms: dict[str, list[dict]], file):
    """Accuracy at the end against the number of towns learned since, in bins of four towns."""
    drawn = {}
    for name, lines in arms.items():
        if name not in NOT_DRAWN:
            # The last town was learned last. (seeds, bins of four)
            ages = np.array([line["at the end"][::-1] for line in lines])
            bins = ages.reshape(len(lines), -1, 4).mean(2)
            drawn[name] = 4 * np.arange(bins.shape[1]) + 1.5, bins
    draw_lines(file, ("towns learned since", "accuracy at the end (95 % interval over seeds)"),
               drawn, ylim=(0, 1))


# ------------------------------------------------------------------------------- how to study

@dataclass
class Study:
    """How a town of the stream is studied."""
    merge: Arm
    tries: int = 1          # self-edits, of which the best by an inner loop is learned
    frozen: bool = False    # written by theta_3, which never changes


STUDIES = {
    "plain merge": Study(Arm()),
    "plain merge, best of 2": Study(Arm(), tries=2),
    "plain merge, frozen writer": Study(Arm(), frozen=True),
    "half, layers": Study(GENTLE),
    "half, layers, frozen writer": Study(GENTLE, frozen=True),
    "half, layers, own replay": Study(Arm(.5, layers=2, replay=8)),
}
PROBES = 12                 # towns that are not in the stream
WHEN = (0, 4, 8, 16, 32)    # towns learned before the model is probed
# (who writes, who learns)
PAIRS = [("now", "now"), ("now", "before"), ("before", "now")]


def next_edit(study: Study, stream: Stream, writer) -> SelfEdit:
    """The self-edit by which the stream's next town is learned."""
    k = len(stream.edits)
    town, edits = [stream.towns[k]], []
    for j in range(study.tries):
        edits += write_all(writer, stream.tok, town, seed_for(stream.seed, k, j))
    if study.tries == 1:
        return edits[0]
    rewards = score(stream.model, stream.tok, town * study.tries, edits, seed_for(stream.seed, k))
    return edits[int(np.argmax(rewards))]


def probe(name: str, seed: int, folders: dict, split: str) -> dict:
    """A line: {"writer, learner": mean reward at each time}."""
    study = STUDIES[name]
    before, tok = load(3, folders[seed])
    now, _ = load(3, folders[seed])
    models = {"now": now, "before": before}
    towns = draw_towns(seed, split, LENGTH + PROBES)
    stream, probes = Stream(now, tok, towns[:LENGTH], [], seed), towns[LENGTH:]
    meter = Meter(f"towns, {name}, seed {seed}")
    found = {", ".join(pair): [] for pair in PAIRS}
    written = {"before": write_all(before, tok, probes, seed)}
    for k in range(LENGTH + 1):
        if k in WHEN:
            written["now"] = write_all(now, tok, probes, seed)
            for writer, learner in PAIRS:
                rewards = score(models[learner], tok, probes, written[writer], seed)
                found[f"{writer}, {learner}"].append(float(np.mean(rewards)))
        if k < LENGTH:
            stream.edits.append(next_edit(study, stream, before if study.frozen else now))
            learn_town(stream, study.merge, k)
            meter(k + 1, LENGTH)
    return found


def show_skill(arms: dict[str, list[dict]]):
    """Rewards with intervals over seeds: over the stream, and of all pairs at its end."""
    over_time, at_the_end = [], []
    for name, lines in arms.items():
        over_time.append([name, *over_seeds([line["now, now"] for line in lines])])
        last = [[line[", ".join(pair)][-1] for pair in PAIRS] for line in lines]
        at_the_end.append([name, *over_seeds(last)])
    print_table(["towns learned before", *WHEN], over_time, "Reward of a new self-edit")
    head = [f"written by the model {writer}, learned by it {learner}" for writer, learner in PAIRS]
    print_table(["", *head], at_the_end, f"After {WHEN[-1]} towns")


def draw_skill(arms: dict[str, list[dict]], file):
    drawn = {name: (WHEN, [line["now, now"] for line in lines]) for name, lines in arms.items()}
    draw_lines(file, ("towns learned before", "reward of a new self-edit (95 % interval over "
                      "seeds)"), drawn, ylim=(0, 1))


def main():
    question = Question(ARMS, learn_stream, show, draw, {"towns": "eval"}, of_runs=True)
    if "--skill" in sys.argv:
        question = Question(STUDIES, probe, show_skill, draw_skill, {"towns": "eval"}, of_runs=True)
    ap = question.flags(__doc__)
    ap.add_argument("--skill", action="store_true", help="does it forget how to study?")
    question.answer(ap, ap.parse_args())


if __name__ == "__main__":
    cli(main)
