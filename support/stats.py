"""Statistics: intervals, what adapters gain and lose, forgetting."""
import numpy as np

# Student's t for a 95 % interval, by the number of values.
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}


def bootstrap_ci(values, level=0.95, draws=10_000):
    """[low, high] of the mean, by resampling the values (passages)."""
    values = np.asarray(values, float)
    rng = np.random.default_rng(0)
    means = rng.choice(values, (draws, len(values))).mean(axis=1)
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2]).tolist()


def with_interval(mean, interval, form=".3f"):
    """'0.639 [0.601, 0.677]': a mean and the ends of its interval, in words."""
    low, high = interval
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def mean_ci(rows):
    """(mean, half of the 95 % interval) over runs, by Student's t. rows (runs, columns)."""
    mean, error = over_streams(rows)
    return np.array(mean), T_95.get(len(rows), 2.26) * np.array(error)


def share_changed(pairs, known):
    """Of the questions that were known (or missed) before, the share whose verdict changed.

    pairs: (right before, right after). known True: what was lost; False: what was gained."""
    changed = [after != known for before, after in pairs if before == known]
    return float(np.mean(changed)) if changed else float("nan")


def by_kind(kinds: list[list[str]], records: list[dict]) -> dict[str, float]:
    """{kind of question: accuracy} over rollouts; kinds: of each task's questions."""
    # Every verdict counts once, over all self-edits and seeds.
    found = {}
    for record in records:
        for right in record["right"]:
            for kind, verdict in zip(kinds[record["task"]], right):
                found.setdefault(kind, []).append(verdict)
    return {kind: float(np.mean(verdicts)) for kind, verdicts in found.items()}


def over_streams(values):
    """(mean, standard error) over the first axis, as lists."""
    values = np.asarray(values, float)
    n = len(values)
    spread = values.std(0, ddof=1) if n > 1 else np.full_like(values[0], np.nan)
    return values.mean(0).tolist(), (spread / n ** 0.5).tolist()


def forgetting(accuracy):
    """What a row of edits did; accuracy[k][stream][passage], after k edits, of the passages seen
    (of all for k = 0). Values are (mean, standard error over streams)."""
    before = np.array(accuracy[0])                                          # (streams, passages)
    final = np.array(accuracy[-1])
    after_own_edit = [np.array(after_k)[:, -1] for after_k in accuracy[1:]]
    learned = np.stack(after_own_edit, axis=1)
    return {"matrix": [over_streams(after_k) for after_k in accuracy],
            "before any edit": over_streams(before.mean(1)),
            "just after its own edit": over_streams(learned.mean(1)),
            "after the last edit": over_streams(final.mean(1)),
            "gain just after its own edit": over_streams((learned - before).mean(1)),
            "what is left of it after the last edit": over_streams((final - before).mean(1)),
            "forgotten since its own edit": over_streams((learned - final).mean(1))}
