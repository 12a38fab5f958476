"""What a run keeps: JSON lines that survive a kill, that all ranks share, each in its place."""
import json
import os
from functools import cached_property
from pathlib import Path

from support import ranks
from support.files import UserError, printable, replace_file


def as_lines(records) -> str:
    """A line of JSON for each record."""
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
                   for record in records)


class Lines:
    """A JSON-lines file that survives a kill: a torn last line is dropped, whole ones are kept.

    A reader (repair False) drops it in memory only, as another process may be writing it."""

    def __init__(self, path, repair=True):
        self.path = Path(path)
        self.records = []
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data[:data.rfind(b"\n") + 1]
        if whole != data and repair:
            torn = len(data) - len(whole)
            print(f"{printable(self.path)}: its last line was cut short ({torn} bytes); dropped")
            replace_file(self.path, whole.decode(errors="replace"))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self.check(record)
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                raise UserError(f"{self.path}, line {number}: not a record of a run ({e}); restore "
                                "it, or delete the lines from there on and repeat the command"
                                ) from None
            self.records.append(record)

    def check(self, record):
        """ValueError, KeyError or TypeError if this is no record of this file. All are, here."""

    def rewrite(self):
        """The file as the records are now, whole or not at all."""
        replace_file(self.path, as_lines(self.records))

    def add(self, *records):
        if not records:
            return
        text = as_lines(records)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        self.records += records


class SharedLines(Lines):
    """Lines to which every rank adds. Rank 0's are in the file itself; those of another rank are in
    a part beside it until all ranks `exchange`, and a part that a kill left is taken in later."""

    def __init__(self, path):
        if ranks.RANK == 0:
            super().__init__(path)
            for part in sorted(path.parent.glob(f"{path.stem}.part*{path.suffix}")):
                self.add(*[r for r in Lines(part).records if r not in self.records])
                part.unlink()
        ranks.wait()
        if ranks.RANK:
            super().__init__(path)
            self.path = path.with_name(f"{path.stem}.part{ranks.RANK}{path.suffix}")
        ranks.wait()
        self.exchanged = len(self.records)

    def exchange(self):
        """Every rank gets the others' new records; rank 0 writes them to the file."""
        everyone = ranks.gather(self.records[self.exchanged:])
        others = [r for rank, records in enumerate(everyone) if rank != ranks.RANK for r in records]
        if ranks.RANK == 0:
            self.add(*others)
        ranks.wait()
        if ranks.RANK:
            self.records += others
            self.path.unlink(missing_ok=True)
        # No part is left when a rank goes on: rank 0 may then write the records otherwise.
        ranks.wait()
        self.exchanged = len(self.records)


class Records(SharedLines):
    """Lines that belong to an iteration, a split (train or eval), an arm (what the model is trained
    on, "" for its own self-edits), a task and a self-edit: one for each, found by these."""

    def check(self, record):
        where = place_of(record)
        if where in self.places:
            raise ValueError("a second one for iteration {}, {} {!r}, task {}, self-edit {}"
                             .format(*where))
        self.places.add(where)

    @cached_property
    def places(self):
        return set()

    def at(self, t, split, arm) -> dict:
        """{(task, edit): its record}."""
        return {(r["task"], r["edit"]): r for r in self.of(t, split, arm)}

    def of(self, t, split, arm=""):
        """In the order of tasks and self-edits, whatever the order in which they were made."""
        own = [r for r in self.records if place_of(r)[:3] == (t, split, arm)]
        return sorted(own, key=place_of)


def place_of(record) -> tuple:
    """KeyError or TypeError if it has none."""
    numbers = record["iteration"], record["task"], record["edit"]
    if not all(type(number) is int for number in numbers):
        raise TypeError("iteration, task and edit must be whole numbers")
    return (record["iteration"], record["split"], record.get("arm", ""), record["task"],
            record["edit"])


class Metrics(Lines):
    """A line for each iteration."""

    def check(self, record):
        if record["iteration"] != len(self.records):
            raise ValueError(f"iteration {record['iteration']} after {len(self.records)} lines")
        float(record["eval_reward"])
