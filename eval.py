"""Measure a model: accuracy with and without adaptation; and how far to trust the rule judges.

    python eval.py accuracy --model DIR_OR_HUB_ID --eval-data FILE
    python eval.py judges FILE                     # agreement with GPT-4.1 on released verdicts
    python eval.py curve RUN_DIR [RUN_DIR ...] --svg FILE   # held-out reward over iterations

`accuracy` takes outer_loop.py's flags and trains an adapter per passage (the paper's Table 2,
single passage): on nothing, the passage, a self-edit too. What it did is kept in --run-dir like any
run: read its rollouts.jsonl; the same command resumes it.
"""
import argparse
import html
import sys
from pathlib import Path

import numpy as np

from data.knowledge import JUDGES
from model import UserError, cli, read_json
from outer_loop import Lines, Run, bootstrap_ci, parse_args
from selfedit import SelfEdit


def accuracy(argv):
    """Print accuracy without adaptation, on the passage alone, and with a self-edit too."""
    cfg = parse_args(["--run-dir", "runs/eval", *argv], accuracy.__doc__, ("model", "eval_data"))
    run = Run(cfg)
    tasks, model = run.tasks(cfg.eval_data)[:cfg.eval_tasks], run.load(0)
    without = run.unadapted(model, tasks)
    arms = {"passage only": [[SelfEdit("", [], task.context)] for task in tasks],
            "passage and self-edit": run.sample(model, tasks, 0, "eval", 1)}
    rows = {"no adaptation": without} | {
        name: run.rewards(model, tasks, edits, 0, name, without, cfg.seeds)
        for name, edits in arms.items()}
    questions = sum(len(task.questions) for task in tasks)
    run.log(f"\n{len(tasks)} passages, {questions} questions, {cfg.seeds} seeds; "
            "accuracy and gain, the mean over passages [95 % CI]")
    interval = lambda x: "{:.3f} [{:.3f}, {:.3f}]".format(x.mean(), *bootstrap_ci(x))
    for name, values in rows.items():
        values = np.reshape(values, len(tasks))
        gain = "" if name == "no adaptation" else f"  gain {interval(values - without)}"
        run.log(f"{name:>22}  {interval(values)}{gain}")


def agreement(a, b):
    """(share of equal verdicts, Cohen's kappa: how far that is beyond chance)."""
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    observed = (a == b).mean()
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return observed, (observed - chance) / (1 - chance) if chance < 1 else 1.0


def judges(argv):
    """Print how far the rule judges agree with the released verdicts of GPT-4.1, by method."""
    ap = argparse.ArgumentParser(description=judges.__doc__)
    ap.add_argument("file", help="JSON list of passages, each with released: {method: {answers: "
                    "[{question, gold, baseline, baseline_ok, adapter, adapter_ok}]}}")
    file = ap.parse_args(argv).file
    records = read_json(file)
    try:
        methods = {method: [(x["question"], x["gold"], x[arm], x[f"{arm}_ok"])
                            for r in records for x in r["released"][method]["answers"]
                            for arm in ("baseline", "adapter")]
                   for method in records[0]["released"]}
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(f"{file}: no released verdicts ({type(e).__name__}: {e})") from None
    methods["all"] = [x for rows in methods.values() for x in rows]
    print(f"{'answers of':>12} {'n':>6} {'GPT-4.1':>8}"
          + "".join(f" | {name:>10} says right, agrees, kappa" for name in JUDGES))
    for method, rows in methods.items():
        gpt = [ok for *_, ok in rows]
        line = f"{method:>12} {len(rows):>6} {np.mean(gpt):8.3f}"
        for judge in JUDGES.values():
            ours = [bool(p.strip()) and judge(q, gold, p) for q, gold, p, _ in rows]
            line += " | {:>21.3f}  {:6.3f}  {:5.3f}".format(np.mean(ours), *agreement(ours, gpt))
        print(line)


def mean_ci(rows):
    """(mean, half of the 95 % interval) over runs, by Student's t. rows (runs, columns)."""
    rows = np.asarray(rows, float)
    n = len(rows)
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}.get(n, 2.26)
    half = t * rows.std(0, ddof=1) / n ** 0.5 if n > 1 else np.full(rows.shape[1], np.nan)
    return rows.mean(0), half


def curve(argv):
    """Print, and draw as SVG, held-out reward over iterations, runs of several seeds together."""
    ap = argparse.ArgumentParser(description=curve.__doc__)
    ap.add_argument("runs", nargs="+", help="run folders, of several seeds")
    ap.add_argument("--svg", help="file to draw to")
    args = ap.parse_args(argv)
    runs = []
    for folder in map(Path, args.runs):
        cfg, metrics = read_json(folder / "config.json"), Lines(folder / "metrics.jsonl").records
        if len(metrics) <= cfg["iterations"]:
            raise UserError(f"{folder}: this run has not ended; repeat its command to resume it")
        runs.append((cfg, metrics))
    differ = [key for key in runs[0][0] if key not in ("seed", "run_dir", "model")
              and any(cfg[key] != runs[0][0][key] for cfg, _ in runs)]
    groups = {}
    for cfg, metrics in runs:  # runs that differ in the seed alone belong together
        said = {key: cfg[key] for key in differ if cfg[key] is not False}
        name = ", ".join(key if value is True else f"{key} {value}" for key, value in said.items())
        groups.setdefault(name or "all runs", []).append(metrics)
    lines = {}
    for name, runs in groups.items():
        reward, half = mean_ci([[m["eval_reward"] for m in run] for run in runs])
        lines[name] = reward, half
        gains = [run[-1]["eval_reward"] - run[0]["eval_reward"] for run in runs]
        gain, gain_half = mean_ci(np.reshape(gains, (-1, 1)))
        arrows = lambda mean, half: " -> ".join(f"{r:.3f} ±{h:.3f}" for r, h in zip(mean, half))
        print(f"{name}, {len(runs)} seeds: {arrows(reward, half)}")
        each = " ".join(f"{g:+.3f}" for g in gains)
        print(f"    gain {gain[0]:+.3f} ±{gain_half[0]:.3f}, by seed {each}")
        for kind in runs[0][0]["eval_by_kind"]:
            by_kind = [[m["eval_by_kind"][kind] for m in run] for run in runs]
            print(f"    {kind} questions: {arrows(*mean_ci(by_kind))}")
        for what, key in ("lines", "forms"), ("chosen", "directives"):
            for item in dict.fromkeys(item for run in runs for m in run for item in m[key]):
                shares = np.mean([[m[key].get(item, 0) for m in run] for run in runs], axis=0)
                print(f"    {item} {what}: {' -> '.join(f'{share:.0%}' for share in shares)}")
    if args.svg:
        floor = [run[0]["passage_only"] for runs in groups.values() for run in runs
                 if "passage_only" in run[0]]
        Path(args.svg).write_text(draw(lines, np.mean(floor) if floor else None))


def draw(lines, floor):
    """An SVG of {name: (means, half-intervals)} over iterations; `floor` is a dashed line."""
    x = lambda t: 60 + 130 * t
    n = max(len(mean) for mean, _ in lines.values())
    lines = {name: (mean, np.nan_to_num(half)) for name, (mean, half) in lines.items()}
    low = min([floor or 1.0] + [min(mean - half) for mean, half in lines.values()]) - 0.03
    high = max(max(mean + half) for mean, half in lines.values()) + 0.03
    y = lambda r: 300 - 270 * (r - low) / (high - low)
    text = lambda px, py, words, more="": (
        f'<text x="{px:.0f}" y="{py:.0f}" {more}>{html.escape(words)}</text>')
    path = lambda d, colour, more="": f'<path d="{d}" fill="none" stroke="{colour}" {more}/>'
    end = x(n - 1)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{end + 240}" height="350" '
             'font-family="sans-serif" font-size="13">',
             '<rect width="100%" height="100%" fill="white"/>',
             text(60, 18, "held-out reward (95 % interval over seeds)"),
             text(x((n - 1) / 2), 342, "iteration of ReST-EM", 'text-anchor="middle"')]
    parts += [text(x(t), 322, str(t), 'text-anchor="middle"') for t in range(n)]
    for tick in np.arange(np.ceil(low * 10) / 10, high, 0.1):
        parts += [path(f"M60 {y(tick):.1f}H{end}", "#ddd"), text(28, y(tick) + 4, f"{tick:.1f}")]
    if floor is not None:
        parts += [path(f"M60 {y(floor):.1f}H{end}", "#777", 'stroke-dasharray="5"'),
                  text(end + 12, y(floor) + 4, f"passage only {floor:.2f}", 'fill="#777"')]
    colours = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
    for (name, (mean, half)), colour in zip(lines.items(), colours):
        points = " L".join(f"{x(t)} {y(r):.1f}" for t, r in enumerate(mean))
        parts.append(path("M" + points, colour, 'stroke-width="2.5"'))
        for t, (r, h) in enumerate(zip(mean, half)):
            parts.append(path(f"M{x(t)} {y(r - h):.1f}V{y(r + h):.1f}", colour))
        parts.append(text(x(len(mean) - 1) + 12, y(mean[-1]) + 4, f"{name} {mean[-1]:.2f}",
                          f'fill="{colour}"'))
    return "\n".join([*parts, "</svg>\n"])


def main():
    commands = {"accuracy": accuracy, "judges": judges, "curve": curve}
    if sys.argv[1:2] == [] or sys.argv[1] not in commands:
        raise UserError("usage: python eval.py {accuracy,judges,curve} ... (-h after any explains)")
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    cli(main)
