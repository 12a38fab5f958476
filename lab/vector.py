"""A skill as a vector: can what RL changed be added to a model that was not there?

    python -m lab.vector RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]

v = theta_3 - theta_0 of a finished run (`python outer_loop.py --seed S`) is what three M-steps
merged into the weights. PaST (arXiv 2601.11258) adds such a difference to models that have learned
facts by other means. How long may v be? Is the mean of several runs' v as good? Do adapters that
theta_0 learned towns by still work on theta_0 + v? Does a model write well that merged a stream of
towns, once v is added? An arm is a model, which writes and learns. 2 minutes a seed for all arms,
on one thread.
"""
import numpy as np

from lab.changes import add, adapters_of, cosines, difference, towns_of
from lab.experiment import Question, flags
from lab.keeping import GENTLE, Stream, learn_town, write_all
from lab.show import error_bars, new_figure, of_seeds, over_seeds, print_table, save
from lab.tiny import answer, load, score, verdicts
from support.files import cli

SCALES = (0, .5, 1, 1.5, 2, 3)
MEAN, STREAM, THEN = "mean of the runs' v", "a stream of towns", "a stream of towns, then v"
# arm -> the scale of v
ARMS = {f"{scale:g} v": scale for scale in SCALES} | {MEAN: 1, STREAM: 0, THEN: 1}


# ------------------------------------------------------------------------------- an arm, a seed

def measure(arm: str, seed: int, folders: dict) -> dict:
    """A line: the reward of an arm's own self-edits, and what it knows of towns learned before."""
    base, tok = load(0)
    model, _ = load(0)
    new, old = towns_of(seed)
    vectors = {s: difference(load(3, folder)[0], base) for s, folder in folders.items()}

    # The old towns are learned first: one on top of the other, or each as an adapter of theta_0,
    # which is then asked on the arm's model.
    rows = []
    if arm in (STREAM, THEN):
        stream = Stream(model, tok, old, write_all(base, tok, old, seed), seed)
        for k in range(len(old)):
            learn_town(stream, GENTLE, k)
    else:
        rows = adapters_of(seed)
    if arm == MEAN:
        for v in vectors.values():
            add(model, v, 1 / len(vectors))
    else:
        add(model, vectors[seed], ARMS[arm])

    known = verdicts(model, tok, old, rows)
    edits = write_all(model, tok, new, seed)
    found = {"reward": float(np.mean(score(model, tok, new, edits, seed))),
             "known": float(np.mean(known))}
    if arm == "1 v":
        found["cosines"] = cosines(vectors, seed, base, rows[:8])
    return found


# ------------------------------------------------------------------------------- what came out

def show(arms: dict[str, list[dict]]):
    """Rewards and what is known, with intervals over seeds; cosines."""
    rows = []
    for arm, lines in arms.items():
        rows.append([arm, *over_seeds([[line["reward"], line["known"]] for line in lines])])
    print_table(["theta_0 and", "reward of its self-edits", "known of 32 towns"], rows)
    found = [line["cosines"] for line in arms.get("1 v", [])]
    rows = [[name, of_seeds([one[name] for one in found])] for name in found[0]] if found else []
    print_table(["between", "cosine"], rows, "Directions in weight space")


def draw(arms: dict[str, list[dict]], file):
    figure, axes = new_figure("scale of v", "(95 % interval over seeds)")
    scales = [scale for scale in SCALES if f"{scale:g} v" in arms]
    lines = [arms[f"{scale:g} v"] for scale in scales]
    for name, label in (("reward", "reward of its self-edits"), ("known", "known of 32 towns")):
        values = np.transpose([[line[name] for line in own] for own in lines])
        error_bars(axes, scales, values, label=label)
    axes.set_ylim(0, 1)
    save(figure, file)


def main():
    answer(flags(__doc__), Question(ARMS, measure, show, draw))


if __name__ == "__main__":
    cli(main)
