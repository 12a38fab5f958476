"""Exercise 7: what the M-step learns (3 points).

prompt are the ids of a context as the model read it, edit the ids of a kept self-edit exactly as
they were sampled; if it ended by itself, its last id is EOS. Eq. 3 has log p(edit | context): the
context is read, and is not learned.

Return (ids, learn) for the trainer: the ids to read, and for each whether it is to be learned.

* Is EOS a token of the self-edit? What would the policy unlearn if it were left out?
* A self-edit that ran to the cap has no EOS. Add none: the model never chose to stop there.
* Do not change the lists that you are given.

The test looks at the mask, and asks that the trainer's loss on your example is the mean negative
log-likelihood of the self-edit's tokens alone.
"""


def m_step_example(prompt: list[int], edit: list[int]) -> tuple[list[int], list[bool]]:
    raise NotImplementedError("exercise 7")
