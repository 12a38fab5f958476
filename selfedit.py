"""What a self-edit is: how a model is asked for one, and how it is read. For both domains.

    SE ~ LM_theta(. | C)

    python selfedit.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/example_eval.json

Paper, sections 3.1 and 3.2 and appendix B. For a passage a self-edit is text to be trained on; for
a puzzle it is a JSON object of tools and hyper-parameters (data/choices.py). A domain is a list of
`Task`s.
"""
import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Callable, Iterator

from engine.decode import Sampling, write
from model import load_pretrained
from support.checkpoint import EMBEDDED
from support.config import read_prompt
from support.files import Parser, UserError, at_least, cli, positive, printable
from support.tokenizer import Tokenizer


@dataclass
class SelfEdit:
    """What the model wrote, and what was read from it: the documents to train on.

    A document is a text, or a (prompt, completion) pair: what a model reads, what it is to write.
    Without documents nothing can be learned, and the note says why."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # as sampled, EOS included: for the M-step
    documents: list = field(default_factory=list)
    directives: dict = field(default_factory=dict)      # override the Recipe: see DIRECTIVES
    tools: list[str] = field(default_factory=list)      # that made the documents, if any did
    asks: bool = False  # a tool asks the model to write by the task's own_prompt
    made: str = ""      # what the model wrote by it
    note: str = ""


# What a self-edit may choose of its training: fields of lora.Recipe.
DIRECTIVES = ("lr", "epochs", "batch", "completion_only")
EMPTY = "nothing to learn from in this self-edit"

# (question, gold answer, prediction)s -> whether each prediction is right. Many at once, as a judge
# may be a model or a service.
Judge = Callable[[list[tuple[str, str, str]]], list[bool]]


@dataclass
class Task:
    """(C, tau): a context to learn from, and what to ask afterwards, without it."""
    name: str
    prompt: str             # C as the model reads it before it writes a self-edit
    questions: list[str]    # tau, in words
    queries: list[str]      # tau as the model reads it, without C: prompts to be answered
    answers: list[str]      # the gold answers, one per question
    judge: Judge
    # A self-edit's text -> what is read from it. ValueError: why it can't be read.
    read: Callable[[str], SelfEdit]
    # Replies to all queries -> one answer per question. `list`: each reply is an answer.
    vote: Callable[[list[str]], list[str]] = list
    own_prompt: str = ""    # by which the model itself may be a tool of self-edits
    # C as documents. Empty if every query contains the context already, as puzzles' do.
    context: list[str] = field(default_factory=list)
    # Self-edits that no model wrote, by name, to compare with: "passage only", "oracle".
    references: dict[str, SelfEdit] = field(default_factory=dict)
    # What kind of question each is, and what a line of a self-edit is: for the statistics alone.
    kinds: list[str] = field(default_factory=list)
    form: Callable[[str], str] | None = None
    unadapted: float = 0.0      # accuracy without any self-edit, which a reward may look at


# ------------------------------------------------------------------------------- prompts

# The paper's, to the letter (appendix B). A base model reads the text as it is; for a chat model it
# becomes a user's turn (Tokenizer.prompt).
PASSAGE = "\n\nPassage:\n{title}\n{context}\n\n"
OF_IMPLICATIONS = (" of implications derived directly or indirectly from the content."
                   + PASSAGE + "Implications:\n")
PROMPTS = {
    "implications": "Let's read the following passage and produce a list" + OF_IMPLICATIONS,
    "implications-long":
        "Let's read the following passage and produce a long list" + OF_IMPLICATIONS,
    "implications-very-long":
        "Let's read the following passage and produce a very long list" + OF_IMPLICATIONS,
    "rewrite":
        "Let's read the following passage and rewrite it in a few different ways, each one "
        "separated by a newline." + PASSAGE + "Rewritten passages:\n",
    "self-qa":
        "Let's read the following passage and rewrite it in a question-answer format."
        + PASSAGE + "Question 1: ",
    "none": PASSAGE.lstrip(),
}


def fill(prompt: str, title: str, context: str) -> str:
    """The prompt for a passage: one of PROMPTS by its name, or a template like them."""
    if prompt not in PROMPTS and "{context}" not in prompt:
        raise UserError(f"--prompt {prompt!r:.80}: choose among {', '.join(PROMPTS)}, or give a "
                        "--prompt-file, with {title} and {context} in it")
    # In one go: a passage may have "{title}" in it.
    parts = {"{title}": title, "{context}": context}
    return re.sub(r"{title}|{context}", lambda found: parts[found[0]], PROMPTS.get(prompt, prompt))


QUERY = ("Let's answer a question directly and concisely.\n"
         "Question: Topic: {title}\n{question}\nAnswer:\n")

# NOTE(paper): the puzzles' prompt is in our words; the official one names the same tools.
PUZZLE_PROMPT = """Choose how a model is trained on a puzzle of colour grids, to solve it.

{pairs}Tools that make more training examples of these grids:
use_basic_augmentations: rotate, flip, reflect, translate, transpose
use_size_augmentations: double the resolution, the height, the width
use_chain_augmentations: rotate, flip or transpose, then double the resolution
use_repeat_augmentations: tile
Strategies: train_using_all_tokens, train_using_output_tokens
Answer with a valid JSON object of this form, and nothing else:
{{"data_generation": {{"use_basic_augmentations": bool, "use_size_augmentations": bool, \
"use_chain_augmentations": bool, "use_repeat_augmentations": bool}}, \
"training": {{"strategy": string, "learning_rate": float, "num_train_epochs": int}}}}
"""

STUDY_PROMPT = """Choose how a model is trained on a passage, to answer questions about it later.

{context}

Tools that make texts of this passage:
{tools}
Values: {values}
Answer with a valid JSON object like this one, and nothing else:
{example}
"""

# Those on which the embedded model of the tiny world was pretrained.
NOTES = "{context}\n\nNotes:\n"
NOTES_DIRECTED = "{context}\n\nHow to study, and notes:\n"


# ------------------------------------------------------------------------------- reading

def split_documents(text: str, limit=0) -> list[str]:
    """The official splitter: a self-edit's text -> its pieces, at most `limit` of them (0: all).

    A text with 'Question N:' and 'Answer:' in it is cut before each 'Question N:', others at line
    breaks and '---'. If the second line begins with '1.', the first is taken for an introduction
    ('Sure, here is ...') and dropped; as in the official code, even if it is an item itself.
    NOTE(paper): a question and its answer stay together without numbers, too, in either order. The
    official code cuts them at the line break."""
    text = text.strip()
    if re.search(r"Question\s+\d+:", text) and "Answer:" in text:
        # The prompt of self-qa ends with 'Question 1: ', so the text begins after it.
        if not re.match(r"Question\s+\d+:", text):
            text = "Question 1: " + text
        pieces = re.split(r"\n(?=Question\s+\d+:)", text)
    elif re.search(r"(?m)^Question:", text) and re.search(r"(?m)^Answer:", text):
        first = re.search(r"(?m)^(Question|Answer):", text)[0]
        pieces = re.split(rf"\n(?={first})", text)
    else:
        pieces = [line for line in text.replace("---", "\n").splitlines() if line.strip()]
        if len(pieces) > 1 and pieces[1].strip().startswith("1."):
            del pieces[0]
    pieces = [piece.strip() for piece in pieces]
    return pieces[:limit] if limit else pieces


# ------------------------------------------------------------------------------- sampling

def seed_for(*key) -> int:
    """A generator seed that depends on its key alone, (seed, iteration, split, task, edit, ...).

    So no draw depends on the order of work, and a resumed run sees the same draws."""
    # 48 bits of a hash: keys that differ in anything have unrelated seeds.
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:6], "big")


def read_self_edit(task: Task, text: str, token_ids=(), made="") -> SelfEdit:
    """Text, sampled or from elsewhere, as a self-edit of this task. made: by a tool that asked."""
    # What can't be read still gives a SelfEdit: with a note, without documents, with reward 0.
    text = text.strip()
    try:
        edit = task.read(text)
    except ValueError as e:
        edit = SelfEdit(note=str(e))
    made = made if edit.asks else ""
    documents = edit.documents + [f"{task.name}\n{piece}" for piece in split_documents(made)]
    return replace(edit, text=text, token_ids=list(token_ids), documents=documents, made=made)


def sample_self_edits(model, tok, tasks: list[Task], sampling: Sampling, seeds: list[list[int]],
                      adapters=None, progress=None) -> Iterator[tuple[int, list[SelfEdit]]]:
    """SE ~ LM_theta(. | C): yields (a task's number, its sampling.n self-edits) as they end.

    seeds[i] are those of task i's draws, one for each self-edit. With `adapters`, adapter i writes
    task i's."""
    flat_seeds = [seed for row in seeds for seed in row]
    prompts = [[task.prompt] for task in tasks]     # a group per task: adapter i for task i
    asking = [[] for _ in tasks]    # the self-edits of a task, if one of them asks for a text
    for i, replies in write(model, tok, prompts, sampling, flat_seeds, adapters, progress):
        edits = [read_self_edit(tasks[i], reply.text, reply.token_ids) for reply in replies]
        if any(edit.asks for edit in edits):
            asking[i] = edits
        else:
            yield i, edits
    if any(asking):
        for i in write_asked(model, tok, tasks, asking, sampling, seeds, adapters):
            yield i, asking[i]


def write_asked(model, tok, tasks: list[Task], edits: list[list[SelfEdit]], sampling: Sampling,
                seeds: list[list[int]], adapters=None) -> Iterator[int]:
    """Give the self-edits of each task, if one of them asks, the texts that the model writes by the
    task's own_prompt: yields the task's number then."""
    asking = [i for i, row in enumerate(edits) if any(edit.asks for edit in row)]
    prompts = [[task.own_prompt] if i in asking else [] for i, task in enumerate(tasks)]
    own_seeds = [seed_for(seed, "asked") for i in asking for seed in seeds[i]]
    for n, replies in write(model, tok, prompts, sampling, own_seeds, adapters):
        i = asking[n]
        edits[i] = [read_self_edit(tasks[i], edit.text, edit.token_ids, reply.text)
                    for edit, reply in zip(edits[i], replies)]
        yield i


# ------------------------------------------------------------------------------- command line

def main():
    ap = Parser(description="Print self-edits of a passage.")
    ap.add_argument("--model", default=EMBEDDED, help="folder or hub id (default: the embedded)")
    ap.add_argument("--data", default="eval", help="a file of passages, or towns: tune, eval")
    ap.add_argument("--index", type=at_least(0), default=0, help="which of them (default: 0)")
    either = ap.add_mutually_exclusive_group()
    either.add_argument("--prompt", choices=PROMPTS, help="of passages (default: implications)")
    either.add_argument("--prompt-file", metavar="FILE",
                        help="a --prompt of your own: a text with {title} and {context} in it")
    ap.add_argument("--edits", type=positive, default=3, help="how many (default: 3)")
    args = ap.parse_args()
    own = read_prompt(args.prompt_file) if args.prompt_file else args.prompt
    from data.tasks import one_task     # only here: what a self-edit is needs no data
    prompt = one_task(args.data, args.index, own).prompt
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    print(printable(prompt))
    # Each self-edit has a seed of its own, so that --edits 4 has the three of --edits 3 in it.
    sampling = Sampling(200, args.edits, temperature=0.8, top_p=0.95)
    seeds = [seed_for(0, j) for j in range(args.edits)]
    ((_, replies),) = write(model, tok, [[prompt]], sampling, seeds)
    for j, reply in enumerate(replies):
        print(f"--- self-edit {j}: {len(reply.token_ids)} tokens, "
              f"{len(split_documents(reply.text))} pieces\n{printable(reply.text)}")


if __name__ == "__main__":
    cli(main)
