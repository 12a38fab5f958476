"""How far judges agree with the released verdicts of GPT-4.1, by the method that was judged.

    python -m lab.judges FILE [--model DIR_OR_HUB_ID] [--openai]

FILE is a JSON list of passages, each with "released": {method: {"answers": [{question, gold,
baseline, baseline_ok, adapter, adapter_ok}]}}. --model judges as well; --openai adds the endpoint
of --judge openai.
"""
import numpy as np

from data.judges import RULES, check_openai, model_judge, openai
from lab.show import over_passages
from model import load_pretrained
from support.files import Parser, UserError, positive, cli, printable, read_json
from support.stats import share_changed
from support.tokenizer import Tokenizer


def read_records(file):
    """The passages of a file. UserError unless each has whole answers by the first one's methods.
    """
    records = read_json(file)
    if not isinstance(records, list) or not records:
        raise UserError(f"{file}: no released verdicts: it must be a JSON list of passages")
    for i, record in enumerate(records):
        where = f"{file}: no released verdicts: record {i}"
        found = record.get("released") if isinstance(record, dict) else None
        if not isinstance(found, dict) or not found:
            raise UserError(f'{where}: "released" must be {{method: {{"answers": [...]}}}}')
        for method in records[0]["released"]:
            own = found.get(method)
            answers = own.get("answers") if isinstance(own, dict) else None
            if not isinstance(answers, list) or not answers:
                raise UserError(f'{where}: {method!r} must have a list of "answers"')
            for j, answer in enumerate(answers):
                if not is_answer(answer):
                    raise UserError(f"{where}: {method!r}, answer {j}: must have strings "
                                    f"({', '.join(TEXTS)}) and true or false "
                                    f"({', '.join(VERDICTS)})")
    return records


TEXTS, VERDICTS = ("question", "gold", "baseline", "adapter"), ("baseline_ok", "adapter_ok")


def is_answer(x):
    return (isinstance(x, dict) and all(isinstance(x.get(key), str) for key in TEXTS)
            and all(isinstance(x.get(key), bool) for key in VERDICTS))


def released(records):
    """{method: its row of the paper's table, from the released verdicts alone}."""
    rows = {}
    for method in records[0]["released"]:
        accuracy, pairs = [], []
        for record in records:
            answers = record["released"][method]["answers"]
            accuracy.append(float(np.mean([x["adapter_ok"] for x in answers])))
            pairs += [(x["baseline_ok"], x["adapter_ok"]) for x in answers]
        rows[method] = {"accuracy": accuracy,
                        "gained": share_changed(pairs, known=False),
                        "lost": share_changed(pairs, known=True)}
    return rows


def answers_of(records, method, limit=None):
    """((question, gold, prediction)s, GPT-4.1's verdicts) of a method."""
    triples, verdicts = [], []
    for record in records:
        for x in record["released"][method]["answers"]:
            for arm in ("baseline", "adapter"):
                triples.append((x["question"], x["gold"], x[arm]))
                verdicts.append(x[f"{arm}_ok"])
    return triples[:limit], verdicts[:limit]


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


def show(label, gpt, verdicts):
    """A line of the table: verdicts {judge: its verdicts}."""
    line = f"{printable(label):>12} {len(gpt):>6} {np.mean(gpt):8.3f}"
    for own in verdicts.values():
        observed, kappa = agreement(own, gpt)
        line += f" | {np.mean(own):>21.3f}  {observed:6.3f}  {kappa:5.3f}"
    print(line, flush=True)


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("file", help="passages with released answers and verdicts")
    ap.add_argument("--model", help="folder or hub id of a model that judges")
    ap.add_argument("--openai", action="store_true", help="ask an OpenAI-compatible endpoint, too")
    ap.add_argument("--limit", type=positive, help="only so many answers of each method")
    args = ap.parse_args()
    if args.openai:
        check_openai()
    records = read_records(args.file)
    judges = dict(RULES)
    if args.model:
        model = load_pretrained(args.model)
        tok = Tokenizer.from_pretrained(model.folder)
        judges["model"] = lambda triples: model_judge(model, tok, triples)
    if args.openai:
        judges["openai"] = openai

    table = released(records)
    answers = {method: answers_of(records, method, args.limit) for method in table}
    print("by GPT-4.1's verdicts; means over passages [95 % CI]; gained: of the questions missed "
          "without adaptation, lost: of those known")
    for method, row in table.items():
        print(f"{printable(method):>12}  {over_passages(row['accuracy'])}  "
              f"gained {row['gained']:.3f}  lost {row['lost']:.3f}")

    heads = "".join(f" | {name:>10} says right, agrees, kappa" for name in judges)
    print(f"\n{'answers of':>12} {'n':>6} {'GPT-4.1':>8}{heads}")
    all_gpt, all_verdicts = [], {name: [] for name in judges}
    for method, (triples, gpt) in answers.items():
        verdicts = {name: judged(judge, triples) for name, judge in judges.items()}
        show(method, gpt, verdicts)
        all_gpt += gpt
        for name, own in verdicts.items():
            all_verdicts[name] += own
    show("all", all_gpt, all_verdicts)


if __name__ == "__main__":
    cli(main)
