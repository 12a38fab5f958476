"""How fast the engine is, beside what one would use instead, in one run.

    python -m tools.bench                           # the embedded checkpoint, minutes on a CPU
    python -m tools.bench --model DIR_OR_HUB_ID --dtype bfloat16
    python -m tools.bench --shape qwen2.5-7b --jobs 256       # random weights of a known shape
    python -m tools.bench --suite --jobs 750 --epochs 3 --slots 64 --peer-jobs 8 --repeats 1

Training is of the paper's inner loops. The documents' lengths are those of the 250 self-edits that
the authors released for their first round (data/lengths.json, in Qwen2.5 tokens, EOS included; each
is trained three times in the paper, which makes its 65,490 steps). The tokens are random, and LoRA
is r 32 on q and v. Every arm does the same work in turn, A B C A B C; medians are shown. An arm
whose library is missing is left out. --suite is for a GPU: training and decoding in three shapes,
256 rows under 64 adapters, with graphs and without; a part that fails is named, the next one runs.
"""
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

from engine import decode
from engine.decode import Sampling, generate, in_groups
from engine.device import auto_slots, give_back_memory, peak_memory, step_memory
from engine.train import batched, sft
from lora import Adapters, Job, Lora, Recipe
from model import ModelConfig, Transformer, load_pretrained
from support.checkpoint import EMBEDDED
from support.files import Parser, UserError, at_least, cli, positive
from tools.plan import SHAPES, token_flops, write_shape

LENGTHS = json.loads(EMBEDDED.with_name("lengths.json").read_text())   # per self-edit
RECIPE = Recipe(Lora(rank=32, alpha=64, targets=["q_proj", "v_proj"]), lr=1e-3, epochs=1, batch=1)
N_ADAPTERS, N_QUESTIONS = 8, 32     # of the arms that answer
SUITE = ["qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"]

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


def lengths_of(n, model, most=None):
    """Document lengths of n self-edits, in an order of chance, cut to the model's window."""
    rng = random.Random(1)
    edits = []
    for documents in rng.sample(LENGTHS, len(LENGTHS)):
        chosen = rng.sample(documents, len(documents))[:most]
        edits.append([min(length, model.config.max_len) for length in chosen])
    return [edits[i % len(edits)] for i in range(n)]


def random_ids(rng, model, n):
    return [rng.randrange(10, model.config.vocab_size) for _ in range(n)]


def make_jobs(model, lengths, recipe=RECIPE):
    """Inner loops over random tokens, in documents of the given lengths."""
    rng = random.Random(0)
    jobs = []
    for seed, documents in enumerate(lengths):
        examples = [(random_ids(rng, model, n), [True] * n) for n in documents]
        jobs.append(Job(examples, seed, recipe))
    return jobs


def make_questions(model, n=N_QUESTIONS):
    rng = random.Random(2)
    return [random_ids(rng, model, rng.randint(20, 46)) for _ in range(n)]


def train(jobs, model, slots):
    """Our training: all jobs, `slots` of them side by side."""
    list(sft(model, [replace(job, recipe=replace(job.recipe, slots=slots)) for job in jobs]))


def answer(model, adapters, questions, n_new):
    """Our answering: as many questions under each adapter, all together."""
    per = len(questions) // adapters.n
    groups = [questions[i * per:(i + 1) * per] for i in range(adapters.n)]
    list(generate(model, groups, Sampling(n_new), adapters=adapters))


def one_round(model, jobs, questions):
    """8 self-edits of 64 tokens a prompt; the jobs' SFT; 4 answers of 8 tokens under each."""
    contexts = [questions[i % len(questions)] for i in range(-(-len(jobs) // 8))]
    writing = Sampling(64, n=8, temperature=1.0, top_p=0.95)
    list(generate(model, [contexts], writing, seeds=range(8 * len(contexts))))
    for finished in batched(sft(model, jobs), 8):
        weights = [trained.weights for _, trained in finished]
        adapters = Adapters.stack(model, RECIPE.lora, weights)
        answer(model, adapters, questions[:4 * len(weights)], 8)


# ------------------------------------------------------------------------------- peers

class Peer:
    """transformers + PEFT, on the same weights or the same shape."""

    def __init__(self, model, pretrained):
        import peft
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        auto = transformers.AutoModelForCausalLM
        if pretrained:
            base = auto.from_pretrained(model.folder, dtype=model.dtype)
        else:
            config = transformers.AutoConfig.from_pretrained(model.folder)
            with torch.device(model.device):    # on one CPU thread 7B parameters take minutes
                base = auto.from_config(config, dtype=model.dtype)
        lora = RECIPE.lora
        self.lora = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0,
                                    target_modules=lora.targets, task_type="CAUSAL_LM")
        self.device = model.device
        self.model = peft.get_peft_model(base.to(model.device), self.lora)
        # PEFT keeps adapters in float32 over a bfloat16 model, as we do.
        self.weights = [p for p in self.model.parameters() if p.requires_grad]

    def bare_loop(self, jobs):
        """One adapter after the other, one document after the other, nothing padded."""
        for job in jobs:
            torch.manual_seed(job.seed)
            for A, B in zip(self.weights[0::2], self.weights[1::2]):    # a fresh adapter
                torch.nn.init.kaiming_uniform_(A, a=5 ** .5)
                torch.nn.init.zeros_(B)
            opt = torch.optim.AdamW(self.weights, lr=job.recipe.lr, weight_decay=0,
                                    fused=self.device.type == "cuda")
            schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, job.steps)
            texts = [torch.tensor([ids], device=self.device) for ids, _ in job.examples]
            for (e,) in job.micro_batches():
                with torch.autocast(self.device.type, torch.bfloat16,
                                    enabled=self.model.dtype == torch.bfloat16):
                    loss = self.model(input_ids=texts[e], labels=texts[e], use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
                opt.step()
                schedule.step()
                opt.zero_grad()

    def trainer(self, jobs, pad_to, steps):
        """The official way, a few steps of it: Trainer, rows padded and learned to `pad_to`."""
        import transformers
        texts = []
        for job in jobs:
            texts += [(ids + [0] * pad_to)[:pad_to] for ids, _ in job.examples]
        rows = [{"input_ids": ids, "labels": ids} for ids in texts[:steps]]
        with tempfile.TemporaryDirectory() as out:
            trainer = transformers.Trainer(self.model, transformers.TrainingArguments(
                out, per_device_train_batch_size=1, max_steps=steps, learning_rate=RECIPE.lr,
                report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
                use_cpu=self.device.type == "cpu", dataloader_pin_memory=False,
                bf16=self.model.dtype == torch.bfloat16), train_dataset=rows)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()

    def answer(self, n, questions, n_new):
        """Adapter after adapter, the questions of each in one left-padded batch."""
        for name in range(n - len(self.model.peft_config)):
            self.model.add_adapter(f"extra{name}", self.lora)
        per, longest = len(questions) // n, max(map(len, questions))
        self.model.eval()
        for i, name in enumerate(list(self.model.peft_config)[:n]):
            self.model.set_adapter(name)
            rows = questions[i * per:(i + 1) * per]
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
            with torch.inference_mode():
                self.model.generate(input_ids=ids.to(self.device), do_sample=False, pad_token_id=0,
                                    attention_mask=mask.to(self.device), max_new_tokens=n_new,
                                    min_new_tokens=n_new)
        self.model.set_adapter("default")
        self.model.train()


# ------------------------------------------------------------------------------- measuring

def timed(device, f):
    """(seconds, peak bytes: of the process on a CPU, of the allocator on CUDA)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():        # the process's peak begins anew (Linux)
        Path("/proc/self/clear_refs").write_text("5")
    begin = time.perf_counter()
    f()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter() - begin, torch.cuda.max_memory_allocated()
    seconds = time.perf_counter() - begin
    if not Path("/proc/self/status").exists():
        return seconds, peak_memory()
    status = Path("/proc/self/status").read_text()
    return seconds, 1024 * int(status.split("VmHWM:")[1].split()[0])


@dataclass
class Timing:
    seconds: list[float]
    peaks: list[int]

    median = property(lambda self: statistics.median(self.seconds))


def compare(device, arms, repeats):
    """Run all arms in turn, `repeats` times after a warm-up: {name: Timing}."""
    for f in arms.values():
        f()
    timings = {name: Timing([], []) for name in arms}
    for _ in range(repeats):
        for name, f in arms.items():
            seconds, peak = timed(device, f)
            timings[name].seconds.append(seconds)
            timings[name].peaks.append(peak)
    return timings


def show(name, timing, tokens, more=""):
    low, high = min(timing.seconds), max(timing.seconds)
    peak = statistics.median(timing.peaks) / 2 ** 30
    print(f"  {name:<44} {timing.median:8.2f} s [{low:.2f}, {high:.2f}] "
          f"{tokens / timing.median:9.0f} tokens/s  {peak:6.2f} GiB  {more}", flush=True)


def matmul_rate(device, dtype):
    """FLOP/s of a large square matrix product: what the floor is reckoned with."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / min(timed(device, lambda: a @ b.T)[0] for _ in range(8))


@dataclass
class Floor:
    """The least time that training can take: its FLOPs at the rate of a large product."""
    weights: int        # N, of the layers and the output
    parameters: int     # P, of an adapter
    rate: float         # FLOP/s of a large product

    flops = property(lambda self: token_flops(self.weights, self.parameters))
    tokens_per_second = property(lambda self: self.rate / self.flops)

    @classmethod
    def of(cls, model):
        layers = sum(p.numel() for p in model.model.layers.parameters())
        return cls(layers + model.lm_head.weight.numel(), RECIPE.lora.parameters(model),
                   matmul_rate(model.device, model.dtype))


def bench_training(args, model, peer, floor):
    # One adapter after the other is as fast for few jobs as for many. Side by side takes many, as
    # slots are empty when few are left. So the slow arms train the first ones only.
    recipe = replace(RECIPE, epochs=args.epochs)
    jobs = make_jobs(model, lengths_of(args.jobs, model, args.documents), recipe)
    few = jobs[:args.peer_jobs]
    steps, tokens = sum(job.steps for job in jobs), sum(job.tokens for job in jobs)
    slots = args.slots or auto_slots(model, jobs) or 1
    need = step_memory(model, RECIPE.lora, slots, slots * tokens / steps)
    print(f"formula: a step of {slots} slots needs {need / 2 ** 30:.2f} GiB beside the weights")
    if model.device.type == "cuda":
        print(f"models hold {torch.cuda.memory_allocated() / 2 ** 30:.2f} GiB of each peak")

    packed, fair = f"ours, packed, {slots} slots", "PEFT, bare loop, no padding (the fair peer)"
    work = {packed: jobs, "ours, one slot": few, fair: few}
    arms = {packed: lambda: train(jobs, model, slots),
            "ours, one slot": lambda: train(few, model, 1)}
    if peer:
        arms[fair] = lambda: peer.bare_loop(few)
    timings = compare(model.device, arms, args.repeats)

    print(f"\ntraining {len(jobs)} adapters, {steps} steps, {tokens} tokens (slow arms: the first "
          f"{len(few)}); median of {args.repeats}")
    rate = {}       # tokens per second
    for name, timing in timings.items():
        own_tokens = sum(job.tokens for job in work[name])
        rate[name] = own_tokens / timing.median
        per_hour = 3600 * len(work[name]) / timing.median
        share = rate[name] / floor.tokens_per_second
        show(name, timing, own_tokens, f"{per_hour:.0f} adapters/h, {share:.1%} of the floor")
    if not peer:
        return
    print(f"  ours over the fair peer, by tokens/s: {rate[packed] / rate[fair]:.2f} x")
    n_steps, pad_to = 4, min(2048, model.config.max_len)
    try:
        seconds, _ = timed(model.device, lambda: peer.trainer(jobs, pad_to, n_steps))
    except ImportError as e:
        print(f"  no Trainer: {e}")
        return
    estimate = seconds / n_steps * steps
    print(f"  Trainer + PEFT, rows padded to {pad_to}: {n_steps} steps in {seconds:.1f} s; "
          f"extrapolated to all: {estimate:.0f} s, {estimate / timings[packed].median:.0f} x ours")


def bench_answering(args, model, peer, floor):
    n, rows = (64, 256) if args.suite else (N_ADAPTERS, N_QUESTIONS)
    questions = make_questions(model, rows)
    adapters = Adapters(model, RECIPE.lora, n)
    for i in range(n):
        adapters.init(i, i)
    arms = {"ours, together": lambda: answer(model, adapters, questions, args.n_new)}
    if args.suite:
        nucleus, seeds = Sampling(args.n_new, temperature=1.0, top_p=0.95), range(rows)
        arms["ours, from the nucleus"] = lambda: in_groups(
            generate(model, [questions], nucleus, seeds=seeds), [questions])
        without_graphs = mock.patch.object(decode, "has_graphs", lambda device: False)
        for name, arm in list(arms.items()):
            arms[name + ", without graphs"] = without_graphs(arm)
    one_by_one = "transformers + PEFT, one by one"
    if peer:
        arms[one_by_one] = lambda: peer.answer(N_ADAPTERS, questions[:N_QUESTIONS], args.n_new)
    timings = compare(model.device, arms, args.repeats)
    print(f"\nanswering {rows} questions under {n} adapters, {args.n_new} tokens each; median of "
          f"{args.repeats}")
    rate = {}
    for name, timing in timings.items():
        tokens = (N_QUESTIONS if name == one_by_one else rows) * args.n_new
        rate[name] = tokens / timing.median
        show(name, timing, tokens, f"{1000 * timing.median / args.n_new:.2f} ms a token")
    if peer:
        print(f"  ours over the peer: {rate['ours, together'] / rate[one_by_one]:.2f} x")


def bench_rounds(args, model, peer, floor):
    print("\na round: 8 self-edits of 64 tokens a prompt; their SFT; 4 answers of 8 tokens each")
    questions, four = make_questions(model), lengths_of(4, model, args.documents)
    recipe = replace(RECIPE, slots=args.slots)
    for n in args.scaling:      # the same four self-edits, again and again
        jobs = make_jobs(model, [four[i % 4] for i in range(n)], recipe)
        seconds, peak = timed(model.device, lambda: one_round(model, jobs, questions))
        print(f"  {n:4} self-edits {seconds:8.2f} s, {seconds / n * 1000:7.1f} ms each, "
              f"{peak / 2 ** 30:6.2f} GiB", flush=True)


def bench(args, model):
    floor = Floor.of(model)
    device = f"CPU, {torch.get_num_threads()} threads"
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    print(f"{args.shape or model.folder}, {model.dtype}, {device}, torch {torch.__version__}\n"
          f"N {floor.weights / 1e6:.2f} M weights in products, P {floor.parameters / 1e6:.2f} M an "
          f"adapter: 4 N + 6 P = {floor.flops / 1e6:.1f} MFLOP a token; a product runs at "
          f"{floor.rate / 1e9:.0f} GFLOP/s: floor {floor.tokens_per_second:.0f} tokens/s")
    try:
        peer = Peer(model, pretrained=not args.shape)
    except ImportError as e:
        peer = None
        print(f"no peers: {e} (requirements-dev.txt)")
    parts = [bench_training, bench_answering]
    for part in parts if args.suite else [*parts, bench_rounds]:
        try:
            part(args, model, peer, floor)
        except Exception as e:      # in a suite the next part may run, whatever it is
            if not args.suite:
                raise
            print(f"{part.__name__} failed: {type(e).__name__}: {' '.join(str(e).split())[:300]}")
        give_back_memory()


def main():
    ap = Parser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", help="folder or hub id (default: the embedded checkpoint)")
    ap.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda")
    ap.add_argument("--jobs", type=positive, help="adapters to train (default: 24; cuda: 256)")
    ap.add_argument("--peer-jobs", type=positive, default=24, help="of the slow arms (default: 24)")
    ap.add_argument("--documents", type=positive, help="at most so many of a self-edit's")
    ap.add_argument("--epochs", type=positive, default=1, help="passes (the paper: 10)")
    ap.add_argument("--slots", type=at_least(0), default=0, help="side by side; 0: automatic")
    ap.add_argument("--repeats", type=positive, default=5)
    ap.add_argument("--n-new", type=positive, default=32, help="tokens of an answer (default: 32)")
    ap.add_argument("--scaling", type=positive, nargs="*", default=[4, 16, 64, 256],
                    help="self-edits of a growing round (default: 4 16 64 256)")
    ap.add_argument("--suite", action="store_true", help="for a GPU: training and decoding")
    args = ap.parse_args()
    if args.model and args.shape:
        raise UserError("--model or --shape, not both")
    device = torch.device(args.device)
    args.jobs = args.jobs or (256 if device.type == "cuda" else 24)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if args.model or not (args.shape or args.suite):
        return bench(args, load_pretrained(args.model or EMBEDDED, device, dtype))
    for args.shape in [args.shape] if args.shape else SUITE:
        with tempfile.TemporaryDirectory() as folder:
            bench(args, shaped(args.shape, folder, device, dtype))


if __name__ == "__main__":
    cli(main)
