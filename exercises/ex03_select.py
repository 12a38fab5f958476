"""Exercise 3: which self-edits are kept (4 points).

rewards[i][j] is the reward of self-edit j of task i; usable[i][j] whether anything could be read
from it; without[i] the reward of the un-adapted model on task i.

* how = "best": each task's `keep` best; of equal rewards the first. "solved": all with reward 1.
* A self-edit that is not usable is never kept, whatever its reward.
* strict (Eq. 2): of what was chosen, keep what is better than `without`, not what equals it.

Return (i, j) pairs: task by task, a task's best first ("solved": in order of j).
The test compares with cases worked out by hand: ties, nothing usable, fewer than `keep`, strict.
"""


def select(rewards, usable, without, how="best", keep=1, strict=False) -> list[tuple[int, int]]:
    raise NotImplementedError("exercise 3")
