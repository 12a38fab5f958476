"""lab/teacher.py: who writes, who learns, and who is trained, on a few towns of the tiny world."""
import pytest

from lab import students, teacher
from outer_loop import rest_em
from support.checkpoint import EMBEDDED
from support.config import PRESETS, Config
from support.run import Run
from tests.helpers import read_lines
from tests.test_lab import call

FEW = dict(tasks=2, edits=4, eval_tasks=3, eval_edits=1, iterations=1, inner_epochs=4,
           outer_epochs=2, max_edit_tokens=48, baselines=False)


@pytest.fixture()
def few(monkeypatch):
    """The tiny preset made smaller."""
    for name, value in FEW.items():
        monkeypatch.setitem(PRESETS["tiny"], name, value)


@pytest.mark.parametrize("arm", ["small teaches itself (SEAL)", "large teaches itself (SEAL)"])
def test_who_teaches_itself_is_the_outer_loop(few, arm, tmp_path):
    """Here both models are the embedded one."""
    found = teacher.learn(arm, 3, "tune", str(EMBEDDED))["reward"]
    run = Run(Config(**PRESETS["tiny"] | dict(seed=3, eval_data="tune", run_dir=str(tmp_path))))
    rest_em(run.cfg, run)

    assert found["itself"] == [m["eval_reward"] for m in run.metrics.records]
    # The students do not change, and are the same.
    assert found["small"] == found["large"]
    assert found["small"][0] == found["itself"][0]


def test_the_student_is_what_is_rewarded_and_the_teacher_what_is_trained(few, monkeypatch):
    scored, trained = [], []
    score = students.score

    def spy_on_scores(run, model, tasks, edits, t, split, *rest, arm):
        scored.append((split, arm, run.folder.name, model))
        return score(run, model, tasks, edits, t, split, *rest, arm=arm)

    monkeypatch.setattr(students, "score", spy_on_scores)
    monkeypatch.setattr(teacher, "m_step", lambda cfg, run, model, *rest: trained.append(model))

    teacher.learn("large teaches small", 0, "tune", str(EMBEDDED))

    for split, arm, folder, _ in scored:
        assert arm == folder        # who learns, and whose tokenizer and recipe
    rewarded = [(arm, model) for split, arm, _, model in scored if split == "train"]
    fixed = {arm: model for split, arm, _, model in scored if split == "eval"}
    assert rewarded == [("small", fixed["small"])]
    (policy,) = trained
    assert policy is not fixed["small"] and policy is not fixed["large"]


@pytest.mark.slow
def test_teachers_and_students_make_a_table(few, tmp_path, capsys):
    words = [teacher, "--small", EMBEDDED, "--out", tmp_path / "out", "--towns", "tune", "--seeds",
             "0", "1", "--arms", "large teaches small", "small teaches itself (SEAL)"]

    call(*words, "--svg", tmp_path / "figure.svg")
    first = capsys.readouterr().out
    call(*words)

    assert capsys.readouterr().out == first[first.index("| who teaches whom"):]
    assert "| small teaches itself (SEAL) | itself | 0." in first
    assert len(read_lines(tmp_path / "out")) == 4
    assert "large teaches small" in (tmp_path / "figure.svg").read_text()
