"""The paper's tables: their rows are what the rollouts say, and a second call computes nothing."""
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

import eval as tables
import inner_loop
from data import judges
from data.judges import each
from data.knowledge import read_edits
from eval import cpt_row, row_of
from lora import Lora
from support.files import UserError, as_lines
from tests.helpers import SMALL, call, even_length, read_lines, spy_on_sft, varied_run
from tests.strict import may_stay_unused
from tests.test_run import other_lines


@pytest.fixture()
def flags(argv):
    at = argv.index("--train-data")
    return argv[:at] + argv[at + 2:]


def forbid_training(monkeypatch):
    @may_stay_unused
    def sft(model, jobs, progress=None):
        assert not jobs, "trained again"
        return iter([])

    monkeypatch.setattr(inner_loop, "sft", sft)
    monkeypatch.setattr(tables, "sft", sft)


def write_edits(path, passages, edits_of):
    records = [record | edits_of(record) for record in json.loads(passages.read_text())]
    path.write_text(json.dumps(records))
    return records


NAMES = ["passage only", "passage only, step-matched", "its own self-edits", "gpt",
         "self-edits after round 1"]


@pytest.fixture(scope="module")
def table(tiny_folder, passages, tmp_path_factory):
    """A table of single passages, with the checkpoint of a run and with imported self-edits."""
    folder = tmp_path_factory.mktemp("single")
    released = {"gpt": {"edit": "1. One.\n2. Two."}, "naive": {"edit": ""}}
    write_edits(folder / "edits.json", passages, lambda record: {"released": released})
    varied_run(tiny_folder, passages, folder / "rl", "--iterations", "1")
    words = ["single", "--model", tiny_folder, "--eval-data", passages, *SMALL.split(), "--run",
             folder / "rl", "--edits-from", folder / "edits.json", "--run-dir", folder / "table"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judges.RULES, "rule", each(even_length))
        out = call(tables, *words)
    return SimpleNamespace(
        words=words, out=out, result=json.loads((folder / "table" / "single.json").read_text()),
        rollouts=read_lines(folder / "table" / "rollouts.jsonl"))


def rollouts_of(table, row):
    found = [r for r in table.rollouts if r["arm"] == row]
    return sorted(found, key=lambda r: r["task"])


def test_a_row_is_the_mean_reward_of_each_passage_and_its_difference_is_in_pairs(table):
    rows = table.result["rows"]
    names = [row["row"] for row in rows]
    assert names == ["no adaptation", *NAMES[:4], "passage in the prompt", NAMES[4]]
    reference = rows[2]     # the step-matched passage
    for row in rows:
        assert re.search(rf"^ *{row['row']}  +[\d.]+ \[", table.out, re.MULTILINE)
        assert row["mean"] == pytest.approx(np.mean(row["accuracy"]))
        mine = rollouts_of(table, row["row"])
        if row["row"] in NAMES:
            assert row["accuracy"] == [r["reward"] for r in mine]
            assert [len(r["right"]) for r in mine] == [2, 2]    # two seeds
        else:
            assert mine == []
        assert ("difference" in row) == (row is not reference)
        low, high = row.get("difference_ci", row["ci"])
        assert low <= row.get("difference", row["mean"]) <= high
        assert row.get("difference", 0) == pytest.approx(row["mean"] - reference["mean"])


def test_the_matched_passage_takes_as_many_steps_and_imported_self_edits_are_read_alike(table):
    own = rollouts_of(table, "its own self-edits")
    for ours, theirs in zip(own, rollouts_of(table, "passage only, step-matched"), strict=True):
        # Two epochs of one document a step; the passage is a single document.
        assert theirs["directives"] == {"epochs": max(1, 2 * ours["documents"])}
        assert theirs["documents"] == 1
    for r in rollouts_of(table, "gpt"):
        assert r["text"] == "1. One.\n2. Two."
        assert r["documents"] == 3      # two pieces and the passage


def test_a_second_call_trains_nothing_and_prints_the_same_table(table, varied_rewards, monkeypatch):
    forbid_training(monkeypatch)
    again = call(tables, *table.words)
    assert again == table.out[table.out.index("\n2 tasks, 4 questions, 2 seeds"):]


def test_imported_self_edits_go_to_their_passages(tmp_path):
    """By title and context, whatever the order; of several files; "edits" beats "released"."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    a = {"title": "A", "context": "About a."}
    b = {"title": "B", "context": "About b."}
    one.write_text(json.dumps([
        b | {"edits": {"x": "x of b"}, "released": {"z": {"edit": "z of b"}}},
        a | {"edits": {"x": "x of a"}}]))
    two.write_text(json.dumps([
        a | {"released": {"y": {"edit": "y of a"}, "none": {"edit": ""}}},
        b | {"released": {"y": {"edit": "y of b"}, "none": {}}}]))
    tasks = [SimpleNamespace(name=name, context=[f"{name}\nAbout {name.lower()}."])
             for name in "ABC"]

    assert read_edits([one, two], tasks[:2]) == {"x": ["x of a", "x of b"],
                                                 "y": ["y of a", "y of b"]}
    with pytest.raises(UserError, match=f"no x self-edit of 'C' in {one}"):
        read_edits([one], tasks)


def test_a_row_by_hand():
    record = {"task": 0, "reward": 0.75, "right": [[True, True], [False, True]], "cut": 2,
              "replies": 4, "documents": 1, "token_ids": [1], "seconds": 2}
    other = {"task": 1, "reward": 0.5, "right": [[True], [False]], "cut": 1, "replies": 2,
             "documents": 3, "token_ids": [1] * 9, "seconds": 4}
    assert row_of("x", [other, record], [[True, False], [False]]) == {
        "row": "x", "accuracy": [0.75, 0.5],
        "gained": 3 / 4,    # of two missed questions with two seeds each
        "lost": 1 / 2,      # of one known question with two seeds
        "cut": 3 / 6, "documents": 2, "tokens": 5, "seconds": 1.5}
    # A task of several self-edits counts by their mean. Nothing was missed.
    row = row_of("x", [record, record | {"reward": 0.25}], [[True, True]])
    assert row["accuracy"] == [0.5]
    assert math.isnan(row["gained"])
    record = {"row": "x", "right": [[[True, True], [False]], [[False, True], [True]]],
              "documents": 5, "tokens": 70, "seconds": 8}
    assert cpt_row(record, [[True, False], [False]], seeds=2) == {
        "row": "x", "accuracy": [0.75, 0.5], "gained": 3 / 4, "lost": 1 / 2, "documents": 5,
        "tokens": 70, "seconds": 4}


CPT = "--inner-lr 1e-2 --inner-batch 4 --inner-epochs 4 --inner-warmup 1".split()


def test_all_passages_are_learned_by_one_adapter(flags, tmp_path, varied_rewards, monkeypatch):
    jobs = spy_on_sft(monkeypatch, tables)
    first = call(tables, "cpt", *flags, *CPT)

    own, both = records = read_lines(tmp_path / "run" / "cpt.jsonl")
    edits = [r["text"] for r in read_lines(tmp_path / "run" / "edits.jsonl")]
    assert own["documents"] == 2
    assert len(edits) == 2 * 3
    assert both["documents"] == 2 + len([text for text in edits if text])
    for record in records:
        assert record["steps"] == 4 * math.ceil(record["documents"] / 4)
        assert len(record["right"]) == 2        # seeds
        assert all(end < begin for begin, end in record["losses"])
    assert [len(group) for group in jobs] == [1, 1, 1, 1]
    for (job,) in jobs:
        assert (job.recipe.warmup, job.recipe.batch) == (1, 4)
        assert job.recipe.lora == Lora(4, 64, ["q_proj", "v_proj"])
    # A seed's draws are those of both rows: a row's name is no part of any draw.
    seeds = [job.seed for (job,) in jobs]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] != seeds[1]
    rows = json.loads((tmp_path / "run" / "cpt.json").read_text())["rows"]
    assert [row["row"] for row in rows[1:]] == ["passages", "passages and its own self-edits"]
    for row, record in zip(rows[1:], records):
        assert row["accuracy"] == pytest.approx(np.mean(record["right"], axis=(0, 2)))
    forbid_training(monkeypatch)
    assert call(tables, "cpt", *flags, *CPT).splitlines()[-4:] == first.splitlines()[-4:]


def test_a_document_of_all_passages_is_a_whole_self_edit(flags, tmp_path, passages, tok,
                                                         monkeypatch):
    jobs = spy_on_sft(monkeypatch, tables)
    edits = tmp_path / "edits.json"
    records = write_edits(edits, passages, lambda record: {
        "edits": {"mine": f"1. {record['title']}.\n2. Two."}})
    call(tables, "cpt", *flags, "--seeds", "1", "--inner-epochs", "1", "--edits-from", edits)
    (job,) = jobs[-1]       # of the last row
    texts = [f"{record['title']}\n{record['context']}" for record in records[:2]]
    texts += [record["edits"]["mine"] for record in records[:2]]
    assert job.examples == [(tok.document(text), [True] * len(tok.document(text)))
                            for text in texts]


STREAMS = ["--streams", "2", "--length", "3"]


def test_continual_edits_make_a_triangle_of_accuracies_and_resume(flags, tmp_path, varied_rewards):
    whole = call(tables, "continual", *flags, *STREAMS)

    path = tmp_path / "run" / "continual.jsonl"
    records = read_lines(path)
    assert [record["edit"] for record in records] == [0, 1, 2, 3]
    for record, asked in zip(records, [3, 1, 2, 3]):
        assert [len(stream) for stream in record["accuracy"]] == [asked, asked]
    result = json.loads((tmp_path / "run" / "continual.json").read_text())
    assert result["after the last edit"][0] == pytest.approx(np.mean(records[3]["accuracy"]))
    # As if killed after the first edit: what came later is done again, and ends the same.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    again = call(tables, "continual", *flags, *STREAMS)
    assert path.read_text().splitlines(keepends=True) == lines
    assert again.splitlines()[-8:] == whole.splitlines()[-8:]
    with pytest.raises(UserError, match="holds a run with other settings .length: 3"):
        call(tables, "continual", *flags, "--streams", "2", "--length", "2")


def test_continual_edits_are_trained_by_the_inner_loops_flags(flags, monkeypatch):
    jobs = spy_on_sft(monkeypatch, tables)
    call(tables, "continual", *flags, *STREAMS, "--inner-warmup", "1", "--inner-epochs", "3")
    assert [len(streams) for streams in jobs] == [2, 2, 2]
    for k, streams in enumerate(jobs):
        for job in streams:
            assert (job.recipe.warmup, job.recipe.epochs) == (1, 3)
            # Room for three edits of rank 4, with the scale of one: 64 / 4.
            assert job.recipe.lora == Lora(12, 192, ["q_proj", "v_proj"])
            assert job.free.float().mean() == pytest.approx(1 / 3)
            # What was learned before is not free, and of later edits nothing is there yet.
            fixed = job.start[~job.free]
            assert bool(fixed.any()) == (k > 0)
    assert (jobs[0][0].free & jobs[1][0].free).sum() == 0


@pytest.mark.parametrize("words, message", [
    ("continual FLAGS --length 7", "--length 7: there are 6 passages"),
    ("single FLAGS --run FOLDER", "config.json is missing"),
    ("arc FLAGS", "for passages: python eval.py single"),
    *((f"{name} --preset tiny-arc --run-dir FOLDER --device cpu", "for puzzles: python eval.py arc")
      for name in ("single", "cpt", "continual"))])
def test_a_table_that_can_not_be_made_is_an_error(words, message, flags, tmp_path):
    words = words.replace("FLAGS", " ".join(flags)).replace("FOLDER", str(tmp_path))
    with pytest.raises(UserError, match=message):
        call(tables, *words.split())


QUICK = "--seeds 1 --inner-epochs 1 --edits 1".split()


@pytest.mark.parametrize("name, words", [("cpt", QUICK), ("continual", STREAMS)])
def test_a_table_s_lines_that_are_gone_or_there_twice_are_said_or_made_again(
        name, words, flags, tmp_path, varied_rewards):
    whole, path = call(tables, name, *flags, *words), tmp_path / "run" / f"{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    said = set()
    cases = list(other_lines(lines).items())
    for what, record in (("a row less", {"right": [], "accuracy": [[0.5]]}), ("older", {"x": 1})):
        cases.append((what, [as_lines([json.loads(lines[0]) | record]), *lines[1:]]))
    for what, damaged in cases:
        path.write_text("".join(damaged))
        try:
            again = call(tables, name, *flags, *words)
            assert without_seconds(again) == without_seconds(whole), what
        except UserError as e:
            assert f"{name}.jsonl" in str(e) and "\n" not in str(e)
            said.add(what)
    assert said - {"one is gone"} == {"the first is gone", "the last is there twice", "a row less",
                                      "the first is there twice", "two change places"}


def without_seconds(table):
    """The lines of a table but for their last column."""
    lines = table.splitlines()
    return [line[:-5] for line in lines if re.match(r" +(\d+  \d|pass|no )", line)]


def test_training_that_diverges_leaves_a_table_that_json_knows(flags, tmp_path):
    call(tables, "cpt", *flags, "--inner-lr", "1e15", "--seeds", "1")
    rows = json.loads((tmp_path / "run" / "cpt.json").read_text(),
                      parse_constant=lambda name: pytest.fail(name))["rows"]
    assert [row["mean"] for row in rows[1:]] == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["no adaptation", "passage only", "Its own self-edits ",
                                  "passage in the prompt", "self-edits after round 12"])
def test_no_imported_kind_takes_the_place_of_a_row(kind, passages, tmp_path):
    write_edits(tmp_path / "edits.json", passages, lambda record: {"edits": {kind: "x"}})
    with pytest.raises(UserError, match=f"{kind!r} is the name of a row of its own"):
        read_edits([tmp_path / "edits.json"], [])


def test_the_authors_own_files_are_read_as_they_are(passages, tmp_path):
    tasks = [SimpleNamespace(name="a", context=["Town 0\n" + json.loads(
        passages.read_text())[0]["context"]])]
    write_edits(tmp_path / "edits.json", passages, lambda record: {
        "completions": ["One.", "Two."], "prompt": "..."})
    assert read_edits([tmp_path / "edits.json"], tasks) == {
        "completion 1": ["One."], "completion 2": ["Two."]}
    other = tmp_path / "other.json"
    write_edits(other, passages, lambda record: {"edits": {"completion 1": "One."}})
    read_edits([tmp_path / "edits.json", other], tasks)
    write_edits(other, passages, lambda record: {"edits": {"completion 1": "Three."}})
    with pytest.raises(UserError, match="other.json: record 0: a second 'completion 1' self-edit"):
        read_edits([tmp_path / "edits.json", other], tasks)
    with pytest.raises(UserError, match="passages.json: no self-edit in it"):
        read_edits([passages], tasks)
