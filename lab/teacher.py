"""Teacher and student: does a larger writer teach a smaller learner better than it does itself?

    python -m data.pretrain_tiny --dim 64 --out SMALL     # 8 minutes
    python -m lab.teacher --small SMALL --out FILE.jsonl [--svg FILE]

In SEAL the model that writes a self-edit is the model that learns it. The paper names teacher and
student as two models, and does not try it. Here ReST-EM trains a teacher on what taught a student
best, who never changes. Each is the tiny world's model, or one of half its width. What is written
of held-out towns is learned by both. 1.5 minutes for an arm and a seed, on one thread.
"""
import tempfile

import numpy as np

from lab.experiment import Question, add_seeds, flags
from lab.show import error_bars, new_figure, of_seeds, over_seeds, print_table, save
from outer_loop import in_order, m_step, next_tasks, sample, score, select
from support.config import PRESETS, Config
from support.files import cli
from support.run import Run

# arm -> (who writes, who learns what is to be rewarded); in SEAL the writer, as it is by then
ARMS = {"small teaches itself (SEAL)": ("small", "itself"),
        "small teaches small": ("small", "small"),
        "large teaches small": ("large", "small"),
        "small teaches large": ("small", "large"),
        "large teaches large": ("large", "large"),
        "large teaches itself (SEAL)": ("large", "itself")}


# ------------------------------------------------------------------------------- models that learn

def students(small, seed: int, split: str, folder) -> dict:
    """{"small" or "large": (a run of the tiny preset by this model, the model)}.

    small: a checkpoint of the small one. split: of held-out towns. folder: for the runs."""
    found = {}
    for size, model in (("small", small), ("large", PRESETS["tiny"]["model"])):
        own = {"model": model, "seed": seed, "eval_data": split, "run_dir": f"{folder}/{size}"}
        run = Run(Config(**PRESETS["tiny"] | own))
        found[size] = run, run.read_model(model)
    return found


def worth(learners: dict, who: str, tasks, edits, t: int, split: str) -> list[list[float]]:
    """The reward of every self-edit of round t, learned by one of these with its own tokenizer."""
    run, model = learners[who]
    without = [0.0] * len(tasks)
    return score(run, model, tasks, edits, t, split, without, run.cfg.seeds, arm=who)


def learn(arm: str, seed: int, split: str, small: str) -> dict:
    """A line: {who learns: what the teacher's held-out self-edits are worth to it, by round}."""
    writer, learner = ARMS[arm]
    with tempfile.TemporaryDirectory() as folder:       # of which only the line is kept
        learners = students(small, seed, split, folder)
        run, _ = learners[writer]
        cfg = run.cfg
        train = in_order(run.tasks(cfg.train_data), seed)
        held_out = run.tasks(split)[:cfg.eval_tasks]
        found = {who: [] for who in dict.fromkeys(("small", "large", learner))}
        for t in range(cfg.iterations + 1):
            teacher = run.load(t)
            learners["itself"] = run, teacher
            edits = sample(run, teacher, held_out, t, "eval", cfg.eval_edits)
            for who, values in found.items():
                values.append(float(np.mean(worth(learners, who, held_out, edits, t, "eval"))))
            if t == cfg.iterations:
                return {"reward": found}
            # As outer_loop.rest_em, but for the model that learns.
            tasks = next_tasks(train, t, cfg.tasks)
            edits = sample(run, teacher, tasks, t, "train", cfg.edits)
            rewards = worth(learners, learner, tasks, edits, t, "train")
            kept = select(cfg, rewards, edits, [0.0] * cfg.tasks, t)
            m_step(cfg, run, teacher, [(tasks[i], edits[i][j], 1.0) for i, j in kept], t)
            run.save(t + 1, teacher)


def show(arms: dict[str, list[dict]]):
    """What each student learns of what each teacher writes, with intervals over seeds."""
    rows = []
    for arm, lines in arms.items():
        for who in lines[0]["reward"]:
            rewards = [line["reward"][who] for line in lines]
            # What SEAL gives to a model of the student's size, with the same seed.
            size = ARMS[arm][0] if who == "itself" else who
            seal = arms.get(f"{size} teaches itself (SEAL)", [])
            known = {line["seed"]: line["reward"]["itself"][-1] for line in seal}
            more = [line["reward"][who][-1] - known[line["seed"]] for line in lines
                    if line["seed"] in known]
            rows.append([arm, who, *over_seeds(rewards), of_seeds(more, "+.3f")])
    rounds = [f"round {t}" for t in range(len(rewards[0]))]
    print_table(["who teaches whom", "learned by", *rounds, "last, against SEAL"], rows)


def draw(arms: dict[str, list[dict]], file):
    """What the small student learns, or in SEAL the small teacher."""
    figure, axes = new_figure("round", "learned by the small one (95 % interval over seeds)")
    for arm, lines in arms.items():
        who = "itself" if ARMS[arm] == ("small", "itself") else "small"
        rewards = [line["reward"][who] for line in lines]
        error_bars(axes, [str(t) for t in range(len(rewards[0]))], rewards, label=arm)
    save(figure, file)


def main():
    ap = flags(__doc__)
    add_seeds(ap)
    ap.add_argument("--small", required=True, help="folder of the small model")
    ap.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    ap.add_argument("--towns", choices=("eval", "tune"), default="eval", help="default: eval")
    args = ap.parse_args()

    def measure(arm, seed, split):
        return learn(arm, seed, split, args.small)

    Question(ARMS, measure, show, draw, ["towns"]).answer(ap, args, args.seeds)


if __name__ == "__main__":
    cli(main)
