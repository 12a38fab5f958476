"""lab/objective.py, skill.py, vector.py and what they share, on a few towns."""
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

from inner_loop import make_job
from lab import changes, keeping, objective, objectives, skill, study, vector
from lab.tiny import RECIPE
from lora import Job, sft_one
from model import load_pretrained
from support.checkpoint import EMBEDDED
from tests.helpers import read_lines
from tests.test_lab import call


@pytest.fixture()
def embedded():
    return load_pretrained(EMBEDDED)


# ------------------------------------------------------------------------------- objective

def test_plain_text_is_learned_as_ever(embedded, words, towns):
    """The targets that are the tokens themselves: sft_one's own loss, and so its weights."""
    town = towns[0]
    documents = ["The river Verier flows through it.", town.context[0]]
    recipe = replace(RECIPE, epochs=3, batch=10)
    examples = []
    for document in documents:
        examples += objectives.plain(embedded, words, town, document, None)

    found = objectives.train(embedded, Job(examples, 5, recipe))

    edit = replace(town.references["passage only"], documents=documents)
    job = make_job(embedded, words, edit, 5, recipe)
    torch.testing.assert_close(found, sft_one(embedded, job), rtol=1e-3, atol=1e-4)


def test_a_masked_text_is_read_and_the_whole_one_learned(embedded, words, towns):
    passage = towns[0].context[0]

    examples = objectives.masked(embedded, words, towns[0], passage, random.Random(0))

    assert len(examples) == objectives.MASKINGS
    for ids, targets in examples:
        learned = targets.sum(-1).bool().tolist()
        # A row is about the token after it: the first one is about the first of the whole text.
        begin = learned.index(True) + 1
        read = words.decode(ids[:begin]).split()
        gone = [word for word, kept in zip(passage.split(), read) if kept != word]
        assert len(read) == len(passage.split()) and 0.1 < len(gone) / len(read) < 0.6
        assert set(read) - set(passage.split()) == {"_"}
        assert words.decode(ids[begin:-1]) == passage and ids[-1] == words.eos
        assert targets.argmax(-1)[begin - 1:-1].tolist() == ids[begin:]
        assert learned == [False] * (begin - 1) + [True] * (len(ids) - begin) + [False]


def test_in_view_the_next_token_is_as_likely_as_with_the_passage(embedded, words, towns):
    town = towns[0]
    ((ids, targets),) = objectives.in_view(embedded, words, town, "The river", None)

    read = words.prompt(town.prompt)
    for j in range(len(ids) - 1):
        expected = embedded(torch.tensor([read + ids[:j + 1]]))[0, -1].softmax(-1)
        torch.testing.assert_close(targets[j], expected)
    assert targets[-1].sum() == 0
    # The passage says which river it is; a model without it can't know.
    alone = embedded(torch.tensor([ids]))[0, -2].softmax(-1)
    assert (targets[-2] - alone).abs().max() > .1


def test_to_learn_what_is_in_view_brings_the_two_together(embedded, words, towns):
    town = towns[0]
    examples = objectives.in_view(embedded, words, town, town.context[0], None)
    losses = []
    for epochs in (1, 10):
        job = Job(examples, 0, replace(RECIPE, epochs=epochs, lr=2e-2))
        adapter = objectives.Adapters.stack(embedded, RECIPE.lora,
                                            [objectives.train(embedded, job)])
        ids, targets = examples[0]
        with adapter.route([len(ids)]):
            log_p = embedded(torch.tensor([ids]))[0].log_softmax(-1)
        losses.append(-(targets * log_p).sum() / targets.sum())
    assert losses[1] < losses[0] / 2


@pytest.mark.slow
def test_texts_and_objectives_make_a_table(finished_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out.jsonl"
    command = [objective, finished_run, "--out", out, "--towns", 2, "--split", "tune", "--arms",
               "the passage: plain", "and untrained notes: in view",
               "and notes of round 3: in view"]

    call(*command, "--svg", tmp_path / "figure.svg")

    plain, untrained, trained = read_lines(out)
    # This run's round 3 is the untrained model.
    assert {**untrained, "arm": "", "seconds": 0} == {**trained, "arm": "", "seconds": 0}
    assert plain["forward"] > .5 and plain["reversed"] < .3
    assert plain["tokens"] < untrained["tokens"]
    shown = capsys.readouterr().out
    assert f"| the passage | plain | {plain['accuracy']:.3f} |" in shown
    drawing = (tmp_path / "figure.svg").read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg") and "in view" in drawing

    monkeypatch.setattr(objective, "measure", None)
    call(*command)
    assert capsys.readouterr().out == shown[shown.index("| text"):]


# ------------------------------------------------------------------------------- skill

def test_the_best_of_two_self_edits_is_learned(monkeypatch, towns):
    written = []

    def write_all(model, tok, asked, seed):
        written.append((model, asked, seed))
        return [f"edit {len(written)}"]

    monkeypatch.setattr(study, "write_all", write_all)
    monkeypatch.setattr(study, "score", lambda model, tok, asked, edits, seed: [.2, .4])
    stream = SimpleNamespace(model="now", tok=None, towns=towns, edits=["an earlier one"], seed=0)

    once = study.next_edit(study.Study(keeping.Arm()), stream, "writer")
    best = study.next_edit(study.Study(keeping.Arm(), tries=2), stream, "writer")

    assert once == "edit 1" and best == "edit 3"
    # The next town, by this writer; the first of two is what would have been written alone.
    assert [asked for _, asked, _ in written] == [[towns[1]]] * 3
    assert {model for model, _, _ in written} == {"writer"}
    assert written[0][2] == written[1][2] != written[2][2]


@pytest.mark.parametrize("frozen, writer", [(False, "now"), (True, "before")])
def test_who_writes_and_who_learns(frozen, writer, monkeypatch):
    loaded = iter([("before", None), ("now", None)])
    monkeypatch.setattr(skill, "load", lambda t, folder: next(loaded))
    monkeypatch.setattr(skill, "ARMS", {"arm": study.Study(keeping.Arm(), frozen=frozen)})
    monkeypatch.setattr(skill, "LENGTH", 1)
    monkeypatch.setattr(skill, "WHEN", (0, 1))
    for module in (skill, study):
        monkeypatch.setattr(module, "write_all",
                            lambda model, tok, towns, seed: [model] * len(towns))
    learned = []
    monkeypatch.setattr(skill, "learn_town", lambda stream, arm, k: learned.extend(stream.edits))
    worth = {("now", "now"): 1, ("before", "now"): 2, ("now", "before"): 3}
    monkeypatch.setattr(skill, "score", lambda model, tok, towns, edits, seed:
                        [worth[model, edit] for edit in edits])

    found = skill.measure("arm", 0, {0: "folder"}, "tune")

    assert learned == [writer]
    # Who writes, who learns, at both times: here the learner is the model, an edit its writer.
    assert found == {"now, now": [1, 1], "now, before": [2, 2], "before, now": [3, 3]}


@pytest.mark.slow
def test_a_stream_is_studied(finished_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(skill, "LENGTH", 2)
    monkeypatch.setattr(skill, "PROBES", 3)
    monkeypatch.setattr(skill, "WHEN", (0, 2))
    out = tmp_path / "out.jsonl"
    command = [skill, finished_run, "--out", out, "--towns", "tune", "--arms", "plain merge",
               "plain merge, frozen writer", "half, layers"]

    call(*command, "--svg", tmp_path / "figure.svg")

    plain, frozen, gentle = read_lines(out)
    for line in (plain, frozen, gentle):
        # Before the stream begins both models are the same.
        first = [line[", ".join(pair)][0] for pair in skill.PAIRS]
        assert len(set(first)) == 1 and first[0] > .3
    assert frozen["now, now"][0] == plain["now, now"][0]
    # Another way to merge makes another learner.
    assert gentle["before, now"] != plain["before, now"]
    shown = capsys.readouterr().out
    assert f"| half, layers | {gentle['now, now'][0]:.3f} |" in shown
    assert ElementTree.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")

    monkeypatch.setattr(skill, "measure", None)
    call(*command)
    assert capsys.readouterr().out == shown[shown.index("\nReward"):]


# ------------------------------------------------------------------------------- vector

def test_a_change_is_added_and_measured(embedded):
    other = load_pretrained(EMBEDDED)
    name = "model.layers.1.mlp.up_proj.weight"
    changes.add(other, {name: torch.ones_like(other.get_parameter(name))}, 0.5)

    found = changes.difference(other, embedded)

    assert list(found) == [name]
    torch.testing.assert_close(found[name], torch.full_like(found[name], 0.5))
    halfway = {name: found[name].clone()}
    halfway[name][::2] = 0
    assert changes.cosine(found, found) == pytest.approx(1)
    assert changes.cosine(found, halfway) == pytest.approx(.5 ** .5)
    # Elsewhere it is 0: then nothing is alike.
    assert changes.cosine(found, {"another": torch.ones(3)}) == 0


@pytest.mark.slow
def test_a_vector_is_added(finished_run, tmp_path, monkeypatch, capsys):
    """This run's v is one weight matrix that became larger, which changes what is written."""
    pytest.importorskip("matplotlib")
    trained = load_pretrained(finished_run / "iter_3")
    with torch.no_grad():
        trained.model.layers[0].self_attn.q_proj.weight *= 3
    trained.save_pretrained(finished_run / "changed")
    shutil.rmtree(finished_run / "iter_3")
    (finished_run / "changed").rename(finished_run / "iter_3")
    monkeypatch.setattr(changes, "LENGTH", 2)
    monkeypatch.setattr(changes, "N_TOWNS", 3)
    out = tmp_path / "out.jsonl"
    command = [vector, finished_run, "--out", out]

    call(*command, "--svg", tmp_path / "figure.svg")

    lines = {line["arm"]: line for line in read_lines(out)}
    assert list(lines) == list(vector.ARMS)
    assert lines["0 v"]["reward"] > .3 and lines["0 v"]["known"] > .3
    assert lines["3 v"]["reward"] < lines["0 v"]["reward"]
    # Of one run the mean is that run's.
    assert lines[vector.MEAN]["reward"] == lines["1 v"]["reward"]
    assert set(lines["1 v"]["cosines"]) == {"v and a town", "two towns"}
    assert f"| 0 v | {lines['0 v']['reward']:.3f} |" in capsys.readouterr().out
    assert ElementTree.parse(tmp_path / "figure.svg").getroot().tag.endswith("svg")
