"""A reward for less: what are the self-edits worth that cheaper rewards choose?

    python -m lab.choosing --out FILE.jsonl
    python -m lab.choosing --scores --out FILE.jsonl
    python -m lab.choosing --run RUN_DIR --out FILE.jsonl

The untrained model's self-edits, 16 of a town, are tried with six seeds each: 5 minutes per seed of
the world. What are the best worth, by seeds that did not choose them, if fewer inner loops choose?
--scores: if no inner loop chooses, but one backward pass or less?
--run: of a real model's first round, about passages and with --seeds 2 or more. 4 s a self-edit.
"""
import itertools
import tempfile
from dataclasses import replace

import numpy as np
import torch

from data.tasks import in_order, load_tasks
from inner_loop import inner_recipe, make_job
from lab.credit import truth
from lab.experiment import Question, complete, over_passages, print_table, where
from lab.race import LAST, PRODUCT, RULES, USUAL, Rung, loss, products, race, trainer
from lab.reliability import accuracy_of, read_groups
from lab.tiny import RECIPE, SETTINGS, gold, run_of, start
from lora import Adapters, sft_one
from outer_loop import next_tasks, sample
from selfedit import read_self_edit, seed_for
from support.files import cli
from support.run import Run

SEEDS, JUDGES = 6, 3    # inner loops of a self-edit; of these some judge the choice of others
KEEP = 2                # self-edits of a town that are learned in the preset


def written(seed: int) -> tuple:
    """(run, model, tasks, edits): what the untrained model writes of the first round's tasks, with
    twice the usual K self-edits of each."""
    # Of the run's folder nothing is kept.
    with tempfile.TemporaryDirectory() as folder:
        run, train = start(folder, seed, edits=2 * SETTINGS["edits"])
        tasks, model = next_tasks(run.cfg, train, 0), run.load(0)
        return run, model, tasks, sample(run, model, tasks, 0, "train", run.cfg.edits)


def try_often(seed: int) -> dict:
    """A line: accuracies (tasks, K, seeds) of the untrained model's self-edits."""
    run, model, tasks, edits = written(seed)
    run_rung = trainer(run, model, tasks, edits, 0)
    pairs = list(itertools.product(range(run.cfg.tasks), range(run.cfg.edits)))
    found = {}
    for name, rung in (("whole", Rung(1, SEEDS)), ("half", Rung(1, 1, 1 / 2))):
        accuracies = np.reshape(run_rung(pairs, rung, 0), (len(tasks), run.cfg.edits, -1))
        found[name] = accuracies.round(4).tolist()
    return found


# ------------------------------------------------------------------------- fewer inner loops

def worth_by_race(rungs: list[Rung], whole, half, k: int, draws=100) -> tuple[np.ndarray, float]:
    """(what the chosen of the first k are worth (tasks,), by seeds that did not choose; inner loops
    per task). whole (tasks, K, seeds): accuracies; half: after half of the training steps."""
    n, _, seeds = whole.shape
    rng, values = np.random.default_rng(seed_for("race") % 2 ** 32), np.zeros(n)
    for _ in range(draws):
        # Which seed comes first is by chance, for each self-edit anew. The last ones judge.
        mixed = rng.permuted(whole[:, :k], axis=2)

        def run_rung(pairs, rung, first):
            known = mixed if rung.steps == 1 else half
            return [known[i, j, first:first + rung.seeds].tolist() for i, j in pairs]

        scores, loops = race(rungs, n, k, run_rung)
        values += worth(scores[:, :, None], mixed[:, :, seeds - JUDGES:], k)
    return values / draws, loops / n


def show_choices(parts: dict[str, list[dict]]):
    """What the choice of each rule is worth, with intervals over towns."""
    whole, half = joined(parts["choosing"], "whole"), joined(parts["choosing"], "half")
    values, loops = {}, {}
    for name, (times, rungs) in RULES.items():
        # There are twice the usual K self-edits.
        k = times * (whole.shape[1] // 2)
        values[name], loops[name] = worth_by_race(rungs, whole, half, k)
    rows = [["any", 0, f"{whole.mean():.3f}", ""]]
    for name, value in values.items():
        # Town by town.
        more = over_passages(value - values[USUAL], "+.3f")
        rows.append([name, f"{loops[name]:.1f}", f"{value.mean():.3f}", more])
    print_table(["rule", "inner loops per task", "worth of the chosen", f"against {USUAL}"], rows,
                f"{len(whole)} towns, the two best self-edits")


# --------------------------------------------------------------------- scores without an inner loop

# score -> its cost per self-edit, in passes. A backward pass includes its forward pass.
SCORES = {"number of tokens": "none",
          "answers that its lines state": "the world's truth",
          "answers, notes in the prompt": "1 forward",
          PRODUCT: "1 backward",
          "answers after one step": "1 backward, 1 forward"}
LOOP = "an inner loop (SEAL)"
# Who chooses -> the cost per self-edit, in passes.
COSTS = SCORES | {"half of the steps": "5 backward, answers",
                  LOOP: "10 backward, answers",
                  "the five other inner loops": "50 backward, answers"}


def score(model, tok, task, edits, seeds) -> list[dict[str, float]]:
    """{score: its value, the higher the better} of each self-edit. seeds: of the adapters."""
    untrained = Adapters(model, RECIPE.lora, 1)
    answers = gold(tok, task)
    # An epoch is one step here, as all documents are in one batch.
    one_step = replace(RECIPE, epochs=1)
    found = []
    for edit, seed, (product, _) in zip(edits, seeds, products(model, tok, task, edits)):
        try:
            job = make_job(model, tok, edit, seed, one_step)
        except ValueError:
            found.append(dict.fromkeys(SCORES, LAST))
            continue
        adapter = Adapters.stack(model, RECIPE.lora, [sft_one(model, job).weights])
        with torch.no_grad():
            after = loss(model, adapter, answers)
            # Without the passage, which is a document of every self-edit and has all answers.
            in_prompt = loss(model, untrained, gold(tok, task, edit.text + "\n\n"))
        found.append({"number of tokens": job.tokens,
                      "answers that its lines state": int(truth(task, edit).any(axis=0).sum()),
                      "answers, notes in the prompt": -in_prompt.item(),
                      PRODUCT: product,
                      "answers after one step": -after.item()})
    return found


def measure_scores(seed: int) -> dict:
    """A line: scores (towns, K) of the self-edits that try_often tries."""
    run, model, tasks, edits = written(seed)
    scores = {name: [] for name in SCORES}
    for i, task in enumerate(tasks):
        # Other seeds than those of the inner loops that judge.
        seeds = [seed_for(seed, "proxy", i, j) for j in range(len(edits[i]))]
        rows = score(model, run.tok, task, edits[i], seeds)
        for name, values in scores.items():
            values.append([round(row[name], 5) for row in rows])
    return {"scores": scores}


def others(whole):
    """(towns, K, inner loops): judge s is the mean of all inner loops but loop s. So no loop judges
    what it chose."""
    return (whole.sum(axis=2, keepdims=True) - whole) / (whole.shape[2] - 1)


def ranks(values):
    """Along the second axis, around 0: how many are lower minus how many are higher."""
    return np.sign(values[:, :, None] - values[:, None]).sum(axis=2)


def correlation(scores, judges):
    """(towns,) Spearman's, within a town, mean over judges; 0 where all are equal."""
    a, b = ranks(scores), ranks(judges)
    squares = (a ** 2).sum(axis=1) * (b ** 2).sum(axis=1)
    return ((a * b).sum(axis=1) / np.sqrt(np.maximum(squares, 1))).mean(axis=1)


def worth(scores, judges, k: int, keep=KEEP):
    """(towns,) what the best of k self-edits are worth, mean over groups of k and over judges."""
    found = []
    for first in range(0, judges.shape[1], k):
        group = slice(first, first + k)
        # Sorting is stable: of equals the first is chosen.
        ranked = np.argsort(-scores[:, group], axis=1, kind="stable")
        chosen = np.take_along_axis(judges[:, group], ranked[:, :keep], axis=1)
        found.append(chosen.mean(axis=(1, 2)))
    return np.mean(found, axis=0)


def joined(lines, name):
    """What they have under this name, the towns of all seeds one after another."""
    return np.concatenate([line[name] for line in lines])


def choosers(parts) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """({who chooses: scores (towns, K, inner loops or 1)}, judges (towns, K, inner loops))."""
    tried = []
    for line in parts["scores"]:
        tried += where(parts["choosing"], seed=line["seed"])
    whole = joined(tried, "whole")
    judges = others(whole)
    scores = [line["scores"] for line in parts["scores"]]
    found = {name: joined(scores, name)[:, :, None] for name in SCORES}
    found["half of the steps"] = joined(tried, "half")
    found[LOOP] = whole
    # What the judges themselves would choose: nothing can be worth more.
    found["the five other inner loops"] = judges
    return found, judges


def show_scores(parts):
    """What a choice among the usual K and among twice as many is worth, over towns."""
    found, judges = choosers(parts)
    towns, twice, _ = judges.shape
    k = twice // 2
    usual = worth(found[LOOP], judges, k)
    rows = [["any", "none", "", f"{judges.mean():.3f}", "", ""]]
    for name, scores in found.items():
        few = worth(scores, judges, k)
        many = worth(scores, judges, twice)
        alike = over_passages(correlation(scores, judges), ".2f")
        # Town by town.
        more = "" if name == LOOP else over_passages(few - usual, "+.3f")
        rows.append([name, COSTS[name], alike, f"{few.mean():.3f}", more, f"{many.mean():.3f}"])
    head = ["who chooses", "cost", "rank correlation", f"worth, {KEEP} of {k}",
            "against an inner loop", f"worth, {KEEP} of {twice}"]
    print_table(head, rows, f"{towns} towns, {twice} self-edits each")


def measure_run(run: Run, model, task, rollouts: list[dict]) -> dict:
    """A line: scores of the self-edits of a passage, and their accuracy with each seed."""
    edits = [read_self_edit(task, r["text"], r["token_ids"], r.get("made", "")) for r in rollouts]
    found = products(model, run.tok, task, edits, inner_recipe(run.cfg))
    return {"accuracy": accuracy_of(rollouts).round(4).tolist(),
            "product": [round(product, 5) for product, _ in found],
            "cosine": [round(cosine, 5) for _, cosine in found],
            "documents": [r["documents"] for r in rollouts],
            "tokens": [len(r["token_ids"]) for r in rollouts]}


def show_run(lines):
    """How each score ranks the self-edits of a passage, and what its choice is worth."""
    whole = np.array([line["accuracy"] for line in lines])          # (passages, K, seeds)
    judges = others(whole)
    scores = {LOOP: whole}
    for label, name, sign in (("product", "product", 1), ("cosine", "cosine", 1),
                              ("few documents", "documents", -1), ("few tokens", "tokens", -1)):
        scores[label] = sign * np.array([line[name] for line in lines])[:, :, None]
    k = whole.shape[1]
    rows = [["any", "", over_passages(whole.mean(axis=(1, 2)))]]
    for name, values in scores.items():
        rows.append([name, over_passages(correlation(values, judges), ".2f"),
                     over_passages(worth(values, judges, k, keep=1))])
    print_table(["who chooses", "rank correlation within a passage", f"worth, best of {k}"], rows,
                f"{len(lines)} passages")


def of_run(ap, args):
    first_round = [group for group in read_groups(args.run) if group[0]["iteration"] == 0]
    by_task = {group[0]["task"]: group for group in first_round}
    # The run itself is only read.
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(args.run, run_dir=folder, device="cpu")
        train = in_order(load_tasks(run, run.cfg.train_data), run.cfg.seed)
        tasks, model = next_tasks(run.cfg, train, 0), run.load(0)

        def measure(line):
            i = line["task"]
            return measure_run(run, model, tasks[i], by_task[i])

        show_run(complete(ap, args, [{"task": i} for i in sorted(by_task)], measure))


def main():
    parts = {"choosing": try_often, "scores": measure_scores}
    question = Question(parts, lambda part, seed: parts[part](seed), show_choices, draw=None,
                        kind="part")
    ap = question.flags(__doc__)
    ap.add_argument("--scores", action="store_true", help="choose without an inner loop")
    ap.add_argument("--run", metavar="RUN_DIR", help="of a real model")
    args = ap.parse_args()
    if args.run:
        return of_run(ap, args)
    if args.scores:
        question.show = show_scores
    else:
        args.parts = ["choosing"]
    question.answer(ap, args)


if __name__ == "__main__":
    cli(main)
