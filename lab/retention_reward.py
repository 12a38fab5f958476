"""Can SEAL learn not to forget? ReST-EM with a reward that counts what a self-edit destroys.

    python -m lab.retention_reward --out FILE.jsonl [--svg FILE]

reward = accuracy on its town - lambda * (accuracy on earlier towns, before - after)

The paper suggests it (section 5). A round is one of outer_loop.py (--preset tiny), but for this:
the model on which self-edits are tried is a copy of the policy that has first learned 8 other
towns, from all true notes about them at once. So there is something to lose in every round, which
M-steps do not touch. Each self-edit is asked about its own town and these eight, under the same
adapter. lambda 0 is SEAL. About 4 minutes for a lambda and a seed on one thread.
"""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from data import tinyworld
from lab.experiment import Question, add_seeds, flags
from lab.lost import begin_round
from lab.show import made_of, new_figure, over_seeds, print_table, save
from lab.tiny import TINY, load
from outer_loop import in_order, m_step, next_tasks, select
from support.files import cli, positive
from support.progress import Meter
from support.stats import mean_ci

ROUNDS = 3
EARLIER = 8     # towns learned before


def run_arm(weight: float, seed: int, n_train: int, n_eval: int) -> dict:
    """A line: ReST-EM with this lambda. Each value is a list over rounds, from 0, the untrained."""
    cfg = replace(TINY, seed=seed)
    policy, tok = load(0)
    # The earlier towns are none of those that the rounds learn from.
    train = in_order(tinyworld.load("train"), seed)
    earlier, train = train[-EARLIER:], train[:-EARLIER]
    held_out = tinyworld.load("eval")[:n_eval]

    record = {"learned": [], "lost": [], "known": [], "tokens": [], "made of": []}
    for t in range(ROUNDS + 1):
        this = begin_round(cfg, policy, tok, earlier, t)
        for name, value in this.of_policy(held_out).items():
            record[name].append(value)
        if t == ROUNDS:
            return record

        # E-step and M-step, as in outer_loop.rest_em, but for the reward.
        tasks = next_tasks(train, t, n_train)
        edits, found = this.try_edits(tasks, "train", cfg.edits)
        rewards = found[..., 0] - weight * found[..., 1]
        kept = select(cfg, rewards.tolist(), edits, [0.0] * len(tasks), t)
        learned = [(tasks[i], edits[i][j], 1.0) for i, j in kept]
        # Of a run the M-step needs no more than this.
        quiet_run = SimpleNamespace(tok=tok, log=lambda line: None, meter=Meter)
        m_step(cfg, quiet_run, policy, learned, t)


# ------------------------------------------------------------------------------- what came out

def show(arms: dict[float, list[dict]]):
    """A row per lambda, before and after training, with intervals over seeds."""
    rows = []
    for weight, lines in arms.items():
        for t in (0, len(lines[0]["learned"]) - 1):
            values = []
            for line in lines:
                learned, lost = line["learned"][t], line["lost"][t]
                values.append([learned, lost, learned - lost])
            shares = [line["made of"][t] for line in lines]
            rows.append([f"{weight:g}", t, *over_seeds(values), made_of(shares)])
    print_table(["lambda", "round", "learned", "lost", "learned - lost", "made of"], rows)


def draw(arms: dict[float, list[dict]], file):
    """Learned against lost: a path over the rounds for each lambda."""
    figure, axes = new_figure("lost: fall in accuracy on the earlier towns",
                              "learned: held-out accuracy on the new town")
    for weight, lines in arms.items():
        x, x_half = mean_ci([line["lost"] for line in lines])
        y, y_half = mean_ci([line["learned"] for line in lines])
        axes.errorbar(x, y, np.nan_to_num(y_half), np.nan_to_num(x_half), marker="o", capsize=2,
                      label=f"lambda {weight:g}, {len(lines)} seeds")
    save(figure, file)


def main():
    ap = flags(__doc__)
    add_seeds(ap)
    ap.add_argument("--lambdas", type=float, nargs="+", default=[0, .5, 1, 2])
    ap.add_argument("--tasks", type=positive, default=12, help="towns a round (default: 12)")
    ap.add_argument("--eval-tasks", type=positive, default=24, help="held-out ones (default: 24)")
    args = ap.parse_args()

    question = Question((), run_arm, show, draw, ["tasks", "eval_tasks"], kind="lambda")
    question.answer(ap, args, args.seeds)


if __name__ == "__main__":
    cli(main)
