"""tools/plan.py plans from a config.json alone, by the formulas with which a run chooses.
tools/bench.py: all arms do the paper's work, and every step counts as what it is."""
import gc
import json
import math
import re
import sys
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import pytest
import torch

import outer_loop
from engine import device
from inner_loop import inner_recipe
from support.config import Config
from support.files import UserError
from tests.helpers import ROOT, call, python
from tools import bench
from tools import plan as program
from tools.plan import CARDS, GIB, Planner, plan

LENGTHS = json.loads((ROOT / "data/lengths.json").read_text())

KNOWLEDGE = Config(model="qwen2.5-7b")


def test_an_80_gib_card_takes_the_papers_round():
    p = Planner(KNOWLEDGE, 80)
    a_round, held_out, seconds, peak = p.run()
    sampling, inner, answers, m_step = a_round

    assert p.weights == pytest.approx(15.2e9, rel=0.01)
    assert sampling.side_by_side == "250 texts"
    slots = int(inner.side_by_side.split()[0])
    assert slots >= 64
    # The paper: three inner loops of ten epochs of each of 250 self-edits.
    assert inner.tokens == 3 * 10 * sum(chain(*LENGTHS))
    assert inner.steps == -(-65490 // slots)
    parameters = inner_recipe(KNOWLEDGE).lora.parameters(p.model)
    assert inner.seconds * p.flops == inner.tokens * (4 * p.passed + 6 * parameters)
    assert peak < 80 * GIB
    assert all(phase.memory <= p.free for phase in a_round + held_out)
    assert seconds == 2 * sum(x.seconds for x in a_round) + 3 * sum(x.seconds for x in held_out)


def test_a_run_chooses_what_the_plan_says(monkeypatch):
    p = Planner(KNOWLEDGE, 24)
    sampling, inner, answers = p.phases(50, 5, 3)
    monkeypatch.setattr(device, "free_memory", lambda device: p.free)
    assert sampling.side_by_side == f"{device.auto_rows(p.model, 240 + 2048)} texts"
    at_once = device.auto_answering(p.model, inner_recipe(KNOWLEDGE).lora)
    assert answers.side_by_side == f"{min(256, round(4.9 * at_once))} texts"


def test_a_smaller_card_takes_longer_and_recomputes_what_does_not_fit():
    minutes = [Planner(Config(model="qwen2.5-1.5b"), gib).run()[2] for gib in (8, 24, 80)]
    assert minutes == sorted(minutes, reverse=True)
    large = replace(KNOWLEDGE, slots=64)
    assert "recomputed" in Planner(large, 24).phases(50, 5, 3)[1].side_by_side
    assert "recomputed" not in Planner(large, 80).phases(50, 5, 3)[1].side_by_side
    assert plan(KNOWLEDGE, 8).endswith("the weights do not fit")
    with pytest.raises(UserError, match="--card 12: choose among 8, 16, 24"):
        plan(KNOWLEDGE, 12)


def test_a_folder_needs_no_weights_and_of_a_hub_id_only_the_config_is_fetched(tmp_path,
                                                                              monkeypatch):
    program.write_shape("qwen2.5-0.5b", tmp_path)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "0.49 B parameters" in plan(Config(model=str(tmp_path)), 24)
    assert asked == []
    assert "0.49 B parameters" in plan(Config(model="someone/a-model"), 8)
    assert asked == [("someone/a-model", ["config.json"])]


@pytest.mark.parametrize("preset", ["tiny", "tiny-arc", "knowledge", "official", "arc"])
def test_every_preset_has_a_plan(preset, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [] if preset.startswith("tiny") else ["--model", "Qwen/Qwen2.5-0.5B"]
    out = call(outer_loop, "--preset", preset, "--plan", *words)
    assert out.startswith("computed, not measured")
    assert "the whole run" in out
    assert list(tmp_path.iterdir()) == []       # nothing was run or written


def test_the_readmes_table_is_the_plans_and_cards_are_called_by_their_memory():
    readme = (ROOT / "README.md").read_text()
    for gib, model in ((24, "Qwen2.5-1.5B"), (80, "Qwen2.5-7B")):
        p = Planner(Config(model=model), gib)
        a_round, _, seconds, peak = p.run()
        adapters = a_round[1].side_by_side.split()[0]
        assert (f"| {gib} GB ({p.card.name}) | {model} | {adapters} | {peak / GIB:.0f} GiB | "
                f"{seconds / 60:.0f} minutes (computed) |") in readme
    for gib, card in CARDS.items():
        assert gib - 1 <= card.gib <= gib
        assert card.flops > 1e12 and card.bandwidth > 1e11


def test_the_longest_job_and_the_longest_text_bound_the_steps():
    a_round, held_out, *_ = Planner(Config(model="qwen2.5-0.5b"), 141).run()
    for sampling, inner, *_ in (a_round, held_out):
        assert sampling.steps == 2048       # one text may be as long
        assert inner.steps == 10 * max(map(len, LENGTHS))       # 670
        assert inner.seconds >= 0.67 * program.RECORDED * 24
    assert Planner(Config(model="qwen2.5-0.5b"), 8).run()[0][1].steps == -(-65490 // 33)


def test_a_plan_says_what_was_measured_where_and_what_is_an_estimate():
    said = plan(Config(model="qwen2.5-0.5b"), 80)
    assert re.search(r"estimates: 15% of 989 TFLOP/s, .*; measured \(H200, 2026-11-27\): 4.2", said)


def test_jobs_have_the_released_documents_lengths_and_random_tokens(tiny):
    jobs = bench.make_jobs(tiny, 251)
    lengths = [[len(ids) for ids, _ in job.examples] for job in jobs]
    assert sorted(lengths[:250]) == sorted(bench.LENGTHS)
    assert lengths[250] == lengths[0]
    for ids, learn in chain(*(job.examples for job in jobs[:9])):
        assert 10 <= min(ids) and max(ids) < tiny.config.vocab_size
        assert learn == [True] * len(ids)


# The numbers of parameters that the models' cards state.
@pytest.mark.parametrize("name, parameters", [
    ("smollm2-135m", 134_515_008), ("qwen2.5-0.5b", 494_032_768), ("llama-3.2-1b", 1_235_814_400),
    ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512)])
def test_a_shape_is_that_of_the_model(name, parameters):
    model = program.empty_model(name, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.fixture()
def run():
    return bench.Bench(SimpleNamespace(device="cpu", dtype="", gpu=False))


@pytest.fixture()
def few_jobs(tiny):
    """A step of an epoch for each document of three self-edits."""
    return bench.make_jobs(tiny, 3, replace(bench.RECIPE, epochs=1))


@pytest.mark.parametrize("arm", [bench.OURS, bench.ONE, bench.PEFT])
def test_every_arm_trains_the_same_tokens_in_its_own_number_of_steps(tiny, run, few_jobs, arm):
    steps = bench.Steps(run)
    run.deadline = math.inf
    steps.watch(lambda: bench.train_arm(arm, tiny, few_jobs, 3, steps.peer_ended))
    documents = [len(job.examples) for job in few_jobs]
    assert sum(map(int, steps.tokens)) == sum(job.tokens for job in few_jobs)
    assert set(steps.kinds) == {"plain"}
    assert len(steps.kinds) == {bench.ONE: -(-sum(documents) // 3),
                                bench.PEFT: sum(documents)}.get(arm, max(documents))
    ms = run.ms_between(steps.moments)
    assert len(ms) == len(steps.kinds) and min(ms) > 0


def test_the_peers_adapters_learn(tiny, few_jobs):
    weights = bench.peft_loop(tiny, few_jobs[:1])
    assert all(p.dtype == torch.float32 for p in weights)
    assert all(B.abs().sum() > 0 for B in weights[1::2])        # they began at 0


FEW = "--jobs 2 --steps 4 --repeats 1 --n-new 8 --device cpu".split()


@pytest.fixture()
def no_gc(monkeypatch):
    """Among all that other tests hold, each collection takes half a second."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def test_on_a_cpu_without_the_peer_it_says_which_is_missing(monkeypatch, tiny_folder, no_gc):
    monkeypatch.setitem(sys.modules, "peft", None)
    out = call(bench, *FEW, "--model", tiny_folder)
    assert re.search("left out: .*peft", out)
    for what in ("ours, 2 slots", f"{bench.ONE}, 2 slots", "32 rows, 8 adapters"):
        assert re.search(rf"- {what}: start_ms .*, plain .*share_of_the_floor 0", out)


def test_a_part_that_fails_is_a_line_and_the_next_one_runs(monkeypatch, capsys, no_gc):
    def broken(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(bench, "the_card", lambda run, n: run.say("- passed"))
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **kwargs: print("- passed"))
    monkeypatch.setattr(bench, "empty_model", broken)
    monkeypatch.setattr("sys.argv", ["bench.py", *FEW, "--gpu", "--model", "small"])
    with pytest.raises(UserError) as ended:
        bench.main()

    out = capsys.readouterr().out
    parts = re.findall("## (.*)", out)
    assert parts[:3] == ["the card", "tests", "0.5B, steady"]
    assert out.count("- passed") == 2
    failed = out.count("- failed: OutOfMemoryError: CUDA out of memory. Tried to allocate")
    assert failed == len(parts) - 2
    assert str(ended.value) == "failed: " + ", ".join(parts[2:])


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--gpu", "--model", "small")])
def test_bench_prints_its_figures(words):
    out = python("-m", "tools.bench", *FEW, *words).stdout
    for arm in (bench.OURS, bench.ONE, bench.PEFT):
        assert re.search(rf"- {arm}, \d+ slots: start_ms .*, plain ", out)
    assert out.count("- ours over it: x ") >= 2
    assert "rows, 0 adapters: start_ms " in out
