"""What self-edits teach, and what they make a model lose. For lab/retention_reward.py."""
import copy
import random
from dataclasses import dataclass, replace

import numpy as np

from data import tinyworld
from engine.decode import collect
from engine.train import sft
from inner_loop import make_job, update_and_score
from lab.tiny import ANSWERING, RECIPE, WRITING, verdicts
from lora import Adapters
from model import Transformer
from selfedit import SelfEdit, Task, sample_self_edits, seed_for
from support.config import Config
from support.progress import Meter
from support.tokenizer import Tokenizer


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
