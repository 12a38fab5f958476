"""ReST-EM on a random model: what it measures, what it keeps, what it learns, what it says."""
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import outer_loop
import selfedit
from data import knowledge
from data.tasks import in_order, load_tasks
from engine.decode import Sampling, collect
from inner_loop import ANSWERS, answering, ask, grade_all, update_and_score
from lora import Lora, PROJECTIONS, Recipe
from model import load_pretrained
from outer_loop import by_kind, m_step, select, weigh
from selfedit import SelfEdit, read_self_edit, sample_self_edits
from support.config import Config
from support.files import UserError
from support.ranks import Records
from support.report import summary
from support.tokenizer import Tokenizer
from tests.helpers import (ROOT, call, open_run, parse, run_it, run_rest_em, spy_on_sft,
                           weight_of)


def right_answers(tasks, answers):
    verdicts = grade_all(tasks, [answer.texts for answer in answers])
    return sum(map(sum, verdicts))


def test_what_is_measured_and_tried(whole):
    metrics = whole.metrics.records
    assert len(metrics) == 3
    for t, m in enumerate(metrics):
        held_out = whole.rollouts.of(t, "eval")
        assert sorted(r["title"] for r in held_out) == ["Town 0", "Town 1"]
        assert m["eval_tasks"] == 2
        assert m["eval_reward"] == pytest.approx(np.mean([r["reward"] for r in held_out]))
        low, high = m["eval_ci"]
        assert low <= m["eval_reward"] <= high
        rewards = [r["reward"] for r in whole.rollouts.of(t - 1, "train")]
        assert m["train_reward"] == (pytest.approx(np.mean(rewards)) if t else None)
    # Every round has K self-edits of the next passages.
    train = in_order(load_tasks(whole, whole.cfg.train_data), whole.cfg.seed)
    rewards = set()
    for t in range(2):
        rollouts = whole.rollouts.of(t, "train")
        assert [(r["task"], r["edit"]) for r in rollouts] == [
            (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
        titles = [r["title"] for r in rollouts]
        assert titles[::3] == [task.name for task in train[2 * t:2 * t + 2]]
        rewards.update(r["reward"] for r in rollouts)
    assert len(rewards) > 1     # else the tests of what is kept would show nothing


def rank_of_change(run, t):
    """Rank of what a weight has changed by since the base."""
    change = weight_of(run.folder / f"iter_{t}") - weight_of(run.cfg.model)
    return torch.linalg.matrix_rank(change.double(), rtol=1e-3).item()


def test_each_m_step_goes_on_from_the_last_and_leaves_the_embedding(whole):
    assert rank_of_change(whole, 1) == 4
    assert rank_of_change(whole, 2) > 4     # two merges of rank 4
    embedding = "model.embed_tokens.weight"
    assert torch.equal(weight_of(whole.cfg.model, embedding),
                       weight_of(whole.folder / "iter_2", embedding))


def test_with_restart_each_round_goes_on_from_the_base(argv, varied_rewards):
    run = run_it([*argv, "--restart"])
    assert [rank_of_change(run, t) for t in (1, 2)] == [4, 4]


def test_with_strict_nothing_is_learned_where_nothing_helps(argv, monkeypatch):
    """Without varied rewards, all of a random model's answers are wrong."""
    asked = []

    def spy(model, tok, groups, sampling, adapters=None):
        asked.append([len(tasks) for tasks in groups])
        return ask(model, tok, groups, sampling, adapters)

    monkeypatch.setattr(outer_loop, "ask", spy)
    run = run_it([*argv, "--strict"])
    assert len(run.metrics.records) == 3
    assert rank_of_change(run, 2) == 0
    # The un-adapted model is asked once per passage and model, not once per self-edit: evaluation,
    # round, evaluation, round, evaluation.
    assert asked == [[2], [2], [2], [2], [2]]


def test_the_m_step_is_given_the_best_self_edit_of_each_passage(argv, varied_rewards, monkeypatch,
                                                                capsys):
    jobs = spy_on_sft(monkeypatch, outer_loop, "sft_one")

    run = run_it([*argv, "--iterations", "1", "--tasks", "7"])

    tasks = load_tasks(run, run.cfg.train_data)
    prompts = {task.name: run.tok.prompt(task.prompt) for task in tasks}
    expected = []
    for task in range(7):
        rollouts = [r for r in run.rollouts.of(0, "train") if r["task"] == task]
        best = min(rollouts, key=lambda r: (-r["reward"], r["edit"]))
        prompt = prompts[best["title"]]
        learn = [0] * len(prompt) + [1] * len(best["token_ids"])
        expected.append((prompt + best["token_ids"], learn))
    (job,) = jobs
    assert job.examples == expected

    out = capsys.readouterr().out
    for said in ("note: 1 rounds of 7 tasks, but there are 6: some will be seen again",
                 f"round 1: mean reward {run.metrics.records[1]['train_reward']:.3f}, without ",
                 "kept 7 self-edits with mean reward ", "M-step: 7 self-edits, 2 steps, "):
        assert said in out
    assert run.metrics.records[0]["baselines"] == []    # without the flag


def losses_around_an_m_step(argv, weights):
    """Mean losses of sampled self-edits before and after an M-step that weighs them so: a pair for
    each of them, on the prompt and on the self-edit."""
    cfg = parse([*argv, "--outer-lr", "3e-3"])
    run = open_run(cfg)
    model = run.load(0)
    task = load_tasks(run, cfg.train_data)[0]
    prompt = run.tok.prompt(task.prompt)
    seeds = [7, 8][:len(weights)]
    sampling = Sampling(max_new=24, temperature=1.0, top_p=0.95, n=len(seeds))
    (edits,) = collect(sample_self_edits(model, run.tok, [task], sampling, [seeds]))

    def losses():
        found = []
        for edit in edits:
            ids = torch.tensor([prompt + edit.token_ids])
            nll = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
            found.append([part.mean().item() for part in nll.tensor_split([len(prompt) - 1])])
        return found

    before = losses()
    m_step(cfg, run, model, [(task, edit, w) for edit, w in zip(edits, weights)], 0)
    return before, losses()


def test_the_m_step_makes_a_kept_self_edit_likelier_but_not_its_prompt(argv):
    before, after = losses_around_an_m_step([*argv, "--outer-epochs", "6"], [1.0])
    ((prompt_before, edit_before),), ((prompt_after, edit_after),) = before, after
    assert edit_after < edit_before - 0.5
    assert prompt_after > prompt_before - 0.2


@pytest.mark.parametrize("update", ["reinforce", "grpo"])
def test_by_advantage_the_better_self_edit_becomes_likelier_and_the_worse_one_less(argv, update):
    learned = weigh(parse([*argv, "--update", update]), [[1.0, 0.0]], [[EDIT, EDIT]], [0.0], 0)
    weights = [weight for _, _, weight in learned]
    before, after = losses_around_an_m_step([*argv, "--outer-epochs", "3"], weights)
    better, worse = (new - old for (_, old), (_, new) in zip(before, after))
    assert better < worse - 0.5


@pytest.mark.parametrize("words", [
    "--outer-lr 30 --outer-epochs 1",       # a single step: its loss was measured before it
    "--outer-lr 30 --outer-epochs 6"])      # the adapter is finite, and the merged model unusable
def test_an_m_step_that_diverges_is_an_error_and_saves_nothing(words, argv, tmp_path):
    with pytest.raises(UserError, match="M-step of round 1 diverged; try a lower --outer-lr"):
        run_it([*argv, *words.split()])
    assert not list((tmp_path / "run").glob("iter_*"))


@pytest.mark.parametrize("lr, note", [("0.001", "nothing to learn"), ("1e15", "diverged")])
def test_bad_self_edits_do_not_stop_a_run(lr, note, argv, varied_rewards, monkeypatch, capsys):
    """If none says anything, there is nothing for the M-step: the model stays as it is."""
    if lr == "0.001":
        monkeypatch.setattr(outer_loop, "read_self_edit",
                            lambda task, text, *made: read_self_edit(task, "", *made))
    run = open_run(parse([*argv, "--inner-lr", lr, "--iterations", "1"]))
    run_rest_em(run)
    assert len(run.rollouts.records) == 2 * 2 + 6
    for r in run.rollouts.records:
        assert r["reward"] == 0
        assert note in r["note"]
    same = torch.equal(weight_of(run.folder / "iter_1"), weight_of(run.cfg.model))
    assert same == (lr == "0.001")
    assert ("no self-edit to learn from" in capsys.readouterr().out) == same
    assert "with a self-edit 0.000 -> 0.000" in summary(run)


EDIT = SelfEdit(text="x", documents=["x"])
EMPTY = SelfEdit()
THREE = [EDIT, EDIT, EDIT]
EDITS = [THREE, THREE, THREE]
SCORES = [[0.2, 0.5, 0.5], [0, 0, 0], [0.1, 0.3, 0.2]]
# With some that are perfect, of which one holds nothing to learn.
PERFECT = [[1, 0.5, 1], [0, 0, 0], [1, 1, 0]]
HOLED = [THREE, THREE, [EDIT, EMPTY, EDIT]]
WORDS = ["--preset", "knowledge", "--model", "m", "--train-data", "a", "--eval-data", "b"]


def selected(scores, edits, words="", without=(0.5, 0, 0.2), t=0):
    return select(parse([*WORDS, *words.split()]), scores, edits, without, t)


@pytest.mark.parametrize("words, scores, edits, kept", [
    # The first of equals; where all are bad, too.
    ("", SCORES, EDITS, [(0, 1), (1, 0), (2, 1)]),
    ("--keep 2", SCORES, EDITS, [(0, 1), (0, 2), (1, 0), (1, 1), (2, 1), (2, 2)]),
    ("--strict", SCORES, EDITS, [(2, 1)]),
    ("--update solved", PERFECT, HOLED, [(0, 0), (0, 2), (2, 0)]),
    ("--update solved --solved-at 0.5", PERFECT, HOLED, [(0, 0), (0, 1), (0, 2), (2, 0)]),
    *((f"--update {way}", [[1, 1], [1, 1]], [[EMPTY, EDIT], [EMPTY, EMPTY]], [(0, 1)])
      for way in ("best", "solved", "random"))])
def test_what_is_kept(words, scores, edits, kept):
    assert selected(scores, edits, words) == kept


def test_random_keeps_as_many_as_best_whatever_their_rewards():
    edits, words = [[EDIT] * 20] * 50, "--update random --keep 2"
    without = [0] * 50
    kept = selected([[0] * 20] * 50, edits, words, without)
    assert [i for i, _ in kept] == [i // 2 for i in range(100)]
    assert len(set(kept)) == 100                    # no self-edit twice
    assert len({j for _, j in kept}) > 15           # any of them
    rising = [[j / 20 for j in range(20)]] * 50
    assert selected(rising, edits, words, without) == kept
    assert selected(rising, edits, words, without, t=1) != kept


@pytest.mark.parametrize("update, weights", [
    ("best", {(0, 0): 1, (1, 0): 1, (2, 1): 1}),
    # Rewards above their task's mean. The unreadable are included; where all rewards are equal
    # there is nothing to learn.
    ("reinforce", {(0, 0): 0.4, (0, 1): -0.5, (0, 2): 0.1, (2, 0): -0.1, (2, 1): 0.1}),
    # The same in standard deviations: 0.37 and 0.08.
    ("grpo", {(0, 0): 1.069, (0, 1): -1.336, (0, 2): 0.267, (2, 0): -1.225, (2, 1): 1.225})])
def test_the_weights_of_self_edits(update, weights):
    rewards = [[0.9, 0.0, 0.6], [0.5, 0.5, 0.5], [0.1, 0.3, 0.2]]
    edits = [[EDIT, EMPTY, EDIT], THREE, THREE]
    found = weigh(parse([*WORDS, "--update", update]), rewards, edits, [0, 0, 0], 0)
    assert [(i, j) for i, j, _ in found] == list(weights)
    assert [w for _, _, w in found] == pytest.approx(list(weights.values()), abs=1e-3)


@pytest.mark.slow
def test_a_run_by_advantage_goes_to_its_end(argv, varied_rewards, capsys):
    run = run_it([*argv, "--update", "grpo", "--outer-epochs", "1"])
    assert len(run.metrics.records) == 3
    assert " to avoid" in capsys.readouterr().out


def test_a_prompt_may_be_a_file(argv, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Teach {context} ({title}), {as} a {story}.\n")
    cfg = parse([*argv, "--prompt-file", str(path)])
    task = load_tasks(open_run(cfg), cfg.train_data)[0]
    title, context = task.context[0].split("\n", 1)
    assert task.prompt == f"Teach {context} ({title}), {{as}} a {{story}}.\n"
    assert cfg.prompt == path.read_text()       # so that a changed file is another run
    path.write_text("rewrite")      # not the prompt of that name
    for program, words in ((outer_loop, argv), (selfedit, ["--data", "eval"])):
        with pytest.raises(UserError, match="prompt.txt: there is no {context} in it"):
            call(program, *words, "--prompt-file", path)


def test_best_of_five_is_what_the_release_kept(shared_data):
    path = shared_data / "squad_train_50.json"
    records = json.loads(path.read_text())
    rewards, edits, picks = [], [], []
    for task, record in zip(knowledge.load(path), records):
        released = record["released_edits"]
        rewards.append([edit["adapter_mean"] for edit in released])
        edits.append([read_self_edit(task, edit["text"]) for edit in released])
        picks.append(record["released_pick"])
    assert len(records) == 50
    assert selected(rewards, edits) == list(enumerate(picks))


def test_baselines_are_accuracies_on_the_same_questions_measured_once(whole):
    first, *others = whole.metrics.records
    unadapted, in_prompt, passage_only = first["baselines"]

    assert [m["baselines"] for m in others] == [[], []]
    assert [arm["name"] for arm in first["baselines"]] == [
        "un-adapted", "passage in the prompt", "passage only"]
    rollouts = whole.rollouts.of(0, "eval", "passage only")
    assert unadapted["reward"] == pytest.approx(np.mean([r["unadapted"] for r in rollouts]))
    assert passage_only["reward"] == pytest.approx(np.mean([r["reward"] for r in rollouts]))
    assert [r["documents"] for r in rollouts] == [1, 1]

    # The passage stands before each question.
    tasks = load_tasks(whole, whole.cfg.eval_data)[:2]
    for task in tasks:
        task.queries = [f"{task.context[0]}\n\n{query}" for query in task.queries]
    (answers,) = ask(whole.load(0), whole.tok, [tasks], answering(whole.cfg))
    assert in_prompt["reward"] == right_answers(tasks, answers) / 4


def test_accuracy_by_kind_of_question_by_hand():
    kinds = [["forward", "reversed"], ["forward"]]
    records = [{"task": 0, "right": [[True, False], [True, True]]}, {"task": 1, "right": [[False]]}]
    assert by_kind(kinds, records) == {"forward": pytest.approx(2 / 3), "reversed": 0.5}


def small_run(folder, gains, domain="tinyworld"):
    """A run that ended after one round, in which task i's first self-edit gained gains[i]."""
    rollouts = Records(folder / "rollouts.jsonl")
    for i, gain in enumerate(gains):
        for t, reward in ((0, 0.25), (1, 0.25 + gain)):
            own = {"iteration": t, "split": "eval", "task": i, "edit": 0, "reward": reward,
                   "title": "abc"[i], "context": f"About {'abc'[i]}.",
                   "questions": ["Who?", "Where?"], "gold": ["Ann", "Rome 1"],
                   "kinds": ["forward", "reversed"], "forms": ["plain", "vague"],
                   "answers": [["Ann", f"Rome {t}"]], "right": [[True, t == 1]],
                   "text": "An \x1b[31mred\x07.\nSecond line."}
            rollouts.add(own, own | {"edit": 1, "text": "Another."})
    first = {"iteration": 0, "eval_reward": 0.25, "eval_by_kind": {"forward": 0.5, "reversed": 0.0},
             "baselines": [{"name": "un-adapted", "reward": 0.0, "by_kind": {}},
                           {"name": "oracle", "reward": 0.75, "by_kind": {"forward": 1.0}}],
             "made_of": {"copy": 0.75, "plain": 0.25}}
    last = {"iteration": 1, "eval_reward": 0.5, "eval_by_kind": {"forward": 0.75, "reversed": 0.5},
            "baselines": [], "made_of": {"plain": 0.5, "reversed": 0.5}}
    return SimpleNamespace(rollouts=rollouts, cfg=Config(domain=domain),
                           metrics=SimpleNamespace(records=[first, last]))


def test_the_summary_by_hand(tmp_path):
    run = small_run(tmp_path, gains=[0.75, 0.0, 0.2])
    lines = summary(run).splitlines()
    assert lines == [
        "un-adapted 0.000, oracle 0.750 (forward 1.000)",
        "with a self-edit 0.250 -> 0.500",
        "self-edits: copy 75% -> 0%, plain 25% -> 50%, reversed 0% -> 50%",
        "",
        "A held-out passage, c (its gain is close to the mean gain, and it did best in reversed "
        "questions):",
        "About c.",
        "",
        "before training it writes, with reward 0.25:",
        "    plain             An ?[31mred?.",      # nothing that a terminal would obey
        "    vague             Second line.",
        "",
        "after round 1 it writes, with reward 0.45:",
        "    plain             An ?[31mred?.",
        "    vague             Second line.",
        "",
        "It answers, before training -> after round 1:",
        "    Where?  wrong 'Rome 0' -> right 'Rome 1'",
        "    Who?  right 'Ann' -> right 'Ann'"]


def test_a_puzzle_that_was_solved_is_shown_as_grids(tmp_path):
    run = small_run(tmp_path, gains=[0.25, 0.75], domain="tinyarc")
    for r in run.rollouts.records:
        r |= {"answers": [["33\n33\n\n12\n30"]], "questions": ["12\n3"], "gold": ["4"]}
        r |= {"kinds": [], "context": ""}
    lines = summary(run).splitlines()
    assert "A held-out puzzle, b (it was not solved before training, and is solved after it):" in \
        lines
    assert [line.split() for line in lines[-9:]] == [
        ["input", "solution"], ["🟦🟥", "🟨"], ["🟩"],
        ["before", "training", "after", "round", "1"], ["🟩🟩", "🟩🟩"], ["🟩🟩", "🟩🟩"], [],
        ["🟦🟥", "🟦🟥"], ["🟩⬛", "🟩⬛"]]


def test_the_program_says_what_it_will_do_and_prints_a_summary(argv):
    for words in ("the model reads 2 passages", "is complete"):     # then it only reads again
        out = call(outer_loop, *argv, "--iterations", "0")
        assert words in out
        assert "\nwith a self-edit 0.000\n" in out
        assert "report.html" in out.splitlines()[-1]
        assert out.replace("\n", "").isprintable()


def test_selfedit_prints_what_a_model_writes(tiny_folder):
    data = ROOT / "data/example_eval.json"
    out = call(selfedit, "--model", tiny_folder, "--data", data, "--edits", 2)
    assert "--- self-edit 0: " in out and "--- self-edit 1: " in out


@pytest.mark.slow
def test_a_real_model_learns_a_passage(smollm2):
    """SmolLM2 on four invented passages, which it can't know before. The self-edit of each is of
    questions with their true answers."""
    tasks = knowledge.load(ROOT / "data/example_eval.json")
    model, tok = load_pretrained(smollm2, "cpu"), Tokenizer.from_pretrained(smollm2)
    recipe = Recipe(Lora(16, 32, PROJECTIONS), lr=2e-3, epochs=5, batch=1)
    sampling = replace(ANSWERS, max_new=32)
    edits = []
    for task in tasks:
        pairs = zip(task.questions, task.answers)
        edits.append(SelfEdit(documents=[f"Question: {q}\nAnswer: {a}" for q, a in pairs]))

    (answers,) = ask(model, tok, [tasks], sampling)
    outcomes = dict(update_and_score(model, tok, tasks, edits, [[0]] * 4, recipe, sampling))

    assert right_answers(tasks, answers) <= 1       # of 12
    assert sum(sum(outcome.right[0]) for outcome in outcomes.values()) >= 5
