"""The transformer computes what transformers computes, and each opens what the other saved."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import model as program
from engine.ribbon import Ribbon, attention
from model import complete, load_pretrained
from tests.helpers import call


def test_the_ribbon_of_the_docstring():
    ribbon = Ribbon([3, 1, 2], "cpu")
    (view,) = ribbon.unroll(torch.tensor([1, 2, 3, 4, 5, 6]))
    assert ribbon.row.tolist() == [0, 0, 0, 1, 2, 2]
    assert ribbon.position.tolist() == [0, 1, 2, 0, 0, 1]
    assert ribbon.cell.tolist() == [0, 1, 2, 3, 6, 7]
    assert ribbon.last.tolist() == [2, 3, 5]
    assert ribbon.bounds.tolist() == [0, 3, 4, 6]
    assert view.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert view.flatten()[ribbon.cell].tolist() == [1, 2, 3, 4, 5, 6]


def test_sequences_are_unrolled_in_groups_of_like_lengths():
    ribbon, tokens = Ribbon([2, 33, 1], "cpu"), torch.randn(36, 4, 5)
    short, long = ribbon.unroll(tokens)
    assert torch.equal(short[0], tokens[:2])
    assert torch.equal(short[1], torch.stack([tokens[35], torch.zeros(4, 5)]))
    assert torch.equal(long, tokens[None, 2:35])
    # Without padding nothing is copied.
    (view,) = Ribbon([3, 3], "cpu").unroll(tokens[:6])
    assert view.shape[:2] == (2, 3) and view.data_ptr() == tokens.data_ptr()
    # Like lengths are within a factor of four: up to 32, up to 128, up to 512.
    assert Ribbon([5, 100, 32, 33, 128, 129, 1], "cpu").groups == [[0, 2, 6], [1, 3, 4], [5]]


def test_ragged_ribbon_equals_single_sequences(peer):
    folder, _ = peer
    model = load_pretrained(folder, "cpu")
    lengths = [7, 1, 40, 13]
    parts = [torch.randint(0, 320, (n,)) for n in lengths]
    ribbon = Ribbon(lengths, "cpu")
    assert len(ribbon.shapes) == 2      # groups
    h = model.hidden(torch.cat(parts), ribbon.position, ribbon.attend)
    for part, rows in zip(parts, h.split(lengths)):
        alone = model(part[None])[0]
        torch.testing.assert_close(model.lm_head(rows), alone, atol=1e-4, rtol=0)


@torch.no_grad()
def test_transformers_computes_and_writes_the_same_and_opens_what_is_saved(peer, tmp_path):
    folder, reference = peer
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = load_pretrained(folder, "cpu")
    assert not any(p.requires_grad for p in model.parameters())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == reference.config.tie_word_embeddings
    ids = torch.randint(0, 320, (2, 300))
    logits = model(ids)
    torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=0)

    prompt = ids[:1, :9]
    whole = reference.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                               max_new_tokens=20, eos_token_id=None, pad_token_id=0)
    assert complete(model, prompt[0].tolist(), 20) == whole[0, 9:].tolist()

    model.save_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=0)
    assert torch.equal(logits, load_pretrained(tmp_path / "out", "cpu")(ids))


@torch.no_grad()
def test_smollm2_logits_equal_transformers(smollm2):
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    ids = torch.arange(2000, 2300)[None]
    logits = load_pretrained(smollm2, "cpu")(ids)
    torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=1e-5)


def test_the_program_completes_a_prompt_up_to_a_stop_id(tiny_folder, tiny, tok):
    said = call(program, "--model", tiny_folder, "--prompt", "The town", "--max-new", 8)
    ids = complete(tiny, tok.encode("The town"), 8, tok.stop)
    assert said == "The town" + tok.decode(ids) + "\n"
    full = complete(tiny, [5, 6], 12)
    assert len(full) == 12
    assert complete(tiny, [5, 6], 12, {full[6]}) == full[:full.index(full[6]) + 1]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["causal", "bool", "added"])
def test_attention_in_bfloat16_is_that_in_float32(kv_heads, mask):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 7, 16, generator=g)
    k, v = torch.randn(2, 3, kv_heads, 7, 16, generator=g)
    seen = torch.rand(3, 1, 7, 7, generator=g) < 0.5
    seen |= torch.eye(7, dtype=torch.bool)
    masks = {"causal": None, "bool": seen,
             "added": torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)}
    exact = attention(q, k, v, masks[mask])
    added = masks[mask].bfloat16() if mask == "added" else masks[mask]
    short = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), added)
    assert short.dtype == torch.bfloat16
    assert (short - exact).abs().max() < 0.05


def test_attention_over_long_texts_keeps_no_scores_for_the_backward_pass():
    """In bfloat16 on a CPU: of 512 tokens, 512^2 scores a head would be 8 MB."""
    q, k, v = torch.randn(3, 1, 16, 512, 8).bfloat16()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes), lambda x: x):
        attention(q.requires_grad_(), k, v)
    assert sum(kept) < 10 * q.nbytes
