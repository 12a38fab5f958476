"""The speedrun: how long until a model of the tiny world has learned to write self-edits?

    python -m lab.speedrun --name "two rounds" --out speedrun.jsonl --iterations 2 --outer-lr 4e-3

An entry is the flags of outer_loop.py that it needs. Its time is the median of seeds 0 to 4, one
after the other: from the start to the evaluation that shows a held-out reward of .75, imports
aside. Whatever teaches the writer may be changed, and nothing else. The same command resumes.
"""
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from lab.experiment import complete, parser, print_table
from support.config import add_flags
from support.files import Lines, UserError, cli

ROOT = Path(__file__).parent.parent
GOAL, SEEDS = 0.75, range(5)
# What an entry may not change: the task, how a self-edit is learned, and what a run is called.
FIXED = ("--preset", "--model", "--domain", "--train-data", "--eval", "--inner", "--max-",
         "--directives", "--pad-to", "--stop", "--clip", "--weight-decay", "--temperature",
         "--top-p", "--seed=", "--run-dir", "--baselines")


def measure(flags: list[str], seed: int) -> dict:
    """The rest of a line: the held-out rewards of an ordinary run, and the seconds at which they
    were known."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True,
                            capture_output=True).stdout.strip() or "unknown"
    threads = os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        command = ["outer_loop.py", *flags, "--no-baselines", "--seed", str(seed)]
        # In a process of its own, as a user's run is.
        subprocess.run([sys.executable, *command, "--run-dir", folder], cwd=ROOT, check=True)
        metrics = Lines(Path(folder) / "metrics.jsonl", repair=False).records
    return {"date": str(date.today()), "commit": commit,
            "machine": f"{platform.processor() or platform.machine()}, {threads} threads",
            "reward": [m["eval_reward"] for m in metrics],
            "seconds": [m["seconds"] for m in metrics]}


def time_to_goal(record: dict) -> float:
    """Seconds until the goal; infinite if the run never reached it."""
    measured = zip(record["reward"], record["seconds"])
    return min([seconds for reward, seconds in measured if reward >= GOAL], default=float("inf"))


def table(records):
    """Every entry, the fastest first, as Markdown."""
    entries = {}
    for r in records:
        # An entry with other flags is another one, even by the same name.
        entries.setdefault((r["name"], r["machine"], *r["flags"]), []).append(r)
    rows = []
    for (name, where, *_), runs in entries.items():
        times = [time_to_goal(r) for r in runs]
        reached = sum(t < float("inf") for t in times)
        last = statistics.mean(r["reward"][-1] for r in runs)
        made = ", ".join([runs[0]["date"], runs[0]["commit"], where])
        rows.append((statistics.median(times), name, " ".join(runs[0]["flags"]) or "none",
                     f"{reached} of {len(runs)}", f"{last:.3f}", made))
    rows = [[f"{median:.0f}", *cells] for median, *cells in sorted(rows)]
    print_table([f"s to {GOAL}, median", "entry", "flags", "reached by", "last reward, mean",
                 "date, commit, machine"], rows)


def main():
    ap = parser(__doc__)
    ap.add_argument("--name", required=True, help="what the entry is called")
    ap.add_argument("--out", required=True, help="JSON lines, one per seed of each entry")
    args, flags = ap.parse_known_args()
    # The others must be flags of outer_loop.py: here they are only checked.
    add_flags(ap)
    ap.parse_args()
    for word in flags:
        if word.startswith(FIXED) or word == "--seed":
            raise UserError(f"{word}: an entry may not change this")
    wanted = [{"name": args.name, "flags": flags, "seed": seed} for seed in SEEDS]
    table(complete(ap, args, wanted, lambda line: measure(flags, line["seed"])))


if __name__ == "__main__":
    cli(main)
