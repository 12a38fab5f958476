"""Does a product of gradients rank the self-edits of a real model, too?

    python -m lab.proxy_run RUN_DIR --out FILE.jsonl [--model DIR] [--data FILE]

RUN_DIR: a run of outer_loop.py about passages, with --seeds 2 or more. The self-edits of its first
round have rewards; here they get the scores of lab/proxy.py as well, at the weights before any
training. --model and --data: where the run's model and passages are now. A line per passage, 4 s a
self-edit for a model of 135 M parameters, on one thread.
"""
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from lab.experiment import complete, flags
from lab.proxy import correlation, others, worth
from lab.proxy import products
from lab.reliability import accuracy_of, read_groups
from lab.show import over_passages, print_table
from outer_loop import in_order, next_tasks
from selfedit import read_self_edit
from support.config import Config
from support.files import cli, read_json
from support.run import Run


def measure(run: Run, model, task, rollouts: list[dict]) -> dict:
    """A line: scores of the self-edits of a passage, and their accuracy with each seed."""
    edits = [read_self_edit(task, r["text"], r["token_ids"]) for r in rollouts]
    found = products(model, run.tok, task, edits, run.recipe)
    return {"accuracy": accuracy_of(rollouts).round(4).tolist(),
            "product": [round(product, 5) for product, _ in found],
            "cosine": [round(cosine, 5) for _, cosine in found],
            "documents": [r["documents"] for r in rollouts],
            "tokens": [len(r["token_ids"]) for r in rollouts]}


def show(lines):
    """How each score ranks the self-edits of a passage, and what its choice is worth."""
    whole = np.array([line["accuracy"] for line in lines])          # (passages, K, seeds)
    judges = others(whole)
    scores = {"an inner loop (SEAL)": whole}
    for name in ("product", "cosine"):
        scores[name] = np.array([line[name] for line in lines])[:, :, None]
    for name in ("documents", "tokens"):
        scores[f"few {name}"] = -np.array([line[name] for line in lines])[:, :, None]
    k = whole.shape[1]
    rows = [["any", "", over_passages(whole.mean(axis=(1, 2)))]]
    for name, values in scores.items():
        rows.append([name, over_passages(correlation(values, judges), ".2f"),
                     over_passages(worth(values, judges, k, keep=1))])
    print_table(["who chooses", "rank correlation within a passage", f"worth, best of {k}"], rows,
                f"{len(lines)} passages")


def main():
    ap = flags(__doc__)
    ap.add_argument("run", metavar="RUN_DIR")
    ap.add_argument("--model", help="the run's model (default: where it was)")
    ap.add_argument("--data", help="the passages that it learned from (default: where they were)")
    ap.add_argument("--dtype", help="of the weights (default: as in the run)")
    args = ap.parse_args()
    settings = read_json(Path(args.run) / "config.json")
    own = {field.name: settings[field.name] for field in fields(Config) if field.name in settings}
    moved = {"model": args.model, "train_data": args.data, "dtype": args.dtype}
    own |= {name: value for name, value in moved.items() if value}
    groups = read_groups(args.run)
    first = [group for group in groups if group[0]["iteration"] == 0]
    # The run itself is only read.
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Config(**own | {"run_dir": folder, "device": "cpu"}))
        train = in_order(run.tasks(run.cfg.train_data), run.cfg.seed)
        tasks = next_tasks(train, 0, run.cfg.tasks)
        model = run.load(0)
        by_task = {group[0]["task"]: group for group in first}

        def measure_one(line):
            i = line["task"]
            return measure(run, model, tasks[i], by_task[i])

        show(complete(ap, args, [{"task": i} for i in sorted(by_task)], measure_one))


if __name__ == "__main__":
    cli(main)
