"""Measure a model: accuracy with and without adaptation; and how far to trust the rule judges.

    python eval.py accuracy --model DIR_OR_HUB_ID --eval-data FILE
    python eval.py judges FILE                     # agreement with GPT-4.1 on released verdicts

`accuracy` takes outer_loop.py's flags and trains an adapter per passage (the paper's Table 2,
single passage): on nothing, the passage, a self-edit too. What it did is kept in --run-dir like any
run: read its rollouts.jsonl; the same command resumes it.
"""
import argparse
import sys

import numpy as np

from data.knowledge import JUDGES
from model import UserError, cli, read_json
from outer_loop import Run, bootstrap_ci, parse_args
from selfedit import SelfEdit


def accuracy(argv):
    """Print accuracy without adaptation, on the passage alone, and with a self-edit too."""
    cfg = parse_args(["--run-dir", "runs/eval", *argv], accuracy.__doc__, ("model", "eval_data"))
    run = Run(cfg)
    tasks, model = run.tasks(cfg.eval_data)[:cfg.eval_tasks], run.load(0)
    without = run.unadapted(model, tasks)
    arms = {"passage only": [[SelfEdit("", [], task.context)] for task in tasks],
            "passage and self-edit": run.sample(model, tasks, 0, "eval", 1)}
    rows = {"no adaptation": without} | {
        name: run.rewards(model, tasks, edits, 0, name, without, cfg.seeds)
        for name, edits in arms.items()}
    questions = sum(len(task.questions) for task in tasks)
    run.log(f"\n{len(tasks)} passages, {questions} questions, {cfg.seeds} seeds; "
            "accuracy and gain, the mean over passages [95 % CI]")
    interval = lambda x: "{:.3f} [{:.3f}, {:.3f}]".format(x.mean(), *bootstrap_ci(x))
    for name, values in rows.items():
        values = np.reshape(values, len(tasks))
        gain = "" if name == "no adaptation" else f"  gain {interval(values - without)}"
        run.log(f"{name:>22}  {interval(values)}{gain}")


def agreement(a, b):
    """(share of equal verdicts, Cohen's kappa: how far that is beyond chance)."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    observed = (a == b).mean()
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return observed, (observed - chance) / (1 - chance) if chance < 1 else 1.0


def judges(argv):
    """Print how far the rule judges agree with the released verdicts of GPT-4.1, by method."""
    ap = argparse.ArgumentParser(description=judges.__doc__)
    ap.add_argument("file", help="JSON list of passages, each with released: {method: {answers: "
                    "[{question, gold, baseline, baseline_ok, adapter, adapter_ok}]}}")
    file = ap.parse_args(argv).file
    records = read_json(file)
    try:
        methods = {method: [(x["question"], x["gold"], x[arm], x[f"{arm}_ok"])
                            for r in records for x in r["released"][method]["answers"]
                            for arm in ("baseline", "adapter")]
                   for method in records[0]["released"]}
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(f"{file}: no released verdicts ({type(e).__name__}: {e})") from None
    methods["all"] = [x for rows in methods.values() for x in rows]
    print(f"{'answers of':>12} {'n':>6} {'GPT-4.1':>8}"
          + "".join(f" | {name:>10} says right, agrees, kappa" for name in JUDGES))
    for method, rows in methods.items():
        gpt = [ok for *_, ok in rows]
        line = f"{method:>12} {len(rows):>6} {np.mean(gpt):8.3f}"
        for judge in JUDGES.values():
            ours = [bool(p.strip()) and judge(q, gold, p) for q, gold, p, _ in rows]
            line += " | {:>21.3f}  {:6.3f}  {:5.3f}".format(np.mean(ours), *agreement(ours, gpt))
        print(line)


def main():
    commands = {"accuracy": accuracy, "judges": judges}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        raise UserError("usage: python eval.py {accuracy,judges} ... (-h after either explains)")
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    cli(main)
