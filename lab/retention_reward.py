"""Can SEAL learn not to forget? ReST-EM with a reward that counts what a self-edit destroys.

    python -m lab.retention_reward --out retention.jsonl --svg retention.svg

reward = accuracy on its town - lambda * (accuracy on earlier towns, before - after)

The paper suggests it (section 5). A round is one of outer_loop.py (--preset tiny), but for this:
the model on which self-edits are tried is a copy of the policy that has first learned 8 other
towns, from all true notes about them at once. So there is something to lose in every round, which
M-steps do not touch. Each self-edit is asked about its own town and these eight, under the same
adapter. lambda 0 is SEAL. About 4 minutes for a lambda and a seed on one core. Several processes
may share the work: each with its own --seeds and --out, which `cat` joins.
"""
import copy
import random
import time
from dataclasses import dataclass, replace
from itertools import chain
from types import SimpleNamespace

import numpy as np

from files import Lines, Parser, cli, positive
from config import PRESETS, Config, inner_recipe
from data import tinyworld
from generate import Sampling
from inner_loop import ask, grade_all, make_job, update_and_score
from lab.curve import pyplot, save, with_interval
from lora import Adapters
from model import Transformer, load_pretrained
from outer_loop import in_order, m_step, next_tasks, select
from progress import Meter
from selfedit import SelfEdit, Task, sample_self_edits, seed_for
from sft import sft
from stats import mean_ci
from tokenizer import Tokenizer

LAMBDAS = [0, .5, 1, 2]
EARLIER = "earlier"     # the kind of a question about a town that was learned before


# ------------------------------------------------------------------------------- ReST-EM

@dataclass
class Round:
    """Round t: the policy, which writes, and a copy of it that has learned the earlier towns."""
    cfg: Config
    tok: Tokenizer
    policy: Transformer
    learner: Transformer
    earlier: list[Task]
    known: float            # the learner's accuracy on the earlier towns
    t: int

    def try_edits(self, tasks: list[Task], split: str, k: int, progress):
        """(k self-edits of each task, what the learner learned and lost by each (tasks, k, 2))."""
        cfg, key = self.cfg, (self.cfg.seed, self.t, split)
        sampling = Sampling(cfg.max_edit_tokens, k, cfg.temperature, cfg.top_p)
        seeds = [[seed_for(*key, i, j, "edit") for j in range(k)] for i in range(len(tasks))]
        edits = sample_self_edits(self.policy, self.tok, tasks, sampling, seeds)

        # Every self-edit is asked about its own town and the earlier ones, under one adapter.
        places = [(i, j) for i in range(len(tasks)) for j in range(k)]
        asked = [with_questions(tasks[i], self.earlier) for i, _ in places]
        seeds = [[seed_for(*key, i, j, 0, "adapter")] for i, j in places]
        outcomes = update_and_score(self.learner, self.tok, asked, [edits[i][j] for i, j in places],
                                    seeds, inner_recipe(cfg), answering(cfg), progress)
        # What can't be read teaches nothing and destroys nothing.
        found = np.zeros((len(tasks), k, 2))
        for n, outcome in outcomes:
            if outcome.right:
                found[places[n]] = learned_and_lost(outcome.right[0], asked[n], self.known)
        return edits, found


def run_arm(args, weight: float, seed: int) -> dict:
    """ReST-EM with this lambda: a line of the file, with a list over iterations for each figure."""
    begin = time.time()
    cfg = Config(**PRESETS["tiny"] | dict(seed=seed, directives=args.directives))
    policy = load_pretrained(cfg.model)
    tok = Tokenizer.from_pretrained(policy.folder)
    # The earlier towns are none of those that the rounds learn from.
    train = in_order(tinyworld.load(cfg.train_data, cfg.directives), seed)
    earlier, train = train[-args.earlier:], train[:-args.earlier]
    held_out = tinyworld.load(cfg.eval_data, cfg.directives)[:args.eval_tasks]

    record = {"lambda": weight, "seed": seed, "learned": [], "lost": [], "known": [], "tokens": [],
              "made of": []}
    for t in range(args.iterations + 1):
        learner, known = with_towns(cfg, policy, tok, earlier)
        this = Round(cfg, tok, policy, learner, earlier, known, t)
        where = f"lambda {weight:g}, seed {seed}, round {t}"
        edits, found = this.try_edits(held_out, "eval", cfg.eval_edits,
                                      Meter(f"steps, held-out, {where}"))
        tokens = [len(edit.token_ids) for row in edits for edit in row]
        record["learned"].append(float(found[..., 0].mean()))
        record["lost"].append(float(found[..., 1].mean()))
        record["known"].append(known)
        record["tokens"].append(float(np.mean(tokens)))
        record["made of"].append(tinyworld.describe(held_out, edits))
        if t == args.iterations:
            break

        # E-step and M-step, as in outer_loop.rest_em, but for the reward.
        tasks = next_tasks(train, t, args.tasks)
        edits, found = this.try_edits(tasks, "train", cfg.edits, Meter(f"steps, {where}"))
        rewards = found[..., 0] - weight * found[..., 1]
        kept = select(cfg, rewards.tolist(), edits, [0.0] * len(tasks), t)
        quiet_run = SimpleNamespace(tok=tok, log=lambda line: None)
        m_step(cfg, quiet_run, policy, [(tasks[i], edits[i][j], 1.0) for i, j in kept], t)
    return record | {"seconds": round(time.time() - begin)}


def with_towns(cfg, policy, tok, towns: list[Task]) -> tuple[Transformer, float]:
    """(a copy of the policy that has learned these towns, its accuracy on them)."""
    documents = []
    for task in towns:
        # Every note that can be made of the town, and its passage: the town as `load` makes it.
        rng = random.Random(task.name)
        town = tinyworld.make_town(rng, task.name, out=True)
        documents += [town.say(relation, form, rng) for relation, form in town.notes()]
        documents.append(town.passage)
    recipe = inner_recipe(cfg)
    job = make_job(policy, tok, SelfEdit(documents=documents), seed_for(cfg.seed, "towns"), recipe)
    ((_, trained),) = sft(policy, [job])
    learner = copy.deepcopy(policy)
    Adapters.stack(learner, recipe.lora, [trained.weights]).merge(0)
    (answers,) = ask(learner, tok, [towns], answering(cfg))
    right = grade_all(towns, [one.texts for one in answers])
    return learner, float(np.mean(list(chain.from_iterable(right))))


def answering(cfg) -> Sampling:
    return Sampling(cfg.max_answer_tokens, newline_stops=True)


def with_questions(task: Task, earlier: list[Task]) -> Task:
    """The task, that also asks what the earlier ones ask."""
    asked = replace(task, kinds=["own"] * len(task.questions))
    for other in earlier:
        asked = replace(asked, questions=asked.questions + other.questions,
                        queries=asked.queries + other.queries,
                        answers=asked.answers + other.answers,
                        kinds=asked.kinds + [EARLIER] * len(other.questions))
    return asked


def learned_and_lost(right: list[bool], task: Task, before: float) -> tuple[float, float]:
    """(accuracy on the task's own questions, by how much that on the earlier ones fell)."""
    own = [verdict for verdict, kind in zip(right, task.kinds) if kind != EARLIER]
    old = [verdict for verdict, kind in zip(right, task.kinds) if kind == EARLIER]
    return float(np.mean(own)), before - float(np.mean(old))


# ------------------------------------------------------------------------------- what came out

def table(records: list[dict]) -> str:
    """Markdown: rows per lambda, before and after training, with 95 % intervals over seeds."""
    lines = ["| lambda | round | learned | lost | learned - lost | known before | tokens "
             "| made of |", "|---|---|---|---|---|---|---|---|"]
    for weight, own in by_lambda(records).items():
        for t in (0, len(own[0]["learned"]) - 1):
            rows = []
            for r in own:
                learned, lost = r["learned"][t], r["lost"][t]
                rows.append([learned, lost, learned - lost, r["known"][t]])
            cells = [with_interval(m, h, ".3f") for m, h in zip(*mean_ci(rows))]
            cells.append(f"{np.mean([r['tokens'][t] for r in own]):.0f}")
            forms = sorted({form for r in own for form in r["made of"][t]})
            shares = {form: np.mean([r["made of"][t].get(form, 0) for r in own]) for form in forms}
            most = sorted(shares, key=lambda form: -shares[form])
            cells.append(", ".join(f"{form} {shares[form]:.0%}" for form in most
                                   if shares[form] >= .05))
            lines.append(f"| {weight:g} | {t} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_lambda(records):
    weights = sorted({r["lambda"] for r in records})
    return {weight: [r for r in records if r["lambda"] == weight] for weight in weights}


def draw(records, file):
    """Learned against lost: a path over the rounds for each lambda."""
    figure, axes = pyplot().subplots(figsize=(6, 4.2), layout="constrained")
    for weight, own in by_lambda(records).items():
        x, x_half = mean_ci([r["lost"] for r in own])
        y, y_half = mean_ci([r["learned"] for r in own])
        axes.errorbar(x, y, np.nan_to_num(y_half), np.nan_to_num(x_half), marker="o", capsize=2,
                      label=f"lambda {weight:g}, {len(own)} seeds")
    axes.set_xlabel("lost: fall in accuracy on the earlier towns")
    axes.set_ylabel("learned: held-out accuracy on the new town", fontsize=9)
    axes.grid(color="#ddd")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False, ncols=2)
    save(figure, file)


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("--out", required=True, help="JSON lines, one per lambda and seed")
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    ap.add_argument("--lambdas", type=float, nargs="+", default=LAMBDAS)
    ap.add_argument("--directives", action="store_true",
                    help="a self-edit also chooses its learning rate and epochs")
    ap.add_argument("--iterations", type=positive, default=3)
    ap.add_argument("--earlier", type=positive, default=8, help="towns learned before (default: 8)")
    ap.add_argument("--tasks", type=positive, default=20, help="towns a round (default: 20)")
    ap.add_argument("--eval-tasks", type=positive, default=32)
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    args = ap.parse_args()
    done = Lines(args.out)
    known = {(r["lambda"], r["seed"]) for r in done.records}
    for seed in args.seeds:
        for weight in args.lambdas:
            if (weight, seed) not in known:
                done.add(run_arm(args, weight, seed))
    print(table(done.records))
    if args.svg:
        draw(done.records, args.svg)


if __name__ == "__main__":
    cli(main)
