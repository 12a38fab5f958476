"""A Hugging Face vocabulary as a tiktoken encoding, and the chat templates of Llama-3 and ChatML.

tiktoken merges the pair whose union has the lowest rank, and in these vocabularies a token's id
*is* its rank: so the vocabulary {bytes: id} and the pre-tokenizer's regular expression are all we
need, and the list of merges is only compared. Text is always encoded as plain text: a special
token's name inside a passage, or inside what a model wrote, stays text.
"""
import re
import unicodedata

import tiktoken
import torch

from support.checkpoint import fetch, number, read_object, refuse_unknown
from support.files import UserError

GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
        r"|\s+(?!\S)|\s+")
GPT2_DIGITS = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"  # each digit alone
               r"|\s+(?![^\s\p{N}])|\s+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")     # each digit alone
# The tokens that a chat is made of.
TURNS = {"chatml": ["<|im_start|>", "<|im_end|>"],
         "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], None: []}
LONGEST = 10_000    # blanks in a row: a million overflow tiktoken's stack
# The fields of a tokenizer.json and of its steps that are known, for `refuse_unknown`.
STEP = dict.fromkeys(["type", "pattern", "trim_offsets", "use_regex"]) | {
    "add_prefix_space": [False], "individual_digits": [True], "behavior": ["Isolated"]}
KNOWN = {"version": None, "added_tokens": None, "post_processor": None,
         "normalizer": {"type": ["NFC"]}, "pre_tokenizer": STEP | {"pretokenizers": STEP},
         "model": dict.fromkeys(["vocab", "merges", "ignore_merges", "fuse_unk"])
         | {"type": ["BPE"]},
         "decoder": STEP | {"type": ["ByteLevel"], "add_prefix_space": None}}
WORD = dict.fromkeys(["id", "content", "normalized"])       # an added token that is found in text
# Each is one piece for every pre-tokenizer: by merges and by ranks they must have the same ids.
WORDS = ["uncharacteristically", " Donaudampfschifffahrt", " thereinafter", "Übergrößenträger",
         " непредсказуемость", "日本語入力", "안녕하세요", "مرحبا", "....----===", "\n\n\n\n\n", "     ", "7"]


def byte_alphabet():
    """GPT-2's printable stand-in for each byte: {character: byte}."""
    # Printable bytes stand for themselves, the others are moved beyond Latin-1, in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = {chr(b): b for b in printable}
    for i, b in enumerate(others):
        alphabet[chr(256 + i)] = b
    return alphabet


def split_pattern(spec, where):
    """The regular expression of a tokenizer.json's pre_tokenizer; UserError if it is unknown."""
    # One step, or a sequence of them. ByteLevel splits by GPT-2's expression unless told not to.
    steps = spec.get("pretokenizers", [spec])
    kinds = [step["type"] for step in steps]
    own_regex = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and own_regex:
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and own_regex:
        return GPT2_DIGITS
    # Only known expressions: one that others wrote could run for ever.
    if kinds == ["Split", "ByteLevel"] and not own_regex \
            and steps[0]["pattern"].get("Regex") in (LLAMA3, QWEN2):
        return steps[0]["pattern"]["Regex"]
    raise UserError(f"{where}: pre_tokenizer {kinds!s:.80} with use_regex = {own_regex} and its "
                    "pattern is not implemented; those of Llama-3, Qwen2/2.5/3 and GPT-2 are")


def first_token(spec, special, end):
    """The id that a post_processor puts before a text, or None. ValueError for all else that it
    does, but for an end after the text: that is left to `document`."""
    steps = spec.get("processors", [spec]) if spec else []
    # A plain ByteLevel moves offsets only.
    steps = [step for step in steps if step["type"] != "ByteLevel" or "single" in step]
    if not steps:
        return None
    if len(steps) > 1 or steps[0]["type"] != "TemplateProcessing":
        raise ValueError(f"post_processor: {[step['type'] for step in steps]}")
    names = [piece.get("SpecialToken", {"id": "A"})["id"] for piece in steps[0]["single"]]
    first = None if names[0] == "A" else names[0]
    if names not in (["A"], ["A", end], [first, "A"], [first, "A", end]) \
            or first and steps[0]["special_tokens"][first]["ids"] != [special[first]]:
        raise ValueError(f"post_processor: {names}")
    return special.get(first)


def added_tokens(spec, nfc, path):
    """({text: id} of all added tokens, the words among them, a finder of words in a text)."""
    special, words, vocab = {}, {}, spec["model"]["vocab"]
    for token in spec.get("added_tokens") or []:
        text = token["content"]
        # tokenizers ignores the id that stands there, and a token without text.
        expected = vocab.get(text, max([len(vocab) - 1, *special.values()]) + 1)
        if token["id"] != expected or not text:
            raise ValueError(f"added token {text!r:.40} has not the id that it gets, {expected}")
        special[text] = expected
        if not token.get("special"):
            refuse_unknown(f"{path}: added token {text!r:.40}", token, WORD)
            words[text] = bool(token.get("normalized"))
    if len(set(words.values())) > 1 or nfc and True in words.values():
        raise ValueError("added tokens that are `normalized`")
    # The longest that begins first is found. A special token is found as well, and stays text.
    alike = [t["content"] for t in spec.get("added_tokens") or []
             if bool(t.get("normalized")) in words.values()]
    longest_first = sorted(alike, key=len, reverse=True)
    return special, set(words), re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def by_merges(token, order):
    """The pieces of a word as tokenizers finds them. order {pair: its place in the merges}: of all
    neighbours the pair that comes first is joined, until none is in it."""
    pieces = list(token)
    while True:
        pairs = list(zip(pieces, pieces[1:]))
        known = [pair for pair in pairs if pair in order]
        if not known:
            return pieces
        first = min(known, key=order.get)
        i = pairs.index(first)
        pieces[i:i + 2] = ["".join(first)]


def check_merges(tok, model):
    """ValueError unless merging by ids, as tiktoken does, is merging by the list of merges."""
    vocab, whole = model["vocab"], model.get("ignore_merges")
    # "a b" in older files, ["a", "b"] in newer ones.
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges") or []]
    order = {pair: i for i, pair in enumerate(merges)}
    joined = [left + right for left, right in merges]
    if joined != sorted(joined, key=vocab.get):
        raise ValueError("ids are not in the order of merges")
    long = {token for token in vocab if len(token) > 1 and token not in tok.special}
    if odd := long.symmetric_difference(joined):
        raise ValueError(f"merges do not fit token {min(odd)!r:.40}")
    letter = {byte: letter for letter, byte in byte_alphabet().items()}
    for word in WORDS:
        token = "".join(letter[byte] for byte in word.encode())
        pieces = [token] if whole and token in vocab else by_merges(token, order)
        if tok.plain(word) != [vocab[piece] for piece in pieces if piece in vocab]:
            raise ValueError(f"{word!r} has other ids by merges than by ranks")


class Tokenizer:
    """Made with `Tokenizer.from_pretrained(folder or hub id)`.

    eos: the id that ends a document. stop: the ids that end what the model writes, eos among them.
    bos: the id before every document, or None. template: chatml, llama3, or None: a base model."""

    def __init__(self, ranks, pattern, special, nfc=False):
        """ranks {bytes: id}, pattern of the pre-tokenizer, special {text: id}, nfc: normalise."""
        ids = [*ranks.values(), *special.values()]
        if not ranks or len(set(ids)) < len(ids) \
                or not all(type(i) is int and 0 <= i < 2**24 for i in ids):
            raise ValueError("each token must have an id of its own, below 2**24")
        self.special = special
        self.nfc = nfc
        self.bos = self.eos = self.template = None
        # Of `special`, words like any other, and what finds them in a text.
        self.words, self.finder = set(), re.compile("(?!)")
        self.stop = set()
        self.no_think = False
        self.bytes = {i: b for b, i in ranks.items()}
        self.size = max(ids) + 1
        # tiktoken needs a token for every byte. Sentinels beyond the vocabulary stand for those
        # that are absent, and `encode` drops them.
        absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        sentinels = {byte: self.size + i for i, byte in enumerate(absent)}
        self.encoding = tiktoken.Encoding("nanoseal", pat_str=pattern, special_tokens={},
                                          mergeable_ranks=ranks | sentinels)

    @classmethod
    def from_pretrained(cls, name_or_path):
        """From a folder or hub id. UserError if there is no tokenizer, or one of another kind."""
        folder = fetch(name_or_path)
        path = folder / "tokenizer_config.json"
        settings = read_object(path, {})
        # Newer files hold all tokens; in older folders the other file goes before them.
        if "added_tokens_decoder" not in settings:
            settings |= read_object(folder / "special_tokens_map.json", {})
        end = settings.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        if end is not None and not isinstance(end, str):
            raise UserError(f"{path}: eos_token must be the text of a token, not {end!r:.80}")
        path = folder / "tokenizer.json"
        try:
            tok = cls.from_tokenizer_json(path, end)
        except (ValueError, TypeError, LookupError, AttributeError, OSError) as e:
            raise UserError(f"{path}: no byte-level BPE vocabulary ({e!r:.160}); SentencePiece is "
                            "not implemented") from None

        # What ends a text: the tokenizer's own end, and the ids that the model's files name.
        config = read_object(folder / "config.json", {})
        vocab_size = number(config, folder / "config.json", "vocab_size", tok.size)
        tok.stop = {tok.special.get(end)}
        for file in (folder / "config.json", folder / "generation_config.json"):
            ids = read_object(file, {}).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if not all(i is None or type(i) is int and 0 <= i < vocab_size for i in ids):
                raise UserError(f"{file}: eos_token_id must be ids < {vocab_size}, not {ids!r:.80}")
            tok.stop |= set(ids)
        tok.stop -= {None}
        tok.eos = tok.special.get(end, min(tok.stop, default=None))

        # Base Qwens ship a chat template too; but only in a model tuned for chat does a text end
        # with the end of a turn. Hybrid reasoning models (Qwen3) are asked not to think aloud.
        tok.template = {"<|im_end|>": "chatml", "<|eot_id|>": "llama3"}.get(end)
        template = settings.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text("utf-8", errors="replace")
        tok.no_think = "enable_thinking" in str(template) and "<think>" in tok.special
        needed = TURNS[tok.template] + (["<think>", "</think>"] if tok.no_think else [])
        if lacking := [token for token in needed if token not in tok.special]:
            raise UserError(f"{path}: token {lacking[0]} is missing, as this is a chat model")
        used = [*tok.bytes, *tok.stop, tok.bos or 0, *(tok.special[token] for token in needed)]
        if max(used) >= vocab_size:
            raise UserError(f"{folder}: tokenizer and weights do not belong together: it has id "
                            f"{max(used)}, config.json's vocab_size is {vocab_size}")
        return tok

    @classmethod
    def from_tokenizer_json(cls, path, end):
        """What is not done as the library tokenizers does it is refused: UserError, ValueError."""
        spec = read_object(path, kind={"decoder": {"type": str}, "pre_tokenizer": {"type": str}})
        refuse_unknown(path, spec, KNOWN)
        nfc = bool(spec.get("normalizer"))
        special, words, finder = added_tokens(spec, nfc, path)
        ranks = {}
        alphabet = byte_alphabet()
        for token, i in spec["model"]["vocab"].items():
            if token not in special:
                ranks[bytes(map(alphabet.__getitem__, token))] = i
        tok = cls(ranks, split_pattern(spec["pre_tokenizer"], path), special, nfc)
        tok.words, tok.finder = words, finder
        tok.bytes |= {special[word]: word.encode() for word in words}
        check_merges(tok, spec["model"])
        tok.bos = first_token(spec.get("post_processor"), special, end)
        return tok

    def encode(self, text):
        """Plain text to ids; special tokens' names are text like any other; no BOS is added."""
        ids, end = [], 0
        for found in self.finder.finditer(text):
            if found[0] in self.words:
                ids += [*self.plain(text[end:found.start()]), self.special[found[0]]]
                end = found.end()
        return ids + self.plain(text[end:])

    def plain(self, text):
        """The ids of a text without added words."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        # Cut within runs of more than LONGEST blanks: tiktoken's stack would overflow.
        cuts = [0]
        for run in re.finditer(r"\s+", text):
            cuts += range(run.start() + LONGEST, run.end(), LONGEST)
        ids = []
        for begin, end in zip(cuts, [*cuts[1:], len(text)]):
            ids += self.encoding.encode_ordinary(text[begin:end])
        return [i for i in ids if i < self.size]

    def decode(self, ids):
        """Ids to text, without special tokens and unknown ids; broken UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def document(self, text, end=True):
        """A training document: BOS (if the model has one), the text, EOS."""
        ids = [self.bos, *self.encode(text), self.eos if end else None]
        return [i for i in ids if i is not None]

    def prompt(self, text):
        """What a model reads before it writes: the text itself, or a chat model's user turn.

        NOTE(paper): the paper's passages are for base models, without a chat template. Its puzzles
        are for a chat model, and the official code writes two BOS there; here it is one."""
        return self.chat([("user", text)]) if self.template else self.document(text, end=False)

    def chat(self, turns):
        """(role, text) turns and the opening of the assistant's; no system prompt is added."""
        s, encode = self.special, self.encode
        ids = [] if self.bos is None else [self.bos]
        # The assistant's turn has no text yet, and stays open.
        for role, text in [*turns, ("assistant", None)]:
            if self.template == "llama3":
                ids += [s["<|start_header_id|>"], *encode(role), s["<|end_header_id|>"]]
                ids += encode("\n\n")
                if text is not None:
                    ids += [*encode(text.strip()), s["<|eot_id|>"]]
            else:
                ids += [s["<|im_start|>"], *encode(f"{role}\n{text or ''}")]
                if text is not None:
                    ids += [s["<|im_end|>"], *encode("\n")]
        if self.no_think and self.template == "chatml":
            ids += [s["<think>"], *encode("\n\n"), s["</think>"], *encode("\n\n")]
        return ids

    def banned(self, model):
        """(V,) bool: ids that the output layer has and the vocabulary hasn't, never to be drawn."""
        mask = torch.ones(model.config.vocab_size, dtype=torch.bool)
        mask[[i for i in (*self.bytes, *self.special.values()) if i < len(mask)]] = False
        return mask.to(model.device)
