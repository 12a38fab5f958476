"""How fast the engine is, beside what one would use instead, in one run.

    python -m tools.bench                           # the embedded checkpoint, minutes on a CPU
    python -m tools.bench --model DIR_OR_HUB_ID --dtype bfloat16 --steps 10
    python -m tools.bench --model qwen2.5-7b        # random weights of a known shape
    python -m tools.bench --gpu --out FILE          # eight minutes of a GPU, in three shapes

Training is of the paper's inner loops, ten epochs, r 32 on q and v. Documents are as long as those
of the 250 self-edits that the authors released for their first round (data/lengths.json, in Qwen2.5
tokens, EOS included; each is trained three times there: 65,490 steps). Their tokens are random.

Every step is timed by itself and counts as what it is: plain, recorded as a CUDA graph, or a replay
of one. The replays are the steady state; on a CPU all steps are plain. A floor is the longer of two
times, for the FLOPs and the bytes, at the rates of the card's data sheet, else at measured ones.
--gpu asks first what matters most. A part that fails is one line; out of time, it says what it has.
"""
import gc
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace
from functools import partial
from statistics import mean, median
from unittest import mock

import torch

from engine import train
from engine.decode import Rows, Sampling, generate
from engine.device import auto_slots, give_back_memory, peak_memory, row_memory
from engine.train import Engine, fill_slots, sft
from lora import Adapters, Job, Lora, Recipe
from model import ModelConfig, Transformer, load_pretrained
from support.checkpoint import EMBEDDED
from support.files import Parser, UserError, cli, positive
from tools.plan import CARDS, LENGTHS, SHAPES, Card, passed_by, token_flops, write_shape

RECIPE = Recipe(Lora(rank=32, alpha=64, targets=["q_proj", "v_proj"]), lr=1e-3, epochs=10, batch=1)
# The arms of a training. The last tells what it costs that there are many adapters.
OURS, ROUND = "ours, all slots full", "ours, all jobs to their end"
PEFT, ONE = "PEFT, one document a step", "one adapter, as many documents a step"

# ------------------------------------------------------------------------------- the work

def shaped(name, folder, device, dtype):
    """A model of a known shape with random weights (zeros would be faster than the truth)."""
    write_shape(name, folder)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_folder(folder), folder).to(dtype)
    model.to_empty(device=device).tie()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.02)
    return model.requires_grad_(False)


def make_jobs(model, n, recipe=RECIPE):
    """n inner loops, whose documents are cut to the model's window, in an order of chance."""
    rng, jobs = random.Random(0), []
    edits = rng.sample(LENGTHS, len(LENGTHS))
    for seed in range(n):
        examples = []
        for length in edits[seed % len(edits)]:
            n_ids = min(length, model.config.max_len)
            ids = rng.choices(range(10, model.config.vocab_size), k=n_ids)
            examples.append((ids, [True] * len(ids)))
        jobs.append(Job(examples, seed, recipe))
    return jobs


def peft_loop(model, jobs, progress=lambda ids: None):
    """The fair peer, transformers + PEFT on a model of the same shape: one adapter after the other,
    one document after the other, nothing padded. Returns the last adapter's weights."""
    import peft
    import transformers
    transformers.logging.set_verbosity_error()
    device, lora = model.device, RECIPE.lora
    config = transformers.AutoConfig.from_pretrained(model.folder)
    with torch.device(device):      # on one CPU thread 7B parameters take minutes
        base = transformers.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    peer = peft.get_peft_model(base, peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM"))
    # PEFT keeps adapters in float32 over a bfloat16 model, as we do.
    weights = [p for p in peer.parameters() if p.requires_grad]
    for job in jobs:
        torch.manual_seed(job.seed)
        for A, B in zip(weights[0::2], weights[1::2]):      # a fresh adapter
            torch.nn.init.kaiming_uniform_(A, a=5 ** .5)
            torch.nn.init.zeros_(B)
        opt = torch.optim.AdamW(weights, lr=job.recipe.lr, weight_decay=0,
                                fused=device.type == "cuda")
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, job.steps)
        texts = [torch.tensor([ids], device=device) for ids, _ in job.examples]
        for (e,) in job.micro_batches():
            with torch.autocast(device.type, torch.bfloat16, model.dtype == torch.bfloat16):
                loss = peer(input_ids=texts[e], labels=texts[e], use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            opt.step()
            schedule.step()
            opt.zero_grad()
            progress(texts[e])
    return weights


def train_arm(arm, model, jobs, slots, progress):
    """Train as this arm does. progress(ids) is called after the peer's steps."""
    if arm == PEFT:     # an epoch of each, so that a few steps see the texts of many
        peft_loop(model, [replace(x, recipe=replace(x.recipe, epochs=1)) for x in jobs], progress)
    elif arm == ROUND:
        list(sft(model, [replace(x, recipe=replace(x.recipe, slots=slots)) for x in jobs]))
    elif arm == ONE:
        examples = [example for job in jobs for example in job.examples]
        list(sft(model, [Job(examples, 0, replace(jobs[0].recipe, batch=slots, slots=1))]))
    else:
        # In an order of chance, where sft begins with the longest: a whole round's mix of texts.
        list(fill_slots(model, jobs, list(range(len(jobs))), slots))


# ------------------------------------------------------------------------------- measuring

class Enough(Exception):
    """The steps or the time of an arm are over."""


def mark(device):
    """A moment, on the device's own time line if it has one."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def ms_between(marks):
    """Milliseconds from each of these moments to the next."""
    if isinstance(marks[0], float):
        return [1000 * (b - a) for a, b in zip(marks, marks[1:])]
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks, marks[1:])]


def ms_of(device, f, n=10):
    """The median of n calls. What they return is dropped at once, as fresh memory takes time."""
    f()
    marks = [mark(device)]
    for _ in range(n):
        f()
        marks.append(mark(device))
    return median(ms_between(marks))


def followed(owner, name, after):
    """While entered, after(its result) follows each call of a function."""
    function = getattr(owner, name)

    def call(*args):
        result = function(*args)
        after(result)
        return result
    return mock.patch.object(owner, name, call)


class Steps:
    """Watches what trains or decodes: (kind, ms, tokens) of every step."""

    def __init__(self, bench, most=math.inf, traced=False):
        self.bench, self.most, self.traced, self.found = bench, most + 3 * traced, traced, []

    def watch(self, run):
        """run(), until `most` steps or the part's time are over."""
        self.kind, self.kinds, self.tokens, self.profiler = "replayed", [], [], None
        self.marks = [mark(self.bench.device)]
        with suppress(Enough), followed(train, "pack", self.packed), \
                followed(Engine, "compute", self.computed), followed(Engine, "step", self.ended), \
                followed(Rows, "forward", self.computed), followed(Rows, "step", self.ended):
            run()
        tokens = [int(n) for n in self.tokens] or [1] * len(self.kinds)
        steps = list(zip(self.kinds, ms_between(self.marks), tokens))
        # The first two load kernels and compile. The last three are slower while they are traced.
        self.found += steps[2:-3] if self.traced else steps[2:]
        if self.profiler:
            self.profiler.stop()
            self.bench.say(self.profiler.key_averages().table(
                f"self_{self.bench.device.type}_time_total", row_limit=40))

    def packed(self, step):
        self.tokens.append((step.ids != 0).sum())       # what fills a step up is 0

    def computed(self, result):
        """A step's Python was called, as in a replay it is not."""
        graph = self.bench.cuda and torch.cuda.is_current_stream_capturing()
        self.kind = "recorded" if graph else "plain"

    def ended(self, result):
        self.kinds.append(self.kind)
        self.marks.append(mark(self.bench.device))
        self.kind = "replayed"
        if self.traced and len(self.kinds) == self.most - 3:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if len(self.kinds) >= self.most or time.time() > self.bench.deadline:
            raise Enough

    def peer_ended(self, ids):
        self.tokens.append(ids.numel())
        self.computed(ids)
        self.ended(ids)

    def by_kind(self):
        """{what: figure} of each kind; (kind, ms, tokens) of the steady ones."""
        values, steady = {}, []
        for kind in ("recorded", "plain", "replayed"):
            own = [step for step in self.found if step[0] == kind]
            if own:
                values[kind], values[f"{kind}_ms"] = len(own), median(ms for _, ms, _ in own)
                steady = own        # in the end, of the last kind that there is
        return values, steady


class Bench:
    """Where it runs, the time that is left, and where the figures go."""

    def __init__(self, args):
        self.args, self.device = args, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = getattr(torch, args.dtype or ("bfloat16" if self.cuda else "float32"))
        self.end = time.time() + (480 if args.gpu else math.inf)
        self.failed, self.rates = [], defaultdict(list)
        self.folder, self.out = tempfile.TemporaryDirectory(), open(args.out or os.devnull, "a")

    def say(self, text, **values):
        """Print and write it now, as the machine may go away."""
        text += ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        print(text, flush=True)
        print(text, flush=True, file=self.out)

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
        give_back_memory()

    def model(self, name):
        if name in SHAPES:
            return shaped(name, self.folder.name, self.device, self.dtype)
        return load_pretrained(name, self.device, self.dtype)


# ------------------------------------------------------------------------------- the parts

def the_card(bench, n):
    """What a product of n x n, a copy and a launch take, and by whose rates floors go."""
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.dtype) for _ in range(2))
    x, little = (torch.zeros(size, device=bench.device) for size in (16 * n * n, 8))
    y = torch.empty_like(x)
    flops = 2000 * n ** 3 / ms_of(bench.device, lambda: a @ b.T)
    bandwidth = 2000 * x.nbytes / ms_of(bench.device, lambda: y.copy_(x))
    launches = ms_of(bench.device, lambda: [little.add_(1) for _ in range(1000)])
    name = torch.cuda.get_device_name() if bench.cuda else f"CPU, {torch.get_num_threads()} threads"
    bench.card = Card("what was measured here", 0, flops, bandwidth)
    for card in CARDS.values():
        if f" {card.name} " in f" {name} ".replace("-", " ") and bench.dtype == torch.bfloat16:
            bench.card = card
    bench.say(f"- {name}, torch {torch.__version__}, floors by {bench.card}: ",
              tflop_s=flops / 1e12, copying_tb_s=bandwidth / 1e12, us_a_launch=launches)


def command(bench, *words):
    """Another program: its last line."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True,
                          timeout=bench.deadline - time.time())
    bench.say(f"- status {done.returncode}: {(done.stdout + done.stderr).strip().splitlines()[-1]}")


def training(bench, name, arm=OURS, n=750, slots=0, most=60, traced=False):
    """The steps of an arm: (kind, ms, tokens) by Steps, and what they say."""
    args, model = bench.args, bench.model(name)
    steps = Steps(bench, math.inf if arm == ROUND else args.steps or most, traced)
    jobs = make_jobs(model, args.jobs or n)
    slots = min(slots or args.slots or auto_slots(model, jobs) or 1, len(jobs))
    steps.watch(partial(train_arm, arm, model, jobs, slots, steps.peer_ended))
    values, steady = steps.by_kind()
    ms, tokens = mean(ms for _, ms, _ in steady), mean(n for *_, n in steady)
    P, N = RECIPE.lora.parameters(model), passed_by(model)
    # The weights are read forward and backward. AdamW moves 28 bytes a parameter.
    nbytes = 2 * N * model.dtype.itemsize + 28 * P * (1 if arm in (ONE, PEFT) else slots)
    least = bench.card.least_ms(tokens * token_flops(N, P), nbytes)
    in_all = sum(n for *_, n in steps.found) / sum(ms for _, ms, _ in steps.found)
    bench.say(f"- {arm}, {slots} slots: ", **values, tokens=tokens, k_tokens_s=tokens / ms,
              k_tokens_s_in_all=in_all, share_of_the_floor=least / ms)
    bench.rates[arm, name, slots].append(tokens / ms)
    ours = bench.rates[OURS, name, slots]
    if arm in (ONE, PEFT) and ours:
        bench.say("- ours over it: ", x=median(ours) / median(bench.rates[arm, name, slots]))


def decoding(bench, name, rows, n_adapters=0, temperature=0.0, traced=False):
    """Steps of rows under adapters, or from the nucleus, and a token in all."""
    rng, n_new, adapters, model = random.Random(2), bench.args.n_new, None, bench.model(name)
    steps = Steps(bench, n_new - 1 - 3 * traced, traced)
    vocabulary, per = range(10, model.config.vocab_size), rows // (n_adapters or 1)
    prompts = [rng.choices(vocabulary, k=rng.randint(20, 46)) for _ in range(rows)]
    groups = [prompts[i:i + per] for i in range(0, rows, per)]
    if n_adapters:
        adapters = Adapters(model, RECIPE.lora, n_adapters)
        adapters.flat.normal_(std=0.01)
    sampling = Sampling(n_new, temperature=temperature, top_p=0.95, max_rows=rows)
    begin = time.time()
    steps.watch(lambda: list(generate(model, groups, sampling, range(rows), adapters)))
    in_all = 1000 * (time.time() - begin) / n_new
    values, steady = steps.by_kind()
    N, P = passed_by(model), RECIPE.lora.parameters(model)
    nbytes = model.dtype.itemsize * (N + n_adapters * P) + rows * row_memory(model, 33 + n_new // 2)
    bench.say(f"- {rows} rows, {n_adapters} adapters: ", **values, ms_a_token_in_all=in_all,
              share_of_the_floor=bench.card.least_ms(2 * rows * N, nbytes)
              / median(ms for _, ms, _ in steady))


def on_gpu(bench, half="qwen2.5-0.5b", one="qwen2.5-1.5b", seven="qwen2.5-7b"):
    """What a GPU must answer, the most important first."""
    part = bench.part
    part("the card", 15, the_card, 1024 if half == "small" else 8192)
    part("tests", 110, command, "-m", "pytest", "-q", "tests/test_gpu.py")
    part("0.5B, steady", 30, training, half, slots=98, traced=True)
    for slots in (64, 256, 9):
        part(f"0.5B, {slots} slots", 15, training, half, slots=slots, most=40)
    part("0.5B, one adapter", 15, training, half, ONE, slots=98)
    part("0.5B, the peer", 15, training, half, PEFT, slots=98)
    part("7B, steady", 30, training, seven, slots=64, most=30)
    part("7B, 9 slots", 15, training, seven, slots=9, most=30)
    part("0.5B, answers under adapters", 15, decoding, half, 256, 64, traced=True)
    part("0.5B, texts from the nucleus", 15, decoding, half, 256, 0, 1.0, traced=True)
    part("0.5B, more rows", 15, decoding, half, 1024, 128)
    part("1.5B, steady", 25, training, one, slots=98, most=40)
    part("7B, answers under adapters", 15, decoding, seven, 256, 64, traced=True)
    part("7B, texts from the nucleus", 15, decoding, seven, 256, 0, 1.0)
    part("7B, one adapter", 15, training, seven, ONE, slots=64, most=20)
    part("7B, the peer", 20, training, seven, PEFT, slots=64)
    part("0.5B, an evaluation of 60", 35, training, half, ROUND, 60)
    part("0.5B, the paper's round", 60, training, half, ROUND)
    with mock.patch.dict(os.environ, NANOSEAL_NO_GRAPHS="1"):
        part("0.5B, steady, without graphs", 15, training, half, slots=98, most=15)
        part("0.5B, answers without graphs", 15, decoding, half, 256, 64)


def on_cpu(bench, model):
    """Ours and the peers in turn, A B C A B C; then what stands alone."""
    bench.part("the machine", 0, the_card, 1024)
    for arm in [OURS, ONE, PEFT] * bench.args.repeats:
        bench.part(arm, 600, training, model, arm, 24)
    bench.part("a round of 24 inner loops", 3600, training, model, ROUND, 24)
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
    ap.add_argument("--steps", type=positive, help="of an arm (default: 60)")
    ap.add_argument("--n-new", type=positive, default=128, help="tokens of a text (default: 128)")
    ap.add_argument("--repeats", type=positive, default=5, help="turns of the arms on a CPU")
    ap.add_argument("--out", help="a file that the figures are added to")
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
