"""Is it only more compute? Accuracy against the number of self-edits of a town that are learned.

    python -m lab.compute RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]

The writers of finished runs (`python outer_loop.py --seed S`) are compared with writers that no
reinforcement trained, as these may catch up (SPA, arXiv 2603.22213). k self-edits of a held-out
town, the passage with each, are learned by ONE adapter. Whatever k is, it takes the preset's 10
steps, with all documents in each: only the tokens of a step grow with k. 1.5 minutes for an arm and
a seed on one thread.
"""
import numpy as np

from data import tinyworld
from lab.crossing import where_passed
from lab.experiment import Question, flags
from lab.show import arrows, error_bars, new_figure, over_seeds, print_table, save
from lab.tiny import answer, load
from lab.together import learn
from lab.writers import best_notes, one_form, rephrased, write
from support.files import cli, positive

KS = (1, 2, 4, 8, 16, 32)
# arm -> (who writes, t of the theta_t that learns)
ARMS = {"untrained writer": (0, 0), "untrained, given a beginning": ("begun", 0),
        "SEAL, round 1": (1, 0), "SEAL, round 2": (2, 0), "SEAL, round 3": (3, 0),
        "round 3, own learner": (3, 3),
        "rephrased passages": (rephrased, 0), "fixed forms": (one_form, 0),
        "best notes": (best_notes, 0)}
SEAL = "SEAL, round 3"


# ------------------------------------------------------------------------------- an arm, a seed

def measure(arm: str, seed: int, folders: dict, n: int) -> dict:
    """A line: what each k of an arm teaches the first n held-out towns, a list over KS."""
    writer, learner = ARMS[arm]
    tasks = tinyworld.load("eval")[:n]
    edits = write(writer, folders[seed], tasks, seed, KS[-1])
    model, tok = load(learner, folders[seed])
    means = []
    for k in KS:
        # A few self-edits are learned by up to four groups of them, as chance is larger there.
        n_groups = max(1, min(4, KS[-1] // (2 * k)))
        rows = []
        for g in range(n_groups):
            rows += [row[g * k:(g + 1) * k] for row in edits]
        means.append(learn(model, tok, tasks * n_groups, rows, seed))
    return {name: [row[name] for row in means] for name in means[0]}


# ------------------------------------------------------------------------------- what came out

def show(arms: dict[str, list[dict]]):
    """Accuracy, where arms without reinforcement pass SEAL, and what the texts are like."""
    kept = ("facts covered, forward", "facts covered, reversed", "compression", "distinct lines")
    accuracy, passing, texts = [], [], []
    for arm, lines in arms.items():
        accuracy.append([arm, *over_seeds([line["accuracy"] for line in lines])])
        texts.append([arm])
        for name in kept:
            means = np.mean([line[name] for line in lines], axis=0)
            texts[-1].append(arrows([means[0], means[-1]], ".3g"))
        if "round" not in arm:
            passing.append([arm, *where_passed(KS, lines, arms.get(SEAL, []))])
    print_table(["", *KS], accuracy, "Accuracy, by the number k of self-edits")
    print_table(["", f"{SEAL}, at the same k", "one self-edit of it"], passing,
                "From which k on an arm passes")
    print_table(["", *kept], texts, f"One self-edit -> {KS[-1]} of them")


def draw(arms: dict[str, list[dict]], file):
    # The rounds of SEAL are grey to black; dashed if they teach themselves.
    greys = {"SEAL, round 1": "#bbb", "SEAL, round 2": "#777", SEAL: "#000",
             "round 3, own learner": "#000"}
    figure, axes = new_figure("self-edits of a town, learned together",
                              "held-out accuracy (95 % interval over seeds)", size=(7, 5.5))
    for i, (arm, lines) in enumerate(arms.items()):
        # Beside each other, not on top.
        x = np.array(KS) * 1.01 ** i
        error_bars(axes, x, [line["accuracy"] for line in lines], label=arm, color=greys.get(arm),
                   linestyle="--" if "own learner" in arm else "-")
    axes.set_xscale("log", base=2)
    axes.set_xticks(KS, map(str, KS))
    axes.set_ylim(0.4, 1.02)
    save(figure, file)


def main():
    ap = flags(__doc__)
    ap.add_argument("--towns", type=positive, default=12, help="held-out ones (default: 12)")
    answer(ap, Question(ARMS, measure, show, draw, settings=["towns"]))


if __name__ == "__main__":
    cli(main)
