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

import numpy as np

from lab.experiment import add_seeds, complete, flags, where
from lab.halving import RULES, Rung, start, trainer
from lab.judged import Tried, released, worth
from lab.show import over_passages, print_table
from outer_loop import next_tasks
from outer_loop import sample
from support.files import cli

SEEDS = 6       # three to choose by, three to judge by


def written(seed: int) -> tuple:
    """(run, model, tasks, edits): what the untrained model writes of the first round's tasks, with
    twice the usual K self-edits of each."""
    # Of the run's folder nothing is kept.
    with tempfile.TemporaryDirectory() as folder:
        run, train = start(seed, folder, times=2)
        tasks, model = next_tasks(train, 0, run.cfg.tasks), run.load(0)
        return run, model, tasks, sample(run, model, tasks, 0, "train", run.cfg.edits)


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
