"""The questions of the lab, on the embedded model and a few towns: lines, tables and what they
are made of.
"""
import math
import random
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from data import tinyworld as world
from data.tasks import load_tasks
from engine.train import sft
from inner_loop import TINY, make_job
from lab import (choosing, compute, credit, forgetting, objective, race, retention_reward, speedrun,
                 teacher, tiny, update_rule, vector)
from lab.credit import regress, subsets
from lab.forgetting import Arm, last_layers, recall
from lab.race import Rung
from lab.tiny import RECIPE, SETTINGS
from lora import Adapters, Job, sft_one
from model import load_pretrained
from outer_loop import m_step
from selfedit import SelfEdit, read_self_edit
from support.checkpoint import EMBEDDED
from support.config import PRESETS, Config
from support.files import UserError
from tests.helpers import call, open_run, read_lines, run_rest_em, write_lines

FEW = dict(tasks=2, edits=4, eval_tasks=2, eval_edits=1, iterations=1, inner_epochs=4,
           outer_epochs=2, max_edit_tokens=48)


@pytest.fixture()
def few(monkeypatch):
    for name, value in FEW.items():
        monkeypatch.setitem(SETTINGS, name, value)
        monkeypatch.setitem(PRESETS["tiny"], name, value)


def tiny_run(folder, settings=SETTINGS, **own):
    return open_run(Config(**settings | {"run_dir": str(folder), "baselines": False} | own))


def held_out(run):
    """The rewards of an ordinary run of the outer loop."""
    run_rest_em(run)
    return [m["eval_reward"] for m in run.metrics.records]


@pytest.fixture()
def model():
    return load_pretrained(EMBEDDED, "cpu")


@pytest.fixture(scope="module")
def embedded64():
    """The embedded model in float64. Tests leave it as it is."""
    return load_pretrained(EMBEDDED, "cpu", torch.float64)


@pytest.fixture()
def task(towns):
    return towns[0]


def as_town(task):
    return world.Town(*world.read_passage(task.context[0]), [])


@pytest.fixture()
def ask_twice(tmp_path, monkeypatch):
    """Asks a question, draws if it can, and asks once more with nothing left to measure: its lines
    and what it shows."""
    def ask(program, measure, *words):
        pytest.importorskip("matplotlib")
        out, svg = tmp_path / "out.jsonl", tmp_path / "figure.svg"
        figure = ["--svg", svg] if hasattr(program, "draw") else []
        first = call(program, *words, "--out", out, *figure)
        with monkeypatch.context() as patch:
            patch.setattr(program, measure, None)
            shown = call(program, *words, "--out", out)
        assert shown in first and shown.count("|") > 6
        if figure:
            assert ElementTree.parse(svg).getroot().tag.endswith("svg")
        return read_lines(out), shown
    return ask


# ------------------------------------------------------------------------------- compute


@pytest.mark.slow
def test_the_same_text_teaches_the_same(finished_run, monkeypatch, ask_twice):
    monkeypatch.setattr(compute, "KS", (1, 2))
    lines, shown = ask_twice(
        compute, "measure", finished_run, "--towns", 2, "--arms", "untrained writer",
        "SEAL, round 3", "best notes", "rephrased passages")
    # This run's round 3 is the base model, so it writes the same and learns the same.
    base, seal, best, same = lines
    assert {**base, "arm": "", "seconds": 0} == {**seal, "arm": "", "seconds": 0}
    assert min(best["accuracy"]) > 0.85 and max(same["reversed"]) < 0.3
    assert f"| best notes | {best['accuracy'][0]:.3f} |" in shown


# ------------------------------------------------------------------------------- credit

def test_regression_finds_what_adds_up_and_leaving_one_out_is_a_difference():
    scores = np.array([[.9, .2], [.1, .2], [.8, .1], [.9, .6]])
    design = subsets("leave one out", 3, seed=0)
    assert design.tolist() == [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]
    np.testing.assert_allclose(regress(design, scores), [[.8, 0], [.1, .1], [0, -.4]],
                               atol=1e-12)
    design, effects = subsets("random halves", 5, seed=1), np.arange(10).reshape(5, 2)
    assert (design.mean(axis=0) == 0.5).all()
    np.testing.assert_allclose(regress(design, 3 + design @ effects), effects, atol=1e-9)


def test_auc_by_hand():
    stated = np.array([[True, False], [False, False]])
    assert credit.auc(np.array([[.5, .4], [.5, .9]]), stated) == pytest.approx(1.5 / 3)


def test_subsets_are_learned_in_their_places(model, words, task):
    edit = read_self_edit(task, "\n".join(tiny.best_notes(as_town(task), random.Random(0))[:2]))
    design = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]])
    adapters = credit.learn(model, words, edit, design, seed=4)
    assert not adapters.flat[[0, 3]].any()
    for i, documents in ((1, edit.documents[:1]), (2, edit.documents), (4, edit.documents[2:])):
        job = compute.one_job(model, words, documents, seed=4)
        ((_, alone),) = sft(model, [job])
        distance = (adapters.flat - alone.weights).abs().mean(dim=1)
        assert distance.argmin() == i and distance[i] < 1e-3


def test_the_probability_of_an_answer_is_that_of_its_tokens(model, words, task):
    adapters = Adapters(model, RECIPE.lora, 2)
    adapters.init(1, seed=0)
    adapters.flat[1] += 0.02        # B as well: it changes something

    found = credit.gold_probability(model, words, task, adapters)

    changed = load_pretrained(EMBEDDED, "cpu")
    other = Adapters(changed, RECIPE.lora, 2)
    other.flat.copy_(adapters.flat)
    other.merge(1)
    assert found.shape == (2, len(task.queries))
    assert abs(found[0] - found[1]).max() > 1e-4
    for row, one in zip(found, (model, changed)):
        for j, (query, answer) in enumerate(zip(task.queries, task.answers)):
            ids = words.prompt(query)
            probability = 1.0
            for token in words.encode(" " + answer):
                probability *= one(torch.tensor([ids]))[0, -1].softmax(-1)[token].item()
                ids = ids + [token]
            assert row[j] == pytest.approx(probability, rel=2e-3, abs=1e-9)


@pytest.mark.slow
def test_credit_is_judged_and_drawn(finished_run, monkeypatch, ask_twice):
    monkeypatch.setattr(credit, "PAIRS", 8)
    lines, shown = ask_twice(credit, "measure", finished_run, "--towns", 1)
    assert [r["writer"] for r in lines] == ["untrained", "round 3"]
    assert lines[0]["auc"] == lines[1]["auc"]       # the same writer, in this run
    shares = lines[0]["auc"]
    assert len(shares) == 6 and all(0 <= share <= 1 for share in shares.values())
    assert shares["random halves, probability"] > 0.8
    assert f"{shares['random halves, probability']:.3f}" in shown


# ------------------------------------------------------------------------------- keeping

def learn(model, words, towns, epochs, layers=4):
    """The weights of an adapter, trained on the passages of these towns."""
    passages = SelfEdit(documents=[town.context[0] for town in towns])
    job = make_job(model, words, passages, 0, replace(TINY, epochs=epochs))
    adapter = Adapters(model, TINY.lora, 1)
    adapter.init(0, job.seed)
    job = replace(job, start=adapter.flat[0], free=last_layers(adapter, layers))
    ((_, trained),) = sft(model, [job])
    return trained.weights


def test_an_adapter_of_the_last_layer_changes_no_other_and_at_half_its_scale_half_as_much(
        model, words, towns):
    weights, changes = learn(model, words, towns, epochs=1, layers=1), []
    for scale in (1, .5):
        merged = load_pretrained(EMBEDDED, "cpu")
        Adapters.stack(merged, TINY.lora, [weights * scale ** 0.5]).merge(0)
        changes.append(vector.difference(merged, model))
    whole, half = changes
    assert len(whole) == 7
    assert all(name.startswith("model.layers.3.") for name in whole)
    for name, change in whole.items():
        torch.testing.assert_close(half[name], change / 2, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_what_is_recalled_was_learned_and_not_looked_up(model, words, towns):
    first = recall(model, words, towns, [0, 1, 2])
    Adapters.stack(model, TINY.lora, [learn(model, words, towns, epochs=25)]).merge(0)
    then = recall(model, words, towns, [0, 1, 2])
    for town, edit in zip(towns, first):
        assert edit.documents[-1].startswith(f"The town of {town.name} ")
        assert town.context[0] not in edit.documents
        assert edit.documents[:-1] == edit.text.splitlines()
    right = [edit.documents[-1] == town.context[0] for town, edit in zip(towns, then)]
    assert sum(right) >= 2


@pytest.mark.slow
def test_a_stream_is_learned_and_forgotten(finished_run, monkeypatch, ask_twice):
    monkeypatch.setattr(forgetting, "LENGTH", 4)
    monkeypatch.setattr(forgetting, "ARMS", {
        "plain merge": Arm(), "own replay": Arm(replay=8), "kept replay": Arm(replay=8, kept=True)})
    (plain, own, kept), shown = ask_twice(forgetting, "learn_stream", finished_run)

    assert [line["arm"] for line in (plain, own, kept)] == list(forgetting.ARMS)
    # Of four towns none, one, two and three are rehearsed in ten epochs.
    assert own["written"] * 10 == pytest.approx(own["trained"] - plain["trained"])
    for line in (plain, kept):
        assert len(line["just after"]) == len(line["at the end"]) == 4
        assert line["just after"][-1] == line["at the end"][-1]
        assert line["written"] == 0
    # The first town has nothing to rehearse: all arms are the same until then.
    assert plain["just after"][0] == kept["just after"][0] > .2
    assert kept["trained"] > 1.5 * plain["trained"]
    assert f"| plain merge | {np.mean(plain['just after']):.3f} |" in shown


def test_what_was_learned_and_what_was_lost(towns, monkeypatch):
    """Of the first self-edit six own questions of eleven are right, and half of the others; the
    second can't be read."""
    right = [True] * 6 + [False] * 5 + [True, False] * 11
    records, asked = {(0, 0): {"right": [right]}, (0, 1): {"right": []}}, []
    run = SimpleNamespace(rollouts=SimpleNamespace(at=lambda t, split: records))
    monkeypatch.setattr(retention_reward, "score",
                        lambda run, model, tasks, *rest, n_seeds: asked.extend(tasks))
    found = retention_reward.try_edits(run, None, towns[:1], [["one", "two"]], 0, "train",
                                       towns[1:], known=.75)
    assert found.tolist() == [[[pytest.approx(6 / 11), pytest.approx(.25)], [0, 0]]]
    assert asked[0].queries[:11] == towns[0].queries and asked[0].answers[22:] == towns[2].answers


@pytest.mark.slow
def test_the_reward_is_what_was_learned_less_lambda_times_what_was_lost(
        few, monkeypatch, ask_twice):
    chosen, select = [], tiny.select

    def spy_on_select(cfg, scores, *rest):
        chosen.extend(np.ravel(scores))
        return select(cfg, scores, *rest)

    monkeypatch.setattr(tiny, "select", spy_on_select)
    monkeypatch.setattr(retention_reward, "ROUNDS", 1)
    monkeypatch.setattr(retention_reward, "EARLIER", 2)
    words = "--seeds 0 --lambdas 2 --tasks 1 --eval-tasks 1"
    (line,), shown = ask_twice(retention_reward, "measure", *words.split())

    # The towns were learned before, and a self-edit destroys some of it.
    assert line["known"][0] > .7 and len(line["known"]) == 2
    assert len(chosen) == FEW["edits"] and line["lost"][0] > 0
    assert min(chosen) < max(line["learned"])       # the loss is taken off
    assert f"| 2 | 0 | {line['learned'][0]:.3f} | {line['lost'][0]:.3f} |" in shown


# ------------------------------------------------------------------------------- objective

def test_plain_text_is_learned_as_ever(model, words, towns):
    town = towns[0]
    documents = ["The river Verier flows through it.", town.context[0]]
    recipe = replace(RECIPE, epochs=3, batch=10)
    examples = []
    for document in documents:
        examples += objective.plain(model, words, town, document, None)
    found = objective.learn(model, Job(examples, 5, recipe))
    edit = replace(town.references["passage only"], documents=documents)
    job = make_job(model, words, edit, 5, recipe)
    torch.testing.assert_close(found, sft_one(model, job).weights, rtol=1e-3, atol=1e-4)


def test_a_masked_text_is_read_and_the_whole_one_learned(model, words, towns):
    passage = towns[0].context[0]

    examples = objective.masked(model, words, towns[0], passage, random.Random(0))

    assert len(examples) == objective.MASKINGS
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


def test_in_view_the_next_token_is_as_likely_as_with_the_passage(model, words, towns):
    town = towns[0]
    ((ids, targets),) = objective.in_view(model, words, town, "The river", None)
    read = words.prompt(town.prompt)
    for j in range(len(ids) - 1):
        expected = model(torch.tensor([read + ids[:j + 1]]))[0, -1].softmax(-1)
        torch.testing.assert_close(targets[j], expected)
    assert targets[-1].sum() == 0
    # The passage says which river it is; a model without it can't know.
    alone = model(torch.tensor([ids]))[0, -2].softmax(-1)
    assert (targets[-2] - alone).abs().max() > .1


@pytest.mark.slow
def test_texts_and_objectives_make_a_table(finished_run, ask_twice):
    (plain, untrained, trained), shown = ask_twice(
        objective, "measure", finished_run, "--towns", 2, "--arms",
        "the passage: plain", "and untrained notes: in view", "and notes of round 3: in view")
    assert {**untrained, "arm": "", "seconds": 0} == {**trained, "arm": "", "seconds": 0}
    assert plain["forward"] > .5 and plain["reversed"] < .3
    assert plain["tokens"] < untrained["tokens"]
    assert f"| the passage | plain | {plain['accuracy']:.3f} |" in shown


@pytest.mark.slow
def test_a_stream_is_studied(finished_run, monkeypatch, ask_twice):
    monkeypatch.setattr(forgetting, "LENGTH", 2)
    monkeypatch.setattr(forgetting, "PROBES", 3)
    monkeypatch.setattr(forgetting, "WHEN", (0, 2))
    (plain, frozen, gentle), shown = ask_twice(
        forgetting, "probe", "--skill", finished_run, "--arms", "plain merge",
        "plain merge, frozen writer", "half, layers")
    for line in (plain, frozen, gentle):
        first = [line[", ".join(pair)][0] for pair in forgetting.PAIRS]
        assert len(set(first)) == 1 and first[0] > .3
    assert frozen["now, now"][0] == plain["now, now"][0]
    assert gentle["before, now"] != plain["before, now"]
    assert f"| half, layers | {gentle['now, now'][0]:.3f} |" in shown


# ------------------------------------------------------------------------------- vector

def test_a_change_is_added_and_measured(model):
    other = load_pretrained(EMBEDDED)
    name = "model.layers.1.mlp.up_proj.weight"
    vector.add(other, {name: torch.ones_like(other.get_parameter(name))}, 0.5)
    found = vector.difference(other, model)
    assert list(found) == [name]
    torch.testing.assert_close(found[name], torch.full_like(found[name], 0.5))
    halfway = {name: found[name].clone()}
    halfway[name][::2] = 0
    assert vector.cosine(found, found) == pytest.approx(1)
    assert vector.cosine(found, halfway) == pytest.approx(.5 ** .5)
    assert vector.cosine(found, {"another": torch.ones(3)}) == 0


@pytest.mark.slow
def test_a_vector_is_added(finished_run, monkeypatch, ask_twice):
    """This run's v is one weight matrix that became larger, which changes what is written."""
    shutil.rmtree(finished_run / "iter_3")
    trained = load_pretrained(EMBEDDED)
    trained.model.layers[0].self_attn.q_proj.weight.data *= 3
    trained.save_pretrained(finished_run / "iter_3")
    monkeypatch.setattr(vector, "LENGTH", 2)
    monkeypatch.setattr(vector, "N_TOWNS", 3)
    found, shown = ask_twice(vector, "measure", finished_run)

    lines = {line["arm"]: line for line in found}
    assert list(lines) == list(vector.ARMS)
    assert lines["0 v"]["reward"] > .3 and lines["0 v"]["known"] > .3
    assert lines["3 v"]["reward"] < lines["0 v"]["reward"]
    assert lines[vector.MEAN]["reward"] == lines["1 v"]["reward"]
    assert set(lines["1 v"]["cosines"]) == {"v and a town", "two towns"}
    assert f"| 0 v | {lines['0 v']['reward']:.3f} |" in shown


# ------------------------------------------------------------------------------- scores

def test_the_product_is_the_change_of_loss_after_a_small_step(words, task):
    model = load_pretrained(EMBEDDED, "cpu", torch.float64)
    untrained = Adapters(model, RECIPE.lora, 1)
    document = words.document(task.context[0])
    learned, asked = [(document, [True] * len(document))], tiny.gold(words, task)
    wanted = race.gradient(model, untrained, asked)
    own = race.gradient(model, untrained, learned)
    with torch.no_grad():
        before = race.loss(model, untrained, asked).item()
    assert not any(weight.requires_grad for weight in model.parameters())

    # A small step down the gradient of the document, on all adapted layers.
    step, layers = 1e-4, list(untrained.layers.values())
    parts = own.split([layer.weight.numel() for layer in layers])
    for layer, part in zip(layers, parts):
        layer.weight -= step * part.view_as(layer.weight)
    with torch.no_grad():
        after = race.loss(model, untrained, asked).item()
    assert (before - after) / step == pytest.approx((own @ wanted).item(), rel=1e-2)


def test_an_inner_loop_does_not_judge_what_it_chose():
    # One self-edit is lucky in one seed; by the other seeds it is worth nothing.
    whole = np.full((1, 4, 6), 0.5)
    whole[0, 0] = [1, 0, 0, 0, 0, 0]
    rows = {name: [[1, 2, 3, 4]] for name in choosing.SCORES}
    tried = [{"seed": seed, "whole": whole, "half": whole[:, :, :1]} for seed in (7, 8)]
    scored = [{"seed": 7, "scores": rows | {"of old": [[0, 0, 0, 0]]}}]

    found, judges = choosing.choosers({"choosing": tried, "scores": scored})

    assert list(found) == list(choosing.COSTS)
    assert judges[0, 0].tolist() == pytest.approx([0, .2, .2, .2, .2, .2])
    assert judges.shape == whole.shape          # seed 8 has no scores
    by_loop = choosing.worth(found[choosing.LOOP], judges, 4)
    by_score = choosing.worth(found["number of tokens"], judges, 4)
    assert by_score == pytest.approx([.5])
    assert by_loop == pytest.approx([(.25 + 5 * .5) / 6])


@pytest.mark.slow
def test_the_self_edits_of_a_run_are_scored(whole, tmp_path, monkeypatch):
    rollouts = whole.rollouts.of(0, "train")
    command = [choosing, "--run", whole.folder, "--out", tmp_path / "out.jsonl"]

    assert "\n| cosine | " in call(*command)

    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["task"] for line in lines] == [0, 1]
    for line in lines:
        own = [r for r in rollouts if r["task"] == line["task"]]
        for j, r in enumerate(sorted(own, key=lambda r: r["edit"])):
            assert np.mean(line["accuracy"][j]) == pytest.approx(r["reward"], abs=1e-3)
            assert line["documents"][j] == r["documents"]
            # The sizes of gradients do not count in a cosine, its sign is that of the product.
            assert line["product"][j] * line["cosine"][j] >= 0 and abs(line["cosine"][j]) <= 1
    monkeypatch.setattr(choosing, "products", None)
    call(*command)


# ------------------------------------------------------------------------------- speedrun

def entry(name, seed, reward, seconds):
    return {"name": name, "flags": ["--iterations", "2"], "seed": seed, "date": "2026-01-01",
            "commit": "abc", "machine": "a machine", "reward": reward, "seconds": seconds}


def test_an_entry_is_the_median_of_its_seeds_and_the_fastest_comes_first(capsys):
    slow = [entry("slow", s, [0.6, 0.8], [5, 60 + s]) for s in range(5)]
    # Two of five never reach it; the median does.
    fast = [entry("fast", s, [0.6, 0.8 if s < 3 else 0.7], [5, 30 + s]) for s in range(5)]
    speedrun.table(slow + fast)
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("| 32 | fast | --iterations 2 | 3 of 5 | 0.760 |")
    assert lines[1].startswith("| 62 | slow | --iterations 2 | 5 of 5 | 0.800 |")


@pytest.mark.parametrize("word", ["--eval-tasks", "--model", "--inner-lr", "--seed", "--run-dir",
                                  "--max-edit-tokens", "--clip", "--weight-decay"])
def test_an_entry_may_not_change_the_task(word, tmp_path):
    with pytest.raises(UserError, match="may not change"):
        call(speedrun, "--name", "a", "--out", tmp_path / "s.jsonl", word, "1")


def test_only_what_is_missing_is_run_and_other_flags_are_another_entry(tmp_path, monkeypatch):
    out = tmp_path / "s.jsonl"
    write_lines(out, [entry("a", s, [0.8], [9.0]) for s in (0, 1, 3, 4)])
    measured = []

    def measure(flags, seed):
        measured.append((flags, seed))
        return entry("a", seed, [0.8], [9.0]) | {"flags": flags}

    monkeypatch.setattr(speedrun, "measure", measure)
    call(speedrun, "--name", "a", "--out", out, "--iterations", "2")
    assert measured == [(["--iterations", "2"], 2)]
    shown = call(speedrun, "--name", "a", "--out", out, "--iterations", "3")
    assert measured[1:] == [(["--iterations", "3"], seed) for seed in range(5)]
    assert shown.splitlines()[-1].startswith("| 9 | a | --iterations 3 | 5 of 5")


@pytest.mark.slow
def test_a_run_is_an_ordinary_one():
    flags = ["--iterations", "1", "--tasks", "2", "--edits", "2", "--outer-epochs", "1"]
    record = speedrun.measure(flags, 3)
    assert len(record["reward"]) == len(record["seconds"]) == 2
    assert 0 < record["seconds"][0] < record["seconds"][1]
    assert record["machine"].endswith("threads")


# ------------------------------------------------------------------------------- teacher

@pytest.mark.slow
@pytest.mark.parametrize("arm", ["small teaches itself (SEAL)", "large teaches itself (SEAL)"])
def test_who_teaches_itself_is_the_outer_loop(few, arm, tmp_path):
    """Here both models are the embedded one."""
    found = teacher.learn(arm, 3, str(EMBEDDED))["reward"]
    run = tiny_run(tmp_path, PRESETS["tiny"], seed=3)
    assert found["itself"] == held_out(run)
    # The students do not change, and are the same.
    assert found["small"] == found["large"]
    assert found["small"][0] == found["itself"][0]


@pytest.mark.slow
def test_the_student_is_what_is_rewarded_and_the_teacher_what_is_trained(few, monkeypatch):
    rewarded, fixed, trained, score = [], {}, [], teacher.score

    def spy_on_scores(run, model, tasks, edits, t, split, *rest, arm):
        assert arm == run.folder.name       # who learns, and whose tokenizer and recipe
        if split == "train":
            rewarded.append((arm, model))
        else:
            fixed[arm] = model
        return score(run, model, tasks, edits, t, split, *rest, arm=arm)

    monkeypatch.setattr(teacher, "score", spy_on_scores)
    monkeypatch.setattr(tiny, "m_step", lambda cfg, run, model, *rest: trained.append(model))
    teacher.learn("large teaches small", 0, str(EMBEDDED))

    assert rewarded == [("small", fixed["small"])]
    (policy,) = trained
    assert policy is not fixed["small"] and policy is not fixed["large"]


# ------------------------------------------------------------------------------- update rules

@pytest.mark.slow
def test_runs_are_measured_once_each(few, ask_twice):
    arms = ["best 2 of 8", "best 2 of 4", "grpo, K = 8"]
    lines, _ = ask_twice(update_rule, "measure", "--seeds", "0", "1", "--arms", *arms)
    found = [(r["arm"], r["seed"]) for r in lines]
    assert found == [(arm, 0) for arm in arms] + [(arm, 1) for arm in arms]
    for r in lines:
        # 2 towns, 4 self-edits, 4 steps. Of each town 2 are learned in 2 epochs; by advantage those
        # that differ from their mean, in 1.
        assert r["inner steps"] == 2 * 4 * 4
        assert len(r["reward"]) == len(r["distinct"]) == 2
    assert lines[0]["outer steps"] == 2
    assert lines[2]["outer steps"] == 1
    assert lines[0]["reward"][0] == lines[1]["reward"][0] != lines[3]["reward"][0]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["eval", "tune"])
def test_the_default_rule_is_the_default_run(split, few, tmp_path, monkeypatch):
    monkeypatch.setattr(update_rule, "SHORT", {})
    line = {"split": split, "arm": "best 2 of 8", "lr": 2e-3, "seed": 0}
    found = update_rule.measure(line)
    assert found["reward"] == held_out(tiny_run(tmp_path / "run", eval_data=split))


def rule_line(arm, seed, last, split="eval"):
    return {"split": split, "arm": arm, "lr": update_rule.RULES[arm][1], "seed": seed,
            "reward": [0.5, 0.6, last], "inner steps": 100, "outer steps": 10,
            "distinct": [80, 20]}


def test_the_table_by_hand(tmp_path):
    records = [rule_line("grpo, K = 8", 0, 0.4), rule_line("best 2 of 8", 0, 0.7),
               rule_line("best 2 of 8", 1, 0.9), rule_line("best 2 of 8", 0, 0.1, split="tune")]
    write_lines(tmp_path / "out", records)

    # That seed is there already: nothing is left to do.
    out = call(update_rule, "--out", tmp_path / "out", "--seeds", "0", "--arms", "grpo, K = 8")

    *_, best, by_advantage = out.strip().splitlines()
    # Gains of .2 and .4: their deviation is .2 / sqrt 2, and Student's t for two values 12.71.
    half = 12.71 * 0.2 / math.sqrt(2) / math.sqrt(2)
    assert best == ("| best 2 of 8 | 0.004 | 0.500 -> 0.600 -> 0.800 | "
                    f"+0.300 ±{half:.3f} | +0.000 ±0.000 | 0.141 | +0.200 | 100 | 10 | "
                    "80 -> 20 |")
    assert by_advantage.startswith("| grpo, K = 8 | 0.004 | 0.500 -> 0.600 -> 0.400 | -0.100 "
                                  "| -0.300 |")


UP, DOWN = math.log(1.3), math.log(0.7)


@pytest.mark.parametrize("new, old, advantage, beta, expected", [
    # Where theta is theta_t the gradient is REINFORCE's.
    ([-1.0, -2.0], [-1.0, -2.0], 3.0, 0.5, [1.5, 1.5]),
    # Likelier by 1.3 already, and to be likelier: no more. To be less likely: back.
    ([UP, 0.0], [0.0, 0.0], 1.0, 0.0, [0.0, 0.5]),
    ([UP, 0.0], [0.0, 0.0], -1.0, 0.0, [-0.65, -0.5]),
    ([DOWN, 0.0], [0.0, 0.0], -1.0, 0.0, [0.0, -0.5]),
    # KL alone draws back, by 1 - exp(old - new).
    ([0.1], [0.0], 0.0, 1.0, [math.exp(-0.1) - 1]),
    ([-0.1], [0.0], 0.0, 1.0, [math.exp(0.1) - 1])])
def test_the_gradient_of_the_clipped_objective_by_hand(new, old, advantage, beta, expected):
    new = torch.tensor(new, requires_grad=True)
    update_rule.objective(new, torch.tensor(old), advantage, 0.2, beta).backward()
    assert new.grad.tolist() == pytest.approx(expected)
    same = torch.zeros(3)
    assert update_rule.objective(same, same, 0.0, 0.2, 1.0) == 0


@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_a_first_step_is_that_of_the_plain_m_step(advantage, few, tmp_path):
    """Before anything is clipped: one self-edit, one step, no KL term."""
    weights = []
    clipped = partial(update_rule.clipped_m_step, eps=0.2, beta=0.0)
    for name, rule in (("plain", m_step), ("clipped", clipped)):
        run = tiny_run(tmp_path / name, outer_epochs=1)
        task, model = load_tasks(run, "tune")[0], run.load(0)
        edit = SelfEdit(token_ids=run.tok.encode("A heron is on its flag."))
        before = model.model.layers[0].mlp.up_proj.weight.clone()
        rule(run.cfg, run, model, [(task, edit, advantage)], 0)
        weights.append(model.model.layers[0].mlp.up_proj.weight - before)
    assert weights[0].abs().max() > 1e-5
    assert torch.allclose(*weights, atol=1e-6)


# ------------------------------------------------------------------------------- races

HALF = 1 / 2


@pytest.mark.parametrize("rungs, table, scores, loops, second", [
    # More seeds go to the contenders.
    ([Rung(1, 1), Rung(HALF, 2)], [[0.1, 1, 1], [0.5, 0.1, 0.3], [0.4, 0.6, 0.5], [0.0, 1, 1]],
     [0.1 - 1, 0.3, 0.5, 0.0 - 1], 4 + 2 * 2, [1, 2]),
    # Of equals the first goes on.
    ([Rung(1, 1), Rung(HALF, 1)], [[0.5, 0.5]] * 4, [0.5, 0.5, -0.5, -0.5], 4 + 2, [0, 1]),
    # What was measured after half of the steps does not count in the end.
    ([Rung(1, 1, HALF), Rung(2 / 3, 1)], [[0.9, 0.2], [0.8, 0.4], [0.1, 1.0]],
     [0.2, 0.4, 0.1 - 1], 3 / 2 + 2, [0, 1]),
    # Who left first ends last.
    ([Rung(1, 1), Rung(3 / 4, 1), Rung(HALF, 1)],
     [[0.9, 0.3, 0.3], [0.8, 0.1, 0.1], [0.1] * 3, [0.7, 0.7, 0.7]],
     [0.5, 0.45 - 1, 0.1 - 2, 0.7], 4 + 3 + 2, [0, 1, 3])])
def test_a_race_by_hand(rungs, table, scores, loops, second):
    """Of two tasks with the same accuracies, table[self-edit][seed]."""
    asked = []

    def run_rung(pairs, rung, first):
        asked.append(pairs)
        return [table[j][first:first + rung.seeds] for _, j in pairs]

    found, taken = race.race(rungs, 2, len(table), run_rung)
    assert found.tolist() == [pytest.approx(scores)] * 2 and taken == 2 * loops
    assert asked[1] == [(i, j) for i in (0, 1) for j in second]


def test_the_worth_of_a_choice_is_judged_by_other_seeds():
    # The first half has worth .5 whatever the seed; the others look better by luck, once in six.
    whole = np.full((1, 4, 6), 0.5)
    whole[0, 2:] = [1.0, 0, 0, 0, 0, 0]
    (value,), loops = choosing.worth_by_race([Rung(1, 3)], whole, None, 4, draws=400)
    alike = np.full((1, 4, 6), 0.5)
    (all_equal,), _ = choosing.worth_by_race([Rung(1, 1)], alike, None, 4, draws=2)
    # A lucky one has a mean of 1/3 by three seeds, so it is never chosen; nor by them judged.
    assert (value, loops) == (pytest.approx(0.5), 4 * 3)
    assert all_equal == 0.5
    (by_one,), _ = choosing.worth_by_race([Rung(1, 1)], whole, None, 4, draws=400)
    assert 0.3 < by_one < 0.5       # luck is chosen, and is not there when it is judged


@pytest.mark.slow
def test_with_one_seed_for_all_a_race_is_the_outer_loop(few, tmp_path):
    found = race.learn("one seed", 3)
    assert found["reward"] == held_out(tiny_run(tmp_path / "run", seed=3))
    assert found["inner loops"] == 2 * 4


@pytest.mark.slow
def test_both_questions_about_races(few, ask_twice):
    ask_twice(choosing, "try_often", "--seeds", "0")
    (choice, full, raced, twice, products), _ = ask_twice(
        race, "learn", "--seeds", "0", "--rules", "three seeds", "one, one more for 1/2",
        "twice the self-edits, half the steps", race.PRODUCT)
    assert np.shape(choice["whole"]) == (2, 8, 6)
    assert np.shape(choice["half"]) == (2, 8, 1)
    loops = [r["inner loops"] for r in (full, raced, twice, products)]
    assert loops == [24, 8 + 2 * 2, 16 / 2, 0]
    assert len({r["reward"][0] for r in (full, raced, twice, products)}) == 1
