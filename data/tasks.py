"""The tasks of a run: its domain, its judge, and what fits in the model's context window."""
import random
from functools import cache

from data import arc, judges, knowledge, study, tinyarc, tinyworld
from engine.device import try_memory
from selfedit import Task, seed_for
from support.checkpoint import fetch, read_config
from support.files import UserError
from support.ranks import SharedLines

# A domain is a module with load(source, ...) -> [Task] and describe(tasks, edits) -> {part: share}.
# The loops ask nothing else of it.
DOMAINS = {"knowledge": knowledge, "arc": arc, "tinyworld": tinyworld, "tinyarc": tinyarc}


def load_data(run) -> tuple[list[Task], list[Task]]:
    """The tasks to learn from, in this run's order, and the held-out ones. Then the run settles."""
    cfg = run.cfg
    train = in_order(load_tasks(run, cfg.train_data), cfg.seed)
    held_out = load_tasks(run, cfg.eval_data)[:cfg.eval_tasks]
    run.settle("outer_loop")
    run.expect(held_out)
    if cfg.iterations * cfg.tasks > len(train):
        run.log(f"note: {cfg.iterations} rounds of {cfg.tasks} tasks, but there are "
                f"{len(train)}: some will be seen again")
    return train, held_out


def in_order(train: list[Task], seed: int) -> list[Task]:
    """The tasks to learn from, in the order that a run with this seed takes them."""
    train = list(train)
    random.Random(seed_for(seed, "order of the passages")).shuffle(train)
    return train


def load_passages(run) -> list[Task]:
    """The held-out passages. Puzzles are refused: these experiments cannot use them."""
    tasks = load_tasks(run, run.cfg.eval_data)
    if not tasks[0].context:
        raise UserError("this experiment is about passages; for puzzles: python eval.py arc")
    return tasks


def load_tasks(run, source) -> list[Task]:
    """The tasks of a source that fit in the model's context window."""
    # From config.json alone: the weights are read when something is to be computed.
    window = read_config(fetch(run.cfg.model))["max_len"]
    if run.cfg.pad_to > window:
        raise UserError(f"--pad-to {run.cfg.pad_to}: the model's window is {window}")
    tasks = []
    for task in read_tasks(run, source):
        texts = (task.prompt, task.own_prompt, *task.context, *task.queries)
        longest = max(len(run.tok.prompt(text)) for text in texts)
        if 2 * longest <= window:  # half of it is for what the model writes
            tasks.append(task)
        else:
            run.log(f"skipped: {task.name[:80]!r}: {longest} tokens are more than half of the "
                    f"model's window of {window}")
    if not tasks:
        raise UserError(f"{source}: nothing fits in the model's context window")
    return tasks


def one_task(source, index: int, prompt=None) -> Task:
    """A task of a file of passages, or of the tiny world's towns."""
    if source not in tinyworld.SPLITS:
        tasks = knowledge.load(source, prompt or "implications")
    elif prompt:
        raise UserError("--prompt: it goes with a file of passages (--data)")
    else:
        tasks = tinyworld.load(source)
    if index >= len(tasks):
        raise UserError(f"--index {index}: there are passages 0 to {len(tasks) - 1}")
    return tasks[index]


def read_tasks(run, source) -> list[Task]:
    """All tasks of a source, by the domain's own settings."""
    cfg = run.cfg
    if cfg.domain == "knowledge":
        run.judge = run.judge or judge_of(run)      # one judge for all sources of a run
        tasks = knowledge.load(source, cfg.prompt, run.judge, cfg.max_documents, run.log)
        return [study.directed(task, cfg.own_text) for task in tasks] if cfg.directives else tasks
    if cfg.domain == "tinyworld":
        return tinyworld.load(source, cfg.directives)
    return DOMAINS[cfg.domain].load(source, seed=cfg.seed, batch=cfg.inner_batch,
                                    max_examples=cfg.max_examples, n_views=cfg.views)


def judge_of(run):
    """The judge of a run's answers. What a slow one said is kept in the run's folder."""
    if run.cfg.judge == "openai":
        judges.check_openai()
        lines = SharedLines(run.folder / "judge.jsonl")
        run.shared.append(lines)
        return judges.openai_judge(lines)
    if run.cfg.judge == "model":
        base = cache(lambda: judge_model(run))
        return judges.Remembered(lambda triples: judges.model_judge(base(), run.tok, triples))
    return judges.RULES[run.cfg.judge]


def judge_model(run):
    """The base model judges in every round, so that rewards of different rounds can be compared.
    It is a second copy of the weights; on the host, if the device has no room."""
    ok, model = try_memory(lambda: run.read_model(run.cfg.model))
    if not ok:
        run.log("out of memory: the judge works on the host, slowly (--judge rule, "
                "in a new --run-dir, is faster)")
        model = run.load_pretrained(run.cfg.model, "cpu")
    return model
