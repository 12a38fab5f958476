"""How fast the engine is, beside what one would use instead, in one run.

    python bench.py                                     # the embedded checkpoint, minutes on a CPU
    python bench.py --model DIR_OR_HUB_ID --dtype bfloat16
    python bench.py --shape qwen2.5-7b --jobs 256       # random weights of a known shape

Training is of the paper's inner loops: the documents' lengths are those of the 250 self-edits that
the authors released for their first round (data/lengths.json, in Qwen2.5 tokens, EOS included; each
is trained three times in the paper, which makes its 65,490 steps), the tokens are random, LoRA is
r 32 on q and v. Answering is 32 rows under 8 adapters. Every arm does the same work in turn, A B C
A B C; medians are shown. An arm whose library is missing is named and left out.
"""
import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import sft as engine
from checkpoint import UserError, cli
from generate import generate
from lora import Adapters
from model import ModelConfig, Transformer, load_pretrained
from sft import Job, Recipe, auto_slots, sft, step_memory

HERE = Path(__file__).resolve().parent
LENGTHS = json.loads((HERE / "data" / "lengths.json").read_text())
RECIPE = Recipe(rank=32, alpha=64, targets=["q_proj", "v_proj"], lr=1e-3, epochs=10, batch=1)

# from the models' config.json: layers, dim, heads, kv heads, head_dim, hidden_dim, vocabulary, tied
SHAPES = {"smollm2-135m": ("Llama", 30, 576, 9, 3, 64, 1536, 49152, True),
          "qwen2.5-0.5b": ("Qwen2", 24, 896, 14, 2, 64, 4864, 151936, True),
          "llama-3.2-1b": ("Llama", 16, 2048, 32, 8, 64, 8192, 128256, True),
          "qwen2.5-1.5b": ("Qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True),
          "qwen2.5-7b": ("Qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False)}


def shaped(name, folder, device, dtype):
    """A model of a known shape with random weights (zeros would be faster than the truth)."""
    kind, layers, dim, heads, kv_heads, head_dim, hidden, vocabulary, tied = SHAPES[name]
    (Path(folder) / "config.json").write_text(json.dumps({
        "architectures": [kind + "ForCausalLM"], "model_type": kind.lower(), "hidden_size": dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "intermediate_size": hidden, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": 4096, "rope_theta": 1e6}))
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_folder(folder), folder).to(dtype)
    model.to_empty(device=device).tie()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.02)
    return model.requires_grad_(False)


def make_jobs(model, lengths, epochs):
    """Inner loops over random tokens, in documents of the given lengths."""
    rng = random.Random(0)
    text = lambda n: [rng.randrange(10, model.config.vocab_size) for _ in range(n)]
    return [Job([(text(n), [True] * n) for n in documents], seed, RECIPE.lr, epochs, RECIPE.batch)
            for seed, documents in enumerate(lengths)]


# ------------------------------------------------------------------------------- our arms

def ours(model, jobs, slots):
    for _ in sft(model, jobs, replace(RECIPE, slots=slots)):
        pass


def lockstep(model, jobs, slots):
    """Many adapters at once the plain way: every micro-batch is padded to the longest beside it,
    and new jobs begin when all have ended."""
    pack = engine.pack

    def padded(running, device):
        batches = [next(run.batches) if run else [] for run in running]
        longest = max(len(run.examples[e].ids) for run, at in zip(running, batches) for e in at)
        fill = lambda x: replace(x, ids=torch.nn.functional.pad(x.ids, (0, longest - len(x.ids))))
        return pack([run and replace(run, batches=iter([range(len(at))]),
                                     examples=[fill(run.examples[e]) for e in at])
                     for run, at in zip(running, batches)], device)
    engine.pack = padded
    try:
        for i in range(0, len(jobs), slots):
            ours(model, jobs[i:i + slots], slots)
    finally:
        engine.pack = pack


def answer(model, adapters, prompts, n_new):
    per = len(prompts) // adapters.n
    generate(model, prompts, n_new, stop=(), adapters=adapters,
             slots=[j // per for j in range(len(prompts))])


# ------------------------------------------------------------------------------- peers

class Peer:
    """transformers + PEFT, on the same weights or the same shape."""

    def __init__(self, model, pretrained):
        import peft
        import transformers
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        auto, kind = transformers.AutoModelForCausalLM, {"dtype": model.dtype}
        base = auto.from_pretrained(model.folder, **kind) if pretrained else auto.from_config(
            transformers.AutoConfig.from_pretrained(model.folder), **kind)
        self.lora = peft.LoraConfig(r=RECIPE.rank, lora_alpha=RECIPE.alpha, lora_dropout=0,
                                    target_modules=RECIPE.targets, task_type="CAUSAL_LM")
        self.device = model.device
        self.model = peft.get_peft_model(base.to(model.device), self.lora)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        for p in self.weights:
            p.data = p.data.float()

    def bare_loop(self, jobs):
        """One adapter after the other, one document after the other, nothing padded."""
        for job in jobs:
            torch.manual_seed(job.seed)
            for i, p in enumerate(self.weights):  # a fresh adapter: A, B, A, B, ...
                torch.nn.init.zeros_(p) if i % 2 else torch.nn.init.kaiming_uniform_(p, a=5 ** .5)
            opt = torch.optim.AdamW(self.weights, lr=job.lr, weight_decay=0,
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
        texts = [(ids + [0] * pad_to)[:pad_to] for job in jobs for ids, _ in job.examples][:steps]
        rows = [{"input_ids": ids, "labels": ids} for ids in texts]
        with tempfile.TemporaryDirectory() as out:
            trainer = transformers.Trainer(self.model, transformers.TrainingArguments(
                out, per_device_train_batch_size=1, max_steps=steps, learning_rate=RECIPE.lr,
                report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
                use_cpu=self.device.type == "cpu", dataloader_pin_memory=False,
                bf16=self.model.dtype == torch.bfloat16), train_dataset=rows)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train()

    def answer(self, n, prompts, n_new):
        """Adapter after adapter, the questions of each in one left-padded batch."""
        for name in range(n - len(self.model.peft_config) + 1):
            self.model.add_adapter(f"extra{name}", self.lora)
        per, longest = len(prompts) // n, max(map(len, prompts))
        self.model.eval()
        for i, name in zip(range(n), self.model.peft_config):
            self.model.set_adapter(name)
            rows = prompts[i * per:(i + 1) * per]
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
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    begin = time.perf_counter()
    f()
    wait()
    seconds = time.perf_counter() - begin
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return seconds, 1024 * int(status.split("VmHWM:")[1].split()[0])


def compare(title, device, arms, repeats, show):
    """Run all arms in turn, `repeats` times after a warm-up, and print their medians."""
    first = {name: timed(device, f)[0] for name, f in arms.items()}
    runs = {name: [] for name in arms}
    for _ in range(repeats):
        for name, f in arms.items():
            runs[name].append(timed(device, f))
    print(f"\n{title}; median of {repeats}")
    for name, taken in runs.items():
        seconds, peak = (statistics.median(x) for x in zip(*taken))
        low, high = min(taken)[0], max(taken)[0]
        print(f"  {name:<44} {seconds:8.2f} s [{low:.2f}, {high:.2f}]  {show(name, seconds)}  "
              f"{peak / 2 ** 30:6.2f} GiB  (first {first[name]:.1f} s)", flush=True)
    return {name: statistics.median(s for s, _ in taken) for name, taken in runs.items()}


def matmul_rate(device, dtype):
    """FLOP/s of a large square matrix product: what the floor is reckoned with."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n ** 3 / min(timed(device, lambda: a @ b.T)[0] for _ in range(8))


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--model", help="folder or hub id (default: the embedded checkpoint)")
    ap.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--dtype", choices=("float32", "bfloat16"),
                    help="of the weights (default: bfloat16 on cuda, else float32)")
    ap.add_argument("--jobs", type=int, default=24, help="adapters to train (default: 24)")
    ap.add_argument("--documents", type=int, help="at most so many of a self-edit's")
    ap.add_argument("--epochs", type=int, default=1, help="passes; the paper's are 10 (default: 1)")
    ap.add_argument("--slots", type=int, default=0, help="side by side; 0: automatic")
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--n-new", type=int, default=32, help="tokens of an answer (default: 32)")
    ap.add_argument("--scaling", type=int, nargs="*", default=[4, 16, 64, 256],
                    help="numbers of self-edits of a growing round (default: 4 16 64 256)")
    args = ap.parse_args()
    if args.model and args.shape:
        raise UserError("--model or --shape, not both")
    device = torch.device(args.device)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    with tempfile.TemporaryDirectory() as folder:
        model = (shaped(args.shape, folder, device, dtype) if args.shape else
                 load_pretrained(args.model or HERE / "data" / "tiny", device, dtype))
        bench(args, model, device)


def bench(args, model, device):
    window = model.config.max_len
    rng = random.Random(1)
    lengths = [rng.sample(x, len(x))[:args.documents] for x in rng.sample(LENGTHS, len(LENGTHS))]
    pick = lambda n: [[min(x, window) for x in lengths[i % len(lengths)]] for i in range(n)]
    jobs = make_jobs(model, pick(args.jobs), args.epochs)
    tokens = sum(len(ids) for job in jobs for ids, _ in job.examples) * args.epochs
    steps, slots = sum(job.steps for job in jobs), args.slots or auto_slots(model, jobs, RECIPE)
    parameters = Adapters(model, 0, RECIPE.rank, RECIPE.alpha, RECIPE.targets).flat.shape[1]
    body = sum(p.numel() for p in model.model.layers.parameters()) + model.lm_head.weight.numel()
    flops, rate = 4 * body + 6 * parameters, matmul_rate(device, model.dtype)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else \
        f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.shape or model.folder}, {model.dtype}, {what}, torch {torch.__version__}\n"
          f"N {body / 1e6:.2f} M weights in matmuls, P {parameters / 1e6:.2f} M per adapter: "
          f"4 N + 6 P = {flops / 1e6:.1f} MFLOP a token; a matmul runs at {rate / 1e9:.0f} "
          f"GFLOP/s: floor {rate / flops:.0f} tokens/s\n"
          f"formula: a step of {slots} slots needs "
          f"{step_memory(model, RECIPE, slots, slots * tokens / steps) / 2 ** 30:.2f} GiB "
          "beside the weights")

    arms = {f"ours, packed, {slots} slots": lambda: ours(model, jobs, slots),
            "ours, one slot": lambda: ours(model, jobs, 1),
            f"lockstep, padded, {slots} slots": lambda: lockstep(model, jobs, slots)}
    fair, peer, few = "PEFT, bare loop, no padding (the fair peer)", None, 4
    try:
        peer = Peer(model, not args.shape)
        arms[fair] = lambda: peer.bare_loop(jobs)
    except ImportError as e:
        print(f"no peers: {e} (requirements-dev.txt)")

    def show(name, seconds):
        return (f"{tokens / seconds:9.0f} tokens/s {3600 * len(jobs) / seconds:9.0f} adapters/h "
                f"{tokens / seconds * flops / rate:6.1%} of the floor")
    median = compare(f"training {len(jobs)} adapters, {steps} steps, {tokens} tokens", device, arms,
                     args.repeats, show)
    packed = median[f"ours, packed, {slots} slots"]
    if peer:
        print(f"  ours over the fair peer: {median[fair] / packed:.2f} x")
        try:
            pad_to = min(2048, window)
            seconds, _ = timed(device, lambda: peer.trainer(jobs, pad_to, few))
            estimate = seconds / few * steps
            print(f"  Trainer + PEFT, rows padded to {pad_to}: {few} steps in {seconds:.1f} s; "
                  f"extrapolated to all: {estimate:.0f} s, {estimate / packed:.0f} x ours")
        except ImportError as e:
            print(f"  no Trainer: {e}")

    rng = random.Random(2)
    prompts = [[rng.randrange(10, model.config.vocab_size) for _ in range(rng.randint(20, 46))]
               for _ in range(32)]
    adapters = Adapters(model, 8, RECIPE.rank, RECIPE.alpha, RECIPE.targets)
    for slot in range(8):
        adapters.init(slot, slot)
    arms = {"ours, together": lambda: answer(model, adapters, prompts, args.n_new)}
    if peer:
        arms["transformers + PEFT, one by one"] = lambda: peer.answer(8, prompts, args.n_new)
    median = compare(f"answering 32 questions under 8 adapters, {args.n_new} tokens each", device,
                     arms, args.repeats, lambda name, s: f"{32 * args.n_new / s:9.0f} tokens/s")
    if peer:
        ratio = median["transformers + PEFT, one by one"] / median["ours, together"]
        print(f"  ours over the peer: {ratio:.2f} x")

    print("\na round: 8 self-edits of 64 tokens a prompt; their SFT; 4 answers of 8 tokens each")
    four = pick(4)
    for n in args.scaling:  # the same four self-edits, again and again
        again = make_jobs(model, [four[i % 4] for i in range(n)], 1)

        def one_round():
            contexts = [prompts[i % len(prompts)] for i in range(-(-n // 8))]
            generate(model, contexts, 64, (), 8, 1.0, 0.95, range(8 * len(contexts)))
            ready = []
            for i, (_, t) in enumerate(sft(model, again, replace(RECIPE, slots=args.slots)), 1):
                ready.append(t.weights)
                if len(ready) == 8 or i == n:
                    stack = Adapters(model, len(ready), RECIPE.rank, RECIPE.alpha, RECIPE.targets)
                    torch.stack(ready, out=stack.flat)
                    answer(model, stack, prompts[:4 * len(ready)], 8)
                    ready = []
        seconds, peak = timed(device, one_round)
        print(f"  {n:4} self-edits {seconds:8.2f} s, {seconds / n * 1000:7.1f} ms each, "
              f"{peak / 2 ** 30:6.2f} GiB", flush=True)


if __name__ == "__main__":
    cli(main)
