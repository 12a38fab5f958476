"""The plan: from a config.json alone, by the formulas with which a run chooses."""
import json
import sys

import pytest

import outer_loop
from engine import memory
from support.config import Config, inner_recipe
from support.files import UserError
from tests.conftest import ROOT
from tools import plan as program
from tools.plan import CARDS, GIB, hardware_table, plan, planner

KNOWLEDGE = Config(model="qwen2.5-7b")


def test_an_80_gib_card_takes_the_papers_round():
    p = planner(KNOWLEDGE, 80)
    a_round, held_out, seconds, peak = p.run()
    sampling, inner, answers, m_step = a_round

    assert p.weights == pytest.approx(15.2e9, rel=0.01)
    assert sampling.side_by_side == "250 texts"
    assert int(inner.side_by_side.split()[0]) >= 64
    # The paper: three inner loops of ten epochs of each of 250 self-edits.
    lengths = json.loads((ROOT / "data/lengths.json").read_text())
    assert inner.tokens == 3 * 10 * sum(map(sum, lengths))
    slots = int(inner.side_by_side.split()[0])
    assert inner.steps == -(-65490 // slots)
    parameters = inner_recipe(KNOWLEDGE).lora.parameters(p.model)
    assert inner.flops == inner.tokens * (4 * p.passed + 6 * parameters)
    assert peak < 80 * GIB
    assert all(phase.memory <= p.free for phase in a_round + held_out)
    assert seconds == 2 * sum(x.seconds for x in a_round) + 3 * sum(x.seconds for x in held_out)


def test_a_run_chooses_what_the_plan_says(monkeypatch):
    """With so much memory free: the same slots, rows and adapters that answer."""
    p = planner(KNOWLEDGE, 24)
    (sampling, inner, answers), lora = p.phases(50, 5, 3), inner_recipe(KNOWLEDGE).lora
    monkeypatch.setattr(memory, "free_memory", lambda device: p.free)

    assert sampling.side_by_side == f"{memory.auto_rows(p.model, 240 + 2048)} texts"
    at_once = memory.auto_answering(p.model, lora)
    assert answers.side_by_side == f"{min(256, round(4.9 * at_once))} texts"


def test_an_m_step_that_does_not_fit_is_recomputed():
    assert "recomputed" in planner(KNOWLEDGE, 24).m_step().side_by_side
    assert "recomputed" not in planner(KNOWLEDGE, 80).m_step().side_by_side


def test_a_smaller_card_takes_longer():
    minutes = [planner(Config(model="qwen2.5-1.5b"), gib).run()[2] for gib in (8, 24, 80)]
    assert minutes == sorted(minutes, reverse=True)


def test_weights_that_do_not_fit_are_said():
    assert plan(KNOWLEDGE, 8).endswith("the weights do not fit")


def test_an_unknown_card_is_one_line():
    with pytest.raises(UserError, match="--card 12: choose among 8, 16, 24"):
        plan(KNOWLEDGE, 12)


def test_a_folder_needs_no_weights(tmp_path, capsys):
    program.write_shape("qwen2.5-0.5b", tmp_path)

    text = plan(Config(model=str(tmp_path)), 24)

    assert "0.49 B parameters" in text
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_of_a_hub_id_only_the_config_is_fetched(tmp_path, monkeypatch):
    import huggingface_hub
    program.write_shape("smollm2-135m", tmp_path)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return tmp_path

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    assert "0.13 B parameters" in plan(Config(model="someone/a-model"), 8)
    assert asked == [("someone/a-model", ["config.json"])]


@pytest.mark.parametrize("preset", ["tiny", "tiny-arc", "knowledge", "official", "arc"])
def test_every_preset_has_a_plan(preset, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["outer_loop.py", "--preset", preset, "--plan"])
    if preset in ("knowledge", "official", "arc"):
        sys.argv += ["--model", "Qwen/Qwen2.5-0.5B"]

    outer_loop.main()

    out = capsys.readouterr().out
    assert out.startswith("computed, not measured")
    assert "the whole run" in out
    assert list(tmp_path.iterdir()) == []       # nothing was run or written


def test_the_readmes_table_is_the_plans():
    readme = (ROOT / "README.md").read_text()
    for line in hardware_table():
        assert line in readme


def test_cards_are_called_by_their_memory():
    for gib, card in CARDS.items():
        assert gib - 1 <= card.gib <= gib
        assert card.flops > 1e12 and card.bandwidth > 1e11
