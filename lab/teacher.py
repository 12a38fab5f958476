"""Teacher and student: does a larger writer teach a smaller learner better than it does itself?

    python -m data.pretrain_tiny --dim 64 --out SMALL     # 8 minutes
    python -m lab.teacher --small SMALL --out FILE.jsonl

In SEAL the model that writes a self-edit learns it. Here ReST-EM trains a teacher on what taught a
student best, who never changes. Each is the tiny world's model, or one of half its width. What is
written of held-out towns is learned by both. 1.5 minutes for an arm and a seed.
"""
import tempfile

import numpy as np

from data.tasks import load_tasks
from lab.experiment import Question, differences, of_seeds, over_seeds, print_table
from lab.tiny import one_round, start
from outer_loop import sample, score
from support.config import PRESETS
from support.files import cli

# arm -> (who writes, who learns what is to be rewarded); in SEAL the writer, as it is by then
ARMS = {"small teaches itself (SEAL)": ("small", "itself"),
        "small teaches small": ("small", "small"),
        "large teaches small": ("large", "small"),
        "small teaches large": ("small", "large"),
        "large teaches large": ("large", "large"),
        "large teaches itself (SEAL)": ("large", "itself")}


def learn(arm: str, seed: int, small: str) -> dict:
    """A line: {who learns: what the teacher's held-out self-edits are worth to it, by round}.

    small: a checkpoint of the small model."""
    writer, learner = ARMS[arm]
    preset = PRESETS["tiny"]
    towns, learners = {}, {}    # who learns -> (a run of the preset by this model, the model)
    with tempfile.TemporaryDirectory() as folder:       # of which only the line is kept
        for size, model in (("small", small), ("large", preset["model"])):
            run, towns[size] = start(f"{folder}/{size}", seed, **preset | {"model": model})
            learners[size] = run, run.read_model(model)

        def worth(who, tasks, edits, t, part):
            """The reward of every self-edit, learned by one of these with its own tokenizer."""
            run, model = learners[who]
            without = [0.0] * len(tasks)
            return score(run, model, tasks, edits, t, part, without, run.cfg.seeds, arm=who)

        run, _ = learners[writer]
        held_out = load_tasks(run, run.cfg.eval_data)[:run.cfg.eval_tasks]
        found = {who: [] for who in dict.fromkeys(("small", "large", learner))}
        for t in range(run.cfg.iterations + 1):
            teacher = run.load(t)
            learners["itself"] = run, teacher
            edits = sample(run, teacher, held_out, t, "eval", run.cfg.eval_edits)
            for who, values in found.items():
                values.append(float(np.mean(worth(who, held_out, edits, t, "eval"))))
            if t < run.cfg.iterations:
                one_round(run, teacher, towns[writer], t,
                          lambda tasks, edits: worth(learner, tasks, edits, t, "train"))
        return {"reward": found}


def show(arms: dict[str, list[dict]]):
    """What each student learns of what each teacher writes, with intervals over seeds."""
    rows = []
    for arm, lines in arms.items():
        for who in lines[0]["reward"]:
            rewards = [line["reward"][who] for line in lines]
            # What SEAL gives to a model of the student's size, with the same seed.
            size = ARMS[arm][0] if who == "itself" else who
            seal = arms.get(f"{size} teaches itself (SEAL)", [])
            more = differences(lines, seal, lambda line: line["reward"][who][-1],
                               lambda line: line["reward"]["itself"][-1])
            rows.append([arm, who, *over_seeds(rewards), of_seeds(more, "+.3f")])
    rounds = [f"round {t}" for t in range(len(rewards[0]))]
    print_table(["who teaches whom", "learned by", *rounds, "last, against SEAL"], rows)


def main():
    question = Question(ARMS, learn, show, None)
    ap = question.flags(__doc__)
    ap.add_argument("--small", required=True, help="folder of the small model")
    args = ap.parse_args()
    question.answer(ap, args, args.small)


if __name__ == "__main__":
    cli(main)
