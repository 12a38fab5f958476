"""Exercise 9: LoRA for a ribbon of many adapters, and its merge (6 points).

x (T, in) are tokens sorted by adapter: the first counts[0] are adapter 0's, the next counts[1] are
adapter 1's, and so on; a count may be 0. A (n, r, in), B (n, out, r).

* `low_rank`: scale * B A x for each token, under its own adapter: (T, out). A loop will do. Never
  multiply B A first: that costs out * in * r, where two thin products cost (out + in) * r a token.
* `merge`: W + scale * B A for one adapter, A (r, in), B (out, r), W (out, in). W may be bfloat16
  and the adapter float32: compute in float32, round once at the end, to W's dtype. Do not change W.

The test compares tokens one by one, checks that the merged layer says what the routed one says, and
that a bfloat16 W is rounded once.
"""


def low_rank(x, A, B, scale, counts):
    raise NotImplementedError("exercise 9")


def merge(W, A, B, scale):
    raise NotImplementedError("exercise 9")
