"""The benchmark runs, all arms do the same work, and what is missing is named."""
import re
import subprocess
import sys

import pytest

import bench

FEW = "--jobs 2 --repeats 1 --scaling 2 8 --n-new 2".split()


def test_the_lengths_are_those_of_the_paper():
    flat = [n for lengths in bench.LENGTHS for n in lengths]
    assert len(bench.LENGTHS) == 250 and 3 * 10 * len(flat) == 65_490  # seeds x epochs: the steps of a round
    assert 49 < sum(flat) / len(flat) < 50 and min(flat) == 6 and max(flat) == 392


def test_a_lockstep_adapter_is_the_same_adapter(tiny):
    jobs = bench.make_jobs(tiny, [[5, 9, 30], [12], [7, 7]], 2)
    expected = {i: t.weights for i, t in bench.sft(tiny, jobs, bench.RECIPE)}
    seen, sft = [], bench.sft

    def spy(*args):
        for i, t in sft(*args):
            seen.append(t.weights)
            yield i, t
    bench.sft = spy
    try:
        bench.lockstep(tiny, jobs, 3)
    finally:
        bench.sft = sft
    assert len(seen) == 3
    assert all(min(float((w - e).abs().max()) for e in expected.values()) < 1e-4 for w in seen)


@pytest.mark.slow
def test_bench_prints_a_table():
    done = subprocess.run([sys.executable, "bench.py", *FEW], capture_output=True, text=True)
    out = done.stdout
    assert done.returncode == 0, done.stderr
    for arm in ("ours, packed", "ours, one slot", "lockstep, padded", "the fair peer", "ours, together", "one by one"):
        assert re.search(rf"{arm}.* [\d.]+ s \[", out), out
    assert "extrapolated" in out and "floor" in out and "   8 self-edits" in out


@pytest.mark.slow
def test_without_the_peers_it_says_which_arm_is_missing():
    code = "import sys; sys.modules['peft'] = None; import bench; sys.argv = ['bench.py', *%r]; bench.main()" % FEW
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "no peers" in done.stdout and "ours over" not in done.stdout, done.stderr
