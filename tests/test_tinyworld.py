"""The tiny world: its towns and notes, its checkpoint, and the loop on both."""
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import pretrain_tiny, tinyworld as world
from inner_loop import grade_all
from model import load_pretrained
from outer_loop import baselines, rest_em, summary
from outer_loop import unadapted
from selfedit import EMPTY, SelfEdit, read_self_edit
from support.checkpoint import EMBEDDED
from support.files import UserError
from support.run import Run
from support.tokenizer import Tokenizer
from tests.helpers import parse, read_lines

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------- towns


def test_everything_follows_from_a_seed():
    first = [task.context for task in world.load("eval")]
    second = [task.context for task in world.load("eval")]

    assert first == second


def test_no_town_is_given_out_twice():
    names = []
    for split in world.SPLITS:
        tasks = world.load(split)
        assert len(tasks) >= 100
        names += [task.name for task in tasks]

    assert len(set(names)) == len(names)


def test_another_split_is_refused():
    with pytest.raises(UserError, match="has the towns train, eval, tune"):
        world.load("test")


def test_a_file_of_passages_is_told_which_preset_reads_it():
    with pytest.raises(UserError, match="for a file of passages: --preset knowledge"):
        world.load("my.json")


def test_pretraining_reads_no_name_that_is_given_out():
    rng = random.Random(0)
    towns = []
    for name in rng.sample(world.NAMES["town", False], 50):
        towns.append(world.make_town(rng, name))
    words = set()
    for i in range(3000):
        prompt, completion = pretrain_tiny.prompt_and_completion(rng, towns, i / 3000)
        words |= set(re.findall(r"\w+", prompt + completion))

    for kind in world.LAST:
        assert words.isdisjoint(world.NAMES[kind, True])
        assert not words.isdisjoint(world.NAMES[kind, False])


def test_the_names_given_out_are_those_that_are_held_out():
    for task in world.load("train")[:50]:
        town, facts = world.read_passage(task.context[0])
        assert world.held_out(town)
        for relation in world.NAMED:
            assert world.held_out(facts[relation])


def test_a_town_is_asked_about_in_both_directions():
    for task in world.load("train")[:50]:
        assert task.kinds == ["forward"] * 7 + ["reversed"] * 4
        assert len(task.questions) == 11
        assert len(task.answers) == 11
        for question, answer, kind in zip(task.questions, task.answers, task.kinds):
            assert (task.name in question) == (kind == "forward")
            assert answer in task.context[0]
            assert answer not in question


def test_questions_are_asked_without_the_passage():
    for task in world.load("train")[:50]:
        passage = task.context[0]
        assert task.prompt.startswith(passage)
        for question, query in zip(task.questions, task.queries):
            assert query == f"Question: {question}\nAnswer:"
            assert passage not in query


def test_the_answer_alone_is_right():
    task = world.load("train")[0]
    exact = [f" {answer}." for answer in task.answers]
    longer = [f"{answer} of course" for answer in task.answers]

    assert grade_all([task], [exact]) == [[True] * 11]
    assert grade_all([task], [longer]) == [[False] * 11]
    assert grade_all([task], [["Nowhere"] * 11]) == [[False] * 11]


# ------------------------------------------------------------------------------- notes

def some_towns(n=100):
    rng = random.Random(1)
    return [world.make_town(rng, out=True) for _ in range(n)]


def test_a_passage_can_be_read():
    for town in some_towns():
        assert world.read_passage(town.passage) == (town.name, town.facts)


def test_notes_are_recognised_by_their_form():
    rng = random.Random(1)
    for town in some_towns():
        for relation, form in town.notes():
            assert world.classify(town.say(relation, form, rng), town.passage) == form


def test_notes_that_are_not_so_are_wrong():
    rng = random.Random(1)
    for town in some_towns():
        for relation, form in town.notes():
            note = town.say(relation, form, rng, value="Nonsuch")
            assert world.classify(note, town.passage) == "wrong"


def test_lines_that_are_no_notes_are_recognised():
    for town in some_towns():
        for sentence in town.sentences:
            assert world.classify(sentence, town.passage) == "copy"
        vague = world.VAGUE[0].format(t=town.name)
        assert world.classify(vague, town.passage) == "vague"
        directive = world.DIRECTIVE.format(lr=0.01, epochs=10)
        assert world.classify(directive, town.passage) == "directive"
        assert world.classify("Bla bla.", town.passage) == "garbled"


def test_facts_about_another_town_are_wrong():
    rng = random.Random(1)
    first, second = some_towns(2)

    for relation, form in second.notes():
        note = second.say(relation, form, rng)
        assert world.classify(note, first.passage) == "wrong"


def test_what_a_note_teaches_is_known():
    rng = random.Random(1)
    for town in some_towns():
        asked = world.asked(town.passage)
        assert asked.keys() == {question for question, _, _ in town.questions()}
        for question, answer, back in town.questions():
            relation, kind = asked[question]
            assert kind == ("reversed" if back else "forward")
            assert answer == (town.name if back else town.facts[relation])
        # Every question is answered by a note, and each note answers the question it turns to.
        found = set()
        for relation, form in town.notes():
            fact = relation, "reversed" if form.endswith("reversed") else "forward"
            assert world.taught(town.say(relation, form, rng), town.passage) == fact
            found.add(fact)
        assert found == set(asked.values())


def test_a_line_without_the_town_or_the_truth_teaches_nothing():
    for town in some_towns():
        first, *others = town.sentences
        relation = list(world.read_passage(town.passage)[1])[0]
        lie = town.say(relation, "plain", random.Random(1), value="Nonsuch")

        assert world.taught(first, town.passage) == (relation, "forward")
        for line in [*others, lie, world.VAGUE[0].format(t=town.name)]:
            assert world.taught(line, town.passage) is None


def test_questions_are_phrased_as_no_note_is():
    in_notes, in_tests = set(), set()
    for relation in world.RELATIONS.values():
        in_notes |= {*relation.ask, *relation.ask_back}
        in_tests |= {relation.question, relation.question_back}

    assert in_notes.isdisjoint(in_tests)


def test_what_self_edits_are_made_of():
    town = world.make_town(random.Random(0), out=True)
    task = world.town_task(town)
    plain = town.say("river", "plain", random.Random(0))
    first = SelfEdit(text=f"{plain}\nBla bla.", directives={"lr": 0.01, "epochs": 5})
    second = SelfEdit(text=f"{plain}\n{plain}", directives={"lr": 0.01, "epochs": 10})

    shares = world.describe([task], [[first, second]])

    # Of the lines; of the self-edits.
    assert shares == {"plain": 3 / 4, "garbled": 1 / 4, "lr 0.01": 1, "epochs 5": 1 / 2,
                      "epochs 10": 1 / 2}


# ------------------------------------------------------------------------------- self-edits

@pytest.fixture()
def task():
    return world.town_task(world.make_town(random.Random(0), out=True))


@pytest.fixture()
def directed():
    """A task whose self-edits begin with a directive."""
    return world.town_task(world.make_town(random.Random(0), out=True), directives=True)


def test_documents_are_the_lines_and_the_passage(task):
    edit = read_self_edit(task, " A note.\n\nAnother.\n")

    assert edit.documents == ["A note.", "Another.", *task.context]
    assert edit.directives == {}


def test_a_self_edit_that_says_nothing_has_no_documents(task):
    edit = read_self_edit(task, "\n")

    assert edit.documents == []
    assert edit.note == EMPTY


def test_a_directive_is_read(directed):
    edit = read_self_edit(directed, "Study at rate 0.01 for 10 rounds.\nA note.")

    assert edit.directives == {"lr": 0.01, "epochs": 10}
    assert edit.documents == ["A note.", *directed.context]


def test_a_directive_alone_says_nothing(directed):
    edit = read_self_edit(directed, "Study at rate 0.01 for 10 rounds.")

    assert edit.documents == []
    assert edit.note == EMPTY


@pytest.mark.parametrize("text", [
    "A note.",
    "Study at rate 0.02 for 10 rounds.\nA note.",           # no such rate
    "Study at rate 0.01 for 99999 rounds.\nA note.",        # nor so many rounds
    "Study at rate 0.01 for 10 rounds. Also:\nA note.",
    "",
])
def test_directives_are_read_strictly(text, directed):
    edit = read_self_edit(directed, text)

    assert edit.note == "its first line is no directive"
    assert edit.documents == []
    assert edit.directives == {}


# ------------------------------------------------------------------------------- the checkpoint

def test_the_checkpoint_opens_in_transformers():
    ours = load_pretrained(EMBEDDED, "cpu", torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    ids = torch.randint(0, 800, (2, 100))

    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_its_tokenizer_opens_in_transformers():
    ours = Tokenizer.from_pretrained(EMBEDDED)
    theirs = AutoTokenizer.from_pretrained(EMBEDDED)

    for task in world.load("tune")[:20]:
        ids = ours.encode(task.prompt)
        assert ids == theirs(task.prompt, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == task.prompt


def test_what_the_checkpoint_can_do(tmp_path):
    """It knows nothing of a town and reads nearly all in its passage. Trained on the passage it
    answers forward questions, and no reversed ones."""
    run = Run(parse(["--run-dir", tmp_path / "run", "--device", "cpu"]))
    tasks = world.load("tune")[:16]
    model = run.load(0)
    without = unadapted(run, model, tasks)

    closed, read, passage = baselines(run, model, tasks, without)

    assert closed["name"] == "un-adapted"
    assert closed["reward"] == pytest.approx(sum(without) / 16)
    assert closed["reward"] < 0.06
    assert read["name"] == "passage in the prompt"
    assert read["reward"] > 0.93
    assert passage["name"] == "passage only"
    assert 0.3 < passage["reward"] < 0.7
    assert passage["by_kind"]["forward"] > 0.5
    assert passage["by_kind"]["reversed"] < 0.15


def pretrain(folder):
    """A few steps of the script that made the checkpoint: the loss that it prints on the way."""
    command = [sys.executable, "-m", "data.pretrain_tiny", "--tokens", "20000", "--out", folder]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]


@pytest.fixture(scope="module")
def first_steps(tmp_path_factory):
    """(the folder that the script has written, the losses that it printed)."""
    folder = tmp_path_factory.mktemp("pretrained") / "first"
    return folder, pretrain(folder)


@pytest.mark.parametrize("config", [pretrain_tiny.CONFIG, pretrain_tiny.PUZZLES])
def test_a_model_of_another_width_has_as_many_heads(config):
    half = pretrain_tiny.scaled(config, 64)

    assert pretrain_tiny.scaled(config, 128) == config
    assert half["hidden_size"] == half["head_dim"] * half["num_attention_heads"] == 64
    assert half["intermediate_size"] == 172
    assert {name for name in config if config[name] != half[name]} == {
        "hidden_size", "head_dim", "intermediate_size"}


def test_widths_that_can_not_be_had(tmp_path):
    command = [sys.executable, "-m", "data.pretrain_tiny", "--dim", "50", "--out", tmp_path / "m"]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode and failed.stderr == "error: --dim must be a multiple of 16\n"


@pytest.mark.slow
def test_pretraining_learns(first_steps):
    _, losses = first_steps

    assert losses[-1] < losses[0] - 0.05


@pytest.mark.slow
def test_pretraining_is_deterministic(first_steps, tmp_path):
    first, losses = first_steps
    second = tmp_path / "second"

    assert pretrain(second) == losses
    a = load_pretrained(first, "cpu").state_dict()
    b = load_pretrained(second, "cpu").state_dict()
    for name in a:
        assert torch.equal(a[name], b[name])


@pytest.mark.slow
def test_pretraining_begins_with_the_tokenizer_of_the_checkpoint(first_steps):
    folder, _ = first_steps

    made = (folder / "tokenizer.json").read_text()
    assert made == (EMBEDDED / "tokenizer.json").read_text()


# ------------------------------------------------------------------------------- the loop

FEW = ("--device cpu --iterations 1 --tasks 4 --edits 4 --eval-tasks 4 --eval-edits 1 --keep 1 "
       "--run-dir")


def best_of_each_task(folder):
    """The highest reward of each of the four training tasks."""
    records = read_lines(folder / "rollouts.jsonl")
    best = []
    for i in range(4):
        best.append(max(r["reward"] for r in records if r["split"] == "train" and r["task"] == i))
    return best


def test_the_loop_end_to_end(tmp_path, capsys):
    """One small round on the embedded checkpoint."""
    folder = tmp_path / "run"
    cfg = parse([*FEW.split(), folder])
    run = Run(cfg)

    held_out = rest_em(cfg, run)

    # The rewards are what the answers are worth.
    records = read_lines(folder / "rollouts.jsonl")
    for r in records:
        (answers,) = r["answers"]
        right = [answer.strip(" .") == gold for answer, gold in zip(answers, r["gold"])]
        assert r["right"] == [right]
        assert r["reward"] == pytest.approx(sum(right) / 11)

    # They differ, and each task's best self-edit is kept.
    rewards = [r["reward"] for r in records if r["split"] == "train"]
    assert len(rewards) == 16
    assert len(set(rewards)) > 3
    assert 0.2 < sum(rewards) / 16 < 0.95
    best = sum(best_of_each_task(folder)) / 4
    assert f"kept 4 self-edits with mean reward {best:.3f}" in capsys.readouterr().out

    # The policy changes.
    before = load_pretrained(EMBEDDED, "cpu").state_dict()
    after = load_pretrained(folder / "iter_1", "cpu").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    # What it reports.
    first, last = run.metrics.records
    assert first["iteration"] == 0
    assert last["iteration"] == 1
    assert len(first["baselines"]) == 3
    assert last["baselines"] == []
    assert sum(first["made_of"].values()) == pytest.approx(1)
    assert first["eval_by_kind"].keys() == {"forward", "reversed"}
    text = summary(run, held_out)
    assert "un-adapted" in text
    assert held_out[0].context[0] in text
    assert "its self-edit at iteration 1" in text


@pytest.mark.slow
def test_random_selection_does_not_keep_the_best(tmp_path, capsys):
    folder = tmp_path / "run"
    cfg = parse([*FEW.split(), folder, "--update", "random"])

    rest_em(cfg, Run(cfg))

    best = sum(best_of_each_task(folder)) / 4
    printed = capsys.readouterr().out
    assert "kept 4 self-edits" in printed
    assert f"kept 4 self-edits with mean reward {best:.3f}" not in printed


@pytest.mark.slow
def test_the_policy_learns_to_teach_itself(tmp_path):
    """The default run with one iteration less, on other towns than the README reports: the
    held-out reward rises."""
    cfg = parse(["--device", "cpu", "--iterations", "2", "--eval-data", "tune", "--seed", "7",
                 "--run-dir", tmp_path / "run"])
    run = Run(cfg)

    rest_em(cfg, run)

    first, last = run.metrics.records[0], run.metrics.records[-1]
    assert last["eval_reward"] > first["eval_reward"] + 0.05
    assert last["eval_by_kind"]["reversed"] > first["eval_by_kind"]["reversed"] + 0.1
