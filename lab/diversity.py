"""How alike are self-edits, and what do they leave out? Compression: their size over that of their
zip, which is larger the more they repeat."""
import re
import zlib

import numpy as np

from data import tinyworld
from selfedit import SelfEdit


def of_town(edits: list[SelfEdit], passage: str) -> dict[str, float]:
    """Of all self-edits of a town together, with the share of its facts that they state."""
    # An empty self-edit is an empty line.
    lines = "\n".join(edit.text for edit in edits).splitlines() or [""]
    text = "\n".join(lines).encode()
    found = {"compression": len(text) / len(zlib.compress(text, 9)),
             "distinct lines": len(set(lines)) / len(lines)}
    stated = {tinyworld.taught(line, passage) for line in set(lines)}
    for kind in ("forward", "reversed"):
        covered = []
        for relation, direction in tinyworld.asked(passage).values():
            if direction == kind:
                covered.append((relation, direction) in stated)
        found[f"facts covered, {kind}"] = np.mean(covered)
    return found


def of_run(run) -> dict[str, list]:
    """Of all held-out self-edits after each round of a run. Lines that differ in names and years
    alone are one kind of line."""
    compression, distinct = [], []
    for m in run.metrics.records:
        records = run.edits.of(m["iteration"], "eval")
        text = "\n".join(r["text"] for r in records)
        compression.append(round(len(text) / len(zlib.compress(text.encode())), 3))
        # A line's first word is the template's, and capital in any case.
        kinds = {re.sub(r"(?<!^)\b([A-Z]\w+|\d+)", "_", line) for line in text.splitlines()}
        distinct.append(len(kinds))
    return {"compression": compression, "distinct": distinct}
