"""Scores of self-edits that need no inner loop. For lab/proxy.py, proxy_run.py and race.py.

To first order, a small step down the gradient g of a self-edit's loss changes the loss L of the
gold answers by

    L(theta - eps g) - L(theta) = -eps <g, grad L>

so the product of two gradients at theta may rank self-edits, as TracIn (arXiv 2002.08484) and LESS
(2402.04333) rank training examples by it.
"""
from dataclasses import replace

import torch

from inner_loop import make_job
from lab.credit import truth
from lab.grpo import log_probs
from lab.tiny import RECIPE
from lora import Adapters, dialogue, sft_one

# score -> its cost per self-edit, in passes. A backward pass includes its forward pass.
SCORES = {"number of tokens": "none",
          "answers that its lines state": "the world's truth",
          "answers, notes in the prompt": "1 forward",
          "inner product of gradients": "1 backward",
          "answers after one step": "1 backward, 1 forward"}
LAST = -1e6     # of a self-edit from which nothing can be learned


def gold(tok, task, before="") -> list:
    """Examples (ids, learn) in which the gold answers alone are learned. before: read first."""
    examples = []
    for query, answer in zip(task.queries, task.answers):
        examples.append(dialogue(tok.prompt(before + query), tok.encode(" " + answer)))
    return examples


def loss(model, adapter, examples) -> torch.Tensor:
    """The mean over all tokens that are learned, as in sft.py: a scalar."""
    return -torch.cat([log_probs(model, adapter, example) for example in examples]).mean()


def gradient(model, untrained, examples) -> torch.Tensor:
    """Of the loss, with regard to the weights of all adapted layers: one vector."""
    # Not with regard to an adapter's. Its B is zero at first, so that A has no gradient, and the
    # one of B is this one times a random A, which adds noise.
    weights = [layer.weight.requires_grad_() for layer in untrained.layers.values()]
    parts = torch.autograd.grad(loss(model, untrained, examples), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return torch.cat([part.flatten().float() for part in parts])


def products(model, tok, task, edits, recipe=RECIPE) -> list[tuple[float, float]]:
    """<g, grad L> of each self-edit, and the same as a cosine, in which the size of g does not
    count. LAST if nothing can be learned from it."""
    # An adapter of zeros changes nothing.
    untrained = Adapters(model, recipe.lora, 1)
    wanted = gradient(model, untrained, gold(tok, task))
    found = []
    for edit in edits:
        try:
            examples = make_job(model, tok, edit, 0, recipe).examples
        except ValueError:
            found.append((LAST, LAST))
            continue
        own = gradient(model, untrained, examples)
        product = (own @ wanted).item()
        found.append((product, product / (own.norm() * wanted.norm()).item()))
    return found


def score(model, tok, task, edits, seeds) -> list[dict[str, float]]:
    """{score: its value, the higher the better} of each self-edit. seeds: of the adapters."""
    untrained = Adapters(model, RECIPE.lora, 1)
    answers = gold(tok, task)
    # An epoch is one step here, as all documents are in one batch.
    one_step = replace(RECIPE, epochs=1)
    found = []
    for edit, seed, (product, _) in zip(edits, seeds, products(model, tok, task, edits)):
        try:
            job = make_job(model, tok, edit, seed, one_step)
        except ValueError:
            found.append(dict.fromkeys(SCORES, LAST))
            continue
        adapter = Adapters.stack(model, RECIPE.lora, [sft_one(model, job)])
        with torch.no_grad():
            after = loss(model, adapter, answers)
            # Without the passage, which is a document of every self-edit and has all answers.
            in_prompt = loss(model, untrained, gold(tok, task, edit.text + "\n\n"))
        found.append({"number of tokens": job.tokens,
                      "answers that its lines state": int(truth(task, edit).any(axis=0).sum()),
                      "answers, notes in the prompt": -in_prompt.item(),
                      "inner product of gradients": product,
                      "answers after one step": -after.item()})
    return found
