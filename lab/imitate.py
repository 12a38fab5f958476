"""From teacher to student: does a small model write better self-edits once it has imitated those of
a larger one? The paper suggests a teacher, and does not try one.

    python -m lab.imitate --model DIR_OR_HUB_ID --data TRAIN.json --out FOLDER

TRAIN.json: training passages with "released_edits": [{"text", "adapter_mean"}], as the authors'
release has them. The model is fine-tuned on the best self-edits of each passage, those after which
the larger model answered best, by the M-step itself: the passage's prompt is the context, and the
loss is on the self-edit and its end. FOLDER is a checkpoint: ask what it writes on other passages
by `eval.py single --model FOLDER`, and let it go on learning by `outer_loop.py --model FOLDER`.
100 self-edits, twice, are 85,000 tokens: 10 to 15 minutes on one core for a model of 135 M.
"""
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from data import knowledge
from data.judges import RULES
from model import load_pretrained
from outer_loop import m_step
from selfedit import SelfEdit, Task, read_self_edit
from support.config import Config
from support.files import Parser, UserError, cli, positive, printable, read_json
from support.progress import Meter
from support.tokenizer import Tokenizer


def best_edits(record: dict, keep: int) -> list[str]:
    """The texts of a passage's `keep` best self-edits, the first of equals."""
    # Sorting is stable: of equal rewards the first stays first.
    ranked = sorted(record["released_edits"], key=lambda edit: -edit["adapter_mean"])
    return [edit["text"] for edit in ranked[:keep]]


def as_sampled(tok: Tokenizer, text: str) -> list[int]:
    """The ids of a text as if the model itself had written it: no BOS, and then its turn ends."""
    end = [] if tok.eos is None else [tok.eos]
    return tok.encode(text.strip()) + end


def to_imitate(tok: Tokenizer, path, keep: int, passages=None) -> list[tuple[Task, SelfEdit]]:
    """(passage, self-edit) pairs of a data file's first passages. UserError if it has none."""
    pairs = []
    for place, record in list(knowledge.records(read_json(path), path))[:passages]:
        task = knowledge.knowledge_task(record, "implications", RULES["rule"], max_documents=0)
        try:
            texts = best_edits(record, keep)
        except (LookupError, TypeError):
            raise UserError(f'{place}: "released_edits" must be a list of {{"text", '
                            '"adapter_mean"}') from None
        pairs += [(task, read_self_edit(task, text, as_sampled(tok, text))) for text in texts]
    # One without documents teaches nothing, as in the outer loop.
    return [(task, edit) for task, edit in pairs if edit.documents]


def main():
    ap = Parser(description=" ".join(__doc__.split("\n\n")[0].split()))
    usual = Config()
    ap.add_argument("--model", required=True, help="folder or hub id of the student")
    ap.add_argument("--data", required=True, help="training passages with released_edits")
    ap.add_argument("--out", required=True, type=Path, help="folder of the new checkpoint")
    ap.add_argument("--keep", type=positive, default=2, help="best of each passage (default: 2)")
    ap.add_argument("--passages", type=positive, help="the first so many (default: all)")
    ap.add_argument("--epochs", type=positive, default=usual.outer_epochs)
    ap.add_argument("--lr", type=float, default=usual.outer_lr)
    ap.add_argument("--batch", type=positive, default=usual.outer_batch, help="self-edits per step")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--device", default="", help="cuda or cpu (default: cuda if there is one)")
    ap.add_argument("--dtype", default="", help="of the weights (default: by the device)")
    args = ap.parse_args()
    if args.out.exists():
        raise UserError(f"{args.out} exists already; nothing was overwritten")
    # The M-step's settings, of which the defaults are the paper's.
    cfg = Config(model=args.model, train_data=args.data, seed=args.seed, outer_lr=args.lr,
                 outer_epochs=args.epochs, outer_batch=args.batch, device=args.device,
                 dtype=args.dtype)
    dtype = getattr(torch, cfg.dtype) if cfg.dtype else None
    model = load_pretrained(cfg.model, cfg.device, dtype)
    tok = Tokenizer.from_pretrained(model.folder)

    pairs = to_imitate(tok, cfg.train_data, args.keep, args.passages)
    own = sum(len(edit.token_ids) for _, edit in pairs)
    read = sum(len(tok.prompt(task.prompt)) for task, _ in pairs)
    print(f"{len(pairs)} self-edits of {len({task.prompt for task, _ in pairs})} passages: {own} "
          f"tokens to learn, after {read} to read; {cfg.outer_epochs} epochs")

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
