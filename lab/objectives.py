"""Ways to learn a document: what is read, and what the next token is to be. For lab/objective.py.

An example is (ids (T,), targets (T, V)): at each token a distribution q over the one that follows.
Where the row is zero, nothing is learned. The loss is

    - mean_s sum_w q_s(w) log p_theta'(w | y_<s)

the usual one if q has the token itself only, else KL(q || p) up to a constant.
"""
import torch
import torch.nn.functional as F

from engine.ribbon import Ribbon
from lora import Adapters, Job, dialogue

MASKINGS, SHARE = 4, 0.3        # of each document, and of the words that are missing in each


def hard(model, ids, learn):
    """The token itself has all of the probability."""
    targets = torch.zeros(len(ids), model.config.vocab_size)
    targets[:-1] = F.one_hot(torch.tensor(ids[1:]), model.config.vocab_size)
    return ids, targets * torch.tensor([*learn[1:], False])[:, None]


# The ways: each makes the examples of one document about a task. rng: for masks.

def plain(model, tok, task, document, rng):
    """The document, after nothing."""
    ids = tok.document(document)
    return [hard(model, ids, [True] * len(ids))]


def masked(model, tok, task, document, rng):
    """The document, after itself with words missing. What is read is not learned."""
    examples = []
    for _ in range(MASKINGS):
        words = ["_" if rng.random() < SHARE else word for word in document.split()]
        read = tok.prompt(" ".join(words) + "\n\n")
        examples.append(hard(model, *dialogue(read, [*tok.encode(document), tok.eos])))
    return examples


@torch.no_grad()
def in_view(model, tok, task, document, rng):
    """The document, each token as likely as to the model that reads the task's passage before."""
    read, ids = tok.prompt(task.prompt), tok.document(document)
    targets = model(torch.tensor([read + ids]))[0, len(read):].softmax(-1)
    # What is after the document is not learned.
    targets[-1] = 0
    return [(ids, targets)]


MAKE = {"plain": plain, "masked": masked, "in view": in_view}


def train(model, job: Job) -> torch.Tensor:
    """The adapter (P,) of a town, as sft.sft_one trains one, with cross-entropy to the targets."""
    # All texts lie on one ribbon, and are all in every step.
    ribbon = Ribbon([len(ids) for ids, _ in job.examples], model.device)
    ids = torch.tensor([token for ids, _ in job.examples for token in ids])
    targets = torch.cat([targets for _, targets in job.examples])
    adapter = Adapters(model, job.recipe.lora, n=1)
    adapter.init(0, job.seed)
    weights = adapter.flat.requires_grad_()
    optimizer = torch.optim.AdamW([weights], weight_decay=0)
    for step in range(job.steps):
        with adapter.route([len(ids)]):
            logits = model.lm_head(model.hidden(ids, ribbon.position, ribbon.attend))
        loss = -(targets * logits.log_softmax(-1)).sum() / targets.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([weights], job.recipe.clip)
        optimizer.param_groups[0]["lr"] = job.lr_at(step)
        optimizer.step()
    return weights.detach()[0]
