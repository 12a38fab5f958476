"""What is forgotten while 32 towns are learned one on top of the other: old towns, or how to study?

    python -m lab.forgetting RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]
    python -m lab.forgetting --skill RUN_DIR [RUN_DIR ...] --out FILE.jsonl [--svg FILE]

The model of round 3 of a finished run learns a stream of towns, and every adapter is merged before
the next town begins. 7 and 4 minutes a seed. Three things may keep old towns known:

* a merge by half: W <- W + (alpha / 2 r) B A;
* adapters on the last layers only (arXiv 2605.07076);
* rehearsal: the model writes what it remembers of earlier towns, given their first words, and
  self-edits of that. Both are learned beside the new self-edit, and count as much in the loss.

--skill: each self-edit is written when the stream comes to its town, and at times those of 12 other
towns are. A reward may fall since the model writes worse, or since it learns worse. So the model as
it is, and theta_3, from which the stream began, learn what the one and what the other writes.
"""
import math
import random
import sys
from dataclasses import dataclass, replace

import numpy as np
import torch

from data import tinyworld
from engine.decode import Sampling, collect, write
from engine.train import sft
from inner_loop import make_job
from lab.experiment import Question, draw_lines, over_seeds, print_table
from lab.tiny import RECIPE, WRITING, load, or_passage, score, verdicts, write_all
from lora import Adapters, Job, dialogue
from model import Transformer
from selfedit import SelfEdit, Task, sample_self_edits, seed_for
from support.files import cli
from support.ranks import Meter
from support.tokenizer import Tokenizer

LENGTH = 32     # towns of a stream
FIRST_WORDS = 4                     # of a passage: what is kept of it


@dataclass
class Stream:
    """Towns that a model learns one after the other, each by its self-edit."""
    model: Transformer
    tok: Tokenizer
    towns: list[Task]
    edits: list[SelfEdit]
    seed: int


@dataclass
class Arm:
    """How a town is learned on top of the others."""
    scale: float = 1.0      # W <- W + scale (alpha / r) B A
    layers: int = 4         # adapters on the last ones only
    replay: int = 0         # earlier towns to rehearse beside the new one
    kept: bool = False      # rehearse their self-edits as they were; else what the model remembers
    generic: int = 0        # self-edits of other towns, by the model as it is: KL to that model
    lr: float = RECIPE.lr
    # For --skill: self-edits of a town, of which the best by an inner loop is learned; and whether
    # theta_3 writes them, which never changes.
    tries: int = 1
    frozen: bool = False


GENTLE = Arm(scale=.5, layers=2)    # half of each merge, on half of the layers


def learn_town(stream: Stream, arm: Arm, k: int) -> dict[str, float]:
    """Train the stream's model on town k, and merge that. What it costs in tokens."""
    # As it is learned, so it is rehearsed.
    stream.edits[k] = or_passage(stream.towns[k], stream.edits[k])
    # The new self-edit, and beside it what is to keep the old ones.
    recipe = replace(RECIPE, lr=arm.lr)
    seed = seed_for(stream.seed, k, "adapter")
    job = make_job(stream.model, stream.tok, stream.edits[k], seed, recipe)
    old = rehearsal(stream, arm, k)
    generic = own_texts(stream.model, stream.tok, arm.generic, seed_for(stream.seed, k, "generic"))
    written = sum(sum(learn) for _, learn in (generic if arm.kept else old + generic))
    job = with_old(job, old + generic)

    # Adapters on the last layers: the others' gradients are zero, and so their B stays zero.
    adapter = Adapters(stream.model, recipe.lora, 1)
    adapter.init(0, job.seed)
    job = replace(job, start=adapter.flat[0], free=last_layers(adapter, arm.layers))
    ((_, trained),) = sft(stream.model, [job])
    if not trained.diverged:
        adapter.flat[0] = trained.weights * arm.scale ** .5     # then B A is `scale` times as large
        adapter.merge(0)
    return {"scale": arm.scale, "trained": job.tokens, "written": written}


def last_layers(adapters: Adapters, n: int) -> torch.Tensor:
    """(P,) bool: True at the parameters of the model's last n layers."""
    mask = torch.zeros_like(adapters.flat[:1], dtype=torch.bool)
    first = adapters.model.config.n_layer - n
    for name, (A, B) in zip(adapters.layers, adapters.pairs(mask)):
        number = int(name.split(".")[2])        # model.layers.3.self_attn.q_proj
        A[:] = B[:] = number >= first
    return mask[0]


def rehearsal(stream: Stream, arm: Arm, k: int) -> list:
    """Examples: self-edits of towns before the k-th, as they were or as the model remembers them.
    """
    # All arms rehearse the same towns.
    draw = random.Random(seed_for(stream.seed, k, "earlier"))
    chosen = draw.sample(range(k), min(k, arm.replay))
    old = [stream.edits[i] for i in chosen]
    if chosen and not arm.kept:
        towns = [stream.towns[i] for i in chosen]
        seeds = [seed_for(stream.seed, k, i, "recall") for i in chosen]
        old = recall(stream.model, stream.tok, towns, seeds)
    examples = []
    for edit in old:
        examples += make_job(stream.model, stream.tok, edit, 0, RECIPE).examples
    return examples


def recall(model, tok, towns: list[Task], seeds: list[int]) -> list[SelfEdit]:
    """What the model remembers of towns: self-edits, each with the passage as it remembers it.

    Nothing is read of a town but the first words of its passage, and how it asks for a self-edit.
    So what the model has forgotten, or mixes up, is rehearsed as it is."""
    # The likeliest words, as temperature 0 takes them. There must be room to write about them.
    likeliest = Sampling(max_new=min(WRITING.max_new, model.config.max_len // 4))
    cues = [" ".join(town.context[0].split()[:FIRST_WORDS]) for town in towns]
    replies = collect(write(model, tok, [cues], likeliest))
    # The same towns, with the passage in the prompt as the model remembers it.
    asked = []
    for town, cue, (reply,) in zip(towns, cues, replies):
        passage = f"{cue} {reply.text}"
        prompt = town.prompt.replace(town.context[0], passage)
        asked.append(replace(town, prompt=prompt, context=[passage]))
    written = collect(sample_self_edits(model, tok, asked, WRITING, [[seed] for seed in seeds]))

    edits = []
    for town, remembered, (edit,) in zip(towns, asked, written):
        # To read it added the true passage, which the model is not to see again.
        pieces = [document for document in edit.documents if document not in town.context]
        edits.append(replace(edit, documents=pieces + remembered.context))
    return edits


def own_texts(model, tok, n: int, seed: int) -> list:
    """Examples: self-edits of n training towns, as the model writes them now, after the passage.

    The loss on a sample of the old model is, in the mean, KL(old || new) and a constant."""
    towns = random.Random(seed).sample(tinyworld.load("train"), n)
    seeds = [[seed_for(seed, i)] for i in range(n)]
    # Samples of the model's own distribution, which neither temperature nor a nucleus changes.
    as_it_is = replace(WRITING, temperature=1, top_p=1)
    examples = []
    for town, (edit,) in zip(towns, collect(sample_self_edits(model, tok, towns, as_it_is, seeds))):
        examples.append(dialogue(tok.prompt(town.prompt), edit.token_ids))
    return examples


def with_old(job: Job, old: list) -> Job:
    """The job with these examples beside its own, in as many steps, with as much weight in all."""
    own = sum(sum(learn) for _, learn in job.examples)
    weight = own / max(1, sum(sum(learn) for _, learn in old))
    examples = list(job.examples)
    for ids, learn in old:
        examples.append((ids, [weight * learned for learned in learn]))
    # Larger batches, so that there are as many steps.
    batches = math.ceil(len(job.examples) / job.recipe.batch)
    recipe = replace(job.recipe, batch=math.ceil(len(examples) / batches))
    return replace(job, examples=examples, recipe=recipe)

# ------------------------------------------------------------------------------- old towns

ARMS = {
    "plain merge": Arm(),
    "lower rate": Arm(lr=1e-2),
    "half": Arm(scale=.5),
    "layers": Arm(layers=2),
    "KL": Arm(generic=8),
    "half, layers": GENTLE,
    "half, own replay": Arm(.5, replay=8),
    "half, layers, own replay": Arm(.5, layers=2, replay=8),
    "half, layers, kept replay": Arm(.5, layers=2, replay=8, kept=True),
}
NOT_DRAWN = ("lower rate", "half, own replay")      # the figure would be crowded


def draw_towns(seed: int, n: int):
    return random.Random(seed_for(seed, "stream")).sample(tinyworld.load("eval"), n)


def learn_stream(name: str, seed: int, folders: dict) -> dict:
    """A line: a stream of held-out towns, learned from the first to the last."""
    model, tok = load(3, folders[seed])
    towns = draw_towns(seed, LENGTH)
    stream = Stream(model, tok, towns, write_all(model, tok, towns, seed), seed)
    meter = Meter(f"towns, {name}, seed {seed}")
    just_after, costs = [], []
    for k, town in enumerate(towns):
        costs.append(learn_town(stream, ARMS[name], k))
        just_after.append(float(verdicts(model, tok, [town]).mean()))
        meter(k + 1, LENGTH)
    at_the_end = verdicts(model, tok, towns).mean(axis=1).tolist()
    means = {what: float(np.mean([cost[what] for cost in costs])) for what in costs[0]}
    return {"just after": just_after, "at the end": at_the_end} | means


def show(arms: dict[str, list[dict]]):
    """Accuracy just after and at the end, with intervals over seeds, and what it costs."""
    rows = []
    for name, lines in arms.items():
        learned = [[np.mean(line["just after"]), np.mean(line["at the end"])] for line in lines]
        rows.append([name, *over_seeds(learned)])
        for key, form in (("scale", ".2f"), ("trained", ".0f"), ("written", ".0f")):
            rows[-1].append(format(np.mean([line[key] for line in lines]), form))
    print_table(["arm", "just after its own edit", "all towns, at the end", "scale",
                 "tokens trained a town", "tokens written for it"], rows)


def draw(arms: dict[str, list[dict]], file):
    """Accuracy at the end against the number of towns learned since, in bins of four towns."""
    drawn = {}
    for name, lines in arms.items():
        if name not in NOT_DRAWN:
            # The last town was learned last. (seeds, bins of four)
            ages = np.array([line["at the end"][::-1] for line in lines])
            bins = ages.reshape(len(lines), -1, 4).mean(2)
            drawn[name] = 4 * np.arange(bins.shape[1]) + 1.5, bins
    draw_lines(file, ("towns learned since", "accuracy at the end (95 % interval over seeds)"),
               drawn, ylim=(0, 1))


# ------------------------------------------------------------------------------- how to study

STUDIES = {
    "plain merge": Arm(),
    "plain merge, best of 2": Arm(tries=2),
    "plain merge, frozen writer": Arm(frozen=True),
    "half, layers": GENTLE,
    "half, layers, frozen writer": replace(GENTLE, frozen=True),
    "half, layers, own replay": Arm(.5, layers=2, replay=8),
}
PROBES = 12                 # towns that are not in the stream
WHEN = (0, 4, 8, 16, 32)    # towns learned before the model is probed
# (who writes, who learns)
PAIRS = [("now", "now"), ("now", "before"), ("before", "now")]


def next_edit(study: Arm, stream: Stream, writer) -> SelfEdit:
    """The self-edit by which the stream's next town is learned."""
    k = len(stream.edits)
    town, edits = [stream.towns[k]], []
    for j in range(study.tries):
        edits += write_all(writer, stream.tok, town, seed_for(stream.seed, k, j))
    if study.tries == 1:
        return edits[0]
    rewards = score(stream.model, stream.tok, town * study.tries, edits, seed_for(stream.seed, k))
    return edits[int(np.argmax(rewards))]


def probe(name: str, seed: int, folders: dict) -> dict:
    """A line: {"writer, learner": mean reward at each time}."""
    study = STUDIES[name]
    before, tok = load(3, folders[seed])
    now, _ = load(3, folders[seed])
    models = {"now": now, "before": before}
    towns = draw_towns(seed, LENGTH + PROBES)
    stream, probes = Stream(now, tok, towns[:LENGTH], [], seed), towns[LENGTH:]
    meter = Meter(f"towns, {name}, seed {seed}")
    found = {", ".join(pair): [] for pair in PAIRS}
    written = {"before": write_all(before, tok, probes, seed)}
    for k in range(LENGTH + 1):
        if k in WHEN:
            written["now"] = write_all(now, tok, probes, seed)
            for writer, learner in PAIRS:
                rewards = score(models[learner], tok, probes, written[writer], seed)
                found[f"{writer}, {learner}"].append(float(np.mean(rewards)))
        if k < LENGTH:
            stream.edits.append(next_edit(study, stream, before if study.frozen else now))
            learn_town(stream, study, k)
            meter(k + 1, LENGTH)
    return found


def show_skill(arms: dict[str, list[dict]]):
    """Rewards with intervals over seeds: over the stream, and of all pairs at its end."""
    over_time, at_the_end = [], []
    for name, lines in arms.items():
        over_time.append([name, *over_seeds([line["now, now"] for line in lines])])
        last = [[line[", ".join(pair)][-1] for pair in PAIRS] for line in lines]
        at_the_end.append([name, *over_seeds(last)])
    print_table(["towns learned before", *WHEN], over_time, "Reward of a new self-edit")
    head = [f"written by the model {writer}, learned by it {learner}" for writer, learner in PAIRS]
    print_table(["", *head], at_the_end, f"After {WHEN[-1]} towns")


def draw_skill(arms: dict[str, list[dict]], file):
    drawn = {name: (WHEN, [line["now, now"] for line in lines]) for name, lines in arms.items()}
    draw_lines(file, ("towns learned before", "reward of a new self-edit (95 % interval over "
                      "seeds)"), drawn, ylim=(0, 1))


def main():
    question = Question(ARMS, learn_stream, show, draw, of_runs=True)
    if "--skill" in sys.argv:
        question = Question(STUDIES, probe, show_skill, draw_skill, of_runs=True)
    ap = question.flags(__doc__)
    ap.add_argument("--skill", action="store_true", help="does it forget how to study?")
    question.answer(ap, ap.parse_args())


if __name__ == "__main__":
    cli(main)
