"""A reward for one backward pass: can a self-edit be judged without an inner loop?

    python -m lab.proxy --out FILE.jsonl [--svg FILE]

SEAL's reward costs ten optimiser steps and the answers to all questions. Do the scores of
lab/scores.py choose as well? The judges are the six inner loops that lab/choosing.py gives to each
of 16 self-edits of a town, by the untrained model. If its lines are in --out, they are not measured
again, which spares 5 of the 7 minutes per seed, on one thread.
"""
from lab.choosers import COSTS, LOOP, choosers
from lab.choosing import try_often, written
from lab.experiment import complete, each, flags
from lab.ranking import KEEP, correlation, worth
from lab.scores import SCORES, score
from lab.show import new_figure, over_passages, print_table, save
from selfedit import seed_for
from support.files import cli
from support.stats import bootstrap_ci


def measure(seed: int) -> dict:
    """A line: scores (towns, K) of the self-edits that try_often tries."""
    run, model, tasks, edits = written(seed)
    scores = {name: [] for name in SCORES}
    for i, task in enumerate(tasks):
        # Other seeds than those of the inner loops that judge.
        seeds = [seed_for(seed, "proxy", i, j) for j in range(len(edits[i]))]
        rows = score(model, run.tok, task, edits[i], seeds)
        for name, values in scores.items():
            values.append([round(row[name], 5) for row in rows])
    return {"scores": scores}


def show(found, judges):
    """What a choice among the usual K and among twice as many is worth, over towns."""
    towns, twice, _ = judges.shape
    k = twice // 2
    usual = worth(found[LOOP], judges, k)
    rows = [["any", "none", "", f"{judges.mean():.3f}", "", ""]]
    for name, scores in found.items():
        few = worth(scores, judges, k)
        many = worth(scores, judges, twice)
        alike = over_passages(correlation(scores, judges), ".2f")
        # Town by town.
        more = "" if name == LOOP else over_passages(few - usual, "+.3f")
        rows.append([name, COSTS[name], alike, f"{few.mean():.3f}", more, f"{many.mean():.3f}"])
    head = ["who chooses", "cost", "rank correlation", f"worth, {KEEP} of {k}",
            "against an inner loop", f"worth, {KEEP} of {twice}"]
    print_table(head, rows, f"{towns} towns, {twice} self-edits each")


def draw(found, judges, file):
    """What a choice among the usual K is worth."""
    figure, axes = new_figure("reward of the chosen (95 % interval over towns)", "", (7, 3.5))
    k = judges.shape[1] // 2
    for y, scores in enumerate(found.values()):
        values = worth(scores, judges, k)
        axes.plot(bootstrap_ci(values), [y, y], color="#1f77b4")
        axes.plot(values.mean(), y, "o", color="#1f77b4")
    axes.axvline(judges.mean(), color="#777", linestyle="--", label="any")
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    save(figure, file)


def main():
    ap = flags(__doc__)
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = ap.parse_args()
    parts = {"choosing": try_often, "scores": measure}

    def measure_one(line):
        return parts[line["part"]](line["seed"])

    records = complete(ap, args, each("part", parts, args.seeds), measure_one)
    found, judges = choosers(records)
    show(found, judges)
    if args.svg:
        draw(found, judges, args.svg)


if __name__ == "__main__":
    cli(main)
