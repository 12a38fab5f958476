"""How a model is asked for a self-edit, how its text is read, and how self-edits are sampled."""
import json
import math
from dataclasses import replace
from itertools import chain

import pytest

from data import knowledge
from data.arc import arc_task, read_json_edit, write_json_edit
from engine.decode import Sampling, collect
from selfedit import (PROMPTS, QUERY, SelfEdit, read_self_edit, sample_self_edits,
                      seed_for, split_documents)

# Appendix B of the paper: what is asked for, and how the prompt ends.
LIST = "list of implications derived directly or indirectly from the content"
ASKED = {
    "implications": (f"produce a {LIST}", "Implications:\n"),
    "implications-long": (f"produce a long {LIST}", "Implications:\n"),
    "implications-very-long": (f"produce a very long {LIST}", "Implications:\n"),
    "rewrite": ("rewrite it in a few different ways, each one separated by a newline",
                "Rewritten passages:\n"),
    "self-qa": ("rewrite it in a question-answer format", "Question 1: ")}


def test_prompts_to_the_letter():
    expected = {"none": "Passage:\nT\nC\n\n"}
    for name, (what, end) in ASKED.items():
        expected[name] = (f"Let's read the following passage and {what}.\n\n"
                          f"Passage:\nT\nC\n\n{end}")
    assert {name: p.format(title="T", context="C") for name, p in PROMPTS.items()} == expected
    assert QUERY.format(title="T", question="Q?") == (
        "Let's answer a question directly and concisely.\nQuestion: Topic: T\nQ?\nAnswer:\n")


@pytest.mark.parametrize("text, pieces", [
    (" \n\n---\n ", []),
    ("one\n\n  two \n---\nthree---four", ["one", "two", "three", "four"]),
    # Words before a numbered list go. A first line that is an item itself goes as well, if the
    # second one is number 1: so does the official code.
    ("Sure, here is a list:\n\n1. a\n2. b", ["1. a", "2. b"]),
    ("1. a\n1. b", ["1. b"]),
    ("Answer: Me\nQuestion: Who?\nAnswer: So\nQuestion: Why?",
     ["Answer: Me\nQuestion: Who?", "Answer: So\nQuestion: Why?"]),
    ("Question: Who?\nAnswer: Me\nQuestion: Why?\nAnswer: So",
     ["Question: Who?\nAnswer: Me", "Question: Why?\nAnswer: So"]),
    # Questions and answers. The prompt ends with 'Question 1: ', so a text begins after it.
    ("Who?\nAnswer: Me\nQuestion 2: Why?\nAnswer: So\nit is.",
     ["Question 1: Who?\nAnswer: Me", "Question 2: Why?\nAnswer: So\nit is."]),
    ("Question 1: Who?\nAnswer: Me\n\nQuestion 2: Why?\nAnswer: So",
     ["Question 1: Who?\nAnswer: Me", "Question 2: Why?\nAnswer: So"]),
    ("Question 3: no reply\nat all", ["Question 3: no reply", "at all"])])
def test_a_self_edit_is_split_as_the_official_code_does(text, pieces):
    assert split_documents(text) == pieces
    assert split_documents(text, limit=1) == pieces[:1]


@pytest.mark.parametrize("method, documents", [
    ("base", 8.867), ("iter1", 8.350), ("iter2", 8.183), ("gpt4_1", 14.833)])
def test_released_self_edits_have_as_many_documents_as_their_authors_counted(
        method, documents, shared_data):
    """The mean number per self-edit that their result files imply."""
    path = shared_data / "squad_val_60.json"
    counts = []
    for task, record in zip(knowledge.load(path), json.loads(path.read_text()), strict=True):
        edit = read_self_edit(task, record["released"][method]["edit"])
        counts.append(len(edit.documents))
    assert sum(counts) / 60 == pytest.approx(documents, abs=5e-4)


GOOD_TEXT = write_json_edit(["basic"], completion_only=True, lr=1e-4, epochs=2)
GOOD = json.loads(GOOD_TEXT)


def changed(part, **values):
    """The good self-edit with other values in 'data_generation' or 'training'."""
    return json.dumps(GOOD | {part: GOOD[part] | values})


@pytest.mark.parametrize("text, tools, directives", [
    (json.dumps(GOOD, indent=2), ["basic"], {}),
    (changed("data_generation", use_repeat_augmentations=True, use_size_augmentations=True),
     ["basic", "size", "repeat"], {}),      # in one order
    (changed("training", learning_rate=1), ["basic"], {"lr": 1.0}),
    (changed("training", strategy="train_using_all_tokens"), ["basic"],
     {"completion_only": False})])
def test_a_json_self_edit_is_read(text, tools, directives):
    found = read_json_edit(text)
    assert found == (tools, {"completion_only": True, "lr": 1e-4, "epochs": 2} | directives)
    assert type(found[1]["lr"]) is float


# Why it isn't a self-edit -> such texts. The official code crashes on several of these.
REFUSED = {
    "not JSON": ["", "```json\n" + GOOD_TEXT + "\n```", GOOD_TEXT + "\nOk.", GOOD_TEXT[:-1],
                 "[" * 100_000],
    "the self-edit must be an object": ["[]", "null"],
    "with the keys data_generation, training": [
        json.dumps({"training": GOOD["training"]}), json.dumps(GOOD | {"more": 1})],
    "training must be an object": [
        json.dumps(GOOD | {"training": None}), json.dumps(GOOD | {"training": {}}),
        changed("training", seed=1)],
    "data_generation must be an object": [
        changed("data_generation", use_other_augmentations=True)],
    "twice": [GOOD_TEXT.replace('"strategy"', '"strategy": "", "strategy"')],
    "true or false": [changed("data_generation", use_basic_augmentations=1)],
    "strategy": [changed("training", strategy=value)
                 for value in ("train", ["train_using_all_tokens"])],
    "learning_rate": [
        *(changed("training", learning_rate=value)
          for value in ("1e-4", True, None, [0.1], {}, 0, 1e9, math.nan, math.inf)),
        # Numbers that are too large for a float, and for Python's reading of whole ones.
        GOOD_TEXT.replace("0.0001", "1" + "0" * 400), GOOD_TEXT.replace("0.0001", "1e999")],
    "digits": [GOOD_TEXT.replace("0.0001", "1" * 5000)],
    "num_train_epochs": [changed("training", num_train_epochs=value)
                         for value in (2.0, True, 0, 10 ** 9)]}


@pytest.mark.parametrize("why", REFUSED)
def test_what_is_no_json_self_edit_is_a_note_with_its_reason_and_nothing_to_train_on(why):
    puzzle = arc_task("puzzle", [], [])
    for text in REFUSED[why]:
        edit = read_self_edit(puzzle, text, token_ids=[1, 2])
        assert why in edit.note
        # What was written is kept all the same: the M-step's log and the rollouts show it.
        assert edit == SelfEdit(text=text.strip(), token_ids=[1, 2], note=edit.note)


SEEDS = [[seed_for(0, 0, 0), seed_for(0, 0, 1)], [seed_for(0, 1, 0), seed_for(0, 1, 1)]]
HOT = Sampling(max_new=40, n=2, temperature=1.0)


@pytest.fixture()
def two_tasks(passages):
    return knowledge.load(passages)[:2]


def sampled(tiny, tok, tasks, sampling=HOT, seeds=SEEDS):
    return list(chain(*collect(sample_self_edits(tiny, tok, tasks, sampling, seeds))))


def test_a_seed_depends_on_its_key_alone():
    assert seed_for(0, 1, "train") != seed_for(0, 1, "eval")
    # Known from an earlier version: a resumed run must see the same draws.
    assert seed_for(0, 1, "train", 2, 3, "edit") == 129953328104625


def test_sampled_edits_keep_their_ids_and_no_draw_depends_on_what_else_is_sampled(tiny, tok,
                                                                                  two_tasks):
    edits = sampled(tiny, tok, two_tasks)
    for edit in edits:
        assert tok.decode(edit.token_ids).strip() == edit.text
        assert 0 < len(edit.token_ids) <= 40
    assert len({tuple(edit.token_ids) for edit in edits}) == 4
    (alone,) = sampled(tiny, tok, two_tasks[1:], replace(HOT, n=1), [[SEEDS[1][1]]])
    assert alone.token_ids == edits[3].token_ids


def test_the_id_that_ends_an_edit_is_kept(tiny, tok, two_tasks, monkeypatch):
    # A random model hardly ever writes EOS.
    stop = set(range(0, 256, 2))
    monkeypatch.setattr(tok, "stop", stop)
    for edit in sampled(tiny, tok, two_tasks):
        assert edit.token_ids[-1] in stop
        assert stop.isdisjoint(edit.token_ids[:-1])


def test_an_edit_ends_where_the_context_window_ends(tiny, tok, two_tasks):
    longest = max(len(tok.prompt(task.prompt)) for task in two_tasks)
    tiny.config = replace(tiny.config, max_len=longest + 5)
    assert max(len(edit.token_ids) for edit in sampled(tiny, tok, two_tasks)) == 5
