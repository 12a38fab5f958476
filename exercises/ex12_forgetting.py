"""Exercise 12: forgetting in three numbers (4 points).

Several streams of n passages, learned one after the other. accuracy[k][stream][passage] is the
accuracy after k edits: of all n passages for k = 0 (before any edit), of the first k passages for
k >= 1 (those that were seen). So accuracy[1] has one passage per stream, accuracy[n] has n.

Return the means over passages and streams of

* gain: just after a passage's own edit, minus before any edit;
* left: after the last edit, minus before any edit;
* forgotten: just after a passage's own edit, minus after the last edit.

Which of the three is the sum of the other two? Where does passage k's own edit stand in accuracy?
The test compares with two streams of three passages, worked out by hand.
"""


def forgetting(accuracy):
    """(gain, left, forgotten)"""
    raise NotImplementedError("exercise 12")
