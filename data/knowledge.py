"""Domain A, knowledge incorporation: passages to learn, and questions asked without them.

Paper, section 3.1. A data file is a JSON list of {"title", "context", "questions": [{"question",
"answer"}]}; other keys are ignored. The paper's passages are SQuAD's.
"""
from files import UserError, printable, read_json
from data.judges import RULES, normalise
from selfedit import EMPTY, PROMPTS, QUERY, SelfEdit, Task, split_documents

MAX_CHARACTERS = 1_000_000      # of a text: a tokenizer may overflow its stack on more
A_TEXT = f"a string of 1 to {MAX_CHARACTERS:,} characters, not only blanks"


def load(path, prompt="implications", judge=RULES["rule"], max_documents=0, log=print):
    """Read a data file as Tasks. UserError if it is malformed; a passage without questions is
    skipped, and the log says so.

    NOTE(paper): max_documents 0 keeps all documents of a self-edit, as v1 of the paper; v2 keeps 30
    (--max-documents 30)."""
    records = read_json(path)
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: not a JSON list of passages, each "
                        "{title, context, questions: [{question, answer}]}")
    tasks = []
    for i, record in enumerate(records):
        problem = malformed(record)
        if problem:
            raise UserError(f"{path}: record {i}: {problem}")
        if record["questions"]:
            tasks.append(knowledge_task(record, prompt, judge, max_documents))
        else:
            title = printable(record["title"], 60)
            log(f"skipped: {path}: record {i} ({title!r}) has no questions")
        # A model that judges may know better than a rule, which compares words.
        for j, answer in enumerate(q["answer"] for q in record["questions"]):
            if judge in RULES.values() and not normalise(answer):
                log(f"note: {path}: record {i}, question {j}: gold answer "
                    f"{printable(answer, 60)!r} has no word in it: no answer can be right")
    if not tasks:
        raise UserError(f"{path}: no passage has questions")
    return tasks


def malformed(record):
    """What is wrong with a record, or None."""
    def is_text(value):
        return isinstance(value, str) and value.strip() and len(value) <= MAX_CHARACTERS

    if not isinstance(record, dict):
        return "not an object"
    for key in ("title", "context"):
        if not is_text(record.get(key)):
            return f'"{key}" must be {A_TEXT}'
    if not isinstance(record.get("questions"), list):
        return '"questions" must be a list of {question, answer}'
    for j, q in enumerate(record["questions"]):
        whole = isinstance(q, dict) and is_text(q.get("question")) and is_text(q.get("answer"))
        if not whole:
            return f'question {j} must have "question" and "answer", each {A_TEXT}'
    return None


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
        prompt=PROMPTS[prompt].format(title=title, context=context),
        context=[passage],
        questions=questions,
        queries=[QUERY.format(title=title, question=question) for question in questions],
        answers=[q["answer"] for q in record["questions"]],
        judge=judge,
        read=read,
        references={"passage only": SelfEdit(documents=[passage])})


def describe(tasks, edits):
    """What self-edits are made of, for the statistics: nothing is counted in this domain."""
    return {}
