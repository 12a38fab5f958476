"""The tiny world as the questions of the lab use it: settings, models of finished runs, training
with other losses, a round of ReST-EM with other rewards, and who writes self-edits."""
import random
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import tinyworld as world
from data.tasks import in_order, load_tasks
from engine.decode import Sampling, collect
from inner_loop import answering, ask, grade_all, inner_recipe, update_and_score
from lora import Adapters, Job, dialogue
from model import Transformer, load_pretrained
from outer_loop import m_step, next_tasks, sample, select
from selfedit import SelfEdit, Task, read_self_edit, sample_self_edits, seed_for
from support.config import PRESETS, Config, read_settings
from support.ranks import Meter
from support.run import Run
from support.tokenizer import Tokenizer

# Written, learned and answered as in `python outer_loop.py`, with the three rounds that it had
# until 2026-11-27. What lab/update_rule.py found made them two, at twice the outer learning rate.
SETTINGS = PRESETS["tiny"] | {"iterations": 3, "outer_lr": 2e-3}
TINY = Config(**SETTINGS)
RECIPE = inner_recipe(TINY)
WRITING = Sampling(TINY.max_edit_tokens, 1, TINY.temperature, TINY.top_p)
ANSWERING = answering(TINY)


# ------------------------------------------------------------------------------- models

def load(t: int, folder=None) -> tuple[Transformer, Tokenizer]:
    """theta_t of a run. theta_0 is the model of this repository, whatever the run."""
    model = load_pretrained(Path(folder) / f"iter_{t}" if t else TINY.model, "cpu")
    return model, Tokenizer.from_pretrained(model.folder)


def verdicts(model, tok, towns: list[Task], rows=()):
    """(towns, questions) bool: what a model answers rightly, without the passages. rows: the
    weights (P,) of an adapter for each town, if each is asked under its own."""
    adapters = Adapters.stack(model, RECIPE.lora, rows) if rows else None
    answers = ask(model, tok, [[town] for town in towns], ANSWERING, adapters)
    return np.array(grade_all(towns, [one.texts for (one,) in answers]))


def score(model, tok, towns: list[Task], edits: list[SelfEdit], seed: int) -> list[float]:
    """What each town's self-edit is worth to this model, by an inner loop."""
    seeds = [[seed_for(seed, i, "probe")] for i in range(len(towns))]
    outcomes = update_and_score(model, tok, towns, edits, seeds, RECIPE, ANSWERING)
    return [outcome.reward for outcome in collect(outcomes)]


def or_passage(town: Task, edit: SelfEdit) -> SelfEdit:
    """The self-edit, or the passage alone where it can't be read."""
    return edit if edit.documents else town.references["passage only"]


def by_direction(town: Task, right) -> dict[str, float]:
    """The accuracy on all questions of a town, on forward and on reversed ones. right: verdicts."""
    right, back = np.array(right), np.array(town.kinds) == "reversed"
    return {"accuracy": right.mean(), "forward": right[~back].mean(),
            "reversed": right[back].mean()}


# ------------------------------------------------------------------------------- losses

def gold(tok, task: Task, before="") -> list:
    """Examples (ids, learn) in which the gold answers alone are learned. before: read first."""
    examples = []
    for query, answer in zip(task.queries, task.answers):
        examples.append(dialogue(tok.prompt(before + query), tok.encode(" " + answer)))
    return examples


def log_probs(model, adapter: Adapters, example) -> torch.Tensor:
    """(N,) of the tokens of an example that are learned, given those before them."""
    ids, learn = example
    ids = torch.tensor(ids, device=model.device)
    learned = torch.tensor(learn, device=model.device)[1:].bool()
    with adapter.route([len(ids)]):
        logits = model(ids[None])[0, :-1]
    return -F.cross_entropy(logits[learned].float(), ids[1:][learned], reduction="none")


def train(model, job: Job, loss) -> Adapters:
    """An adapter, trained as lora.sft_one trains one, but for the loss.

    loss(adapter, numbers of a step's examples) -> a scalar."""
    adapter = Adapters(model, job.recipe.lora, n=1)
    adapter.init(0, job.seed)
    weights = adapter.flat.requires_grad_()
    optimizer = torch.optim.AdamW([weights], weight_decay=job.recipe.weight_decay)
    for step, batch in enumerate(job.micro_batches()):
        optimizer.zero_grad()
        loss(adapter, batch).backward()
        torch.nn.utils.clip_grad_norm_([weights], job.recipe.clip)
        optimizer.param_groups[0]["lr"] = job.lr_at(step)
        optimizer.step()
    weights.requires_grad_(False)
    return adapter


# ------------------------------------------------------------------------------- runs

def start(folder, seed: int, **own) -> tuple[Run, list[Task]]:
    """A run in the tiny world, and its training towns in order. own: how its settings differ."""
    run = Run(Config(**SETTINGS | own | {"seed": seed, "baselines": False,
                                         "run_dir": str(folder)}), load_pretrained)
    return run, in_order(load_tasks(run, run.cfg.train_data), seed)


def run_of(folder, **own) -> Run:
    """A finished run with its own settings, as its folder tells them. own: how they differ."""
    settings = read_settings(folder)
    known = {f.name: settings[f.name] for f in fields(Config)}
    return Run(Config(**known | {"run_dir": str(folder)} | own), load_pretrained)


def one_round(run: Run, model, train: list[Task], t: int, reward):
    """theta_t becomes theta_t+1, as in outer_loop.rest_em, but for the rewards.

    reward(tasks, edits) -> (tasks, K). The best are kept, though they help nothing."""
    cfg = run.cfg
    tasks = next_tasks(cfg, train, t)
    edits = sample(run, model, tasks, t, "train", cfg.edits)
    rewards = np.asarray(reward(tasks, edits)).tolist()
    chosen = select(cfg, rewards, edits, [0.0] * cfg.tasks, t)
    kept = [(tasks[i], edits[i][j], 1.0) for i, j in chosen]
    run.make(t + 1, t, lambda theta: m_step(cfg, run, theta, kept, t))


# ------------------------------------------------------------------------------- writers

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
    return [town.say(relation, form, rng) for relation, form in town.notes()
            if form.startswith("question")]


# "begun": theta_0 goes on from one of these, and mostly in the form that it has.
BEGINNINGS = ("The river of", "The founder", "Who", "Which town")


def write(writer, folder, tasks: list[Task], seed: int, k: int) -> list[list[SelfEdit]]:
    """k self-edits of each task. The first ones of these are those of a smaller k.

    folder: of the run that theta_t is taken from."""
    # A draw has a seed of its own, the same for every writer.
    asked, seeds = [], []
    for i, task in enumerate(tasks):
        asked += [task] * k
        seeds += [seed_for(seed, "compute", i, j) for j in range(k)]
    if callable(writer):
        texts = []
        for task, own in zip(asked, seeds):
            name, facts = world.read_passage(task.context[0])
            texts.append("\n".join(writer(world.Town(name, facts, []), random.Random(own))))
    else:
        choice, t = (BEGINNINGS, 0) if writer == "begun" else ([""], writer)
        model, tok = load(t, folder)
        # What a text is made to begin with is a part of its prompt, and of the text.
        beginnings = [random.Random(own).choice(choice) for own in seeds]
        begun = [replace(task, prompt=task.prompt + own) for task, own in zip(asked, beginnings)]
        written = collect(sample_self_edits(model, tok, begun, WRITING, [[own] for own in seeds],
                                            progress=Meter("self-edits")))
        texts = [f"{own} {edit.text}".strip() for own, (edit,) in zip(beginnings, written)]
    edits = [read_self_edit(task, text) for task, text in zip(asked, texts)]
    return [edits[i:i + k] for i in range(0, len(edits), k)]


def write_all(model, tok, towns: list[Task], seed: int) -> list[SelfEdit]:
    """A self-edit of each town, by a model as it is."""
    seeds = [[seed_for(seed, i, "edit")] for i in range(len(towns))]
    return [edit for (edit,) in collect(sample_self_edits(model, tok, towns, WRITING, seeds))]
