"""Several processes do what one does: the same records, metrics and weights, and a kill loses
nothing."""
import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file

from support import ranks
from support.files import Lines
from support.ranks import SharedLines, share_of
from tests.conftest import ROOT
from tests.helpers import read_lines

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from data import judges
from data.judges import each
from tests.helpers import even_length
judges.RULES["rule"] = each(even_length)    # rewards that differ on a random model
import {program}
from support.files import cli
cli({program}.main)
"""


@pytest.fixture()
def launch(tmp_path):
    """Start a program of ours with so many ranks and these flags."""
    def start(ranks, argv, program="outer_loop"):
        script = tmp_path / f"{program}_on_ranks.py"
        script.write_text(PROGRAM.format(root=str(ROOT), program=program))
        command = [*TORCHRUN, "--nproc-per-node", str(ranks), str(script), *argv]
        if ranks == 1:
            command = [sys.executable, str(script), *argv]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path)
    return start


def finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def without(keys, records):
    return [{key: value for key, value in r.items() if key not in keys} for r in records]


def what_was_computed(folder, *but_for):
    """Everything that a run wrote but for times, in an order of its own."""
    found = []
    for name in ("edits", "rollouts", "metrics"):
        records = without({"seconds", *but_for}, read_lines(folder / f"{name}.jsonl"))
        if name != "metrics":
            records.sort(key=lambda r: json.dumps(r, sort_keys=True))
        found.append(records)
    return found


def assert_same(folder, other, *but_for):
    """Two runs wrote the same. In float64 everything is equal, losses as well as weights."""
    assert what_was_computed(folder, *but_for) == what_was_computed(other, *but_for)
    for t in (1, 2):
        ours = load_file(folder / f"iter_{t}" / "model.safetensors")
        theirs = load_file(other / f"iter_{t}" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name])
    assert not list(folder.glob("*.part*"))


def in_folder(argv, folder):
    return [*argv, "--run-dir", str(folder), "--dtype", "float64"]


# ------------------------------------------------------------------------------- sharing out

@pytest.mark.parametrize("costs, loads", [
    ([7.0, 1.0, 5.0, 3.0, 3.0, 5.0], [8, 8, 8]),
    ([1.0, 1.0], [1, 1, 0])])       # more ranks than work
def test_the_shares_of_three_ranks_are_a_partition_of_like_costs(costs, loads, monkeypatch):
    monkeypatch.setattr(ranks, "SIZE", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(ranks, "RANK", rank)
        shares.append(share_of(costs))

    assert sorted(chain(*shares)) == list(range(len(costs)))
    assert [sum(costs[i] for i in share) for share in shares] == loads


def test_alone_there_is_nobody_to_wait_for():
    assert share_of([1.0, 5.0, 2.0]) == [0, 1, 2]
    assert ranks.gather("x") == ["x"]


def test_what_a_killed_rank_had_finished_is_taken_in(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    Lines(path).add({"task": 0}, {"task": 1})
    Lines(tmp_path / "rollouts.part2.jsonl").add({"task": 1}, {"task": 2})  # 1 was written already
    with (tmp_path / "rollouts.part2.jsonl").open("a") as f:
        f.write('{"task": 3')                                               # a torn line

    assert SharedLines(path).records == [{"task": 0}, {"task": 1}, {"task": 2}]
    assert read_lines(path) == [{"task": 0}, {"task": 1}, {"task": 2}]
    assert [p.name for p in tmp_path.iterdir()] == ["rollouts.jsonl"]


# ------------------------------------------------------------------------------- whole runs

def test_two_ranks_do_what_one_does(argv, launch, tmp_path):
    finished(launch(1, in_folder(argv, tmp_path / "one")))
    out = finished(launch(2, in_folder(argv, tmp_path / "two")))
    assert_same(tmp_path / "two", tmp_path / "one")
    assert out.count("round 1: mean reward") == 1   # one rank speaks


@pytest.mark.slow
def test_three_ranks_and_a_table(argv, launch, tmp_path):
    finished(launch(1, in_folder(argv, tmp_path / "one")))
    finished(launch(3, in_folder(argv, tmp_path / "three")))
    assert_same(tmp_path / "three", tmp_path / "one")

    tables = []
    for n in (1, 2):
        folder = tmp_path / f"single{n}"
        flags = in_folder(argv, folder)
        finished(launch(n, ["single", *flags, "--from-run", str(tmp_path / "three")], "eval"))
        rows = json.loads((folder / "single.json").read_text())["rows"]
        tables.append(without({"seconds"}, rows))
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_in_seconds_and_it_resumes(argv, launch, tmp_path):
    finished(launch(1, in_folder(argv, tmp_path / "one")))
    folder = tmp_path / "killed"
    process = launch(3, in_folder(argv, folder))
    deadline = time.time() + 60
    while not (folder / "rollouts.part1.jsonl").exists() and time.time() < deadline:
        time.sleep(0.01)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    begin = time.time()
    os.kill(int(ranks.stdout.split()[1]), signal.SIGKILL)

    _, err = process.communicate(timeout=60)

    assert time.time() - begin < 15
    assert process.returncode != 0
    assert sum("the same command resumes" in line for line in err.splitlines()) >= 1
    finished(launch(2, in_folder(argv, folder)))
    assert_same(folder, tmp_path / "one")
