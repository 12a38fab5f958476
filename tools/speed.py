"""What speed is measured with: the work, the peers, the clock. For bench.py and suite.py.

Training is of the paper's inner loops: the documents' lengths are those of the 250 self-edits that
the authors released for their first round (data/lengths.json, in Qwen2.5 tokens, EOS included; each
is trained three times in the paper, which makes its 65,490 steps), the tokens are random, LoRA is
r 32 on q and v. Answering is 32 rows under 8 adapters.
"""
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.decode import Sampling, generate
from engine.memory import peak_memory
from engine.train import sft
from inner_loop import batched
from lora import Adapters, Job, Lora, Recipe
from model import ModelConfig, Transformer
from support.checkpoint import EMBEDDED
from tools.plan import token_flops, write_shape

LENGTHS = json.loads(EMBEDDED.with_name("lengths.json").read_text())   # per self-edit
RECIPE = Recipe(Lora(rank=32, alpha=64, targets=["q_proj", "v_proj"]), lr=1e-3, epochs=1, batch=1)
N_ADAPTERS, N_QUESTIONS = 8, 32     # of the arms that answer


def shaped(name, folder, device, dtype):
    """A model of a known shape with random weights (zeros would be faster than the truth)."""
    write_shape(name, folder)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_folder(folder), folder).to(dtype)
    model.to_empty(device=device).tie()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.02)
    return model.requires_grad_(False)


# ------------------------------------------------------------------------------- the work

def make_jobs(model, lengths, recipe=RECIPE):
    """Inner loops over random tokens, in documents of the given lengths."""
    rng = random.Random(0)
    jobs = []
    for seed, documents in enumerate(lengths):
        examples = []
        for n in documents:
            ids = [rng.randrange(10, model.config.vocab_size) for _ in range(n)]
            examples.append((ids, [True] * n))
        jobs.append(Job(examples, seed, recipe))
    return jobs


def make_questions(model):
    rng = random.Random(2)
    return [[rng.randrange(10, model.config.vocab_size) for _ in range(rng.randint(20, 46))]
            for _ in range(N_QUESTIONS)]


def train(jobs, model, slots):
    """Our training: all jobs, `slots` of them side by side."""
    for _ in sft(model, [replace(job, recipe=replace(job.recipe, slots=slots)) for job in jobs]):
        pass


def answer(model, adapters, questions, n_new):
    """Our answering: as many questions under each adapter, all together."""
    per = len(questions) // adapters.n
    groups = [questions[i * per:(i + 1) * per] for i in range(adapters.n)]
    generate(model, groups, Sampling(n_new), adapters=adapters)


def one_round(model, jobs, questions):
    """8 self-edits of 64 tokens a prompt; the jobs' SFT; 4 answers of 8 tokens under each."""
    contexts = [questions[i % len(questions)] for i in range(-(-len(jobs) // 8))]
    writing = Sampling(64, n=8, temperature=1.0, top_p=0.95)
    generate(model, [contexts], writing, seeds=range(8 * len(contexts)))
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
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    begin = time.perf_counter()
    f()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    if on_gpu:
        return seconds, torch.cuda.max_memory_allocated()
    return seconds, peak_of_process()


def reset_peak():
    """Let the process's high-water mark begin anew, where the system can do that (Linux)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_of_process():
    if not Path("/proc/self/status").exists():
        return peak_memory()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


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
