"""Which inner loop teaches a small model a passage? Self-edits that are given, learned by many
recipes, and the same questions asked.

    python -m lab.recipe --model DIR --data FILE --out recipes.jsonl

FILE: passages with "released_edits": [{"text": ...}], as the authors' release has for training
passages. Choose on these, and report on others. A recipe's line is written when it is known, and
the same command goes on where it was stopped.
"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data import knowledge
from data.text import sentences
from inner_loop import SMALL, update_and_score
from lab.experiment import complete, over_passages, parser, print_table
from lora import Lora, PROJECTIONS, Recipe
from model import load_pretrained
from selfedit import SelfEdit, read_self_edit, seed_for
from support.files import UserError, cli, positive, read_json
from support.ranks import Meter
from support.tokenizer import Tokenizer

FEW = ["q_proj", "v_proj"]
BASE = Recipe(Lora(rank=32, alpha=64, targets=PROJECTIONS), lr=1e-3, epochs=10, batch=1)
FOURS = SMALL   # the one that was chosen: lr 2e-3, four documents a step
# name -> (recipe, what the documents are)
RECIPES = {
    "q and v, lr 1e-3 (the paper's)": (replace(BASE, lora=Lora(32, 64, FEW)), "edit"),
    "all layers, lr 1e-3": (BASE, "edit"),
    "all layers, lr 5e-4": (replace(BASE, lr=5e-4), "edit"),
    "all layers, lr 2e-3": (replace(BASE, lr=2e-3), "edit"),
    "and its sentences": (BASE, "edit and sentences"),
    "batch 4, lr 2e-3": (FOURS, "edit"),
    "batch 4, and its sentences": (FOURS, "edit and sentences"),
    "batch 4, its sentences alone": (FOURS, "sentences"),
    "batch 4, as chat turns": (FOURS, "turns"),
    "batch 4, lr 4e-3": (replace(FOURS, lr=4e-3), "edit"),
    "batch 4, 5 epochs": (replace(FOURS, epochs=5), "edit"),
}


def documents(task, edit: SelfEdit, kind: str) -> list:
    """What is trained on: the self-edit's pieces and the passage, or a variation of that."""
    title, passage = task.context[0].split("\n", 1)
    own_sentences = [f"{title}\n{sentence}" for sentence in sentences(passage)]
    if kind == "sentences":
        return [*own_sentences, task.context[0]]
    if kind == "edit and sentences":
        return [*own_sentences, *edit.documents]
    if kind == "turns":
        turn = f"Tell me something about {title}."
        return [(turn, document.split("\n", 1)[1]) for document in edit.documents]
    return edit.documents


def measure(model, tok, tasks, edits, name) -> dict:
    """Accuracy of every passage under a recipe, and what it cost."""
    recipe, kind = RECIPES[name]
    edits = [SelfEdit(documents=documents(task, edit, kind)) for task, edit in zip(tasks, edits)]
    seeds = [[seed_for("recipe", i)] for i in range(len(tasks))]
    outcomes = dict(update_and_score(model, tok, tasks, edits, seeds, recipe,
                                     progress=Meter(f"steps, {name}")))
    accuracy = [outcomes[i].reward for i in range(len(tasks))]
    return {"accuracy": accuracy,
            "documents": float(np.mean([len(edit.documents) for edit in edits])),
            "loss": float(np.mean([outcomes[i].losses[0][1] for i in outcomes]))}


def main():
    ap = parser(__doc__)
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--data", required=True, help="passages with released_edits")
    ap.add_argument("--out", required=True, type=Path, help="JSON lines, one per recipe")
    ap.add_argument("--tasks", type=positive, default=12, help="the first passages (default: 12)")
    ap.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = ap.parse_args()
    tasks = knowledge.load(args.data)[:args.tasks]
    try:
        texts = [r["released_edits"][0]["text"] for r in read_json(args.data)[:args.tasks]]
    except (LookupError, TypeError):
        raise UserError(f'{args.data}: each passage needs "released_edits": [{{"text": ...}}, ...]'
                        ) from None
    edits = [read_self_edit(task, text) for task, text in zip(tasks, texts)]
    model = load_pretrained(args.model, dtype=getattr(torch, args.dtype))
    tok = Tokenizer.from_pretrained(model.folder)
    records = complete(ap, args, [{"recipe": name} for name in RECIPES],
                       lambda line: measure(model, tok, tasks, edits, line["recipe"]))
    rows = []
    for r in records:
        rows.append([r["recipe"], over_passages(r["accuracy"]), f"{r['documents']:.1f}",
                     f"{r['loss']:.2f}", f"{r['seconds'] / len(r['accuracy']):.0f}"])
    print_table(["recipe", "accuracy [95 % CI]", "documents", "last loss", "s a passage"], rows)


if __name__ == "__main__":
    cli(main)
