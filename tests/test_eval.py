"""The tables: their rows are what the rollouts say, and the statistics are what they are by hand."""
import json
from xml.etree import ElementTree

import numpy as np
import pytest

from checkpoint import UserError
from eval import main as eval_main, row_of
from lab.curve import curve
from lab.reliability import reliability
from stats import forgetting, mean_ci, variance_components
from tests.test_outer_loop import argv, run_it, varied_rewards  # noqa: F401 (fixtures)


def evaluate(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["eval.py", *map(str, words)])
    capsys.readouterr()
    eval_main()
    return capsys.readouterr().out


@pytest.fixture()
def flags(argv):  # noqa: F811
    at = argv.index("--train-data")
    return [x for i, x in enumerate(argv) if i not in (at, at + 1)]


def test_single_passage_table(flags, argv, tmp_path, passages, monkeypatch, capsys):  # noqa: F811
    """Every row has an adapter per passage; the step-matched one takes as many steps as the self-edits; a second call trains nothing."""
    run_it([*argv[:-1], argv[-1], "--run-dir", str(tmp_path / "rl"), "--iterations", "1"])
    edits = tmp_path / "edits.json"
    records = json.loads(passages.read_text())
    edits.write_text(json.dumps([r | {"released": {"gpt": {"edit": "1. One.\n2. Two."}, "naive": {"edit": ""}}} for r in records]))
    words = ["single", *flags, "--run", tmp_path / "rl", "--edits-from", edits]
    out = evaluate(monkeypatch, capsys, *words)
    names = ["passage only", "passage only, step-matched", "its own self-edits", "gpt", "self-edits after round 1"]
    table = json.loads((tmp_path / "run" / "single.json").read_text())
    assert [row["row"] for row in table["rows"]] == ["no adaptation", *names[:4], "passage in the prompt", names[4]]
    assert all(name in out for name in names) and table["command"][:2] == ["eval.py", "single"]
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    for row in table["rows"]:
        mine = [r for r in rollouts if r["split"] == row["row"]]
        assert len(mine) == (2 if row["row"] in names else 0) and row["ci"][0] <= row["mean"] <= row["ci"][1]
        if mine:
            assert row["accuracy"] == [r["reward"] for r in sorted(mine, key=lambda r: r["task"])]
            assert all(len(r["right"]) == 2 for r in mine)  # seeds
    gpt = [r for r in rollouts if r["split"] == "gpt"]
    assert all(r["documents"] == 3 for r in gpt)
    own = {r["task"]: r["documents"] for r in rollouts if r["split"] == "its own self-edits"}
    matched = {r["task"]: r["directives"] for r in rollouts if r["split"] == "passage only, step-matched"}
    assert matched == {i: {"epochs": max(1, 2 * n)} for i, n in own.items()}  # 2 epochs, one document a step
    monkeypatch.setattr("outer_loop.sft", None)
    monkeypatch.setattr("inner_loop.sft", lambda *a: (_ for _ in ()) if not a[1] else pytest.fail("trained again"))
    assert evaluate(monkeypatch, capsys, *words).splitlines()[-3:] == out.splitlines()[-3:]


def test_imported_edits_must_be_there(flags, tmp_path, passages, monkeypatch, capsys):
    edits = tmp_path / "edits.json"
    edits.write_text(json.dumps([r | {"edits": {"mine": "x"}} for r in json.loads(passages.read_text())][:1]))
    with pytest.raises(UserError, match="no mine self-edit of"):
        evaluate(monkeypatch, capsys, "single", *flags, "--edits-from", edits)


def test_a_row_by_hand():
    base = [[True, False], [False]]
    records = [{"task": 1, "reward": 0.5, "right": [[True], [False]], "answers": [["a"], ["b"]], "cut": 1, "replies": 2, "documents": 3, "token_ids": [1] * 9, "seconds": 4},
               {"task": 0, "reward": 0.75, "right": [[True, True], [False, True]], "answers": [["a", "b"]] * 2, "cut": 2, "replies": 4, "documents": 1, "token_ids": [1], "seconds": 2}]
    row = row_of("x", records, base)
    assert row["accuracy"] == [0.75, 0.5]
    assert row["gained"] == 3 / 4 and row["lost"] == 1 / 2 and row["cut"] == 3 / 6
    assert row["documents"] == 2 and row["tokens"] == 5 and row["seconds"] == 1.5


@pytest.mark.parametrize("full", [False, True])
def test_all_passages_at_once(full, flags, tmp_path, monkeypatch, capsys):
    """One adapter, or all weights, for everything: loss falls, documents are whole self-edits, and it resumes."""
    words = ["cpt", *flags, "--inner-lr", "1e-2" if not full else "1e-3", "--inner-batch", "4", "--inner-epochs", "4", *["--full"] * full]
    out = evaluate(monkeypatch, capsys, *words)
    records = [json.loads(line) for line in (tmp_path / "run" / "cpt.jsonl").read_text().splitlines()]
    assert [r["row"] for r in records] == ["passages", "passages and its own self-edits"]
    assert records[0]["documents"] == 2 and records[1]["documents"] <= 2 + 2 * 3 and records[1]["steps"] == 4 * -(-records[1]["documents"] // 4)
    assert all(last < first for r in records for first, last in r["losses"]) and len(records[0]["right"]) == 2  # seeds
    table = json.loads((tmp_path / "run" / "cpt.json").read_text())["rows"]
    assert table[1]["accuracy"] == pytest.approx(np.mean([[np.mean(row) for row in seed] for seed in records[0]["right"]], axis=0))
    monkeypatch.setattr("eval.sft", None)
    monkeypatch.setattr("eval.tune_all", None)
    assert evaluate(monkeypatch, capsys, *words).splitlines()[-4:] == out.splitlines()[-4:]


@pytest.mark.parametrize("judge", ["model", "substring"])
def test_other_judges_in_a_run(judge, argv, monkeypatch):  # noqa: F811
    _, run = run_it([*argv, "--judge", judge, "--iterations", "1"])
    assert all(len(r["right"]) == len(r["answers"]) for r in run.rollouts.records)


def test_forgetting_by_hand():
    """Two streams of two passages."""
    found = forgetting([[[0.0, 0.2], [0.4, 0.2]], [[0.6], [0.8]], [[0.2, 0.5], [0.4, 0.7]]])
    assert found["matrix"][0] == ([pytest.approx(0.2), pytest.approx(0.2)], [pytest.approx(0.2), 0]) and len(found["matrix"][1][0]) == 1
    assert found["before any edit"][0] == pytest.approx(0.2) and found["just after its own edit"][0] == pytest.approx((0.55 + 0.75) / 2)
    assert found["after the last edit"][0] == pytest.approx(0.45) and found["gain just after its own edit"][0] == pytest.approx(0.45)
    assert found["what is left of it after the last edit"] == (pytest.approx(0.25), pytest.approx(0.0, abs=1e-9))
    assert found["forgotten since its own edit"] == (pytest.approx(0.2), pytest.approx(0.0, abs=1e-9))


def test_continual_edits_resume(flags, tmp_path, monkeypatch, capsys):
    """A triangle of accuracies; killed after the first edit, the same command ends the same."""
    words = ["continual", *flags, "--streams", "2", "--length", "3"]
    whole = evaluate(monkeypatch, capsys, *words)
    path = tmp_path / "run" / "continual.jsonl"
    records = path.read_text().splitlines()
    assert [len(json.loads(r)["accuracy"][0]) for r in records] == [3, 1, 2, 3]
    path.write_text("\n".join(records[:2]) + "\n")
    again = evaluate(monkeypatch, capsys, *words)
    assert path.read_text().splitlines() == records and again.splitlines()[-8:] == whole.splitlines()[-8:]


def test_reliability_by_hand_and_by_simulation():
    """Rewards with a known spread between edits and between seeds: the statistics find both, and what the best is truly worth."""
    flat = variance_components([np.array([[0.0, 1.0], [1.0, 0.0]])])
    assert list(flat.values())[:2] == [pytest.approx(0.5 ** 0.5), 0] and flat["mean reward"] == 0.5
    assert flat["the best of K, by the seeds that chose it"] == 0.5
    assert flat["the best of K, chosen without one seed, by that seed"] == 0  # the luckier edit of one seed is the unluckier of the other
    rng = np.random.default_rng(0)
    truth = 0.1 * rng.standard_normal((4000, 5))
    noisy = [t[:, None] + 0.2 * rng.standard_normal((5, 3)) for t in truth]
    found = list(variance_components(noisy).values())
    assert found[0] == pytest.approx(0.2, rel=0.03) and found[1] == pytest.approx(0.1, rel=0.05)
    assert found[2] == pytest.approx(0.01 / (0.01 + 0.04 / 3), abs=0.03) and abs(found[3]) < 0.01
    two_seeds = np.mean([t[a[:, :2].mean(axis=1).argmax()] for t, a in zip(truth, noisy)])
    assert found[4] > 0.15 > found[5] and found[5] == pytest.approx(two_seeds, abs=0.01)


def test_reliability_of_a_run(argv, tmp_path, monkeypatch, capsys):  # noqa: F811
    run_it(argv)
    capsys.readouterr()
    reliability([str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert "4 passages, 12 self-edits, 2 seeds each" in out and "reliability of a 2-seed mean" in out and "number of documents" in out
    with pytest.raises(UserError, match="no rewards"):
        reliability([str(tmp_path)])


def test_interval_over_seeds_by_hand():
    mean, half = mean_ci([[0.1, 1.0], [0.2, 1.0], [0.3, 1.0]])
    assert mean == pytest.approx([0.2, 1]) and half == pytest.approx([4.30 * 0.1 / 3 ** 0.5, 0])


def test_curves_of_several_runs(argv, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Runs that differ in their seed become one line, with an interval; the drawing is well-formed."""
    folders = []
    for extra in (["--seed", "0"], ["--seed", "1"], ["--seed", "0", "--select", "random"]):
        folders.append(str(tmp_path / f"run{len(folders)}"))
        run_it([*argv, *extra, "--run-dir", folders[-1]])
    capsys.readouterr()
    curve([*folders, "--svg", str(tmp_path / "curve.svg")])
    out = capsys.readouterr().out
    assert "select best, 2 seeds" in out and "select random, 1 seeds" in out and "gain" in out
    drawing = ElementTree.parse(tmp_path / "curve.svg").getroot()
    assert drawing.tag.endswith("svg") and len([e for e in drawing if e.get("stroke-width") == "2.5"]) == 2
    (tmp_path / "run1" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has not ended"):
        curve(folders)
