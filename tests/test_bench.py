"""The benchmark: its work is the paper's, all arms do the same, and a missing peer is named."""
import re
import subprocess
import sys

import pytest
import torch

from lora import Adapters
from support.files import UserError
from tools import bench

FEW = "--jobs 2 --repeats 1 --scaling 2 8 --n-new 2".split()
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------- the work

def test_the_lengths_are_those_of_the_paper():
    flat = []
    for lengths in bench.LENGTHS:
        flat += lengths

    assert len(bench.LENGTHS) == 250
    assert 3 * 10 * len(flat) == 65_490     # seeds x epochs: the steps of a round
    assert 49 < sum(flat) / len(flat) < 50
    assert min(flat) == 6
    assert max(flat) == 392


def test_jobs_have_documents_of_the_given_lengths(tiny):
    jobs = bench.make_jobs(tiny, [[5, 9], [30]])

    assert [len(ids) for ids, _ in jobs[0].examples] == [5, 9]
    assert [len(ids) for ids, _ in jobs[1].examples] == [30]
    for job in jobs:
        for ids, learn in job.examples:
            assert max(ids) < tiny.config.vocab_size
            assert learn == [True] * len(ids)


# The numbers of parameters that the models' cards state.
@pytest.mark.parametrize("name, parameters", [
    ("smollm2-135m", 134_515_008), ("qwen2.5-0.5b", 494_032_768), ("llama-3.2-1b", 1_235_814_400),
    ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)])
def test_a_shape_is_that_of_the_model(name, parameters, tmp_path):
    model = bench.shaped(name, tmp_path, "meta", torch.bfloat16)    # without memory for it

    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.dtype == torch.bfloat16


def test_a_shapes_weights_are_random(tmp_path):

    model = bench.shaped("small", tmp_path, "cpu", torch.float32)

    for p in model.parameters():
        assert p.std().item() == pytest.approx(0.02, rel=0.5)
        assert p.mean().item() == pytest.approx(1 if p.dim() == 1 else 0, abs=0.02)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# ------------------------------------------------------------------------------- the arms

@pytest.fixture()
def peer(tiny):
    return bench.Peer(tiny, pretrained=True)


def test_all_arms_train_the_same_tokens(tiny, peer, monkeypatch):
    """Counted in each forward pass of our model and of the peer's."""
    jobs = bench.make_jobs(tiny, [[5, 9, 30], [12], [7, 7]])
    ours, theirs = [], []
    hidden = tiny.hidden

    def spy(ids, position, attend):
        ours.append(ids.numel())
        return hidden(ids, position, attend)

    def their_spy(module, args, kwargs):
        theirs.append(kwargs["input_ids"].numel())

    monkeypatch.setattr(tiny, "hidden", spy)
    peer.model.register_forward_pre_hook(their_spy, with_kwargs=True)

    bench.train(jobs, tiny, slots=3)
    packed = list(ours)
    ours.clear()
    bench.train(jobs, tiny, slots=1)
    peer.bare_loop(jobs)

    documents = [5, 7, 7, 9, 12, 30]
    assert sum(packed) == sum(documents)
    assert len(packed) == 3         # as many steps as the longest job has
    assert sorted(ours) == documents
    assert sorted(theirs) == documents


def test_the_peers_adapters_learn(tiny, peer):
    """The arm to compare with is a training, too."""
    before = [p.clone() for p in peer.weights]

    peer.bare_loop(bench.make_jobs(tiny, [[5, 9, 30]]))

    for old, new in zip(before, peer.weights):
        assert new.dtype == torch.float32
        assert not torch.equal(old, new)


def test_both_arms_answer_the_same_questions_with_the_same_tokens(tiny, peer, monkeypatch):
    """Adapters that are new change nothing, so that the texts must be equal."""
    questions = bench.make_questions(tiny)
    adapters = Adapters(tiny, bench.RECIPE.lora, bench.N_ADAPTERS)
    ours, theirs = [], []
    generate, their_generate = bench.generate, peer.model.generate

    def spy(*args, **kwargs):
        groups = generate(*args, **kwargs)
        for group in groups:
            ours.extend(group)

    def their_spy(**kwargs):
        rows = their_generate(**kwargs)
        theirs.extend(rows[:, kwargs["input_ids"].shape[1]:].tolist())

    monkeypatch.setattr(bench, "generate", spy)
    monkeypatch.setattr(peer.model, "generate", their_spy)
    # With an EOS the peer would shun it before the last token; ours has none here.
    peer.model.get_base_model().generation_config.eos_token_id = None
    for i in range(adapters.n):
        adapters.init(i, i)
    bench.answer(tiny, adapters, questions, n_new=3)
    peer.answer(adapters.n, questions, n_new=3)

    assert len(ours) == 32
    assert ours == theirs


def test_arms_run_in_turn_after_a_warm_up():
    calls = []
    arms = {}
    for name in "ABC":
        arms[name] = lambda name=name: calls.append(name)

    timings = bench.compare(CPU, arms, repeats=2)

    assert "".join(calls) == "ABC" + "ABCABC"
    assert list(timings) == ["A", "B", "C"]
    for timing in timings.values():
        assert len(timing.seconds) == 2
        assert len(timing.peaks) == 2


def test_peak_memory_is_that_of_each_arm():
    """Not of the process so far."""
    def much():
        torch.ones(300 * 2 ** 20, dtype=torch.uint8)

    _, peak = bench.timed(CPU, much)
    _, peak_after = bench.timed(CPU, int)

    assert peak - peak_after > 250 * 2 ** 20


def test_the_floor_by_hand():
    """4 FLOPs a weight and 6 a parameter of an adapter, for each token."""
    floor = bench.Floor(weights=10, parameters=3, rate=580)

    assert floor.flops == 4 * 10 + 6 * 3
    assert floor.tokens_per_second == 10


# ------------------------------------------------------------------------------- the program

def test_without_the_peers_it_says_which_is_missing(tiny_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("sys.argv", ["bench.py", "--model", str(tiny_folder), "--device", "cpu",
                                     *FEW])

    bench.main()

    out = capsys.readouterr().out
    assert re.search("no peers: .*peft", out)
    for arm in ("ours, packed", "ours, one slot", "ours, together"):
        assert re.search(rf"{arm}.* [\d.]+ s \[", out), out
    assert "ours over" not in out
    assert "PEFT" not in out


def test_a_model_and_a_shape_are_one_too_many(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.py", "--model", "m", "--shape", "smollm2-135m"])

    with pytest.raises(UserError, match="--model or --shape, not both"):
        bench.main()


@pytest.mark.slow
def test_bench_prints_a_table():
    command = [sys.executable, "-m", "tools.bench", *FEW]

    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    for arm in ("ours, packed", "ours, one slot", "the fair peer", "ours, together", "one by one"):
        assert re.search(rf"{arm}.* [\d.]+ s \[", done.stdout), done.stdout
    for words in ("floor", "ours over the fair peer", "extrapolated", "   8 self-edits"):
        assert words in done.stdout


# ------------------------------------------------------------------------------- the suite

SMALL_SUITE = ["bench.py", "--suite", "--device", "cpu", "--shape", "small", "--peer-jobs", "1",
               *FEW]


def test_the_suite_trains_and_decodes_with_graphs_and_without(monkeypatch, capsys):
    asks = {}       # how often an arm asks whether the device has graphs

    def spy(device, arms, repeats):
        for name, arm in arms.items():
            before = len(asked)
            arm()
            asks[name] = len(asked) - before
        return compare(device, arms, repeats)

    asked, compare = [], bench.compare
    monkeypatch.setattr(bench.decode, "has_graphs", lambda device: asked.append(device))
    monkeypatch.setattr(bench, "compare", spy)
    monkeypatch.setattr("sys.argv", SMALL_SUITE)

    bench.main()

    out = capsys.readouterr().out
    for arm in ("ours, packed", "the fair peer", "ours, one slot", "one by one"):
        assert re.search(rf"{arm}.* [\d.]+ s \[", out), out
    for arm in ("ours, together", "ours, from the nucleus"):
        assert re.search(rf"{arm} .* [\d.]+ s \[", out), out
        assert asks[arm] > 0
        assert re.search(rf"{arm}, without graphs .* [\d.]+ s \[", out), out
        assert asks[f"{arm}, without graphs"] == 0
    for words in ("formula", "ours over the fair peer", "ours over the peer", "ms a token"):
        assert words in out
    assert "failed" not in out
    assert "a round" not in out


def test_a_part_of_the_suite_that_fails_is_named_and_the_next_one_runs(monkeypatch, capsys):
    def broken(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(bench, "compare", broken)
    monkeypatch.setattr("sys.argv", SMALL_SUITE)

    bench.main()

    out = capsys.readouterr().out
    for part in ("bench_training", "bench_answering"):
        assert f"{part} failed: OutOfMemoryError: CUDA out of memory. Tried to allocate" in out
