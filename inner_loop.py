"""The inner loop: what a self-edit is worth, for many self-edits at once.

    theta' <- SFT(theta, SE);    Ans ~ LM_theta'(. | tau);    r <- r(Ans, tau)

    python inner_loop.py                        # a town that the embedded model never saw
    python inner_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --learn notes.txt --ask "..."

Paper, section 3. `update_and_score` is these three lines of Algorithm 1. The base model is never
changed: theta' is the base with an adapter (lora.py), trained by engine/train.py.
"""
import math
import re
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Iterable, Iterator

from data import knowledge, text, tinyworld     # for the command line only
from engine.decode import Sampling, collect, quiet, split_into, write
from engine.memory import auto_answering, in_halves
from engine.train import Trained, sft
from lora import Adapters, Job, Lora, PROJECTIONS, Recipe, dialogue
from model import load_pretrained
from selfedit import DIRECTIVES, EMPTY, SelfEdit, Task
from selfedit import read_self_edit, sample_self_edits, seed_for
from support.checkpoint import EMBEDDED
from support.files import Parser, UserError, at_least, cli, positive, printable, read_text
from support.progress import Meter
from support.tokenizer import Tokenizer

ANSWERS = Sampling(max_new=64, newline_stops=True)


# ------------------------------------------------------------------------------- theta'

def make_job(model, tok, edit: SelfEdit, seed: int, recipe: Recipe) -> Job:
    """The SFT job of a self-edit: examples of its documents, a recipe with its directives.

    A text longer than the context window is cut; a (prompt, completion) pair longer than it is left
    out. ValueError: why nothing can be learned.
    NOTE(paper): a document ends with one EOS, which is learned. The official code pads every row
    with EOS to 2048 tokens, and about 98 % of its targets are pads: --pad-to 2048."""
    if not edit.documents:
        raise ValueError(edit.note or EMPTY)
    # A self-edit may choose some hyper-parameters of its own training, and no others.
    unknown = set(edit.directives) - set(DIRECTIVES)
    if unknown:
        raise ValueError(f"a self-edit can't choose {', '.join(sorted(unknown))}")
    recipe = replace(recipe, **edit.directives)

    # A text is learned whole. Of a pair the prompt is read, and the completion learned.
    examples = []
    for document in edit.documents:
        if isinstance(document, str):
            ids = tok.document(document)[:model.config.max_len]
            examples.append((ids, [True] * len(ids)))
        else:
            # The model learns to end its reply, so EOS is part of the completion.
            prompt, completion = document
            completion_ids = [*tok.encode(completion), tok.eos]
            ids, learn = dialogue(tok.prompt(prompt), completion_ids, recipe.completion_only)
            if len(ids) <= model.config.max_len:
                examples.append((ids, learn))
    if not examples:
        raise ValueError("no example of this self-edit fits in the model's context window")
    # What a model writes decides how much there is to do: within bounds.
    job = Job(examples, seed, recipe)
    for what, asked, most in (("steps", job.steps, recipe.max_steps),
                              ("tokens", job.tokens, recipe.max_tokens)):
        if most and asked > most:
            raise ValueError(f"asks for {asked} {what} of training, more than {most}")
    return job


# ------------------------------------------------------------------------------- answers

@dataclass
class Answers:
    """What a model answers to a task."""
    texts: list[str]    # one per question
    cut: int            # how many replies ran to the cap


def ask(model, tok, groups: list[list[Task]], sampling: Sampling = ANSWERS,
        adapters: Adapters | None = None) -> list[list[Answers]]:
    """Ans ~ LM(. | tau): each task's queries answered without its context, all in one batch.

    Tasks come in groups, and Answers go in the same groups. With `adapters`, group i is answered
    under adapter i.
    NOTE(paper): generation stops at EOS and, with newline_stops, also at a line break after the
    first token; the official code stops at EOS only (--stop eos)."""
    # A task may ask each question in several ways (puzzles do): its `vote` makes answers of them.
    queries = [list(chain.from_iterable(task.queries for task in tasks)) for tasks in groups]
    written = write(model, tok, queries, sampling, adapters=adapters)

    # The replies of a group come in one list: cut it up by task.
    answers = []
    for tasks, replies in zip(groups, written):
        answers.append([])
        own_replies = split_into(replies, [len(task.queries) for task in tasks])
        for task, own in zip(tasks, own_replies):
            texts = task.vote([reply.text for reply in own])
            answers[-1].append(Answers(texts, sum(reply.cut for reply in own)))
    return answers


def in_prompt(tasks: list[Task]) -> list[Task]:
    """The same tasks with their context in front of every query."""
    with_context = []
    for task in tasks:
        queries = ["\n\n".join([*task.context, query]) for query in task.queries]
        with_context.append(replace(task, queries=queries))
    return with_context


def grade_all(tasks: list[Task], answers: list[list[str]]) -> list[list[bool]]:
    """r(Ans, tau): which questions are answered correctly, per task. Their mean is the accuracy.

    An empty answer is wrong. A judge sees all of its answers at once, as it may be slow."""
    # Collect for each judge the places of the answers that it is to see, then fill in its verdicts.
    verdicts = [[False] * len(texts) for texts in answers]
    places = defaultdict(list)      # judge -> (task, question)s for it
    for i, (task, texts) in enumerate(zip(tasks, answers)):
        places[task.judge] += [(i, j) for j, text in enumerate(texts) if text.strip()]
    for judge, own in places.items():
        triples = [(tasks[i].questions[j], tasks[i].answers[j], answers[i][j]) for i, j in own]
        if triples:
            for (i, j), right in zip(own, judge(triples)):
                verdicts[i][j] = right
    return verdicts


# ------------------------------------------------------------------------------- rewards

@dataclass
class Outcome:
    """How a self-edit did: an entry for each seed of the inner loop."""
    reward: float = 0.0
    accuracy: list[float] = field(default_factory=list)         # the share of right answers
    answers: list[list[str]] = field(default_factory=list)
    right: list[list[bool]] = field(default_factory=list)
    losses: list[list[float]] = field(default_factory=list)     # [first, last] of each seed
    seconds: float = 0.0
    cut: int = 0                                    # replies that ran to the cap, of all seeds
    note: str = ""

    def add(self, trained, answers, right: list[bool]):
        """One more seed: a Trained, its Answers, and which of them are right."""
        self.accuracy.append(sum(right) / len(right))
        self.answers.append(answers.texts)
        self.right.append(right)
        # JSON knows no NaN: None.
        ends = trained.losses[0], trained.losses[-1]
        self.losses.append([round(loss, 4) if math.isfinite(loss) else None for loss in ends])
        self.seconds += trained.seconds
        self.cut += answers.cut
        if trained.diverged:
            self.note = "diverged: reward 0 for this seed"


def reward(outcome: Outcome, edit: SelfEdit, task: Task) -> float:
    """The share of the task's questions that theta' answers correctly, as a mean over the seeds.

    It is logged as it is returned here, and self-edits are chosen by it. The verdicts are logged
    beside it, whatever it is. A self-edit that can't be learned has reward 0 and does not come
    here."""
    return sum(outcome.accuracy) / len(outcome.accuracy)


def update_and_score(model, tok, tasks: list[Task], edits: list[SelfEdit], seeds: list[list[int]],
                     recipe: Recipe, sampling: Sampling = ANSWERS,
                     progress=quiet) -> Iterator[tuple[int, Outcome]]:
    """The reward of many self-edits: edits[i] of tasks[i], tried once per seed in seeds[i].

    Yields (i, Outcome) when known. Nothing to learn from, or a diverging adapter, is a reward of 0
    and a note."""
    # A job for every self-edit and seed; owner[j] is the number of the self-edit that job j is of.
    jobs, owner = [], []
    for i, edit in enumerate(edits):
        try:
            job = make_job(model, tok, edit, 0, recipe)     # its seed is set below
        except ValueError as e:
            yield i, Outcome(note=str(e))
            continue
        jobs += [replace(job, seed=seed) for seed in seeds[i]]
        owner += [i] * len(seeds[i])

    # Adapters are asked in batches, as they finish training: answering many together is faster, and
    # the weights of all need not be kept.
    outcomes = defaultdict(Outcome)
    at_once = auto_answering(model, recipe.lora)
    for finished in batched(sft(model, jobs, progress), at_once):   # theta' <- SFT(theta, SE)
        numbers = [owner[j] for j, _ in finished]
        trained = [one for _, one in finished]
        asked = [tasks[i] for i in numbers]
        # Ans ~ LM_theta'(. | tau), and r(Ans, tau).
        answers = in_halves(
            lambda pairs: answer_each(model, tok, pairs, recipe.lora, sampling),
            list(zip(asked, trained)), model.device)
        verdicts = grade_all(asked, [answer.texts for answer in answers])
        # The reward is known when the last seed is.
        for i, one, answer, right in zip(numbers, trained, answers, verdicts):
            outcomes[i].add(one, answer, right)
            if len(outcomes[i].accuracy) == len(seeds[i]):
                outcome = outcomes.pop(i)
                outcome.reward = reward(outcome, edits[i], tasks[i])
                yield i, outcome


def answer_each(model, tok, pairs: list[tuple[Task, Trained]], lora: Lora,
                sampling: Sampling) -> list[Answers]:
    """The answers to each task under the adapter beside it, all in one batch.

    A diverged adapter is not asked: its answers are empty, and so they are wrong."""
    answers = [Answers([""] * len(task.questions), cut=0) for task, _ in pairs]
    # The weights of all others become the adapters of one batch.
    sound = [k for k, (_, trained) in enumerate(pairs) if not trained.diverged]
    if sound:
        adapters = Adapters.stack(model, lora, [pairs[k][1].weights for k in sound])
        given = ask(model, tok, [[pairs[k][0]] for k in sound], sampling, adapters)
        for k, (answer,) in zip(sound, given):      # a group of one task has one Answers
            answers[k] = answer
    return answers


def batched(items: Iterable, size: int, seconds=60.0) -> Iterator[list]:
    """Lists of `size` items, as they come; fewer when these took so many seconds, as a kill loses
    a list that is not full."""
    # A generator, so that the first batch can be used before the last item is made.
    batch, begin = [], time.time()
    for item in items:
        batch.append(item)
        if len(batch) == size or time.time() - begin > seconds:
            yield batch
            batch, begin = [], time.time()
    if batch:
        yield batch


# ------------------------------------------------------------------------------- command line

# For a small model, as chosen by lab/recipe.py (docs/RESULTS.md). With --learn a text's own
# sentences are among the documents, as what a small model writes of it may be vague or wrong.
SMALL = Recipe(Lora(rank=32, alpha=64, targets=PROJECTIONS), lr=2e-3, epochs=10, batch=4)
# For the embedded model: the inner loop of `--preset tiny`.
TINY = Recipe(Lora(rank=8, alpha=8, targets=PROJECTIONS), lr=2e-2, epochs=10, batch=64)


def learn_texts(args, model, tok):
    """--learn: one adapter for plain texts, and each question before, in view and after."""
    texts = text.load(args.learn)
    tasks = [text.as_task(*pair) for pair in texts]
    tokens = sum(len(tok.encode(passage)) for _, passage in texts)
    print(f"{', '.join(args.learn)}: {len(texts)} passages, {tokens} tokens")
    writing = Sampling(args.max_new, args.edits, temperature=0.5, top_p=0.95)
    seeds = [[seed_for(i, j) for j in range(args.edits)] for i in range(len(tasks))]
    edits = collect(
        sample_self_edits(model, tok, tasks, writing, seeds, progress=Meter("self-edits")))
    print(printable(f"a self-edit of the first passage:\n{edits[0][0].text}\n"))

    questions = args.ask or own_questions(model, tok, texts)
    asked = [text.as_question(question, texts) for question in questions]
    (before,), (in_view,) = (ask(model, tok, [some]) for some in (asked, in_prompt(asked)))

    # The sentences, the passages, and the pieces of all self-edits: documents of one training.
    documents = []
    for task, (title, passage), row in zip(tasks, texts, edits):
        documents += [f"{title}\n{sentence}" for sentence in text.sentences(passage)]
        documents += task.context + [document for edit in row for document in edit.documents]
    job = make_job(model, tok, SelfEdit(documents=documents), 0, SMALL)
    ((_, trained),) = sft(model, [job], Meter(f"steps of training, {len(documents)} documents"))
    adapter = Adapters.stack(model, SMALL.lora, [trained.weights])
    (after,) = ask(model, tok, [asked], ANSWERS, adapter)

    print(f"{len(trained.losses)} steps in {trained.seconds:.0f} s, "
          f"loss {trained.losses[0]:.2f} -> {trained.losses[-1]:.2f}")
    show_answers(questions, {"before": before, "text in view": in_view, "after": after})
    if args.save:
        adapter.save(0, args.save)
        print(f"saved {args.save}. Ask more:  python inner_loop.py --model {args.model} --adapter "
              f'{args.save} --ask "..."')
    else:
        print("nothing is kept without --save DIR")


def own_questions(model, tok, texts) -> list[str]:
    """Without --ask the model writes questions of its own, about the first passages."""
    print("no --ask: these questions are the model's own")
    tasks = [text.as_task(*pair, prompt="self-qa") for pair in texts[:3]]
    sampling = Sampling(100, temperature=0.3, top_p=0.95)
    found = []
    seeds = [[seed_for("questions", i)] for i in range(len(tasks))]
    for (edit,) in collect(sample_self_edits(model, tok, tasks, sampling, seeds)):
        found += re.findall(r"^(?:Question \d+:)?\s*(\S[^\n]*\?)", edit.text, re.MULTILINE)[:2]
    return found or [f"What is {texts[0][0]}?"]


def show_answers(questions, rows: dict[str, list[Answers]]):
    for i, question in enumerate(questions):
        print(printable(question))
        for name, answers in rows.items():
            print(printable(f"  {name:<14}{answers[i].texts[0]}"))


def ask_adapter(args, model, tok):
    """--adapter: questions with it and without it."""
    adapter = Adapters.load(model, args.adapter)
    asked = [text.as_question(question, [("", "")]) for question in args.ask]
    (before,), (after,) = ask(model, tok, [asked]), ask(model, tok, [asked], ANSWERS, adapter)
    show_answers(args.ask, {"without": before, "with": after})


def chosen_task(args) -> Task:
    """The passage or town that --task, or --data and --index, name."""
    number = args.index
    if args.task:
        world, _, rest = args.task.partition(":")
        split, _, index = rest.partition(":")
        if world != "tinyworld" or not index.isdecimal() or args.data:
            raise UserError(f"--task {args.task}: such as tinyworld:tune:3, and without --data")
        tasks, number = tinyworld.load(split), int(index)
    else:
        tasks = knowledge.load(args.data) if args.data else tinyworld.load("eval")
    if not 0 <= number < len(tasks):
        raise UserError(f"passage {number}: there are passages 0 to {len(tasks) - 1}")
    return tasks[number]


def main():
    ap = Parser(description="Learn one passage; ask about it before and after.")
    ap.add_argument("--model", default=EMBEDDED, help="folder or hub id (default: the embedded)")
    ap.add_argument("--data", help="JSON list of passages (default: towns of the tiny world)")
    ap.add_argument("--index", type=at_least(0), default=0, help="which passage (default: 0)")
    ap.add_argument("--task", metavar="WORLD:SPLIT:N", help="a town, such as tinyworld:tune:3")
    ap.add_argument("--self-edit", metavar="FILE", help="one that you wrote, a note on each line")
    ap.add_argument("--max-new", type=positive, default=200, help="tokens of the self-edit")
    ap.add_argument("--learn", nargs="+", metavar="FILE", help="plain texts, or folders of them")
    ap.add_argument("--ask", action="append", default=[], help="a question about them; again: more")
    ap.add_argument("--edits", type=positive, default=2, help="of each passage (default: 2)")
    ap.add_argument("--save", "--save-adapter", metavar="DIR",
                    help="write the adapter in PEFT's layout")
    ap.add_argument("--adapter", metavar="DIR", help="one that was saved: --ask it")
    args = ap.parse_args()
    if args.learn or args.adapter:
        if args.task or args.data or args.self_edit:
            raise UserError("--learn and --adapter go without --task, --data and --self-edit")
        if args.model == EMBEDDED:
            raise UserError("--learn and --adapter need --model (such as HuggingFaceTB/"
                            "SmolLM2-135M-Instruct): the embedded one knows invented towns alone")
        if args.adapter and not args.ask:
            raise UserError("--adapter: what is it to be asked? --ask \"...\"")
        if args.save and Path(args.save).exists():
            raise UserError(f"{args.save} exists already; nothing was overwritten")
        model = load_pretrained(args.model)
        tok = Tokenizer.from_pretrained(model.folder)
        return (learn_texts if args.learn else ask_adapter)(args, model, tok)
    task = chosen_task(args)
    written = read_text(args.self_edit) if args.self_edit else ""
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)

    # C -> SE: the model writes a self-edit of the passage. Then the questions, without the passage.
    recipe = TINY if args.model == EMBEDDED else SMALL
    if not args.self_edit:
        writing = Sampling(args.max_new, temperature=0.8, top_p=0.95)
        ((_, (edit,)),) = sample_self_edits(model, tok, [task], writing, [[seed_for(0)]])
    else:
        edit = read_self_edit(task, written)
    print(printable(f"{task.context[0]}\n\n--- self-edit\n{edit.text}\n"))
    ((before,),) = ask(model, tok, [[task]])

    # theta' <- SFT(theta, SE), and the same questions again.
    try:
        job = make_job(model, tok, edit, 0, recipe)
    except ValueError as e:
        raise UserError(f"nothing was learned: {e}") from None
    ((_, trained),) = sft(model, [job])
    adapter = Adapters.stack(model, recipe.lora, [trained.weights])
    ((after,),) = ask(model, tok, [[task]], ANSWERS, adapter)

    # r(Ans, tau), before and after.
    print(f"--- {len(trained.losses)} steps in {trained.seconds:.1f} s, "
          f"loss {trained.losses[0]:.2f} -> {trained.losses[-1]:.2f}")
    for row in zip(task.questions, task.answers, before.texts, after.texts):
        print(printable("{} ({})\n  before: {!r}\n  after:  {!r}".format(*row)))
    old, new = grade_all([task, task], [before.texts, after.texts])
    print(f"right: {sum(old)} -> {sum(new)} of {len(old)}")
    if args.save:
        adapter.save(0, args.save)


if __name__ == "__main__":
    cli(main)
