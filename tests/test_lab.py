"""The rooms of the lab and its readers of runs: curves over seeds, how far rewards and judges can
be trusted, a model that imitates self-edits, what self-edits are made of.
"""
import json
import sys
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import torch

from data import judges as rules
from data.judges import each
from engine.decode import Sampling, write
from lab import curve, experiment, imitate, paired, recipe, reliability
from lora import Adapters, Job, dialogue, sft_one
from model import load_pretrained
from outer_loop import outer_recipe
from selfedit import fill, seed_for
from support.config import Config
from support.files import UserError
from support.tokenizer import Tokenizer
from tests.helpers import SMALL, even_length, read_lines, run_it


def call(program, *words):
    """Run a program's main function as `python -m` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [program.__name__, *map(str, words)])
        program.main()


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def runs(tiny_folder, passages, tmp_path_factory):
    """Two runs that differ in their seed, and one that differs in its selection as well."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--model", tiny_folder, "--train-data", passages, "--eval-data", passages,
              *SMALL.split(), "--iterations", "1", "--baselines"]
    folders = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(rules.RULES, "rule", each(even_length))
        for words in ("--seed 0", "--seed 1", "--seed 0 --update random --strict"):
            folders.append(folder / f"run{len(folders)}")
            run_it([*common, *words.split(), "--run-dir", folders[-1]])
    return folders


# ------------------------------------------------------------------------------- experiment

def question(tmp_path, words, measure):
    """The lines of a question with a flag of its own, as its table gets them."""
    shown = {}
    asked = experiment.Question(["a", "b"], measure, shown.update, None, settings=["towns"])
    ap = asked.flags("Is it so?\n\nMore.")
    ap.add_argument("--towns", type=int, default=4)
    asked.answer(ap, ap.parse_args(["--out", str(tmp_path / "out.jsonl"), *words.split()]))
    return shown


def test_what_is_missing_is_measured_and_nothing_else(tmp_path):
    asked = []

    def measure(arm, seed, towns):
        asked.append((arm, seed, towns))
        return {"reward": [0, 1]}

    first = question(tmp_path, "--seeds 1", measure)
    arms = question(tmp_path, "--seeds 0 1", measure)

    assert asked == [("a", 1, 4), ("b", 1, 4), ("a", 0, 4), ("b", 0, 4)]
    lines = read_lines(tmp_path / "out.jsonl")
    assert lines[:2] == first["a"] + first["b"]
    assert arms == {"a": lines[::2], "b": lines[1::2]}
    assert lines[0] == {"arm": "a", "seed": 1, "towns": 4, "reward": [0, 1], "seconds": 0}


def test_all_lines_of_a_file_have_the_same_settings(tmp_path):
    # This line is older than --towns.
    (tmp_path / "out.jsonl").write_text('{"arm": "a", "seed": 0}\n')
    assert list(question(tmp_path, "--seeds 0", lambda *_: {})) == ["a", "b"]
    with pytest.raises(UserError, match="out.jsonl has lines of another --towns; name another"):
        question(tmp_path, "--towns 5", lambda *_: {})


def test_lines_are_chosen_grouped_and_compared_by_hand():
    lines = [{"arm": "b", "seed": 0, "reward": [.1, .5]},
             {"arm": "a", "seed": 1, "reward": [.2, .3]},
             {"arm": "a", "seed": 0, "reward": [.1, .2]}]
    assert experiment.where(lines, arm="a", seed=0) == lines[2:]
    arms = experiment.groups(lines, "arm", ["c", "a", "b"])
    assert list(arms) == ["a", "b"] and arms["a"] == lines[1:]
    more = experiment.differences(arms["a"], arms["b"], experiment.last_reward)
    assert more == [pytest.approx(.2 - .5)]         # of the seed that both have
    assert experiment.gain(lines[0]) == pytest.approx(.4)


def test_means_and_intervals_in_words(capsys):
    # Student's t for two values is 12.71; the error of .2 and .4 is .1.
    assert experiment.over_seeds([[.2, 1], [.4, 1]]) == ["0.300 ±1.271", "1.000 ±0.000"]
    assert experiment.of_seeds([.25], "+.2f") == "+0.25"      # one seed
    assert experiment.over_passages([.5, .5], ".1f") == "0.5 [0.5, 0.5]"
    assert experiment.arrows([.1, .25], ".2f") == "0.10 -> 0.25"
    experiment.print_table(["", "k"], [["a", 1]])
    assert capsys.readouterr().out == "|  | k |\n| --- | --- |\n| a | 1 |\n"


# ------------------------------------------------------------------------------- curve

def write_run(folder, rewards, made_of=(), iterations=None, **settings):
    """A run's folder as lab.curve reads it."""
    folder.mkdir()
    config = {"iterations": len(rewards) - 1, "seed": 0, "run_dir": str(folder), "model": "m",
              "verbose": False, "update": "best", "strict": False, "targets": ["q_proj"]}
    if iterations:
        config["iterations"] = iterations
    (folder / "config.json").write_text(json.dumps(config | settings))
    write_lines(folder / "metrics.jsonl", [
        {"iteration": t, "eval_reward": reward, "eval_by_kind": {"forward": reward},
         "made_of": made_of[t] if made_of else {},
         "baselines": [{"name": "passage only", "reward": 0.3}] if t == 0 else []}
        for t, reward in enumerate(rewards)])
    return folder


def test_a_curve_by_hand(tmp_path, capsys):
    """Two seeds; Student's t for two values is 12.71."""
    one = write_run(tmp_path / "one", [0.2, 0.5], [{"copy": 1.0}, {"copy": 0.4, "rare": 0.01}])
    two = write_run(tmp_path / "two", [0.4, 0.9], [{"copy": 0.8}, {"copy": 0.2}], seed=1)

    call(curve, one, two)

    # The standard deviation of two values is their distance over sqrt(2), the error half of it.
    assert capsys.readouterr().out.splitlines() == [
        "all runs, 2 seeds: 0.300 ±1.271 -> 0.700 ±2.542",
        "    gain +0.400 ±1.271, by seed +0.300 +0.500",
        "    forward questions: 0.300 ±1.271 -> 0.700 ±2.542",
        "    copy: 90% -> 30%"]


def test_runs_are_grouped_by_what_sets_them_apart(tmp_path):
    folders = [
        write_run(tmp_path / "a", [0.1, 0.2]),
        write_run(tmp_path / "b", [0.3, 0.4], seed=1),
        write_run(tmp_path / "c", [0.5, 0.6], update="random", strict=True),
        write_run(tmp_path / "d", [0.7, 0.8], targets=["q_proj", "v_proj"], model="other")]

    groups = curve.read_runs(folders)

    names = list(groups)
    assert names[0].startswith("update best, targets")
    assert names[1].startswith("update random, strict, targets")
    assert [len(group) for group in groups.values()] == [2, 1, 1]
    rewards = [m["eval_reward"] for m in groups[names[0]][1]]
    assert rewards == [0.3, 0.4]


def test_a_run_that_goes_on_is_only_read(tmp_path, capsys):
    """Its last line may be half-written."""
    folder = write_run(tmp_path / "run", [0.1, 0.2])
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"iteration": 2, "eval_')
    before = (folder / "metrics.jsonl").read_bytes()
    call(curve, folder)
    assert "0.100 -> 0.200" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before


METRICS = {"iteration": 0, "eval_reward": 0.5, "eval_by_kind": {}, "made_of": {}, "baselines": []}


@pytest.mark.parametrize("line", [
    "{}", "[]", "null", "3", "x", "\0" * 9, "[" * 100_000,
    *(json.dumps(METRICS | change) for change in (
        {"iteration": 1}, {"eval_reward": None}, {"eval_reward": "x"},
        {"eval_reward": float("nan")}, {"eval_reward": 10 ** 400},
        {"eval_by_kind": []}, {"made_of": {"a": None}},
        {"made_of": None}, {"baselines": 3}, {"baselines": [{"name": "passage only"}]}))])
def test_a_damaged_line_of_metrics_is_one_line(line, tmp_path):
    folder = write_run(tmp_path / "run", [0.1])
    (folder / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="metrics.jsonl, line 1: not a record") as error:
        call(curve, folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", ["", "{}", "[]", "null", '{"iterations": "2"}'])
def test_damaged_settings_are_one_line(config, tmp_path):
    folder = write_run(tmp_path / "run", [0.1])
    (folder / "config.json").write_text(config)
    with pytest.raises(UserError, match="config.json: not "):
        call(curve, folder)


def test_runs_that_have_no_curve_are_one_line(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        call(curve, tmp_path)
    short = write_run(tmp_path / "short", [0.1, 0.2], iterations=2)
    with pytest.raises(UserError, match="short: this run has not ended; repeat its command"):
        call(curve, short)
    one = write_run(tmp_path / "one", [0.1, 0.2])
    two = write_run(tmp_path / "two", [0.1, 0.2, 0.3], iterations=1, seed=1)
    with pytest.raises(UserError, match="two: 3 iterations are measured, 2 in another run"):
        call(curve, one, two)
    for file in (tmp_path / "none" / "curve.svg", tmp_path):
        with pytest.raises(UserError, match="name a file, in a folder that is there"):
            call(curve, one, "--svg", file)


def test_a_kind_of_question_that_one_iteration_lacks_is_left_out(tmp_path, capsys):
    folder = write_run(tmp_path / "run", [0.1])
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps(METRICS | {"iteration": 1}) + "\n")
    call(curve, folder)
    assert "forward" not in capsys.readouterr().out


def test_what_run_adds_to_its_settings_sets_no_runs_apart(tmp_path):
    one = write_run(tmp_path / "one", [0.1], content={"model": "aa"}, own={})
    two = write_run(tmp_path / "two", [0.1], content={"model": "bb"}, own={}, seed=1)
    assert list(curve.read_runs([one, two])) == ["all runs"]


def test_the_floor_is_the_mean_of_training_on_the_passage_only(tmp_path):
    folders = [write_run(tmp_path / "a", [0.1]), write_run(tmp_path / "b", [0.1], seed=1)]
    groups = curve.read_runs(folders)
    assert curve.passage_only(groups) == pytest.approx(0.3)
    groups["all runs"][0][0]["baselines"] = []
    assert curve.passage_only(groups) == pytest.approx(0.3)
    groups["all runs"][1][0]["baselines"] = []
    assert curve.passage_only(groups) is None


def test_curves_of_runs_are_drawn(runs, tmp_path, capsys):
    """Runs that differ in their seed alone are one line, with an interval."""
    pytest.importorskip("matplotlib")

    call(curve, *runs, "--svg", tmp_path / "curve.svg")
    call(curve, *runs, "--svg", tmp_path / "again.svg")

    out = capsys.readouterr().out
    assert "update best, 2 seeds: " in out
    assert "update random, strict, 1 seeds: " in out
    assert "    gain " in out
    drawing = (tmp_path / "curve.svg").read_text()
    assert ElementTree.fromstring(drawing).tag.endswith("svg")
    # matplotlib writes each text, drawn as shapes, into a comment as well.
    for text in ("the best self-edits are kept; 2 seeds",
                 "any self-edits are kept (control), strict; 1 seeds",
                 "iteration of ReST-EM", "trained on the passage only"):
        assert f"<!-- {text} -->" in drawing
    assert drawing == (tmp_path / "again.svg").read_text()


def test_a_drawing_is_xml_whatever_a_name_holds(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folders = [write_run(tmp_path / "one", [0.1]),
               write_run(tmp_path / "two", [0.1], prompt="\0\x1b[2J $x$ <b> --")]
    call(curve, *folders, "--svg", tmp_path / "curve.svg")
    ElementTree.parse(tmp_path / "curve.svg")
    assert "\x1b" not in capsys.readouterr().out
    assert not list(tmp_path.glob("*.tmp"))


def test_without_a_baseline_there_is_no_floor_and_without_matplotlib_no_drawing(
        runs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    curve.draw(curve.read_runs(runs), None, tmp_path / "curve.svg")
    assert "trained on the passage only" not in (tmp_path / "curve.svg").read_text()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="needs matplotlib"):
        call(curve, *runs, "--svg", tmp_path / "curve.svg")


# ------------------------------------------------------------------------------- reliability

def rollout(task, edit, right, tokens, split="train"):
    accuracy = [sum(verdicts) / len(verdicts) for verdicts in right]
    reward = sum(accuracy) / len(accuracy) if accuracy else 0
    return {"iteration": 0, "split": split, "task": task, "edit": edit, "right": right,
            "reward": reward, "token_ids": [1] * tokens, "documents": 10 - tokens}


def test_reliability_by_hand(tmp_path, capsys):
    """Of what was trained on, and could be; self-edits in any order."""
    yes, no = [True, True], [False, False]
    write_lines(tmp_path / "rollouts.jsonl", [
        rollout(0, 1, [yes, yes], tokens=4),
        rollout(0, 0, [no, no], tokens=2),
        rollout(1, 0, [[True, False], [True, False]], tokens=3),
        rollout(1, 1, [], tokens=9),                    # nothing to learn from
        rollout(0, 0, [yes], tokens=9, split="eval")])

    groups = reliability.read_groups(tmp_path)
    assert [reliability.accuracy_of(group).tolist() for group in groups] == [
        [[0, 0], [1, 1]], [[0.5, 0.5]]]

    call(reliability, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 passages, 3 self-edits, 2 seeds each"
    values = dict(line.strip().rsplit(maxsplit=1) for line in lines[1:])
    assert "reliability of a 2-seed mean, among the edits of a passage" in values
    assert values["mean reward"] == "0.500"
    assert values["the best of K, by the seeds that chose it"] == "0.750"
    assert values["correlation of the reward with the number of tokens"] == "1.000"
    assert values["correlation of the reward with the number of documents"] == "-1.000"


def test_one_seed_tells_nothing_about_seeds(tmp_path, capsys):
    write_lines(tmp_path / "rollouts.jsonl", [rollout(0, 0, [[True]], 3),
                                              rollout(0, 1, [[False]], 3)])
    call(reliability, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 passages, 2 self-edits, 1 seeds each"
    # All have as many tokens, so that there is no correlation.
    assert [line.split()[-1] for line in lines[1:]] == ["nan", "nan"]


@pytest.mark.parametrize("change", [
    {"right": 5}, {"right": [5]}, {"right": [[]]}, {"right": [[None]]}, {"right": [[[]]]},
    {"reward": None}, {"reward": float("nan")}, {"reward": 10 ** 400}, {"token_ids": None},
    {"documents": "x"}, {"task": []}, {"iteration": None}, {"edit": "x"}])
def test_a_damaged_rollout_is_one_line(change, tmp_path):
    write_lines(tmp_path / "rollouts.jsonl", [rollout(0, 0, [[True]], 3),
                                              rollout(0, 1, [[True]], 3) | change])
    with pytest.raises(UserError, match="rollouts.jsonl, line 2: not a record") as error:
        call(reliability, tmp_path)
    assert "\n" not in str(error.value)


def test_rollouts_that_can_not_be_compared_are_one_line(tmp_path):
    with pytest.raises(UserError, match="rollouts.jsonl: no rewards of training self-edits"):
        call(reliability, tmp_path)
    write_lines(tmp_path / "rollouts.jsonl", [rollout(0, 0, [[True]], 3),
                                              rollout(0, 1, [[True], [True]], 3)])
    with pytest.raises(UserError, match="rollouts.jsonl: iteration 0, task 0: .* seeds"):
        call(reliability, tmp_path)


def test_rollouts_of_a_run_that_goes_on_are_only_read(tmp_path, capsys):
    write_lines(tmp_path / "rollouts.jsonl", [rollout(0, 0, [[True]], 3)])
    with (tmp_path / "rollouts.jsonl").open("a") as f:
        f.write('{"iteration": 0, "spl')
    before = (tmp_path / "rollouts.jsonl").read_bytes()
    call(reliability, tmp_path)
    assert "1 passages, 1 self-edits" in capsys.readouterr().out
    assert (tmp_path / "rollouts.jsonl").read_bytes() == before


# ------------------------------------------------------------------------------- judges

def answered(gold, baseline, baseline_ok, adapter, adapter_ok):
    return {"question": "Which?", "gold": gold, "baseline": baseline, "baseline_ok": baseline_ok,
            "adapter": adapter, "adapter_ok": adapter_ok}


@pytest.fixture()
def verdicts_file(tmp_path):
    """Two passages, two released answers each. GPT-4.1 let "in two" pass, which no rule does."""
    first = [answered("Ob", "the Rhine", False, "the Ob", True),
             answered("Ana Reis", "Ana Reis", True, "Reis, Ana", True)]
    second = [answered("Ob", " ", False, "Ob", True),
              answered("half", "half", True, "in two", True)]
    path = tmp_path / "released.json"
    records = []
    for answers in (first, second):
        records.append({"released": {"naive": {"answers": answers}}})
    path.write_text(json.dumps(records))
    return path


def test_judges_are_compared_with_released_verdicts(verdicts_file, capsys):
    call(reliability, verdicts_file)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "       naive  1.000 [1.000, 1.000]  gained 1.000  lost 0.000"
    # GPT-4.1 says right 6 times of 8, the rule 5 times, as substring 4: there "Reis, Ana" is wrong.
    *_, naive, everything = lines
    assert naive.replace("|", "").split() == [
        "naive", "8", "0.750", "0.625", "0.875", "0.714", "0.625", "0.875", "0.714",
        "0.500", "0.750", "0.500"]
    assert everything.split()[2:] == naive.split()[2:]


def test_a_judge_is_not_asked_about_an_empty_prediction():
    asked = []

    def judge(triples):
        asked.extend(triples)
        return [True] * len(triples)

    triples = [("q", "g", " "), ("q", "g", "p"), ("q", "g", "")]
    assert reliability.judged(judge, triples) == [False, True, False]
    assert asked == [("q", "g", "p")]


def test_a_limit_takes_the_first_answers_of_each_method(verdicts_file, capsys):
    call(reliability, verdicts_file, "--limit", "3")
    assert capsys.readouterr().out.splitlines()[-1].startswith("| all | 3 | 0.667 |")


def test_a_model_can_judge_as_well(verdicts_file, tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(reliability, "model_judge",
                        lambda model, tok, triples: [True] * len(triples))
    call(reliability, verdicts_file, "--model", tiny_folder)
    *_, heads, _, _, everything = capsys.readouterr().out.splitlines()
    assert "model says right" in heads
    # Says right, agrees, kappa. One prediction of eight is empty.
    assert everything.replace("|", "").split()[-3:] == ["0.875", "0.875", "0.600"]


ANSWER = answered("Ob", "a", False, "b", True)


def with_answer(answer):
    return {"released": {"naive": {"answers": [answer]}}}


DAMAGED = [with_answer(ANSWER), with_answer(ANSWER | {"gold": None})]


@pytest.mark.parametrize("content", [
    None, 3, [], {}, [1], [{"title": "T"}], [{"released": {}}], [{"released": {"naive": "x"}}],
    [{"released": {"naive": {"edit": "x"}}}], [{"released": {"naive": {"answers": []}}}],
    [with_answer(None)], [with_answer(ANSWER | {"gold": None})],
    [with_answer(ANSWER | {"adapter": 5})], [with_answer(ANSWER | {"adapter_ok": "yes"})],
    [with_answer(ANSWER), {"released": {"other": {"answers": [ANSWER]}}}],
    DAMAGED])
def test_a_file_without_verdicts_is_an_error(content, tmp_path):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="file.json: no released verdicts: record ") as error:
        call(reliability, path)
    if content == DAMAGED:
        assert "record 1: 'naive', answer 0: must have strings" in str(error.value)


@pytest.mark.parametrize("words", [["--limit", "0"], ["--limit", "-1"], ["--limit", "x"],
                                   ["--lim", "3"]])
def test_a_wrong_flag_is_one_line(words, verdicts_file, capsys):
    with pytest.raises(SystemExit):
        call(reliability, verdicts_file, *words)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_released_verdicts_are_the_released_figures(shared_data):
    """The accuracies that the authors' files state, and what adapters gain and lose."""
    records = json.loads((shared_data / "squad_val_60.json").read_text())

    rows = {method: reliability.released(passages) for method, passages in
            reliability.read_answers(shared_data / "squad_val_60.json").items()}

    assert list(rows) == ["base", "iter1", "iter2", "gpt4_1", "naive"]
    for method, row in rows.items():
        stated = [float(record["released"][method]["adapter_accuracy"]) for record in records]
        assert row["accuracy"] == pytest.approx(stated, abs=1e-3)
    assert 0.05 < rows["naive"]["gained"] < rows["iter2"]["gained"]
    assert rows["naive"]["lost"] < rows["iter2"]["lost"] < 0.5


def test_the_rules_agree_with_the_released_verdicts(shared_data, capsys):
    call(reliability, shared_data / "squad_val_60.json")

    last_line = capsys.readouterr().out.strip().splitlines()[-1]
    (name, n, _, _, agrees, kappa, _, gist_agrees, gist_kappa, _, substring_agrees,
     _) = last_line.replace("|", "").split()
    assert name == "all"
    assert int(n) == 2830
    assert 0.85 <= float(agrees) <= 0.92
    assert float(kappa) > 0.7
    assert float(gist_kappa) > float(kappa) + 0.02 and float(gist_agrees) > 0.89
    assert 0.84 <= float(substring_agrees) <= 0.90


# ------------------------------------------------------------------------------- recipes

def test_recipes_are_measured_once_each(passages, tiny_folder, tmp_path, monkeypatch, capsys):
    records = json.loads(passages.read_text())[:2]
    for record in records:
        record["released_edits"] = [{"text": "It has a river.\nIt is old."}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    short = {name: (replace(one, epochs=1), kind) for name, (one, kind) in recipe.RECIPES.items()}
    monkeypatch.setattr(recipe, "RECIPES", short)
    words = ["--model", tiny_folder, "--data", tmp_path / "data.json", "--out", tmp_path / "out"]

    call(recipe, *words)
    first = capsys.readouterr().out
    monkeypatch.setattr(recipe, "measure", None)
    call(recipe, *words)    # all are known

    found = {r["recipe"]: r for r in read_lines(tmp_path / "out")}
    assert list(found) == list(short)
    assert capsys.readouterr().out == first[first.index("| recipe"):]
    assert found["all layers, lr 1e-3"]["documents"] == 3           # two lines and the passage
    assert found["and its sentences"]["documents"] == 5
    assert found["batch 4, its sentences alone"]["documents"] == 3
    # Others than training passages have no self-edits.
    with pytest.raises(UserError, match="each passage needs"):
        call(recipe, "--model", tiny_folder, "--data", passages, "--out", tmp_path / "out")


# ------------------------------------------------------------------------------- paired

def evaluated(task, arm, answer, reward):
    return {"iteration": 0, "split": "eval", "arm": arm, "task": task, "edit": 0, "reward": reward,
            "unadapted": 0.0, "answers": [[answer]], "questions": ["Where?"], "gold": ["Ostermar"],
            "documents": 2, "seconds": 1.5}


@pytest.fixture
def single_run(tmp_path):
    """Two kinds of self-edits of three passages, and one that is not finished."""
    rows = []
    for task, (plain, own) in enumerate([(1, 0), (1, 1), (0, 1)]):
        # The first kind recites: the gold answer comes in its second sentence.
        rows.append(evaluated(task, "passage only", "It is wet. It is on Ostermar.", plain))
        rows.append(evaluated(task, "own", "On Ostermar.", own))
    rows.append(evaluated(0, "half", "", 1))
    (tmp_path / "run").mkdir()
    write_lines(tmp_path / "run" / "rollouts.jsonl", rows)
    return tmp_path / "run"


def test_each_passage_is_compared_with_itself(single_run, capsys):
    call(paired, single_run)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "no adaptation", "passage only", "own"]
    assert lines[3].startswith("| passage only | 0.667 [0.000, 1.000] |  | 0.000 [0.000, 0.000] |")
    assert "| +0.000 [-1.000, +1.000] | 1.000 [1.000, 1.000] | 2 | 2.0 | 2 |" in lines[4]


def test_what_is_saved_gives_the_same_table(single_run, tmp_path, capsys):
    call(paired, single_run, "--save", tmp_path / "kept.json")
    first = capsys.readouterr().out
    call(paired, tmp_path / "kept.json")
    assert capsys.readouterr().out == first
    assert "Ostermar" not in (tmp_path / "kept.json").read_text()       # no text of a passage


def test_rounds_of_runs_are_kinds_of_their_own(tmp_path, capsys):
    """A passage's value is the mean over its self-edits, and training passages are left out."""
    for name, better in (("one", 0.5), ("two", 0.0)):
        rows = []
        for t in (0, 1):
            for task, edit, reward in ((0, 0, 0.0), (0, 1, 1.0), (1, 0, 0.5), (1, 1, 0.5)):
                row = evaluated(task, "", "On Ostermar.", min(1, reward + better * t))
                rows.append(row | {"iteration": t, "edit": edit})
        rows.append(rows[-1] | {"split": "train", "iteration": 3})
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "rollouts.jsonl", rows)

    call(paired, tmp_path / "one", tmp_path / "two", "--against", "two, round 1")

    found = [line.split(" | ")[:2] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [(name.strip("| "), reward[:5]) for name, reward in found] == [
        ("one, round 0", "0.500"), ("one, round 1", "0.875"), ("two, round 0", "0.500"),
        ("two, round 1", "0.500")]


def test_there_is_something_to_compare_with(single_run, tmp_path):
    with pytest.raises(UserError, match="choose among passage only, own"):
        call(paired, single_run, "--against", "half")
    with pytest.raises(UserError, match="no rollouts of held-out passages"):
        call(paired, tmp_path)


# ------------------------------------------------------------------------------- imitate

def graded(text, reward):
    return {"text": text, "adapter_mean": reward, "adapter_std": 0.0}


@pytest.fixture(scope="module")
def taught(passages, tmp_path_factory):
    """Three passages with self-edits: the second is the best, and the third is as good."""
    records = json.loads(passages.read_text())[:3]
    for i, record in enumerate(records):
        record["released_edits"] = [graded("1. Nothing.", 0.1),
                                    graded(f"1. The river is Ob{i}.", 0.6),
                                    graded(f"1. Ana{i} Reis founded it.", 0.6),
                                    graded("1. No.", 0.5)]
    path = tmp_path_factory.mktemp("taught") / "taught.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def student(tiny_folder, taught, tmp_path_factory):
    """What `python -m lab.imitate` makes of the random model."""
    out = tmp_path_factory.mktemp("student") / "new"
    call(imitate, "--model", tiny_folder, "--data", taught, "--out", out, "--keep", 2, "--batch", 4,
         "--lr", "1e-3", "--epochs", 3, "--device", "cpu")
    return out


def test_the_best_self_edits_are_imitated_the_first_of_equals(tok, taught):
    pairs = imitate.to_imitate(tok, taught, 3)
    assert [edit.text for _, edit in pairs[:3]] == [
        "1. The river is Ob0.", "1. Ana0 Reis founded it.", "1. No."]
    # A text ends as a turn does.
    ids = imitate.as_sampled(tok, " 1. Some text.\n")
    assert tok.decode(ids) == "1. Some text."
    assert ids[-1] in tok.stop and len(ids) == len(tok.encode("1. Some text.")) + 1


def test_a_text_is_read_as_a_model_samples_it(smollm2):
    """A real model's own reply, put into ids again, has the ids that were sampled."""
    model = load_pretrained(smollm2, "cpu")
    tok = Tokenizer.from_pretrained(smollm2)
    ((reply,),) = write(model, tok, [["What is the capital of France?"]], Sampling(60))
    assert not reply.cut
    assert imitate.as_sampled(tok, reply.text) == reply.token_ids


def test_the_student_is_what_the_textbook_makes(student, taught, tiny_folder, tok):
    """The M-step: context read, self-edit and its end learned, one adapter merged."""
    examples = []
    for i, record in enumerate(json.loads(taught.read_text())):
        prompt = tok.prompt(fill("implications", record["title"], record["context"]))
        for text in (f"1. The river is Ob{i}.", f"1. Ana{i} Reis founded it."):
            examples.append(dialogue(prompt, tok.encode(text) + [tok.eos]))
    recipe = outer_recipe(Config(outer_lr=1e-3, outer_epochs=3, outer_batch=4))
    model = load_pretrained(tiny_folder, "cpu")
    before = [p.clone() for p in model.parameters()]
    trained = sft_one(model, Job(examples, seed_for(0, 0, "M-step"), recipe)).weights
    Adapters.stack(model, recipe.lora, [trained]).merge(0)

    saved = load_pretrained(student, "cpu")

    for old, mine, textbook in zip(before, saved.parameters(), model.parameters()):
        torch.testing.assert_close(mine, textbook, rtol=1e-3, atol=1e-4)
    assert any((old - new).abs().max() > 1e-3 for old, new in zip(before, saved.parameters()))


def test_the_student_is_a_checkpoint_that_runs_begin_from(student, passages, tmp_path):
    assert Tokenizer.from_pretrained(student).eos is not None
    run = run_it(["--model", student, "--train-data", passages, "--eval-data", passages,
                  *SMALL.split(), "--iterations", "0", "--run-dir", tmp_path / "run"])
    assert len(run.metrics.records) == 1


def test_nothing_is_overwritten_and_self_edits_are_needed(taught, passages, tiny_folder, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        call(imitate, "--model", tiny_folder, "--data", taught, "--out", tmp_path)
    with pytest.raises(UserError, match='record 0: "released_edits" must be a list'):
        call(imitate, "--model", tiny_folder, "--data", passages, "--out", tmp_path / "new")


def test_a_learning_rate_that_is_too_high_is_one_line(taught, tiny_folder, tmp_path):
    with pytest.raises(UserError, match="diverged; try a lower --lr"):
        call(imitate, "--model", tiny_folder, "--data", taught, "--out", tmp_path / "new",
             "--lr", "1e9", "--device", "cpu")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------- lines: the rule

PASSAGE = ("Nikola Tesla\nIn 1952, following pressure from Tesla's nephew, his estate was shipped "
           "to Belgrade in 80 trunks. In 1957, Charlotte Muzar transported the ashes from the "
           "United States to Belgrade. It cost 1,200 dinars: a lot.")


@pytest.mark.parametrize("line, kind", [
    ("4. In 1957, Charlotte Muzar transported the ashes from the United States.", "copied"),
    ("2. The estate was shipped by his nephew's pressure, in 80 trunks.", "supported"),
    ("Question 7: Who transported Tesla's ashes?\nAnswer: Charlotte Muzar.", "supported"),
    ("- The U.S. shipped the ashes.", "supported"),                 # initials
    ("- 1200 dinars were paid.", "supported"),
    ("3. This highlights the lasting international recognition of Tesla's legacy.", "beyond"),
    ("3. **Wider Effects:** Muzar was an organised and reliable secretary.", "vague"),
    ("5. Inventions change the world.", "vague"),
    ("**Implications For Serbian Museums:**", "vague"),             # a heading, not names
    ("6. The", "vague"),
    ("1. The estate was shipped to Belgrade in 90 trunks.", "wrong"),
    ("1. The estate was shipped to Zagreb.", "wrong"),
    ("1. The UK shipped the estate.", "wrong")])
def test_a_line_is_held_against_its_passage(line, kind):
    assert paired.classify(line, PASSAGE) == kind


# ------------------------------------------------------------------------------- lines: a run

TEXTS = {
    # The passage word by word, a wrong name, and the same again.
    0: "1. The river of town 0 is the Ob0.\n2. It was founded by Karl Reis.\n"
       "3. It was founded by Karl Reis.",
    1: "Everything changes sooner or later."}


@pytest.fixture
def some_run(passages, tmp_path):
    """A run with a self-edit of two passages, and one that it was given."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(
        {"domain": "knowledge", "eval_data": str(passages), "max_edit_tokens": 4}))
    own = [{"iteration": 0, "split": "eval", "task": i, "edit": 0, "text": text,
            "token_ids": [1] * (4 - i)} for i, text in TEXTS.items()]
    given = [own[0] | {"arm": "base", "title": "Town 0", "text": "1. It was founded by Ana0 Reis."}]
    write_lines(folder / "edits.jsonl", own)
    write_lines(folder / "rollouts.jsonl", given)
    return folder


def test_what_self_edits_are_made_of(some_run, tmp_path, capsys):
    call(paired, some_run, "--lines", "base", "--save", tmp_path / "kept.json")

    kept = json.loads((tmp_path / "kept.json").read_text())
    own, given = kept[f"{some_run}, iteration 0"], kept[f"{some_run}, base"]
    assert own == {"copied": [.3333, 0], "supported": [0, 0], "beyond": [0, 0], "vague": [0, 1],
                   "wrong": [.6667, 0], "distinct": [.6667, 1], "lines": [3, 1],
                   "words": [7.6667, 5],
                   "cut": [1, 0],               # the first one ran to the cap
                   "answers": [0.5, 0]}         # its river is there, its founder is not
    assert given["copied"] == [1]
    assert "cut" not in given                   # there was no cap for it
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith(f"| {some_run}, iteration 0 | 2 | 0.17 [0.00, 0.33] |")
    assert rows[3].startswith(f"| {some_run}, base | 1 | 1.00 [1.00, 1.00] |")
    call(paired, tmp_path / "kept.json", "--lines")
    assert capsys.readouterr().out.splitlines() == rows


def test_a_passage_of_another_name_is_noticed(some_run, passages, tmp_path):
    records = json.loads(passages.read_text())
    (tmp_path / "other.json").write_text(json.dumps(records[1:]))
    with pytest.raises(UserError, match="name the right file by --data"):
        call(paired, some_run, "--lines", "--data", tmp_path / "other.json")


def test_what_is_not_there_is_one_line(some_run):
    (some_run / "edits.jsonl").write_text("")
    with pytest.raises(UserError, match="no such self-edits"):
        call(paired, some_run, "--lines")
    (some_run / "config.json").write_text('{"domain": "arc"}')
    with pytest.raises(UserError, match="not a run about passages"):
        call(paired, some_run, "--lines")


@pytest.mark.parametrize("change", [
    {"task": "0"}, {"iteration": None}, {"text": 3}, {"token_ids": None}, {"split": ["eval"]}])
def test_a_damaged_line_is_one_line(change, some_run):
    record = read_lines(some_run / "edits.jsonl")[0] | change
    write_lines(some_run / "edits.jsonl", [record])
    with pytest.raises(UserError, match="edits.jsonl, line 1: not a record"):
        call(paired, some_run, "--lines")
