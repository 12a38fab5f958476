"""What a self-edit was worth: r(SE, tau, theta), and what it was computed from.

`reward` is the one function to change for another reward. docs/EXTENDING.md has an example.
"""
import math
from dataclasses import dataclass, field

from selfedit import SelfEdit, Task


@dataclass
class Outcome:
    """How a self-edit did: an entry for each seed of the inner loop."""
    reward: float = 0.0
    accuracy: list[float] = field(default_factory=list)         # the share of right answers
    answers: list[list[str]] = field(default_factory=list)
    right: list[list[bool]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)     # [first, last] of each seed
    seconds: float = 0.0
    cut: int = 0                                    # replies that ran to the cap, of all seeds
    note: str = ""

    def add(self, trained, answers, right: list[bool]):
        """One more seed: an sft.Trained, its inner_loop.Answers, and which of them are right."""
        self.accuracy.append(sum(right) / len(right))
        self.answers.append(answers.texts)
        self.right.append(right)
        # JSON knows no NaN: None.
        ends = trained.losses[0], trained.losses[-1]
        self.losses.append([round(loss, 4) if math.isfinite(loss) else None for loss in ends])
        self.seconds += trained.seconds
        self.cut += answers.cut
        if trained.diverged:
            self.note = "diverged: reward 0 for this seed"


def reward(outcome: Outcome, edit: SelfEdit, task: Task) -> float:
    """The share of the task's questions that theta' answers correctly, as a mean over the seeds.

    It is logged as it is returned here, and self-edits are chosen by it. The verdicts are logged
    beside it, whatever it is. A self-edit that can't be learned has reward 0 and does not come
    here."""
    return sum(outcome.accuracy) / len(outcome.accuracy)
