"""Exercise 4: AdamW with clipping, for n adapters at once (6 points).

p (n, P) are the adapters' parameters, a row each; g (n, P) their gradients; m, v (n, P) the running
means of the gradient (beta .9) and of its square (beta .999), 0 at first. lr (n, 1) and t (n, 1),
the number of the step from 1: each adapter has its own.

1. Clip: a row whose norm exceeds `clip` is shortened to it: g * min(1, clip / (norm + 1e-6)).
2. Update m and v; correct both for starting at 0: divide by 1 - beta ** t.
3. Decoupled weight decay: p shrinks by lr * weight_decay of itself, not through the gradient.
4. p falls by lr * m_hat / (sqrt(v_hat) + 1e-8).

No loop over adapters is needed. Do not change the tensors that you are given.
The test steps five times with torch.optim.AdamW and clip_grad_norm_, one adapter at a time, and
asks for the same p to 1e-12 in float64.
"""


def adamw(p, g, m, v, lr, t, clip, weight_decay):
    """The new (p, m, v)."""
    raise NotImplementedError("exercise 4")
