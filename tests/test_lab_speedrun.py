"""lab/speedrun.py: what counts as a time, and what an entry may change."""
import json
import sys

import pytest

from lab import speedrun
from support.files import UserError


def entry(name, seed, reward, seconds, flags=("--iterations", "2")):
    return {"name": name, "flags": list(flags), "seed": seed, "date": "2026-01-01", "commit": "abc",
            "machine": "a machine", "reward": reward, "seconds": seconds}


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", *map(str, words)])
    speedrun.main()


def test_the_time_is_that_of_the_first_evaluation_at_the_goal():
    reached = entry("a", 0, [0.6, 0.7, 0.75, 0.74], [5.0, 20.0, 35.0, 50.0])
    missed = entry("a", 0, [0.6, 0.7], [5.0, 20.0])

    assert speedrun.time_to_goal(reached) == 35.0
    assert speedrun.time_to_goal(missed) == float("inf")


def test_an_entry_is_the_median_of_its_seeds_and_the_fastest_comes_first(capsys):
    slow = [entry("slow", s, [0.6, 0.8], [5, 60 + s]) for s in range(5)]
    # Two of five never reach it; the median does.
    fast = [entry("fast", s, [0.6, 0.8 if s < 3 else 0.7], [5, 30 + s]) for s in range(5)]

    speedrun.table(slow + fast)

    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0].startswith("| 32 | fast | --iterations 2 | 3 of 5 | 0.760 |")
    assert lines[1].startswith("| 62 | slow | --iterations 2 | 5 of 5 | 0.800 |")


@pytest.mark.parametrize("word", ["--eval-tasks", "--model", "--inner-lr", "--seed", "--run-dir",
                                  "--max-edit-tokens", "--clip", "--weight-decay"])
def test_an_entry_may_not_change_the_task(word, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="may not change"):
        run(monkeypatch, "--name", "a", "--out", tmp_path / "s.jsonl", word, "1")


def test_only_what_is_missing_is_run_and_a_name_has_its_flags(tmp_path, monkeypatch, capsys):
    out = tmp_path / "s.jsonl"
    out.write_text("".join(json.dumps(entry("a", s, [0.8], [9.0])) + "\n" for s in (0, 1, 3, 4)))
    measured = []

    def measure(name, flags, seed):
        measured.append((name, flags, seed))
        return entry(name, seed, [0.8], [9.0], flags)

    monkeypatch.setattr(speedrun, "measure", measure)

    run(monkeypatch, "--name", "a", "--out", out, "--iterations", "2")

    assert measured == [("a", ["--iterations", "2"], 2)]
    assert "5 of 5" in capsys.readouterr().out
    with pytest.raises(UserError, match="with other flags"):
        run(monkeypatch, "--name", "a", "--out", out, "--iterations", "3")


@pytest.mark.slow
def test_a_run_is_an_ordinary_one():
    flags = ["--iterations", "1", "--tasks", "2", "--edits", "2", "--outer-epochs", "1"]

    record = speedrun.measure("small", flags, 3)

    assert record["seed"] == 3 and record["flags"] == flags
    assert len(record["reward"]) == len(record["seconds"]) == 2
    assert 0 < record["seconds"][0] < record["seconds"][1]
    assert record["machine"].endswith("threads")
