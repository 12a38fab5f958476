"""remember.py: adapters of the last layers, smaller merges, and what a model remembers."""
from dataclasses import replace

import pytest
import torch

from engine.decode import Sampling
from engine.train import sft
from inner_loop import TINY, make_job
from lab.remember import first_words, last_layers, recall, scaled, with_old
from lora import Adapters, Job
from model import load_pretrained
from selfedit import SelfEdit
from support.checkpoint import EMBEDDED
from support.files import UserError

WRITING = Sampling(max_new=100, temperature=.8, top_p=.95)


@pytest.fixture()
def model():
    return load_pretrained(EMBEDDED)


def learn(model, words, towns, epochs, layers=4):
    """The weights of an adapter, trained on the passages of these towns."""
    passages = SelfEdit(documents=[town.context[0] for town in towns])
    job = make_job(model, words, passages, 0, replace(TINY, epochs=epochs))
    adapter = Adapters(model, TINY.lora, 1)
    adapter.init(0, job.seed)
    job = replace(job, start=adapter.flat[0], free=last_layers(adapter, layers))
    ((_, trained),) = sft(model, [job])
    return trained.weights


# ------------------------------------------------------------------------------- adapters

def test_an_adapter_of_the_last_layer_changes_no_others(model, words, towns):
    before = {name: p.clone() for name, p in model.named_parameters()}

    weights = learn(model, words, towns, epochs=1, layers=1)
    Adapters.stack(model, TINY.lora, [weights]).merge(0)

    changed = {name for name, p in model.named_parameters() if not p.equal(before[name])}
    assert len(changed) == 7
    assert all(name.startswith("model.layers.3.") for name in changed)


def test_all_layers_are_the_last_ones_if_there_are_no_more(model):
    adapters = Adapters(model, TINY.lora, 2)

    assert last_layers(adapters, 4).all()
    # Layers are alike.
    assert last_layers(adapters, 2).float().mean() == .5


def test_half_a_merge_changes_the_weights_by_half(model, words, towns):
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = weight.clone()
    weights = learn(model, words, towns, epochs=1)

    changes = []
    for scale in (1, .5):
        Adapters.stack(model, TINY.lora, [scaled(weights, scale)]).merge(0)
        changes.append(weight - before)
        weight.data.copy_(before)

    assert changes[0].abs().max() > 1e-3
    torch.testing.assert_close(changes[1], changes[0] / 2, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------- rehearsal

def test_what_is_recalled_was_learned_and_not_looked_up(model, words, towns):
    """Before it is learned the true passage must not come; afterwards it does."""
    (first,) = recall(model, words, [towns], WRITING, [0, 1, 2])
    Adapters.stack(model, TINY.lora, [learn(model, words, towns, epochs=25)]).merge(0)
    (then,) = recall(model, words, [towns], WRITING, [0, 1, 2])

    for town, edit in zip(towns, first):
        assert edit.documents[-1].startswith(f"The town of {town.name} ")
        assert town.context[0] not in edit.documents
        # The notes are about the passage as it was remembered.
        assert edit.documents[:-1] == edit.text.splitlines()
    right = [edit.documents[-1] == town.context[0] for town, edit in zip(towns, then)]
    assert sum(right) >= 2


def test_each_group_is_recalled_under_its_adapter(model, words, towns):
    """As by a model into which the adapter is merged; the other group's knows nothing."""
    adapters = Adapters(model, TINY.lora, 2)
    adapters.flat[1] = learn(model, words, towns, epochs=25)

    empty, full = recall(model, words, [towns[:1], towns[:1]], WRITING, [5, 5], adapters)
    (base,) = recall(model, words, [towns[:1]], WRITING, [5])

    assert empty[0].documents == base[0].documents
    assert full[0].documents[-1] == towns[0].context[0] != empty[0].documents[-1]


def test_a_prompt_that_hides_the_passage_is_an_error(towns):
    assert first_words(towns[0]) == f"The town of {towns[0].name}"
    assert first_words(replace(towns[0], prompt="Go on: short", context=["short"])) == "short"
    with pytest.raises(UserError, match="--remember: a prompt must have the title and the passage"):
        first_words(replace(towns[0], prompt="Write notes."))


def test_old_examples_count_as_much_as_new_ones_in_as_many_steps():
    new = [([1, 2, 3], [True] * 3), ([4], [True])]
    old = [([5, 6, 7], [False, True, True]), ([8] * 6, [True] * 6), ([9] * 8, [False] * 8)]
    job = Job(new, 0, replace(TINY, batch=1))

    both = with_old(job, old)

    assert both.examples[:2] == new
    assert [learn for _, learn in both.examples[2:]] == [[0, .5, .5], [.5] * 6, [0] * 8]
    assert both.recipe.batch == 3 and both.steps == job.steps == 20
    assert with_old(job, []) == job
