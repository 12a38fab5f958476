"""lab/scores.py and lab/proxy.py: scores without an inner loop, and what a choice by them is worth.
"""
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import judges
from data.judges import each
from engine.train import sft
from lab import proxy, proxy_run, ranking, scores
from lab.tiny import RECIPE
from lora import Adapters, Job
from model import load_pretrained
from selfedit import SelfEdit, read_self_edit
from support.checkpoint import EMBEDDED
from tests.helpers import SMALL, even_length, read_lines, run_it
from tests.test_lab import call


@pytest.fixture(scope="module")
def embedded64():
    """The embedded model in float64. Tests leave it as it is."""
    return load_pretrained(EMBEDDED, "cpu", torch.float64)


# ------------------------------------------------------------------------------- scores

def test_gold_answers_alone_are_learned(words, towns):
    plain, noted = (scores.gold(words, towns[0], notes) for notes in ("", "A note.\n\n"))

    assert len(plain) == len(towns[0].queries)
    for (ids, learn), (long_ids, long_learn), query, answer in zip(
            plain, noted, towns[0].queries, towns[0].answers):
        read = len(ids) - sum(learn)
        assert ids[:read] == words.prompt(query)
        assert words.decode(ids[read:]) == " " + answer
        assert long_ids[-sum(learn):] == ids[-sum(learn):]
        assert words.decode(long_ids).startswith("A note.\n\n" + query)
        assert sum(long_learn) == sum(learn)


def test_the_product_is_the_change_of_loss_after_a_small_step(embedded64, words, towns):
    model, task = embedded64, towns[0]
    untrained = Adapters(model, RECIPE.lora, 1)
    document = words.document(task.context[0])
    learned, asked = [(document, [True] * len(document))], scores.gold(words, task)
    wanted = scores.gradient(model, untrained, asked)
    own = scores.gradient(model, untrained, learned)
    with torch.no_grad():
        before = scores.loss(model, untrained, asked).item()
    assert not any(weight.requires_grad for weight in model.parameters())

    # A small step down the gradient of the document, on all adapted layers, and back again.
    step, start = 1e-4, 0
    layers = untrained.layers.values()
    old = [layer.weight.clone() for layer in layers]
    for layer in layers:
        part = own[start:start + layer.weight.numel()]
        layer.weight -= step * part.view_as(layer.weight)
        start += layer.weight.numel()
    with torch.no_grad():
        after = scores.loss(model, untrained, asked).item()
    for layer, weight in zip(layers, old):
        layer.weight.copy_(weight)

    assert start == len(own)
    assert (before - after) / step == pytest.approx((own @ wanted).item(), rel=1e-2)


def test_scores_by_hand(embedded64, words, towns):
    task = towns[0]
    edits = [read_self_edit(task, text) for text in ("It is calm.", "It is calm.\nIt is old.")]

    one, two = scores.score(embedded64, words, task, edits, [3, 4])

    assert list(one) == list(two) == list(scores.SCORES)
    documents = [words.document(text) for text in edits[1].documents]
    assert len(documents) == 3                  # the passage is one of them
    assert two["number of tokens"] == sum(map(len, documents)) > one["number of tokens"]
    assert two["answers that its lines state"] == 0
    job = Job([(ids, [True] * len(ids)) for ids in documents], 4, replace(RECIPE, epochs=1))
    (trained,) = [trained for _, trained in sft(embedded64, [job])]
    adapter = Adapters.stack(embedded64, RECIPE.lora, [trained.weights])
    with torch.no_grad():
        alone = scores.loss(embedded64, adapter, scores.gold(words, task)).item()
    assert two["answers after one step"] == pytest.approx(-alone, rel=1e-6)


def test_notes_that_state_the_answers_score_higher(words, towns):
    model, task = load_pretrained(EMBEDDED, "cpu"), towns[0]
    facts = [f"{question} {answer}." for question, answer in zip(task.questions, task.answers)]
    edits = [read_self_edit(task, "\n".join(lines)) for lines in (["It is calm."], facts)]

    idle, useful = scores.score(model, words, task, edits, [0, 0])

    for name in ("inner product of gradients", "answers after one step",
                 "answers, notes in the prompt"):
        assert useful[name] > idle[name], name


def test_an_empty_self_edit_is_chosen_last(embedded64, words, towns):
    task = towns[0]
    edits = [SelfEdit(), read_self_edit(task, "It is calm.")]

    empty, other = scores.score(embedded64, words, task, edits, [3, 4])

    assert list(empty) == list(scores.SCORES)
    assert all(empty[name] < other[name] for name in scores.SCORES)
    json.dumps(empty, allow_nan=False)          # a line can hold it


# ------------------------------------------------------------------------------- results

def test_ranks_and_their_correlation_by_hand():
    values = np.reshape([10.0, 30, 20, 20], (1, 4, 1))

    assert ranking.ranks(values)[0, :, 0].tolist() == [-3, 3, 0, 0]
    assert ranking.correlation(values, np.exp(values)) == pytest.approx(1)
    assert ranking.correlation(values, -values) == pytest.approx(-1)
    assert ranking.correlation(values, np.ones_like(values)) == 0
    # 1 - 6 (sum of squared differences of ranks) / (n^3 - n), without ties.
    a, b = np.reshape([1.0, 2, 3, 4], (1, 4, 1)), np.reshape([2.0, 1, 4, 3], (1, 4, 1))
    assert ranking.correlation(a, b) == pytest.approx(1 - 6 * 4 / 60)


def test_the_worth_of_a_choice_by_hand():
    scores = np.reshape([1.0, 4, 3, 2, 9, 8, 7, 6], (1, 8, 1))
    judges = np.reshape([0.0, .4, .2, 1, .1, .3, 1, 1], (1, 8, 1))

    # Of each four the two with the highest scores.
    assert ranking.worth(scores, judges, 4) == pytest.approx([(.3 + .2) / 2])
    assert ranking.worth(scores, judges, 8) == pytest.approx([.2])


def test_an_inner_loop_does_not_judge_what_it_chose():
    # One self-edit is lucky in one seed; by the other seeds it is worth nothing.
    whole = np.full((1, 4, 6), 0.5)
    whole[0, 0] = [1, 0, 0, 0, 0, 0]
    rows = {name: [[1, 2, 3, 4]] for name in proxy.SCORES}
    records = [{"part": "choosing", "seed": 7, "whole": whole, "half": whole[:, :, :1]},
               {"part": "choosing", "seed": 8, "whole": whole, "half": whole[:, :, :1]},
               {"part": "scores", "seed": 7, "scores": rows | {"of old": [[0, 0, 0, 0]]}}]

    found, judges = proxy.choosers(records)

    assert list(found) == list(proxy.COSTS)
    assert judges[0, 0].tolist() == pytest.approx([0, .2, .2, .2, .2, .2])
    assert judges.shape == whole.shape          # seed 8 has no scores
    by_loop = ranking.worth(found[proxy.LOOP], judges, 4)
    by_score = ranking.worth(found["number of tokens"], judges, 4)
    assert by_score == pytest.approx([.5])
    assert by_loop == pytest.approx([(.25 + 5 * .5) / 6])


def test_lines_that_are_there_are_not_measured_again(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    out, rng = tmp_path / "out.jsonl", np.random.default_rng(0)
    whole = rng.random((3, 4, 6))
    lines = [{"part": "learning", "seed": 1},
             {"part": "choosing", "seed": 1, "whole": whole.tolist(),
              "half": whole[:, :, :1].tolist()}]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = []

    def measure(seed):
        asked.append(seed)
        return {"scores": {name: whole.mean(axis=2).tolist() for name in scores.SCORES}}

    monkeypatch.setattr(proxy, "measure", measure)
    monkeypatch.setattr(proxy, "try_often", None)
    # Intervals of 10,000 draws take seconds.
    for module in ("lab.proxy", "lab.show"):
        monkeypatch.setattr(f"{module}.bootstrap_ci", lambda values: [min(values), max(values)])
    command = [proxy, "--out", out, "--seeds", 1]

    call(*command, "--svg", tmp_path / "figure.svg")
    first = capsys.readouterr().out
    call(*command)

    assert asked == [1] and first == "scores, 1: 0 s\n" + capsys.readouterr().out
    assert "3 towns, 4 self-edits each" in first and f"| {whole.mean():.3f} |" in first
    assert "an inner loop (SEAL)" in (tmp_path / "figure.svg").read_text()


def test_a_line_has_a_score_for_each_self_edit(words, towns, monkeypatch):
    model, edits = load_pretrained(EMBEDDED, "cpu"), []
    for task in towns[:2]:
        edits.append([read_self_edit(task, text) for text in ("It is calm.", "It is old.", "It.")])
    run = SimpleNamespace(tok=words)
    monkeypatch.setattr(proxy, "written", lambda seed: (run, model, towns[:2], edits))

    found = proxy.measure(0)["scores"]

    assert {name: np.shape(rows) for name, rows in found.items()} == dict.fromkeys(
        scores.SCORES, (2, 3))
    # Each has an adapter of its own.
    assert len(set(found["answers after one step"][0])) == 3


def test_the_self_edits_of_a_run_are_scored(tiny_folder, passages, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(judges.RULES, "rule", each(even_length))
    flags = ["--model", tiny_folder, "--train-data", passages, "--eval-data", passages,
             *SMALL.split(), "--iterations", "1", "--run-dir", tmp_path / "run"]
    rollouts = [r for r in run_it(flags).rollouts.records if r["split"] == "train"]
    words = ["proxy_run.py", tmp_path / "run", "--out", tmp_path / "out.jsonl"]
    monkeypatch.setattr("sys.argv", [str(word) for word in words])

    proxy_run.main()

    lines = read_lines(tmp_path / "out.jsonl")
    assert [line["task"] for line in lines] == [0, 1]
    for line in lines:
        own = [r for r in rollouts if r["task"] == line["task"]]
        for j, r in enumerate(sorted(own, key=lambda r: r["edit"])):
            assert np.mean(line["accuracy"][j]) == pytest.approx(r["reward"], abs=1e-3)
            assert line["documents"][j] == r["documents"]
            # The sizes of gradients do not count in a cosine, its sign is that of the product.
            assert line["product"][j] * line["cosine"][j] >= 0 and abs(line["cosine"][j]) <= 1
    assert re.search(r"^\| cosine \| -?[\d.]+ \[", capsys.readouterr().out, re.MULTILINE)
    # What is known is not measured again.
    monkeypatch.setattr(proxy_run, "products", None)
    proxy_run.main()
