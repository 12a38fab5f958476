"""Does a small model write better self-edits once it has imitated those of a larger one?

    python -m lab.imitate --model DIR_OR_HUB_ID --data TRAIN.json --out FOLDER
    python -m lab.imitate --directives --epochs 2 --lr 1e-3 ...     # see below

TRAIN.json: training passages with "released_edits": [{"text", "adapter_mean"}], as the authors'
release has them. The M-step itself learns the best of each passage, those after which the larger
model answered best. With --directives they are choices of how to study (data/study.py), drawn at
random, as SmolLM2 does not keep to their form by itself; no released_edits are needed. FOLDER is a
checkpoint for `eval.py single` and `outer_loop.py --model FOLDER`.
"""
import random
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from data import knowledge, study
from data.judges import RULES
from lab.experiment import parser
from model import load_pretrained
from outer_loop import m_step
from selfedit import SelfEdit, Task, read_self_edit, seed_for
from support.config import Config
from support.files import UserError, cli, positive, printable, read_json
from support.ranks import Meter
from support.tokenizer import Tokenizer


def as_sampled(tok: Tokenizer, text: str) -> list[int]:
    """The ids of a text as if the model itself had written it: no BOS, and then its turn ends."""
    end = [] if tok.eos is None else [tok.eos]
    return tok.encode(text.strip()) + end


def to_imitate(tok: Tokenizer, path, keep: int) -> list[tuple[Task, SelfEdit]]:
    """(passage, one of its `keep` best self-edits) of a data file. UserError if it has none."""
    pairs = []
    for place, record in knowledge.records(read_json(path), path):
        task = knowledge.knowledge_task(record, "implications", RULES["rule"], max_documents=0)
        try:
            # Sorting is stable: of equal rewards the first stays first.
            ranked = sorted(record["released_edits"], key=lambda edit: -edit["adapter_mean"])
            texts = [edit["text"] for edit in ranked[:keep]]
        except (LookupError, TypeError):
            raise UserError(f'{place}: "released_edits" must be a list of {{"text", '
                            '"adapter_mean"}') from None
        pairs += [(task, read_self_edit(task, text, as_sampled(tok, text))) for text in texts]
    # One without documents teaches nothing, as in the outer loop.
    return [(task, edit) for task, edit in pairs if edit.documents]


def at_random(tok: Tokenizer, path, keep: int, seed: int) -> list[tuple[Task, SelfEdit]]:
    """(passage, choices of how to study it that are drawn at random), `keep` of each passage."""
    pairs = []
    for i, task in enumerate(knowledge.load(path)):
        task = study.directed(task)
        for j in range(keep):
            text = study.random_edit(random.Random(seed_for(seed, i, j, "choices")))
            pairs.append((task, read_self_edit(task, text, as_sampled(tok, text))))
    return pairs


def main():
    ap = parser(__doc__)
    usual = Config()
    ap.add_argument("--model", required=True, help="folder or hub id of the student")
    ap.add_argument("--data", required=True, help="training passages with released_edits")
    ap.add_argument("--out", required=True, type=Path, help="folder of the new checkpoint")
    ap.add_argument("--keep", type=positive, default=2, help="best of each passage (default: 2)")
    ap.add_argument("--directives", action="store_true", help="imitate choices drawn at random")
    ap.add_argument("--epochs", type=positive, default=usual.outer_epochs)
    ap.add_argument("--batch", type=positive, default=usual.outer_batch)
    ap.add_argument("--lr", type=float, default=usual.outer_lr)
    ap.add_argument("--dtype", default="", help="of the weights, as outer_loop.py's --dtype")
    ap.add_argument("--seed", type=int, default=0)
    args = ap.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists already; nothing was overwritten")
    # The M-step's settings, of which the defaults are the paper's.
    cfg = Config(model=args.model, seed=args.seed, outer_lr=args.lr, outer_epochs=args.epochs,
                 outer_batch=args.batch, dtype=args.dtype)
    model = load_pretrained(cfg.model, dtype=getattr(torch, cfg.dtype) if cfg.dtype else None)
    tok = Tokenizer.from_pretrained(model.folder)

    if args.directives:
        pairs = at_random(tok, args.data, args.keep, args.seed)
    else:
        pairs = to_imitate(tok, args.data, args.keep)
    print(f"{len(pairs)} self-edits of {len({task.prompt for task, _ in pairs})} passages")
    # Of a run the M-step needs no more than this. Every self-edit counts alike.
    begin = time.time()
    run = SimpleNamespace(tok=tok, log=print, meter=Meter)
    try:
        m_step(cfg, run, model, [(task, edit, 1.0) for task, edit in pairs], t=0)
    except UserError:
        raise UserError("the fine-tuning diverged; try a lower --lr") from None
    model.save_pretrained(args.out)
    print(f"{printable(args.out)}: saved, after {time.time() - begin:.0f} s")


if __name__ == "__main__":
    cli(main)
