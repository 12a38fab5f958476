"""Exercise 6: a step's texts on one ribbon (6 points).

slots[s] is the micro-batch of slot s: a list of (ids, learn) texts, lists of equal length; an empty
slot has an empty list. All texts are laid end to end, slot after slot: T tokens, no padding.

* `position` (T): a token's place in its own text, from 0.
* Token k of a text predicts token k + 1, if learn[k + 1]. So a text's first token is no label.
  `source` (N): the places on the *ribbon* of the tokens that predict a label; `labels` (N): those
  labels, ids.
* `weight` (N): the weight of each label's loss. An adapter's loss is the mean over the labels of
  its micro-batch, of all of its texts together, and not of any other slot's. (Not a mean of the
  texts' means: where texts differ in length, that is another loss.)

Plain Python lists will do. The test compares with a case worked out by hand, and the losses on the
embedded model with those of each slot alone.
"""


def lay_out(slots):
    """(position, source, labels, weight), lists of numbers."""
    raise NotImplementedError("exercise 6")
