"""Exercise 1: be the policy (8 points).

A self-edit of a town is a text of notes; each line is a document, and the passage is one more. An
adapter is trained on them and asked eleven questions without the passage: seven forward ("What is
the river at T called?") and four reversed ("The river V runs by which town?"). Write notes that
teach better than the model's own, which reach about .6 before RL.

* You see the passage alone, never the questions. Write a rule for all towns, not notes for one.
* data.tinyworld.read_passage(passage) gives (town, {relation: value}). data.tinyworld.RELATIONS
  holds sentences about each relation with {t} for the town and {v} for the value: `plain` and
  `reversed` statements, `ask` and `ask_back` questions, to which you append the answer.
* A test's question is worded as no note is. What has to be the same about them?
* Each self-edit is trained for 10 steps, however long it is.

The test trains on 16 towns and asks that .95 of all answers are right.
"""


def notes(passage: str) -> str:
    """Notes about a passage, a line each."""
    raise NotImplementedError("exercise 1")
