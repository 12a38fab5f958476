"""What a run shows, in words: what `python outer_loop.py` prints."""
import numpy as np

from support.config import Config
from support.files import printable
from support.stats import bootstrap_ci, with_interval


def opening(cfg: Config) -> str:
    """What is about to happen, in three sentences."""
    what, asked = "passages", "without the passage"
    if "arc" in cfg.domain:
        what, asked = "puzzles", "for the solution"
    weighed = "all of them, by advantage,"
    kept = {"best": f"the {cfg.keep} best of {cfg.edits}",
            "solved": f"those with reward {cfg.solved_at:g} or more",
            "random": f"any {cfg.keep} of {cfg.edits}"}.get(cfg.update, weighed)
    return (f"In each of {cfg.iterations} rounds the model reads {cfg.tasks} {what} and writes "
            f"{cfg.edits} self-edits of each.\nEvery self-edit trains an adapter, which is asked "
            f"{asked}: the share of right answers is its\nreward, and {kept} are learned. "
            f"Watch the reward on held-out {what} rise;\n{cfg.run_dir}/report.html shows more "
            "after each round.\n")


def curve(metrics: list[dict], width=40) -> str:
    """Held-out reward over iterations, as bars."""
    lines = []
    for m in metrics:
        bar = "#" * round(width * m["eval_reward"])
        lines.append(f"    {m['iteration']:>2} |{bar:<{width}}| {m['eval_reward']:.3f}")
    return "\n".join(lines)


def iteration_line(m: dict) -> str:
    """A line of metrics.jsonl, for people."""
    reward = with_interval(m["eval_reward"], m["eval_ci"]) + in_brackets(m["eval_by_kind"])
    return (f"iteration {m['iteration']}: held-out reward {reward} on {m['eval_tasks']} tasks, "
            f"un-adapted {m['eval_unadapted']:.3f}")


def self_edit_line(task: int, edit: int, record: dict) -> str:
    """A line of rollouts.jsonl, for people."""
    return (f"  {printable(record['title'][:24])} {task}.{edit}: reward {record['reward']:.2f} "
            f"(un-adapted {record['unadapted']:.2f}), {record['documents']} documents, "
            f"{record['note'] or record['losses']} | {record['text'][:60]!r}")


def summary(run, held_out) -> str:
    """Baselines, reward over iterations, what self-edits are made of, and two tasks."""
    metrics = run.metrics.records
    first, last = metrics[0], metrics[-1]
    lines = []
    if first["baselines"]:
        arms = [f"{arm['name']} {number(arm['reward'])}{in_brackets(arm['by_kind'])}"
                for arm in first["baselines"]]
        lines.append(", ".join(arms))

    rises = arrows([m["eval_reward"] for m in metrics])
    kinds = {kind: arrows([m["eval_by_kind"][kind] for m in metrics])
             for kind in first["eval_by_kind"]}
    lines.append(f"with a self-edit {rises}{in_brackets(kinds)}")

    shares = []
    for part in dict.fromkeys([*first["made_of"], *last["made_of"]]):
        before, after = first["made_of"].get(part, 0), last["made_of"].get(part, 0)
        shares.append(f"{part} {before:.0%} -> {after:.0%}")
    if shares:
        lines.append("self-edits: " + ", ".join(shares))

    # One task is an anecdote, and the first one may be lucky. Beside it stands a typical one.
    i = typical_task(run, last)
    lines += show_task(run, held_out, 0, "The first task that it was not trained on")
    if i != 0:
        lines += show_task(run, held_out, i, "The one whose gain is nearest to the mean gain")
    return "\n".join(lines)


def typical_task(run, last) -> int:
    """The held-out task whose gain, by its first self-edit, is nearest to the mean gain."""
    def first_edits(t):
        return {r["task"]: r["reward"] for r in run.rollouts.of(t, "eval") if r["edit"] == 0}

    before, after = first_edits(0), first_edits(last["iteration"])
    mean_gain = last["eval_reward"] - run.metrics.records[0]["eval_reward"]
    return min(sorted(after), key=lambda i: abs(after[i] - before[i] - mean_gain))


def show_task(run, held_out, i, title) -> list[str]:
    """A task, and its first self-edit before the first round and after the last."""
    task = held_out[i]
    lines = [f"\n{title}:", printable("\n".join(task.context or task.queries[:1]))]
    for t in (0, run.metrics.records[-1]["iteration"]):
        r = next(r for r in run.rollouts.of(t, "eval") if (r["task"], r["edit"]) == (i, 0))
        lines.append(f"\nits self-edit at iteration {t}, reward {r['reward']:.2f} "
                     f"(un-adapted {r['unadapted']:.2f}):")
        lines.append(printable(r["text"]))
    return lines


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
