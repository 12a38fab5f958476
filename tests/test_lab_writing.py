"""lab/imitate.py and lab/lines.py: a model that imitates self-edits, and what self-edits are made
of."""
import json

import pytest
import torch

from engine.decode import Sampling, write
from lab import imitate, line_kinds, lines
from lora import Adapters, Job, dialogue, sft_one
from model import load_pretrained
from selfedit import fill, seed_for
from support.config import Config, outer_recipe
from support.files import UserError
from support.tokenizer import Tokenizer
from tests.helpers import SMALL, read_lines, run_it
from tests.test_lab import call


# ------------------------------------------------------------------------------- imitate

def edit(text, reward):
    return {"text": text, "adapter_mean": reward, "adapter_std": 0.0}


@pytest.fixture(scope="module")
def taught(passages, tmp_path_factory):
    """Three passages with self-edits: the second is the best, and the third is as good."""
    records = json.loads(passages.read_text())[:3]
    for i, record in enumerate(records):
        record["released_edits"] = [edit("1. Nothing.", 0.1), edit(f"1. The river is Ob{i}.", 0.6),
                                    edit(f"1. Ana{i} Reis founded it.", 0.6), edit("1. No.", 0.5)]
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


def test_the_best_self_edits_are_imitated_the_first_of_equals():
    edits = [edit("a", 0.2), edit("b", 0.4), edit("c", 0.4), edit("d", 0.3)]

    assert imitate.best_edits({"released_edits": edits}, 1) == ["b"]
    assert imitate.best_edits({"released_edits": edits}, 3) == ["b", "c", "d"]


def test_a_text_ends_as_a_turn_does(tok):
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
    trained = sft_one(model, Job(examples, seed_for(0, 0, "M-step"), recipe))
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
    assert line_kinds.classify(line, PASSAGE) == kind


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
    for name, records in (("edits.jsonl", own), ("rollouts.jsonl", given)):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def test_what_self_edits_are_made_of(some_run, tmp_path, capsys):
    call(lines, some_run, "--arm", "base", "--save", tmp_path / "kept.json")

    kept = json.loads((tmp_path / "kept.json").read_text())
    own, given = kept[f"{some_run}, iteration 0"], kept[f"{some_run}, base"]
    assert own["copied"] == [1 / 3, 0]
    assert own["wrong"] == [2 / 3, 0]
    assert own["vague"] == [0, 1]
    assert own["distinct"] == [2 / 3, 1]
    assert own["lines"] == [3, 1]
    assert own["words"] == [pytest.approx((9 + 7 + 7) / 3), 5]
    assert own["cut"] == [1, 0]                 # the first one ran to the cap
    assert own["answers"] == [0.5, 0]           # its river is there, its founder is not
    assert given["copied"] == [1]
    assert "cut" not in given                   # there was no cap for it
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith(f"| {some_run}, iteration 0 | 2 | 0.17 [0.00, 0.33] |")
    assert rows[3].startswith(f"| {some_run}, base | 1 | 1.00 [1.00, 1.00] |")


def test_lines_are_shown_with_their_kind(some_run, capsys):
    call(lines, some_run, "--arm", "base", "--show", 1)

    shown = capsys.readouterr().out
    assert shown.index("=== Town 0") < shown.index("iteration 0") < shown.index("base")
    assert "   copied  1. The river of town 0 is the Ob0." in shown
    assert "    wrong  2. It was founded by Karl Reis." in shown
    assert "Everything changes" not in shown    # the second passage


def test_a_passage_of_another_name_is_noticed(some_run, passages, tmp_path):
    records = json.loads(passages.read_text())
    (tmp_path / "other.json").write_text(json.dumps(records[1:]))

    with pytest.raises(UserError, match="name the right file by --data"):
        call(lines, some_run, "--data", tmp_path / "other.json")


def test_what_is_not_there_is_one_line(some_run):
    (some_run / "edits.jsonl").write_text("")
    with pytest.raises(UserError, match="no such self-edits"):
        call(lines, some_run)
    (some_run / "config.json").write_text('{"domain": "arc"}')
    with pytest.raises(UserError, match="not a run about passages"):
        call(lines, some_run)


@pytest.mark.parametrize("change", [
    {"task": "0"}, {"iteration": None}, {"text": 3}, {"token_ids": None}, {"split": ["eval"]}])
def test_a_damaged_line_is_one_line(change, some_run):
    record = read_lines(some_run / "edits.jsonl")[0] | change
    (some_run / "edits.jsonl").write_text(json.dumps(record) + "\n")

    with pytest.raises(UserError, match="edits.jsonl, line 1: not a record"):
        call(lines, some_run)
