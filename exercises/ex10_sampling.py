"""Exercise 10: nucleus sampling from given uniform numbers (5 points).

logits (B, V). u (B, tries), uniform in [0, 1), is the only randomness: the same u gives the same
tokens, on any machine and beside any neighbours. Return a token for each row, (B,).

* temperature 0: the likeliest token. Else p = softmax(logits / temperature).
* Inverse CDF: a candidate is the first token whose cumulative probability exceeds u. Look at
  torch.cumsum, and at torch.searchsorted with right=True.
* The nucleus: the tokens such that all likelier ones have less than top_p together. So the
  likeliest is always in it.
* Each column of u gives a candidate. The first that is in the nucleus is drawn (why is that an
  exact draw from it?). If none is, the likeliest is taken. Nothing needs to be sorted.

The test works out small cases by hand, and compares frequencies with the nucleus's probabilities.
"""


def sample(logits, temperature, top_p, u):
    raise NotImplementedError("exercise 10")
