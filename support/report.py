"""What a run shows, in words: what `python outer_loop.py` prints."""
import numpy as np

from support.config import Config
from support.files import printable
from support.stats import with_interval


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


def examples(name: str, edits: list, scores: list[float], width=100) -> str:
    """A task's self-edits with their rewards, the best first, each in a line."""
    lines = [f"for example, of {printable(name, 60)}:"]
    for score, edit in sorted(zip(scores, edits), key=lambda pair: -pair[0]):
        text = " / ".join(edit.text.split("\n"))
        lines.append(f"    {score:.2f}  {printable(text, width) or '(nothing)'}")
    return "\n".join(lines)


def self_edit_line(task: int, edit: int, record: dict) -> str:
    """A line of rollouts.jsonl, for people."""
    return (f"  {printable(record['title'][:24])} {task}.{edit}: reward {record['reward']:.2f} "
            f"(un-adapted {record['unadapted']:.2f}), {record['documents']} documents, "
            f"{record['note'] or record['losses']} | {record['text'][:60]!r}")


def round_line(t: int, scores, without, learned) -> str:
    """What a round's self-edits were worth, and those with a positive weight."""
    wanted = [scores[i][j] for i, j, weight in learned if weight > 0]
    line = (f"round {t + 1}: mean reward {np.mean(scores):.3f}, un-adapted {np.mean(without):.3f}; "
            f"kept {len(wanted)} self-edits with mean reward {np.mean(wanted or [0]):.3f}")
    return line + (f", and {len(learned) - len(wanted)} to avoid" * (len(learned) > len(wanted)))


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
