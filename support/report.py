"""What a run shows, in words: what `python outer_loop.py` prints."""
import re

import numpy as np

from support.config import Config
from support.files import printable
from support.ranks import place_of
from support.stats import bootstrap_ci, by_kind, with_interval


def when(t: int) -> str:
    """What people call iteration t of the files."""
    return f"after round {t}" if t else "before training"


def opening(cfg: Config, reward: str) -> str:
    """What is about to happen. reward: the docstring of the reward, which may be a student's."""
    what, asked = "passages", "without the passage"
    if "arc" in cfg.domain:
        what, asked = "puzzles", "for the solution"
    # Its first sentence, in one line.
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


def iteration_line(m: dict) -> str:
    """A line of metrics.jsonl, for people."""
    reward = with_interval(m["eval_reward"], m["eval_ci"]) + in_brackets(m["eval_by_kind"])
    return (f"{when(m['iteration'])}: held-out reward {reward} on {m['eval_tasks']} tasks, "
            f"without a self-edit {m['eval_unadapted']:.3f}")


def summary(run) -> str:
    """Baselines, the reward over rounds, what self-edits are made of, and one task."""
    metrics = run.metrics.records
    first, last = metrics[0], metrics[-1]
    arms = [f"{arm['name']} {arm['reward']:.3f}{in_brackets(arm['by_kind'])}"
            for arm in first["baselines"]]
    lines = [", ".join(arms)] if arms else []
    # Each kind of question stands in the line of its iteration.
    rewards = [f"{m['eval_reward']:.3f}" for m in metrics]
    lines.append(f"with a self-edit {' -> '.join(rewards)}")
    shares = []
    for part in dict.fromkeys([*first["made_of"], *last["made_of"]]):
        before, after = first["made_of"].get(part, 0), last["made_of"].get(part, 0)
        shares.append(f"{part} {before:.0%} -> {after:.0%}")
    if shares:
        lines.append("self-edits: " + ", ".join(shares))
    return "\n".join(lines + show_task(run))


# ------------------------------------------------------------------------------- one task

def kinds_by_change(metrics: list[dict]) -> list[str]:
    """The kinds of question, the one whose accuracy changed most first."""
    if not metrics:
        return []
    first, last = metrics[0]["eval_by_kind"], metrics[-1]["eval_by_kind"]
    return sorted(first, key=lambda kind: -abs(last.get(kind, 0) - first[kind]))


def before_and_after(run) -> dict:
    """A held-out task before the first round and after the last: `why` it is shown, the rollouts of
    its first self-edits (`ends`), and the `order` of its questions. `all` {iteration: {task: its
    rollouts}} of the model's own self-edits. Empty if there are none."""
    # The model's own self-edits have no name in outer_loop.py, and these in eval.py.
    arms = re.compile(r"(its own self-edits|self-edits after round \d+)?")
    found = {}
    for r in sorted(run.rollouts.records, key=place_of):
        if r["split"] == "eval" and arms.fullmatch(r.get("arm", "")):
            found.setdefault(r["iteration"], {}).setdefault(r["task"], []).append(r)
    if not found:
        return {}
    before, after = found[min(found)], found[max(found)]
    # A run that has just begun has measured nothing yet.
    metrics, i, why = run.metrics.records, min(before), "it is the first one"
    if metrics:
        i, why = telling_task(metrics, before, after, "arc" in run.cfg.domain)
    ends = [found[t][i][0] for t in sorted({min(found), max(found)}) if i in found[t]]
    # The kind of question that changed most comes first.
    kinds = ends[0].get("kinds") or [""] * len(ends[0]["questions"])
    by_change = [*kinds_by_change(metrics), *kinds]
    order = sorted(range(len(kinds)), key=lambda q: by_change.index(kinds[q]))
    return {"why": why, "ends": ends, "order": order, "all": found}


def telling_task(metrics: list[dict], before: dict, after: dict, puzzles: bool) -> tuple[int, str]:
    """The task that shows what was learned, by its first self-edits, and why it is this.

    Of the tasks whose gain is within 0.1 of the mean gain, the one that did best in the kind of
    question that changed most. Of puzzles one that was not solved before, and is now."""
    gain = {i: after[i][0]["reward"] - before[i][0]["reward"] for i in sorted(after)}
    solved = [i for i in gain if after[i][0]["reward"] == 1 > before[i][0]["reward"]]
    if puzzles and solved:
        return solved[0], "it was not solved before training, and is solved after it"
    mean = metrics[-1]["eval_reward"] - metrics[0]["eval_reward"]
    nearest = min(gain, key=lambda i: abs(gain[i] - mean))
    kinds = kinds_by_change(metrics)
    if not kinds:
        return nearest, "its gain is nearest to the mean gain"

    # A task that is typical of all, and shows in which questions they changed.
    def share(r) -> float:      # of the questions of that kind, those that are answered correctly
        return by_kind({r["task"]: r.get("kinds", [])}, [r]).get(kinds[0], 0)

    close = [i for i in gain if abs(gain[i] - mean) <= 0.1] or [nearest]
    best = max(close, key=lambda i: share(after[i][0]) - share(before[i][0]))
    return best, f"its gain is close to the mean gain, and it did best in {kinds[0]} questions"


def show_task(run) -> list[str]:
    """A held-out task, with its first self-edit and its answers before the first round and after
    the last."""
    shown = before_and_after(run)
    puzzles, ends = "arc" in run.cfg.domain, shown["ends"]
    title = printable(ends[0]["title"], 60)
    lines = [f"\nA held-out {'puzzle' if puzzles else 'passage'}, {title} ({shown['why']}):",
             printable(ends[0].get("context", ""))]
    for r in ends:
        lines.append(f"\n{when(r['iteration'])} it writes, with reward {r['reward']:.2f}:")
        written = r["text"].splitlines()
        for form, line in zip(r.get("forms") or [""] * len(written), written):
            lines.append(printable(f"    {form:<18}{line}" if form else f"    {line}"))
    lines.append("\nIt answers, " + " -> ".join(when(r["iteration"]) for r in ends) + ":")
    for q in shown["order"]:
        question, gold = ends[0]["questions"][q], ends[0]["gold"][q]
        given = [r["answers"][0][q] if r["answers"] else "" for r in ends]
        # Grids need several lines each, and passages' answers one for all.
        if puzzles:
            lines += beside({"input": question, "solution": gold})
            lines += beside({when(r["iteration"]): text for r, text in zip(ends, given)})
            continue
        marks = []
        for r, answer in zip(ends, given):
            right = r["right"] and r["right"][0][q]
            marks.append(f"{'right' if right else 'wrong'} {printable(answer, 30)!r}")
        lines.append(f"    {printable(question, 200)}  {' -> '.join(marks)}")
    return lines


# Nearly as ARC's own site shows the colours 0 to 9. Each is two columns wide on a terminal.
SQUARES = str.maketrans("0123456789", "⬛🟦🟥🟩🟨⬜🟪🟧🟫🔲")


def beside(grids: dict[str, str]) -> list[str]:
    """{title: grid of digits} in colours, side by side; two attempts stand below each other."""
    columns = []
    for title, text in grids.items():
        rows = printable(text, 4000).translate(SQUARES).split("\n")
        width = 3 + max(len(title), 2 * max(map(len, rows)))
        columns.append([title.ljust(width)] + [row + " " * (width - 2 * len(row)) for row in rows])
    height = max(map(len, columns))
    for column in columns:
        column += [" " * len(column[0])] * (height - len(column))
    return ["    " + "".join(row).rstrip() for row in zip(*columns)]


def in_brackets(shares: dict) -> str:
    """' (forward 0.810, reversed 0.050)', or nothing."""
    words = [f"{name} {share:.3f}" for name, share in shares.items()]
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
