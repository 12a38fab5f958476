"""How far judges agree with the released verdicts of GPT-4.1.

    python -m lab.judges FILE [--model DIR_OR_HUB_ID]
"""
import argparse
import sys

import numpy as np

from checkpoint import UserError, cli, read_json
from data.judges import JUDGES, model_judge, openai_judge
from model import load_pretrained
from stats import agreement, bootstrap_ci, share
from tokenizer import Tokenizer


def judges(argv):
    """Print how far judges agree with the released verdicts of GPT-4.1, by method: the rules, and
    with --model DIR_OR_HUB_ID that model; --openai adds the endpoint of --judge openai."""
    ap = argparse.ArgumentParser(description=judges.__doc__)
    ap.add_argument("file", help="JSON list of passages, each with released: {method: {answers: "
                    "[{question, gold, baseline, baseline_ok, adapter, adapter_ok}]}}")
    ap.add_argument("--model", help="folder or hub id of a model that judges")
    ap.add_argument("--openai", action="store_true", help="ask an OpenAI-compatible endpoint, too")
    ap.add_argument("--limit", type=int, help="only so many answers of each method")
    args = ap.parse_args(argv)
    file, one_by_one = args.file, lambda judge: lambda triples: [judge(*t) for t in triples]
    every = {name: one_by_one(judge) for name, judge in JUDGES.items()}
    if args.model:
        model = load_pretrained(args.model)
        tok = Tokenizer.from_pretrained(model.folder)
        every["model"] = lambda triples: model_judge(model, tok, triples)
    if args.openai:
        every["openai"] = openai_judge
    records = read_json(file)
    try:
        methods = {method: [(x["question"], x["gold"], x[arm], x[f"{arm}_ok"])
                            for r in records for x in r["released"][method]["answers"]
                            for arm in ("baseline", "adapter")][:args.limit]
                   for method in records[0]["released"]}
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(f"{file}: no released verdicts ({type(e).__name__}: {e})") from None
    print("by GPT-4.1's verdicts; means over passages [95 % CI]; gained: of the questions missed "
          "without adaptation, lost: of those known")
    for method, row in released(records).items():
        print("{:>12}  {:.3f} [{:.3f}, {:.3f}]  gained {:.3f}  lost {:.3f}".format(
            method, np.mean(row["accuracy"]), *bootstrap_ci(row["accuracy"]), row["gained"],
            row["lost"]))
    print()
    print(f"{'answers of':>12} {'n':>6} {'GPT-4.1':>8}"
          + "".join(f" | {name:>10} says right, agrees, kappa" for name in every))
    said = {name: [] for name in every}  # of all methods so far: (verdict, GPT-4.1's)

    def show(label, n):
        line = f"{label:>12} {n:>6} {np.mean([ok for _, ok in said['rule'][-n:]]):8.3f}"
        for pairs in said.values():
            ours, gpt = zip(*pairs[-n:])
            line += " | {:>21.3f}  {:6.3f}  {:5.3f}".format(np.mean(ours), *agreement(ours, gpt))
        print(line, flush=True)

    for method, rows in methods.items():
        for name, judge in every.items():
            verdicts = judge([(q, gold, p) for q, gold, p, _ in rows])
            said[name] += [(bool(p.strip()) and right, ok)
                           for (*_, p, ok), right in zip(rows, verdicts)]
        show(method, len(rows))
    show("all", len(said["rule"]))


def released(records):
    """{method: its row of the paper's table, from the released verdicts alone}."""
    rows = {}
    for method in records[0]["released"]:
        answers = [r["released"][method]["answers"] for r in records]
        pairs = [(x["baseline_ok"], x["adapter_ok"]) for row in answers for x in row]
        rows[method] = {"accuracy": [float(np.mean([x["adapter_ok"] for x in row]))
                                     for row in answers],
                        "gained": share(pairs, False), "lost": share(pairs, True)}
    return rows


if __name__ == "__main__":
    cli(lambda: judges(sys.argv[1:]))
