"""Teacher and student: does a larger writer teach a smaller learner better than it does itself?

    python -m data.pretrain_tiny --dim 64 --out SMALL     # 8 minutes
    python -m lab.teacher --small SMALL --out FILE.jsonl [--svg FILE]

In SEAL the model that writes a self-edit is the model that learns it. The paper names teacher and
student as two models, and does not try it. Here ReST-EM trains a teacher on what taught a student
best, who never changes. Each is the tiny world's model, or one of half its width. Whatever is
written of held-out towns is learned by both. 2 minutes for an arm and a seed, on one thread.
"""
import tempfile
from functools import partial

import numpy as np

from config import PRESETS, Config
from files import cli
from lab.experiment import Question, add_seeds, flags
from lab.show import error_bars, new_figure, of_seeds, over_seeds, print_table, save
from outer_loop import in_order, m_step, next_tasks, select
from run import Run, sample_edits, score_edits

# arm -> (who writes, who learns what is to be rewarded); in SEAL the writer, as it is by then
ARMS = {"small teaches itself (SEAL)": ("small", "itself"),
        "small teaches small": ("small", "small"),
        "large teaches small": ("large", "small"),
        "small teaches large": ("small", "large"),
        "large teaches large": ("large", "large"),
        "large teaches itself (SEAL)": ("large", "itself")}


def learn(arm: str, seed: int, split: str, small: str) -> dict:
    """A line: {who learns: what the teacher's held-out self-edits are worth to it, by round}."""
    writer, learner = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:       # of which only the line is kept
        runs, students = {}, {}
        for size, model in (("small", small), ("large", PRESETS["tiny"]["model"])):
            runs[size] = Run(Config(**PRESETS["tiny"] | {
                "model": model, "seed": seed, "eval_data": split, "run_dir": f"{folder}/{size}"}))
            students[size] = runs[size].read_model(model)
        run, cfg = runs[writer], runs[writer].cfg
        train = in_order(run.tasks(cfg.train_data), seed)
        held_out = run.tasks(split)[:cfg.eval_tasks]

        def worth_to(who, tasks, edits, t, name):
            # Each student has a tokenizer of its own.
            of, student = (run, teacher) if who == "itself" else (runs[who], students[who])
            without = [0.0] * len(tasks)
            return score_edits(of, student, tasks, edits, t, name, without, cfg.seeds, arm=who)

        found = {who: [] for who in dict.fromkeys(("small", "large", learner))}
        for t in range(cfg.iterations + 1):
            teacher = run.load(t)
            edits = sample_edits(run, teacher, held_out, t, "eval", cfg.eval_edits)
            for who in found:
                found[who].append(float(np.mean(worth_to(who, held_out, edits, t, "eval"))))
            if t == cfg.iterations:
                return {"reward": found}
            # As outer_loop.rest_em, but for the model that learns.
            tasks = next_tasks(train, t, cfg.tasks)
            edits = sample_edits(run, teacher, tasks, t, "train", cfg.edits)
            scores = worth_to(learner, tasks, edits, t, "train")
            kept = select(cfg, scores, edits, [0.0] * cfg.tasks, t)
            m_step(cfg, run, teacher, [(tasks[i], edits[i][j], 1.0) for i, j in kept], t)
            run.save(t + 1, teacher)


def show(arms: dict[str, list[dict]]):
    """What each student learns of what each teacher writes, by round, with intervals over seeds."""
    rows = []
    for arm, lines in arms.items():
        for who in lines[0]["reward"]:
            rewards = np.array([line["reward"][who] for line in lines])
            gains = of_seeds(rewards[:, -1] - rewards[:, 0], "+.3f")
            rows.append([arm, who, *over_seeds(rewards), gains])
    rounds = [f"round {t}" for t in range(rewards.shape[1])]
    print_table(["who teaches whom", "learned by", *rounds, "gain"], rows)


def draw(arms: dict[str, list[dict]], file):
    figure, axes = new_figure("round", "learned by the small one (95 % interval over seeds)")
    for arm, lines in arms.items():
        rewards = [line["reward"]["small"] for line in lines]
        error_bars(axes, range(len(rewards[0])), rewards, label=arm)
    save(figure, file)


def main():
    ap = flags(__doc__)
    add_seeds(ap)
    ap.add_argument("--small", required=True, help="folder of the small model")
    ap.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    ap.add_argument("--towns", choices=("eval", "tune"), default="eval", help="default: eval")
    args = ap.parse_args()
    question = Question(ARMS, partial(learn, small=args.small), show, draw, ["towns"])
    question.answer(ap, args, args.seeds)


if __name__ == "__main__":
    cli(main)
