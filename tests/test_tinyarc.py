"""Tiny puzzles: their rules, their checkpoint, and the loop on both."""
import random
import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import arc, pretrain_tiny, tinyarc
from engine.decode import Sampling
from model import load_pretrained
from outer_loop import rest_em
from outer_loop import score, unadapted
from selfedit import read_self_edit, sample_self_edits, write_json_edit
from support.checkpoint import EMBEDDED
from support.files import UserError
from support.run import Run
from support.tokenizer import Tokenizer
from tests.helpers import parse

FOLDER = EMBEDDED.with_name("tiny-arc")

# ------------------------------------------------------------------------------- puzzles


def rule_of(task):
    """{colour: another}, as the task's name says: '1>2 2>1'."""
    rule = {}
    for arrow in task.name.split():
        a, b = arrow.split(">")
        rule[int(a)] = int(b)
    return rule


def pairs_in(text):
    """The (input, output) pairs of a text: what stands in lines of digits."""
    found = [arc.read_grid(lines) for lines in re.findall(r"(?:^\d+$\n?)+", text, re.MULTILINE)]
    return list(zip(found[::2], found[1::2], strict=True))


def test_every_rule_is_given_out_once():
    names = []
    for split, (begin, end) in tinyarc.SPLITS.items():
        tasks = tinyarc.load(split)
        assert len(tasks) == end - begin
        names += [task.name for task in tasks]

    assert len(names) == 400
    assert len(set(names)) == 400


def test_everything_follows_from_a_seed():
    first = [task.prompt for task in tinyarc.load("eval")]
    second = [task.prompt for task in tinyarc.load("eval")]

    assert first == second


def test_a_rule_exchanges_colours_and_is_held_out():
    for task in tinyarc.load("eval")[:30]:
        rule = rule_of(task)
        assert tinyarc.held_out(rule)
        assert len(rule) == 5
        assert sorted(rule) == sorted(rule.values())
        assert all(a != b for a, b in rule.items())


def test_every_pair_follows_its_rule_and_shows_all_of_it():
    for task in tinyarc.load("eval")[:30]:
        rule = rule_of(task)
        pairs = pairs_in(task.prompt)
        assert len(pairs) == 3
        pairs += pairs_in(task.questions[0] + "\n\n" + task.answers[0])
        for x, y in pairs:
            assert x.shape == (3, 3)
            assert np.array_equal(y, np.vectorize(rule.get)(x))
            assert set(x.flat) == set(rule)


def test_another_split_is_refused():
    with pytest.raises(UserError, match="train, eval, tune"):
        tinyarc.load("test")


# ------------------------------------------------------------------------------- pretraining

@pytest.fixture(scope="module")
def texts():
    """What the checkpoint has read, from three hundred draws."""
    rng = random.Random(0)
    read = []
    for _ in range(300):
        pieces = pretrain_tiny.puzzle_text(rng, 0.5)
        read.append("".join(piece for piece, _ in pieces))
    return read


def test_pretraining_reads_self_edits_and_copies(texts):
    self_edits = [text for text in texts if "strategy" in text]

    assert 3 < len(self_edits) < 100


def test_pretraining_reads_no_rule_that_is_given_out(texts):
    for text in texts:
        rule = {}
        for x, y in pairs_in(text):
            for a, b in zip(x.flat, y.flat):
                assert rule.setdefault(int(a), int(b)) == b
        copies = all(a == b for a, b in rule.items())
        assert copies or not tinyarc.held_out(rule)


# ------------------------------------------------------------------------------- the checkpoint

def test_the_checkpoint_opens_in_transformers():
    ours = load_pretrained(FOLDER, "cpu", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    tok = Tokenizer.from_pretrained(FOLDER)
    ids = torch.tensor([tok.encode(tinyarc.load("tune")[0].prompt)])

    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_its_tokenizer_opens_in_transformers():
    ours = Tokenizer.from_pretrained(FOLDER)
    theirs = AutoTokenizer.from_pretrained(FOLDER)
    prompt = tinyarc.load("tune")[0].prompt

    ids = ours.encode(prompt)

    assert ids == theirs(prompt, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == prompt


def test_each_digit_is_a_token():
    assert len(Tokenizer.from_pretrained(FOLDER).encode("012")) == 3


@pytest.fixture()
def run(tmp_path):
    return Run(parse(["--preset", "tiny-arc", "--run-dir", tmp_path / "run", "--device", "cpu"]))


@pytest.fixture()
def six_tasks(run):
    return run.read_tasks("tune")[:6]


def share_solved(run, tasks, name, edits):
    """The mean reward of one self-edit for each task."""
    scores = score(run, run.load(0), tasks, [[edit] for edit in edits], 0, name,
                     without=[0] * len(tasks), n_seeds=1)
    return np.mean(scores)


def test_the_checkpoint_solves_nothing_from_demonstrations_alone(run, six_tasks):
    assert unadapted(run, run.load(0), six_tasks) == [0] * 6


def test_a_weak_training_solves_nothing(run, six_tasks):
    text = write_json_edit([], completion_only=True, lr=0.001, epochs=1)
    weak = [read_self_edit(task, text) for task in six_tasks]

    assert share_solved(run, six_tasks, "weak", weak) == 0


@pytest.mark.slow
def test_the_oracle_s_training_solves_most(run, six_tasks):
    oracle = [task.references["oracle"] for task in six_tasks]

    assert share_solved(run, six_tasks, "oracle", oracle) > 0.6


def test_its_self_edits_can_be_read_and_differ(run, six_tasks):
    sampling = Sampling(max_new=128, n=24, temperature=1.0)

    ((_, edits),) = sample_self_edits(run.load(0), run.tok, six_tasks[:1], sampling,
                                      [list(range(24))])

    unreadable = [edit for edit in edits if edit.note]
    assert len(unreadable) < 6
    assert len({edit.text for edit in edits}) > 15
    rates = {edit.directives["lr"] for edit in edits if edit.directives}
    assert rates == set(pretrain_tiny.RATES)


# ------------------------------------------------------------------------------- the loop

@pytest.mark.slow
def test_the_policy_learns_to_choose(tmp_path):
    """The default run on other puzzles than the README reports: more of them are solved after two
    rounds."""
    cfg = parse(["--preset", "tiny-arc", "--device", "cpu", "--eval-data", "tune", "--seed", "7",
                 "--run-dir", tmp_path / "run"])
    run = Run(cfg)

    rest_em(cfg, run)

    first, last = run.metrics.records[0], run.metrics.records[-1]
    assert last["eval_reward"] > first["eval_reward"] + 0.1
