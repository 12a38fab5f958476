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

from support import ranks
from support.files import Lines
from support.ranks import SharedLines, share_of
from tests.helpers import ROOT, assert_same, read_lines, without

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


def in_folder(argv, folder):
    return [*argv, "--run-dir", str(folder), "--dtype", "float64"]


# In processes that are no processes: what each rank would do.
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


def test_what_a_killed_rank_had_finished_is_taken_in(whole, tmp_path):
    path = tmp_path / "rollouts.jsonl"
    zero, one, two = whole.rollouts.records[:3]
    Lines(path).add(zero, one)
    Lines(tmp_path / "rollouts.part2.jsonl").add(one, two)      # one was written already
    with (tmp_path / "rollouts.part2.jsonl").open("a") as f:
        f.write('{"task": 3')                                   # a torn line
    assert SharedLines(path).records == [zero, one, two]
    assert read_lines(path) == [zero, one, two]
    assert [p.name for p in tmp_path.iterdir()] == ["rollouts.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_several_ranks_do_what_one_does(n, argv, launch, tmp_path):
    finished(launch(1, in_folder(argv, tmp_path / "one")))
    out = finished(launch(n, in_folder(argv, tmp_path / "several")))
    assert_same(tmp_path / "several", tmp_path / "one")
    assert out.count("round 1: mean reward") == 1   # one rank speaks


@pytest.mark.slow
def test_a_table_of_two_ranks_is_that_of_one(argv, whole, launch, tmp_path):
    tables = []
    for n in (1, 2):
        folder = tmp_path / f"single{n}"
        words = [*in_folder(argv, folder), "--from-run", str(whole.folder)]
        finished(launch(n, ["single", *words], "eval"))
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

    process.communicate(timeout=60)

    assert time.time() - begin < 15
    assert process.returncode != 0
    finished(launch(2, in_folder(argv, folder)))
    assert_same(folder, tmp_path / "one")
