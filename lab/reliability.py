"""How far can verdicts and rewards be trusted?

    python -m lab.reliability RUN_DIR
    python -m lab.reliability FILE [--model DIR_OR_HUB_ID]

Of a run: between the seeds of the inner loop, and what the best of K is worth by seeds that did not
choose it. Of a file: how far judges agree with the released verdicts of GPT-4.1, by the method that
was judged. FILE is a JSON list of passages, each with "released": {method: {"answers": [{question,
gold, baseline, baseline_ok, adapter, adapter_ok}]}}. --model judges as well.
"""
from collections import defaultdict
from itertools import chain
from pathlib import Path

import numpy as np

from data.judges import RULES, model_judge
from lab.experiment import over_passages, parser, print_table
from model import load_pretrained
from support.files import Lines, UserError, cli, positive, printable, read_json
from support.stats import share_changed
from support.tokenizer import Tokenizer

# ------------------------------------------------------------------------------- rewards of a run

class Rollouts(Lines):
    """rollouts.jsonl, of which the rewards of training self-edits are looked at."""

    def check(self, r):
        if r["split"] != "train" or not r["right"]:
            return
        numbers = [r[key] for key in ("iteration", "task", "edit", "documents")]
        whole = (all(type(number) is int for number in numbers) and 0 <= r["reward"] <= 1
                 and isinstance(r["token_ids"], list)
                 and all(isinstance(row, list) and row and set(row) <= {True, False}
                         for row in r["right"]))
        if not whole:
            raise ValueError("a value of another kind than a run writes")


def read_groups(folder):
    """The rollouts of training self-edits, a list per (iteration, passage)."""
    path = Path(folder) / "rollouts.jsonl"
    groups = defaultdict(list)
    for r in Rollouts(path, repair=False).records:      # the run may be going on
        if r["split"] == "train" and r["right"]:
            groups[r["iteration"], r["task"]].append(r)
    if not groups:
        raise UserError(f"{path}: no rewards of training self-edits in this run; name the folder "
                        "of a run that has some")
    for (t, i), group in groups.items():
        if len({len(r["right"]) for r in group}) > 1:
            raise UserError(f"{path}: iteration {t}, task {i}: self-edits with different numbers "
                            "of seeds; a run has one --seeds")
    return [sorted(group, key=lambda r: r["edit"]) for group in groups.values()]


def accuracy_of(group):
    """(K, seeds): the accuracy of each self-edit of a passage with each seed."""
    return np.array([[np.mean(right) for right in r["right"]] for r in group])


def variance_components(accuracy):
    """Statistics of rewards; accuracy: per passage (K, seeds).

    The variance between the self-edits of a passage is measured by the covariance of two seeds, in
    which the seeds' own noise is absent (the mean square between minus within, over all pairs).
    Reliability is that of the mean over all seeds (Spearman-Brown)."""
    noise, true, chosen, held_out = [], [], [], []
    for a in accuracy:
        k, n = a.shape
        noise.append(a.var(axis=1, ddof=1).mean())
        if k > 1:
            true.append(a.mean(axis=1).var(ddof=1) - noise[-1] / n)
        chosen.append(a.mean(axis=1).max())
        # Choose without one seed, and ask that seed what the choice is worth.
        for out in range(n):
            best = np.delete(a, out, axis=1).mean(axis=1).argmax()
            held_out.append(a[best, out])

    n = accuracy[0].shape[1]
    within = np.mean(noise)
    between = max(0.0, np.mean(true)) if true else 0.0
    total = between + within / n
    return {"standard deviation of one inner loop, over seeds": within ** 0.5,
            "true standard deviation between the self-edits of a passage": between ** 0.5,
            f"reliability of a {n}-seed mean, among the edits of a passage":
                between / total if total else np.nan,
            "mean reward": np.mean([a.mean() for a in accuracy]),
            "the best of K, by the seeds that chose it": np.mean(chosen),
            "the best of K, chosen without one seed, by that seed": np.mean(held_out)}


def of_run(folder):
    groups = read_groups(folder)
    accuracy = [accuracy_of(group) for group in groups]
    seeds = min(a.shape[1] for a in accuracy)
    print(f"{len(groups)} passages, {sum(map(len, groups))} self-edits, {seeds} seeds each")
    found = variance_components(accuracy) if seeds > 1 else {}
    rollouts = [r for group in groups for r in group]
    reward = [r["reward"] for r in rollouts]
    for what, x in (("tokens", [len(r["token_ids"]) for r in rollouts]),
                    ("documents", [r["documents"] for r in rollouts])):
        varied = np.std(x) and np.std(reward)
        found[f"correlation of the reward with the number of {what}"] = (
            np.corrcoef(reward, x)[0, 1] if varied else np.nan)
    for what, value in found.items():
        print(f"  {what:<66} {value:6.3f}")


# ------------------------------------------------------------------------------- judges

TEXTS, VERDICTS = ("question", "gold", "baseline", "adapter"), ("baseline_ok", "adapter_ok")


def read_answers(file) -> dict[str, list[list[dict]]]:
    """{method: the answers of each passage}. UserError unless each passage has whole answers by the
    first one's methods."""
    records, place, found = read_json(file), "record 0", defaultdict(list)
    try:
        for method in records[0]["released"]:
            for i, record in enumerate(records):
                place = f"record {i}: {method!r}"
                answers = record["released"][method]["answers"]
                for j, answer in enumerate(answers):
                    place = f"record {i}: {method!r}, answer {j}"
                    if not (all(isinstance(answer[key], str) for key in TEXTS)
                            and all(isinstance(answer[key], bool) for key in VERDICTS)):
                        raise TypeError
                found[method].append([*answers])
        if not all(map(all, found.values())) or not found:
            raise LookupError
    except (LookupError, TypeError):
        raise UserError(f'{file}: no released verdicts: {place}: must have strings '
                        f'({", ".join(TEXTS)}) and true or false ({", ".join(VERDICTS)}), in '
                        '"released": {method: {"answers": [...]}} of each passage') from None
    return found


def released(passages: list[list[dict]]) -> dict:
    """A method's row of the paper's table, from the released verdicts alone."""
    accuracy, pairs = [], []
    for answers in passages:
        accuracy.append(float(np.mean([x["adapter_ok"] for x in answers])))
        pairs += [(x["baseline_ok"], x["adapter_ok"]) for x in answers]
    return {"accuracy": accuracy, "gained": share_changed(pairs, known=False),
            "lost": share_changed(pairs, known=True)}


def judged(judge, triples):
    """Verdicts of a judge. An empty prediction is wrong, and no judge is asked about it."""
    asked = [triple for triple in triples if triple[2].strip()]
    verdict = dict(zip(asked, judge(asked)))
    return [verdict.get(triple, False) for triple in triples]


def agreement(a, b):
    """(share of equal verdicts, Cohen's kappa: how far that is beyond chance)."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    observed = (a == b).mean()
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    if chance == 1:
        return observed, 1.0
    return observed, (observed - chance) / (1 - chance)


def of_judges(file, model, limit):
    methods = read_answers(file)
    judges = dict(RULES)
    if model:
        model = load_pretrained(model)
        tok = Tokenizer.from_pretrained(model.folder)
        judges["model"] = lambda triples: model_judge(model, tok, triples)
    print("by GPT-4.1's verdicts; means over passages [95 % CI]; gained: of the questions missed "
          "without adaptation, lost: of those known")
    # Method by method, and then all answers together: verdicts {judge: its verdicts}.
    found = {}
    for method, passages in methods.items():
        row = released(passages)
        print(f"{printable(method):>12}  {over_passages(row['accuracy'])}  "
              f"gained {row['gained']:.3f}  lost {row['lost']:.3f}")
        triples, gpt = [], []
        for x in chain(*passages):
            for arm in ("baseline", "adapter"):
                triples.append((x["question"], x["gold"], x[arm]))
                gpt.append(x[f"{arm}_ok"])
        found[method] = {"GPT-4.1": gpt[:limit]}
        for name, judge in judges.items():
            found[method][name] = judged(judge, triples[:limit])
    found["all"] = {name: list(chain(*[own[name] for own in found.values()]))
                    for name in ("GPT-4.1", *judges)}
    rows = []
    for method, verdicts in found.items():
        gpt = verdicts["GPT-4.1"]
        rows.append([printable(method), len(gpt), f"{np.mean(gpt):.3f}"])
        for name in judges:
            own = verdicts[name]
            rows[-1] += [f"{x:.3f}" for x in (np.mean(own), *agreement(own, gpt))]
    head = ["answers of", "n", "GPT-4.1"]
    for name in judges:
        head += [f"{name} says right", "agrees", "kappa"]
    print_table(head, rows)


def main():
    ap = parser(__doc__)
    ap.add_argument("source", help="a run's folder, or a file of released answers and verdicts")
    ap.add_argument("--model", help="folder or hub id of a model that judges")
    ap.add_argument("--limit", type=positive, help="only so many answers of each method")
    args = ap.parse_args()
    if Path(args.source).is_file():
        of_judges(args.source, args.model, args.limit)
    else:
        of_run(args.source)


if __name__ == "__main__":
    cli(main)
