"""The whole loop on a random model: what it writes, what it keeps, what it changes, and that it can be killed."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import outer_loop
import run as runs
from checkpoint import UserError
from inner_loop import ask, grade, make_job
from data import judges, knowledge
from lora import PROJECTIONS
from model import load_pretrained
from outer_loop import rest_em, select
from run import Run, parse_args
from selfedit import SelfEdit, read_self_edit, sample_self_edits
from sft import Recipe, sft
from stats import bootstrap_ci

SMALL = "--preset knowledge --iterations 2 --tasks 2 --edits 3 --seeds 2 --eval-tasks 2 --max-edit-tokens 24 --max-answer-tokens 6 --inner-rank 4 --inner-epochs 2 --outer-rank 4 --device cpu"


@pytest.fixture()
def argv(tiny_folder, passages, tmp_path):
    return ["--model", str(tiny_folder), "--train-data", str(passages), "--eval-data", str(passages), "--run-dir", str(tmp_path / "run"), *SMALL.split()]


def run_it(argv):
    cfg = parse_args(argv)
    run = Run(cfg)
    rest_em(cfg, run)
    return run.metrics, run


def lines(run, name):
    return [json.loads(line) for line in (run.folder / name).read_text().splitlines()]


def easy_judge(question, gold, prediction):
    """Rewards that differ on a random model: is the number of letters even?"""
    return len(prediction) % 2 == 0


@pytest.fixture(autouse=True)
def varied_rewards(monkeypatch):
    monkeypatch.setitem(judges.JUDGES, "rule", easy_judge)


def test_a_run_is_a_folder(argv, capsys):
    metrics, run = run_it(argv)
    assert [m["iteration"] for m in metrics] == [0, 1, 2] and metrics == lines(run, "metrics.jsonl")
    rollouts = lines(run, "rollouts.jsonl")
    train = [r for r in rollouts if r["split"] == "train"]
    assert len(train) == 2 * 2 * 3 and len(rollouts) - len(train) == 3 * 2
    assert {r["title"] for r in train if r["iteration"] == 0}.isdisjoint({r["title"] for r in train if r["iteration"] == 1})  # new passages
    for r in rollouts:
        verdicts = [[bool(a.strip()) and easy_judge("", "", a) for a in seed] for seed in r["answers"]]
        assert r["right"] == verdicts and len(verdicts) == (2 if r["split"] == "train" else 1)
        assert r["reward"] == pytest.approx(sum(map(sum, verdicts)) / (2 * len(verdicts))) or r["note"]
        assert run.tok.decode(r["token_ids"]).strip() == r["text"] and r["seconds"] >= 0
    assert len({r["reward"] for r in train}) > 1
    for t in (1, 2):
        mine = [r["reward"] for r in train if r["iteration"] == t - 1]
        assert metrics[t]["train_reward"] == pytest.approx(sum(mine) / len(mine))
        held_out = [r["reward"] for r in rollouts if (r["split"], r["iteration"]) == ("eval", t)]
        assert metrics[t]["eval_reward"] == pytest.approx(sum(held_out) / 2) and metrics[t]["eval_ci"][0] <= metrics[t]["eval_reward"] <= metrics[t]["eval_ci"][1]
    assert metrics[0]["train_reward"] is None
    base, one, two = (load_pretrained(f, "cpu").state_dict() for f in (argv[1], run.folder / "iter_1", run.folder / "iter_2"))
    assert not torch.equal(base["model.layers.0.mlp.up_proj.weight"], one["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], two["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(base["model.embed_tokens.weight"], two["model.embed_tokens.weight"])
    out = capsys.readouterr().out
    assert "eta" in out and "round 1: mean reward" in out and "M-step:" in out


def test_the_m_step_makes_the_kept_edits_likelier(argv):
    """On the completion only, with the ids as sampled: the loss on what was kept falls; on the prompt it was not trained."""
    cfg = parse_args([*argv, "--outer-lr", "3e-3", "--outer-epochs", "6"])
    run = Run(cfg)
    model, task = run.load(0), run.tasks(cfg.train_data)[0]
    edit = sample_self_edits(model, run.tok, [task], 1, [[7]], max_new=24)[0][0]
    prompt = run.tok.prompt(task.prompt)

    def nll():
        ids = torch.tensor([prompt + edit.token_ids])
        losses = torch.nn.functional.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        return losses[:len(prompt) - 1].mean().item(), losses[len(prompt) - 1:].mean().item()

    before = nll()
    outer_loop.m_step(cfg, run, model, [(task, edit)], 0)
    after = nll()
    assert after[1] < before[1] - 0.5 and after[0] > before[0] - 0.2


def test_selection():
    edit, empty = SelfEdit("x", [], ["x"]), SelfEdit("", [])
    rows, edits = [[0.2, 0.5, 0.5], [0, 0, 0], [0.1, 0.3, 0.2]], [[edit] * 3] * 3
    assert select(rows, edits) == [(0, 1), (1, 0), (2, 1)]                                  # ties go to the first
    assert select(rows, edits, floor=[0.5, 0, 0.2]) == [(2, 1)]                             # --strict: better than un-adapted
    assert select([[1, 0.5, 1], [0, 0, 0], [1, 1, 0]], [[edit] * 3, [edit] * 3, [edit, empty, edit]], "solved") == [(0, 0), (0, 2), (2, 0)]
    assert select([[0, 0], [0, 0]], [[empty, edit], [empty, empty]]) == [(0, 1)]            # nothing to learn from is never kept


def test_best_of_five_is_what_the_release_kept(shared_data):
    records = json.loads((shared_data / "squad_train_50.json").read_text())
    rewards = [[e["adapter_mean"] for e in r["released_edits"]] for r in records]
    edits = [[read_self_edit(t, e["text"]) for e in r["released_edits"]] for t, r in zip(knowledge.load(shared_data / "squad_train_50.json"), records)]
    assert select(rewards, edits) == [(i, r["released_pick"]) for i, r in enumerate(records)] and len(records) == 50


def rank_of_change(run, t):
    """Rank of what the weights changed by since the base."""
    name = "model.layers.0.mlp.up_proj.weight"
    change = load_pretrained(run.folder / f"iter_{t}", "cpu").state_dict()[name] - load_pretrained(run.cfg.model, "cpu").state_dict()[name]
    return torch.linalg.matrix_rank(change.double(), rtol=1e-3).item()


def test_each_round_goes_on_from_the_last_or_from_the_base(argv, tmp_path):
    _, onward = run_it(argv)
    _, restart = run_it([*argv, "--restart", "--run-dir", str(tmp_path / "restart")])
    assert rank_of_change(onward, 2) > 4 and rank_of_change(restart, 2) == 4  # two merges of rank 4, or one
    assert rank_of_change(onward, 1) == rank_of_change(restart, 1) == 4


def test_strict_keeps_only_what_helps(argv, monkeypatch):
    monkeypatch.setitem(judges.JUDGES, "rule", lambda *_: False)  # nothing helps
    metrics, run = run_it([*argv, "--strict"])
    assert len(metrics) == 3 and rank_of_change(run, 2) == 0


def test_un_adapted_answers_are_asked_once_per_model(argv, monkeypatch):
    asked = []
    monkeypatch.setattr(runs, "ask", lambda model, tok, tasks, **k: asked.append(len(tasks)) or ask(model, tok, tasks, **k))
    run_it(argv)
    assert asked == [2, 2, 2, 2, 2]  # evaluation, round, evaluation, round, evaluation: per passage, not per self-edit


def content(run):
    drop = lambda r: {k: v for k, v in r.items() if k not in ("seconds", "losses")}
    key = lambda r: (r["iteration"], r.get("split", ""), r.get("task", 0), r.get("edit", 0))
    return [[drop(r) for r in sorted(lines(run, name), key=key)] for name in ("edits.jsonl", "rollouts.jsonl", "metrics.jsonl")]


@pytest.mark.parametrize("moment", [1, 2, 3, 6, 9, 14, 20])
def test_a_write_that_is_cut_short_is_made_again(moment, argv, tmp_path, monkeypatch):
    """The process dies in the middle of its n-th write; the same command then ends as a run that was left alone."""
    _, whole = run_it([*argv, "--run-dir", str(tmp_path / "whole")])
    add, writes = runs.Lines.add, []

    def dying_add(self, *records):
        writes.append(self.path)
        if len(writes) == moment:
            text = "".join(json.dumps(r) + "\n" for r in records)
            with self.path.open("a") as f:
                f.write(text[:len(text) * 2 // 3])
            raise KeyboardInterrupt
        add(self, *records)

    monkeypatch.setattr(runs.Lines, "add", dying_add)
    with pytest.raises(KeyboardInterrupt):
        run_it(argv)
    monkeypatch.setattr(runs.Lines, "add", add)
    _, again = run_it(argv)
    assert content(again) == content(whole)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(argv, tiny_folder, tmp_path):
    """SIGKILL at several moments; then the same command; against a run that was left alone."""
    command = [sys.executable, "outer_loop.py", *argv]
    other = [a if a != str(tmp_path / "run") else str(tmp_path / "whole") for a in command]
    subprocess.run(other, check=True, capture_output=True)
    rollouts = tmp_path / "run" / "rollouts.jsonl"
    for n_lines in (1, 6, 13):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (rollouts.exists() and rollouts.read_bytes().count(b"\n") >= n_lines):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    runs = [Run(parse_args(c[2:])) for c in (command, other)]
    assert content(runs[0]) == content(runs[1])
    a, b = (load_pretrained(r.folder / "iter_2", "cpu").state_dict() for r in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_other_settings_are_refused_and_more_iterations_are_not(argv):
    _, run = run_it(argv)
    with pytest.raises(UserError, match="other settings .seed: 0"):
        run_it([*argv, "--seed", "1"])
    metrics, _ = run_it([*argv, "--iterations", "3"])
    assert [m["iteration"] for m in metrics] == [0, 1, 2, 3]


def test_no_draw_depends_on_how_many_there_are(argv, tmp_path):
    """A run with more edits has the same first ones, and the same rewards for them."""
    few = run_it([*argv, "--edits", "2", "--iterations", "1"])[1]
    many = run_it([*argv, "--edits", "3", "--iterations", "1", "--run-dir", str(tmp_path / "many")])[1]
    pick = lambda run: {(r["task"], r["edit"]): (r["text"], r["reward"]) for r in lines(run, "rollouts.jsonl") if (r["iteration"], r["split"]) == (0, "train")}
    a, b = pick(few), pick(many)
    assert len(a) == 4 and len(b) == 6 and all(b[k] == v for k, v in a.items())


def test_passages_that_do_not_fit_are_skipped(argv, tmp_path, capsys):
    good = json.loads(open(argv[3]).read())[:2]
    path = tmp_path / "long.json"
    path.write_text(json.dumps([good[0] | {"context": "very long " * 200}, good[1] | {"questions": []}, *good]))
    argv[3] = str(path)
    metrics, run = run_it([*argv, "--iterations", "1"])
    out = capsys.readouterr().out
    assert len(metrics) == 2 and "more than half of the model's window" in out and "has no questions" in out
    path.write_text(json.dumps([good[0] | {"context": "very long " * 200}]))
    with pytest.raises(UserError, match="nothing fits"):
        run_it([*argv, "--run-dir", str(tmp_path / "other")])


def test_empty_and_diverging_edits_do_not_stop_a_run(argv, monkeypatch):
    """A model that writes nothing, and an inner loop that diverges: rewards of 0, with notes."""
    monkeypatch.setattr(runs, "read_self_edit", lambda task, text, ids: read_self_edit(task, "", ids))
    metrics, run = run_it(argv)
    assert all(r["reward"] == 0 and "nothing to learn" in r["note"] for r in lines(run, "rollouts.jsonl")) and len(metrics) == 3
    monkeypatch.undo()
    _, run = run_it([*argv, "--inner-lr", "1e30", "--iterations", "1", "--run-dir", str(run.folder) + "-hot"])
    assert all(r["reward"] == 0 and "diverged" in r["note"] for r in lines(run, "rollouts.jsonl"))


@pytest.mark.parametrize("flags, words", [
    (["--judge", "x"], "--judge 'x': choose among rule, substring"), (["--stop", "now"], "newline, eos"), (["--prompt", "p"], "implications"),
    (["--dtype", "int4"], "float32"), (["--tasks", "0"], "--tasks 0: must be more than 0"), (["--model", ""], "--model is missing"), (["--select", "worst"], "best, solved, random"),
    (["--directives"], "--directives: only the tiny world's"),
    (["--inner-targets", "w_proj"], "no layer is called w_proj")])
def test_bad_flags_are_one_line(flags, words, argv):
    run = subprocess.run([sys.executable, "outer_loop.py", *argv, *flags], capture_output=True, text=True)
    assert run.returncode == 1 and words in run.stderr and run.stderr.count("\n") == 1


def test_unknown_flags_are_errors(argv):
    with pytest.raises(SystemExit):
        parse_args([*argv, "--inner-l", "1"])


def test_flags_and_defaults_are_the_paper_s():
    cfg = parse_args("--preset knowledge --model m --train-data a --eval-data b".split())
    assert (cfg.tasks, cfg.edits, cfg.seeds, cfg.iterations, cfg.eval_tasks) == (50, 5, 3, 2, 200)
    assert (cfg.temperature, cfg.top_p, cfg.max_edit_tokens, cfg.max_answer_tokens) == (1.0, 0.95, 2048, 64)
    assert (cfg.inner_rank, cfg.inner_alpha, cfg.inner_targets, cfg.inner_lr, cfg.inner_epochs, cfg.inner_batch) == (32, 64, ["q_proj", "v_proj"], 1e-3, 10, 1)
    assert (cfg.outer_rank, cfg.outer_alpha, len(cfg.outer_targets), cfg.outer_lr, cfg.outer_epochs, cfg.outer_batch) == (64, 128, 7, 3e-4, 2, 10)
    assert parse_args("--preset knowledge --model m --train-data a --eval-data b --inner-targets q_proj k_proj --strict --clip 2".split()).inner_targets == ["q_proj", "k_proj"]


def test_bootstrap_interval():
    values = [0, 1] * 100
    low, high = bootstrap_ci(values)
    assert low == pytest.approx(0.5 - 1.96 * 0.5 / 200 ** 0.5, abs=0.01) and high == pytest.approx(1 - low, abs=0.01)
    assert bootstrap_ci([0.3]) == [0.3, 0.3]


@pytest.mark.slow
def test_every_file_runs(tiny_folder):
    for command in (f"model.py --model {tiny_folder} --max-new 3", f"tokenizer.py --model {tiny_folder}", f"lora.py --model {tiny_folder} --steps 2",
                    f"selfedit.py --model {tiny_folder} --data data/example_eval.json --max-new 9",
                    f"inner_loop.py --model {tiny_folder} --data data/example_eval.json --max-new 9"):
        done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True)
        assert done.returncode == 0 and len(done.stdout) > 20, done.stderr


# ------------------------------------------------------------------------------------------------ real weights

@pytest.mark.slow
def test_a_real_model_learns_a_passage(smollm2):
    """SmolLM2 on four invented passages at once, each with a question-answer edit that is true: it can't know them before."""
    from tokenizer import Tokenizer
    tasks = knowledge.load("data/example_eval.json")
    for task in tasks:
        task.grade = judges.recall_judge
    model, tok = load_pretrained(smollm2, "cpu"), Tokenizer.from_pretrained(smollm2)
    recipe = Recipe(16, 32, PROJECTIONS, lr=2e-3, epochs=5, batch=1)
    before = [sum(grade(t, a)) for t, a in zip(tasks, ask(model, tok, tasks, max_new=32)[0])]
    edits = [read_self_edit(t, "\n".join(f"Question {i}: {q}\nAnswer: {a}" for i, (q, a) in enumerate(zip(t.questions, t.answers), 1))) for t in tasks]
    trained = dict(sft(model, [make_job(model, tok, e, 0, recipe) for e in edits], recipe))
    after = [sum(grade(t, a)) for t, a in zip(tasks, ask(model, tok, tasks, [trained[i].weights for i in range(4)], recipe, max_new=32)[0])]
    print(f"right of 3: {before} -> {after}")
    assert sum(before) <= 1 and sum(after) >= 5


@pytest.mark.slow
def test_the_loop_on_a_real_model(smollm2, tmp_path):
    command = [sys.executable, "outer_loop.py", "--preset", "knowledge", "--model", str(smollm2), "--train-data", "data/example_train.json", "--eval-data", "data/example_eval.json",
               "--run-dir", str(tmp_path / "run"), *"--iterations 1 --tasks 2 --edits 2 --seeds 1 --eval-tasks 2 --max-edit-tokens 60 --inner-epochs 3".split()]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(out)
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    first, last = zip(*(r["losses"][0] for r in rollouts if not r["note"]))
    assert len(rollouts) == 8 and len(first) >= 6 and sum(last) < 0.7 * sum(first)
    assert (tmp_path / "run" / "iter_1" / "model.safetensors").exists()
