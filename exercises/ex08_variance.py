"""Exercise 8: how much of the best of K is luck? (8 points)

accuracy is an array (passages, K, seeds): the accuracy of each self-edit in each inner loop.
Return four numbers:

* noise: the standard deviation of one inner loop, over seeds. Average the variances (ddof=1) over
  all self-edits, then take the root.
* true: the standard deviation between the self-edits of a passage, without that noise. The variance
  of their means over seeds is too large: it holds noise / seeds as well. Subtract that, average
  over passages, and let it be 0 at least.
* chosen: the mean reward of each passage's best, as the seeds that chose it measured it.
* honest: leave one seed out, choose the best by the others, and ask the left-out seed what the
  choice is worth. Average over the seeds left out, and over passages.

chosen - honest is luck. The test simulates rewards of which it knows the parts: with no difference
between self-edits, `true` must be about 0, and all that best-of-K gains must be luck.
"""


def luck(accuracy):
    """(noise, true, chosen, honest)"""
    raise NotImplementedError("exercise 8")
