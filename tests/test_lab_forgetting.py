"""lab/forgetting.py and lab/retention_reward.py, on the embedded model and a few towns."""
import json
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import tinyworld
from engine.train import sft
from inner_loop import make_job
from lab import forgetting, keeping, lost, retention_reward
from lab.remember import scaled
from lab.tiny import RECIPE
from lora import Adapters
from model import load_pretrained
from support.checkpoint import EMBEDDED
from support.files import UserError
from tests.helpers import read_lines
from tests.test_lab import call


@pytest.fixture()
def embedded():
    return load_pretrained(EMBEDDED)


# ------------------------------------------------------------------------------- forgetting

def test_texts_about_other_towns_are_learned_without_their_passages(embedded, words):
    examples = keeping.own_texts(embedded, words, 2, seed=0)

    train = {task.prompt for task in tinyworld.load("train")}
    for ids, learn in examples:
        # The prompt is read and the rest, which the model wrote, is learned.
        prompt = words.decode([i for i, learned in zip(ids, learn) if not learned])
        assert prompt in train
        assert learn == sorted(learn)


def test_a_gate_takes_the_scale_with_the_least_loss(embedded, words, towns):
    """An adapter of one town, by the losses on it and on another that it knows nothing of."""
    recipe = replace(RECIPE, epochs=10)
    job = make_job(embedded, words, towns[0].references["passage only"], 0, recipe)
    other = make_job(embedded, words, towns[1].references["passage only"], 0, recipe)
    ((_, trained),) = sft(embedded, [job])

    def loss_of(scale):
        adapter = Adapters.stack(embedded, RECIPE.lora, [scaled(trained.weights, scale)])
        total = 0
        for examples in (job.examples, other.examples):
            ids = torch.tensor(examples[0][0])
            with adapter.route([len(ids)]):
                logits = embedded(ids[None])[0]
            total += F.cross_entropy(logits[:-1], ids[1:]).item()
        return total

    expected = min(keeping.GRID, key=loss_of)
    assert keeping.best_scale(embedded, job, trained.weights, other.examples) == expected
    assert keeping.best_scale(embedded, job, trained.weights, []) == 1
    assert expected < 1


@pytest.mark.slow
def test_a_stream_is_learned_and_forgotten(finished_run, tmp_path, monkeypatch, capsys):
    """Three arms, on three towns: the figures of the lines, and the same command again."""
    monkeypatch.setattr(forgetting, "LENGTH", 3)
    monkeypatch.setattr(forgetting, "ARMS", {
        "plain merge": keeping.Arm(), "own replay": keeping.Arm(replay=8),
        "kept replay": keeping.Arm(replay=8, kept=True)})
    words = [finished_run, "--out", tmp_path / "f.jsonl", "--towns", "tune"]
    call(forgetting, *words)
    first = capsys.readouterr().out
    plain, own, kept = read_lines(tmp_path / "f.jsonl")
    # Of three towns, none, one and two are rehearsed in ten epochs.
    assert own["written"] * 10 == pytest.approx(own["trained"] - plain["trained"])

    assert [line["arm"] for line in (plain, own, kept)] == list(forgetting.ARMS)
    for line in (plain, kept):
        assert len(line["just after"]) == len(line["at the end"]) == 3
        # Nothing comes after the last town.
        assert line["just after"][-1] == line["at the end"][-1]
        assert line["written"] == 0
    # The first town has nothing to rehearse: all arms are the same until then.
    assert plain["just after"][0] == kept["just after"][0] > .2
    assert kept["trained"] > 1.5 * plain["trained"]
    assert f"| plain merge | {np.mean(plain['just after']):.3f} |" in first

    # All lines are there: nothing is learned again.
    monkeypatch.setattr(forgetting, "learn_stream", None)
    call(forgetting, *words)
    assert capsys.readouterr().out == first[first.index("| arm"):]
    with pytest.raises(UserError, match="lines of another --towns"):
        call(forgetting, *words[:3])


def test_a_table_and_a_figure_by_hand(finished_run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with (tmp_path / "f.jsonl").open("w") as f:
        for seed, end in ((7, .2), (8, .4)):
            f.write(json.dumps({
                "arm": "half", "seed": seed, "just after": [.5] * 4, "at the end": [end] * 4,
                "scale": .5, "trained": 100, "written": 0,
                "seconds": 1}) + "\n")

    call(forgetting, finished_run, "--out", tmp_path / "f.jsonl", "--arms", "half", "--svg",
         tmp_path / "f.svg")

    # Student's t for two values is 12.71; the error of .2 and .4 is .1.
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "| half | 0.500 ±0.000 | 0.300 ±1.271 | 0.50 | 100 | 0 |"
    assert ElementTree.parse(tmp_path / "f.svg").getroot().tag.endswith("svg")


# ------------------------------------------------------------------------------- retention_reward

def test_a_task_asks_about_earlier_towns_too(towns):
    task, *earlier = towns

    asked = lost.with_questions(task, earlier)

    assert asked.queries[:11] == task.queries and asked.answers[22:] == earlier[1].answers
    assert asked.kinds == ["own"] * 11 + ["earlier"] * 22
    right = [True] * 6 + [False] * 5 + [True] * 11 + [False] * 11
    found = lost.learned_and_lost(right, asked, before=.75)
    assert found == (pytest.approx(6 / 11), pytest.approx(.25))


@pytest.mark.slow
def test_the_reward_is_what_was_learned_less_lambda_times_what_was_lost(tmp_path, monkeypatch):
    seen = []
    select, try_edits = retention_reward.select, lost.Round.try_edits

    def spy_on_select(cfg, scores, *rest):
        seen.append(scores)
        return select(cfg, scores, *rest)

    def spy_on_edits(*args):
        edits, found = try_edits(*args)
        seen.append(found)
        return edits, found

    monkeypatch.setattr(retention_reward, "select", spy_on_select)
    monkeypatch.setattr(lost.Round, "try_edits", spy_on_edits)
    monkeypatch.setattr(retention_reward, "ROUNDS", 1)
    monkeypatch.setattr(retention_reward, "EARLIER", 2)
    words = ["--out", tmp_path / "r.jsonl", "--seeds", "0", "--lambdas", "2", "--tasks", "1"]
    call(retention_reward, *words, "--eval-tasks", "1")

    held_out, found, scores, _ = seen
    assert found.shape == (1, 8, 2)
    assert np.array(scores) == pytest.approx(found[..., 0] - 2 * found[..., 1])
    (record,) = read_lines(tmp_path / "r.jsonl")
    assert record["learned"][0] == pytest.approx(held_out[..., 0].mean())
    assert record["lost"][0] == pytest.approx(held_out[..., 1].mean())
    # The towns were learned before, and an edit destroys some of it.
    assert record["known"][0] > .7
    assert len(record["known"]) == 2 and found[..., 1].mean() > .1
    with pytest.raises(UserError, match="lines of another --eval-tasks"):
        call(retention_reward, *words)


def test_the_table_of_lambdas_by_hand(capsys):
    records = []
    for seed, last in ((0, .2), (1, .4)):
        records.append({"lambda": .5, "seed": seed, "learned": [.6, .8], "lost": [.5, last],
                        "known": [.9, .9], "tokens": [70, 80],
                        "made of": [{"copy": 1.0}, {"copy": .4, "rare": .01}]})

    retention_reward.show({.5: records})
    *_, first, last = capsys.readouterr().out.splitlines()

    assert first == "| 0.5 | 0 | 0.600 ±0.000 | 0.500 ±0.000 | 0.100 ±0.000 | copy 100% |"
    assert last == "| 0.5 | 1 | 0.800 ±0.000 | 0.300 ±1.271 | 0.500 ±1.271 | copy 40% |"
