"""Exercise 11: a third domain (8 points).

A hidden operator: a # b = c for digits a, b, c. A task shows some examples and asks for some pairs:
shown = [(a, b, c), ...], asked = [(a, b, c), ...]. Make a selfedit.Task of it; the loops ask
nothing else of a domain. Look at data.tinyworld.town_task, and at the comments in selfedit.Task.

* name; context: one document, the examples as lines "3 # 4 = 7"; prompt: the context and
  "\\n\\nNotes:\\n" (selfedit.NOTES).
* questions and queries: "3 # 4 =" (both the same here); answers: "7"; judge:
  data.tinyworld.exact_judge.
* kinds: "seen" if the pair is among the shown ones, else "unseen".
* read: a self-edit's lines of the form "a # b = c" are its documents, other lines are dropped, and
  every example that was shown is a document of its own, too. No such line: ValueError, which says
  why. An equation may be wrong: that is the policy's affair, and the reward tells.

The test reads self-edits, grades answers, and lets the inner loop teach what was shown.
"""


def operator_task(name, shown, asked):
    raise NotImplementedError("exercise 11")
