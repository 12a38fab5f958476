"""What training changed of a model, as vectors in weight space. For lab/vector.py."""
import torch


def difference(after, before) -> dict[str, torch.Tensor]:
    """{name: change} of the weights that two models do not share."""
    found = {}
    for (name, new), old in zip(after.named_parameters(), before.parameters()):
        if not torch.equal(new, old):
            found[name] = new.detach() - old.detach()
    return found


@torch.no_grad()
def add(model, v, scale: float):
    """theta <- theta + scale v"""
    for name, change in v.items():
        model.get_parameter(name).add_(scale * change)


def cosine(v, w) -> float:
    """Between two changes of a model. Weights that one of them leaves alone are 0 in it."""
    product = sum((v[name] * w[name]).sum() for name in v.keys() & w.keys())
    lengths = [sum((change ** 2).sum() for change in x.values()).sqrt() for x in (v, w)]
    return (product / lengths[0] / lengths[1]).item()
