"""What the questions of the lab share: arms, seeds, and a line of results for each of them.

A question is a script. It has arms, measures one arm with one seed, and shows what came out
(lab/show.py). A measurement is a line of a JSON-lines file, written when it is known: the same
command goes on where it was stopped. Several processes may share the work, each with its own --out,
which `cat` joins.
"""
import time
from itertools import product
from pathlib import Path

import numpy as np

from config import flag
from files import Lines, Parser, UserError


def flags(doc: str) -> Parser:
    """What every question is asked with. doc: the script's docstring, which begins with it."""
    ap = Parser(description=" ".join(doc.split("\n\n")[0].split()))
    ap.add_argument("--out", required=True, type=Path, help="JSON lines, as they are known")
    ap.add_argument("--svg", help="file to draw to (needs matplotlib)")
    return ap


def add_seeds(ap):
    ap.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])


def each(kind: str, names, seeds) -> list[dict]:
    """[{"arm": name, "seed": seed}, ...]: all names with the first seed, then with the next."""
    return [{kind: name, "seed": seed} for seed, name in product(seeds, names)]


def measure_and_show(ap, args, kind: str, names, seeds, measure, show, draw, settings=(), part={}):
    """The end of main: measure every arm with every seed, then show and draw what there is.

    kind: "arm", "rule", ...; names: of all that may be shown, or None for those that the file has;
    args says which to measure.
    measure(name, seed, *values of the settings) -> the rest of a line. show({name: its lines});
    draw(the same, file). part: what else all these lines have, as others of the file may not."""
    values = [getattr(args, name) for name in settings]

    def measure_one(line):
        print(f"\n=== {line[kind]}, seed {line['seed']}", flush=True)
        return measure(line[kind], line["seed"], *values)

    wanted = [part | unit for unit in each(kind, getattr(args, kind + "s"), seeds)]
    records = complete(ap, args, wanted, measure_one, settings)
    records = where(records, **part)
    names = names or sorted({line[kind] for line in records})
    found = groups(records, kind, names)
    show(found)
    if args.svg:
        draw(found, args.svg)


def complete(ap, args, wanted: list[dict], measure, settings=()) -> list[dict]:
    """All lines of args.out, once those that are wanted are among them.

    wanted: what tells each line from others, as {"arm": "half", "seed": 0}. measure(one of these)
    -> the rest of its line. settings: names of flags that all lines of a file must share.
    UserError: one of them was made with another value."""
    done = Lines(args.out)
    shared = {name: getattr(args, name) for name in settings}
    for line in done.records:
        for name, value in shared.items():
            # A line that is older than a flag was made with its default.
            if line.get(name, ap.get_default(name)) != value:
                raise UserError(f"{args.out} has lines of another {flag(name)}; name another --out")

    for this in wanted:
        if where(done.records, **this):
            continue
        begin = time.time()
        found = measure(this)
        # Some count their seconds in a way of their own.
        found.setdefault("seconds", round(time.time() - begin))
        done.add(this | shared | found)
        print(f"{', '.join(map(str, this.values()))}: {found['seconds']} s", flush=True)
    return done.records


def where(records: list[dict], **values) -> list[dict]:
    """The lines with these values: where(records, arm="half", seed=0)."""
    found = []
    for line in records:
        if all(line.get(name) == value for name, value in values.items()):
            found.append(line)
    return found


def groups(records: list[dict], kind: str, names) -> dict[str, list[dict]]:
    """{name: its lines} of the arms that have some, in this order. kind: "arm", "rule", ..."""
    found = {}
    for name in names:
        own = where(records, **{kind: name})
        if own:
            found[name] = own
    return found


def differences(lines: list[dict], others: list[dict], value) -> list:
    """value(line) of one arm minus that of another, for each seed that both have.

    A seed has the same towns and the same first self-edits in both. What makes a seed hard for both
    cancels, and does not widen the interval."""
    reference = {line["seed"]: value(line) for line in others}
    found = []
    for line in lines:
        if line["seed"] in reference:
            found.append(value(line) - reference[line["seed"]])
    return found


def last_reward(line: dict) -> float:
    """After the last round, of a line with a "reward" per round."""
    return line["reward"][-1]


def gain(line: dict) -> float:
    """By how much the reward rose, from before the first round until then."""
    return line["reward"][-1] - line["reward"][0]


def mean_of(rows: list[dict]) -> dict[str, float]:
    """The mean of each value over dicts with the same keys."""
    means = np.mean([list(row.values()) for row in rows], axis=0)
    return {name: round(float(mean), 4) for name, mean in zip(rows[0], means)}
