"""What a self-edit is: the prompts, sampling K of them per context, and reading one as training documents and directives.

    python selfedit.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/example_eval.json     # print a passage's self-edits

Paper, section 3.1 and appendix B. A domain (data/knowledge.py is the first) gives the loops a list of `Task`s; the loops ask
nothing else of it. Simplified: the prompts' few-shot variants are not here.
"""
import argparse, hashlib, re
from dataclasses import dataclass, field
from typing import Callable

from model import UserError, cli, generate, load_pretrained


@dataclass
class Task:
    """(C, tau): a context to learn from, and what to ask afterwards, without it."""
    name: str
    prompt: str                 # C as the model reads it before it writes a self-edit
    questions: list[str]        # tau, in words
    queries: list[str]          # tau as the model reads it: each question in its prompt, without C
    answers: list[str]          # the gold answers
    grade: Callable             # (question, gold answer, prediction) -> bool
    read: Callable              # self-edit text -> (training documents, directives); no documents: nothing to learn from
    context: list[str]          # the documents of C itself: what 'passage only' trains on


@dataclass
class SelfEdit:
    text: str
    token_ids: list[int]        # exactly as sampled, EOS included if it was sampled: what the M-step trains on
    documents: list[str] = field(default_factory=list)
    directives: dict = field(default_factory=dict)  # may override the inner loop's lr and epochs


# The paper's prompts, to the letter (base models, no chat template).
READ = "Let's read the following passage and "
PASSAGE = "\n\nPassage:\n{title}\n{context}\n\n"
PROMPTS = {
    "implications": READ + "produce a list of implications derived directly or indirectly from the content." + PASSAGE + "Implications:\n",
    "implications-long": READ + "produce a long list of implications derived directly or indirectly from the content." + PASSAGE + "Implications:\n",
    "implications-very-long": READ + "produce a very long list of implications derived directly or indirectly from the content." + PASSAGE + "Implications:\n",
    "rewrite": READ + "rewrite it in a few different ways, each one separated by a newline." + PASSAGE + "Rewritten passages:\n",
    "self-qa": READ + "rewrite it in a question-answer format." + PASSAGE + "Question 1: ",
    "none": "Passage:\n{title}\n{context}\n\n",
}
QUERY = "Let's answer a question directly and concisely.\nQuestion: Topic: {title}\n{question}\nAnswer:\n"


def split_documents(text, limit=0):
    """The official splitter: a self-edit's text -> its pieces, one training document each; at most `limit` if that is not 0.

    Question-answer edits are cut before each 'Question N:', anything else at line breaks and '---'. The first piece is
    dropped if a numbered list begins with the second ('Sure, here is ...')."""
    text = text.strip()
    if re.search(r"Question\s+\d+:", text) and "Answer:" in text:
        pieces = re.split(r"\n(?=Question\s+\d+:)", text)
        if not re.match(r"Question\s+\d+:", pieces[0]):
            pieces[0] = "Question 1: " + pieces[0]  # the prompt ends with these words
    else:
        pieces = [line.strip() for line in text.replace("---", "\n").splitlines() if line.strip()]
        pieces = pieces[1:] if len(pieces) > 1 and pieces[1].startswith("1.") else pieces
    pieces = [p.strip() for p in pieces if p.strip()]
    return pieces[:limit] if limit else pieces


def seed_for(*key):
    """A generator seed that depends on nothing but its key, such as (seed, iteration, task, edit, purpose)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "big")


def sample_self_edits(model, tok, tasks, k, seeds, temperature=1.0, top_p=0.95, max_new=2048, progress=lambda done, total: None):
    """SE ~ LM_theta(. | C): k self-edits for each task; task i's draw from generators seeded seeds[i][0..k-1]."""
    prompts = [tok.prompt(task.prompt) for task in tasks]
    room = model.config.max_len - max(map(len, prompts), default=0)
    rows = generate(model, prompts, min(max_new, room), tok.stop, n=k, temperature=temperature, top_p=top_p,
                    seeds=[s for row in seeds for s in row], banned=tok.banned(model), progress=progress)
    edits = [read_self_edit(tasks[i // k], tok.decode(ids), ids) for i, ids in enumerate(rows)]
    return [edits[i:i + k] for i in range(0, len(edits), k)]


def read_self_edit(task, text, token_ids=()):
    """Text (sampled, or from elsewhere) as a SelfEdit of this task."""
    documents, directives = task.read(text.strip())
    return SelfEdit(text.strip(), list(token_ids), documents, directives)


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
    tasks = knowledge.load(args.data, prompt=args.prompt)
    if not 0 <= args.index < len(tasks):
        raise UserError(f"--index {args.index}: {args.data} has passages 0 to {len(tasks) - 1}")
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    print(tasks[args.index].prompt)
    seeds = [[seed_for(0, j) for j in range(args.edits)]]
    for j, edit in enumerate(sample_self_edits(model, tok, [tasks[args.index]], args.edits, seeds, args.temperature, max_new=args.max_new)[0]):
        print(f"--- self-edit {j}: {len(edit.token_ids)} tokens, {len(edit.documents)} documents (the passage included)\n{edit.text}")


if __name__ == "__main__":
    cli(main)
