"""The inner loop: what a self-edit is worth, for many self-edits at once.

    theta' <- SFT(theta, SE);    Ans ~ LM_theta'(. | tau);    r <- r(Ans, tau)

    python inner_loop.py                        # a town that the embedded model never saw
    python inner_loop.py --self-edit FILE       # how well do notes that you wrote teach it?

Paper, section 3. `update_and_score` is these three lines of Algorithm 1. The base model is never
changed: theta' is the base with an adapter (lora.py), trained by engine/train.py.
"""
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Iterator

from data.tasks import one_task     # for the command line only
from engine.decode import Sampling, collect, write
from engine.device import auto_answering, in_halves
from engine.train import Trained, batched, sft
from lora import Adapters, Job, Lora, PROJECTIONS, Recipe, dialogue
from model import load_pretrained
from selfedit import DIRECTIVES, EMPTY, SelfEdit, Task, read_self_edit, sample_self_edits, seed_for
from support.checkpoint import EMBEDDED
from support.config import Config
from support.files import Parser, UserError, at_least, cli, printable, read_text
from support.tokenizer import Tokenizer

ANSWERS = Sampling(max_new=64, newline_stops=True)


# ------------------------------------------------------------------------------- theta'

def inner_recipe(cfg: Config) -> Recipe:
    """How the inner loop of a run trains."""
    return Recipe(
        Lora(cfg.inner_rank, cfg.inner_alpha, cfg.inner_targets), lr=cfg.inner_lr,
        epochs=cfg.inner_epochs, batch=cfg.inner_batch, schedule=cfg.inner_schedule,
        warmup=cfg.inner_warmup, clip=cfg.clip, weight_decay=cfg.weight_decay, pad_to=cfg.pad_to,
        slots=cfg.slots, max_steps=cfg.max_steps, max_tokens=cfg.max_train_tokens)


def make_job(model, tok, edit: SelfEdit, seed: int, recipe: Recipe) -> Job:
    """The SFT job of a self-edit: examples of its documents, a recipe with its directives.

    A text longer than the context window is cut; a longer (prompt, completion) pair is left out.
    ValueError: why nothing can be learned.
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
            prompt, completion = tok.prompt(document[0]), [*tok.encode(document[1]), tok.eos]
            ids, learn = dialogue(prompt, completion, recipe.completion_only)
            if len(ids) <= model.config.max_len:
                examples.append((ids, learn))
    if not examples:
        raise ValueError("no example of this self-edit fits in the model's context window")
    # The model chooses its own epochs and batches, so a job beyond the bounds is refused.
    job = Job(examples, seed, recipe)
    for what, asked, most in (("steps", job.steps, recipe.max_steps),
                              ("tokens", job.tokens, recipe.max_tokens)):
        if most and asked > most:
            raise ValueError(f"asks for {asked} {what} of training, more than {most}")
    return job


# ------------------------------------------------------------------------------- answers

def answering(cfg: Config) -> Sampling:
    """How the answers of a run are written: greedily."""
    return Sampling(cfg.max_answer_tokens, newline_stops=cfg.stop == "newline", max_rows=cfg.rows)


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
    queries = []
    for tasks in groups:
        queries.append([query for task in tasks for query in task.queries])
    replies = collect(write(model, tok, queries, sampling, adapters=adapters))

    # The replies come in the order of the queries: each task takes its own, one for each query.
    answers = []
    for tasks in groups:
        answers.append([])
        for task in tasks:
            own, replies = replies[:len(task.queries)], replies[len(task.queries):]
            texts = task.vote([reply.text for (reply,) in own])
            answers[-1].append(Answers(texts, sum(reply.cut for (reply,) in own)))
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

    The M-step selects self-edits by it. It may be changed here: every verdict is kept beside it. A
    self-edit that can't be learned has reward 0 and does not come here."""
    return sum(outcome.accuracy) / len(outcome.accuracy)


def update_and_score(model, tok, tasks: list[Task], edits: list[SelfEdit], seeds: list[list[int]],
                     recipe: Recipe, sampling: Sampling = ANSWERS,
                     progress=None) -> Iterator[tuple[int, Outcome]]:
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
            list(zip(asked, trained)))
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


# ------------------------------------------------------------------------------- command line

# For a small model, as docs/results/smollm2.md chose it; for the embedded one: `--preset tiny`.
SMALL = Recipe(Lora(rank=32, alpha=64, targets=PROJECTIONS), lr=2e-3, epochs=10, batch=4)
TINY = Recipe(Lora(rank=8, alpha=8, targets=PROJECTIONS), lr=2e-2, epochs=10, batch=64)


def main():
    ap = Parser(description="Learn one passage; ask about it before and after.")
    ap.add_argument("--model", default=EMBEDDED, help="folder or hub id (default: the embedded)")
    ap.add_argument("--data", default="eval", help="a file of passages, or towns: tune, eval")
    ap.add_argument("--index", type=at_least(0), default=0, help="which passage (default: 0)")
    ap.add_argument("--self-edit", metavar="FILE", help="one that you wrote, a note on each line")
    args = ap.parse_args()
    task = one_task(args.data, args.index)
    edit = read_self_edit(task, read_text(args.self_edit)) if args.self_edit else None
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    recipe = TINY if args.model == EMBEDDED else SMALL

    # C -> SE: the model writes a self-edit of the passage. Then the questions, without the passage.
    if edit is None:
        writing = Sampling(max_new=200, temperature=0.8, top_p=0.95)
        ((_, (edit,)),) = sample_self_edits(model, tok, [task], writing, [[seed_for(0)]])
    print(printable(f"{task.context[0]}\n\n--- self-edit\n{edit.text}\n"))
    ((before,),) = ask(model, tok, [[task]])

    # theta' <- SFT(theta, SE), and the same questions again: r(Ans, tau). The passage is one of the
    # documents, so what it teaches alone stands beside.
    edits = [edit, task.references["passage only"]]
    outcomes = dict(update_and_score(model, tok, [task] * 2, edits, [[0], [0]], recipe))
    outcome, alone = outcomes[0], outcomes[1]
    if not outcome.right:
        raise UserError(f"nothing was learned: {outcome.note}")
    print("--- trained for {:.1f} s, loss {} -> {}".format(outcome.seconds, *outcome.losses[0]))
    for row in zip(task.questions, task.answers, before.texts, outcome.answers[0]):
        print(printable("{} ({})\n  before: {!r}\n  after:  {!r}".format(*row)))
    (known,) = grade_all([task], [before.texts])
    print(f"right: {sum(known)} -> {sum(outcome.right[0])} of {len(known)}; after the passage "
          f"alone {sum(alone.right[0])}")


if __name__ == "__main__":
    cli(main)
