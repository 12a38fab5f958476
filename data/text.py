"""Plain text to learn from: files, or folders of them, cut into passages."""
import re
from pathlib import Path

from selfedit import QUERY, SelfEdit, Task, fill, split_documents
from support.files import UserError, read_text

LONGEST = 150   # words of a passage


def load(names) -> list[tuple[str, str]]:
    """(title, passage) of text files and of all files in folders. UserError if one is no text."""
    paths = []
    for name in map(Path, names):
        inside = sorted(path for path in name.rglob("*") if path.is_file()) if name.is_dir() else []
        paths += inside or [name]
    found = []
    for path in paths:
        title = re.sub(r"[_-]+", " ", path.stem)
        found += [(title, passage) for passage in passages(read_text(path))]
    if not found:
        raise UserError(f"{', '.join(map(str, names))}: there is no text in it")
    return found


def passages(text: str) -> list[str]:
    """Whole paragraphs together, and whole sentences of long ones, up to LONGEST words."""
    pieces = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = " ".join(paragraph.split())
        pieces += [paragraph] if len(paragraph.split()) <= LONGEST else sentences(paragraph)
    found = [""]
    for piece in filter(None, pieces):
        if len(found[-1].split()) + len(piece.split()) > LONGEST:
            found.append("")
        found[-1] = f"{found[-1]} {piece}".strip()
    return [passage for passage in found if passage]


def sentences(passage: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])\s+", passage) if s]


def as_task(title: str, passage: str, prompt="implications") -> Task:
    """A passage that is to be learned. It has no questions."""
    return Task(
        name=title, prompt=fill(prompt, title, passage),
        context=[f"{title}\n{passage}"], questions=[], queries=[], answers=[], judge=None,
        read=lambda text: SelfEdit(documents=[f"{title}\n{s}" for s in split_documents(text)]))


def as_question(question: str, texts: list[tuple[str, str]]) -> Task:
    """A question about these passages; its context is the one that has most of its words."""
    def shared(text):
        return len(words & set(re.findall(r"\w+", " ".join(text).lower())))

    words = set(re.findall(r"\w+", question.lower()))
    title, passage = max(texts, key=shared)
    return Task(
        name=question, prompt="", context=[f"{title}\n{passage}"], questions=[question],
        queries=[QUERY.format(title=title, question=question)], answers=[""], judge=None, read=None)
