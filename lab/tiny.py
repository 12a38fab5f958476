"""The tiny world as the questions of the lab use it: its settings, and models of finished runs."""
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.decode import Sampling
from inner_loop import ask, grade_all, update_and_score
from lab.experiment import Question
from lora import Adapters
from model import Transformer, load_pretrained
from selfedit import SelfEdit, Task, seed_for
from support.config import PRESETS, Config, inner_recipe
from support.files import read_json
from support.tokenizer import Tokenizer

# Written, learned and answered as in `python outer_loop.py`, with the three rounds that it had
# until 2026-11-27. What lab/update_rule.py found made them two, at twice the outer learning rate.
SETTINGS = PRESETS["tiny"] | {"iterations": 3, "outer_lr": 2e-3}
TINY = Config(**SETTINGS)
RECIPE = inner_recipe(TINY)
WRITING = Sampling(TINY.max_edit_tokens, 1, TINY.temperature, TINY.top_p)
ANSWERING = Sampling(TINY.max_answer_tokens, newline_stops=True)


def add_runs(ap):
    ap.add_argument("runs", nargs="+", metavar="RUN_DIR",
                    help="finished runs of `python outer_loop.py --iterations 3 --outer-lr 2e-3 "
                         "--seed S`, one for each seed")


def by_seed(folders) -> dict[int, Path]:
    """{seed: the folder of its run}."""
    return {read_json(Path(folder) / "config.json")["seed"]: Path(folder) for folder in folders}


def answer(ap, question: Question):
    """The rest of main, of a question about the writers of finished runs.

    question.measure(arm, seed, {seed: folder of its run}, *values of the settings)."""
    add_runs(ap)
    ap.add_argument("--arms", nargs="+", choices=question.arms, default=list(question.arms),
                    metavar="ARM")
    args = ap.parse_args()
    folders = by_seed(args.runs)

    def measure(arm, seed, *values):
        return question.measure(arm, seed, folders, *values)

    replace(question, measure=measure).answer(ap, args, sorted(folders))


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
    outcomes = dict(update_and_score(model, tok, towns, edits, seeds, RECIPE, ANSWERING))
    return [outcomes[i].reward for i in range(len(towns))]


def or_passage(town: Task, edit: SelfEdit) -> SelfEdit:
    """The self-edit, or the passage alone where it can't be read."""
    return edit if edit.documents else town.references["passage only"]


def by_direction(town: Task, right) -> dict[str, float]:
    """The accuracy on all questions of a town, on forward and on reversed ones. right: verdicts."""
    right, back = np.array(right), np.array(town.kinds) == "reversed"
    return {"accuracy": right.mean(), "forward": right[~back].mean(),
            "reversed": right[back].mean()}
