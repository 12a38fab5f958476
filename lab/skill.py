"""Does it forget how to study? What a new self-edit is worth after n passages have been learned.

    python -m lab.skill RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]

A stream of 32 towns is learned one by one, each by a self-edit that the model writes when it comes
to that town, with all that it learned before merged into its weights. From time to time the model
writes of 12 towns that are not in the stream, and an inner loop says what that is worth. A reward
may fall since the model writes worse, or since it learns worse: so self-edits of the model as it is
and of theta_3, from which the stream began, are learned by the one and by the other. Ways to merge
are those of lab/forgetting.py. 4 minutes a seed for all arms, on one thread.
"""
import random
from dataclasses import dataclass

import numpy as np

from data import tinyworld
from lab.experiment import Question, flags
from lab.keeping import GENTLE, Arm, Stream, learn_town, write_all
from lab.show import error_bars, new_figure, over_seeds, print_table, save
from lab.tiny import answer, load, score
from selfedit import SelfEdit, seed_for
from support.files import cli
from support.progress import Meter

# ---------------------------------------------------------------------------- how a town is studied

@dataclass
class Study:
    """How a town of the stream is studied."""
    merge: Arm
    tries: int = 1          # self-edits, of which the best by an inner loop is learned
    frozen: bool = False    # written by theta_3, which never changes


def next_edit(study: Study, stream: Stream, writer) -> SelfEdit:
    """The self-edit by which the stream's next town is learned."""
    k = len(stream.edits)
    edits = []
    for j in range(study.tries):
        seed = seed_for(stream.seed, k, j)
        edits += write_all(writer, stream.tok, [stream.towns[k]], seed)
    if study.tries == 1:
        return edits[0]
    town = [stream.towns[k]] * study.tries
    rewards = score(stream.model, stream.tok, town, edits, seed_for(stream.seed, k))
    return edits[int(np.argmax(rewards))]


ARMS = {
    "plain merge": Study(Arm()),
    "plain merge, best of 2": Study(Arm(), tries=2),
    "plain merge, frozen writer": Study(Arm(), frozen=True),
    "half, layers": Study(GENTLE),
    "half, layers, frozen writer": Study(GENTLE, frozen=True),
    "half, layers, own replay": Study(Arm(.5, layers=2, replay=8)),
}
LENGTH, PROBES = 32, 12             # towns of the stream, and those that are not in it
WHEN = (0, 4, 8, 16, 32)            # towns learned before the model is probed
# (who writes, who learns)
PAIRS = [("now", "now"), ("now", "before"), ("before", "now")]


def measure(name: str, seed: int, folders: dict, split: str) -> dict:
    """A line: {"writer, learner": mean reward at each time}."""
    study = ARMS[name]
    before, tok = load(3, folders[seed])
    now, _ = load(3, folders[seed])
    models = {"now": now, "before": before}
    count = LENGTH + PROBES
    towns = random.Random(seed_for(seed, "stream")).sample(tinyworld.load(split), count)
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


# ------------------------------------------------------------------------------- what came out

def show(arms: dict[str, list[dict]]):
    """Rewards with intervals over seeds: over the stream, and of all pairs at its end."""
    over_time, at_the_end = [], []
    for name, lines in arms.items():
        over_time.append([name, *over_seeds([line["now, now"] for line in lines])])
        last = [[line[", ".join(pair)][-1] for pair in PAIRS] for line in lines]
        at_the_end.append([name, *over_seeds(last)])
    print_table(["towns learned before", *WHEN], over_time, "Reward of a new self-edit")
    head = [f"written by the model {writer}, learned by it {learner}" for writer, learner in PAIRS]
    print_table(["", *head], at_the_end, f"After {WHEN[-1]} towns")


def draw(arms: dict[str, list[dict]], file):
    figure, axes = new_figure("towns learned before", "reward of a new self-edit (95 % interval "
                              "over seeds)")
    for name, lines in arms.items():
        error_bars(axes, WHEN, [line["now, now"] for line in lines], label=name)
    axes.set_ylim(0, 1)
    save(figure, file)


def main():
    ap = flags(__doc__)
    ap.add_argument("--towns", choices=("eval", "tune"), default="eval", help="default: eval")
    answer(ap, Question(ARMS, measure, show, draw, settings=["towns"]))


if __name__ == "__main__":
    cli(main)
