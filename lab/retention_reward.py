"""Can SEAL learn not to forget? ReST-EM with a reward that counts what a self-edit destroys.

    python -m lab.retention_reward --out FILE.jsonl [--svg FILE]

reward = accuracy on its town - lambda * (accuracy on earlier towns, before - after)

The paper suggests it (section 5). A round is one of outer_loop.py (--preset tiny), but for this:
the model on which self-edits are tried is a copy of the policy that has first learned 8 other
towns, from all true notes about them at once. So there is something to lose in every round, which
M-steps do not touch. Each self-edit is asked about its own town and these eight, under the same
adapter. lambda 0 is SEAL. About 4 minutes for a lambda and a seed on one thread.
"""
import copy
import random
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np

from data import tinyworld
from engine.decode import collect
from engine.train import sft
from inner_loop import make_job, update_and_score
from lab.experiment import Question, add_seeds, flags
from lab.show import made_of, new_figure, over_seeds, print_table, save
from lab.tiny import ANSWERING, RECIPE, TINY, WRITING, load, verdicts
from lora import Adapters
from model import Transformer
from outer_loop import in_order, m_step, next_tasks, select
from selfedit import SelfEdit, Task, sample_self_edits, seed_for
from support.config import Config
from support.files import cli, positive
from support.progress import Meter
from support.stats import mean_ci
from support.tokenizer import Tokenizer

ROUNDS = 3
EARLIER = 8     # towns learned before


# ----------------------------------------------------------------- what is learned and what is lost

@dataclass
class Round:
    """Round t: the policy, which writes, and a copy of it that has learned the earlier towns."""
    cfg: Config
    tok: Tokenizer
    policy: Transformer
    learner: Transformer
    earlier: list[Task]
    known: float            # the learner's accuracy on the earlier towns
    t: int

    def try_edits(self, tasks: list[Task], split: str, k: int):
        """(k self-edits of each task, what the learner learned and lost by each (tasks, k, 2))."""
        # Every self-edit has a seed to be written with, and one to be learned with.
        key = self.cfg.seed, self.t, split
        writing, learning, places = [], [], []
        for i in range(len(tasks)):
            writing.append([seed_for(*key, i, j, "edit") for j in range(k)])
            learning += [[seed_for(*key, i, j, 0, "adapter")] for j in range(k)]
            places += [(i, j) for j in range(k)]
        edits = collect(sample_self_edits(self.policy, self.tok, tasks, replace(WRITING, n=k),
                                          writing))

        asked = [with_questions(tasks[i], self.earlier) for i, _ in places]
        learned = [edits[i][j] for i, j in places]
        outcomes = update_and_score(self.learner, self.tok, asked, learned, learning, RECIPE,
                                    ANSWERING, Meter(f"steps, {split}, round {self.t}"))
        # What can't be read teaches nothing and destroys nothing.
        found = np.zeros((len(tasks), k, 2))
        for n, outcome in outcomes:
            if outcome.right:
                found[places[n]] = learned_and_lost(outcome.right[0], asked[n], self.known)
        return edits, found

    def of_policy(self, held_out: list[Task]) -> dict:
        """What the policy's self-edits of held-out towns teach, destroy and are made of."""
        edits, found = self.try_edits(held_out, "eval", self.cfg.eval_edits)
        tokens = []
        for row in edits:
            tokens += [len(edit.token_ids) for edit in row]
        return {"learned": float(found[..., 0].mean()), "lost": float(found[..., 1].mean()),
                "known": self.known, "tokens": float(np.mean(tokens)),
                "made of": tinyworld.describe(held_out, edits)}


def begin_round(cfg, policy, tok, earlier: list[Task], t: int) -> Round:
    """Let a copy of the policy learn the earlier towns, all at once."""
    documents = []
    for task in earlier:
        # Every note that can be made of the town, and its passage: the town as `load` makes it.
        rng = random.Random(task.name)
        town = tinyworld.make_town(rng, task.name, out=True)
        documents += [town.say(relation, form, rng) for relation, form in town.notes()]
        documents.append(town.passage)
    edit = SelfEdit(documents=documents)
    job = make_job(policy, tok, edit, seed_for(cfg.seed, "towns"), RECIPE)
    ((_, trained),) = sft(policy, [job])
    learner = copy.deepcopy(policy)
    Adapters.stack(learner, RECIPE.lora, [trained.weights]).merge(0)
    known = float(verdicts(learner, tok, earlier).mean())
    return Round(cfg, tok, policy, learner, earlier, known, t)


def with_questions(task: Task, earlier: list[Task]) -> Task:
    """The task, that also asks what the earlier ones ask."""
    asked = replace(task, kinds=["own"] * len(task.questions))
    for other in earlier:
        asked = replace(asked, questions=asked.questions + other.questions,
                        queries=asked.queries + other.queries,
                        answers=asked.answers + other.answers,
                        kinds=asked.kinds + ["earlier"] * len(other.questions))
    return asked


def learned_and_lost(right: list[bool], task: Task, before: float) -> tuple[float, float]:
    """(accuracy on the task's own questions, by how much that on the earlier ones fell)."""
    right, is_own = np.array(right), np.array(task.kinds) == "own"
    return float(right[is_own].mean()), before - float(right[~is_own].mean())


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
