"""Plain text to learn from: files, or folders of them, cut into passages."""
import re
from pathlib import Path

from data.judges import normalise
from selfedit import QUERY, SelfEdit, Task, fill, split_documents
from support.files import UserError, read_text

LONGEST = 200   # tokens of a passage


def load(names, count, longest=LONGEST) -> list[tuple[str, str]]:
    """(title, passage) of text files and of all files in folders. UserError if one is no text.

    count(text): its tokens, of which a passage has at most `longest`."""
    paths = []
    for name in map(Path, names):
        inside = sorted(path for path in name.rglob("*") if path.is_file()) if name.is_dir() else []
        paths += inside or [name]
    found = []
    for path in paths:
        title = re.sub(r"[_-]+", " ", path.stem)
        found += [(title, passage) for passage in passages(read_text(path), count, longest)]
    if not found:
        raise UserError(f"{', '.join(map(str, names))}: there is no text in it")
    return found


def passages(text: str, count, longest=LONGEST) -> list[str]:
    """Whole paragraphs together, and whole sentences of long ones, up to `longest` tokens."""
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        if fits(paragraph, count, longest):
            pieces.append(paragraph)
        else:
            for sentence in sentences(paragraph):
                pieces += cut(sentence, count, longest)
    found, size = [""], 0
    for piece in filter(None, pieces):
        n = count(piece)
        if size + n > longest:
            found.append("")
            size = 0
        # Chinese and Japanese have no blank between sentences.
        blank = " " if found[-1] and found[-1][-1] not in "。！？｡" else ""
        found[-1] += blank + piece
        size += n
    return [passage for passage in found if passage]


def fits(text: str, count, longest: int) -> bool:
    # Few tokens have more than 16 characters: what is much longer need not be counted.
    return len(text) <= 16 * longest and count(text) <= longest


def cut(text: str, count, longest: int) -> list[str]:
    """A text in parts that fit: cut at the last blank of its first half, or else in its middle."""
    if fits(text, count, longest) or len(text) < 2:
        return [text]
    middle = len(text) // 2
    at = text.rfind(" ", 1, middle)
    if at < 0:
        at = middle
    return cut(text[:at].strip(), count, longest) + cut(text[at:].strip(), count, longest)


def sentences(passage: str) -> list[str]:
    """They end at . ! or ? and a blank, or at another script's full stop, which needs no blank."""
    ends = r"(?<=[.!?])\s+|(?<=[。！？｡।॥؟۔])(?![」』”’）])\s*"
    return [s for s in re.split(ends, passage) if s]


def as_task(title: str, passage: str, prompt="implications") -> Task:
    """A passage that is to be learned. It has no questions."""
    return Task(
        name=title, prompt=fill(prompt, title, passage),
        context=[f"{title}\n{passage}"], questions=[], queries=[], answers=[], judge=None,
        read=lambda text: SelfEdit(documents=[f"{title}\n{s}" for s in split_documents(text)]))


def as_question(question: str, texts: list[tuple[str, str]]) -> Task:
    """A question about these passages; its context is the one that has most of its words."""
    def shared(text):
        return len(words & set(normalise(" ".join(text))))

    words = set(normalise(question))
    title, passage = max(texts, key=shared)
    return Task(
        name=question, prompt="", context=[f"{title}\n{passage}"], questions=[question],
        queries=[QUERY.format(title=title, question=question)], answers=[""], judge=None, read=None)
