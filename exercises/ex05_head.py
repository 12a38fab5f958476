"""Exercise 5: the backward pass of a frozen output layer (6 points).

h (N, D) are hidden states, W (V, D) the frozen output layer, labels (N,) the next tokens. The loss
of a token is nll = -log softmax(W h)[label]. As W has no gradient, only d nll / d h is wanted, and
it can be computed at once, in the forward pass. So the logits need not be kept.

* Derive d nll / d logits for one token on paper first: one term for all V, one for the label.
* Then the chain rule through logits = W h. It is two matrix products in all.
* torch's autograd is not needed, and it is off in the test.

The test compares nll with F.cross_entropy, and your gradient with numerical differences (gradcheck,
float64).
"""


def loss_and_gradient(h, W, labels):
    """(nll (N,), d nll / d h (N, D)): row i is the gradient of nll[i]."""
    raise NotImplementedError("exercise 5")
