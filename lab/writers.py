"""Who writes self-edits of towns: a model of some round, or a function that knows the world."""
import random
from dataclasses import replace

from data import tinyworld as world
from engine.decode import collect, split_into
from lab.tiny import WRITING, load
from selfedit import SelfEdit, Task, read_self_edit, sample_self_edits, seed_for
from support.progress import Meter

# A writer is one of these three functions, t for theta_t, or "begun".


def rephrased(town, rng) -> list[str]:
    """The passage in other words, which turn no fact round."""
    return [world.reworded(town, rng).passage]


def one_form(town, rng) -> list[str]:
    """A note about each fact in one form, drawn: a statement or a question, onwards or back."""
    form = rng.choice(list(world.FORMS))
    return [town.say(relation, own, rng) for relation, own in town.notes() if own == form]


def best_notes(town, rng) -> list[str]:
    """A question in each direction about each fact: the best that is known."""
    notes = []
    for relation, form in town.notes():
        if form.startswith("question"):
            notes.append(town.say(relation, form, rng))
    return notes


# "begun": theta_0 goes on from one of these, and mostly in the form that it has.
BEGINNINGS = ("The river of", "The founder", "Who", "Which town")


def write(writer, folder, tasks: list[Task], seed: int, k: int) -> list[list[SelfEdit]]:
    """k self-edits of each task. The first ones of these are those of a smaller k.

    folder: of the run that theta_t is taken from."""
    # A draw has a seed of its own, the same for every writer.
    asked, seeds = [], []
    for i, task in enumerate(tasks):
        for j in range(k):
            asked.append(task)
            seeds.append(seed_for(seed, "compute", i, j))
    if callable(writer):
        texts = told(writer, asked, seeds)
    elif writer == "begun":
        beginnings = [random.Random(seed).choice(BEGINNINGS) for seed in seeds]
        texts = sampled(0, folder, asked, seeds, beginnings)
    else:
        texts = sampled(writer, folder, asked, seeds, [""] * len(asked))
    edits = [read_self_edit(task, text) for task, text in zip(asked, texts)]
    return split_into(edits, [k] * len(tasks))


def told(writer, tasks: list[Task], seeds: list[int]) -> list[str]:
    """A text about each task, by a function."""
    texts = []
    for task, seed in zip(tasks, seeds):
        name, facts = world.read_passage(task.context[0])
        lines = writer(world.Town(name, facts, sentences=[]), random.Random(seed))
        texts.append("\n".join(lines))
    return texts


def sampled(t: int, folder, tasks: list[Task], seeds: list[int], beginnings: list[str]):
    """A text about each task, by theta_t."""
    model, tok = load(t, folder)
    # What a text is made to begin with is a part of its prompt, and of the text.
    begun = []
    for task, beginning in zip(tasks, beginnings):
        begun.append(replace(task, prompt=task.prompt + beginning))
    written = collect(sample_self_edits(model, tok, begun, WRITING, [[seed] for seed in seeds],
                                progress=Meter("self-edits")))
    texts = []
    for beginning, (edit,) in zip(beginnings, written):
        texts.append(f"{beginning} {edit.text}".strip())
    return texts
