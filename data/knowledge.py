"""Domain A, knowledge incorporation: passages to learn, and questions asked without them.

A data file is a JSON list of {"title", "context", "questions": [{"question", "answer"}]}; other
keys are ignored. The paper's passages are SQuAD's. The judges say whether an answer is right: the
paper asks GPT-4.1 (--judge openai), a rule stands in for it here (`python eval.py judges FILE`
measures how well).
"""
from checkpoint import UserError, read_json
from data.judges import JUDGES
from selfedit import EMPTY, PROMPTS, QUERY, SelfEdit, Task, split_documents


def load(path, prompt="implications", judge="rule", max_documents=0, log=print):
    """Read a data file as Tasks. `judge`: a name in JUDGES, or a function like those. Malformed:
    UserError. No questions: skipped, and the log says so.

    NOTE(paper): max_documents 0 keeps all documents of a self-edit, as v1 of the paper; v2 keeps 30
    (--max-documents 30)."""
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: not a JSON list of passages, each "
                        "{title, context, questions: [{question, answer}]}")
    tasks = []
    for i, record in enumerate(records):
        if problem := malformed(record):
            raise UserError(f"{path}: record {i}: {problem}")
        if record["questions"]:
            tasks.append(knowledge_task(record, prompt, judge, max_documents))
        else:
            log(f"skipped: {path}: record {i} ({record['title']!r}) has no questions")
    if not tasks:
        raise UserError(f"{path}: no passage has questions")
    return tasks


def malformed(record):
    """What is wrong with a record, or None."""
    text = lambda value: isinstance(value, str) and value.strip()
    if not isinstance(record, dict):
        return "not an object"
    for key in ("title", "context"):
        if not text(record.get(key)):
            return f'"{key}" must be a string that is not empty'
    if not isinstance(record.get("questions"), list):
        return '"questions" must be a list of {question, answer}'
    for j, q in enumerate(record["questions"]):
        if not isinstance(q, dict) or not text(q.get("question")) or not text(q.get("answer")):
            return f'question {j} must have "question" and "answer", strings that are not empty'


def knowledge_task(record, prompt, judge, max_documents):
    """One passage as a Task."""
    title, context, questions = record["title"], record["context"], record["questions"]
    passage = f"{title}\n{context}"

    def read(text):
        pieces = split_documents(text, max_documents)
        # NOTE(paper): an edit that says nothing has a reward of 0; the official code would train
        # on the passage all the same.
        if not pieces:
            raise ValueError(EMPTY)
        return [f"{title}\n{piece}" for piece in pieces] + [passage], {}

    return Task(
        name=title, prompt=PROMPTS[prompt].format(title=title, context=context), context=[passage],
        references={"passage only": SelfEdit("", [], [passage])},
        questions=[q["question"] for q in questions], answers=[q["answer"] for q in questions],
        queries=[QUERY.format(title=title, question=q["question"]) for q in questions],
        grade=JUDGES.get(judge, judge), read=read)
