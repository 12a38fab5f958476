"""Plain text is learned in one command, kept in PEFT's layout, and asked again."""
import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import inner_loop
import selfedit
import model as transformer
from data import judges, text
from inner_loop import inner_recipe
from lora import Adapters, Lora
from model import add_adapter
from support.config import PRESETS, Config
from support.files import UserError
from tests.helpers import ALL, call
from tests.strict import must_not_be_called
from tools import learn

NOTES = "The Brindle Cup is a race. It was founded by Ludo.\n\nThe winner gets a kettle of jam."


@pytest.fixture()
def notes(tmp_path):
    (tmp_path / "brindle_cup.txt").write_text(NOTES)
    return tmp_path / "brindle_cup.txt"


@pytest.fixture()
def learned(tiny_folder):
    return lambda *words: call(learn, *words, "--model", tiny_folder)


def random_adapter(model):
    adapters = Adapters(model, Lora(4, 8, ALL), 1)
    adapters.flat.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return adapters


@pytest.fixture()
def adapter(tiny, tmp_path):
    random_adapter(tiny).save(0, tmp_path / "adapter")
    return tmp_path / "adapter"


def in_tokens(passage):
    return len(judges.normalise(passage))


def test_a_text_is_titled_by_its_file_and_cut_at_sentences(notes):
    (notes.parent / "other.md").write_text("More.")
    assert text.load([notes], in_tokens) == [("brindle cup", " ".join(NOTES.split()))]
    assert [title for title, _ in text.load([notes.parent], in_tokens)] == ["brindle cup", "other"]
    long = "This is a sentence of seven words. " * 40
    found = text.passages(f"One.\n\nTwo\nlines.\n\n{long}\n\nEnd.", in_tokens)
    assert found[0].startswith("One. Two lines.")
    assert len(found) == 2 and max(map(in_tokens, found)) <= text.LONGEST
    assert " ".join(found) == " ".join(f"One. Two lines. {long} End.".split())
    # The passage in view is the one that is asked about.
    texts = [("a", "The river is the Ob."), ("b", "Jam is made of plums.")]
    assert text.as_question("What is jam made of?", texts).context == ["b\nJam is made of plums."]


@pytest.mark.parametrize("sentence, cuts", [
    ("北京位于华北平原。", True), ("東京は「大きい」です！", True), ("दिल्ली बड़ी है। ", True), ("هل هي كبيرة؟ ", True),
    ("กรุงเทพเป็นเมืองหลวง", False), ("no full stop here ", False), ("aGVsbG8gd29ybGQ=", False)])
def test_a_text_of_any_script_is_learned_whole_and_cut_by_its_tokens(sentence, cuts):
    whole = sentence * 100
    found = text.passages(whole, len, 60)
    assert max(map(len, found)) <= 70 and len(found) > 10
    assert "".join(found).replace(" ", "") == whole.replace(" ", "")
    assert all(passage.endswith(sentence.strip()) for passage in found) == cuts
    assert len(text.sentences(whole)) == (100 if cuts else 1)


@pytest.mark.parametrize("content, problem", [(b" \n\n ", "no text"),
                                              (b"\xff\xfe\x00", "not readable as text")])
def test_what_is_no_text_is_one_line(content, problem, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=problem):
        text.load([tmp_path / "x"], in_tokens)
    with pytest.raises(UserError, match="missing"):
        text.load([tmp_path / "missing"], in_tokens)


def test_learn_ask_save_and_ask_again(learned, notes, tmp_path):
    saved = tmp_path / "saved"
    out = learned("--max-new", 20, notes, "--ask", "Who founded it?", "--ask", "What is won?",
                  "--save", saved)

    for words in ("1 passages", "a self-edit of the first passage", "Who founded it?\n  before",
                  "text in view", "steps in", f"--adapter {saved}"):
        assert words in out
    assert out.count("\n  after") == 2
    again = learned("--max-new", 20, "--adapter", saved, "--ask", "Who founded it?")
    assert "without" in again and "with " in again
    # It is asked as before: with the topic of the passage.
    def answers(out, name):
        return re.findall(rf"Who founded it\?\n(?:.*\n)*?  {name} +(.*)", out)
    assert answers(again, "without") == answers(out, "before") != []
    assert answers(again, "with") == answers(out, "after")
    # It learns: the loss falls.
    first, last = (float(x) for x in out.split("loss ")[1].split("\n")[0].split(" -> "))
    assert last < first - 0.5
    with pytest.raises(UserError, match="exists already"):
        learned(notes, "--ask", "Who?", "--save", saved)


def test_one_s_own_self_edit_is_scored(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("The ruler of Lorzun is Garwyn.\nWhich town is ruled by Garwyn? Lorzun\n")
    out = call(inner_loop, "--data", "tune", "--index", 3, "--self-edit", path)
    assert "ruled by Garwyn? (Lorzun)\n  before: 'Dalthorpe'\n  after:  'Lorzun'" in out
    assert int(re.search(r"right: 0 -> (\d+) of 11", out)[1]) > 4


@pytest.mark.parametrize("words, program, message", [
    ("--model m --ask z", learn, "either FILEs to learn, or --adapter DIR"),
    ("--model m x --adapter y --ask z", learn, "either FILEs to learn, or --adapter DIR"),
    ("--model m --adapter x --ask y --save z", learn, "there is nothing new to save"),
    ("--data tune --index 9999", inner_loop, "--index 9999: there are passages 0 to"),
    ("--data nowhere", inner_loop, "nowhere is missing")])
def test_what_can_not_be_learned_or_asked_is_an_error(words, program, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call(program, *words.split())


@pytest.mark.parametrize("preset, recipe", [("tiny", inner_loop.TINY), ("small", inner_loop.SMALL)])
def test_the_inner_loop_is_that_of_a_preset(preset, recipe):
    cfg = Config(**PRESETS[preset])
    bounds = {"max_steps": cfg.max_steps, "max_tokens": cfg.max_train_tokens}
    assert replace(recipe, **bounds) == inner_recipe(cfg)


def test_a_saved_adapter_is_loaded_to_the_bit(tiny, tiny_folder, adapter):
    loaded = Adapters.load(tiny, adapter)
    assert torch.equal(loaded.flat, random_adapter(tiny).flat)
    assert loaded.lora == Lora(4, 8, ALL)
    with pytest.raises(UserError, match="exists already"):
        loaded.save(0, adapter)
    words = f"--model {tiny_folder} --adapter {adapter} --prompt ab --max-new 4"
    assert call(transformer, *words.split()).startswith("ab")


DAMAGE = {"nan": lambda tensors: {name: x * torch.nan for name, x in tensors.items()},
          "half": lambda tensors: dict(list(tensors.items())[1:]),
          "shape": lambda tensors: {name: x[:, :-1].clone() for name, x in tensors.items()}}


@pytest.mark.parametrize("damage", [*DAMAGE, "cut", "none"])
def test_a_damaged_adapter_is_one_line(damage, adapter, tiny):
    path = adapter / "adapter_model.safetensors"
    if damage in DAMAGE:
        save_file(DAMAGE[damage](load_file(path)), path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    if damage == "none":
        path.unlink()
    for load in (Adapters.load, add_adapter):
        with pytest.raises(UserError) as stopped:
            load(tiny, adapter)
        assert len(str(stopped.value).splitlines()) == 1


def test_what_can_not_be_saved_or_asked_is_said_before_the_work(learned, notes, monkeypatch):
    monkeypatch.setattr(learn, "sample_self_edits", must_not_be_called)
    with pytest.raises(UserError, match="a prompt has 100... tokens; the model's window has 1024"):
        learned(notes, "--ask", "x" * 100_000)
    monkeypatch.setattr(learn, "load_pretrained", must_not_be_called)
    with pytest.raises(UserError, match="--save .*brindle_cup.txt/adapter: can't be written"):
        learned(notes, "--ask", "Who?", "--save", notes / "adapter")


@pytest.mark.parametrize("program", [inner_loop, selfedit])
def test_a_prompt_beyond_the_window_is_one_line_with_both_numbers(program, tiny_folder, tmp_path):
    record = {"title": "A", "context": "word " * 2000, "questions": [{"question": "Q?",
                                                                      "answer": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=r"a prompt has 10\d+ tokens; the model's window has 1024"):
        call(program, "--data", tmp_path / "a.json", "--model", tiny_folder)
