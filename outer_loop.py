"""SEAL's outer loop: ReST-EM teaches a model to write the self-edits that teach it best.

    python outer_loop.py                        # a tiny world, in minutes on a laptop
    python outer_loop.py --preset tiny-arc      # tiny puzzles
    python outer_loop.py --preset knowledge --model DIR_OR_HUB_ID --train-data FILE --eval-data FILE

Algorithm 1 of the paper (arXiv 2506.10943) is `rest_em`. What is sampled and measured goes to the
run's folder (support/run.py), and the same command resumes it. On several GPUs:

    torchrun --nproc-per-node 8 outer_loop.py ...       # support/ranks.py
"""
import random
import time
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch.nn.functional import nll_loss

from data.tasks import DOMAINS, load_data
from engine.decode import Sampling
from engine.device import less_memory, peak_memory, try_memory
from inner_loop import (answering, ask, grade_all, in_prompt, inner_recipe, reward,
                        update_and_score)
from lora import Adapters, Job, Lora, Recipe, dialogue, sft_one
from model import load_pretrained
from selfedit import SelfEdit, Task, read_self_edit, sample_self_edits, seed_for
from support import ranks
from support.config import Config, add_flags, read_flags
from support.files import Parser, UserError, cli, printable
from support.report import opening, summary, when
from support.run import Run
from support.stats import bootstrap_ci, by_kind


def rest_em(run: Run, train: list[Task], held_out: list[Task], learn=None):
    """Algorithm 1: theta is trained to maximise

        J(theta) = E_{(C, tau) ~ D} E_{SE ~ LM_theta(. | C)} [ r(SE, tau, theta) ]              (1)

    D is `train`, from which each round takes the next tasks. What was measured is in run.metrics.
    learn: replaces `m_step` (same arguments)."""
    cfg = run.cfg
    learn = learn or m_step
    for t in range(run.last_checkpoint(), cfg.iterations):
        model = run.load(t)                                             # theta_t
        evaluate(cfg, run, model, held_out, t)

        # E-step: sample self-edits, and measure the model that each of them makes.
        run.log(f"\nRound {t + 1}: the E-step, on {cfg.tasks} tasks to learn from")
        tasks = next_tasks(cfg, train, t)                               # (C, tau) ~ D
        edits = sample(run, model, tasks, t, "train", cfg.edits)        # SE ~ LM_theta_t(. | C)
        without = unadapted(run, model, tasks)
        # theta'_t <- SFT(theta_t, SE); Ans ~ LM_theta'_t(. | tau); r <- r(Ans, tau)
        rewards = score(run, model, tasks, edits, t, "train", without, cfg.seeds)

        # M-step: fine-tune the model on the self-edits, weighed by what they were worth.
        chosen = weigh(cfg, rewards, edits, without, t)
        run.keep_weights(t, chosen)
        run.show_round(t, tasks, edits, rewards, without, chosen)
        kept = [(tasks[i], edits[i][j], weight) for i, j, weight in chosen]
        # NOTE(paper): a round goes on from the last one, as in the official code. ReST-EM as Singh
        # et al. describe it starts from the base model every time: --restart.
        start = 0 if cfg.restart and kept else t
        del model                               # never two copies of the weights
        run.make(t + 1, start, lambda theta: learn(cfg, run, theta, kept, t))   # theta_t+1

    evaluate(cfg, run, run.load(cfg.iterations), held_out, cfg.iterations)


# ------------------------------------------------------------------------------- the E-step

def next_tasks(cfg: Config, train: list[Task], t: int) -> list[Task]:
    """Round t's tasks: the next ones in turn, from the beginning again after the last one."""
    return [train[(t * cfg.tasks + i) % len(train)] for i in range(cfg.tasks)]


def sample(run: Run, model, tasks: list[Task], t: int, split: str, k: int) -> list[list[SelfEdit]]:
    """SE ~ LM_theta_t(. | C): k self-edits of each task."""
    cfg = run.cfg

    def write(todo):        # numbers of tasks
        # The longest prompt of the round sets the limit for all: the same for every rank's share.
        prompts = [text for task in tasks for text in (task.prompt, task.own_prompt)]
        room = model.config.max_len - max(len(run.tok.prompt(text)) for text in prompts)
        sampling = Sampling(min(cfg.max_edit_tokens, room), k, cfg.temperature, cfg.top_p,
                            max_rows=cfg.rows)
        own = [tasks[i] for i in todo]
        seeds = []
        for i in todo:
            seeds.append([seed_for(cfg.seed, t, split, i, j, "edit") for j in range(k)])
        written = sample_self_edits(model, run.tok, own, sampling, seeds,
                                    progress=run.meter("self-edits"))
        for n, edits in written:
            yield todo[n], [{"text": edit.text, "token_ids": edit.token_ids, "made": edit.made}
                            for edit in edits]

    # All k of a task are written together.
    groups = [[(i, j) for j in range(k)] for i in range(len(tasks))]
    costs = [len(task.prompt) for task in tasks]
    found = run.remember(run.edits, (t, split, ""), groups, costs, write)
    edits = []
    for task, group in zip(tasks, groups):
        records = [found[place] for place in group]
        edits.append([read_self_edit(task, r["text"], r["token_ids"], r.get("made", ""))
                      for r in records])
    return edits


def score(run: Run, model, tasks: list[Task], edits: list[list[SelfEdit]], t: int, split: str,
          without: list[float], n_seeds: int, arm="") -> list[list[float]]:
    """r(SE, tau, theta_t) of every self-edit, each by inner loops of its own, one for each seed.

    without: the un-adapted accuracies, for the record. arm: whose self-edits these are, empty for
    the model's own. The seeds do not depend on it, so all arms start from the same adapters."""
    cfg = run.cfg
    places = []     # (task, edit)
    costs = []      # characters to train on, over all epochs
    for i, row in enumerate(edits):
        for j, edit in enumerate(row):
            places.append((i, j))
            characters = sum(len("".join(document)) for document in edit.documents)
            costs.append(characters * edit.directives.get("epochs", 1))

    def try_out(todo):      # numbers of places
        own = [places[number] for number in todo]
        seeds = []
        for i, j in own:
            seeds.append([seed_for(cfg.seed, t, split, i, j, s, "adapter") for s in range(n_seeds)])
        # theta' <- SFT(theta_t, SE);  Ans ~ LM_theta'(. | tau);  r <- r(Ans, tau)
        outcomes = update_and_score(
            model, run.tok, [replace(tasks[i], unadapted=without[i]) for i, _ in own],
            [edits[i][j] for i, j in own], seeds,
            inner_recipe(cfg), answering(cfg), run.meter("optimiser steps"))
        for n, outcome in outcomes:
            i, j = own[n]
            task, edit = tasks[i], edits[i][j]
            record = {
                "unadapted": without[i], "title": task.name, "reward": outcome.reward,
                "text": edit.text, "token_ids": edit.token_ids, "directives": edit.directives,
                "tools": edit.tools, "made": edit.made, "documents": len(edit.documents),
                "questions": task.questions, "gold": task.answers, "answers": outcome.answers,
                "right": outcome.right, "losses": outcome.losses, "cut": outcome.cut,
                "replies": len(outcome.right) * len(task.queries),
                "context": "\n\n".join(task.context), "kinds": task.kinds,
                "forms": [task.form(line) for line in edit.text.splitlines() if task.form],
                "seconds": round(outcome.seconds, 2), "note": outcome.note}
            yield todo[n], [record]

    found = run.remember(run.rollouts, (t, split, arm), [[place] for place in places], costs,
                         try_out)
    rewards = []
    for i, row in enumerate(edits):
        rewards.append([found[i, j]["reward"] for j in range(len(row))])
    return rewards


def verdicts(run: Run, model, tasks: list[Task], adapter=None) -> list[list[bool]]:
    """Which questions the model, as it is or under one adapter, answers correctly, per task."""
    mine = ranks.share_of([len(task.queries) for task in tasks])
    own_tasks = [tasks[i] for i in mine]
    (answers,) = ask(model, run.tok, [own_tasks], answering(run.cfg), adapter)
    right = grade_all(own_tasks, [answer.texts for answer in answers])
    found = {}
    for part in ranks.gather(dict(zip(mine, right))):
        found |= part
    return [found[i] for i in range(len(tasks))]


def unadapted(run: Run, model, tasks: list[Task]) -> list[float]:
    """Accuracy of the model as it is, on each task."""
    return [float(np.mean(right)) for right in verdicts(run, model, tasks)]


# ------------------------------------------------------------------------------- the M-step

def weigh(cfg: Config, rewards: list[list[float]], edits: list[list[SelfEdit]],
          without: list[float], t: int) -> list[tuple[int, int, float]]:
    """(task, edit, weight) of the self-edits to learn from. ReST-EM: 1 for those it selects.

    reinforce: the advantage, a reward minus the mean reward of its task, for all of them, the
    unreadable ones included. grpo: the same in standard deviations of the task's rewards
    (arXiv 2402.03300, without its ratio and KL term: take one epoch, all in one step)."""
    if cfg.update not in ("reinforce", "grpo"):
        return [(i, j, 1.0) for i, j in select(cfg, rewards, edits, without, t)]
    weights = []
    for i, row in enumerate(rewards):
        advantages = np.array(row) - np.mean(row)
        if cfg.update == "grpo":
            advantages /= np.std(row) + 1e-6
        for j, advantage in enumerate(advantages):
            # One that is neither better nor worse than its task's mean teaches nothing.
            if abs(advantage) > 1e-6:
                weights.append((i, j, float(advantage)))
    return weights


def select(cfg: Config, rewards: list[list[float]], edits: list[list[SelfEdit]],
           without: list[float], t: int) -> list[tuple[int, int]]:
    """(task, edit) indices of the self-edits to learn from.

    best: each task's `keep` best, the first of equals. solved: all with reward 1, or --solved-at
    and above. random: any `keep` of each task, a control that cannot learn.
    NOTE(paper): Eq. 2 gives a reward of 1 only if the update improves the model. The official code
    keeps the best of K regardless, and so do we, unless --strict is given."""
    rng = random.Random(seed_for(cfg.seed, t, "select"))
    kept = []
    for i, row in enumerate(rewards):
        # A self-edit without documents teaches nothing, and is never kept.
        usable = [j for j in range(len(row)) if edits[i][j].documents]
        if cfg.update == "solved":
            chosen = [j for j in usable if row[j] >= cfg.solved_at]
        elif cfg.update == "random":
            chosen = sorted(usable, key=lambda j: rng.random())[:cfg.keep]
        else:
            # Sorting is stable: of equal rewards the first stays first.
            chosen = sorted(usable, key=lambda j: -row[j])[:cfg.keep]
        # r = 1 if the update improves on theta_t, else 0                                       (2)
        if cfg.strict:
            chosen = [j for j in chosen if row[j] > without[i]]
        kept += [(i, j) for j in chosen]
    return kept


def outer_recipe(cfg: Config) -> Recipe:
    """How the M-step trains."""
    return Recipe(
        Lora(cfg.outer_rank, cfg.outer_alpha, cfg.outer_targets), lr=cfg.outer_lr,
        epochs=cfg.outer_epochs, batch=cfg.outer_batch, clip=cfg.clip,
        weight_decay=cfg.weight_decay)


def m_step(cfg: Config, run: Run, model, kept: list[tuple[Task, SelfEdit, float]], t: int):
    """theta_t+1 <- SFT(theta, the weighed self-edits), merged into the weights. theta is theta_t,
    or theta_0 with --restart.

    The gradient of J, estimated from the samples, with the rewards as constants (docs/PAPER.md
    derives it). r_ij is the weight: 1 for the self-edits that `select` kept, 0 for the others:

        grad J ~ 1/(N M) sum_ij r_ij sum_s grad log p_theta(y_ijs | y_ij<s, C_i)             (3, 4)

    y_ij1, y_ij2, ... are the tokens of self-edit SE_ij. Up to a factor this is the gradient of
    fine-tuning on the kept self-edits, each after its context. So the loss is on the self-edit
    only, exactly as it was sampled, EOS included. The factor is one over a batch's tokens, each
    times the size of its weight. It differs from batch to batch; AdamW divides by such sizes.
    NOTE(paper): an edit that ran to the cap has no EOS, and none is added: the official code adds
    one, and so teaches the model to stop there."""
    if not kept:
        run.log("M-step: no self-edit to learn from; the model stays as it is")
        return
    # The context is read, the self-edit is learned: with the ids as they were sampled, since text
    # that is tokenised again need not give the same ids. One job, so one adapter, of all pairs.
    recipe = outer_recipe(cfg)
    examples = []
    for task, edit, weight in kept:
        examples.append(dialogue(run.tok.prompt(task.prompt), edit.token_ids, weight=weight))
    job = Job(examples, seed_for(cfg.seed, t, "M-step"), recipe)
    # A few of those that are to become likelier: what they cost the model before, and after.
    wanted = [example for example in examples if example[1][-1] > 0][:recipe.batch]
    before = loss_of(model, wanted)
    train = partial(sft_one, model, job, run.meter("steps of the M-step"))
    ok, trained = try_memory(train)
    if not ok:
        less_memory(model, slots=1)     # recomputes activations, and says so
        trained = train()
        model.recompute = cfg.recompute
    # W <- W + (alpha / r) B A, once, in float32: the next round begins from these weights.
    Adapters.stack(model, recipe.lora, [trained.weights]).merge(0)
    # A step's loss is taken before the step, so measure once more after the last one. If the mean
    # loss of what was to be learned rose by more than 1, or is NaN, the model is broken.
    learned = loss_of(model, wanted) < before + 1
    if trained.diverged or not learned or not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"the M-step of round {t + 1} diverged; try a lower --outer-lr, "
                        "in a new --run-dir")
    run.log(f"M-step: {len(kept)} self-edits, {len(trained.losses)} steps, "
            f"{trained.seconds:.0f} s, loss {trained.losses[0]:.3f} -> {trained.losses[-1]:.3f}")


@torch.no_grad()
def loss_of(model, examples: list[tuple]) -> float:
    """The mean negative log-likelihood of what these (ids, learn) have to learn."""
    costs = []
    for ids, learn in examples:
        ids = torch.tensor(ids, device=model.device)
        nll = nll_loss(model(ids[None])[0, :-1].float().log_softmax(-1), ids[1:], reduction="none")
        costs.append(nll[torch.tensor(learn[1:], device=model.device) > 0].mean().item())
    return sum(costs) / max(1, len(costs))


# ------------------------------------------------------------------------------- evaluation

def evaluate(cfg: Config, run: Run, model, tasks: list[Task], t: int):
    """Held-out reward of theta_t, with an inner loop per self-edit: a line of metrics.jsonl."""
    # A resumed run has it already.
    if any(m["iteration"] == t for m in run.metrics.records):
        return
    run.log(f"\n{len(tasks)} held-out tasks, {when(t)}")
    edits = sample(run, model, tasks, t, "eval", cfg.eval_edits)
    without = unadapted(run, model, tasks)
    arms = baselines(run, model, tasks, without) if cfg.baselines and t == 0 else []
    rewards = score(run, model, tasks, edits, t, "eval", without, n_seeds=1)

    # The mean over tasks, with a bootstrap interval over tasks, not over self-edits: more
    # self-edits of one task say nothing about other tasks.
    per_task = np.mean(rewards, axis=1)
    last_round = [r["reward"] for r in run.rollouts.of(t - 1, "train")]
    run.record({
        "iteration": t,
        "eval_reward": float(np.mean(per_task)),
        "eval_ci": bootstrap_ci(per_task),
        "eval_by_kind": by_kind([task.kinds for task in tasks], run.rollouts.of(t, "eval")),
        "eval_unadapted": float(np.mean(without)),
        "eval_tasks": len(tasks),
        "baselines": arms,
        "train_reward": float(np.mean(last_round)) if last_round else None,
        "made_of": DOMAINS[cfg.domain].describe(tasks, edits),
        "seconds": round(time.time() - run.begin, 1)})


def baselines(run: Run, model, tasks: list[Task], without: list[float]) -> list[dict]:
    """What the model can do without a self-edit of its own, on the same questions: as it is; with
    the passage in the prompt; trained on reference self-edits, which no model wrote."""
    kinds = [task.kinds for task in tasks]
    arms = [{"name": "un-adapted", "reward": float(np.mean(without)), "by_kind": {}}]
    if tasks[0].context:
        read = float(np.mean(unadapted(run, model, in_prompt(tasks))))
        arms.append({"name": "passage in the prompt", "reward": read, "by_kind": {}})
    # All tasks of a domain have references of the same names.
    for name in tasks[0].references:
        edits = [[task.references[name]] for task in tasks]
        scores = score(run, model, tasks, edits, 0, "eval", without, n_seeds=1, arm=name)
        arms.append({"name": name, "reward": float(np.mean(scores)),
                     "by_kind": by_kind(kinds, run.rollouts.of(0, "eval", name))})
    return arms


# ------------------------------------------------------------------------------- command line

def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("--plan", action="store_true",
                    help="say what fits on --card and how long it takes, and run nothing")
    ap.add_argument("--card", type=int, default=80, metavar="GIB",
                    help="memory of the card that --plan is for (default: 80)")
    add_flags(ap)
    args = ap.parse_args()
    if args.plan:
        from tools.plan import plan     # only here: the loop needs no plan
        return print(printable(plan(read_flags(args, needed=("model",)), args.card), 10 ** 5))
    cfg = read_flags(args, needed=("model", "train_data", "eval_data"))
    run = Run(cfg, load_pretrained)
    train, held_out = load_data(run)
    if len(run.metrics.records) > cfg.iterations:
        run.log(f"{run.folder} is complete: it is shown again, and nothing is computed. To run "
                "anew, name another --run-dir, or delete this folder.")
    else:
        run.log(opening(cfg, reward.__doc__))
    run.load(run.last_checkpoint())     # a model that can't be read is told before any work
    rest_em(run, train, held_out)
    run.log("\n" + summary(run))
    another = "tiny" if "arc" in cfg.domain else "tiny-arc"
    run.log(f"\n{time.time() - run.begin:.0f} s, peak memory {peak_memory() / 2 ** 30:.1f} GiB; "
            f"look at {run.folder}/report.html; then try --seed 1, or --preset {another}")


if __name__ == "__main__":
    cli(main)
