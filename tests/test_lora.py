"""Stacked adapters: nothing changes at first, merged equals adapted, PEFT opens what is saved, the base stays as it was."""
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora import Adapters
from checkpoint import UserError
from model import Ribbon, load_pretrained
from tests.test_model import CASES

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=["llama3", "qwen2", "qwen3"])
def folder(request, tmp_path):
    torch.manual_seed(2)
    CASES[request.param]().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def trained(model, n=1, rank=4, alpha=8, targets=ALL):
    """Adapters as they might be after training: B is no longer zero."""
    adapters = Adapters(model, n, rank, alpha, targets)
    for slot in range(n):
        adapters.init(slot, slot)
    adapters.flat += 0.05 * torch.randn(adapters.flat.shape, generator=torch.Generator().manual_seed(3))
    return adapters


def test_fresh_adapter_changes_nothing(folder):
    model, ids = load_pretrained(folder, "cpu"), torch.randint(0, 320, (2, 9))
    adapters = Adapters(model, 1, 4, 8, ALL)
    adapters.init(0, 0)
    before = model(ids)
    with adapters.route([18]):
        assert torch.equal(model(ids), before)
    assert adapters.flat.abs().sum() > 0


def test_each_segment_has_its_own_adapter_and_the_base_comes_back(folder):
    model = load_pretrained(folder, "cpu")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    adapters, parts = trained(model, n=4), [torch.randint(0, 320, (n,)) for n in (5, 11, 8)]
    base = [model(p[None])[0] for p in parts]
    ribbon = Ribbon([5, 11, 8], "cpu")
    with adapters.route([16, 0, 8, 0]):  # slot 0 has two sequences, 1 and 3 are empty
        together = model.lm_head(model.hidden(torch.cat(parts), ribbon.position, ribbon.attend)).split([5, 11, 8])
    for part, slot, logits, plain in zip(parts, (0, 0, 2), together, base):
        with adapters.route([len(part) if s == slot else 0 for s in range(4)]):
            torch.testing.assert_close(logits, model(part[None])[0], atol=1e-4, rtol=0)
        assert not torch.allclose(logits, plain, atol=1e-2)
    assert all(torch.equal(model(p[None])[0], b) for p, b in zip(parts, base))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_both_ways_of_multiplying_agree(folder):
    """grouped_mm over the segments as they lie, or a padded batched matmul: values and gradients."""
    model, found = load_pretrained(folder, "cpu"), []
    ids, ribbon = torch.randint(0, 320, (24,)), Ribbon([5, 11, 8], "cpu")
    for grouped in (True, False):
        adapters = trained(model, n=4, rank=8)
        assert adapters.grouped  # rank and widths are multiples of 8, and this is float32
        adapters.grouped = grouped
        adapters.flat.requires_grad_()
        with adapters.route([16, 0, 8, 0]):
            h = model.hidden(ids, ribbon.position, ribbon.attend)
            h.square().sum().backward()
        found.append((h.detach(), adapters.flat.grad))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert not Adapters(model, 1, 4, 8, ALL).grouped


def test_merged_equals_adapted(folder):
    model, ids = load_pretrained(folder, "cpu"), torch.randint(0, 320, (1, 30))
    adapters = trained(model)
    with adapters.route([30]):
        adapted = model(ids)
    adapters.merge(0)
    torch.testing.assert_close(model(ids), adapted, atol=1e-4, rtol=1e-4)


def test_peft_opens_a_saved_adapter(folder, tmp_path):
    model, ids = load_pretrained(folder, "cpu"), torch.randint(0, 320, (1, 30))
    adapters = trained(model, n=2)
    adapters.save(1, tmp_path / "adapter")
    reference = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder).eval(), tmp_path / "adapter")
    with adapters.route([0, 30]), torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids).logits, atol=1e-4, rtol=0)


def test_unknown_target_is_refused(tiny):
    with pytest.raises(UserError, match="no layer is called qq_proj"):
        Adapters(tiny, 1, 4, 8, ["qq_proj"])
