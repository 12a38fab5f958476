"""Whatever ends a run, the same command goes on to the same result: kills before every file
operation and at random moments, a full disk, lack of memory anywhere.

A process of its own forks a child for each attempt, so that nothing is imported twice."""
import json
import os
import subprocess
import sys

import pytest
import torch

import data.judges
from engine import decode, train
from lora import Adapters
from model import Transformer
from support.files import UserError, cli
from support.run import Run
from tests.conftest import ROOT
from tests.helpers import read_lines, run_it
from tests.test_team import what_was_computed

SERVER = '''
import os, random, resource, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
from data import judges
from data.judges import each
from support.files import cli
from tests.helpers import even_length, run_it
from tests.test_team import assert_same
from pathlib import Path
judges.RULES["rule"] = each(even_length)
kind, *argv = sys.argv[1:]
at = argv.index("--run-dir") + 1
whole, hurt = Path(argv[at]).with_name("whole"), Path(argv[at])

def child(before, folder):
    """The run in a child process, after `before`: its exit status, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        argv[at] = str(folder)
        before()
        try:
            cli(lambda: run_it(argv))
        except SystemExit as e:
            print(e.code, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def die_at(n):
    """Killed before the n-th operation on a file in the run's folder."""
    seen = [0]
    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path = os.fspath(args[0]) if isinstance(args[0], (str, os.PathLike)) else ""
            writes = event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if path.startswith(str(hurt)) and writes:
                seen[0] += 1
                if seen[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)
    return lambda: sys.addaudithook(hook)

def die_within(seconds):
    def later():
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
    return later

def small_files(size):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return limit

begin = time.time()
assert child(lambda: None, whole) == 0
took = time.time() - begin
rng = random.Random(0)
if kind == "operations":
    attempts = (die_at(n) for n in range(1, 1000))
elif kind == "moments":
    attempts = (die_within(rng.uniform(0.05, took)) for _ in range(25))
else:
    attempts = (small_files(size) for size in (0, 500, 2000, 5000, 20000, 60000, 150000))
ended = []
for attempt in attempts:
    shutil.rmtree(hurt, ignore_errors=True)
    status = child(attempt, hurt)
    ended.append(status)
    if status == 0 and kind == "operations":
        break               # there were fewer operations
    assert child(lambda: None, hurt) == 0
    assert_same(hurt, whole)
print(ended)
'''


def serve(kind, argv):
    """The exit statuses of the runs that were hurt; what was said on stderr."""
    done = subprocess.run([sys.executable, "-c", SERVER, kind, *argv], capture_output=True,
                          text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_a_kill_before_any_file_operation_loses_nothing(argv):
    ended, _ = serve("operations", argv)

    assert len(ended) > 25
    assert set(ended[:-1]) == {-9}
    assert ended[-1] == 0


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(argv):
    ended, _ = serve("moments", argv)

    assert len(ended) == 25
    assert ended.count(-9) > 15


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(argv):
    ended, said = serve("disk", argv)

    assert ended.count(1) >= 5
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == ended.count(1)
    assert "Traceback" not in said
    assert all("what a run has finished is kept" in line for line in lines)


# ------------------------------------------------------------------------------- memory

KINDS = {"cuda": torch.OutOfMemoryError("CUDA out of memory"), "python": MemoryError(),
         "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate "
                             "memory: you tried to allocate 99 bytes")}
# Where memory may run out, and whether the run goes on by itself then.
PLACES = {
    "training": (train, "pack", True), "an adapter's update": (train, "adamw_all", True),
    "stacking adapters": (Adapters, "stack", True), "routes": (Adapters, "route", True),
    "rows": (decode, "Rows", True), "a step of decoding": (decode.Rows, "step", True),
    "prefill": (decode.Rows, "prefill", True),
    "growing the cache": (decode.Cache, "keep", True),
    "drawing tokens": (decode, "sample", True), "merging": (Adapters, "merge", False),
    "loading": (Run, "read_model", False), "saving": (Transformer, "save_pretrained", False)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_lack_of_memory_anywhere_loses_nothing(place, kind, argv, tmp_path, monkeypatch,
                                               varied_rewards, capsys):
    """It is raised once. The run goes on, or ends in a line and resumes."""
    argv = [*argv, "--dtype", "float64", "--max-edit-tokens", "70", "--iterations", "1"]
    owner, name, goes_on = PLACES[place]
    whole, hurt = tmp_path / "whole", tmp_path / "run"
    argv[argv.index("--run-dir") + 1] = str(whole)
    run_it(argv)
    argv[argv.index("--run-dir") + 1] = str(hurt)

    original, calls = getattr(owner, name), []

    def fails_once(*args, **kwargs):
        calls.append(name)
        if len(calls) == (2 if goes_on else 1):
            raise KINDS[kind]
        return original(*args, **kwargs)

    raw = vars(owner)[name]
    patched = staticmethod(fails_once) if isinstance(raw, classmethod) else fails_once
    with pytest.MonkeyPatch.context() as little:
        little.setattr(owner, name, patched)
        if goes_on:
            run_it(argv)
            assert "out of memory: going on with" in capsys.readouterr().out
        else:
            with pytest.raises(SystemExit) as stopped:
                cli(lambda: run_it(argv))
            assert str(stopped.value.code).startswith("error: out of memory; what a run has")
    run_it(argv)
    assert what_was_computed(hurt) == what_was_computed(whole)


# ------------------------------------------------------------------------------- a long run

@pytest.mark.slow
def test_two_hundred_iterations_hold_no_more_memory_or_files_than_fifty(argv, monkeypatch):
    import resource
    import outer_loop
    used = []
    evaluate = outer_loop.evaluate

    def watch(cfg, run, model, tasks, t):
        evaluate(cfg, run, model, tasks, t)
        pages = int(open("/proc/self/statm").read().split()[1])
        used.append((pages * resource.getpagesize(), len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(outer_loop, "evaluate", watch)
    run = run_it([*argv, "--iterations", "200", "--edits", "1", "--seeds", "1",
                  "--max-edit-tokens", "8", "--max-answer-tokens", "3", "--inner-epochs", "1"])

    assert len(read_lines(run.folder / "metrics.jsonl")) == 201
    assert used[200][0] - used[50][0] < 40 * 2 ** 20
    assert used[200][1] <= used[50][1]
