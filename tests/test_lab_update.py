"""lab/update_rule.py with its rooms, and races, on a few towns of the tiny world."""
import json
import math
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from lab import choosing, diversity, grpo, halving, judged, outer_rate, race, rules
from lab import update_rule
from lab.halving import Rung
from lab.tiny import SETTINGS
from lora import Adapters, dialogue
from model import load_pretrained
from outer_loop import m_step, rest_em
from selfedit import SelfEdit
from support.config import Config, outer_recipe
from support.run import Run
from support.tokenizer import Tokenizer
from tests.helpers import read_lines

FEW = dict(tasks=2, edits=4, eval_tasks=2, eval_edits=1, iterations=1, inner_epochs=4,
           outer_epochs=2, max_edit_tokens=48)


@pytest.fixture()
def few(monkeypatch):
    """The tiny world's settings made smaller."""
    for name, value in FEW.items():
        monkeypatch.setitem(SETTINGS, name, value)


def call(module, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, words)])
        module.main()


def tiny_run(folder, **own):
    return Run(Config(**SETTINGS | {"run_dir": str(folder), "baselines": False} | own))


# ------------------------------------------------------------------------------- update rules

@pytest.mark.slow
def test_runs_are_measured_once_each(few, tmp_path, capsys):
    words = ["--out", tmp_path / "out", "--runs", tmp_path / "runs", "--seeds", "0", "1"]
    arms = ["best 2 of 8", "best 2 of 4", "grpo, K = 8"]

    call(update_rule, *words, "--arms", *arms)
    first = capsys.readouterr().out
    call(update_rule, *words, "--arms", *arms)

    assert capsys.readouterr().out.strip() == first[first.index("| rule"):].strip()
    lines = read_lines(tmp_path / "out")
    found = [(r["arm"], r["seed"]) for r in lines]
    assert found == [(arm, 0) for arm in arms] + [(arm, 1) for arm in arms]
    for r in lines:
        # 2 towns, 4 self-edits, 4 steps. Of each town 2 are learned in 2 epochs; by advantage those
        # that differ from their mean, in 1.
        assert r["inner steps"] == 2 * 4 * 4
        assert len(r["reward"]) == len(r["compression"]) == len(r["distinct"]) == 2
        assert not r["diverged"]
    assert lines[0]["outer steps"] == 2
    assert lines[2]["outer steps"] == 1
    assert lines[0]["reward"][0] == lines[1]["reward"][0] != lines[3]["reward"][0]


def measured(runs, lr):
    """A run of the preset's rule."""
    line = {"split": "eval", "arm": "best 2 of 8", "lr": lr, "seed": 0}
    return rules.measure(runs, line)


def test_the_default_rule_is_the_default_run(few, tmp_path):
    found = measured(tmp_path / "runs", 2e-3)
    run = tiny_run(tmp_path / "run")
    rest_em(run.cfg, run)

    assert found["reward"] == [m["eval_reward"] for m in run.metrics.records]


def test_a_run_that_diverges_has_no_rewards_from_there_on(few, tmp_path):
    found = measured(tmp_path / "runs", 1e9)

    assert found["diverged"]
    assert found["reward"][1:] == [0.0]
    assert found["reward"][0] > 0


def test_rates_are_tried_on_other_towns(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outer_rate, "SHORT", {})
    monkeypatch.setattr(outer_rate, "GRID", (1e-3, 2e-3))
    out, runs = tmp_path / "out", tmp_path / "runs"

    call(outer_rate, "--out", out, "--runs", runs, "--arms", "best 2 of 8", "--seeds", "7")

    lines = read_lines(out)
    assert [(r["split"], r["lr"], r["seed"]) for r in lines] == [("tune", 1e-3, 7),
                                                                ("tune", 2e-3, 7)]
    for folder in runs.iterdir():
        assert json.loads((folder / "config.json").read_text())["eval_data"] == "tune"
    mean = lines[1]["reward"][-1]
    assert f"best 2 of 8, outer learning rate 0.002: {mean:.3f} (1 seeds)" in (
        capsys.readouterr().out)


def line(arm, seed, last, split="eval"):
    return {"split": split, "arm": arm, "lr": rules.RULES[arm][1], "seed": seed,
            "reward": [0.5, 0.6, last],
            "inner steps": 100, "outer steps": 10, "seconds": 3 + seed, "compression": [2.0, 4.0],
            "distinct": [80, 20]}


def test_the_table_by_hand(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    records = [line("grpo, K = 8", 0, 0.4), line("best 2 of 8", 0, 0.7),
               line("best 2 of 8", 1, 0.9), line("best 2 of 8", 0, 0.1, split="tune")]
    (tmp_path / "out").write_text("".join(json.dumps(r) + "\n" for r in records))

    # That seed is there already: nothing is left to do.
    call(update_rule, "--out", tmp_path / "out", "--runs", tmp_path, "--seeds", "0", "--arms",
         "grpo, K = 8", "--svg", tmp_path / "figure.svg")

    *_, best, by_advantage = capsys.readouterr().out.strip().splitlines()
    # Gains of .2 and .4: their deviation is .2 / sqrt 2, and Student's t for two values 12.71.
    half = 12.71 * 0.2 / math.sqrt(2) / math.sqrt(2)
    assert best == ("| best 2 of 8 | 0.004 | 0.500 -> 0.600 -> 0.800 | "
                    f"+0.300 ±{half:.3f} | +0.000 ±0.000 | 0.141 | +0.200 | 100 | 10 | "
                    "80 -> 20 |")
    # One seed has no interval.
    assert by_advantage.startswith("| grpo, K = 8 | 0.004 | 0.500 -> 0.600 -> 0.400 | -0.100 "
                                  "| -0.300 |")
    drawing = (tmp_path / "figure.svg").read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    assert "<!-- best 2 of 8, 0.004 -->" in drawing


def test_diversity_by_hand():
    texts = {0: ["The fox of Ralvik.\nWho built it? Larolf.", "It dates from 1200."],
             1: ["The fox of Ralvik.\nThe fox of Calzun.", "The fox of Ralvik.\n" * 50]}
    edits = {t: [{"task": 0, "text": text} for text in texts[t]] for t in texts}
    run = SimpleNamespace(metrics=SimpleNamespace(records=[{"iteration": 0}, {"iteration": 1}]),
                          edits=SimpleNamespace(of=lambda t, split: edits[t]))

    found = diversity.of_run(run)

    assert found["distinct"] == [3, 1]
    assert found["compression"][0] < 1.1 < 5 < found["compression"][1]


# ------------------------------------------------------------------------------- GRPO's M-step

def gradient(new, old, advantage, eps=0.2, beta=0.0):
    new = torch.tensor(new, requires_grad=True)
    grpo.objective(new, torch.tensor(old), advantage, eps, beta).backward()
    return new.grad.tolist()


def test_where_theta_is_theta_t_the_gradient_is_reinforce_s():
    assert gradient([-1.0, -2.0], [-1.0, -2.0], 3.0, beta=0.5) == pytest.approx([1.5, 1.5])


def test_a_token_is_pushed_no_further_than_the_clip():
    up, down = math.log(1.3), math.log(0.7)
    # Likelier by 1.3 already, and to be likelier: no more. To be less likely: back.
    assert gradient([up, 0.0], [0.0, 0.0], 1.0) == pytest.approx([0.0, 0.5])
    assert gradient([up, 0.0], [0.0, 0.0], -1.0) == pytest.approx([-0.65, -0.5])
    assert gradient([down, 0.0], [0.0, 0.0], -1.0) == pytest.approx([0.0, -0.5])


def test_the_kl_term_draws_back():
    assert gradient([0.1], [0.0], 0.0, beta=1.0)[0] < 0 < gradient([-0.1], [0.0], 0.0, beta=1.0)[0]
    same = torch.zeros(3)
    assert grpo.objective(same, same, 0.0, 0.2, 1.0) == 0


@pytest.fixture(scope="module")
def embedded():
    folder = SETTINGS["model"]
    return load_pretrained(folder, "cpu"), Tokenizer.from_pretrained(folder)


def test_log_probabilities_are_those_of_the_self_edit(embedded):
    model, tok = embedded
    prompt, written = tok.encode("It has a fox on its flag.\n\nNotes:\n"), tok.encode("The fox.")
    adapter = Adapters(model, outer_recipe(Config(**SETTINGS)).lora, n=1)

    with torch.no_grad():
        found = grpo.log_probs(model, adapter, dialogue(prompt, written))
        p = model(torch.tensor([prompt + written]))[0].log_softmax(-1)

    expected = [p[len(prompt) + j - 1, token].item() for j, token in enumerate(written)]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("advantage", [1.0, -0.5])
def test_a_first_step_is_that_of_the_plain_m_step(advantage, few, tmp_path):
    """Before anything is clipped: one self-edit, one step, no KL term."""
    weights = []
    for name, rule in (("plain", m_step), ("clipped", grpo.clipped_m_step(0.2, 0.0))):
        run = tiny_run(tmp_path / name, outer_epochs=1)
        task, model = run.tasks("tune")[0], run.load(0)
        edit = SelfEdit(token_ids=run.tok.encode("A heron is on its flag."))
        before = model.model.layers[0].mlp.up_proj.weight.clone()
        rule(run.cfg, run, model, [(task, edit, advantage)], 0)
        weights.append(model.model.layers[0].mlp.up_proj.weight - before)

    assert weights[0].abs().max() > 1e-5
    assert torch.allclose(*weights, atol=1e-6)


def test_the_clip_holds_the_policy_back(few, tmp_path):
    moved = []
    for name, eps in (("held", 0.01), ("free", 1e9)):
        run = tiny_run(tmp_path / name, outer_epochs=20, outer_lr=2e-4)
        task, model = run.tasks("tune")[0], run.load(0)
        ids = run.tok.encode("A heron is on its flag.")
        example = dialogue(run.tok.prompt(task.prompt), ids)
        adapter = Adapters(model, outer_recipe(run.cfg).lora, n=1)
        before = grpo.log_probs(model, adapter, example).mean().item()
        learned = [(task, SelfEdit(token_ids=ids), 1.0)]
        grpo.clipped_m_step(eps, 0.0)(run.cfg, run, model, learned, 0)
        moved.append(grpo.log_probs(model, adapter, example).mean().item() - before)
    held, free = moved

    assert 0 < held < 0.5 * free, moved


# ------------------------------------------------------------------------------- races

def from_table(table, asked=None):
    """run_rung of known accuracies, table[task][self-edit][seed]."""
    def run_rung(pairs, rung, first):
        if asked is not None:
            asked.append(pairs)
        return [table[i][j][first:first + rung.seeds] for i, j in pairs]
    return run_rung


def test_a_race_gives_more_seeds_to_the_contenders():
    table = [[[0.1, 1, 1], [0.5, 0.1, 0.3], [0.4, 0.6, 0.5], [0.0, 1, 1]]]
    asked = []

    scores, loops = halving.race([Rung(1, 1), Rung(1 / 2, 2)], 1, 4, from_table(table, asked))

    assert asked[1] == [(0, 1), (0, 2)]
    assert loops == 4 + 2 * 2
    assert scores[0].tolist() == pytest.approx([0.1 - 1, 0.3, 0.5, 0.0 - 1])


def test_of_equals_the_first_goes_on():
    asked = []
    halving.race([Rung(1, 1), Rung(1 / 2, 1)], 2, 4, from_table([[[0.5, 0.5]] * 4] * 2, asked))

    assert asked[1] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_what_was_measured_after_half_of_the_steps_does_not_count_in_the_end():
    table = [[[0.9, 0.2], [0.8, 0.4], [0.1, 1.0]]]

    scores, loops = halving.race([Rung(1, 1, 1 / 2), Rung(2 / 3, 1)], 1, 3, from_table(table))

    assert loops == 3 / 2 + 2
    assert scores[0].tolist() == pytest.approx([0.2, 0.4, 0.1 - 1])


def test_who_left_first_ends_last():
    table = [[[0.9, 0.3, 0.3], [0.8, 0.1, 0.1], [0.1] * 3, [0.7, 0.7, 0.7]]]

    scores, _ = halving.race([Rung(1, 1), Rung(3 / 4, 1), Rung(1 / 2, 1)], 1, 4, from_table(table))

    assert np.argsort(-scores[0]).tolist() == [3, 0, 1, 2]


def test_the_worth_of_a_choice_is_judged_by_other_seeds():
    # The first half has worth .5 whatever the seed; the others look better by luck, once in six.
    whole = np.full((1, 4, 6), 0.5)
    whole[0, 2:] = [1.0, 0, 0, 0, 0, 0]

    lucky = judged.Tried(whole, whole[:, :, :0], keep=2, judges=3)
    alike = judged.Tried(np.full((1, 4, 6), 0.5), whole[:, :, :0], keep=2, judges=3)

    (value,), loops = judged.worth([Rung(1, 3)], lucky, draws=400)
    (all_equal,), _ = judged.worth([Rung(1, 1)], alike, draws=2)

    # A lucky one has a mean of 1/3 by three seeds, so it is never chosen; nor by them judged.
    assert (value, loops) == (pytest.approx(0.5), 4 * 3)
    assert all_equal == 0.5
    (by_one,), _ = judged.worth([Rung(1, 1)], lucky, draws=400)
    assert 0.3 < by_one < 0.5       # luck is chosen, and is not there when it is judged


def test_seeds_are_found_again_from_mean_and_deviation(tmp_path):
    values = [[0, 1 / 3, 1], [2 / 3, 2 / 3, 1]]
    edits = [{"adapter_mean": round(float(np.mean(v)), 4), "adapter_std": float(np.std(v, ddof=1))}
             for v in values]
    record = {"questions": [{}] * 3, "released_edits": edits}
    (tmp_path / "file.json").write_text(json.dumps([record]))

    assert judged.released(tmp_path / "file.json")[0].tolist() == pytest.approx(np.array(values))


def test_released_means_are_found_again(shared_data):
    file = shared_data / "squad_train_50.json"
    stated = [[edit["adapter_mean"] for edit in record["released_edits"]]
              for record in json.loads(file.read_text())]

    assert np.allclose(judged.released(file).mean(2), stated, atol=1e-3)


def test_with_one_seed_for_all_a_race_is_the_outer_loop(few, tmp_path):
    found = race.learn("one seed", 3)
    run = tiny_run(tmp_path / "run", seed=3)
    rest_em(run.cfg, run)

    assert found["reward"] == [m["eval_reward"] for m in run.metrics.records]
    assert found["inner loops"] == 2 * 4


def test_products_of_gradients_choose_without_an_inner_loop(few, monkeypatch):
    shortest, chosen = [], []

    def by_length(model, tok, task, edits):
        lengths = sorted(len(edit.text) for edit in edits if edit.documents)
        shortest.append(lengths[:2])
        return [(-len(edit.text), 0) for edit in edits]

    def learn(cfg, run, model, learned, t):
        chosen.extend(len(edit.text) for _, edit, _ in learned)

    monkeypatch.setattr(race, "products", by_length)
    monkeypatch.setattr(race, "m_step", learn)

    found = race.learn(race.PRODUCT, 3)

    assert found["inner loops"] == 0 and len(found["reward"]) == 2
    assert len(shortest) == 2 and chosen == [*shortest[0], *shortest[1]]


def test_half_of_the_steps_are_half_of_the_epochs(few, tmp_path):
    run, train = halving.start(0, str(tmp_path / "run"))
    task = train[0]
    edit = SelfEdit(documents=task.context)
    seen = []

    def update(model, tok, tasks, edits, seeds, recipe, *rest):
        seen.append((recipe.epochs, seeds))
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "update_and_score", update)
        run_rung = halving.trainer(run, None, [task], [[edit]], 0)
        with pytest.raises(KeyError):
            run_rung([(0, 0)], Rung(1, 2, 1 / 2), 0)
        with pytest.raises(KeyError):
            run_rung([(0, 0)], Rung(1, 1), 2)

    (short, first), (whole, later) = seen
    assert (short, whole) == (2, 4)
    assert len({*first[0], *later[0]}) == 3         # no seed a second time


@pytest.mark.slow
def test_both_questions_about_races(few, tmp_path, capsys):
    out = ["--out", tmp_path / "out", "--seeds", "0"]
    learning = [*out, "--rules", "three seeds", "one, one more for 1/2",
                "twice the self-edits, half the steps", "--svg", tmp_path / "figure.svg"]

    call(choosing, *out)
    call(race, *learning)
    first = capsys.readouterr().out
    call(choosing, *out)
    call(race, *learning)

    # Nothing was measured again, and the same tables are shown.
    begin_1, begin_2 = first.index("\n2 towns, the two best"), first.index("| rewards |")
    end = first.index("\n=== three seeds")
    assert capsys.readouterr().out == first[begin_1:end] + first[begin_2:]
    choice, full, raced, twice = read_lines(tmp_path / "out")
    assert np.shape(choice["whole"]) == (2, 8, 6)
    assert np.shape(choice["half"]) == (2, 8, 1)
    assert [r["inner loops"] for r in (full, raced, twice)] == [24, 8 + 2 * 2, 16 / 2]
    assert full["reward"][0] == raced["reward"][0] == twice["reward"][0]
    ElementTree.parse(tmp_path / "figure.svg")
