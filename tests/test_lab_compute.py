"""lab.compute and lab.credit: many self-edits at once, and what each of their lines teaches."""
import json
import random

import numpy as np
import pytest
import torch

from data import tinyworld as world
from engine.train import sft
from lab import compute, credit, diversity, together, truth, writers
from lab import credit_of_run as credit_of_a_run
from lab.credit_of_run import regress, subsets
from lab.crossing import crossing, crossings
from lab.tiny import RECIPE
from lora import Adapters
from model import load_pretrained
from outer_loop import rest_em
from selfedit import read_self_edit
from support.checkpoint import EMBEDDED
from support.config import PRESETS, Config
from support.files import UserError
from support.run import Run
from support.tokenizer import Tokenizer
from tests.helpers import read_lines
from tests.test_lab import call


@pytest.fixture(scope="module")
def embedded():
    """The embedded model, its tokenizer, and a held-out town as a task and as a Town."""
    model = load_pretrained(EMBEDDED, "cpu")
    task = world.load("tune")[0]
    town = world.Town(*world.read_passage(task.context[0]), [])
    return model, Tokenizer.from_pretrained(EMBEDDED), task, town


# ------------------------------------------------------------------------------- compute

def test_a_document_that_is_repeated_may_be_weighed_instead(embedded):
    # In float64, as ten steps of AdamW blow up what float32 rounds.
    model, tok = load_pretrained(EMBEDDED, "cpu", torch.float64), embedded[1]
    documents = ["The river of A is B.", "It is calm.", "It is calm.", "It is calm."]
    weighed = together.one_job(model, tok, documents, seed=3)
    plain = together.one_job(model, tok, [], seed=3)
    for text in documents:
        ids = tok.document(text)
        plain.examples.append((ids, [1] * len(ids)))
    once = together.one_job(model, tok, documents[:2], seed=3)

    trained = dict(sft(model, [weighed, plain, once]))

    assert len(weighed.examples) == 2 and len(plain.examples) == 4
    torch.testing.assert_close(trained[0].weights, trained[1].weights, atol=1e-9, rtol=1e-6)
    assert (trained[0].weights - trained[2].weights).abs().max() > 0.01


def test_where_curves_cross_by_hand():
    ks = (1, 2, 4, 8)

    # Halfway between 2 and 4, by their logarithms.
    assert crossing(ks, [0, 0, 1, 1], [.5] * 4) == pytest.approx(2 * 2 ** .5)
    assert crossing(ks, [.6, .6, .7, .5], [.5] * 4) == 1
    assert crossing(ks, [.9, .9, .9, .4], [.5] * 4) is None
    # An early lead that is lost again does not count.
    assert crossing(ks, [.9, .4, .4, .6], [.5] * 4) == pytest.approx(4 * 2 ** .5)
    assert crossings(ks, [([0, 0, 1, 1], [.5]), ([0, 0, 0, 0], [.5])]) == "2.8, in 1 of 2"
    assert crossings(ks, [([0, 0, 0, 0], [.5])]) == "in none of 1"


def test_writers_that_know_the_world(embedded):
    _, _, task, town = embedded
    passage = task.context[0]

    def covered(lines):
        found = diversity.of_town([read_self_edit(task, "\n".join(lines))], passage)
        return [found["facts covered, forward"], found["facts covered, reversed"]]

    forms = set()
    for s in range(30):
        lines = writers.one_form(town, random.Random(s))
        (form,) = {world.classify(line, passage) for line in lines}
        forms.add(form)
        assert covered(lines) == ([0, 1] if form.endswith("reversed") else [1, 0])
    assert forms == set(world.FORMS)
    assert covered(writers.best_notes(town, random.Random(0))) == [1, 1]
    (other,) = writers.rephrased(town, random.Random(0))
    assert world.read_passage(other) == world.read_passage(passage)


def test_diversity_by_hand(embedded):
    _, _, task, town = embedded
    one = read_self_edit(task, town.say("river", "plain", random.Random(0))
                         if "river" in town.facts else "It is calm.")
    found = diversity.of_town([one] * 4, task.context[0])

    assert found["distinct lines"] == 1 / 4
    assert found["compression"] > diversity.of_town([one], task.context[0])["compression"]


def test_a_given_beginning_is_part_of_the_note(embedded, finished_run):
    _, _, task, _ = embedded

    (edits,) = writers.write("begun", finished_run, [task], 0, 8)
    (first, second), = writers.write("begun", finished_run, [task], 0, 2)

    assert [first, second] == edits[:2]     # those of a smaller k are the first ones
    begun = {b for b in writers.BEGINNINGS for e in edits if e.text.startswith(b + " ")}
    assert all(e.text.startswith(writers.BEGINNINGS) for e in edits) and len(begun) > 1
    # The writer has gone on from there, to a note of a form that the world knows.
    forms = [world.classify(e.documents[0], task.context[0]) for e in edits]
    assert forms.count("garbled") < len(forms) / 2


@pytest.mark.slow
def test_the_same_text_teaches_the_same(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compute, "KS", (1, 2))
    out = tmp_path / "out.jsonl"
    command = [compute, finished_run, "--out", out, "--towns", 2, "--arms", "untrained writer",
               "SEAL, round 3", "best notes", "rephrased passages"]

    call(*command, "--svg", tmp_path / "figure.svg")

    lines = {r["arm"]: r for r in read_lines(out)}
    # This run's round 3 is the base model, so it writes the same and learns the same.
    base, seal = lines["untrained writer"], lines["SEAL, round 3"]
    assert {**base, "arm": "", "seconds": 0} == {**seal, "arm": "", "seconds": 0}
    assert min(lines["best notes"]["accuracy"]) > 0.85
    assert max(lines["rephrased passages"]["reversed"]) < 0.3
    assert lines["best notes"]["tokens"][1] == pytest.approx(
        2 * lines["best notes"]["tokens"][0], rel=0.1)
    shown = capsys.readouterr().out
    assert f"| best notes | {lines['best notes']['accuracy'][0]:.3f} |" in shown
    assert "untrained writer" in (tmp_path / "figure.svg").read_text()

    # All lines are there: nothing is measured again, and the same table is shown.
    monkeypatch.setattr(compute, "measure", None)
    call(*command)
    assert capsys.readouterr().out == shown[shown.index("\nAccuracy"):]
    with pytest.raises(UserError, match="lines of another --towns"):
        call(*command[:4], "--towns", 3)


# ------------------------------------------------------------------------------- credit

def test_leaving_one_out_is_a_difference():
    scores = np.array([[.9, .2], [.1, .2], [.8, .1], [.9, .6]])

    design = subsets("leave one out", 3, seed=0)

    assert design.tolist() == [[1, 1, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]
    np.testing.assert_allclose(regress(design, scores), [[.8, 0], [.1, .1], [0, -.4]],
                               atol=1e-12)


def test_random_halves_find_what_adds_up():
    design = subsets("random halves", 5, seed=1)
    effects = np.arange(10).reshape(5, 2)

    assert (design.mean(axis=0) == 0.5).all()
    np.testing.assert_allclose(regress(design, 3 + design @ effects), effects, atol=1e-9)


def test_auc_by_hand():
    stated = np.array([[True, False], [False, False]])

    assert truth.auc(np.array([[.5, .4], [.5, .9]]), stated) == pytest.approx(1.5 / 3)


def test_subsets_are_learned_in_their_places(embedded):
    model, tok, task, town = embedded
    edit = read_self_edit(task, "\n".join(writers.best_notes(town, random.Random(0))[:2]))
    design = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]])

    adapters = credit_of_a_run.learn(model, tok, edit, design, RECIPE, seed=4)

    assert not adapters.flat[[0, 3]].any()
    for i, documents in ((1, edit.documents[:1]), (2, edit.documents), (4, edit.documents[2:])):
        job = together.one_job(model, tok, documents, seed=4)
        ((_, alone),) = sft(model, [job])
        distance = (adapters.flat - alone.weights).abs().mean(dim=1)
        assert distance.argmin() == i and distance[i] < 1e-3


def test_the_probability_of_an_answer_is_that_of_its_tokens(embedded):
    model, tok, task, _ = embedded
    adapters = Adapters(model, RECIPE.lora, 2)
    adapters.init(1, seed=0)
    adapters.flat[1] += 0.02        # B as well: it changes something

    found = credit_of_a_run.gold_probability(model, tok, task, adapters)

    changed = load_pretrained(EMBEDDED, "cpu")
    other = Adapters(changed, RECIPE.lora, 2)
    other.flat.copy_(adapters.flat)
    other.merge(1)
    assert found.shape == (2, len(task.queries))
    assert abs(found[0] - found[1]).max() > 1e-4
    for row, one in zip(found, (model, changed)):
        for j, (query, answer) in enumerate(zip(task.queries, task.answers)):
            ids = tok.prompt(query)
            probability = 1.0
            for token in tok.encode(" " + answer):
                probability *= one(torch.tensor([ids]))[0, -1].softmax(-1)[token].item()
                ids = ids + [token]
            assert row[j] == pytest.approx(probability, rel=2e-3, abs=1e-9)


def test_credit_finds_the_line_that_states_the_answer(embedded):
    model, tok, task, town = embedded
    lines = writers.best_notes(town, random.Random(0))
    remark = world.VAGUE[0].format(t=town.name)
    edit = read_self_edit(task, "\n".join([*lines, remark]))

    matrix = credit.credit(model, tok, task, edit, RECIPE)

    stated = truth.truth(task, edit)
    # Each line states one answer, the remark none; the last document is the passage.
    assert stated.sum(axis=1).tolist() == [1] * len(lines) + [0]
    assert matrix.shape == (len(lines) + 2, len(task.questions))
    assert truth.auc(matrix[:-1], stated) > 0.9
    assert matrix[:-1][stated].mean() > 0.3 > abs(matrix[len(lines)]).max() / 2


@pytest.mark.slow
def test_credit_is_judged_and_drawn(finished_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lab.credit_of_run.PAIRS", 8)
    out = tmp_path / "out.jsonl"

    call(credit, finished_run, "--out", out, "--towns", 1, "--svg", tmp_path / "figure.svg",
         "--town", 1)

    lines = read_lines(out)
    assert [r["writer"] for r in lines] == ["untrained", "round 3"]
    assert lines[0]["auc"] == lines[1]["auc"]       # the same writer, in this run
    shares = lines[0]["auc"]
    assert len(shares) == 6 and all(0 <= share <= 1 for share in shares.values())
    assert shares["random halves, probability"] > 0.8
    assert f"{shares['random halves, probability']:.3f}" in capsys.readouterr().out
    assert world.load("eval")[1].name in (tmp_path / "figure.svg").read_text()


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """What `python outer_loop.py --iterations 0 --eval-tasks 2` leaves behind."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    cfg = Config(**PRESETS["tiny"] | dict(iterations=0, eval_tasks=2, eval_edits=1,
                                          baselines=False, run_dir=str(folder)))
    rest_em(cfg, Run(cfg))
    return folder


def test_a_page_shows_the_credit_that_was_asked_for(small_run, monkeypatch, capsys):
    monkeypatch.setattr("lab.credit_of_run.PAIRS", 4)
    folder = small_run

    call(credit_of_a_run, folder, "--task", 1)

    found = json.loads((folder / "credit.json").read_text())
    assert found["title"] == world.load("eval")[1].name
    shape = (len(found["documents"]), len(found["questions"]))
    assert np.shape(found["credit"]) == shape and np.max(found["credit"]) > 0.1
    text = (folder / "report.html").read_text()
    assert "Which line taught which answer" in text
    assert f">{found['credit'][0][0]:.3f}<" in text
    # The last document is the passage, of which a line of output has the beginning.
    assert found["documents"][-1][:40] in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [(["--task", 40], "no held-out self-edit of task 40"),
                                          (["--iteration", 9], "in iteration 9")])
def test_credit_that_can_not_be_had(small_run, tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        call(credit_of_a_run, small_run, *flags)
    with pytest.raises(UserError, match="no run's folder"):
        call(credit_of_a_run, tmp_path)
