"""How fast the engine is, beside what one would use instead, in one run.

    python -m tools.bench                   # the embedded checkpoint, minutes on a CPU
    python -m tools.bench --model NAME      # a folder, a hub id, or random weights of a known shape
    python -m tools.bench --gpu | tee FILE  # eight minutes of a GPU, in three shapes

Training is of the paper's inner loops, ten epochs, r 32 on q and v. Documents are as long as those
of the 250 self-edits that the authors released for their first round. Their tokens are random.

Every step is timed by itself and counts as what it is: plain, recorded as a CUDA graph, or a replay
of one. The replays are the steady state; on a CPU all steps are plain. The floor of a step is the
longer of two times, for its FLOPs and for its bytes, at the rates that are measured first.
"""
import gc
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from statistics import mean, median
from unittest import mock

import torch
from torch.profiler import profile, schedule

from engine import train
from engine.decode import Rows, Sampling, generate
from engine.device import auto_slots, peak_memory, row_memory
from engine.train import Engine, sft
from lora import Adapters, Job, Lora, Recipe
from model import load_pretrained
from support.checkpoint import EMBEDDED
from support.files import Parser, UserError, cli, positive
from tools.plan import LENGTHS, SHAPES, empty_model, passed_by, write_shape

RECIPE = Recipe(Lora(rank=32, alpha=64, targets=["q_proj", "v_proj"]), lr=1e-3, epochs=10, batch=1)
# The arms of a training. The last tells what it costs that there are many adapters.
OURS, PEFT, ONE = "ours", "PEFT, one document a step", "one adapter, as many documents a step"


def make_jobs(model, n, recipe=RECIPE):
    """n inner loops, in an order of chance."""
    rng, jobs = random.Random(0), []
    edits = rng.sample(LENGTHS, len(LENGTHS))
    vocabulary = range(10, model.config.vocab_size)
    for seed in range(n):
        lengths = edits[seed % len(edits)]
        examples = [(rng.choices(vocabulary, k=length), [True] * length) for length in lengths]
        jobs.append(Job(examples, seed, recipe))
    return jobs


def peft_loop(model, jobs, progress=lambda ids: None):
    """The fair peer, transformers + PEFT on a model of the same shape: one job after the other, one
    document after the other, nothing padded. Returns the adapter's weights."""
    import peft
    import transformers
    device, lora = model.device, RECIPE.lora
    config = transformers.AutoConfig.from_pretrained(model.folder)
    with torch.device(device):      # on one CPU thread 7B parameters take minutes
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    peer = peft.get_peft_model(base, peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM"))
    # In float32 over a bfloat16 model, as ours. One adapter goes through all jobs, at one rate.
    weights = [p for p in peer.parameters() if p.requires_grad]
    for job in jobs:
        opt = torch.optim.AdamW(weights, lr=job.recipe.lr, weight_decay=0, fused=True)
        # An epoch of each job, so that a few steps see the texts of many. They are copied before,
        # as a copy would wait for the step.
        texts = [torch.tensor([ids], device=device) for ids, _ in job.examples]
        for ids in texts:
            with torch.autocast(device.type, torch.bfloat16, model.dtype == torch.bfloat16):
                loss = peer(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            opt.step()
            opt.zero_grad()
            progress(ids)
    return weights


def train_arm(arm, model, jobs, slots, progress):
    """Train as this arm does. progress(ids) is called after the peer's steps."""
    if arm == PEFT:
        peft_loop(model, jobs, progress)
    elif arm == ONE:
        examples = [example for job in jobs for example in job.examples]
        list(sft(model, [Job(examples, 0, replace(jobs[0].recipe, batch=slots, slots=1))]))
    else:
        list(sft(model, [replace(job, recipe=replace(job.recipe, slots=slots)) for job in jobs]))


class Enough(Exception):
    """The steps or the time of an arm are over."""


def followed(owner, name, after):
    """While entered, after(its result) follows each call of a function."""
    function = getattr(owner, name)

    def call(*args):
        result = function(*args)
        after(result)
        return result
    return mock.patch.object(owner, name, call)


class Steps:
    """Watches what trains or decodes: the kind, the milliseconds and the tokens of every step."""

    def __init__(self, bench, most=math.inf, traced=False):
        """traced: three more steps are taken, and their kernels are listed."""
        self.bench, self.most, self.traced = bench, most + 4 * traced, traced
        self.kind, self.kinds, self.tokens, self.moments = "replayed", [], [], []
        by = f"self_{bench.device.type}_time_total"
        self.profile = profile(
            schedule=schedule(wait=most, warmup=1, active=3),
            on_trace_ready=lambda found: bench.say(found.key_averages().table(by, row_limit=40)))

    def watch(self, run):
        """run(), until `most` steps or the part's time are over."""
        self.moments.append(self.bench.moment())
        with suppress(Enough), self.profile, followed(train, "pack", self.packed), \
                followed(Engine, "compute", self.computed), followed(Engine, "step", self.ended), \
                followed(Rows, "forward", self.computed), followed(Rows, "step", self.ended):
            run()

    def packed(self, step):
        self.tokens.append((step.ids != 0).sum())       # what fills a step up is 0

    def computed(self, result):
        """A step's Python was called, as in a replay it is not."""
        graph = self.bench.cuda and torch.cuda.is_current_stream_capturing()
        self.kind = "recorded" if graph else "plain"

    def ended(self, result):
        self.kinds.append(self.kind)
        self.kind = "replayed"
        self.moments.append(self.bench.moment())
        if len(self.kinds) >= self.most or time.time() > self.bench.deadline:
            raise Enough
        self.profile.step()

    def peer_ended(self, ids):
        self.tokens.append(ids.numel())
        self.computed(ids)
        self.ended(ids)

    def tell(self, what, flops, nbytes):
        """A line about all kinds of steps; the tokens in a ms of the last one, the steady state.
        flops: of a token; nbytes: that a step reads and writes."""
        ms = self.bench.ms_between(self.moments)
        steps = list(zip(self.kinds, ms, map(int, self.tokens)))
        # In the first two kernels load and compile, and before them the peer is made or prompts are
        # read. The last four take longer if they are traced.
        values, steps = {"start_ms": sum(ms[:2])}, steps[2:len(steps) - 4 * self.traced]
        for kind in ("recorded", "plain", "replayed"):
            own = [step for step in steps if step[0] == kind]
            if own:
                values[kind], values[f"{kind}_ms"] = len(own), median(ms for _, ms, _ in own)
                steady = own
        ms, tokens = mean(ms for _, ms, _ in steady), mean(n for *_, n in steady)
        in_all = sum(n for *_, n in steps) / sum(ms for _, ms, _ in steps)
        least = 1000 * max(tokens * flops / self.bench.flops, nbytes / self.bench.bandwidth)
        self.bench.say(f"- {what}: ", **values, tokens=tokens, k_tokens_s=tokens / ms,
                       k_tokens_s_in_all=in_all, share_of_the_floor=least / ms)
        return tokens / ms


class Bench:
    """Where it runs, the time that is left, and where the figures go."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = getattr(torch, args.dtype or ("bfloat16" if self.cuda else "float32"))
        self.end = time.time() + (480 if args.gpu else math.inf)
        self.failed, self.rates = [], {}
        self.flops = self.bandwidth = math.nan      # until they are measured
        self.folder = tempfile.TemporaryDirectory()

    def say(self, text, **values):
        """Print it now, as the machine may go away."""
        print(text + ", ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)

    def moment(self):
        """Now, on the device's own time line if it has one."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms_between(self, moments):
        """Milliseconds from each of these moments to the next."""
        pairs = list(zip(moments, moments[1:]))
        if not self.cuda:
            return [1000 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]

    def part(self, name, seconds, function, *args, **kwargs):
        """A part that may take so long, if that much is left. A failure is one line."""
        begin = time.time()
        if begin + seconds > self.end:
            return self.say(f"\n## {name}: left out, too little time")
        self.say(f"\n## {name}")
        self.deadline = begin + seconds
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            function(self, *args, **kwargs)
        except ImportError as e:
            self.say(f"- left out: {e} (requirements-dev.txt)")
        except Exception as e:
            self.failed.append(name)
            self.say(f"- failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}")
        self.say(f"- ({time.time() - begin:.1f} s; peak {peak_memory() / 2 ** 30:.2f} GiB)")
        gc.collect()        # models of transformers hold on to themselves
        torch.cuda.empty_cache()

    def model(self, name):
        """A checkpoint, or a known shape with random weights (zeros are faster than the truth)."""
        if name not in SHAPES:
            return load_pretrained(name, self.device, self.dtype)
        model = empty_model(name, self.dtype).to_empty(device=self.device).requires_grad_(False)
        model.tie()
        for p in model.parameters():
            p.normal_(1.0 if p.dim() == 1 else 0.0, 0.02)
        model.folder = self.folder.name     # for the peer, which reads the config
        write_shape(name, model.folder)
        return model


def the_card(bench, n):
    """What a product of n x n and a copy take, as medians: by these rates floors go."""
    a = torch.randn(n, n, device=bench.device, dtype=bench.dtype)
    x, y = torch.zeros(2, 16 * n * n, device=bench.device)
    ms = []
    for work in (lambda: a @ a.T, lambda: y.copy_(x)):
        moments = [bench.moment()]
        for _ in range(10):
            work()
            moments.append(bench.moment())
        ms.append(median(bench.ms_between(moments)))
    bench.flops, bench.bandwidth = 2000 * n ** 3 / ms[0], 2000 * x.nbytes / ms[1]
    name = torch.cuda.get_device_name() if bench.cuda else f"CPU, {torch.get_num_threads()} threads"
    bench.say(f"- {name}, torch {torch.__version__}: ", tflop_s=bench.flops / 1e12,
              copying_tb_s=bench.bandwidth / 1e12)


def training(bench, name, arm=OURS, n=750, slots=0, most=60, traced=False):
    """The first steps of an arm, and how much faster ours are. The longest jobs come first, and
    their documents are 5 % shorter than the mean."""
    args, model = bench.args, bench.model(name)
    jobs = make_jobs(model, args.jobs or n)
    slots = min(args.slots or slots or auto_slots(model, jobs) or 1, len(jobs))
    steps = Steps(bench, args.steps or most, traced)
    steps.watch(lambda: train_arm(arm, model, jobs, slots, steps.peer_ended))

    P, N = RECIPE.lora.parameters(model), passed_by(model)
    # The weights are read forward and backward. AdamW moves 28 bytes a parameter.
    nbytes = 2 * N * model.dtype.itemsize + 28 * P * (1 if arm in (ONE, PEFT) else slots)
    rates = bench.rates.setdefault((name, slots, arm), [])
    rates.append(steps.tell(f"{arm}, {slots} slots", 4 * N + 6 * P, nbytes))
    ours = bench.rates.get((name, slots, OURS))
    if arm in (ONE, PEFT) and ours:
        bench.say("- ours over it: ", x=median(ours) / median(rates))


def decoding(bench, name, rows, n_adapters=0, temperature=0.0, traced=False):
    """Steps of rows under adapters, or from the nucleus."""
    n_new, model, adapters = bench.args.n_new, bench.model(name), None
    rng, vocabulary = random.Random(2), range(10, model.config.vocab_size)
    prompts = [rng.choices(vocabulary, k=rng.randint(20, 46)) for _ in range(rows)]
    per = rows // (n_adapters or 1)
    groups = [prompts[i:i + per] for i in range(0, rows, per)]
    if n_adapters:
        adapters = Adapters(model, RECIPE.lora, n_adapters)
        adapters.flat.normal_(std=0.01)
    sampling = Sampling(n_new, temperature=temperature, top_p=0.95, max_rows=rows)
    steps = Steps(bench, n_new - 1 - 4 * traced, traced)
    steps.watch(lambda: list(generate(model, groups, sampling, range(rows), adapters)))

    steps.tokens = [rows] * len(steps.kinds)
    N, P = passed_by(model), RECIPE.lora.parameters(model)
    nbytes = model.dtype.itemsize * (N + n_adapters * P) + rows * row_memory(model, 33 + n_new // 2)
    steps.tell(f"{rows} rows, {n_adapters} adapters", 2 * N, nbytes)


def on_gpu(bench, half="qwen2.5-0.5b", one="qwen2.5-1.5b", seven="qwen2.5-7b"):
    """What a GPU must answer, the most important first."""
    part, sizes = bench.part, [("0.5B", half, 98), ("7B", seven, 64)]
    part("the card", 15, the_card, 1024 if half == "small" else 8192)
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"]
    part("tests", 110, lambda bench: subprocess.run(tests, check=True, timeout=110))
    for size, model, slots in sizes:
        part(f"{size}, steady", 40, training, model, slots=slots, traced=True)
        part(f"{size}, one adapter", 15, training, model, ONE, slots=slots)
        part(f"{size}, the peer", 20, training, model, PEFT, slots=slots)
    for size, model, _ in sizes:
        part(f"{size}, answers under adapters", 15, decoding, model, 256, 64, traced=True)
        part(f"{size}, texts from the nucleus", 15, decoding, model, 256, 0, 1.0, traced=True)
    for slots in (64, 256, 9):
        part(f"0.5B, {slots} slots", 15, training, half, slots=slots, most=40)
    part("0.5B, more rows", 15, decoding, half, 1024, 128)
    part("1.5B, steady", 25, training, one, slots=98)
    part("0.5B, an evaluation of 60", 35, training, half, n=60, most=math.inf)
    part("0.5B, the paper's round", 60, training, half, most=math.inf)
    with mock.patch.dict(os.environ, NANOSEAL_NO_GRAPHS="1"):
        part("0.5B, steady, without graphs", 15, training, half, slots=98, most=15)
        part("0.5B, answers without graphs", 15, decoding, half, 256, 64)


def on_cpu(bench, model):
    """Ours and the peers in turn, A B C A B C; then what stands alone."""
    bench.part("the machine", 0, the_card, 1024)
    for arm in [OURS, ONE, PEFT] * bench.args.repeats:
        bench.part(arm, 600, training, model, arm, 24)
    bench.part("a round of 24 inner loops", 3600, training, model, n=24, most=math.inf)
    bench.part("answers", 600, decoding, model, 32, 8)
    bench.part("texts from the nucleus", 600, decoding, model, 32, 0, 1.0)


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", help=f"a folder, a hub id, or a shape: {', '.join(SHAPES)}")
    ap.add_argument("--gpu", action="store_true", help="eight minutes of a GPU")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda")
    ap.add_argument("--jobs", type=positive, help="adapters to train")
    ap.add_argument("--slots", type=positive, help="side by side (default: automatic)")
    ap.add_argument("--steps", type=positive, help="of a training (default: 60, or all of a round)")
    ap.add_argument("--n-new", type=positive, default=128, help="tokens of a text (default: 128)")
    ap.add_argument("--repeats", type=positive, default=5, help="turns of the arms on a CPU")
    args = ap.parse_args()
    bench = Bench(args)
    if args.gpu:
        on_gpu(bench, *[args.model] * 3 if args.model else [])
    else:
        on_cpu(bench, args.model or EMBEDDED)
    if bench.failed:
        raise UserError(f"failed: {', '.join(bench.failed)}")


if __name__ == "__main__":
    cli(main)
