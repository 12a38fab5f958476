"""Who may choose among the self-edits of a town, and by which scores. For lab/proxy.py."""
import numpy as np

from lab.experiment import where
from lab.ranking import others
from lab.scores import SCORES

LOOP = "an inner loop (SEAL)"
# Who chooses -> the cost per self-edit, in passes.
COSTS = SCORES | {"half of the steps": "5 backward, answers",
                  LOOP: "10 backward, answers",
                  "the five other inner loops": "50 backward, answers"}


def joined(lines, name):
    """What they have under this name, the towns of all seeds one after another."""
    return np.concatenate([line[name] for line in lines])


def choosers(records) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({who chooses: scores (towns, K, inner loops or 1)}, judges (towns, K, inner loops))."""
    scored = where(records, part="scores")
    tried = []
    for line in scored:
        tried += where(records, part="choosing", seed=line["seed"])
    scores = [line["scores"] for line in scored]
    whole = joined(tried, "whole")
    judges = others(whole)
    found = {}
    for name in SCORES:
        found[name] = joined(scores, name)[:, :, None]
    found["half of the steps"] = joined(tried, "half")
    found[LOOP] = whole
    # What the judges themselves would choose: nothing can be worth more.
    found["the five other inner loops"] = judges
    return found, judges
