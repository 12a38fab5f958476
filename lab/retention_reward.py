"""Can SEAL learn not to forget? ReST-EM with a reward that counts what a self-edit destroys.

    python -m lab.retention_reward --out FILE.jsonl [--svg FILE]

reward = accuracy on its town - lambda * (accuracy on earlier towns, before - after)

The paper suggests it (section 5). Self-edits are tried on a copy of the policy that has first
learned 8 other towns, so that there is something to lose in every round. Each self-edit is asked
about its own town and these eight, under the same adapter. 4 minutes for a lambda and a seed.
"""
import copy
import random
import tempfile
from collections import Counter
from dataclasses import replace

import numpy as np

from data import tinyworld
from data.tasks import load_tasks
from engine.train import sft
from inner_loop import make_job
from lab.experiment import Question, new_figure, over_seeds, print_table, save
from lab.tiny import RECIPE, one_round, start, verdicts
from lora import Adapters
from outer_loop import sample, score
from selfedit import SelfEdit, Task, seed_for
from support.files import cli
from support.stats import mean_ci

ROUNDS = 3
EARLIER = 8     # towns learned before


def with_earlier(run, policy, earlier: list[Task]):
    """(a copy of the policy that has learned the earlier towns, all at once; what it then knows of
    them)."""
    documents = []
    for task in earlier:
        # Every note that can be made of the town, and its passage: the town as `load` makes it.
        rng = random.Random(task.name)
        town = tinyworld.make_town(rng, task.name, out=True)
        documents += [town.say(relation, form, rng) for relation, form in town.notes()]
        documents.append(town.passage)
    edit = SelfEdit(documents=documents)
    job = make_job(policy, run.tok, edit, seed_for(run.cfg.seed, "towns"), RECIPE)
    ((_, trained),) = sft(policy, [job])
    learner = copy.deepcopy(policy)
    Adapters.stack(learner, RECIPE.lora, [trained.weights]).merge(0)
    return learner, float(verdicts(learner, run.tok, earlier).mean())


def with_questions(task: Task, earlier: list[Task]) -> Task:
    """The task, that also asks what the earlier ones ask."""
    for other in earlier:
        task = replace(task, questions=task.questions + other.questions,
                       queries=task.queries + other.queries, answers=task.answers + other.answers)
    return task


def try_edits(run, learner, tasks, edits, t: int, split: str, earlier, known: float):
    """(tasks, K, 2): what the learner learned and lost by each self-edit."""
    asked = [with_questions(task, earlier) for task in tasks]
    score(run, learner, asked, edits, t, split, [0.0] * len(tasks), n_seeds=1)
    # What can't be read teaches nothing and destroys nothing.
    found = np.zeros((len(edits), len(edits[0]), 2))
    for (i, j), record in run.rollouts.at(t, split).items():
        if record["right"]:
            # Its own questions come first.
            (right,), own = record["right"], len(tasks[i].questions)
            found[i, j] = np.mean(right[:own]), known - np.mean(right[own:])
    return found


def measure(weight: float, seed: int, n_train: int, n_eval: int) -> dict:
    """A line: ReST-EM with this lambda. Each value is a list over rounds, from 0, the untrained."""
    record = {"learned": [], "lost": [], "known": [], "made of": []}
    with tempfile.TemporaryDirectory() as folder:       # of which only the line is kept
        run, train = start(folder, seed, tasks=n_train, iterations=ROUNDS)
        # The earlier towns are none of those that the rounds learn from.
        earlier, train = train[-EARLIER:], train[:-EARLIER]
        held_out = load_tasks(run, "eval")[:n_eval]
        for t in range(ROUNDS + 1):
            policy = run.load(t)
            learner, known = with_earlier(run, policy, earlier)
            edits = sample(run, policy, held_out, t, "eval", run.cfg.eval_edits)
            found = try_edits(run, learner, held_out, edits, t, "eval", earlier, known)
            record["learned"].append(float(found[..., 0].mean()))
            record["lost"].append(float(found[..., 1].mean()))
            record["known"].append(known)
            record["made of"].append(tinyworld.describe(held_out, edits))
            if t == ROUNDS:
                return record

            def reward(tasks, edits):
                found = try_edits(run, learner, tasks, edits, t, "train", earlier, known)
                return found[..., 0] - weight * found[..., 1]

            one_round(run, policy, train, t, reward)


def made_of(shares: list[dict]) -> str:
    """What lines of self-edits most frequently are, with mean shares: 'copy 60%, plain 12%'."""
    total = sum(map(Counter, shares), Counter())
    means = [(form, share / len(shares)) for form, share in total.most_common()]
    return ", ".join(f"{form} {share:.0%}" for form, share in means if share >= .05)


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
    Question((0.0, .5, 1.0, 2.0), measure, show, draw, {"tasks": 12, "eval_tasks": 24},
             kind="lambda").ask(__doc__, type=float)


if __name__ == "__main__":
    cli(main)
