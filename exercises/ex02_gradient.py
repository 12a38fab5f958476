"""Exercise 2: Eq. 3 with rewards 0 and 1 is SFT on the kept self-edits (8 points).

N contexts, M self-edits of each. log_p[i][j] is a tensor (S_ij,): the log-probability of each token
of self-edit j of context i, given those before it and the context. rewards[i][j] is a number, and a
constant: no gradient passes through it.

* `reinforce_loss` is the scalar whose gradient is *minus* the estimate of grad J in docs/PAPER.md,
  step 6 (with any rewards). A self-edit's log-probability is a sum over its tokens.
* SFT's loss is the mean of -log p over the tokens of the kept self-edits, in one batch. Then

      grad reinforce_loss = factor * grad SFT's loss

  where `factor` depends on lengths[i][j] = S_ij and the rewards (0 or 1) alone. Derive it.

The test takes both gradients on the embedded model, SFT's by the project's own trainer, and asks
that they are equal; and it computes one loss by hand with rewards that are not 0 or 1.
"""


def reinforce_loss(log_p, rewards):
    raise NotImplementedError("exercise 2")


def factor(lengths, rewards) -> float:
    raise NotImplementedError("exercise 2")
