"""Memory that survives: what keeps old towns known while new ones are learned on top of them?

    python -m lab.forgetting RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]

A stream of 32 towns. The model of round 3 of a finished run (`python outer_loop.py --seed S`) reads
all passages and writes all self-edits before it learns the first one, so that every arm learns the
same texts. Then it is trained on one after the other, and each adapter is merged into the weights
before the next begins: 10 steps of one batch a town, in every arm. Arms differ in how much they
merge, where the adapters are, and in what stands in the batch beside the new self-edit: see Arm in
lab/keeping.py. "plain merge" is the paper's way. 7 minutes a seed for all arms, on one thread.
"""
import random

import numpy as np

from data import tinyworld
from lab.experiment import Question, flags
from lab.keeping import Arm, Stream, learn_town, write_all
from lab.show import error_bars, new_figure, over_seeds, print_table, save
from lab.tiny import answer, load, verdicts
from selfedit import seed_for
from support.files import cli
from support.progress import Meter

ARMS = {
    "plain merge": Arm(),
    "lower rate": Arm(lr=1e-2),
    "half": Arm(scale=.5),
    "layers": Arm(layers=2),
    "gate": Arm(replay=8, gate=True),
    "KL": Arm(generic=8),
    "half, layers": Arm(.5, layers=2),
    "half, own replay": Arm(.5, replay=8),
    "half, layers, own replay": Arm(.5, layers=2, replay=8),
    "half, layers, kept replay": Arm(.5, layers=2, replay=8, kept=True),
}
NOT_DRAWN = ("lower rate", "gate", "half, own replay")      # the figure would be crowded
LENGTH = 32     # towns of a stream


# ------------------------------------------------------------------------------- an arm, a seed

def learn_stream(name: str, seed: int, folders: dict, split: str) -> dict:
    """A line: a stream of a split's towns, learned from the first to the last."""
    arm = ARMS[name]
    model, tok = load(3, folders[seed])
    towns = random.Random(seed_for(seed, "stream")).sample(tinyworld.load(split), LENGTH)
    stream = Stream(model, tok, towns, write_all(model, tok, towns, seed), seed)
    meter = Meter(f"towns, {name}, seed {seed}")
    just_after, costs = [], []
    for k, town in enumerate(towns):
        costs.append(learn_town(stream, arm, k))
        just_after.append(float(verdicts(model, tok, [town]).mean()))
        meter(k + 1, LENGTH)
    at_the_end = verdicts(model, tok, towns).mean(axis=1).tolist()
    means = {name: float(np.mean([cost[name] for cost in costs])) for name in costs[0]}
    return {"just after": just_after, "at the end": at_the_end} | means


# ------------------------------------------------------------------------------- what came out

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
    figure, axes = new_figure("towns learned since", "accuracy at the end (95 % interval over "
                              "seeds)")
    for name, lines in arms.items():
        if name not in NOT_DRAWN:
            # The last town was learned last. (seeds, bins of four)
            ages = np.array([line["at the end"][::-1] for line in lines])
            bins = ages.reshape(len(lines), -1, 4).mean(2)
            error_bars(axes, 4 * np.arange(bins.shape[1]) + 1.5, bins, label=name)
    axes.set_ylim(0, 1)
    save(figure, file)


def main():
    ap = flags(__doc__)
    ap.add_argument("--towns", choices=("eval", "tune"), default="eval",
                    help="tune: to choose settings by (default: eval)")
    answer(ap, Question(ARMS, learn_stream, show, draw, settings=["towns"]))


if __name__ == "__main__":
    cli(main)
