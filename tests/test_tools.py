"""tools/plan.py plans from a config.json alone, by the formulas with which a run chooses.
tools/bench.py: its work is the paper's, all arms do the same, and a missing peer is named."""
import json
import re
import sys
from itertools import chain

import pytest
import torch

import outer_loop
from engine import device
from inner_loop import inner_recipe
from lora import Adapters
from support.config import Config
from support.files import UserError
from tests.helpers import ROOT, call
from tools import bench
from tools import plan as program
from tools.plan import CARDS, GIB, hardware_table, plan, planner

LENGTHS = json.loads((ROOT / "data/lengths.json").read_text())
CPU = torch.device("cpu")
KNOWLEDGE = Config(model="qwen2.5-7b")


def test_an_80_gib_card_takes_the_papers_round():
    p = planner(KNOWLEDGE, 80)
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
    assert inner.flops == inner.tokens * (4 * p.passed + 6 * parameters)
    assert peak < 80 * GIB
    assert all(phase.memory <= p.free for phase in a_round + held_out)
    assert seconds == 2 * sum(x.seconds for x in a_round) + 3 * sum(x.seconds for x in held_out)


def test_a_run_chooses_what_the_plan_says(monkeypatch):
    """With so much memory free: the same slots, rows and adapters that answer."""
    p = planner(KNOWLEDGE, 24)
    sampling, inner, answers = p.phases(50, 5, 3)
    monkeypatch.setattr(device, "free_memory", lambda device: p.free)
    assert sampling.side_by_side == f"{device.auto_rows(p.model, 240 + 2048)} texts"
    at_once = device.auto_answering(p.model, inner_recipe(KNOWLEDGE).lora)
    assert answers.side_by_side == f"{min(256, round(4.9 * at_once))} texts"


def test_a_smaller_card_takes_longer_and_recomputes_what_does_not_fit():
    minutes = [planner(Config(model="qwen2.5-1.5b"), gib).run()[2] for gib in (8, 24, 80)]
    assert minutes == sorted(minutes, reverse=True)
    assert "recomputed" in planner(KNOWLEDGE, 24).m_step().side_by_side
    assert "recomputed" not in planner(KNOWLEDGE, 80).m_step().side_by_side
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
    assert all(line in readme for line in hardware_table())
    for gib, card in CARDS.items():
        assert gib - 1 <= card.gib <= gib
        assert card.flops > 1e12 and card.bandwidth > 1e11


def test_the_lengths_are_those_of_the_paper(tiny):
    flat = list(chain(*bench.LENGTHS))
    assert len(bench.LENGTHS) == 250
    assert 3 * 10 * len(flat) == 65_490     # seeds x epochs: the steps of a round
    assert 49 < sum(flat) / len(flat) < 50
    assert (min(flat), max(flat)) == (6, 392)
    # Jobs have documents of the given lengths, and all of them is learned.
    jobs = bench.make_jobs(tiny, [[5, 9], [30]])
    assert [[len(ids) for ids, _ in job.examples] for job in jobs] == [[5, 9], [30]]
    for ids, learn in chain(*(job.examples for job in jobs)):
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


@pytest.fixture()
def peer(tiny):
    return bench.Peer(tiny, pretrained=True)


def test_all_arms_train_the_same_tokens_and_the_peers_adapters_learn(tiny, peer, monkeypatch):
    """Counted in each forward pass of our model and of the peer's."""
    jobs = bench.make_jobs(tiny, [[5, 9, 30], [12], [7, 7]])
    before = [p.clone() for p in peer.weights]
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
    assert sum(ours) == 5 + 7 + 7 + 9 + 12 + 30
    assert len(ours) == 3         # as many steps as the longest job has
    ours.clear()
    bench.train(jobs, tiny, slots=1)
    peer.bare_loop(jobs)

    assert sorted(ours) == sorted(theirs) == [5, 7, 7, 9, 12, 30]
    assert all(p.dtype == torch.float32 for p in peer.weights)
    assert not any(torch.equal(old, new) for old, new in zip(before, peer.weights))


def test_both_arms_answer_the_same_questions_with_the_same_tokens(tiny, peer, monkeypatch):
    """Adapters that are new change nothing, so that the texts must be equal."""
    questions = bench.make_questions(tiny)
    adapters = Adapters(tiny, bench.RECIPE.lora, bench.N_ADAPTERS)
    ours, theirs = [], []
    generate, their_generate = bench.generate, peer.model.generate

    def spy(*args, **kwargs):
        found = list(generate(*args, **kwargs))
        for _, rows in sorted(found):
            ours.extend(rows)
        return found

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


def test_arms_run_in_turn_after_a_warm_up_and_each_has_its_own_time_and_peak_memory():
    calls = []
    timings = bench.compare(CPU, {name: lambda name=name: calls.append(name) for name in "ABC"},
                            repeats=2)
    assert "".join(calls) == "ABC" + "ABCABC"
    assert list(timings) == ["A", "B", "C"]
    assert all(len(timing.seconds) == len(timing.peaks) == 2 for timing in timings.values())
    # Not the peak of the process so far.
    _, peak = bench.timed(CPU, lambda: torch.ones(300 * 2 ** 20, dtype=torch.uint8).sum())
    _, peak_after = bench.timed(CPU, int)
    assert peak - peak_after > 250 * 2 ** 20
    # 4 FLOPs a weight and 6 a parameter of an adapter, for each token.
    floor = bench.Floor(weights=10, parameters=3, rate=580)
    assert floor.flops == 4 * 10 + 6 * 3
    assert floor.tokens_per_second == 10


FEW = "--jobs 2 --repeats 1 --scaling 2 8 --n-new 2".split()
SMALL_SUITE = "--suite --device cpu --shape small --peer-jobs 1".split()


def assert_timed(out, *arms):
    """The table has a line for each of these."""
    for arm in arms:
        assert re.search(rf"{arm}.* [\d.]+ s \[", out), out


def test_without_the_peers_it_says_which_is_missing(tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    out = call(bench, "--model", tiny_folder, "--device", "cpu", *FEW)
    assert re.search("no peers: .*peft", out)
    assert_timed(out, "ours, packed", "ours, one slot", "ours, together")
    assert "ours over" not in out
    assert "PEFT" not in out
    with pytest.raises(UserError, match="--model or --shape, not both"):
        call(bench, "--model", "m", "--shape", "smollm2-135m")


@pytest.mark.slow
def test_the_suite_trains_and_decodes_with_graphs_and_without(monkeypatch):
    asks = {}       # how often an arm asks whether the device has graphs
    asked, compare = [], bench.compare

    def spy(device, arms, repeats):
        for name, arm in arms.items():
            before = len(asked)
            arm()
            asks[name] = len(asked) - before
        return compare(device, arms, repeats)

    monkeypatch.setattr(bench.decode, "has_graphs", lambda device: asked.append(device))
    monkeypatch.setattr(bench, "compare", spy)
    out = call(bench, *SMALL_SUITE, *FEW)

    assert_timed(out, "ours, packed", "the fair peer", "ours, one slot", "one by one")
    for arm in ("ours, together", "ours, from the nucleus"):
        without = f"{arm}, without graphs"
        assert_timed(out, f"{arm} ", without)
        assert asks[arm] > 0
        assert asks[without] == 0
    for words in ("formula", "ours over the fair peer", "ours over the peer", "ms a token"):
        assert words in out
    assert "failed" not in out
    assert "a round" not in out
