"""The paper's tables: their rows are what the rollouts say, and a second call computes nothing."""
import io
import json
import math
import re
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest

import eval as tables
import inner_loop
from data import judges
from data.judges import each
from data.knowledge import read_edits
from engine.decode import quiet
from eval import cpt_row, row_of
from lora import Lora
from support.files import UserError, as_lines
from tests.helpers import SMALL, even_length, open_run, parse, read_lines
from tests.strict import may_stay_unused
from tests.test_run import other_lines, spy_on_sft, varied_run


@pytest.fixture()
def flags(argv):
    """The flags of a small run, but for the training data, which no table needs."""
    at = argv.index("--train-data")
    return argv[:at] + argv[at + 2:]


def evaluate(*words):
    """What `python eval.py WORDS` prints."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr("sys.argv", ["eval.py", *map(str, words)])
        tables.main()
    return out.getvalue()


def forbid_training(monkeypatch):
    @may_stay_unused
    def sft(model, jobs, progress=quiet):
        assert not jobs, "trained again"
        return iter([])

    monkeypatch.setattr(inner_loop, "sft", sft)
    monkeypatch.setattr(tables, "sft", sft)


def write_edits(path, passages, edits_of):
    """The passages with what `edits_of(record)` says of their self-edits."""
    records = [record | edits_of(record) for record in json.loads(passages.read_text())]
    path.write_text(json.dumps(records))
    return records


# ------------------------------------------------------------------------------- one passage

# The rows of self-edits: each has an adapter per passage and seed.
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
        out = evaluate(*words)
    return SimpleNamespace(
        words=words, out=out, result=json.loads((folder / "table" / "single.json").read_text()),
        rollouts=read_lines(folder / "table" / "rollouts.jsonl"))


def rollouts_of(table, row):
    found = [r for r in table.rollouts if r["arm"] == row]
    return sorted(found, key=lambda r: r["task"])


def test_the_table_of_single_passages_has_its_rows(table):
    rows = [row["row"] for row in table.result["rows"]]
    assert rows == ["no adaptation", *NAMES[:4], "passage in the prompt", NAMES[4]]
    for row in rows:
        assert re.search(rf"^ *{row}  +[\d.]+ \[", table.out, re.MULTILINE)
    assert table.result["command"][:2] == ["eval.py", "single"]
    assert table.result["seed"] == 0


def test_a_row_is_the_mean_reward_of_each_passage_and_its_difference_is_in_pairs(table):
    (reference,) = [row for row in table.result["rows"] if row["row"] == NAMES[1]]

    for row in table.result["rows"]:
        low, high = row["ci"]
        assert row["mean"] == pytest.approx(np.mean(row["accuracy"]))
        assert low <= row["mean"] <= high
        mine = rollouts_of(table, row["row"])
        if row["row"] in NAMES:
            assert row["accuracy"] == [r["reward"] for r in mine]
            assert [len(r["right"]) for r in mine] == [2, 2]    # two seeds
        else:
            assert mine == []
        # To the step-matched passage.
        if row is reference:
            assert "difference" not in row
        else:
            assert row["difference"] == pytest.approx(row["mean"] - reference["mean"])
            low, high = row["difference_ci"]
            assert low <= row["difference"] <= high


def test_the_matched_passage_takes_as_many_steps_as_the_self_edit(table):
    own = rollouts_of(table, "its own self-edits")
    matched = rollouts_of(table, "passage only, step-matched")

    assert [len(own), len(matched)] == [2, 2]
    for ours, theirs in zip(own, matched):
        # Two epochs of one document a step; the passage is a single document.
        assert theirs["directives"] == {"epochs": max(1, 2 * ours["documents"])}
        assert theirs["documents"] == 1


def test_imported_self_edits_are_read_as_the_models_own_are(table):
    for r in rollouts_of(table, "gpt"):
        assert r["text"] == "1. One.\n2. Two."
        assert r["documents"] == 3      # two pieces and the passage


def test_a_second_call_trains_nothing_and_prints_the_same_table(table, varied_rewards, monkeypatch):
    forbid_training(monkeypatch)
    again = evaluate(*table.words)
    # All but the lines about the sampling of self-edits.
    assert again == table.out[table.out.index("\n2 tasks, 4 questions, 2 seeds"):]


def test_imported_self_edits_must_be_there_for_each_passage(flags, tmp_path, passages):
    edits = tmp_path / "edits.json"
    first = json.loads(passages.read_text())[0]
    edits.write_text(json.dumps([first | {"edits": {"mine": "x"}}]))
    with pytest.raises(UserError, match=rf"no mine self-edit of 'Town 1' in {edits}"):
        evaluate("single", *flags, "--edits-from", edits)


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
    tasks = [SimpleNamespace(name="A", context=["A\nAbout a."]),
             SimpleNamespace(name="B", context=["B\nAbout b."])]

    assert read_edits([one, two], tasks) == {"x": ["x of a", "x of b"], "y": ["y of a", "y of b"]}
    assert read_edits([], tasks) == {}


def test_a_row_by_hand():
    base = [[True, False], [False]]
    records = [
        {"task": 1, "reward": 0.5, "right": [[True], [False]], "cut": 1, "replies": 2,
         "documents": 3, "token_ids": [1] * 9, "seconds": 4},
        {"task": 0, "reward": 0.75, "right": [[True, True], [False, True]], "cut": 2, "replies": 4,
         "documents": 1, "token_ids": [1], "seconds": 2}]

    row = row_of("x", records, base)

    assert row == {
        "row": "x", "accuracy": [0.75, 0.5],
        "gained": 3 / 4,    # of two missed questions with two seeds each
        "lost": 1 / 2,      # of one known question with two seeds
        "cut": 3 / 6, "documents": 2, "tokens": 5, "seconds": 1.5}


def test_a_task_of_several_self_edits_counts_by_their_mean():
    one = {"task": 0, "right": [[True]], "cut": 0, "replies": 1, "documents": 1, "token_ids": [1],
           "seconds": 1}
    row = row_of("x", [one | {"reward": 1.0}, one | {"reward": 0.5}], [[True]])
    assert row["accuracy"] == [0.75]
    assert math.isnan(row["gained"])    # nothing was missed


# ------------------------------------------------------------------------------- all passages

CPT = "--inner-lr 1e-2 --inner-batch 4 --inner-epochs 4 --inner-warmup 1".split()


def test_all_passages_are_learned_by_one_adapter(flags, tmp_path, varied_rewards, monkeypatch):
    jobs = spy_on_sft(monkeypatch, tables)

    first = evaluate("cpt", *flags, *CPT)

    own, both = records = read_lines(tmp_path / "run" / "cpt.jsonl")
    edits = [r["text"] for r in read_lines(tmp_path / "run" / "edits.jsonl")]
    assert own["row"] == "passages"
    assert own["documents"] == 2
    assert both["row"] == "passages and its own self-edits"
    assert len(edits) == 2 * 3
    assert both["documents"] == 2 + len([text for text in edits if text])
    for record in records:
        assert record["steps"] == 4 * math.ceil(record["documents"] / 4)
        assert len(record["right"]) == 2        # seeds
        for begin, end in record["losses"]:
            assert end < begin
    # A job per row and seed.
    assert [len(group) for group in jobs] == [1, 1, 1, 1]
    for (job,) in jobs:
        assert job.recipe.warmup == 1
        assert job.recipe.batch == 4
        assert job.recipe.lora == Lora(4, 64, ["q_proj", "v_proj"])
    # A seed's draws are those of both rows: a row's name is no part of any draw.
    seeds = [job.seed for (job,) in jobs]
    assert seeds[:2] == seeds[2:]
    assert seeds[0] != seeds[1]
    # The table is what its lines say, and is resumed.
    rows = json.loads((tmp_path / "run" / "cpt.json").read_text())["rows"]
    assert [row["row"] for row in rows[1:]] == [record["row"] for record in records]
    for row, record in zip(rows[1:], records):
        assert row["accuracy"] == pytest.approx(np.mean(record["right"], axis=(0, 2)))
    forbid_training(monkeypatch)
    assert evaluate("cpt", *flags, *CPT).splitlines()[-4:] == first.splitlines()[-4:]


def test_a_document_of_all_passages_is_a_whole_self_edit(flags, tmp_path, passages, tok,
                                                         monkeypatch):
    jobs = spy_on_sft(monkeypatch, tables)
    edits = tmp_path / "edits.json"
    records = write_edits(edits, passages, lambda record: {
        "edits": {"mine": f"1. {record['title']}.\n2. Two."}})

    evaluate("cpt", *flags, "--seeds", "1", "--inner-epochs", "1", "--edits-from", edits)

    (job,) = jobs[-1]       # of the last row
    texts = [f"{record['title']}\n{record['context']}" for record in records[:2]]
    texts += [record["edits"]["mine"] for record in records[:2]]
    assert job.examples == [(tok.document(text), [True] * len(tok.document(text)))
                            for text in texts]


def test_a_row_of_all_passages_by_hand():
    record = {"row": "x", "right": [[[True, True], [False]], [[False, True], [True]]],
              "documents": 5, "tokens": 70, "seconds": 8}
    row = cpt_row(record, [[True, False], [False]], seeds=2)
    assert row == {"row": "x", "accuracy": [0.75, 0.5], "gained": 3 / 4, "lost": 1 / 2,
                   "documents": 5, "tokens": 70, "seconds": 4}


# ------------------------------------------------------------------------------- continual

STREAMS = ["--streams", "2", "--length", "3"]


def test_continual_edits_make_a_triangle_of_accuracies_and_resume(flags, tmp_path, varied_rewards):
    whole = evaluate("continual", *flags, *STREAMS)

    path = tmp_path / "run" / "continual.jsonl"
    records = read_lines(path)
    assert [record["edit"] for record in records] == [0, 1, 2, 3]
    # Before any edit all three passages are asked about, then those that were learned.
    for record, asked in zip(records, [3, 1, 2, 3]):
        assert [len(stream) for stream in record["accuracy"]] == [asked, asked]
    result = json.loads((tmp_path / "run" / "continual.json").read_text())
    mean, _ = result["after the last edit"]
    assert mean == pytest.approx(np.mean(records[3]["accuracy"]))

    # As if killed after the first edit: what came later is done again, and ends the same.
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    again = evaluate("continual", *flags, *STREAMS)
    assert path.read_text().splitlines(keepends=True) == lines
    assert again.splitlines()[-8:] == whole.splitlines()[-8:]


def test_continual_edits_are_trained_by_the_inner_loops_flags(flags, monkeypatch):
    jobs = spy_on_sft(monkeypatch, tables)

    evaluate("continual", *flags, *STREAMS, "--inner-warmup", "1", "--inner-epochs", "3")

    assert len(jobs) == 3
    for k, streams in enumerate(jobs):
        assert len(streams) == 2
        for job in streams:
            assert job.recipe.warmup == 1
            assert job.recipe.epochs == 3
            # Room for three edits of rank 4, with the scale of one: 64 / 4.
            assert job.recipe.lora == Lora(12, 192, ["q_proj", "v_proj"])
            assert job.free.float().mean() == pytest.approx(1 / 3)
            # What was learned before is not free, and of later edits nothing is there yet.
            fixed = job.start[~job.free]
            assert bool(fixed.any()) == (k > 0)
    assert (jobs[0][0].free & jobs[1][0].free).sum() == 0


# ------------------------------------------------------------------------------- command line

@pytest.mark.parametrize("words, message", [
    ("continual FLAGS --length 7", "--length 7: there are 6 passages"),
    ("single FLAGS --run FOLDER", "no checkpoint iter_1 there"),
    ("arc FLAGS", "for passages: python eval.py single"),
    *((f"{name} --preset tiny-arc --run-dir FOLDER --device cpu", "for puzzles: python eval.py arc")
      for name in ("single", "cpt", "continual"))])
def test_a_table_that_can_not_be_made_is_an_error(words, message, flags, tmp_path):
    words = words.replace("FLAGS", " ".join(flags)).replace("FOLDER", str(tmp_path))
    with pytest.raises(UserError, match=message):
        evaluate(*words.split())


def test_a_run_of_another_domain_is_refused(argv, tmp_path):
    (tmp_path / "other" / "iter_1").mkdir(parents=True)
    (tmp_path / "other" / "config.json").write_text('{"domain": "arc"}')
    run = open_run(parse(argv))
    with pytest.raises(UserError, match="is a run of arc, and this one is of knowledge"):
        tables.prints_of_rounds(run, tmp_path / "other")


@pytest.mark.parametrize("words, shown, not_shown", [
    (["single"], ["--run RUN_DIR", "--edits-from FILE"], ["--streams"]),
    (["cpt"], ["--edits-from FILE"], ["--run RUN_DIR", "--streams"]),
    (["continual"], ["--streams STREAMS", "--length LENGTH"], ["--edits-from", "--run RUN_DIR"]),
    (["arc"], ["--run RUN_DIR"], ["--edits-from", "--streams"]),
    ([], ["single", "cpt", "continual", "arc"], ["--inner-rank"])])
def test_help_names_a_tables_own_flags(words, shown, not_shown):
    done = subprocess.run([sys.executable, "eval.py", *words, "--help"], capture_output=True,
                          text=True)

    assert done.returncode == 0, done.stderr
    for text in shown:
        assert text in done.stdout
    for text in not_shown:
        assert text not in done.stdout
    if words:
        assert "--inner-rank INT" in done.stdout    # a run's flags are there, too


def test_a_table_must_be_named():
    done = subprocess.run([sys.executable, "eval.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "TABLE" in done.stderr


# ------------------------------------------------------------------------------- damaged records

@pytest.mark.parametrize("name, words", [("cpt", []), ("continual", STREAMS)])
def test_a_table_s_lines_that_are_gone_or_there_twice_are_said_or_made_again(
        name, words, flags, tmp_path, varied_rewards):
    whole, path = evaluate(name, *flags, *words), tmp_path / "run" / f"{name}.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    said = set()
    cases = list(other_lines(lines).items())
    for what, record in (("a row less", {"right": [], "accuracy": [[0.5]]}), ("older", {"x": 1})):
        cases.append((what, [as_lines([json.loads(lines[0]) | record]), *lines[1:]]))
    for what, damaged in cases:
        path.write_text("".join(damaged))
        try:
            again = evaluate(name, *flags, *words)
            assert without_seconds(again) == without_seconds(whole), what
        except UserError as e:
            assert f"{name}.jsonl" in str(e) and "\n" not in str(e)
            said.add(what)
    # The last ones are made again.
    assert said - {"one is gone"} == {"the first is gone", "the last is there twice", "a row less",
                                      "the first is there twice", "two change places"}


def without_seconds(table):
    """The lines of a table but for their last column."""
    lines = table.splitlines()
    return [line[:-5] for line in lines if re.match(r" +(\d+  \d|pass|no )", line)]


def test_a_folder_with_another_length_is_refused(flags, tmp_path):
    evaluate("continual", *flags, *STREAMS)
    with pytest.raises(UserError, match="holds a run with other settings .length: 3"):
        evaluate("continual", *flags, "--streams", "2", "--length", "2")


def test_training_that_diverges_leaves_a_table_that_json_knows(flags, tmp_path):
    evaluate("cpt", *flags, "--inner-lr", "1e30", "--seeds", "1")
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
    # The same twice is no contradiction, another text is one.
    other = tmp_path / "other.json"
    write_edits(other, passages, lambda record: {"edits": {"completion 1": "One."}})
    read_edits([tmp_path / "edits.json", other], tasks)
    write_edits(other, passages, lambda record: {"edits": {"completion 1": "Three."}})
    with pytest.raises(UserError, match="other.json: record 0: a second 'completion 1' self-edit"):
        read_edits([tmp_path / "edits.json", other], tasks)
    with pytest.raises(UserError, match="passages.json: no self-edit in it"):
        read_edits([passages], tasks)
