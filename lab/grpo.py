"""GRPO's M-step as it was published: several epochs, with the ratio's clip and the KL term.

For lab/update_rule.py. `--update grpo` weighs self-edits by GRPO's advantages and takes one epoch.
DeepSeekMath (arXiv 2402.03300, equations 3 and 4) goes on for more epochs, with

    rho_s = p_theta(y_s | y_<s, C) / p_theta_t(y_s | y_<s, C)

    maximise  mean_s  min(rho_s A, clip(rho_s, 1 - eps, 1 + eps) A) - beta KL(theta || theta_t)

so that a token's probability is pushed no further than eps from where it was. theta_t, which wrote
the self-edits, is the reference as well, as in the iterative form of GRPO (their Algorithm 1).
"""
from functools import partial

import torch
import torch.nn.functional as F

from lora import Adapters, Job, dialogue
from selfedit import seed_for
from support.config import outer_recipe
from support.files import UserError


def log_probs(model, adapter, example) -> torch.Tensor:
    """(N,) of a self-edit's tokens, given those before them."""
    ids, learn = example
    ids = torch.tensor(ids, device=model.device)
    written = torch.tensor(learn, device=model.device)[1:].bool()
    with adapter.route([len(ids)]):
        logits = model(ids[None])[0, :-1]
    return -F.cross_entropy(logits[written].float(), ids[1:][written], reduction="none")


def objective(new, old, advantage, eps, beta) -> torch.Tensor:
    """Of one self-edit, the mean over its tokens; new and old (N,) are log-probabilities."""
    ratio = (new - old).exp()
    clipped = ratio.clamp(1 - eps, 1 + eps)
    # The worse of both: no reward for going beyond the clip, but none is lost on the way back.
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    # The estimate of KL(theta || theta_t) from theta_t's samples that is never negative.
    kl = (old - new).exp() - (old - new) - 1
    return (gain - beta * kl).mean()


def clipped_m_step(eps: float, beta: float):
    """An M-step for outer_loop.rest_em."""
    return partial(train, eps=eps, beta=beta)


def train(cfg, run, model, learned, t, eps, beta):
    """theta_t+1: theta_t with an adapter that maximises the objective merged in."""
    # As in outer_loop.m_step: the context is read, the self-edit is learned as it was sampled.
    examples, advantages = [], []
    for task, edit, advantage in learned:
        examples.append(dialogue(run.tok.prompt(task.prompt), edit.token_ids))
        advantages.append(advantage)
    recipe = outer_recipe(cfg)
    job = Job(examples, seed_for(cfg.seed, t, "M-step"), recipe)
    adapter = Adapters(model, recipe.lora, n=1)
    adapter.init(0, job.seed)
    # A new adapter changes nothing, so these are theta_t's.
    with torch.no_grad():
        old = [log_probs(model, adapter, example) for example in examples]

    weights = adapter.flat.requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=recipe.lr, weight_decay=recipe.weight_decay)
    for step, batch in enumerate(job.micro_batches()):
        optimizer.zero_grad()
        for i in batch:
            new = log_probs(model, adapter, examples[i])
            value = objective(new, old[i], advantages[i], eps, beta)
            (-value / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_([weights], recipe.clip)
        optimizer.param_groups[0]["lr"] = job.lr_at(step)
        optimizer.step()
    weights.requires_grad_(False)
    if not weights.isfinite().all():
        raise UserError(f"the M-step of round {t + 1} diverged; try a lower learning rate")
    adapter.merge(0)
