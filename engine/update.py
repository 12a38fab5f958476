"""What a training step computes beside the model, for many adapters at once: the loss, and AdamW.

Both are written out, as the output layer is frozen and as each adapter has its own learning rate,
step number and clipping. train.py calls them; lora.sft_one uses torch's own.
"""
import torch

from engine.gpu import fused

PIECE = 2 ** 16     # values of an adapter that are updated together on a CPU: .25 MiB each

class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a frozen output layer: h (N, D), W (V, D), labels (N,) -> nll (N,).

    The logits (N, V) never exist at once. As W needs no gradient, d nll / dh = (softmax - onehot) W
    is computed in the forward pass, chunk by chunk, and the backward pass only scales it."""

    @staticmethod
    def forward(ctx, h, W, labels):
        nll = torch.empty(len(h), device=h.device, dtype=torch.promote_types(h.dtype, torch.float))
        grad = torch.empty_like(h)
        # A chunk has at most 2^27 logits (2^24 on a CPU): .5 GiB in float32.
        size = max(1, (2 ** 27 if h.is_cuda else 2 ** 24) // len(W))
        loss_of = fused(nll_and_gradient, h)
        for i in range(0, len(h), size):
            chunk = slice(i, i + size)
            nll[chunk], grad[chunk] = loss_of(h[chunk], W, labels[chunk, None], nll.dtype)
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx, g):
        (grad,) = ctx.saved_tensors
        return grad * g[:, None].to(grad.dtype), None, None


def nll_and_gradient(h, W, label, dtype):
    """nll (N,) of labels (N, 1), computed in this dtype, and d nll / dh (N, D)."""
    log_p = (h @ W.T).to(dtype).log_softmax(-1)         # (N, V)
    nll = -log_p.gather(1, label)[:, 0]
    # d nll / d logits = softmax - onehot, in the place of log_p.
    d_logits = subtract_onehot(log_p.exp_(), label)
    return nll, d_logits.to(h.dtype) @ W


def subtract_onehot(p, label):
    if p.is_cuda:       # pointwise, so that it is one kernel with what stands around it
        return p - (torch.arange(p.shape[1], device=p.device) == label).to(p.dtype)
    return p.scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))


@torch.no_grad()
def adamw_(p, g, m, v, lr, t, copy, clip, weight_decay, norm=None, betas=(0.9, 0.999), eps=1e-8):
    """One AdamW step (arXiv 1711.05101) of n adapters, in place, each gradient clipped by its norm.

    p, g, m, v (n, P); lr and the step's number t, from 1, (n, 1): each adapter has its own. copy:
    of p in the model's dtype, which is written as well (or p itself); g is in that dtype. norm
    (n, 1): of the whole gradients, where these are pieces of them."""
    g = g.to(p.dtype)
    if norm is None:
        norm = g.norm(dim=1, keepdim=True)
    # Clip: shorten a gradient whose norm exceeds `clip`, as torch's clip_grad_norm_ does.
    g = g.mul_((clip / (norm + 1e-6)).clamp(max=1))
    # Running means of the gradient and of its square. They start at 0: m_hat, v_hat correct that.
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    m_hat = m / (1 - betas[0] ** t)
    v_hat = v / (1 - betas[1] ** t)
    # Decoupled weight decay: it acts on the values themselves, not through the gradient.
    if weight_decay:
        p.mul_(1 - lr * weight_decay)
    p.sub_(m_hat.div_(v_hat.sqrt_().add_(eps)).mul_(lr))
    if copy.dtype != p.dtype:
        copy.copy_(p)


def adamw_all(p, g, m, v, lr, t, copy, **settings):
    """adamw_ of all adapters: on CUDA in one compiled call, on a CPU piece by piece, so that what
    is read and written a dozen times stays in the cache."""
    if p.is_cuda:
        fused(adamw_, p)(p, g, m, v, lr, t, copy, **settings)
        return
    for row in range(len(p)):
        own = slice(row, row + 1)
        norm = g[own].norm(dim=1, keepdim=True, dtype=p.dtype)
        pieces = [x[own].split(PIECE, dim=1) for x in (p, g, m, v, copy)]
        for piece_p, piece_g, piece_m, piece_v, piece_copy in zip(*pieces):
            adamw_(piece_p, piece_g, piece_m, piece_v, lr[own], t[own], piece_copy, norm=norm,
                   **settings)
