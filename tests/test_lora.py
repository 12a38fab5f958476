"""Stacked adapters: each token goes through its own, and PEFT opens what is saved."""
import dataclasses
import json
import re
import shutil
from unittest.mock import Mock

import huggingface_hub
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lora as program
from engine.device import try_memory
from engine.ribbon import Ribbon
from lora import Adapters, Lora, LowRank, Segments
from model import add_adapter, load_pretrained
from support.files import UserError
from tests.features import ADAPTER_DONE, ADAPTER_REFUSED, pairs_of
from tests.helpers import ALL, CASES, call

LORA = Lora(rank=4, alpha=8, targets=ALL)


@pytest.fixture()
def model(peer):
    return load_pretrained(peer[0], "cpu")


def trained(model, n=1, lora=LORA):
    """Adapters as they might be after training: B is no longer zero."""
    adapters = Adapters(model, lora, n)
    for i in range(n):
        adapters.init(i, seed=i)
    generator = torch.Generator().manual_seed(3)
    adapters.flat += 0.05 * torch.randn(adapters.flat.shape, generator=generator)
    return adapters


def test_targets_choose_the_layers(tiny):
    layers = Lora(rank=4, alpha=8, targets=["q_proj", "down_proj"]).layers(tiny)
    assert list(layers) == ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj",
                            "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    for name in ("qq_proj", "lm_head"):
        lora = Lora(rank=4, alpha=8, targets=["q_proj", name])
        with pytest.raises(UserError, match=f"no layer is called {name}; choose among q_proj"):
            Adapters(tiny, lora, 1)


def test_a_fresh_adapter_changes_nothing(model):
    """A is uniform within 1 / sqrt(inputs), as PEFT's is."""
    ids = torch.randint(0, 320, (2, 9))
    before = model(ids)
    adapters = Adapters(model, LORA, 2)
    by_hand = sum(4 * sum(layer.weight.shape) for layer in adapters.layers.values())
    assert adapters.flat.shape == (2, by_hand)
    assert LORA.parameters(model) == by_hand

    adapters.init(1, seed=0)

    with adapters.route([0, 18]):
        assert torch.equal(model(ids), before)
    assert adapters.flat[0].count_nonzero() == 0    # the other adapter is left alone
    pairs = adapters.pairs(adapters.flat[1:])
    for (A, B), layer in zip(pairs, adapters.layers.values()):
        bound = layer.in_features ** -0.5
        assert 0.95 * bound < A.max() <= bound
        assert 0.95 * bound < -A.min() <= bound
        assert A.mean().abs() < 0.15 * bound
        assert B.count_nonzero() == 0


def test_a_seed_means_the_same_adapter_in_every_place_and_stacked_weights_are_rows(tiny):
    adapters = Adapters(tiny, LORA, 3)
    for i, seed in enumerate([5, 6, 5]):
        adapters.init(i, seed)
    assert torch.equal(adapters.flat[0], adapters.flat[2])
    assert not torch.equal(adapters.flat[0], adapters.flat[1])
    stacked = Adapters.stack(tiny, LORA, [adapters.flat[2], adapters.flat[1]])
    assert stacked.n == 2
    assert torch.equal(stacked.flat, adapters.flat[[2, 1]])


def test_each_segment_has_its_own_adapter_and_the_base_comes_back(model):
    adapters = trained(model, n=4)
    parts = [torch.randint(0, 320, (n,)) for n in (5, 11, 8)]
    base = [model(part[None])[0] for part in parts]
    ribbon = Ribbon([5, 11, 8], "cpu")
    with adapters.route([16, 0, 8, 0]):     # 0 has two sequences, 1 and 3 have none
        h = model.hidden(torch.cat(parts), ribbon.position, ribbon.attend)
        together = model.lm_head(h).split([5, 11, 8])
    alone = [[5, 0, 0, 0], [11, 0, 0, 0], [0, 0, 8, 0]]
    for part, counts, logits, plain in zip(parts, alone, together, base):
        route = adapters.route(counts)
        for _ in range(2):      # it can be entered again, also after an error
            with pytest.raises(ZeroDivisionError), route:
                torch.testing.assert_close(logits, model(part[None])[0], atol=1e-4, rtol=0)
                raise ZeroDivisionError
        assert not torch.allclose(logits, plain, atol=1e-2)
        assert torch.equal(model(part[None])[0], plain)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("counts", [[16, 0, 8, 0], [6, 6, 6, 6]])
def test_low_rank_is_a_product_for_each_segment(grouped, counts):
    """By grouped_mm over the segments as they lie, or by a padded batched product."""
    x, A, B = (torch.randn(shape, requires_grad=True)
               for shape in [(24, 32), (4, 8, 32), (4, 16, 8)])
    ours = LowRank(A, B, 0.5, Segments(counts, "cpu"), grouped)(x, torch.zeros(24, 16))
    parts = [0.5 * part @ A[i].T @ B[i].T for i, part in enumerate(x.split(counts))]
    theirs = torch.cat(parts)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    gradients = [torch.autograd.grad(y.square().sum(), (x, A, B)) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def test_a_merge_that_runs_out_of_memory_changes_nothing_twice(tiny, tiny_folder, monkeypatch):
    other = load_pretrained(tiny_folder, "cpu")
    trained(other).merge(0)

    def fails_once(function):
        function()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(program, "try_memory", lambda f: try_memory(lambda: fails_once(f)))
    trained(tiny).merge(0)

    for ours, theirs in zip(tiny.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)


def test_a_merge_in_bfloat16_rounds_once(peer):
    """W + (alpha / r) B A is summed in float32. A sum of rounded terms would be another one."""
    model = load_pretrained(peer[0], "cpu", torch.bfloat16)
    adapters = trained(model, n=2)
    assert adapters.flat.dtype == torch.float32
    before = [layer.weight.clone() for layer in adapters.layers.values()]
    pairs = adapters.pairs(adapters.flat[1:])
    adapters.merge(1)
    for layer, weight, (A, B) in zip(adapters.layers.values(), before, pairs, strict=True):
        term = 2 * B[0] @ A[0]      # alpha / r is 2
        assert torch.equal(layer.weight, (weight.float() + term).bfloat16())
        assert not torch.equal(layer.weight, weight + term.bfloat16())


def test_peft_opens_a_saved_adapter_and_merged_it_is_the_same(model, peer, tmp_path):
    """It names its base and its shape."""
    ids = torch.randint(0, 320, (1, 30))
    adapters = trained(model, n=2)
    adapters.save(1, tmp_path / "adapter")
    with adapters.route([0, 30]):
        adapted = model(ids)
    adapters.merge(1)
    base = AutoModelForCausalLM.from_pretrained(peer[0]).eval()
    reference = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(model(ids), adapted, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(adapted, reference(ids).logits, atol=1e-4, rtol=0)
    config = peft.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert config.base_model_name_or_path == str(peer[0])
    assert (config.r, config.lora_alpha, config.target_modules) == (4, 8, set(ALL))


def test_the_program_teaches_a_sentence(tiny_folder):
    lines = call(program, "--model", tiny_folder, "--steps", 10).splitlines()
    first, second = map(float, lines[0].removeprefix("loss of every fifth step: ").split())
    assert second < first
    assert lines[1].startswith("before: The founder of Velmora is")
    assert lines[2].startswith("after:  The founder of Velmora is")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base model of transformers, and its folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    CASES["llama-tied"]().save_pretrained(folder)
    return folder


def write_pefts(folder, base, **settings):
    plain = dict(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    if "layers_pattern" in settings:
        plain["layers_to_transform"] = [1]
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                                peft.LoraConfig(**plain | settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


def change_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("field, value", pairs_of(ADAPTER_DONE))
def test_a_field_of_an_adapter_is_done_as_peft_does_it(field, value, base, tmp_path):
    ids = torch.randint(0, 320, (1, 9))
    write_pefts(tmp_path, base, **{field: value})
    reference = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path)
    with torch.no_grad():
        expected = reference.eval()(ids).logits
    model = load_pretrained(base, "cpu")
    with Adapters.load(model, tmp_path).route([9]):
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-3)
    add_adapter(model, tmp_path)
    torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-3)


UNKNOWN = {field.name: [{"x": 1}] for field in dataclasses.fields(peft.LoraConfig)
           if field.name not in ADAPTER_DONE | ADAPTER_REFUSED}


@pytest.mark.parametrize("field, value", pairs_of(ADAPTER_REFUSED) + pairs_of(UNKNOWN))
def test_a_field_of_an_adapter_is_refused_by_name(field, value, base, tmp_path):
    write_pefts(tmp_path, base)
    change_config(tmp_path, **{field: value})
    model = load_pretrained(base, "cpu")
    for load in (Adapters.load, add_adapter):
        with pytest.raises(UserError, match=f"{field} = .* is not implemented") as error:
            load(model, tmp_path)
        assert "damaged" not in str(error.value)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_of_the_head_is_refused_by_its_tensors(name, base, tmp_path):
    """Here the head is tied: added to its weights it would change the embedding as well."""
    write_pefts(tmp_path, base, target_modules=["q_proj", name])
    with pytest.raises(UserError, match=f"unexpected tensor 'base_model.model..*{name}"):
        Adapters.load(load_pretrained(base, "cpu"), tmp_path)


@pytest.mark.parametrize("old, new, settings", [
    ("lora_A", "lora_A.default", {}), ("base_model.model.", "", {}), ("layers.1", "layers.7", {}),
    ("q_proj.lora_A.weight", "q_proj.lora_A.bias", {}),
    # PEFT drops those that the config leaves out.
    ("", "layers.0", {"layers_to_transform": [1]}), ("", "", {"exclude_modules": ["down_proj"]}),
    ("", "", {"target_modules": ["q_proj"]})])
def test_every_tensor_of_an_adapter_is_used_or_named(old, new, settings, base, tmp_path):
    write_pefts(tmp_path, base)
    path = tmp_path / "adapter_model.safetensors"
    if old:
        save_file({name.replace(old, new): x for name, x in load_file(path).items()}, path)
    change_config(tmp_path, **settings)
    with pytest.raises(UserError, match=f"unexpected tensor .*{re.escape(new)}"):
        Adapters.load(load_pretrained(base, "cpu"), tmp_path)


def test_an_adapter_of_the_hub_is_loaded_and_names_its_base_by_its_id(base, tmp_path, monkeypatch,
                                                                      capsys):
    write_pefts(tmp_path / "a", base)
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    shutil.copytree(base, cached)
    download = Mock(side_effect=[cached, tmp_path / "a"])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load_pretrained("owner/name", "cpu")
    Adapters.load(model, "owner/adapter").save(0, tmp_path / "mine")
    download.assert_called_with("owner/adapter", allow_patterns=["adapter_config.json",
                                                                 "adapter_model.safetensors"])
    config = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    # PEFT's own was trained on another folder, which is a note. Ours is of this model.
    assert f"was trained on {base}, and this model is owner/name" in capsys.readouterr().err
    Adapters.load(model, str(tmp_path / "mine"))
    assert capsys.readouterr().err == ""


def test_an_adapter_is_no_model(base, tmp_path):
    write_pefts(tmp_path / "a", base)
    with pytest.raises(UserError, match="config.json is missing; is it an adapter. Name its base"):
        load_pretrained(tmp_path / "a", "cpu")
    shutil.copytree(base, tmp_path / "a", dirs_exist_ok=True)
    with pytest.raises(UserError, match="a model or an adapter"):
        load_pretrained(tmp_path / "a", "cpu")
