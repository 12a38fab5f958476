"""Half of the reward's cost: does SEAL learn as much from cheaper rewards?

    python -m lab.race --out FILE.jsonl [--svg FILE]

ReST-EM in the tiny world, with its rewards from a race (lab/choosing.py), or from products of
gradients and no inner loop (lab/proxy.py). lab/choosing.py and lab/proxy.py ask what a single
choice is worth. 2 to 8 minutes for a rule and a seed, on one thread.
"""
import tempfile

import numpy as np

from lab.choosing import RULES, race, start, trainer
from lab.experiment import Question, add_seeds, differences, flags, gain, last_reward
from lab.proxy import products
from lab.show import arrows, error_bars, new_figure, of_seeds, print_table, save
from outer_loop import evaluate, m_step, next_tasks, select
from outer_loop import sample
from support.files import cli

USUAL = "three seeds"
PRODUCT = "inner product of gradients"


def rewards(rule: str, run, model, tasks, edits, t: int) -> tuple[np.ndarray, float]:
    """(scores (tasks, K), inner loops that they took)."""
    if rule == PRODUCT:
        rows = []
        for task, row in zip(tasks, edits):
            rows.append([product for product, _ in products(model, run.tok, task, row)])
        return np.array(rows), 0.0
    _, rungs = RULES[rule]
    return race(rungs, len(tasks), len(edits[0]), trainer(run, model, tasks, edits, t))


def learn(rule: str, seed: int) -> dict:
    """A line: outer_loop.rest_em with other rewards."""
    # How many times the usual number of self-edits.
    times = 1 if rule == PRODUCT else RULES[rule][0]
    loops = 0.0
    with tempfile.TemporaryDirectory() as folder:       # of which only the line is kept
        run, train = start(seed, folder, times)
        cfg = run.cfg
        held_out = run.tasks(cfg.eval_data)[:cfg.eval_tasks]
        for t in range(cfg.iterations):
            model = run.load(t)
            evaluate(cfg, run, model, held_out, t)
            # E-step, in which outer_loop.score would give all self-edits as many seeds.
            tasks = next_tasks(train, t, cfg.tasks)
            edits = sample(run, model, tasks, t, "train", cfg.edits)
            scores, taken = rewards(rule, run, model, tasks, edits, t)
            loops += taken
            # M-step. Who dropped out of the race is below all others, and is not kept.
            kept = select(cfg, scores.tolist(), edits, [0.0] * cfg.tasks, t)
            m_step(cfg, run, model, [(tasks[i], edits[i][j], 1.0) for i, j in kept], t)
            run.save(t + 1, model)
        evaluate(cfg, run, run.load(cfg.iterations), held_out, cfg.iterations)
        return {"inner loops": loops, "reward": [m["eval_reward"] for m in run.metrics.records]}


def show(rules: dict[str, list[dict]]):
    """Held-out rewards, with intervals over seeds, and differences seed by seed."""
    rows = []
    for rule, lines in rules.items():
        more = differences(lines, rules.get(USUAL, []), last_reward)
        loops = np.mean([line["inner loops"] for line in lines])
        rewards = np.mean([line["reward"] for line in lines], axis=0)
        gains = [gain(line) for line in lines]
        rows.append([rule, f"{loops:.0f}", arrows(rewards), of_seeds(gains, "+.3f"),
                     of_seeds(more, "+.3f")])
    print_table(["rewards", "inner loops", "held-out reward, by round", "gain",
                 f"last round, against {USUAL}"], rows)


def draw(rules: dict[str, list[dict]], file):
    """The gain of each rule over its cost: a point per seed, the mean and its interval."""
    figure, axes = new_figure("inner loops of a run",
                              "gain of held-out reward (95 % interval over seeds)")
    for rule, lines in rules.items():
        loops = [line["inner loops"] for line in lines]
        gains = [[gain(line)] for line in lines]
        axes.plot(loops, gains, ".", color="#bbb")
        error_bars(axes, [np.mean(loops)], gains, label=rule)
    axes.set_xlim(left=0)
    save(figure, file)


def main():
    ap = flags(__doc__)
    add_seeds(ap)
    ap.add_argument("--rules", nargs="+", choices=[*RULES, PRODUCT], metavar="RULE",
                    default=[USUAL, "one seed"],
                    help=f"of lab/choosing.py, or {PRODUCT!r} (default: three seeds, one seed)")
    args = ap.parse_args()
    Question([*RULES, PRODUCT], learn, show, draw, kind="rule",
             part={"part": "learning"}).answer(ap, args, args.seeds)


if __name__ == "__main__":
    cli(main)
