"""Will it fit, and how long does it take? Computed from a checkpoint's config.json; no weights.

    python outer_loop.py --preset knowledge --model Qwen/Qwen2.5-7B --card 24 --plan

Memory by the formulas with which a run chooses its slots and rows (engine/memory.py). Time from
FLOPs and bytes, at a stated share of what the card's maker promises. All of it is computed, not
measured.
"""
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.device import auto_answering, auto_rows, auto_slots, row_memory, step_memory
from inner_loop import inner_recipe
from lora import Job, Lora
from model import ModelConfig, Transformer
from outer_loop import outer_recipe
from support.checkpoint import EMBEDDED, fetch
from support.config import Config
from support.files import Parser, UserError, cli

GIB = 2 ** 30
LENGTHS = json.loads(EMBEDDED.with_name("lengths.json").read_text())    # documents' of 250 edits

# From the models' config.json: layers, dim, heads, kv heads, head_dim, hidden_dim, vocabulary, tied
SHAPES = {"smollm2-135m": ("Llama", 30, 576, 9, 3, 64, 1536, 49152, True),
          "qwen2.5-0.5b": ("Qwen2", 24, 896, 14, 2, 64, 4864, 151936, True),
          "llama-3.2-1b": ("Llama", 16, 2048, 32, 8, 64, 8192, 128256, True),
          "qwen2.5-1.5b": ("Qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True),
          "qwen2.5-7b": ("Qwen2", 28, 3584, 28, 4, 128, 18944, 152064, False),
          "small": ("Qwen2", 2, 64, 4, 2, 16, 128, 1000, True)}     # for tests


def write_shape(name, folder):
    """Write the config.json of a known shape."""
    kind, layers, dim, heads, kv_heads, head_dim, hidden, vocabulary, tied = SHAPES[name]
    (Path(folder) / "config.json").write_text(json.dumps({
        "architectures": [kind + "ForCausalLM"], "model_type": kind.lower(), "hidden_size": dim,
        "num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
        "num_key_value_heads": kv_heads, "intermediate_size": hidden, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "max_position_embeddings": 4096, "rope_theta": 1e6}))


def empty_model(name, dtype) -> Transformer:
    """A model without memory (meta device), from a known shape's name, a folder or a hub id."""
    with tempfile.TemporaryDirectory() as folder:
        shape = str(name).lower().split("/")[-1].removesuffix("-instruct")
        if shape in SHAPES:
            write_shape(shape, folder)
        else:
            folder = fetch(name, ["config.json"])
        with torch.device("meta"):
            return Transformer(ModelConfig.from_folder(folder)).to(dtype)


@dataclass
class Card:
    """What a maker promises: dense bfloat16 products summed in float32 (on a T4, which has none,
    float32 ones)."""
    name: str
    gib: float
    flops: float            # a second
    bandwidth: float        # bytes a second

    def least_ms(self, flops, nbytes):
        """The time of the FLOPs or that of the bytes, whichever is longer."""
        return 1000 * max(flops / self.flops, nbytes / self.bandwidth)


# NVIDIA's white papers and data sheets.
CARDS = {8: Card("RTX 3070", 8, 40.6e12, 448e9),
         16: Card("T4", 15, 8.1e12, 320e9),
         24: Card("RTX 4090", 24, 165e12, 1008e9),
         40: Card("A100", 40, 312e12, 1555e9),
         80: Card("H100", 80, 989e12, 3350e9),
         141: Card("H200", 141, 989e12, 4800e9)}
OF_FLOPS, OF_BANDWIDTH = 0.3, 0.4       # the shares that are reckoned with
CONTEXT = 1.5 * GIB                     # CUDA itself, and what the allocator can't use
# However little a step has to do, its kernels must be launched: seconds a layer. A decoding step is
# one graph.
LAUNCHES, GRAPH = 0.7e-3, 0.1e-3


@dataclass
class Texts:
    """How long the texts of a domain are, in tokens."""
    prompt: int             # what a self-edit is written after
    edit: int               # the mean self-edit
    documents: list         # of each of many self-edits: the lengths of its documents
    questions: float        # per task
    question: int
    answer: int


def texts_of(cfg: Config) -> Texts:
    """knowledge: SQuAD's passages and the 250 self-edits that the authors released for their first
    round. Others: measured on runs with the presets."""
    mean = round(sum(map(sum, LENGTHS)) / len(LENGTHS))
    if cfg.domain == "knowledge":
        return Texts(prompt=240, edit=min(mean, cfg.max_edit_tokens), documents=LENGTHS,
                     questions=4.9, question=45, answer=min(12, cfg.max_answer_tokens))
    if cfg.domain == "arc":
        return Texts(prompt=1500, edit=110, documents=[[600] * 200], questions=32, question=1500,
                     answer=120)
    if cfg.domain == "tinyarc":
        return Texts(prompt=200, edit=100, documents=[[50] * cfg.max_examples], questions=8,
                     question=60, answer=12)
    # tinyworld
    return Texts(prompt=80, edit=70, documents=[[11] * 6], questions=11, question=14, answer=6)


def passed_by(model):
    """How many weights a token passes through: the layers' and the output's."""
    layers = sum(p.numel() for p in model.model.layers.parameters())
    return layers + model.lm_head.weight.numel()


def token_flops(weights, parameters):
    """FLOPs of a token in training: 4 a weight of the frozen base (2 forward, 2 for the gradient
    that passes through), 6 a parameter of its adapter."""
    return 4 * weights + 6 * parameters


@dataclass
class Phase:
    name: str
    side_by_side: str       # how much of it at once
    memory: float           # bytes, beside the weights
    steps: int
    tokens: int
    flops: float
    seconds: float


class Planner:
    """What each phase of a run needs on a card."""

    def __init__(self, cfg: Config, model: Transformer, card: Card):
        self.cfg, self.model, self.card = cfg, model, card
        self.texts = texts_of(cfg)
        self.weights = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize
        self.free = card.gib * GIB - CONTEXT - self.weights
        self.passed = passed_by(model)

    def training(self, name, lora: Lora, jobs: list[Job]) -> Phase:
        """SFT of these jobs, as many side by side as a run would take."""
        model = self.model
        slots = jobs[0].recipe.slots or auto_slots(model, jobs, self.free) or 1
        steps, tokens = sum(job.steps for job in jobs), sum(job.tokens for job in jobs)
        per_step = slots * tokens / steps
        need = step_memory(model, lora, slots, per_step)
        what = f"{slots} adapters, {per_step:.0f} tokens a step"
        again = 1.0
        if need > self.free:
            model.recompute = True
            need, again = step_memory(model, lora, slots, per_step), 1.33
            model.recompute = False
            what += ", recomputed"
        flops = tokens * token_flops(self.passed, lora.parameters(model)) * again
        steps = -(-steps // slots)      # of the engine
        seconds = max(flops / (OF_FLOPS * self.card.flops),
                      steps * LAUNCHES * model.config.n_layer)
        return Phase(name, what, need, steps, tokens, flops, seconds)

    def writing(self, name, texts: int, prompt: int, tokens: int, longest: int, most_rows: int,
                adapters: float = 0.0) -> Phase:
        """Decoding so many texts. adapters: bytes of those that are read in each step."""
        rows = min(texts, most_rows)
        need = rows * row_memory(self.model, prompt + longest) + adapters
        # A full batch until the texts run out; at least as long as one of them takes.
        steps = max(-(-texts * tokens // rows), tokens)
        read = self.weights + rows * row_memory(self.model, prompt + tokens / 2) + adapters
        flops = 2 * self.passed * texts * (prompt + tokens)
        seconds = max(steps * read / (OF_BANDWIDTH * self.card.bandwidth),
                      flops / (OF_FLOPS * self.card.flops),
                      steps * GRAPH * self.model.config.n_layer)
        return Phase(name, f"{rows} texts", need, steps, texts * tokens, flops, seconds)

    def phases(self, n_tasks, n_edits, n_seeds) -> list[Phase]:
        """An E-step: sampling, inner loops, answers."""
        cfg, texts, model = self.cfg, self.texts, self.model
        recipe = inner_recipe(cfg)
        if cfg.domain in ("arc", "tinyarc"):    # there a self-edit chooses, and two is common
            recipe = replace(recipe, epochs=2)
        rows = cfg.rows or auto_rows(model, texts.prompt + cfg.max_edit_tokens, self.free)
        phases = [self.writing("self-edits", n_tasks * n_edits, texts.prompt, texts.edit,
                               cfg.max_edit_tokens, rows)]
        n = n_tasks * n_edits * n_seeds
        jobs = []
        for i in range(n):
            lengths = texts.documents[i % len(texts.documents)]
            examples = [([0] * length, []) for length in lengths]
            jobs.append(Job(examples, i, recipe))
        phases.append(self.training("inner loops", recipe.lora, jobs))

        at_once = min(n, auto_answering(model, recipe.lora, self.free))
        bytes_of_adapters = 2 * at_once * recipe.lora.parameters(model)
        rows = cfg.rows or auto_rows(model, texts.question + cfg.max_answer_tokens, self.free)
        phases.append(self.writing("answers", round(n * texts.questions), texts.question,
                                   texts.answer, cfg.max_answer_tokens,
                                   min(rows, round(at_once * texts.questions)),
                                   bytes_of_adapters))
        return phases

    def m_step(self) -> Phase:
        """The best self-edits of a round, each after its prompt."""
        cfg, texts = self.cfg, self.texts
        recipe = outer_recipe(cfg)
        at_most = cfg.keep if cfg.update in ("best", "random") else cfg.edits
        kept = cfg.tasks * at_most
        job = Job([([0] * (texts.prompt + texts.edit), [])] * kept, 0, recipe)
        return self.training("M-step", recipe.lora, [job])

    def run(self) -> tuple[list[Phase], list[Phase], float, float]:
        """A round's phases, an evaluation's, the seconds of the whole run, its peak in bytes."""
        cfg = self.cfg
        a_round = [*self.phases(cfg.tasks, cfg.edits, cfg.seeds), self.m_step()]
        held_out = self.phases(cfg.eval_tasks, cfg.eval_edits, 1)
        seconds = (cfg.iterations * sum(phase.seconds for phase in a_round)
                   + (cfg.iterations + 1) * sum(phase.seconds for phase in held_out))
        peak = self.weights + max(phase.memory for phase in a_round + held_out)
        return a_round, held_out, seconds, peak


def planner(cfg: Config, gib: int) -> Planner:
    """UserError if there is no such card."""
    if gib not in CARDS:
        raise UserError(f"--card {gib}: choose among {', '.join(map(str, CARDS))} (GiB)")
    card = CARDS[gib]
    dtype = cfg.dtype or ("float32" if card.name == "T4" else "bfloat16")
    return Planner(cfg, empty_model(cfg.model, getattr(torch, dtype)), card)


def plan(cfg: Config, gib: int) -> str:
    """The plan of a run on a card of so many GiB, as text."""
    p = planner(cfg, gib)
    billions = sum(x.numel() for x in p.model.parameters()) / 1e9
    lines = [
        f"computed, not measured: {cfg.model} ({billions:.2f} B parameters, "
        f"{str(p.model.dtype).removeprefix('torch.')}) on {p.card.gib:g} GiB ({p.card.name})",
        f"reckoned with: {OF_FLOPS:.0%} of {p.card.flops / 1e12:.0f} TFLOP/s, "
        f"{OF_BANDWIDTH:.0%} of {p.card.bandwidth / 1e12:.2f} TB/s; self-edits of {p.texts.edit} "
        "tokens",
        f"weights {p.weights / GIB:.1f} GiB, which leaves {max(0, p.free) / GIB:.1f}"]
    if p.free <= 0:
        return "\n".join([*lines, "the weights do not fit"])

    a_round, held_out, seconds, peak = p.run()
    lines.append(f"\n{f'a round of {cfg.tasks} tasks':<24}{'side by side':<44}"
                 f"{'GiB':>6}{'steps':>8}{'tokens':>11}{'PFLOP':>9}{'minutes':>9}")
    lines += [line_of(phase, p.free) for phase in a_round]
    lines.append(f"held-out, {cfg.eval_tasks} tasks")
    lines += [line_of(phase, p.free) for phase in held_out]
    lines.append(f"\nthe whole run, {cfg.iterations} rounds and {cfg.iterations + 1} evaluations: "
                 f"{seconds / 60:.1f} minutes; peak {peak / GIB:.1f} GiB")
    return "\n".join(lines)


def line_of(phase: Phase, free: float) -> str:
    fits = "" if phase.memory <= free else "  does not fit"
    return (f"  {phase.name:<22}{phase.side_by_side:<44}{phase.memory / GIB:6.1f}{phase.steps:8d}"
            f"{phase.tokens:11d}{phase.flops / 1e15:9.1f}{phase.seconds / 60:9.2f}{fits}")


def hardware_table() -> list[str]:
    """The README's rows: the preset knowledge on four cards."""
    lines = []
    for gib, model in ((8, "Qwen2.5-0.5B"), (16, "Qwen2.5-0.5B"), (24, "Qwen2.5-1.5B"),
                       (24, "Qwen2.5-7B"), (80, "Qwen2.5-7B")):
        p = planner(Config(model=model), gib)
        a_round, _, seconds, peak = p.run()
        adapters = a_round[1].side_by_side.split(",")[0]
        lines.append(f"| {gib} GB ({p.card.name}) | (2) with {model} | {adapters} side by side, "
                     f"{peak / GIB:.0f} GiB, {seconds / 60:.0f} minutes |")
    return lines


def main():
    """Print the rows of the README's table that are computed."""
    Parser(description=main.__doc__).parse_args()
    print("\n".join(hardware_table()))


if __name__ == "__main__":
    cli(main)
