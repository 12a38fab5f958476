"""Measure a model: its accuracy with and without adaptation, and how well the rule judges agree with GPT-4.1.

    python eval.py accuracy --model DIR_OR_HUB_ID --eval-data FILE     # none, passage only, self-edits; with error bars
    python eval.py judges FILE                                         # agreement and Cohen's kappa on released verdicts

`accuracy` takes the flags of outer_loop.py, adapts one adapter per passage (paper, Table 2, 'single passage'), and keeps what it did in
--run-dir (default runs/eval) like any run: read its rollouts.jsonl; the same command resumes it.
"""
import argparse
import sys

import numpy as np

from data.knowledge import JUDGES
from model import UserError, cli, read_json
from outer_loop import Run, bootstrap_ci, parse_args
from selfedit import SelfEdit

USAGE = "usage: python eval.py {accuracy,judges} ...  (-h after either explains)"


def accuracy(argv):
    """Print the accuracy of the model as it is, adapted on the passage alone, and on the passage with a self-edit."""
    cfg = parse_args(["--run-dir", "runs/eval", *argv], "Accuracy of a model on a data file, with and without adaptation.", ("model", "eval_data"))
    run = Run(cfg)
    tasks, model = run.tasks(cfg.eval_data)[:cfg.eval_tasks], run.load(0)
    without = run.unadapted(model, tasks)
    passage = [[SelfEdit("", [], task.context)] for task in tasks]
    rows = {"no adaptation": without,
            "passage only": run.rewards(model, tasks, passage, 0, "passage only", without, cfg.seeds),
            "passage and self-edit": run.rewards(model, tasks, run.sample(model, tasks, 0, "eval", 1), 0, "eval", without, cfg.seeds)}
    run.log(f"\n{len(tasks)} passages, {sum(len(t.questions) for t in tasks)} questions, {cfg.seeds} seeds each; accuracy and its gain [95 % CI over passages]")
    for name, values in rows.items():
        values = np.reshape(values, len(tasks))
        interval = lambda x: "{:.3f} [{:.3f}, {:.3f}]".format(x.mean(), *bootstrap_ci(x))
        run.log(f"{name:>22}  {interval(values)}" + (f"  gain {interval(values - without)}" if name != "no adaptation" else ""))


def agreement(a, b):
    """(share of equal verdicts, Cohen's kappa: the same beyond what chance would give)."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    observed = (a == b).mean()
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return observed, (observed - chance) / (1 - chance) if chance < 1 else 1.0


def judges(argv):
    """Print how far the rule judges agree with the released verdicts of GPT-4.1, method by method."""
    ap = argparse.ArgumentParser(description=judges.__doc__)
    ap.add_argument("file", help="JSON list of passages with 'released': {method: {answers: [{question, gold, baseline, baseline_ok, adapter, adapter_ok}]}}")
    records = read_json(ap.parse_args(argv).file)
    try:
        methods = {m: [(x["question"], x["gold"], x[arm], x[f"{arm}_ok"]) for r in records for x in r["released"][m]["answers"]
                       for arm in ("baseline", "adapter")] for m in records[0]["released"]}
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(f"not a file of released verdicts ({type(e).__name__}: {e})") from None
    methods["all"] = [x for rows in methods.values() for x in rows]
    print(f"{'answers of':>12} {'n':>6}  {'GPT-4.1':>8}" + "".join(f"  | {name:>10}: right  agrees  kappa" for name in JUDGES))
    for method, rows in methods.items():
        line = f"{method:>12} {len(rows):>6}  {np.mean([ok for *_, ok in rows]):8.3f}"
        for judge in JUDGES.values():
            verdicts = [bool(p.strip()) and judge(q, gold, p) for q, gold, p, _ in rows]
            line += "  | {:>17.3f}  {:6.3f}  {:5.3f}".format(np.mean(verdicts), *agreement(verdicts, [ok for *_, ok in rows]))
        print(line)


def main():
    commands = {"accuracy": accuracy, "judges": judges}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        raise UserError(USAGE)
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    cli(main)
