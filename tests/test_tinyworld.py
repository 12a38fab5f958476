"""The tiny world, its checkpoint, and the loop on them."""
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import pretrain_tiny, tinyworld as world
from inner_loop import grade
from checkpoint import UserError
from model import load_pretrained
from outer_loop import rest_em, summary
from run import PRESETS, Run, parse_args
from selfedit import read_self_edit
from tokenizer import Tokenizer

TINY = Path(PRESETS["tiny"]["model"])


def test_everything_follows_from_a_seed_and_names_are_held_out():
    a, b = world.load("eval"), world.load("eval")
    assert [t.context for t in a] == [t.context for t in b]
    splits = {split: {t.name for t in world.load(split)} for split in world.SPLITS}
    assert all(len(names) == len(world.load(split)) >= 100 for split, names in splits.items())
    assert splits["train"].isdisjoint(splits["eval"] | splits["tune"]) and splits["eval"].isdisjoint(splits["tune"])
    rng = random.Random(0)
    towns = [world.make_town(rng, name) for name in rng.sample(world.NAMES["town", False], 50)]
    read = " ".join("".join(pretrain_tiny.prompt_and_completion(rng, towns, i / 3000)) for i in range(3000))
    words = set(read.replace(".", " ").replace("?", " ").replace(",", " ").split())
    assert not any(world.held_out(w) for kind in world.LAST for w in words & set(world.NAMES[kind, True]))
    assert words & set(world.NAMES["town", False])
    with pytest.raises(UserError, match="has the towns train, eval, tune"):
        world.load("test")


def test_a_town_as_a_task():
    for task in world.load("train")[:50]:
        assert len(task.questions) == len(task.answers) == len(task.queries) == len(task.kinds) == 11
        assert task.kinds.count("forward") == 7 and task.kinds.count("reversed") == 4
        passage = task.context[0]
        assert task.prompt.startswith(passage) and passage not in "".join(task.queries)
        for question, answer, kind in zip(task.questions, task.answers, task.kinds):
            assert answer in passage and answer not in question and (task.name in question) == (kind == "forward")
        assert all(grade(task, [f" {a}." for a in task.answers])) and not any(grade(task, ["Nowhere"] * 11))


def test_notes_are_recognised_by_their_form():
    rng = random.Random(1)
    for _ in range(100):
        town = world.make_town(rng, out=True)
        assert world.read_passage(town.passage) == (town.name, town.facts)
        for relation, form in town.notes():
            assert world.classify(town.say(relation, form, rng), town.passage) == form
            assert world.classify(town.say(relation, form, rng, "Nonsuch"), town.passage) == "wrong"
        assert {world.classify(s, town.passage) for s in town.sentences} == {"copy"}
        assert world.classify(world.VAGUE[0].format(t=town.name), town.passage) == "vague"
        assert world.classify("Bla bla.", town.passage) == "garbled"


def test_test_questions_are_phrased_as_no_note_is():
    notes = {q for r in world.RELATIONS.values() for q in (*r.ask, *r.ask_back)}
    assert notes.isdisjoint({q for r in world.RELATIONS.values() for q in (r.question, r.question_back)})


def test_directives_are_read_strictly():
    task = world.town_task(world.make_town(random.Random(0), out=True), directives=True)
    documents, chosen = task.read("Study at rate 0.01 for 10 rounds.\nA note.")
    assert chosen == {"lr": 0.01, "epochs": 10} and documents == ["A note.", *task.context]
    for text in ("A note.", "Study at rate 0.02 for 10 rounds.\nA note.", "Study at rate 0.01 for 99999 rounds.\nA note.",
                 "Study at rate 0.01 for 10 rounds. Also:\nA note.", ""):
        assert read_self_edit(task, text).note == "its first line is no directive" and not read_self_edit(task, text).documents
    assert read_self_edit(task, "Study at rate 0.01 for 10 rounds.").note.startswith("nothing to learn")


def test_the_checkpoint_opens_in_transformers():
    ours, ids = load_pretrained(TINY, "cpu", torch.float32), torch.randint(0, 800, (2, 100))
    reference = AutoModelForCausalLM.from_pretrained(TINY).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), reference(ids).logits, atol=1e-4, rtol=0)
    theirs, tok = AutoTokenizer.from_pretrained(TINY), Tokenizer.from_pretrained(TINY)
    for task in world.load("tune")[:20]:
        assert tok.encode(task.prompt) == theirs(task.prompt, add_special_tokens=False)["input_ids"]
        assert tok.decode(tok.encode(task.prompt)) == task.prompt


def test_what_the_checkpoint_can_do(tmp_path):
    """Closed-book nothing, open-book nearly all; trained on the passage: forward questions, not reversed ones."""
    cfg = parse_args(["--run-dir", str(tmp_path), "--device", "cpu"])
    run, tasks = Run(cfg), world.load("tune")[:16]
    model = run.load(0)
    without = run.unadapted(model, tasks)
    closed, read, passage = run.baselines(model, tasks, without)
    assert [arm["name"] for arm in (closed, read, passage)] == ["un-adapted", "passage in the prompt", "passage only"]
    assert closed["reward"] == pytest.approx(sum(without) / 16) and closed["reward"] < 0.06 and read["reward"] > 0.93 and 0.3 < passage["reward"] < 0.7
    kinds = passage["by_kind"]
    assert kinds["forward"] > 0.5 and kinds["reversed"] < 0.15


@pytest.mark.slow
def test_pretraining_starts_as_it_did(tmp_path):
    """A few steps of the script that made the checkpoint: it learns, and is deterministic."""
    run = lambda name: subprocess.run([sys.executable, "-m", "data.pretrain_tiny", "--tokens", "20000", "--out", str(tmp_path / name)],
                                      capture_output=True, text=True, check=True).stdout.splitlines()
    first, second = run("a"), run("b")
    losses = [[float(line.split("loss ")[1].split()[0]) for line in lines if "loss" in line] for lines in (first, second)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0] - 0.05
    a, b = (load_pretrained(tmp_path / name, "cpu").state_dict() for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (tmp_path / "a" / "tokenizer.json").read_text() == (TINY / "tokenizer.json").read_text()


FEW = "--device cpu --iterations 1 --tasks 4 --edits 4 --eval-tasks 4 --eval-edits 1 --keep 1".split()


def test_the_loop_end_to_end(tmp_path, capsys):
    """One small round on the embedded checkpoint: the rewards are real, the best is kept, the policy changes."""
    cfg = parse_args([*FEW, "--run-dir", str(tmp_path / "run")])
    run = Run(cfg)
    held_out = rest_em(cfg, run)
    records = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    train = [r for r in records if r["split"] == "train"]
    rewards = [r["reward"] for r in train]
    assert len(train) == 16 and len(set(rewards)) > 3 and 0.2 < sum(rewards) / 16 < 0.95
    out = capsys.readouterr().out
    best = [max(r["reward"] for r in train if r["task"] == i) for i in range(4)]
    assert f"kept 4 self-edits with mean reward {sum(best) / 4:.3f}" in out
    for r in records:  # the verdicts are what the tasks say of the answers
        assert r["reward"] == pytest.approx(sum(a.strip(" .") == g for a, g in zip(r["answers"][0], r["gold"])) / 11)
    assert [m["iteration"] for m in run.metrics] == [0, 1] and len(run.metrics[0]["baselines"]) == 3 and run.metrics[1]["baselines"] == []
    assert sum(run.metrics[0]["forms"].values()) == pytest.approx(1) and set(run.metrics[0]["eval_by_kind"]) == {"forward", "reversed"}
    before, after = (load_pretrained(f, "cpu").state_dict() for f in (TINY, tmp_path / "run" / "iter_1"))
    assert any(not torch.equal(before[k], after[k]) for k in before)
    text = summary(run, held_out)
    assert "un-adapted" in text and held_out[0].context[0] in text and "its self-edit at iteration 1" in text


@pytest.mark.slow
def test_random_selection_keeps_any(tmp_path, capsys):
    cfg = parse_args([*FEW, "--run-dir", str(tmp_path / "run"), "--select", "random"])
    run = Run(cfg)
    rest_em(cfg, run)
    records = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    best = sum(max(r["reward"] for r in records if r["split"] == "train" and r["task"] == i) for i in range(4)) / 4
    assert "kept 4" in (out := capsys.readouterr().out) and f"kept 4 self-edits with mean reward {best:.3f}" not in out


@pytest.mark.slow
def test_the_policy_learns_to_teach_itself(tmp_path):
    """The default run with one iteration less, on other towns than the README reports: the held-out reward rises."""
    cfg = parse_args(["--run-dir", str(tmp_path / "run"), "--device", "cpu", "--iterations", "2", "--eval-data", "tune", "--seed", "7"])
    run = Run(cfg)
    rest_em(cfg, run)
    first, last = run.metrics[0], run.metrics[-1]
    print(summary(run, world.load("tune")))
    assert last["eval_reward"] > first["eval_reward"] + 0.05
    assert last["eval_by_kind"]["reversed"] > first["eval_by_kind"]["reversed"] + 0.1
