"""The inner loop: a self-edit becomes a job, its adapter answers, the answers become a reward."""
from dataclasses import replace
from unittest.mock import Mock

import pytest

import inner_loop
from data.judges import each
from engine.decode import Sampling
from engine.train import Trained, sft
from inner_loop import Answers, Outcome, ask, grade_all, make_job, reward, update_and_score
from lora import Adapters
from model import load_pretrained
from selfedit import SelfEdit, Task
from support.files import UserError
from support.tokenizer import Tokenizer
from tests.helpers import RECIPE, call, even_length
from tests.make_checkpoint import make_checkpoint
from tests.strict import must_not_be_called

GREEDY = Sampling(max_new=10)


def make_task(name="Town", n=2, rule=even_length):
    """A task with n questions."""
    questions = [f"Q{i}?" for i in range(n)]
    return Task(
        name=name, prompt=f"Read {name}.", questions=questions,
        queries=[f"{question} of {name}" for question in questions],
        answers=[f"A{i}" for i in range(n)], judge=each(rule),
        read=lambda text: SelfEdit(documents=[text]), context=[f"{name} is a town."])


def edit_of(*documents, **directives):
    return SelfEdit(documents=list(documents), directives=directives)


def test_a_job_has_an_example_for_each_document_and_follows_the_directives(tiny, tok):
    """A text longer than the window is cut, and such a pair is left out."""
    edit = edit_of("one two", "three", "a" * 5000, ("question ", "answer"), ("9" * 5000, "1"))
    job = make_job(tiny, tok, edit, 5, RECIPE)
    assert job.seed == 5
    assert job.recipe == RECIPE
    *texts, (pair, _) = job.examples
    assert [ids for ids, _ in texts] == [tok.document("one two"), tok.document("three"),
                                         tok.encode("a" * 1024)]
    assert all(learn == [True] * len(ids) for ids, learn in texts)
    assert texts[0][0][-1] == texts[1][0][-1] == tok.eos
    assert tok.decode(pair) == "question answer"
    directed = make_job(tiny, tok, edit_of("text", lr=0.5, epochs=7, batch=4), 0, RECIPE)
    assert directed.recipe == replace(RECIPE, lr=0.5, epochs=7, batch=4)
    many = edit_of(*["ab"] * 30)
    bounded = replace(RECIPE, epochs=3, batch=1, max_steps=80, max_tokens=1000)
    with pytest.raises(ValueError, match="asks for 90 steps of training, more than 80"):
        make_job(tiny, tok, many, 0, bounded)
    with pytest.raises(ValueError, match=r"asks for 1\d\d\d tokens of training, more than 1000"):
        make_job(tiny, tok, edit_of("x" * 400), 0, bounded)
    assert make_job(tiny, tok, many, 0, replace(bounded, max_steps=90)).steps == 90


@pytest.mark.parametrize("template, end", [
    (None, "<|endoftext|>"), ("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
def test_tokens_to_learn(template, end, tmp_path):
    """The prompt as the model's template has it, then the completion and the end of a turn."""
    folder = make_checkpoint(tmp_path / "model", end=end)
    model = load_pretrained(folder, "cpu")
    tok = Tokenizer.from_pretrained(folder)
    assert tok.template == template
    prompt = tok.prompt("Input:\n12\nOutput:\n")
    completion = [*tok.encode("21"), tok.eos]
    edit = edit_of(("Input:\n12\nOutput:\n", "21"), completion_only=True)
    ((ids, learn),) = make_job(model, tok, edit, 0, RECIPE).examples
    edit.directives["completion_only"] = False
    (everything,) = make_job(model, tok, edit, 0, RECIPE).examples
    assert ids == prompt + completion
    assert learn == [False] * len(prompt) + [True] * len(completion)
    assert everything == (ids, [True] * len(ids))
    # There is one BOS, in front, if the model has one.
    assert [i for i, token in enumerate(ids) if token == tok.bos] == [0] * (template == "llama3")


def test_replies_become_answers_by_the_tasks_vote(model64, tok):
    """Four queries, two questions: the task says which reply answers what."""
    ((plain,),) = ask(model64, tok, [[make_task(n=4)]], GREEDY)
    task = replace(make_task(n=4), questions=["first", "second"],
                   vote=lambda replies: [replies[3], replies[0]])
    ((voted,),) = ask(model64, tok, [[task]], GREEDY)
    assert voted.texts == [plain.texts[3], plain.texts[0]]
    # A random model never ends what it writes: all four replies were cut.
    assert voted.cut == 4


def test_each_judge_sees_all_of_its_answers_at_once_but_no_empty_one():
    kind = Mock(return_value=[True, True, True])
    strict = Mock(return_value=[False, False])
    tasks = [replace(make_task("Ava", n=4), judge=kind), replace(make_task("Bora"), judge=strict),
             replace(make_task("Cano", n=1), judge=kind)]
    verdicts = grade_all(tasks, [["", "a", " \n", "b"], ["c", "d"], ["e"]])
    assert verdicts == [[False, True, False, True], [False, False], [True]]
    kind.assert_called_once_with([("Q1?", "A1", "a"), ("Q3?", "A3", "b"), ("Q0?", "A0", "e")])
    strict.assert_called_once_with([("Q0?", "A0", "c"), ("Q1?", "A1", "d")])


def test_an_outcome_is_the_mean_over_its_seeds():
    outcome = Outcome()
    outcome.add(Trained(None, losses=[3.0, 2.0, 1.00004], seconds=0.5, diverged=False),
                Answers(["a", "b"], cut=1), [True, False])
    outcome.add(Trained(None, losses=[4.0], seconds=1.5, diverged=False),
                Answers(["c", "d"], cut=2), [True, True])
    assert outcome.accuracy == [0.5, 1.0]
    assert reward(outcome, None, None) == 0.75
    assert outcome.answers == [["a", "b"], ["c", "d"]]
    assert outcome.right == [[True, False], [True, True]]
    assert outcome.losses == [[3.0, 1.0], [4.0, 4.0]]   # the first and the last, rounded
    assert (outcome.seconds, outcome.cut, outcome.note) == (2.0, 3, "")


@pytest.mark.parametrize("at_once", [2, 16])
def test_rewards_are_those_of_the_three_lines_done_by_hand(model64, tok, monkeypatch, at_once):
    """Whatever number of adapters answer together."""
    monkeypatch.setattr(inner_loop, "auto_answering", lambda model, lora: at_once)
    tasks = [make_task("Ava"), make_task("Bora", n=3)]
    edits = [edit_of("one two", "three"), edit_of("four", epochs=5)]
    seeds = [[1, 2, 3], [4, 5]]

    outcomes = dict(update_and_score(model64, tok, tasks, edits, seeds, RECIPE, GREEDY))

    assert outcomes.keys() == {0, 1}
    for i, outcome in outcomes.items():
        assert outcome.reward == pytest.approx(sum(outcome.accuracy) / len(seeds[i]))
        for s, seed in enumerate(seeds[i]):
            job = make_job(model64, tok, edits[i], seed, RECIPE)
            ((_, trained),) = sft(model64, [job])
            adapter = Adapters.stack(model64, RECIPE.lora, [trained.weights])
            ((answers,),) = ask(model64, tok, [[tasks[i]]], GREEDY, adapter)
            (right,) = grade_all([tasks[i]], [answers.texts])
            assert outcome.answers[s] == answers.texts
            assert outcome.right[s] == right
            assert outcome.accuracy[s] == sum(right) / len(right)
    assert len({outcome.reward for outcome in outcomes.values()}) == 2


def scored(tiny, tok, edits, seeds=(1,)):
    """The outcomes of these self-edits, in their order."""
    tasks = [make_task(rule=lambda question, gold, prediction: True)] * len(edits)
    outcomes = dict(update_and_score(tiny, tok, tasks, edits, [list(seeds)] * len(edits), RECIPE,
                                     GREEDY))
    assert outcomes.keys() == set(range(len(edits)))
    return [outcomes[i] for i in range(len(edits))]


@pytest.mark.parametrize("edit, note", [
    (SelfEdit(), "nothing to learn"),
    (SelfEdit(note="not JSON: at character 3"), "not JSON"),
    (edit_of("hot", lr=float("inf")), "diverged"),
    # A self-edit must not choose, say, how much memory it takes.
    (edit_of("greedy", lr=0.5, slots=10 ** 6, steps=1), "can't choose slots, steps"),
    (edit_of(("9" * 5000, "1")), "context window")])
def test_a_bad_edit_has_reward_0_and_a_note_and_harms_no_other(tiny, tok, edit, note):
    """Nor does a document that is longer than the window: it is learned as far as it goes."""
    short, bad, long = scored(tiny, tok, [edit_of("x"), edit, edit_of("a" * 5000)])
    assert bad.reward == 0
    assert note in bad.note
    assert [(good.reward, good.note) for good in (short, long)] == [(1, ""), (1, "")]


def test_an_adapter_that_diverged_or_was_never_trained_is_not_asked(tiny, tok, monkeypatch):
    monkeypatch.setattr(inner_loop, "ask", must_not_be_called)
    edits = [edit_of("hot", lr=float("inf")), SelfEdit()]
    hot, empty = scored(tiny, tok, edits, seeds=[1, 2])
    assert hot.answers == [["", ""], ["", ""]]
    assert hot.accuracy == [0, 0]
    assert empty.reward == 0


def test_the_command_shows_a_passage_learned(tiny_folder, passages, monkeypatch):
    words = ["--model", tiny_folder, "--data", passages, "--index"]
    shown = call(inner_loop, *words, 1)
    for part in ("The river of town 1 is the Ob1.", "--- self-edit", "Which river? (Ob1)",
                 "of 2; after the passage alone "):
        assert part in shown
    with pytest.raises(UserError, match="--index 6: there are passages 0 to 5"):
        call(inner_loop, *words, 6)
    monkeypatch.setattr(inner_loop, "sample_self_edits", lambda *_: [(0, [SelfEdit()])])
    with pytest.raises(UserError, match="nothing was learned: nothing to learn"):
        call(inner_loop, *words, 1)
