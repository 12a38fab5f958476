"""What a run shows, in words: what `python outer_loop.py` prints."""
import sys

import numpy as np

from support.config import Config
from support.files import printable
from support.stats import bootstrap_ci, by_kind, with_interval


def when(t: int) -> str:
    """What people call iteration t of the files."""
    return f"after round {t}" if t else "before training"


def opening(cfg: Config, reward: str) -> str:
    """What is about to happen. reward: the docstring of the reward, which may be a student's."""
    what, asked = "passages", "without the passage"
    if "arc" in cfg.domain:
        what, asked = "puzzles", "for the solution"
    own = " ".join(reward.split(".")[0].split())
    return (f"In each of {cfg.iterations} rounds the model reads {cfg.tasks} {what} and writes "
            f"{cfg.edits} self-edits of each.\nEvery self-edit trains an adapter of its own, and "
            f"that adapter is asked {asked}.\nThe reward of a self-edit: {own[:1].lower()}"
            f"{own[1:]}.\nThe model then learns {learned(cfg)}.\n"
            f"Watch the reward on held-out {what}; {cfg.run_dir}/report.html shows more after each "
            "round.\n")


def learned(cfg) -> str:
    """Which self-edits the M-step learns, for any --update."""
    return {"best": f"the {cfg.keep} best of every {cfg.edits}",
            "solved": f"those with a reward of {cfg.solved_at:g} or more",
            "random": f"any {cfg.keep} of every {cfg.edits}, drawn at random (a control)",
            "reinforce": "all of them, each weighed by its advantage",
            "grpo": "all of them, each weighed by its advantage in standard deviations"}.get(
                cfg.update, f"those that --update {cfg.update} weighs")


def curve(metrics: list[dict], width=40) -> str:
    """Held-out reward over iterations, as bars."""
    lines = []
    for m in metrics:
        bar = "#" * min(width, round(width * m["eval_reward"]))
        lines.append(f"    {m['iteration']:>2} |{bar:<{width}}| {m['eval_reward']:.3f}")
    return "\n".join(lines)


def iteration_line(m: dict) -> str:
    """A line of metrics.jsonl, for people."""
    reward = with_interval(m["eval_reward"], m["eval_ci"]) + in_brackets(m["eval_by_kind"])
    return (f"{when(m['iteration'])}: held-out reward {reward} on {m['eval_tasks']} tasks, "
            f"without a self-edit {m['eval_unadapted']:.3f}")


def self_edit_line(task: int, edit: int, record: dict) -> str:
    """A line of rollouts.jsonl, for people."""
    return (f"  {printable(record['title'][:24])} {task}.{edit}: reward {record['reward']:.2f} "
            f"(un-adapted {record['unadapted']:.2f}), {record['documents']} documents, "
            f"{record['note'] or record['losses']} | {record['text'][:60]!r}")


def summary(run, held_out) -> str:
    """Baselines, the reward over rounds, what self-edits are made of, and one task."""
    metrics = run.metrics.records
    first, last = metrics[0], metrics[-1]
    lines = []
    if first["baselines"]:
        arms = [f"{arm['name']} {number(arm['reward'])}{in_brackets(arm['by_kind'])}"
                for arm in first["baselines"]]
        lines.append(", ".join(arms))

    rises = arrows([m["eval_reward"] for m in metrics])
    # A round of which no self-edit could be read has no kinds: nothing was right.
    kinds = {kind: arrows([m["eval_by_kind"].get(kind, 0.0) for m in metrics])
             for kind in (first["eval_by_kind"] or last["eval_by_kind"])}
    lines.append(f"with a self-edit {rises}{in_brackets(kinds)}")

    shares = []
    for part in dict.fromkeys([*first["made_of"], *last["made_of"]]):
        before, after = first["made_of"].get(part, 0), last["made_of"].get(part, 0)
        shares.append(f"{part} {before:.0%} -> {after:.0%}")
    if shares:
        lines.append("self-edits: " + ", ".join(shares))

    lines += show_task(run, held_out)
    return "\n".join(lines)


# ------------------------------------------------------------------------------- one task

def first_edits(run, t: int) -> dict[int, dict]:
    """{held-out task: the record of its first self-edit in iteration t}."""
    return {r["task"]: r for r in run.rollouts.of(t, "eval") if r["edit"] == 0}


def kinds_by_change(metrics: list[dict]) -> list[str]:
    """The kinds of question, the one whose accuracy changed most first."""
    first, last = metrics[0]["eval_by_kind"], metrics[-1]["eval_by_kind"]
    return sorted(first, key=lambda kind: -abs(last.get(kind, 0) - first[kind]))


def telling_task(run, puzzles: bool) -> tuple[int, str]:
    """The held-out task that shows what was learned, by its first self-edits, and why it is this.

    Of the tasks whose gain is within 0.1 of the mean gain, the one in which the kind of question
    that changed most changed most. Of puzzles one that was not solved before, and is now."""
    metrics = run.metrics.records
    before, after = first_edits(run, 0), first_edits(run, metrics[-1]["iteration"])
    gain = {i: after[i]["reward"] - before[i]["reward"] for i in sorted(after)}
    mean = metrics[-1]["eval_reward"] - metrics[0]["eval_reward"]
    nearest = min(gain, key=lambda i: abs(gain[i] - mean))
    solved = [i for i in gain if after[i]["reward"] == 1 > before[i]["reward"]]
    if puzzles and solved:
        return solved[0], "not solved before training, and solved after it"
    kinds = kinds_by_change(metrics)
    if not kinds:
        return nearest, "its gain is nearest to the mean gain"

    def share(r) -> float:
        """Of the questions of that kind, those that are answered correctly."""
        return by_kind({r["task"]: r.get("kinds", [])}, [r]).get(kinds[0], 0)

    change = metrics[-1]["eval_by_kind"].get(kinds[0], 0) - metrics[0]["eval_by_kind"][kinds[0]]
    sign = 1 if change > 0 else -1
    close = [i for i in gain if abs(gain[i] - mean) <= 0.1] or [nearest]
    best = max(close, key=lambda i: sign * (share(after[i]) - share(before[i])))
    return best, f"its gain is close to the mean gain, and most of it is in {kinds[0]} questions"


def show_task(run, held_out) -> list[str]:
    """A held-out task, with its first self-edit and its answers before the first round and after
    the last."""
    puzzles = "arc" in run.cfg.domain
    i, why = telling_task(run, puzzles)
    task, rounds = held_out[i], sorted({0, run.metrics.records[-1]["iteration"]})
    lines = [f"\nA held-out {'puzzle' if puzzles else 'passage'}, {printable(task.name, 60)} "
             f"({why}):", printable("\n".join(task.context))]
    edits = [first_edits(run, t)[i] for t in rounds]
    for t, r in zip(rounds, edits):
        lines.append(f"\n{when(t)} it writes, with reward {r['reward']:.2f}:")
        forms = r.get("forms") or [""] * len(r["text"].splitlines())
        for form, line in zip(forms, r["text"].splitlines()):
            lines.append(printable(f"    {form:<18}{line}" if form else f"    {line}"))
    lines.append("\nIt answers, " + " -> ".join(map(when, rounds)) + ":")
    order = kinds_by_change(run.metrics.records)
    kinds = task.kinds or [""] * len(task.questions)
    for q in sorted(range(len(kinds)), key=lambda q: order.index(kinds[q]) if kinds[q] else 0):
        given = [r["answers"][0][q] if r["answers"] else "" for r in edits]
        if puzzles:
            lines += draw({"input": task.questions[q], "solution": task.answers[q]})
            for t, answer in zip(rounds, given):
                lines += draw({f"{when(t)}": answer})
        else:
            marks = []
            for r, answer in zip(edits, given):
                right = r["right"] and r["right"][0][q]
                marks.append(f"{'right' if right else 'wrong'} {printable(answer, 30)!r}")
            lines.append(f"    {printable(task.questions[q], 200)}  {' -> '.join(marks)}")
    return lines


# As ARC's own site shows the colours 0 to 9, nearly: of a terminal's 256.
TERMINAL = (16, 32, 203, 41, 220, 248, 201, 208, 117, 88)


def draw(grids: dict[str, str]) -> list[str]:
    """Grids of digits side by side under their names: in colours on a terminal."""
    columns = []
    for name, text in grids.items():
        # A puzzle may have two attempts, with a blank line between.
        for attempt in printable(text, 4000).split("\n\n"):
            rows = attempt.split("\n")
            width = max(len(name), 2 * max(map(len, rows)))
            columns.append([name.ljust(width)])
            for row in rows:
                cells = "".join(map(cell, row))
                columns[-1].append(cells + " " * (width - 2 * len(row)))
            name = "or"
    lines = []
    for y in range(max(map(len, columns))):
        parts = [column[y] if y < len(column) else " " * len(column[0]) for column in columns]
        lines.append("    " + "   ".join(parts).rstrip())
    return lines


def cell(digit: str) -> str:
    """Two characters of a grid's row."""
    if not (sys.stdout.isatty() and digit in "0123456789"):
        return digit + " "
    return f"\x1b[48;5;{TERMINAL[int(digit)]}m  \x1b[0m"


# ------------------------------------------------------------------------------- numbers

def number(value) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


def arrows(values) -> str:
    return " -> ".join(map(number, values))


def in_brackets(shares: dict) -> str:
    """' (forward .810, reversed .050)', or nothing."""
    words = [f"{name} {number(share)}" for name, share in shares.items()]
    return f" ({', '.join(words)})" if words else ""


def table_lines(rows: list[dict], reference: dict) -> str:
    """A table of eval.py. Each row gets its mean, and its difference from the reference."""
    lines = [f"{'':>32}  {'accuracy [95 % CI]':<24}   {'over ' + reference['row']:<33}"
             "gained   lost    cut  docs  tokens  s/adapter"]
    for row in rows:
        row["mean"] = float(np.mean(row["accuracy"]))
        row["ci"] = bootstrap_ci(row["accuracy"])
        line = f"{row['row']:>32}  {with_interval(row['mean'], row['ci'], '6.3f')}  "
        if row is not reference:
            difference = np.subtract(row["accuracy"], reference["accuracy"])
            row["difference"] = float(difference.mean())
            row["difference_ci"] = bootstrap_ci(difference)
            line += f" {with_interval(row['difference'], row['difference_ci'], '6.3f')}"
        if "gained" in row:
            line = f"{line:<92}{row['gained']:6.3f} {row['lost']:6.3f}"
            line += f" {row['cut']:6.3f}" if "cut" in row else f" {'-':>6}"
            line += f" {row['documents']:5.1f} {row['tokens']:7.0f} {row['seconds']:10.1f}"
        lines.append(line)
    return "\n".join(lines)
