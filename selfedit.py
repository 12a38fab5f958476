"""What a self-edit is: the prompts, sampling K of them per context, and reading one as training
documents and update directives.

    python selfedit.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/example_eval.json

Paper, section 3.1 and appendix B. A domain (data/knowledge.py, data/arc.py) is a list of `Task`s;
the loops ask nothing else of it.
"""
import argparse
import hashlib
import re
from dataclasses import dataclass, field
from typing import Callable

from checkpoint import UserError, cli
from generate import generate
from model import load_pretrained


@dataclass
class SelfEdit:
    """A document is a text, or a (prompt, completion) pair: what a model reads, what it is to
    write. No documents: nothing can be learned from it, and the note says why."""
    text: str
    token_ids: list[int]  # exactly as sampled, EOS included: what the M-step trains on
    documents: list = field(default_factory=list)
    directives: dict = field(default_factory=dict)  # those that are a Recipe's fields override it
    note: str = ""


@dataclass
class Task:
    """(C, tau): a context to learn from, and what to ask afterwards, without it."""
    name: str
    prompt: str           # C as the model reads it before it writes a self-edit
    questions: list[str]  # tau, in words
    queries: list[str]    # tau as the model reads it: each question in its prompt, without C
    answers: list[str]    # the gold answers
    grade: Callable       # (question, gold answer, prediction) -> bool
    read: Callable        # self-edit's text -> (documents, directives); ValueError: why it can't be
    vote: Callable = list  # replies to the queries -> an answer per question
    context: list[str] = field(default_factory=list)  # C as documents; none if the queries show it
    references: dict[str, SelfEdit] = field(default_factory=dict)  # to compare with; no model's
    kinds: list[str] = field(default_factory=list)  # of the questions, for the statistics
    form: Callable | None = None  # a line of a self-edit -> what kind of line, for the statistics


# The paper's prompts, to the letter (base models, no chat template).
_PROMPT = "Let's read the following passage and {}\n\nPassage:\n{{title}}\n{{context}}\n\n{}"
_LIST = "produce a {}list of implications derived directly or indirectly from the content."
PROMPTS = {
    "implications": _PROMPT.format(_LIST.format(""), "Implications:\n"),
    "implications-long": _PROMPT.format(_LIST.format("long "), "Implications:\n"),
    "implications-very-long": _PROMPT.format(_LIST.format("very long "), "Implications:\n"),
    "rewrite": _PROMPT.format("rewrite it in a few different ways, each one separated by a "
                              "newline.", "Rewritten passages:\n"),
    "self-qa": _PROMPT.format("rewrite it in a question-answer format.", "Question 1: "),
    "none": "Passage:\n{title}\n{context}\n\n",
}
EMPTY = "nothing to learn from in this self-edit"
QUERY = ("Let's answer a question directly and concisely.\n"
         "Question: Topic: {title}\n{question}\nAnswer:\n")


def split_documents(text, limit=0):
    """The official splitter: a self-edit's text -> its pieces; at most `limit`, if that is not 0.

    Question-answer edits are cut before each 'Question N:', anything else at line breaks and '---'.
    The first piece is dropped if a numbered list begins with the second ('Sure, here is ...')."""
    text = text.strip()
    if re.search(r"Question\s+\d+:", text) and "Answer:" in text:
        if not re.match(r"Question\s+\d+:", text):
            text = "Question 1: " + text  # the prompt ends with these words
        pieces = re.split(r"\n(?=Question\s+\d+:)", text)
    else:
        pieces = [line for line in text.replace("---", "\n").splitlines() if line.strip()]
        if len(pieces) > 1 and pieces[1].strip().startswith("1."):
            del pieces[0]
    pieces = [piece.strip() for piece in pieces]
    return pieces[:limit] if limit else pieces


def seed_for(*key):
    """A generator seed that depends on its key alone: (seed, iteration, task, edit, purpose)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "big")


def read_self_edit(task, text, token_ids=()):
    """Text, sampled or from elsewhere, as a SelfEdit of this task."""
    edit = SelfEdit(text.strip(), list(token_ids))
    try:
        edit.documents, edit.directives = task.read(edit.text)
    except ValueError as e:
        edit.note = str(e)
    return edit


def sample_self_edits(model, tok, tasks, k, seeds, temperature=1.0, top_p=0.95, max_new=2048,
                      progress=lambda done, total: None, adapters=None):
    """SE ~ LM_theta(. | C): k self-edits of each task; those of task i are drawn with seeds[i], and
    with `adapters` under slot i."""
    prompts = [tok.prompt(task.prompt) for task in tasks]
    room = model.config.max_len - max(map(len, prompts))
    rows = generate(model, prompts, min(max_new, room), tok.stop, k, temperature, top_p,
                    [s for row in seeds for s in row], banned=tok.banned(model), progress=progress,
                    adapters=adapters, slots=range(len(tasks)) if adapters else None)
    edits = [read_self_edit(tasks[i // k], tok.decode(ids), ids) for i, ids in enumerate(rows)]
    return [edits[i:i + k] for i in range(0, len(edits), k)]


def main():
    from data import knowledge
    from tokenizer import Tokenizer
    ap = argparse.ArgumentParser(description="Print self-edits of a passage.")
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--data", required=True, help="JSON list of passages")
    ap.add_argument("--index", type=int, default=0, help="which passage")
    ap.add_argument("--prompt", default="implications", choices=PROMPTS)
    ap.add_argument("--edits", type=int, default=2)
    ap.add_argument("--max-new", type=int, default=200)
    ap.add_argument("--temperature", type=float, default=1.0)
    args = ap.parse_args()
    task = pick(knowledge.load(args.data, prompt=args.prompt), args.index)
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    print(task.prompt)
    seeds = [[seed_for(0, j) for j in range(args.edits)]]
    (edits,) = sample_self_edits(model, tok, [task], args.edits, seeds, args.temperature,
                                 max_new=args.max_new)
    for j, edit in enumerate(edits):
        print(f"--- self-edit {j}: {len(edit.token_ids)} tokens, {len(edit.documents)} documents, "
              f"the passage included\n{edit.text}")


def pick(tasks, index):
    if not 0 <= index < len(tasks):
        raise UserError(f"--index {index}: there are passages 0 to {len(tasks) - 1}")
    return tasks[index]


if __name__ == "__main__":
    cli(main)
