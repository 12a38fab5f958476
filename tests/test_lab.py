"""The rooms of the lab and its readers of runs: curves over seeds, how far rewards can be trusted,
pairs by passage, a model that imitates self-edits."""
import json
import sys
from xml.etree import ElementTree

import pytest
import torch

from engine.decode import Sampling, write
from lab import curve, experiment, imitate, paired, reliability
from lora import Adapters, Job, dialogue, sft_one
from model import load_pretrained
from outer_loop import outer_recipe
from selfedit import fill, seed_for
from support.config import Config
from support.files import UserError
from support.tokenizer import Tokenizer
from tests.helpers import MEASURED, ROLLOUT, SMALL, call, read_lines, run_it, write_lines


# ------------------------------------------------------------------------------- experiment

def question(tmp_path, words, measure):
    shown = {}
    asked = experiment.Question(["a", "b"], measure, shown.update, None, settings={"towns": 4})
    ap = asked.flags("Is it so?\n\nMore.")
    asked.answer(ap, ap.parse_args(["--out", str(tmp_path / "out.jsonl"), *words.split()]))
    return shown


def test_what_is_missing_is_measured_and_nothing_else(tmp_path):
    asked = []

    def measure(arm, seed, towns):
        asked.append((arm, seed, towns))
        return {"reward": [0, 1]}

    first = question(tmp_path, "--seeds 1", measure)
    arms = question(tmp_path, "--seeds 0 1", measure)
    assert asked == [("a", 1, 4), ("b", 1, 4), ("a", 0, 4), ("b", 0, 4)]
    lines = read_lines(tmp_path / "out.jsonl")
    assert lines[:2] == first["a"] + first["b"]
    assert arms == {"a": lines[::2], "b": lines[1::2]}
    assert lines[0] == {"arm": "a", "seed": 1, "towns": 4, "reward": [0, 1], "seconds": 0}


def test_all_lines_of_a_file_have_the_same_settings(tmp_path):
    # This line is older than --towns.
    (tmp_path / "out.jsonl").write_text('{"arm": "a", "seed": 0}\n')
    assert list(question(tmp_path, "--seeds 0", lambda *_: {})) == ["a", "b"]
    with pytest.raises(UserError, match="out.jsonl has lines of another --towns; name another"):
        question(tmp_path, "--towns 5", lambda *_: {})


# ------------------------------------------------------------------------------- curve

def write_run(folder, rewards, made_of=(), **settings):
    folder.mkdir()
    config = {"iterations": len(rewards) - 1, "seed": 0, "run_dir": str(folder), "model": "m",
              "update": "best", "strict": False, "targets": ["q_proj"]}
    (folder / "config.json").write_text(json.dumps(config | settings))
    write_lines(folder / "metrics.jsonl", [
        MEASURED | {"iteration": t, "eval_reward": reward, "eval_by_kind": {"forward": reward},
                    "made_of": made_of[t] if made_of else {}, "baselines": [
                        {"name": "passage only", "reward": 0.3, "by_kind": {}}] if t == 0 else []}
        for t, reward in enumerate(rewards)])
    return folder


def test_a_curve_by_hand(tmp_path):
    one = write_run(tmp_path / "one", [0.2, 0.5], [{"copy": 1.0}, {"copy": 0.4, "rare": 0.01}])
    two = write_run(tmp_path / "two", [0.4, 0.9], [{"copy": 0.8}, {"copy": 0.2}], seed=1)
    # The standard deviation of two values is their distance over sqrt(2), the error half of it;
    # Student's t for two values is 12.71.
    assert call(curve, one, two).splitlines() == [
        "all runs, 2 seeds: 0.300 ±1.271 -> 0.700 ±2.542",
        "    gain +0.400 ±1.271, by seed +0.300 +0.500",
        "    forward questions: 0.300 ±1.271 -> 0.700 ±2.542",
        "    copy: 90% -> 30%"]


def test_runs_that_have_no_curve_are_one_line(tmp_path):
    short = write_run(tmp_path / "short", [0.1, 0.2], iterations=2)
    with pytest.raises(UserError, match="short: this run has not ended; repeat its command"):
        call(curve, short)
    one = write_run(tmp_path / "one", [0.1, 0.2])
    two = write_run(tmp_path / "two", [0.1, 0.2, 0.3], iterations=1, seed=1)
    with pytest.raises(UserError, match="two: 3 iterations are measured, 2 in another run"):
        call(curve, one, two)


def test_runs_that_differ_in_their_seed_alone_are_a_line_of_the_drawing(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "a", [0.1, 0.2]), write_run(tmp_path / "b", [0.3, 0.4], seed=1),
            write_run(tmp_path / "c", [0.5, 0.6], update="random", strict=True)]

    out = call(curve, *runs, "--svg", tmp_path / "curve.svg")
    call(curve, *runs, "--svg", tmp_path / "again.svg")

    assert "update best, 2 seeds: " in out
    assert "update random, strict, 1 seeds: " in out
    drawing = (tmp_path / "curve.svg").read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    # matplotlib writes each text, drawn as shapes, into a comment as well.
    for text in ("the best self-edits are kept; 2 seeds", "trained on the passage only"):
        assert f"<!-- {text} -->" in drawing
    assert drawing == (tmp_path / "again.svg").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="needs matplotlib"):
        call(curve, *runs, "--svg", tmp_path / "curve.svg")


# ------------------------------------------------------------------------------- reliability

def rollout(task, edit, right, split="train"):
    asked = [""] * (len(right[0]) if right else 0)
    return ROLLOUT | {"split": split, "task": task, "edit": edit, "right": right, "gold": asked,
                      "questions": asked, "answers": [asked] * len(right),
                      "losses": [[1, 1]] * len(right)}


def test_reliability_by_hand(tmp_path):
    yes, no = [True, True], [False, False]
    write_lines(tmp_path / "rollouts.jsonl", [
        rollout(0, 1, [yes, yes]),
        rollout(0, 0, [no, no]),
        rollout(1, 0, [[True, False], [True, False]]),
        rollout(1, 1, []),                              # nothing to learn from
        rollout(0, 0, [yes], split="eval")])

    head, *lines = call(reliability, tmp_path).splitlines()
    assert head == "2 passages, 3 self-edits, 2 seeds each"
    values = dict(line.strip().rsplit(maxsplit=1) for line in lines)
    assert values["mean reward"] == "0.500"
    assert values["the best of K, by the seeds that chose it"] == "0.750"


def test_runs_that_tell_nothing_about_seeds_are_one_line(tmp_path):
    with pytest.raises(UserError, match="rollouts.jsonl: no rewards of training self-edits"):
        call(reliability, tmp_path)
    write_lines(tmp_path / "rollouts.jsonl", [rollout(0, 0, [[True]]), rollout(0, 1, [[True]])])
    with pytest.raises(UserError, match="one seed tells nothing about seeds"):
        call(reliability, tmp_path)


# ------------------------------------------------------------------------------- paired

def evaluated(task, arm, answer, reward):
    return ROLLOUT | {"arm": arm, "task": task, "reward": reward, "answers": [[answer]],
                      "questions": ["Where?"], "gold": ["Ostermar"], "right": [[False]],
                      "losses": [[1, 1]], "documents": 2, "seconds": 1.5}


@pytest.fixture
def single_run(tmp_path):
    rows = []
    for task, (plain, own) in enumerate([(1, 0), (1, 1), (0, 1)]):
        # The first kind recites: the gold answer comes in its second sentence.
        rows.append(evaluated(task, "passage only", "It is wet. It is on Ostermar.", plain))
        rows.append(evaluated(task, "own", "On Ostermar.", own))
    rows.append(evaluated(0, "half", "", 1))
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "run" / "rollouts.jsonl", rows)
    return tmp_path / "run"


# Intervals of 10,000 draws take seconds.
BOOTSTRAP = "lab.experiment.bootstrap_ci", lambda values: [min(values), max(values)]


def test_each_passage_is_compared_with_itself(single_run, tmp_path, monkeypatch):
    monkeypatch.setattr(*BOOTSTRAP)
    table = call(paired, single_run, "--save", tmp_path / "kept.json")
    lines = table.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "no adaptation", "passage only", "own"]
    assert lines[3].startswith("| passage only | 0.667 [0.000, 1.000] |  | 0.000 [0.000, 0.000] |")
    assert "| +0.000 [-1.000, +1.000] | 1.000 [1.000, 1.000] | 2 | 2.0 | 2 |" in lines[4]
    # What is saved gives the same table, and holds no text of a passage.
    assert call(paired, tmp_path / "kept.json") == table
    assert "Ostermar" not in (tmp_path / "kept.json").read_text()
    with pytest.raises(UserError, match="choose among passage only, own"):
        call(paired, single_run, "--against", "half")
    with pytest.raises(UserError, match="no rollouts of held-out passages"):
        call(paired, tmp_path)


def test_rounds_of_runs_are_kinds_of_their_own(tmp_path, monkeypatch):
    """A passage's value is the mean over its self-edits, and training passages are left out."""
    monkeypatch.setattr(*BOOTSTRAP)
    for name, better in (("one", 0.5), ("two", 0.0)):
        rows = []
        for t in (0, 1):
            for task, edit, reward in ((0, 0, 0.0), (0, 1, 1.0), (1, 0, 0.5), (1, 1, 0.5)):
                row = evaluated(task, "", "On Ostermar.", min(1, reward + better * t))
                rows.append(row | {"iteration": t, "edit": edit})
        rows.append(rows[-1] | {"split": "train", "iteration": 3})
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "rollouts.jsonl", rows)

    out = call(paired, tmp_path / "one", tmp_path / "two", "--against", "two, round 1")

    found = [line.split(" | ")[:2] for line in out.splitlines()[3:]]
    assert [(name.strip("| "), reward[:5]) for name, reward in found] == [
        ("one, round 0", "0.500"), ("one, round 1", "0.875"), ("two, round 0", "0.500"),
        ("two, round 1", "0.500")]


# ------------------------------------------------------------------------------- imitate

def graded(text, reward):
    return {"text": text, "adapter_mean": reward, "adapter_std": 0.0}


@pytest.fixture(scope="module")
def taught(passages, tmp_path_factory):
    """Three passages with self-edits: the second is the best, and the third is as good."""
    records = json.loads(passages.read_text())[:3]
    for i, record in enumerate(records):
        record["released_edits"] = [graded("1. Nothing.", 0.1),
                                    graded(f"1. The river is Ob{i}.", 0.6),
                                    graded(f"1. Ana{i} Reis founded it.", 0.6),
                                    graded("1. No.", 0.5)]
    path = tmp_path_factory.mktemp("taught") / "taught.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def student(tiny_folder, taught, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "new"
    call(imitate, "--model", tiny_folder, "--data", taught, "--out", out, "--keep", 2,
         "--lr", "1e-3", "--epochs", 3)
    return out


def test_the_best_self_edits_are_imitated_the_first_of_equals(tok, taught):
    pairs = imitate.to_imitate(tok, taught, 3)
    assert [edit.text for _, edit in pairs[:3]] == [
        "1. The river is Ob0.", "1. Ana0 Reis founded it.", "1. No."]
    ids = imitate.as_sampled(tok, " 1. Some text.\n")
    assert tok.decode(ids) == "1. Some text."
    assert ids[-1] in tok.stop and len(ids) == len(tok.encode("1. Some text.")) + 1


def test_a_text_is_read_as_a_model_samples_it(smollm2):
    """A real model's own reply, put into ids again, has the ids that were sampled."""
    model = load_pretrained(smollm2, "cpu")
    tok = Tokenizer.from_pretrained(smollm2)
    ((reply,),) = write(model, tok, [["What is the capital of France?"]], Sampling(60))
    assert not reply.cut
    assert imitate.as_sampled(tok, reply.text) == reply.token_ids


def test_the_student_is_what_the_textbook_makes(student, taught, tiny_folder, tok):
    examples = []
    for i, record in enumerate(json.loads(taught.read_text())):
        prompt = tok.prompt(fill("implications", record["title"], record["context"]))
        for text in (f"1. The river is Ob{i}.", f"1. Ana{i} Reis founded it."):
            examples.append(dialogue(prompt, tok.encode(text) + [tok.eos]))
    recipe = outer_recipe(Config(outer_lr=1e-3, outer_epochs=3))
    model = load_pretrained(tiny_folder, "cpu")
    before = [p.clone() for p in model.parameters()]
    trained = sft_one(model, Job(examples, seed_for(0, 0, "M-step"), recipe)).weights
    Adapters.stack(model, recipe.lora, [trained]).merge(0)

    saved = load_pretrained(student, "cpu")

    for old, mine, textbook in zip(before, saved.parameters(), model.parameters()):
        torch.testing.assert_close(mine, textbook, rtol=1e-3, atol=1e-4)
    assert any((old - new).abs().max() > 1e-3 for old, new in zip(before, saved.parameters()))


def test_the_student_is_a_checkpoint_that_runs_begin_from(student, passages, tmp_path):
    run = run_it(["--model", student, "--train-data", passages, "--eval-data", passages,
                  *SMALL.split(), "--iterations", "0", "--run-dir", tmp_path / "run"])
    assert "all runs, 1 seeds: " in call(curve, run.folder)


def test_nothing_is_overwritten_and_self_edits_are_needed(taught, passages, tiny_folder, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        call(imitate, "--model", tiny_folder, "--data", taught, "--out", tmp_path)
    with pytest.raises(UserError, match='record 0: "released_edits" must be a list'):
        call(imitate, "--model", tiny_folder, "--data", passages, "--out", tmp_path / "new")


def test_choices_drawn_at_random_are_imitated(passages, tiny_folder, tok, tmp_path):
    pairs = imitate.at_random(tok, passages, keep=3, seed=0)
    assert len(pairs) == 3 * len({task.prompt for task, _ in pairs})
    assert len({edit.text for _, edit in pairs}) > len(pairs) / 2
    for task, edit in pairs:
        assert edit.documents and edit.directives.keys() == {"lr", "epochs", "batch"}
        assert edit.token_ids == imitate.as_sampled(tok, edit.text)
    call(imitate, "--model", tiny_folder, "--data", passages, "--directives", "--keep", 1,
         "--epochs", 1, "--out", tmp_path / "new")
    old, new = load_pretrained(tiny_folder), load_pretrained(tmp_path / "new")
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(old.parameters(), new.parameters()))
