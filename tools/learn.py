"""Your own text: learn it, and ask about it before and after.

    python -m tools.learn notes.txt --model HuggingFaceTB/SmolLM2-135M-Instruct --ask "Who?"
    python -m tools.learn --adapter DIR --model HuggingFaceTB/SmolLM2-135M-Instruct --ask "When?"

The model writes self-edits of every passage, and one adapter learns them. There is no reward.
"""
from pathlib import Path

from data import text
from engine.decode import Sampling, collect
from engine.train import sft
from inner_loop import ANSWERS, SMALL, ask, in_prompt, make_job
from lora import Adapters
from model import load_pretrained
from selfedit import SelfEdit, sample_self_edits, seed_for
from support.files import (Parser, UserError, as_json, at_least, cli, positive, printable,
                           read_json, replace_file)
from support.ranks import Meter
from support.tokenizer import Tokenizer

LEARNED = "learned.json"    # beside a saved adapter: its passages


def learn(args, model, tok):
    """One adapter for plain texts. The answers before, with the text in view, and after."""
    longest = min(text.LONGEST, model.config.max_len // 4)
    texts = text.load(args.files, lambda passage: len(tok.encode(passage)), longest)
    tasks = [text.as_task(*pair) for pair in texts]
    print(f"{len(texts)} passages")
    asked = [text.as_question(question, texts) for question in args.ask]
    (before,) = ask(model, tok, [asked])
    (in_view,) = ask(model, tok, [in_prompt(asked)])

    writing = Sampling(args.max_new, args.edits, temperature=0.5, top_p=0.95)
    seeds = []
    for i in range(len(tasks)):
        seeds.append([seed_for(i, j) for j in range(args.edits)])
    edits = collect(
        sample_self_edits(model, tok, tasks, writing, seeds, progress=Meter("self-edits")))
    print(printable(f"a self-edit of the first passage:\n{edits[0][0].text}\n"))

    # The sentences, the passages, and the pieces of all self-edits: documents of one training.
    # Sentences too, because what a small model writes of a text may be vague or wrong.
    documents = []
    for task, (title, passage), row in zip(tasks, texts, edits):
        documents += [f"{title}\n{sentence}" for sentence in text.sentences(passage)]
        documents += task.context
        for edit in row:
            documents += edit.documents
    job = make_job(model, tok, SelfEdit(documents=documents), 0, SMALL)
    ((_, trained),) = sft(model, [job], Meter(f"steps of training, {len(documents)} documents"))
    if trained.diverged:
        raise UserError("the training diverged; nothing was learned or saved")
    adapter = Adapters.stack(model, SMALL.lora, [trained.weights])
    (after,) = ask(model, tok, [asked], ANSWERS, adapter)

    print(f"{len(trained.losses)} steps in {trained.seconds:.0f} s, "
          f"loss {trained.losses[0]:.2f} -> {trained.losses[-1]:.2f}")
    if args.save:
        adapter.save(0, args.save)
        # A question is put with the title of the passage that it is about: --adapter needs them.
        records = [{"title": title, "context": passage} for title, passage in texts]
        replace_file(Path(args.save) / LEARNED, as_json(records, indent=1))
        print(printable(f"saved, to be asked more with --adapter {args.save}"))
    return {"before": before, "text in view": in_view, "after": after}


def ask_adapter(args, model, tok):
    """--adapter: the answers without it and with it."""
    adapter = Adapters.load(model, args.adapter)
    known = Path(args.adapter) / LEARNED
    # Of another program's adapter nobody knows the texts.
    kind = [{"title": str, "context": str}]
    records = read_json(known, kind) if known.exists() else []
    texts = [(record["title"], record["context"]) for record in records] or [("", "")]
    asked = [text.as_question(question, texts) for question in args.ask]
    (before,) = ask(model, tok, [asked])
    (after,) = ask(model, tok, [asked], ANSWERS, adapter)
    return {"without": before, "with": after}


def main():
    ap = Parser(description="Learn plain texts; ask about them before and after.")
    ap.add_argument("files", nargs="*", metavar="FILE", help="plain texts, or folders of them")
    ap.add_argument("--model", required=True, help="folder or hub id of an instructed model")
    ap.add_argument("--ask", action="append", required=True, help="a question; again: more")
    ap.add_argument("--edits", type=at_least(1, 1000), default=2, help="per passage (default: 2)")
    ap.add_argument("--max-new", type=positive, default=200, help="tokens of each (default: 200)")
    ap.add_argument("--save", metavar="DIR", help="keep the adapter, in PEFT's layout")
    ap.add_argument("--adapter", metavar="DIR", help="ask one that was saved; it learns nothing")
    args = ap.parse_args()
    if bool(args.files) == bool(args.adapter):
        raise UserError("either FILEs to learn, or --adapter DIR to ask (-h explains)")
    if args.save and (args.adapter or Path(args.save).exists()):
        raise UserError(f"--save {args.save}: it exists already, or there is nothing new to save; "
                        "nothing was overwritten")
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    rows = ask_adapter(args, model, tok) if args.adapter else learn(args, model, tok)
    for i, question in enumerate(args.ask):
        print(printable(question))
        for name, answers in rows.items():
            print(printable(f"  {name:<14}{answers[i].texts[0]}"))


if __name__ == "__main__":
    cli(main)
