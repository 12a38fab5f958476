"""Domain A, knowledge incorporation: passages to learn, questions asked without them (SQuAD, or your own).

A data file is a JSON list of {"title", "context", "questions": [{"question", "answer"}]}; other keys are ignored.
The judges say whether an answer is right. The paper asks GPT-4.1; a rule stands in for it here
(`python eval.py judges FILE` measures how well it does so).
"""
import re
import string
from collections import Counter

from model import UserError, read_json
from selfedit import PROMPTS, QUERY, Task, split_documents


def normalise(text):
    """SQuAD's normalisation: lower case, no punctuation, no articles; a list of words."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def recall_judge(question, gold, prediction):
    """Right if at least .8 of the gold answer's words are in the prediction (extra words are allowed)."""
    gold, prediction = Counter(normalise(gold)), Counter(normalise(prediction))
    return bool(prediction) and (gold & prediction).total() >= 0.8 * max(1, gold.total())


def substring_judge(question, gold, prediction):
    """Right if the normalised gold answer stands in the normalised prediction, whole words in this order."""
    gold = " ".join(normalise(gold))
    return bool(gold) and f" {gold} " in f" {' '.join(normalise(prediction))} "


JUDGES = {"rule": recall_judge, "substring": substring_judge}


def load(path, prompt="implications", judge="rule", max_documents=0, log=print):
    """Read a data file as Tasks. A passage without questions is skipped, with a line in the log; anything malformed is a UserError.

    NOTE(paper): `max_documents` 0 keeps all documents of an edit (v1 of the paper); v2 keeps 30 (--max-documents 30)."""
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: not a JSON list of passages, {{title, context, questions: [{{question, answer}}]}}")
    tasks = []
    for i, record in enumerate(records):
        if problem := malformed(record):
            raise UserError(f"{path}: record {i}: {problem}")
        title, context, questions = record["title"], record["context"], record["questions"]
        if not questions:
            log(f"skipped: {path}: record {i} ({title!r}) has no questions")
            continue
        tasks.append(knowledge_task(title, context, questions, prompt, judge, max_documents))
    if not tasks:
        raise UserError(f"{path}: no passage has questions")
    return tasks


def malformed(record):
    """What is wrong with a record, or None."""
    if not isinstance(record, dict):
        return "not an object"
    for key in ("title", "context"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            return f'"{key}" must be a string that is not empty'
    questions = record.get("questions")
    if not isinstance(questions, list):
        return '"questions" must be a list of {question, answer}'
    for j, q in enumerate(questions):
        if not isinstance(q, dict) or not all(isinstance(q.get(k), str) and q[k].strip() for k in ("question", "answer")):
            return f'question {j} must have "question" and "answer", strings that are not empty'


def knowledge_task(title, context, questions, prompt, judge, max_documents):
    passage = f"{title}\n{context}"

    def read(text):
        pieces = split_documents(text, max_documents)
        # NOTE(paper): an edit that says nothing gets reward 0 here; the official code trains on the passage alone all the same.
        return [f"{title}\n{piece}" for piece in pieces] + [passage] * bool(pieces), {}

    return Task(name=title, prompt=PROMPTS[prompt].format(title=title, context=context), context=[passage], read=read,
                questions=[q["question"] for q in questions], answers=[q["answer"] for q in questions], grade=JUDGES[judge],
                queries=[QUERY.format(title=title, question=q["question"]) for q in questions])
