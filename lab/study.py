"""How a town of a stream is studied: who writes of it, and how what is learned is merged. For
lab/skill.py."""
from dataclasses import dataclass

import numpy as np

from lab.keeping import Arm, Stream, write_all
from lab.tiny import score
from selfedit import SelfEdit, seed_for


@dataclass
class Study:
    """How a town of the stream is studied."""
    merge: Arm
    tries: int = 1          # self-edits, of which the best by an inner loop is learned
    frozen: bool = False    # written by theta_3, which never changes


def next_edit(study: Study, stream: Stream, writer) -> SelfEdit:
    """The self-edit by which the stream's next town is learned."""
    k = len(stream.edits)
    edits = []
    for j in range(study.tries):
        seed = seed_for(stream.seed, k, j)
        edits += write_all(writer, stream.tok, [stream.towns[k]], seed)
    if study.tries == 1:
        return edits[0]
    town = [stream.towns[k]] * study.tries
    rewards = score(stream.model, stream.tok, town, edits, seed_for(stream.seed, k))
    return edits[int(np.argmax(rewards))]
