"""The inner loop: theta' <- SFT(theta, SE) for many self-edits at once, and the reward r of each.

    python inner_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data data/example_eval.json

`sft` is the only trainer here. A job is one adapter to train: the inner loop gives it hundreds of
small ones, the M-step of the outer loop a single larger one. At every step the next micro-batches
of n jobs lie in one ribbon; when a job ends, its slot takes the next one, longest job first:
continuous batching, for training. Each adapter gets exactly the gradient, clipping and AdamW step
it would get alone, with its own learning rate, number of steps and loss mask.

Shapes: n slots, T tokens in a step, N of them with a label, D = dim, V vocabulary, P parameters per
adapter.
"""
import argparse
from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch

from checkpoint import cli
from generate import generate
from lora import Adapters
from model import free_memory, load_pretrained
from selfedit import EMPTY, pick, sample_self_edits, seed_for
from sft import Recipe, dialogue, parameters, sft

# ------------------------------------------------------------------------------- reward

def ask(model, tok, tasks, weights=None, recipe=None, max_new=64, newline=True, max_rows=None):
    """Greedy answers to each task's questions, without its context: a list of strings per task, and
    how many of them were cut off at max_new tokens.

    With `weights`, task i is answered under the adapter weights[i] (P,), all of them in one batch.
    NOTE(paper): generation stops at EOS and, with `newline`, also at a line break after the first
    token; the official code stops at EOS only (--stop eos imitates it)."""
    adapters = slots = None
    if weights is not None:
        adapters = Adapters(model, len(weights), recipe.rank, recipe.alpha, recipe.targets)
        torch.stack(weights, out=adapters.flat)
        slots = [i for i, task in enumerate(tasks) for _ in task.queries]
    prompts = [tok.prompt(query) for task in tasks for query in task.queries]
    rows = generate(model, prompts, max_new, tok.stop, late_stop=tok.newlines() if newline else (),
                    banned=tok.banned(model), adapters=adapters, slots=slots, max_rows=max_rows)
    ended = {*tok.stop, *(tok.newlines() if newline else ())}
    texts = (tok.decode(row).strip() for row in rows)
    texts = iter([text.split("\n")[0] if newline else text for text in texts])
    cut = iter([len(row) == max_new and row[-1] not in ended for row in rows])
    return ([task.vote([next(texts) for _ in task.queries]) for task in tasks],
            [sum(next(cut) for _ in task.queries) for task in tasks])


def grade(task, predictions):
    """Which questions are answered rightly; an empty answer is wrong. Its mean is the accuracy."""
    return [bool(prediction.strip()) and task.grade(question, gold, prediction)
            for question, gold, prediction in zip(task.questions, task.answers, predictions)]


def grade_all(tasks, answers):
    """`grade` of many tasks; a slow judge sees all of their answers at once."""
    waiting = defaultdict(list)
    for task, row in zip(tasks, answers):
        if hasattr(task.grade, "prepare"):
            waiting[task.grade] += zip(task.questions, task.answers, row)
    for judge, triples in waiting.items():
        judge.prepare(triples)
    return [grade(task, row) for task, row in zip(tasks, answers)]


@dataclass
class Outcome:
    """What a self-edit was worth: an entry for each seed of the inner loop, and their mean."""
    reward: float = 0.0
    accuracy: list = field(default_factory=list)
    answers: list = field(default_factory=list)     # a list of the answers, per seed
    right: list = field(default_factory=list)       # a list of verdicts, per seed
    losses: list = field(default_factory=list)      # [first, last], per seed
    seconds: float = 0.0
    cut: int = 0            # answers that ran to the cap, of all seeds
    note: str = ""


def make_job(model, tok, edit, seed, recipe):
    """The SFT job of one self-edit: loss on its documents, all of them by its directives.

    A text that exceeds the context window is cut, a (prompt, completion) pair is left out.
    NOTE(paper): a document ends with one EOS, which is learned. The official code pads every row
    with EOS to 2048 tokens and learns them all, 98 % of its targets: --pad-to 2048."""
    chosen, examples = replace(recipe, **{name: value for name, value in edit.directives.items()
                                          if hasattr(recipe, name)}), []
    for document in edit.documents:
        if isinstance(document, str):
            ids = tok.document(document)[:model.config.max_len]
            examples.append((ids, [True] * len(ids)))
        else:
            example = dialogue(tok.prompt(document[0]), [*tok.encode(document[1]), tok.eos],
                               chosen.completion_only)
            examples += [example] if len(example[0]) <= model.config.max_len else []
    return chosen.job(examples, seed)


def update_and_score(model, tok, tasks, edits, seeds, recipe,
                     progress=lambda done, total: None, **asking):
    """theta' <- SFT(theta, SE); Ans ~ LM_theta'(. | tau); r(Ans, tau), for many self-edits at once.

    edits[i] is a self-edit of tasks[i]; it is tried once per seed in seeds[i]. Yields (i, Outcome)
    when known. Nothing to learn from, or a diverging adapter, is a reward of 0 and a note."""
    outcomes, jobs, owner = defaultdict(Outcome), [], []
    for i, edit in enumerate(edits):
        job = make_job(model, tok, edit, 0, recipe)
        if not job.examples:
            window = "no example of this self-edit fits in the model's context window"
            yield i, Outcome(note=edit.note or (window if edit.documents else EMPTY))
            continue
        jobs += [replace(job, seed=seed) for seed in seeds[i]]
        owner += [i] * len(seeds[i])
    # Adapters that answer together: bytes per parameter as trained, side by side, in bfloat16.
    most = free_memory(model.device) / 3 / (10 * parameters(model, recipe))
    at_once = max(1, min(64 if model.device.type == "cuda" else 16, int(most)))
    ready = []
    for count, (j, trained) in enumerate(sft(model, jobs, recipe, progress), 1):
        ready.append((owner[j], trained))
        if len(ready) < at_once and count < len(jobs):
            continue
        sound = [(i, trained.weights) for i, trained in ready if not trained.diverged]
        graded = [tasks[i] for i, _ in sound]
        answers, cut = ask(model, tok, graded, [w for _, w in sound], recipe,
                           **asking) if sound else ([], [])
        results = zip(answers, cut, grade_all(graded, answers))
        for i, trained in ready:
            o, task = outcomes[i], tasks[i]
            none = [""] * len(task.questions), 0, [False] * len(task.questions)
            answer, n_cut, right = none if trained.diverged else next(results)
            o.answers.append(answer)
            o.right.append(right)
            o.cut += n_cut
            o.accuracy.append(sum(o.right[-1]) / len(task.questions))
            o.losses.append([round(loss, 4) for loss in (trained.losses[0], trained.losses[-1])])
            o.seconds += trained.seconds
            if trained.diverged:
                o.note = "diverged: reward 0 for this seed"
            if len(o.accuracy) == len(seeds[i]):
                o.reward = sum(o.accuracy) / len(seeds[i])
                yield i, outcomes.pop(i)
        ready = []


def main():
    from data import knowledge
    from tokenizer import Tokenizer
    ap = argparse.ArgumentParser(description="Learn one passage; ask about it before and after.")
    ap.add_argument("--model", required=True, help="folder or hub id")
    ap.add_argument("--data", required=True, help="JSON list of passages")
    ap.add_argument("--index", type=int, default=0, help="which passage")
    ap.add_argument("--max-new", type=int, default=200, help="tokens of the self-edit")
    ap.add_argument("--save-adapter", metavar="DIR", help="write the adapter in PEFT's layout")
    args = ap.parse_args()
    task = pick(knowledge.load(args.data), args.index)
    model = load_pretrained(args.model)
    tok = Tokenizer.from_pretrained(model.folder)
    recipe = Recipe(rank=32, alpha=64, targets=["q_proj", "v_proj"], lr=1e-3, epochs=10, batch=1)
    ((edit,),) = sample_self_edits(model, tok, [task], 1, [[seed_for(0)]], max_new=args.max_new)
    print(f"{task.context[0]}\n\n--- self-edit\n{edit.text}\n")
    (before,), _ = ask(model, tok, [task])
    ((_, trained),) = sft(model, [make_job(model, tok, edit, 0, recipe)], recipe)
    (after,), _ = ask(model, tok, [task], [trained.weights], recipe)
    print(f"--- {len(trained.losses)} steps in {trained.seconds:.0f} s, "
          f"loss {trained.losses[0]:.2f} -> {trained.losses[-1]:.2f}")
    for question, gold, old, new in zip(task.questions, task.answers, before, after):
        print(f"{question} ({gold})\n  before: {old!r}\n  after:  {new!r}")
    print(f"right: {sum(grade(task, before))} -> {sum(grade(task, after))} of {len(before)}")
    if args.save_adapter:
        adapters = Adapters(model, 1, recipe.rank, recipe.alpha, recipe.targets)
        adapters.flat[0] = trained.weights
        adapters.save(0, args.save_adapter)


if __name__ == "__main__":
    cli(main)
