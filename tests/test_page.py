"""What a reader sees of a run, whatever its files hold; and its statistics: they are what they are
by hand, and find what a simulation put in."""
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from support import page
from support.config import Config
from support.files import UserError
from support.stats import bootstrap_ci, forgetting
from tests import helpers
from tests.helpers import ROLLOUT, call, write_lines

HOSTILE = "</pre><script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x00\x1b[31m\ud800&amp;"


class Balanced(HTMLParser):
    """Asserts that all elements are closed in turn, and collects what there is."""

    def __init__(self, text):
        super().__init__()
        self.open, self.kinds, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, kind, attributes):
        self.kinds.append(kind)
        self.attributes += attributes
        if kind not in ("meta", "img", "br"):
            self.open.append(kind)

    def handle_endtag(self, kind):
        assert self.open.pop() == kind

    def handle_data(self, text):
        self.words.append(text)


def rollout(t, split, task, edit, worth, **others):
    return ROLLOUT | {
        "iteration": t, "split": split, "task": task, "edit": edit, "title": f"town {task}",
        "reward": worth, "text": f"edit {edit} of task {task} at {t}", "directives": {},
        "tools": [], "questions": ["Who?", "Where?"], "gold": ["Ann", "Rome"],
        "context": "Ann lives in Rome.", "kinds": ["forward", "reversed"], "forms": ["plain"],
        "answers": [["Ann", "Bath"]], "right": [[True, False]], "losses": [[2.0, 1.0]]} | others


def measured(t, reward):
    arms = [{"name": "un-adapted", "reward": 0.125, "by_kind": {}},
            {"name": "passage only", "reward": 0.375, "by_kind": {}}]
    return helpers.MEASURED | {
        "iteration": t, "eval_reward": reward, "eval_ci": [reward - 0.05, reward + 0.05],
        "eval_by_kind": {"forward": reward, "reversed": 0.25},
        "baselines": arms if t == 0 else [],
        "made_of": {"plain": 0.75, "copy": 0.25, "lr 0.01": 0.4375}}


def a_run(folder, rollouts=(), metrics=(), **settings):
    """The page of a run's folder, parsed. Its drawings must be XML."""
    folder.mkdir(exist_ok=True)
    cfg = vars(Config(domain="tinyworld", run_dir="runs/tiny")) | {"program": "outer_loop"}
    (folder / "config.json").write_text(json.dumps(cfg | settings))
    for name, records in (("rollouts", rollouts), ("metrics", metrics)):
        write_lines(folder / f"{name}.jsonl", records)
    text = page.write(folder).read_text(encoding="utf-8")
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)
    found = Balanced(text)
    found.text, found.words = text, " ".join(" ".join(found.words).split())
    return found


MEASURED = [measured(0, 0.5), measured(1, 0.75)]


def rounds(**others):
    """Two iterations of two held-out tasks, and one round of training."""
    records = [rollout(t, "eval", task, 0, 0.5 + 0.25 * t, **others)
               for t in (0, 1) for task in (1, 0)]
    rewards = {0: (0.5, 0.5), 1: (0.0625, 0.9375)}
    return records + [rollout(0, "train", task, edit, reward, **others)
                      for task, row in rewards.items() for edit, reward in enumerate(row)]


def test_what_a_reader_sees(tmp_path):
    records = rounds()
    records[2]["right"] = [[True, True]]
    records[-1]["weight"] = 1.0
    found = a_run(tmp_path, records, MEASURED, tasks=7, iterations=1, command=[
        "/usr/bin/python", "outer_loop.py", "--tasks", "7", "--model=/home/ann/a model"])
    assert 'd="M44.0 150.0L544.0 85.0"' in found.text   # a share is drawn at its height
    for shown in ("it answers 0.75", "all questions 0.50 → 0.75", "reversed questions 0.25 → 0.25",
                  "passage only: 0.38", "44 %", "reads 7 passages", "plain: 75 % → 75 %",
                  "edit 1 of task 1 at 0", "python outer_loop.py --tasks 7 '--model=a model'",
                  "✓ right", "✗ wrong", "before training"):
        assert shown in found.words
    # Of the training tasks that with the largest spread, with its passage, its winner first.
    rivals = found.words.partition("Two rivals")[2].partition("What self-edits are made of")[0]
    assert "town 1" in rivals and "town 0" not in rivals and "Ann lives in Rome." in rivals
    assert rivals.index("0.94") < rivals.index("learned in the M-step") < rivals.index("0.06")
    assert "prefers-color-scheme: dark" in found.text and "script" not in found.kinds
    assert not any("http" in (value or "") for name, value in found.attributes
                   if name not in ("xmlns", "http-equiv"))


def test_a_control_beside_a_run_is_drawn_with_it(tmp_path):
    a_run(tmp_path / "control", metrics=[measured(0, 0.5), measured(1, 0.25)], update="random",
          seed=3)
    a_run(tmp_path / "another", metrics=[measured(0, 0.5), measured(1, 0.125)], update="random",
          inner_lr=0.5)
    found = a_run(tmp_path / "run", rounds(), MEASURED)
    assert "runs that keep self-edits at random end at 0.25." in found.words
    assert "at random (1 run): 0.50 → 0.25" in found.words


def test_puzzles_are_coloured_grids_and_no_path_of_a_machine_is_shown(tmp_path):
    puzzle = dict(questions=["12\n34"], gold=["00\n00"], answers=[["55\n55\n\n00\n00"]],
                  right=[[True]], context="", kinds=[], forms=[])
    found = a_run(tmp_path, rounds(**puzzle), MEASURED, domain="tinyarc",
                        model="/home/ann/models/tiny-arc")
    # Two held-out self-edits, each with two attempts, beside the question and the solution.
    assert found.kinds.count("rect") == 4 * (1 + 1 + 2 + 2)
    assert "/home/ann" not in found.text and "tiny-arc" in found.text


@pytest.mark.parametrize("gains, told", [
    # Of those near the mean gain, 0.5, the one whose reversed questions were learned.
    ([(0.0, 0.5, True), (0.0, 0.55, False), (0.0, 1.0, True)], 0),
    # None is near: the nearest.
    ([(0.0, 1.0, True), (0.0, 0.2, True)], 1)])
def test_the_task_that_is_shown(tmp_path, gains, told):
    records = []
    for task, (before, after, learned) in enumerate(gains):
        records += [rollout(0, "eval", task, 0, before, right=[[True, False]]),
                    rollout(1, "eval", task, 0, after, right=[[True, learned]])]
    metrics = [measured(0, 0.0), measured(1, 0.5)]
    metrics[1]["eval_by_kind"] = {"forward": 0.0, "reversed": 0.875}
    found = a_run(tmp_path, records, metrics)
    assert f"town {told} was not trained on" in found.words
    assert found.words.index("Where?") < found.words.index("Who?")


@pytest.mark.parametrize("rollouts, metrics", [
    ([], []), (rounds()[:1], []), (rounds()[:2], MEASURED[:1]), (rounds()[:3], MEASURED[:1]),
    ([rollout(0, "eval", 0, 0, 0.5, arm="its own self-edits", right=[[True, False], [False] * 2],
              answers=[["a", "b"]] * 2, losses=[[None, 1]] * 2)], [])])
def test_a_run_that_has_just_begun(tmp_path, rollouts, metrics):
    found = a_run(tmp_path, rollouts, metrics)
    assert ("No round is measured" in found.words) == (not metrics)
    assert ("Before and after" in found.words) == bool(rollouts)


def test_an_unreadable_self_edit_never_wins(tmp_path):
    unreadable = dict(note="no JSON", documents=0, right=[], answers=[], losses=[])
    found = a_run(tmp_path, [
        rollout(0, "train", 0, 0, 0.0, **unreadable), rollout(0, "train", 0, 1, 0.0),
        rollout(0, "eval", 0, 0, 0.0, **unreadable)])
    assert "no JSON" in found.words and "no answer" in found.words
    best = found.words.partition("The best")[2].partition("The worst")[0]
    assert "edit 1 of task 0" in best


def test_texts_of_others_are_inert(tmp_path):
    others = dict(title=HOSTILE, text=HOSTILE + "x" * 10 ** 6, note=HOSTILE, questions=[HOSTILE],
                  gold=[HOSTILE], answers=[[HOSTILE]], right=[[True]], kinds=[HOSTILE],
                  forms=[HOSTILE], context=HOSTILE)
    metrics = [measured(0, 0.5), measured(1, 0.75)]
    for m in metrics:
        m["made_of"] = {HOSTILE: 1.0}
        m["eval_by_kind"] = {HOSTILE: 0.5}
    metrics[0]["baselines"][0]["name"] = HOSTILE
    found = a_run(tmp_path, rounds(**others), metrics, model=HOSTILE[:-6])
    assert not {"script", "img"} & set(found.kinds)
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\ud800]", found.text)
    assert len(found.text) < 10 ** 5


@pytest.mark.parametrize("damage", [{"reward": "<b>"}, {"questions": 3}, {"answers": [[]]}])
def test_no_records_of_a_run(tmp_path, damage):
    with pytest.raises(UserError, match="no page|not a record of a run"):
        a_run(tmp_path, rounds(**damage), MEASURED)


def test_what_eval_writes(tmp_path):
    write_lines(tmp_path / "continual.jsonl", [{"edit": 0, "accuracy": [[0.0, 0.5], [0.0, 0.0]]},
                                               {"edit": 1, "accuracy": [[1.0], [0.5]]}])
    (tmp_path / '0_"x".svg').write_text("<svg><script>alert(1)</script></svg>")
    found = a_run(tmp_path, program="eval continual")
    assert "passage 2" in found.words and "0.75" in found.words
    assert "How it was trained" not in found.words
    assert found.kinds.count("img") == 1 and "script" not in found.kinds


def test_command_line(tmp_path):
    a_run(tmp_path, rounds(), MEASURED)
    (tmp_path / "report.html").unlink()
    # A run that is being written: its last line is torn, and is left so.
    with (tmp_path / "rollouts.jsonl").open("a") as f:
        f.write('{"iteration": 1, "spl')
    assert call(page, tmp_path).strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").exists()
    assert (tmp_path / "rollouts.jsonl").read_text().endswith('"spl')
    with pytest.raises(UserError, match="missing"):
        page.write(tmp_path / "none")


def test_a_page_that_can_not_be_made_stops_no_run(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    said = []
    page.refresh(SimpleNamespace(folder=tmp_path, log=said.append))
    assert len(said) == 1
    assert said[0].startswith("note: ")


@pytest.mark.parametrize("level, deviations", [({}, 1.96), ({"level": 0.5}, 0.674)])
def test_the_bootstrap_interval_is_the_normal_one_where_there_are_many_values(level, deviations):
    low, high = bootstrap_ci([0, 1] * 100, **level)
    assert low == pytest.approx(0.5 - deviations * 0.5 / 200 ** 0.5, abs=0.01)
    assert high == pytest.approx(1 - low, abs=0.01)
    assert [low, high] == bootstrap_ci([0, 1] * 100, **level)
    assert bootstrap_ci([0.3]) == [0.3, 0.3]


def test_forgetting_by_hand():
    before = [[0.0, 0.2], [0.4, 0.2]]
    after_one = [[0.6], [0.8]]
    after_two = [[0.2, 0.5], [0.4, 0.7]]

    found = forgetting([before, after_one, after_two])

    # Just after its own edit a stream has (0.6 + 0.5) / 2, (0.8 + 0.7) / 2.
    means = [mean for mean, _ in found.pop("matrix")]
    assert [x for mean in means for x in mean] == pytest.approx([0.2, 0.2, 0.7, 0.3, 0.6])
    assert {name: pytest.approx(value, abs=1e-9) for name, value in found.items()} == {
        "before any edit": (0.2, 0.1),
        "just after its own edit": (0.65, 0.1),
        "after the last edit": (0.45, 0.1),
        "gain just after its own edit": (0.45, 0),
        "what is left of it after the last edit": (0.25, 0),
        "forgotten since its own edit": (0.2, 0)}
