"""What the questions of the lab share: arms, seeds, and a line of results for each of them.

A question is a script. It has arms, measures one arm with one seed, and shows what came out
(lab/show.py). A measurement is a line of a JSON-lines file, written when it is known: the same
command goes on where it was stopped. Several processes may share the work, each with its own --out,
which `cat` joins.
"""
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Callable, Collection, Sequence

import numpy as np

from support.config import flag
from support.files import Parser, UserError
from support.records import Lines


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


@dataclass
class Question:
    """What is measured of every arm with every seed, and how that is shown.

    measure(arm, seed, *values of the settings) -> the rest of a line. show({arm: its lines}).
    draw(the same, file). settings: names of flags that all lines of a file must share. part: what
    else all lines of this question have, where a file has those of others, too."""
    arms: Collection        # all that may be shown; if there are none, those that the file has
    measure: Callable
    show: Callable
    draw: Callable
    settings: Sequence[str] = ()
    kind: str = "arm"       # what a line calls its arm; "arms" is the flag for those to measure
    part: dict = field(default_factory=dict)

    def answer(self, ap, args, seeds):
        """The end of main: measure what the file has not, then show and draw what it has."""
        values = [getattr(args, name) for name in self.settings]

        def measure_one(line):
            arm, seed = line[self.kind], line["seed"]
            print(f"\n=== {arm}, seed {seed}", flush=True)
            return self.measure(arm, seed, *values)

        wanted = each(self.kind, getattr(args, self.kind + "s"), seeds)
        wanted = [self.part | unit for unit in wanted]
        records = complete(ap, args, wanted, measure_one, self.settings)
        records = where(records, **self.part)
        arms = self.arms or sorted({line[self.kind] for line in records})
        found = groups(records, self.kind, arms)
        self.show(found)
        if args.svg:
            self.draw(found, args.svg)


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
