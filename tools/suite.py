"""The first hour on a GPU: is it right there, how fast is it, does a run go through?

    python -m tools.bench --suite                                     # about 25 minutes on an H100
    python -m tools.bench --suite --model DIR --train-data FILE --eval-data FILE

Every figure goes into one Markdown file, beside its target, as soon as it is known; a part that
fails is named, and the next one runs. Targets are for one H100, and were computed before anything
ran on one. Send the file in: docs/RESULTS.md has the place for it.
"""
import importlib.util
import platform
import random
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from engine import decode
from engine.decode import Sampling, sample, tries_for
from engine.memory import give_back_memory, peak_memory, step_memory
from engine.ribbon import Ribbon
from engine.update import adamw_all
from lora import Adapters, Segments, low_rank
from model import Transformer
from outer_loop import rest_em
from support.config import PRESETS, Config
from support.files import UserError
from support.run import Run
from tools.plan import CARDS
from tools.speed import LENGTHS, RECIPE, Floor, Peer, make_jobs, matmul_rate, shaped, timed, train

SHAPES = ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"]
# Thousands of tokens a second in training, pass and aim; the same, over PEFT's loop.
TRAINING = {"qwen2.5-0.5b": ("90, aim 150", "50 x, aim 100 x"),
            "qwen2.5-1.5b": ("38, aim 64", "30 x, aim 50 x"),
            "qwen2.5-7b": ("11, aim 15.7", "8 x, aim 13 x")}
# Of the bandwidth floor; with graphs over without.
DECODING = {"qwen2.5-0.5b": ("", "3 x"), "qwen2.5-7b": ("45 %, aim 70 %", "1.3 x")}


def suite(args):
    """Run every part, and write the file. args: bench.py's; --shape for one shape alone."""
    device = torch.device(args.device)
    report = Report(Path(args.out))
    report.write(f"# nanoSEAL on {name_of(device)}\n\n{time.strftime('%Y-%m-%d')}, torch "
                 f"{torch.__version__}, CUDA {torch.version.cuda}, Python "
                 f"{platform.python_version()}, commit {commit()}\n")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    report.part("tests on CUDA", tests)
    report.part("kernels", kernels, device, dtype, args.shape == "small")
    for shape in [args.shape] if args.shape else SHAPES:
        report.part(f"training, {shape}", training, shape, device, dtype, args.jobs, args.peer_jobs)
        report.part(f"decoding, {shape}", decoding, shape, device, dtype)
    report.part("a run: preset tiny, one round", tiny_run, args.device)
    if args.model:
        report.part(f"a run: {args.model}", knowledge_run, args)
    report.write(f"\nAll of it took {(time.time() - report.begin) / 60:.0f} minutes.\n")


class Report:
    """A Markdown file that grows part by part, and is shown as it grows."""

    def __init__(self, path):
        self.path, self.begin = path, time.time()
        if path.exists():
            raise UserError(f"{path} exists already; name another file by --out")

    def write(self, text):
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as f:
            f.write(text + "\n")

    def part(self, title, function, *args):
        """function(*args) yields (what, figure, target)s."""
        begin = time.time()
        self.write(f"\n## {title}\n\n| what | figure | target |\n|---|---|---|")
        try:
            for what, figure, target in function(*args):
                self.write(f"| {what} | {figure} | {target} |")
        except Exception as e:      # whatever it is, the next part may run
            said = " ".join(str(e).split())[:300].replace("|", "/")
            self.write(f"| failed | {type(e).__name__}: {said} | |")
        self.write(f"| this part | {time.time() - begin:.0f} s | |")
        give_back_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


def commit():
    """Of this checkout."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    return done.stdout.strip() or "unknown"


def card_of(device):
    """The known card whose memory comes nearest, as its peak figures are needed."""
    gib = 8
    if device.type == "cuda":
        gib = torch.cuda.get_device_properties(device).total_memory / 2 ** 30
    return CARDS[min(CARDS, key=lambda known: abs(known - gib))]


def milliseconds(device, f, n=10):
    """A call, the mean of n after a first one."""
    f()
    return timed(device, lambda: [f() for _ in range(n)])[0] / n * 1000


# ------------------------------------------------------------------------------- is it right?

def tests():
    if not importlib.util.find_spec("pytest"):
        yield "tests/test_cuda.py", "no pytest (requirements-dev.txt)", "all pass"
        return
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "-s", "tests/test_cuda.py"],
                          capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    lines = done.stdout.strip().splitlines() or [done.stderr[-200:]]
    for line in lines:
        if line.startswith(("peak ", "waits at")):
            yield line.split()[0], line, ""
        if line.startswith("FAILED"):
            yield "failed", line, "none"
    yield "tests/test_cuda.py", lines[-1], "all pass"


# ------------------------------------------------------------------------------- kernels

def kernels(device, dtype, small):
    """What the reckoning stands on."""
    card = card_of(device)
    a_round = dict(dtype=dtype, device=device)
    rate = matmul_rate(device, dtype)
    yield "a large product", f"{rate / 1e12:.1f} TFLOP/s", f"of {card.flops / 1e12:.0f}"
    block = torch.empty(2 ** 16 if small else 2 ** 29, **a_round)
    other = torch.empty_like(block)
    ms = milliseconds(device, lambda: other.copy_(block))
    yield ("copying", f"{2 * block.nbytes / ms / 1e9:.2f} TB/s", f"of {card.bandwidth / 1e12:.2f}")

    worst = 0.0
    for n in range(40, 46):
        ribbon = Ribbon([n, n + 1, n - 2] * (1 if small else 20), device)
        q = torch.randn(ribbon.row.numel(), 14, 64, **a_round)
        k = torch.randn(ribbon.row.numel(), 2, 64, **a_round)
        worst = max(worst, timed(device, lambda: ribbon.attend(0, q, k, k))[0] * 1000)
    yield "attention on a new shape, the slowest of 6", f"{worst:.1f} ms", "5 ms, but for the first"

    n, T, dim = (4, 64, 64) if small else (64, 3136, 1536)
    counts = [T // n + (1 if i % 2 else -1) for i in range(n)]
    segments = Segments(counts, device)
    x, A, B = (torch.randn(*shape, **a_round) for shape in ((T, dim), (n, 32, dim), (n, dim, 32)))
    padded = milliseconds(device, lambda: low_rank(x, A, B, 2.0, segments, grouped=False))
    yield f"low-rank product, {n} adapters, padded", f"{padded:.3f} ms", ""
    if dtype == torch.bfloat16:
        ms = milliseconds(device, lambda: low_rank(x, A, B, 2.0, segments, grouped=True))
        yield "the same, grouped", f"{ms:.3f} ms", "less than padded"

    n, P = (3, 5000) if small else (64, 2162688)
    p, m, v = (torch.rand(n, P, device=device) for _ in range(3))
    g, copy = torch.rand(n, P, **a_round), torch.rand(n, P, **a_round)
    ones = torch.ones(n, 1, device=device)
    ms = milliseconds(device, lambda: adamw_all(p, g, m, v, ones, ones, copy, clip=1.0,
                                                weight_decay=0.0))
    # p, m, v are read and written, the copy is written, the gradient is read twice (its norm).
    least = n * P * (24 + 3 * dtype.itemsize) / card.bandwidth * 1000
    yield f"AdamW of {n} x {P}", f"{ms:.2f} ms", f"1.5 x {least:.2f}"

    logits = torch.randn(4 if small else 250, 300 if small else 151936, **a_round)
    u = torch.rand(len(logits), tries_for(0.95), device=device)
    ms = milliseconds(device, lambda: sample(logits, 1.0, 0.95, u))
    sort = milliseconds(device, lambda: logits.float().sort(-1))
    yield "a token of 250 rows from the nucleus", f"{ms:.2f} ms", f"a sort takes {sort:.2f}"


# ------------------------------------------------------------------------------- speed

@contextmanager
def model_of(shape, device, dtype):
    with tempfile.TemporaryDirectory() as folder:
        yield shaped(shape, folder, device, dtype)


def training(shape, device, dtype, n_jobs, n_peer_jobs):
    """Inner loops of the paper, ours and the fair peer's."""
    with model_of(shape, device, dtype) as model:
        # Three of the paper's ten epochs: enough steps of a shape for its graph to pay.
        jobs = make_jobs(model, lengths(n_jobs or 750), replace(RECIPE, epochs=3))
        floor = Floor.of(model)
        peak_flops = card_of(device).flops
        target, over_peer = TRAINING.get(shape, ("", ""))
        fastest = 0.0
        for slots in (64, 128):
            slots = min(slots, len(jobs))
            train(jobs[:slots], model, slots)       # compiles
            tokens, steps = sum(job.tokens for job in jobs), sum(job.steps for job in jobs)
            seconds, peak = timed(device, lambda: train(jobs, model, slots))
            rate = tokens / seconds
            fastest = max(fastest, rate)
            weights = sum(p.nbytes for p in model.parameters())
            formula = step_memory(model, RECIPE.lora, slots, slots * tokens / steps)
            yield (f"{slots} side by side, {len(jobs)} adapters",
                   f"{rate / 1e3:.1f} k tokens/s, {rate * floor.flops / peak_flops:.0%} of the "
                   f"card's peak, {seconds:.0f} s", target)
            yield ("its peak beside the weights", f"{(peak - weights) / 2 ** 30:.1f} GiB",
                   f"{formula / 2 ** 30:.1f} (a mean step)")
        peer = Peer(model, pretrained=False)
        few = jobs[:n_peer_jobs]
        peer.bare_loop(few[:2])
        seconds, _ = timed(device, lambda: peer.bare_loop(few))
        rate = sum(job.tokens for job in few) / seconds
        yield "PEFT's bare loop", f"{rate / 1e3:.2f} k tokens/s", ""
        yield "ours over it", f"{fastest / rate:.0f} x", over_peer


def lengths(n):
    """Document lengths of n self-edits, in an order of chance."""
    rng = random.Random(1)
    edits = [rng.sample(documents, len(documents)) for documents in rng.sample(LENGTHS, 250)]
    return [edits[i % 250] for i in range(n)]


def decoding(shape, device, dtype):
    """64 adapters answer, and texts are sampled; with graphs and without."""
    rng = random.Random(2)
    n_adapters, rows, tokens = (2, 8, 9) if shape == "small" else (64, 256, 65)
    with model_of(shape, device, dtype) as model:
        prompts = [[rng.randrange(10, model.config.vocab_size) for _ in range(rng.randint(20, 46))]
                   for _ in range(rows)]
        adapters = Adapters(model, RECIPE.lora, n_adapters)
        adapters.flat.normal_(std=0.01)
        per = rows // n_adapters
        groups = [prompts[i * per:(i + 1) * per] for i in range(n_adapters)]
        answers = Sampling(tokens, max_rows=rows)
        texts = Sampling(tokens, temperature=1.0, top_p=0.95, max_rows=rows)
        arms = {f"{rows} answers under {n_adapters} adapters":
                lambda: decode.generate(model, groups, answers, adapters=adapters),
                f"{rows} texts from the nucleus":
                lambda: decode.generate(model, [prompts], texts, seeds=range(rows))}
        # Read in every step: the weights (of a tied output once), and the adapters.
        read = least_bytes(model)
        read_adapters = adapters.flat.numel() * dtype.itemsize
        share, ratio = DECODING.get(shape, ("", ""))
        for name, arm in arms.items():
            arm()
            ms = timed(device, arm)[0] / tokens * 1000
            with without_graphs():
                arm()
                plain = timed(device, arm)[0] / tokens * 1000
            floor = (read + read_adapters * ("adapters" in name)) / card_of(device).bandwidth * 1000
            yield name, f"{ms:.2f} ms a step, {floor / ms:.0%} of the bandwidth floor", share
            yield "without graphs", f"{plain:.2f} ms a step: {plain / ms:.1f} x", ratio


def least_bytes(model: Transformer):
    """Weights that a step reads: all but an embedding that is no output layer."""
    total = sum(p.nbytes for p in model.parameters())
    return total if model.config.tied else total - model.model.embed_tokens.weight.nbytes


@contextmanager
def without_graphs():
    has_graphs, decode.has_graphs = decode.has_graphs, lambda device: False
    try:
        yield
    finally:
        decode.has_graphs = has_graphs


# ------------------------------------------------------------------------------- a run

def tiny_run(device):
    yield from run_and_resume(PRESETS["tiny"] | dict(device=device, iterations=1, dtype=""))


def knowledge_run(args):
    from lora import PROJECTIONS
    yield from run_and_resume(PRESETS["knowledge"] | dict(
        device=args.device, model=args.model, inner_targets=PROJECTIONS, eval_tasks=60,
        train_data=args.train_data or "data/example_train.json",
        eval_data=args.eval_data or "data/example_eval.json"))


def run_and_resume(settings):
    """A run from its beginning to its end, and the same command once more."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = Config(**settings | dict(run_dir=f"{folder}/run"))
        begin = time.time()
        run = Run(cfg)
        rest_em(cfg, run)
        rewards = [m["eval_reward"] for m in run.metrics.records]
        yield "seconds", f"{time.time() - begin:.0f}", ""
        yield "held-out reward", " -> ".join(f"{reward:.3f}" for reward in rewards), "rises"
        yield "peak memory", f"{peak_memory() / 2 ** 30:.1f} GiB", ""
        begin = time.time()
        again = Run(replace(cfg))
        rest_em(cfg, again)
        same = [m["eval_reward"] for m in again.metrics.records] == rewards
        yield "the same command again", f"{time.time() - begin:.0f} s", "seconds"
        yield "with the same rewards", "yes" if same else "no", "yes"
