"""A Hugging Face vocabulary as a tiktoken encoding, and the chat templates of Llama-3 and ChatML.

    python tokenizer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text "Hello, world"

tiktoken merges the pair whose union has the lowest rank, and in these vocabularies a token's id *is* its rank: so the
vocabulary {bytes: id} and the pre-tokenizer's regular expression are all we need; the list of merges is not.
Text is always encoded as plain text: a special token's name inside a passage, or inside what a model wrote, stays text.
"""
import argparse, base64, json, unicodedata
from pathlib import Path

import tiktoken
import torch

from model import UserError, cli, fetch, read_json

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT2_DIGITS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # each digit alone (SmolLM2)
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_alphabet():
    """GPT-2's printable stand-in for each byte: {character: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def split_pattern(spec, where):
    """The regular expression of a tokenizer.json's pre_tokenizer; UserError if it is one we don't know."""
    parts = spec.get("pretokenizers", [spec]) if spec else []
    kinds = [p["type"] for p in parts]
    last = parts[-1] if parts else {}
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return GPT2
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and last.get("use_regex", True):
        return GPT2_DIGITS
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and "Regex" in parts[0]["pattern"] \
            and parts[0]["behavior"] == "Isolated" and not parts[0].get("invert"):
        return parts[0]["pattern"]["Regex"]
    raise UserError(f"{where}: pre-tokenizer {kinds} is not implemented; use a Llama-3, Qwen2/2.5/3 or GPT-2 style tokenizer")


class Tokenizer:
    """Make one with `Tokenizer.from_pretrained(folder or hub id)`.

    ranks {bytes: id}; pattern: the pre-tokenizer; special {text: id}; bos: id put before every document, or None;
    stop: ids that end a text; nfc: normalise first; template: 'chatml', 'llama3' or None (a base model);
    no_think: the template of a hybrid reasoning model (Qwen3), answered without reasoning."""

    def __init__(self, ranks, pattern, special, bos=None, stop=(), nfc=False, template=None, no_think=False):
        self.special, self.bos, self.stop, self.nfc, self.template = special, bos, set(stop), nfc, template
        self.no_think, self.eos = no_think, min(self.stop, default=None)
        self.bytes = {i: b for b, i in ranks.items()}
        self.size = max([*ranks.values(), *special.values()]) + 1
        # tiktoken needs a token for each byte and can't take a gap: sentinels beyond the vocabulary, dropped on the way out
        absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self.encoding = tiktoken.Encoding("nanoseal", pat_str=pattern, special_tokens={},
                                          mergeable_ranks=ranks | {b: self.size + i for i, b in enumerate(absent)})

    @classmethod
    def from_pretrained(cls, name_or_path):
        folder = fetch(name_or_path)
        optional = lambda name: read_json(folder / name) if (folder / name).exists() else {}
        settings = optional("tokenizer_config.json")
        text = lambda t: t.get("content") if isinstance(t, dict) else t  # tokens are written in either way
        if (folder / "tokenizer.json").exists():
            spec = read_json(folder / "tokenizer.json")
            if spec["model"].get("type", "BPE") != "BPE" or (spec.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
                raise UserError(f"{folder}/tokenizer.json: only byte-level BPE is implemented, with NFC or no normaliser")
            special = {t["content"]: t["id"] for t in spec["added_tokens"]}
            alphabet = byte_alphabet()
            try:
                ranks = {bytes(alphabet[c] for c in token): i for token, i in spec["model"]["vocab"].items() if token not in special}
            except KeyError as e:
                raise UserError(f"{folder}/tokenizer.json: {e} is not in the byte-level alphabet; only byte-level BPE is implemented") from None
            pattern, nfc = split_pattern(spec["pre_tokenizer"], folder / "tokenizer.json"), bool(spec.get("normalizer"))
            bos = text(settings.get("bos_token"))
            if not (settings.get("add_bos_token") or f'"{bos}"' in json.dumps(spec.get("post_processor"), ensure_ascii=False)):
                bos = None
        elif (folder / "tokenizer.model").exists():  # Llama-3's own file: base64 and rank on each line
            try:
                lines = (folder / "tokenizer.model").read_bytes().split(b"\n")
                ranks = {base64.b64decode(t): int(i) for t, i in (line.split() for line in lines if line.strip())}
            except ValueError:
                raise UserError(f"{folder}/tokenizer.model is not a rank file (SentencePiece is not implemented)") from None
            names = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                     "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"]
            special = {name: len(ranks) + i for i, name in enumerate(names)}
            pattern, nfc, bos = LLAMA3, False, names[0]
        else:
            raise UserError(f"{folder}: neither tokenizer.json nor tokenizer.model is there")

        stop = set()
        for source in ("config.json", "generation_config.json"):
            ids = optional(source).get("eos_token_id")
            stop |= set(ids if isinstance(ids, list) else [ids])
        end = text(settings.get("eos_token"))
        stop = {i for i in stop | {special.get(end)} if i is not None}
        # Base Qwens ship a chat template too; only in a model tuned for chat does a text end with the end of a turn.
        template = {"<|im_end|>": "chatml", "<|eot_id|>": "llama3"}.get(end)
        jinja = settings.get("chat_template") or ""
        if (folder / "chat_template.jinja").exists():
            jinja = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        tok = cls(ranks, pattern, special, special.get(bos), stop, nfc, template, "enable_thinking" in str(jinja))
        tok.eos = special.get(end, tok.eos)
        return tok

    def encode(self, text):
        """Plain text to ids; names of special tokens are text like any other, and no BOS is added."""
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        return [i for i in self.encoding.encode_ordinary(text) if i < self.size]

    def decode(self, ids):
        """Ids to text. Special tokens, and ids that the vocabulary doesn't have, are left out; broken UTF-8 becomes U+FFFD."""
        return b"".join(self.bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def document(self, text):
        """What a training document looks like: BOS (if the model has one), the text, EOS."""
        return [i for i in (self.bos, *self.encode(text), self.eos) if i is not None]

    def prompt(self, text):
        """What the model reads before it writes: the text itself for a base model, one user turn for a chat model."""
        return self.chat([("user", text)]) if self.template else self.document(text)[:-1 if self.eos is not None else None]

    def chat(self, turns):
        """(role, text) turns and the opening of the assistant's, by the model's template; no default system prompt is added."""
        s, newline = self.special, self.encode("\n")
        ids = []
        for role, text in [*turns, ("assistant", None)]:
            if self.template == "llama3":
                ids += [s["<|start_header_id|>"], *self.encode(role), s["<|end_header_id|>"], *self.encode("\n\n")]
                ids += [] if text is None else [*self.encode(text.strip()), s["<|eot_id|>"]]
            else:
                ids += [s["<|im_start|>"], *self.encode(f"{role}\n")]
                ids += [] if text is None else [*self.encode(text), s["<|im_end|>"], *newline]
        if self.no_think and {"<think>", "</think>"} <= s.keys():
            ids += [s["<think>"], *self.encode("\n\n"), s["</think>"], *self.encode("\n\n")]
        return ([self.bos] if self.bos is not None else []) + ids

    def newlines(self):
        """Ids of the tokens that hold a line break."""
        return {i for i, b in self.bytes.items() if b"\n" in b}

    def banned(self, model):
        """(V,) bool: ids that the model's output layer has and the vocabulary doesn't: they must never be sampled."""
        mask = torch.ones(model.config.vocab_size, dtype=torch.bool)
        known = torch.tensor([i for i in (*self.bytes, *self.special.values()) if i < len(mask)])
        mask[known] = False
        return mask.to(model.device)


def main():
    ap = argparse.ArgumentParser(description="Show how a text is cut into tokens.")
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--text", default="Hello, world")
    args = ap.parse_args()
    tok = Tokenizer.from_pretrained(args.model)
    ids = tok.encode(args.text)
    print(" ".join(f"{i}:{tok.decode([i])!r}" for i in ids))
    print(f"{len(ids)} tokens; vocabulary {tok.size}, template {tok.template}, bos {tok.bos}, stop {sorted(tok.stop)}")


if __name__ == "__main__":
    cli(main)
