"""Half of the reward's cost: what are the self-edits worth that cheaper rewards choose?

    python -m lab.choosing --out FILE.jsonl [--released PASSAGES.json]

Self-edits of the untrained model, each tried with six seeds, and with half of the steps. What are
the two best of a town worth, by seeds that did not choose them? The rules are those of
lab/halving.py. 5 minutes per seed of the world, on one thread.

--released: the authors' verdicts, shared with SEAL's code: a list of passages with
"released_edits", each with "adapter_mean" and "adapter_std" of three seeds.
"""
import itertools
import tempfile
from dataclasses import dataclass, replace

import numpy as np

from files import cli, read_json
from lab.experiment import add_seeds, complete, flags, where
from lab.halving import RULES, Rung, race, start, trainer
from lab.show import over_passages, print_table
from outer_loop import next_tasks
from run import sample_edits
from selfedit import seed_for

SEEDS = 6       # three to choose by, three to judge by


def written(seed: int) -> tuple:
    """(run, model, tasks, edits): what the untrained model writes of the first round's tasks, with
    twice the usual K self-edits of each."""
    # Of the run's folder nothing is kept.
    with tempfile.TemporaryDirectory() as folder:
        run, train = start(seed, folder, times=2)
        tasks, model = next_tasks(train, 0, run.cfg.tasks), run.load(0)
        return run, model, tasks, sample_edits(run, model, tasks, 0, "train", run.cfg.edits)


def try_often(seed: int) -> dict:
    """A line: accuracies (tasks, K, seeds) of the untrained model's self-edits."""
    run, model, tasks, edits = written(seed)
    run_rung = trainer(run, model, tasks, edits, 0)
    pairs = list(itertools.product(range(run.cfg.tasks), range(run.cfg.edits)))
    found = {}
    for name, rung in (("whole", Rung(1, SEEDS)), ("half", Rung(1, 1, 1 / 2))):
        accuracies = np.reshape(run_rung(pairs, rung, 0), (len(tasks), run.cfg.edits, -1))
        found[name] = accuracies.round(4).tolist()
    return found


def released(file) -> np.ndarray:
    """(passages, K, 3): the accuracies of the authors' three seeds, from mean and deviation."""
    found = []
    for record in read_json(file):
        # All accuracies that three seeds can have on n questions.
        n = len(record["questions"])
        possible = np.array(list(itertools.combinations_with_replacement(range(n + 1), 3))) / n
        means, deviations = possible.mean(axis=1), possible.std(axis=1, ddof=1)
        rows = []
        for edit in record["released_edits"]:
            miss = abs(means - edit["adapter_mean"]) + abs(deviations - edit["adapter_std"])
            rows.append(possible[miss.argmin()])
        found.append(rows)
    return np.array(found)


@dataclass
class Tried:
    """Self-edits that were tried with many seeds, and how a choice among them is judged."""
    whole: np.ndarray   # (tasks, K, seeds): accuracies
    half: np.ndarray    # (tasks, K, seeds): the same after half of the training steps
    keep: int           # self-edits of a task that are chosen
    judges: int         # seeds that judge the choice, and do not choose

    def first(self, k: int) -> "Tried":
        """With k self-edits of each task alone."""
        return replace(self, whole=self.whole[:, :k], half=self.half[:, :k])


def worth(rungs: list[Rung], tried: Tried, draws=100) -> tuple[np.ndarray, float]:
    """(what the chosen are worth (tasks,), by seeds that did not choose; inner loops per task)."""
    n, k, seeds = tried.whole.shape
    rng, values = np.random.default_rng(seed_for("race") % 2 ** 32), np.zeros(n)
    for _ in range(draws):
        # Which seed comes first is by chance, for each self-edit anew. The last ones judge.
        mixed = rng.permuted(tried.whole, axis=2)

        def run_rung(pairs, rung, first):
            known = mixed if rung.steps == 1 else tried.half
            return [known[i, j, first:first + rung.seeds].tolist() for i, j in pairs]

        scores, loops = race(rungs, n, k, run_rung)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, :tried.keep]
        judged = mixed[:, :, seeds - tried.judges:].mean(axis=2)
        values += np.take_along_axis(judged, chosen, axis=1).mean(axis=1)
    return values / draws, loops / n


def show(title: str, tried: Tried, k: int, names, against: str):
    """What the choice of each rule is worth, with intervals over tasks. k: the usual K."""
    values, loops = {}, {}
    for name in names:
        times, rungs = RULES[name]
        values[name], loops[name] = worth(rungs, tried.first(times * k))
    rows = [["any", 0, f"{tried.whole.mean():.3f}", ""]]
    for name, value in values.items():
        # Task by task.
        more = over_passages(value - values[against], "+.3f")
        rows.append([name, f"{loops[name]:.1f}", f"{value.mean():.3f}", more])
    print_table(["rule", "inner loops per task", "worth of the chosen", f"against {against}"],
                rows, title)


def main():
    ap = flags(__doc__)
    add_seeds(ap)
    ap.add_argument("--released", metavar="FILE", help="passages with the authors' verdicts")
    args = ap.parse_args()
    wanted = [{"part": "choosing", "seed": seed} for seed in args.seeds]
    records = complete(ap, args, wanted, lambda line: try_often(line["seed"]))
    if args.released:
        whole = released(args.released)
        # Half of the steps were never tried.
        authors = Tried(whole, half=whole[:, :, :0], keep=1, judges=1)
        show(f"the authors' {len(whole)} passages, the best self-edit", authors, whole.shape[1],
             ("one seed", "two seeds", "one, one more for 1/2"), against="two seeds")
    lines = where(records, part="choosing")
    whole, half = [np.concatenate([line[name] for line in lines]) for name in ("whole", "half")]
    # There are twice the usual K self-edits.
    show(f"{len(whole)} towns, the two best self-edits", Tried(whole, half, keep=2, judges=3),
         whole.shape[1] // 2, RULES, against="three seeds")


if __name__ == "__main__":
    cli(main)
