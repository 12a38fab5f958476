"""Domain A, knowledge incorporation: passages to learn, and questions asked without them.

Paper, section 3.1. A data file is a JSON list of {"title", "context", "questions": [{"question",
"answer"}]}; other keys are ignored. The authors released such lists. Their passages are SQuAD's,
whose own JSON is read as well. `python -m data.knowledge fetch squad` writes such a list of it.
"""
import hashlib
import json
import random
import re
import urllib.request
from collections import defaultdict
from pathlib import Path

from data.choices import describe  # noqa: F401 (text has no choices: {})
from data.judges import RULES, normalise
from selfedit import EMPTY, QUERY, SelfEdit, Task, fill, split_documents
from support.files import (Parser, UserError, check, cli, positive, printable, read_json,
                           replace_file)

MAX_CHARACTERS = 1_000_000      # of a text: a tokenizer may overflow its stack on more
A_TEXT = f"a string of 1 to {MAX_CHARACTERS:,} characters, not only blanks"
# SQuAD's home, not the hub: rajpurkar/squad is Parquet there, which takes pyarrow; this is JSON.
SITE = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
# split: (file, the first half of its SHA-256)
SQUAD = {"train": ("train-v1.1.json", "3527663986b8295af4f7fcdff1ba1ff3"),
         "validation": ("dev-v1.1.json", "95aa6a52d5d6a735563366753ca50492")}


def load(path, prompt="implications", judge=RULES["rule"], max_documents=0, log=print):
    """Read a data file as Tasks. UserError if it is malformed; a passage without questions is
    skipped, and the log says so.

    NOTE(paper): max_documents 0 keeps all documents of a self-edit, as v1 of the paper; v2 keeps 30
    (--max-documents 30)."""
    if Path(path).suffix.lower() in (".txt", ".md") and Path(path).is_file():
        raise UserError(f"{path}: plain text has no questions, and a reward needs some; such a "
                        f"file is learned by `python -m tools.learn {path}`")
    tasks = []
    for place, record in records(read_json(path), path):
        if record["questions"]:
            tasks.append(knowledge_task(record, prompt, judge, max_documents))
        else:
            log(printable(f"skipped: {place} ({record['title'][:60]!r}) has no questions"))
        # A model that judges may know better than a rule, which compares words.
        for j, answer in enumerate(q["answer"] for q in record["questions"]):
            if judge in RULES.values() and not normalise(answer):
                log(printable(f"note: {place}, question {j}: gold answer {answer[:60]!r} has no "
                              "word in it: only the same text is right"))
    if not tasks:
        raise UserError(f"{path}: no passage has questions")
    return tasks


def records(content, path):
    """(place, record) of each passage in a data file's JSON. UserError names the place."""
    if isinstance(content, dict) and "data" in content:
        found = squad_records(content, path)
    elif isinstance(content, list) and content:
        found = [(f"{path}: record {i}", record) for i, record in enumerate(content)]
    else:
        raise UserError(f"{path}: not a JSON list of passages, each {{title, context, questions: "
                        "[{question, answer}]}, and not SQuAD's JSON")
    for place, record in found:
        problem = malformed(record)
        if problem:
            raise UserError(f"{place}: {problem}")
        yield place, record


def malformed(record):
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return "not an object"
    for key in ("title", "context"):
        if not is_text(record.get(key)):
            return f'"{key}" must be {A_TEXT}'
    if not isinstance(record.get("questions"), list):
        return '"questions" must be a list of {question, answer}'
    for j, q in enumerate(record["questions"]):
        if not (isinstance(q, dict) and is_text(q.get("question")) and is_text(q.get("answer"))):
            return f'question {j} must have "question" and "answer", each {A_TEXT}'
    return None


def is_text(value):
    return isinstance(value, str) and value.strip() and len(value) <= MAX_CHARACTERS


def squad_records(content, path):
    """(place, record) of each paragraph of SQuAD. Titles and contexts are not checked yet."""
    for spot, article in items(content, "data", path):
        for place, paragraph in items(article, "paragraphs", spot):
            questions = list(squad_questions(paragraph, place))
            title, context = article.get("title"), paragraph.get("context")
            if isinstance(title, str):      # "Nikola_Tesla"; the authors' files have a blank
                title = title.replace("_", " ")
            yield place, {"title": title, "context": context, "questions": questions}


def squad_questions(paragraph, place):
    """The questions that have an answer. Several people's may be there: the first is taken."""
    for spot, qa in items(paragraph, "qas", place):
        answers = items(qa, "answers", spot)
        # v2.0 also asks what the passage does not say: no measure of learning, nor is a blank.
        if answers and not qa.get("is_impossible") and str(qa.get("question")).strip():
            _, answer = answers[0]
            text = answer.get("text") if isinstance(answer, dict) else None
            if not is_text(qa.get("question")) or not is_text(text):
                raise UserError(f'{spot}: "question" and "text" must each be {A_TEXT}')
            yield {"question": qa["question"].strip(), "answer": text}


def items(value, key, place):
    """(place, item) of the list that an object has under a key. UserError if there is none."""
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise UserError(f'{place}: "{key}" must be a list, as in SQuAD')
    return [(f"{place}: {key} {i}", item) for i, item in enumerate(found)]


def fetch_squad(split, passages, seed, out):
    """Write passages of SQuAD v1.1 as a data file, in their order: all (None), or so many, drawn at
    random. UserError if the file is there already, or SQuAD can't be downloaded."""
    out = Path(out)
    if out.exists():
        raise UserError(f"{out} exists already; nothing was overwritten")
    content = json.loads(download(*SQUAD[split]))
    questions = {}      # of (title, context), as some paragraphs are there twice
    for _, record in records(content, split):
        passage = (record["title"], record["context"])
        questions[passage] = questions.get(passage, []) + record["questions"]
    found = [{"title": title, "context": context, "questions": asked}
             for (title, context), asked in questions.items() if asked]
    if passages and passages > len(found):
        raise UserError(f"--passages {passages}: there are {len(found)}")
    drawn = random.Random(seed).sample(range(len(found)), passages or len(found))
    chosen = [found[i] for i in sorted(drawn)]
    replace_file(out, json.dumps(chosen, ensure_ascii=False, indent=1))
    print(f"{printable(out)}: {len(chosen)} of {len(found)} passages (SQuAD v1.1, CC BY-SA 4.0)")


def download(name, known) -> bytes:
    """A file of SITE. UserError if it does not come, or not with the hash that is known."""
    try:
        with urllib.request.urlopen(f"{SITE}/{name}", timeout=60) as reply:
            content = reply.read()
        if hashlib.sha256(content).hexdigest()[:32] != known:
            raise ValueError("its SHA-256 is not the known one")
        return content
    except Exception as e:      # a transport has many
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise UserError(f"{SITE}/{name} could not be fetched ({why}); download it elsewhere and "
                        "pass it as --train-data: it is read as it is") from None


def knowledge_task(record, prompt, judge, max_documents):
    """One passage as a Task."""
    title, context = record["title"], record["context"]
    passage = f"{title}\n{context}"

    def read(text):
        pieces = split_documents(text, max_documents)
        # NOTE(paper): an edit that says nothing has a reward of 0; the official code would train
        # on the passage all the same.
        if not pieces:
            raise ValueError(EMPTY)
        return SelfEdit(documents=[f"{title}\n{piece}" for piece in pieces] + [passage])

    questions = [q["question"] for q in record["questions"]]
    return Task(
        name=title,
        prompt=fill(prompt, title, context),
        context=[passage],
        questions=questions,
        queries=[QUERY.format(title=title, question=question) for question in questions],
        answers=[q["answer"] for q in record["questions"]],
        judge=judge,
        read=read,
        references={"passage only": SelfEdit(documents=[passage])})


# The rows that eval.py's tables have themselves.
OWN_ROWS = ("no adaptation|passage only(, step-matched)?|its own self-edits|passage in the prompt"
            r"|self-edits after round \d+")


def read_edits(files, tasks: list[Task]) -> dict[str, list[str]]:
    """{kind: [a text per task]} of the self-edits that JSON files hold for these passages.

    A record has "title", "context" and "edits": {kind: text}; or as the authors released them,
    "completions": [text, ...], or "released": {kind: {"edit": text}}."""
    # kind -> passage -> text
    found = defaultdict(dict)
    for file in files:
        content = read_json(file)
        if not isinstance(content, list):
            raise UserError(f"{file}: not a JSON list of passages, each "
                            "{title, context, edits: {kind: text}}")
        for i, record in enumerate(content):
            place = f"{file}: record {i}"
            for kind, text in edits_of(record, place).items():
                passage = record["title"] + "\n" + record["context"]
                if found[kind].setdefault(passage, text) != text:
                    raise UserError(f"{place}: a second {kind!r} self-edit of the same passage, "
                                    "with another text")
        if not any(edits_of(record, file) for record in content):
            raise UserError(f'{file}: no self-edit in it; a record must have "edits": {{kind: '
                            'text}, or "completions": [text], or "released"')
    for kind, texts in found.items():
        lacking = [task.name for task in tasks if task.context[0] not in texts]
        if lacking:
            raise UserError(f"no {kind} self-edit of {lacking[0][:80]!r} in "
                            f"{', '.join(map(str, files))}")
    return {kind: [texts[task.context[0]] for task in tasks] for kind, texts in found.items()}


def edits_of(record, place) -> dict[str, str]:
    """{kind: text} of a record. UserError: what is wrong with it."""
    forms = {"edits": {str: str}, "completions": [str], "released": {str: {"edit?": str}}}
    try:
        check(record, {"title": str, "context": str})
        check(record, {name + "?": kind for name, kind in forms.items()})
    except ValueError as e:
        raise UserError(f"{place}: {e}") from None
    edits = record.get("edits")
    if not edits:
        edits = {f"completion {n}": text for n, text in enumerate(record.get("completions", ()), 1)}
        for kind, released in record.get("released", {}).items():
            if released.get("edit"):
                edits[kind] = released["edit"]
    # A kind is the name of a table's row.
    for kind in edits:
        if not kind.strip() or not kind.isprintable():
            raise UserError(f"{place}: a kind of self-edit must be a name that can be printed")
        if re.fullmatch(OWN_ROWS, kind.strip(), re.IGNORECASE):
            raise UserError(f"{place}: {kind!r} is the name of a row of its own; call this kind of "
                            "self-edit something else")
    return edits


def main():
    ap = Parser(description="Fetch SQuAD's passages as a data file.")
    ap.add_argument("action", choices=["fetch"])
    ap.add_argument("source", choices=["squad"])
    ap.add_argument("--split", choices=list(SQUAD), default="train")
    ap.add_argument("--passages", type=positive, help="so many, drawn at random (default: all)")
    ap.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    ap.add_argument("--out", metavar="FILE", help="to write (default: squad_SPLIT.json)")
    args = ap.parse_args()
    fetch_squad(args.split, args.passages, args.seed, args.out or f"squad_{args.split}.json")


if __name__ == "__main__":
    cli(main)
