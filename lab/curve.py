"""Held-out reward over iterations, runs of several seeds together.

    python -m lab.curve RUN_DIR [RUN_DIR ...] --svg FILE
"""
import argparse
import html
import sys
from pathlib import Path

import numpy as np

from checkpoint import UserError, cli, read_json
from run import Lines
from stats import mean_ci


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
                if max(shares) >= .02:
                    print(f"    {item} {what}: {' -> '.join(f'{share:.0%}' for share in shares)}")
    if args.svg:
        floor = [b["reward"] for runs in groups.values() for run in runs
                 for b in run[0]["baselines"] if b["name"] == "passage only"]
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
        parts += [path(f"M60 {y(tick):.1f}H{end}", "#ddd"),
                  text(28, y(tick) + 4, f"{tick + 0.0:.1f}")]
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


if __name__ == "__main__":
    cli(lambda: curve(sys.argv[1:]))
