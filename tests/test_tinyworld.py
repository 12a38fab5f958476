"""The tiny world's towns and notes, the tiny puzzles, their checkpoints, and the loop on both."""
import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import pretrain_tiny, tinyarc, tinyworld as world
from data.tasks import read_tasks
from engine.decode import Sampling
from model import load_pretrained
from outer_loop import baselines, unadapted
from selfedit import EMPTY, read_self_edit, sample_self_edits
from support.checkpoint import EMBEDDED
from support.files import UserError
from support.tokenizer import Tokenizer
from tests.helpers import grids_in, open_run, parse, python, run_rest_em


@pytest.mark.parametrize("domain, sizes, another, said", [
    (world, [100, 100, 100], "test", "has the towns train, eval, tune"),
    (world, [100, 100, 100], "my.json", "for a file of passages: --preset knowledge"),
    (tinyarc, [200, 100, 100], "test", "train, eval, tune")])
def test_every_split_follows_from_a_seed_and_no_task_is_given_out_twice(domain, sizes, another,
                                                                        said):
    names = []
    for split, size in zip(("train", "eval", "tune"), sizes, strict=True):
        tasks = domain.load(split)
        assert len(tasks) >= size
        assert [task.prompt for task in tasks] == [task.prompt for task in domain.load(split)]
        names += [task.name for task in tasks]
    assert len(set(names)) == len(names)
    with pytest.raises(UserError, match=said):
        domain.load(another)


def test_pretraining_reads_no_name_that_is_given_out():
    rng = random.Random(0)
    towns = [world.make_town(rng, name) for name in rng.sample(world.NAMES["town", False], 50)]
    words = set()
    for i in range(3000):
        prompt, completion = pretrain_tiny.prompt_and_completion(rng, towns, i / 3000)
        words |= set(re.findall(r"\w+", prompt + completion))
    for kind in world.LAST:
        assert words.isdisjoint(world.NAMES[kind, True])
        assert not words.isdisjoint(world.NAMES[kind, False])
    # Questions are phrased as no note is.
    in_notes, in_tests = set(), set()
    for relation in world.RELATIONS.values():
        in_notes |= {*relation.ask, *relation.ask_back}
        in_tests |= {relation.question, relation.question_back}
    assert in_notes.isdisjoint(in_tests)


def test_a_town_is_asked_about_in_both_directions_and_without_its_passage():
    for task in world.load("train")[:50]:
        passage = task.context[0]
        town, facts = world.read_passage(passage)
        assert world.held_out(town)
        assert all(world.held_out(facts[relation]) for relation in world.NAMED)
        assert task.prompt.startswith(passage)
        assert task.kinds == ["forward"] * 7 + ["reversed"] * 4
        for question, query, answer, kind in zip(task.questions, task.queries, task.answers,
                                                 task.kinds, strict=True):
            assert query == f"Question: {question}\nAnswer:"
            assert passage not in query
            assert (task.name in question) == (kind == "forward")
            assert answer in passage
            assert answer not in question


def some_towns(n=100):
    rng = random.Random(1)
    return [world.make_town(rng, out=True) for _ in range(n)]


def test_a_passage_can_be_read_and_lines_are_recognised_by_their_form():
    rng = random.Random(1)
    another, *towns = some_towns()
    for town in towns:
        assert world.read_passage(town.passage) == (town.name, town.facts)
        lines = [("copy", sentence) for sentence in town.sentences]
        lines += [("vague", world.VAGUE[0].format(t=town.name)), ("garbled", "Bla bla."),
                  ("directive", world.DIRECTIVE.format(lr=0.01, epochs=10))]
        for relation, form in town.notes():
            lines.append((form, town.say(relation, form, rng)))
            lines.append(("wrong", town.say(relation, form, rng, value="Nonsuch")))
        lines += [("wrong", another.say(*note, rng)) for note in another.notes()]
        for form, line in lines:
            assert world.classify(line, town.passage)[0] == form


def test_what_a_note_teaches_is_known():
    rng = random.Random(1)
    for town in some_towns():
        asked = world.asked(town.passage)
        assert asked.keys() == {question for question, _, _ in town.questions()}
        for question, answer, back in town.questions():
            relation, kind = asked[question]
            assert kind == ("reversed" if back else "forward")
            assert answer == (town.name if back else town.facts[relation])
        # Every question is answered by a note, and each note answers the question it turns to.
        found = set()
        for relation, form in town.notes():
            fact = relation, "reversed" if form.endswith("reversed") else "forward"
            assert world.taught(town.say(relation, form, rng), town.passage) == fact
            found.add(fact)
        assert found == set(asked.values())
        # A line without the town, or without the truth, teaches nothing.
        assert world.taught(town.sentences[0], town.passage)[1] == "forward"
        for line in [*town.sentences[1:], town.say(relation, form, rng, value="Nonsuch")]:
            assert world.taught(line, town.passage) is None


STUDY = "Study at rate 0.01 for 10 rounds."
NO_DIRECTIVE = "its first line is no directive"


@pytest.mark.parametrize("directives, text, lines, chosen, note", [
    (False, " A note.\n\nAnother.\n", ["A note.", "Another."], {}, ""),
    (True, f"{STUDY}\nA note.", ["A note."], {"lr": 0.01, "epochs": 10}, ""),
    (False, "\n", [], {}, EMPTY),
    (True, STUDY, [], {}, EMPTY),
    (True, "Study at rate 0.02 for 10 rounds.\nA note.", [], {}, NO_DIRECTIVE),    # no such rate
    (True, f"{STUDY} Also:\nA note.", [], {}, NO_DIRECTIVE),
    (True, "", [], {}, NO_DIRECTIVE)])
def test_documents_are_the_lines_and_the_passage(directives, text, lines, chosen, note):
    task = world.town_task(some_towns(1)[0], directives)
    edit = read_self_edit(task, text)
    assert edit.documents == ([*lines, *task.context] if lines else [])
    assert edit.directives == chosen
    assert edit.note == note


def pairs_in(text):
    found = grids_in(text)
    return list(zip(found[::2], found[1::2], strict=True))


def test_a_rule_exchanges_colours_and_every_pair_shows_all_of_it():
    for task in tinyarc.load("eval")[:30]:
        arrows = [arrow.split(">") for arrow in task.name.split()]
        rule = {int(a): int(b) for a, b in arrows}
        assert tinyarc.held_out(rule)
        assert len(rule) == 5
        assert sorted(rule) == sorted(rule.values())
        assert all(a != b for a, b in rule.items())
        assert len(pairs_in(task.prompt)) == 3
        for x, y in pairs_in(f"{task.prompt}\n{task.questions[0]}\n\n{task.answers[0]}"):
            assert x.shape == (3, 3)
            assert np.array_equal(y, np.vectorize(rule.get)(x))
            assert set(x.flat) == set(rule)


def test_pretraining_reads_self_edits_and_copies_and_no_rule_that_is_given_out():
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        pieces = pretrain_tiny.puzzle_text(rng, 0.5)
        texts.append("".join(piece for piece, _ in pieces))
    assert 3 < sum("strategy" in text for text in texts) < 100
    for text in texts:
        rule = {}
        for x, y in pairs_in(text):
            for a, b in zip(x.flat, y.flat):
                assert rule.setdefault(int(a), int(b)) == b
        copies = all(a == b for a, b in rule.items())
        assert copies or not tinyarc.held_out(rule)


@pytest.mark.parametrize("folder, domain", [(EMBEDDED, world),
                                            (EMBEDDED.with_name("tiny-arc"), tinyarc)])
def test_the_checkpoints_open_in_transformers(folder, domain):
    ours = load_pretrained(folder, "cpu", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    tok = Tokenizer.from_pretrained(folder)
    their_tok = AutoTokenizer.from_pretrained(folder)
    for task in domain.load("tune")[:20]:
        ids = tok.encode(task.prompt)
        assert ids == their_tok(task.prompt, add_special_tokens=False)["input_ids"]
        assert tok.decode(ids) == task.prompt
    assert domain is world or len(tok.encode("012")) == 3
    with torch.no_grad():
        for batch in torch.tensor([ids]), torch.randint(0, theirs.config.vocab_size, (2, 100)):
            torch.testing.assert_close(ours(batch), theirs(batch).logits, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_what_the_checkpoint_can_do(tmp_path):
    """It knows nothing of a town and reads nearly all in its passage. Trained on the passage it
    answers forward questions, and no reversed ones."""
    run = open_run(parse(["--run-dir", tmp_path / "run", "--device", "cpu"]))
    tasks = world.load("tune")[:16]
    model = run.load(0)
    closed, read, passage = baselines(run, model, tasks, unadapted(run, model, tasks))
    assert closed["name"] == "un-adapted" and closed["reward"] < 0.06
    assert read["name"] == "passage in the prompt" and read["reward"] > 0.93
    assert passage["name"] == "passage only" and 0.3 < passage["reward"] < 0.7
    assert passage["by_kind"]["forward"] > 0.5
    assert passage["by_kind"]["reversed"] < 0.15


@pytest.mark.slow
def test_pretraining_learns_and_is_deterministic(tmp_path):
    folders, losses = [tmp_path / "first", tmp_path / "second"], []
    for folder in folders:
        said = python("-m", "data.pretrain_tiny", "--tokens", "20000", "--out", folder).stdout
        losses.append([float(x) for x in re.findall(r"loss ([\d.]+)", said)])
    assert losses[0][-1] < losses[0][0] - 0.05
    assert losses[0] == losses[1]
    # It begins with the tokenizer of the checkpoint.
    for name, others in [("model.safetensors", folders[1]), ("tokenizer.json", EMBEDDED)]:
        assert (folders[0] / name).read_bytes() == (others / name).read_bytes()
    failed = python("-m", "data.pretrain_tiny", "--dim", "50", "--out", tmp_path / "m", status=1)
    assert failed.stderr == "error: --dim must be a multiple of 16\n"


def test_its_self_edits_can_be_read_and_differ(tmp_path):
    run = open_run(parse(["--preset", "tiny-arc", "--run-dir", tmp_path, "--device", "cpu"]))
    sampling = Sampling(max_new=128, n=24, temperature=1.0)
    ((_, edits),) = sample_self_edits(run.load(0), run.tok, read_tasks(run, "tune")[:1], sampling,
                                      [list(range(24))])
    unreadable = [edit for edit in edits if edit.note]
    assert len(unreadable) < 6
    assert len({edit.text for edit in edits}) > 15
    rates = {edit.directives["lr"] for edit in edits if edit.directives}
    assert rates == set(pretrain_tiny.RATES)


@pytest.mark.slow
@pytest.mark.parametrize("preset, gain", [("tiny", 0.05), ("tiny-arc", 0.1)])
def test_the_policy_learns_to_teach_itself(preset, gain, tmp_path):
    """The default run, on other towns and puzzles than the README reports: the held-out reward
    rises."""
    run = open_run(parse(["--preset", preset, "--device", "cpu", "--eval-data", "tune", "--seed",
                          "7", "--run-dir", tmp_path / "run"]))
    run_rest_em(run)
    first, last = run.metrics.records[0], run.metrics.records[-1]
    assert last["eval_reward"] > first["eval_reward"] + gain
    if preset == "tiny":
        for r in run.rollouts.of(0, "train"):
            (answers,) = r["answers"]
            right = [answer.strip(" .") == gold for answer, gold in zip(answers, r["gold"])]
            assert r["reward"] == pytest.approx(sum(right) / 11)
        kinds = [m["eval_by_kind"]["reversed"] for m in (first, last)]
        assert kinds[1] > kinds[0] + 0.1
