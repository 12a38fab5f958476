"""page.py: what a reader sees of a run, whatever the run's files hold."""
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from support import page
from support.config import Config
from support.files import UserError

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
        if kind not in ("meta", "img"):
            self.open.append(kind)

    def handle_endtag(self, kind):
        assert self.open.pop() == kind

    def handle_data(self, text):
        self.words.append(text)


def rollout(t, split, task, edit, worth, **others):
    return {"iteration": t, "split": split, "arm": "", "task": task, "edit": edit,
            "title": f"town {task}", "reward": worth, "unadapted": 0.125,
            "text": f"edit {edit} of task {task} at {t}", "directives": {}, "tools": [],
            "documents": 1, "questions": ["Who?", "Where?"], "gold": ["Ann", "Rome"],
            "answers": [["Ann", "Bath"]], "right": [[True, False]], "losses": [[2.0, 1.0]],
            "seconds": 0.1, "note": ""} | others


def measured(t, reward):
    arms = [{"name": "un-adapted", "reward": 0.125, "by_kind": {}},
            {"name": "passage only", "reward": 0.375, "by_kind": {}}]
    return {"iteration": t, "eval_reward": reward, "eval_ci": [reward - 0.05, reward + 0.05],
            "eval_by_kind": {"forward": reward, "reversed": 0.25}, "eval_unadapted": 0.125,
            "eval_tasks": 2, "baselines": arms if t == 0 else [], "train_reward": None,
            "made_of": {"plain": 0.75, "copy": 0.25, "lr 0.01": 0.4375}, "seconds": 3.0}


def a_run(folder, rollouts=(), metrics=(), **settings):
    """A run's folder; the page of it, parsed, and its text."""
    folder.mkdir(exist_ok=True)
    cfg = vars(Config(domain="tinyworld", run_dir="runs/tiny")) | {"program": "outer_loop"}
    (folder / "config.json").write_text(json.dumps(cfg | settings))
    for name, records in (("rollouts", rollouts), ("metrics", metrics)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)
    text = page.write(folder).read_text(encoding="utf-8")
    return Balanced(text), text


def rounds(**others):
    """Two iterations of two held-out tasks, and one round of training."""
    records = [rollout(t, "eval", task, 0, 0.5 + 0.25 * t, **others)
               for t in (0, 1) for task in (1, 0)]
    # The rewards of task 1 differ most.
    rewards = {0: (0.5, 0.5), 1: (0.0625, 0.9375)}
    return records + [rollout(0, "train", task, edit, reward, **others)
                      for task, row in rewards.items() for edit, reward in enumerate(row)]


def test_what_a_reader_sees(tmp_path):
    records = rounds()
    records[2]["right"] = [[True, True]]
    found, text = a_run(tmp_path / "r", records, [measured(0, 0.5), measured(1, 0.75)], tasks=7)
    words = " ".join(found.words)
    for number in ("0.500 [0.450, 0.550]", "0.750", "passage only 0.375", "44%", "reads 7 passages",
                   "plain 75% → 75%", "--tasks 7", "✓ right", "✗ wrong", "0.938"):
        assert number in words
    # Of the training tasks that with the largest spread, its winner first and marked.
    rivals = words[words.index("Rivals"):words.index("Held-out tasks")]
    assert "town 1" in rivals and "town 0" not in rivals
    assert rivals.index("0.938, un-adapted 0.125 ★ the best") < rivals.index("0.062")
    assert "prefers-color-scheme: dark" in text and "script" not in found.kinds
    assert not any("http" in (value or "") for name, value in found.attributes
                   if name not in ("xmlns", "http-equiv"))


def test_drawings_are_xml(tmp_path):
    _, text = a_run(tmp_path / "r", rounds(), [measured(0, 0.5), measured(1, 0.75)])
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) > 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_a_share_is_drawn_at_its_height():
    text = page.plot([("a", [0.0, 1.0], [(0.0, 0.5), (1.0, 1.0)], {})], rounds=1)
    assert 'd="M48.0 230.0L390.0 15.0L390.0 15.0"' in text
    assert 'd="M48.0 230.0L48.0 122.5"' in text


@pytest.mark.parametrize("rollouts, metrics", [
    ([], []),
    (rounds()[:1], []),
    (rounds()[:2], [measured(0, 0.5)]),
    (rounds()[:3], [measured(0, 0.5)]),
    ([rollout(0, "eval", 0, 0, 0.5, arm="its own self-edits", right=[[True, False], [False] * 2])],
     [])])
def test_a_run_that_has_just_begun(tmp_path, rollouts, metrics):
    found, _ = a_run(tmp_path / "r", rollouts, metrics)
    words = " ".join(found.words)
    assert ("no round is measured" in words) == (not metrics)
    assert ("Held-out tasks" in words) == bool(rollouts)


def test_an_unreadable_self_edit_never_wins(tmp_path):
    records = [rollout(0, "train", 0, 0, 0.0, note="no JSON", documents=0, right=[], answers=[]),
               rollout(0, "train", 0, 1, 0.0),
               rollout(0, "eval", 0, 0, 0.0, note="no JSON", documents=0, right=[], answers=[])]
    found, text = a_run(tmp_path / "r", records)
    assert "no JSON" in found.words and "no answer" in found.words
    assert text.count("★") == 1 and text.index("★") > text.index("self-edit 2")


def test_texts_of_others_are_inert(tmp_path):
    others = dict(title=HOSTILE, text=HOSTILE + "x" * 10 ** 6, note=HOSTILE, questions=[HOSTILE],
                  gold=[HOSTILE], answers=[[HOSTILE]], right=[[True]])
    metrics = [measured(0, 0.5), measured(1, 0.75)]
    for m in metrics:
        m["made_of"] = {HOSTILE: 1.0}
        m["eval_by_kind"] = {HOSTILE: 0.5}
    metrics[0]["baselines"][0]["name"] = HOSTILE
    # JSON in which "\ud800" is escaped is legal; config.json with it is refused by read_json.
    found, text = a_run(tmp_path / "r", rounds(**others), metrics, model=HOSTILE[:-6])
    assert not {"script", "img"} & set(found.kinds)
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\ud800]", text)
    assert len(text) < 10 ** 5
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(drawing)


@pytest.mark.parametrize("damage", [{"reward": "<b>"}, {"questions": 3}, {"answers": [[]]}])
def test_no_records_of_a_run(tmp_path, damage):
    with pytest.raises(UserError, match="no page"):
        a_run(tmp_path / "r", rounds(**damage), [measured(0, 0.5), measured(1, 0.75)])


def test_what_eval_writes(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    lines = [{"edit": 0, "accuracy": [[0.0, 0.5], [0.0, 0.0]]},
             {"edit": 1, "accuracy": [[1.0], [0.5]]}]
    (folder / "continual.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["eval.py", "single", "--run", "a b"]
    (folder / "single.json").write_text(json.dumps({"command": command}))
    (folder / '0_"x".svg').write_text("<svg><script>alert(1)</script></svg>")
    found, _ = a_run(folder, program="eval continual")
    words = " ".join(found.words)
    assert "python eval.py single --run 'a b'" in words and "0.750" in words
    assert "The two loops" not in words
    assert found.kinds.count("img") == 1 and "script" not in found.kinds


def test_command_line(tmp_path):
    a_run(tmp_path / "r", rounds(), [measured(0, 0.5), measured(1, 0.75)])
    (tmp_path / "r" / "report.html").unlink()
    # A run that is being written: its last line is torn, and is left so.
    with (tmp_path / "r" / "rollouts.jsonl").open("a") as f:
        f.write('{"iteration": 1, "spl')
    root = Path(page.__file__).parent.parent
    done = subprocess.run([sys.executable, "-m", "support.page", tmp_path / "r"], cwd=root,
                          capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "r" / "report.html"), done.stderr
    assert (tmp_path / "r" / "rollouts.jsonl").read_text().endswith('"spl')
    with pytest.raises(UserError, match="missing"):
        page.write(tmp_path / "none")


def test_a_page_that_can_not_be_made_stops_no_run(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    said = []

    page.refresh(SimpleNamespace(folder=tmp_path, log=said.append))

    assert len(said) == 1
    assert said[0].startswith("note: ")


def test_what_is_weighed_is_not_called_kept(tmp_path):
    records = [measured(0, 0.5), measured(1, 0.75)]
    found, _ = a_run(tmp_path / "r", rounds(), records, update="grpo")

    words = " ".join(found.words)
    assert "grpo: weigh all by their advantage" in words
    assert "those kept" not in words
