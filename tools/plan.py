"""Will it fit, and how long does it take? Computed from a checkpoint's config.json; no weights.

    python outer_loop.py --preset knowledge --model Qwen/Qwen2.5-7B --card 24 --plan

Memory by the formulas with which a run chooses its slots and rows (engine/device.py). Time from
FLOPs, bytes and the number of steps. It is arithmetic: a trillion self-edits are planned at once.
"""
import json
import math
import tempfile
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from engine.device import auto_answering, auto_rows, auto_slots, row_memory, step_memory
from inner_loop import inner_recipe
from model import ModelConfig, Transformer
from outer_loop import outer_recipe
from support.checkpoint import EMBEDDED, fetch
from support.config import Config
from support.files import UserError

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
        return 1000 * max(flops / self.flops, nbytes / self.bandwidth)


# NVIDIA's white papers and data sheets.
CARDS = {8: Card("RTX 3070", 8, 40.6e12, 448e9),
         16: Card("T4", 15, 8.1e12, 320e9),
         24: Card("RTX 4090", 24, 165e12, 1008e9),
         40: Card("A100", 40, 312e12, 1555e9),
         80: Card("H100", 80, 989e12, 3350e9),
         141: Card("H200", 141, 989e12, 4800e9)}
CONTEXT = 1.5 * GIB                     # CUDA itself, and what the allocator can't use (estimate)
# Seconds a layer that a step takes however little it has to do. Measured on an H200 and its host,
# 2026-11-27, one epoch at a904d44: 101 to 107 ms a step of 24 layers that was no graph.
PLAIN = 4.2e-3
# Estimates, as are the shares of the FLOP/s, .15 at 0.5B and .45 at 7.6B. What was measured is
# mostly start-up: 8.7 ms a token in 24 layers, and shares of .10 and .23 in one epoch.
RECORDED, DECODED, OF_BANDWIDTH = 0.5e-3, 0.2e-3, 0.4


# In tokens: a self-edit's prompt, the mean self-edit, a question, an answer. questions: per task.
# documents: of each of many self-edits (how many, tokens of all).
Texts = namedtuple("Texts", "prompt edit documents questions question answer")


def texts_of(cfg: Config) -> Texts:
    """knowledge: SQuAD's passages and the 250 self-edits that the authors released for their first
    round. Others: measured on runs with the presets."""
    if cfg.domain == "knowledge":
        mean = round(sum(map(sum, LENGTHS)) / len(LENGTHS))
        documents = [(len(edit), sum(edit)) for edit in LENGTHS]
        return Texts(240, min(mean, cfg.max_edit_tokens), documents, 4.9, 45,
                     min(12, cfg.max_answer_tokens))
    if cfg.domain == "arc":
        return Texts(1500, 110, [(200, 120000)], 32, 1500, 120)
    if cfg.domain == "tinyarc":
        return Texts(200, 100, [(cfg.max_examples, 50 * cfg.max_examples)], 8, 60, 12)
    return Texts(80, 70, [(6, 66)], 11, 14, 6)      # tinyworld


def passed_by(model):
    """How many weights a token passes through: the layers' and the output's."""
    layers = sum(p.numel() for p in model.model.layers.parameters())
    return layers + model.lm_head.weight.numel()


def token_flops(weights, parameters):
    """FLOPs of a token in training: 4 a weight of the frozen base (2 forward, 2 for the gradient
    that passes through), 6 a parameter of its adapter."""
    return 4 * weights + 6 * parameters


# side_by_side: how much of it at once, in words. memory: bytes, beside the weights.
Phase = namedtuple("Phase", "name side_by_side memory steps tokens flops seconds")


class Planner:
    """What each phase of a run needs on a card."""

    def __init__(self, cfg: Config, model: Transformer, card: Card):
        self.cfg, self.model, self.card, self.texts = cfg, model, card, texts_of(cfg)
        self.weights = sum(p.numel() for p in model.parameters()) * model.dtype.itemsize
        self.free = card.gib * GIB - CONTEXT - self.weights
        self.passed = passed_by(model)
        place = math.log(self.passed / 0.5e9) / math.log(7.6e9 / 0.5e9)
        self.flops = card.flops * (0.15 + 0.3 * min(1, max(0, place)))      # a second

    def training(self, name, recipe, slots, steps, tokens, per_step, launches=PLAIN) -> Phase:
        """SFT in so many steps, `tokens` in all. launches: seconds a layer and step."""
        model, lora, again = self.model, recipe.lora, 1
        what = f"{slots} adapters, {per_step:.0f} tokens a step"
        need = step_memory(model, lora, slots, per_step)
        if need > self.free:
            model.recompute = True
            need, again = step_memory(model, lora, slots, per_step), 1.33
            model.recompute = False
            what += ", recomputed"
        flops = tokens * token_flops(self.passed, lora.parameters(model)) * again
        seconds = max(flops / self.flops, steps * launches * model.config.n_layer)
        return Phase(name, what, need, steps, tokens, flops, seconds)

    def inner_loops(self, recipe, n) -> Phase:
        """Those of n self-edits, as many side by side as a run would take."""
        model, kinds = self.model, []
        for documents, tokens in self.texts.documents:
            steps = recipe.epochs * -(-documents // recipe.batch)
            kinds.append(SimpleNamespace(recipe=recipe, steps=steps, tokens=recipe.epochs * tokens))
        # All kinds in turn. What is more than some thousands is in proportion.
        jobs = (kinds * -(-4000 // len(kinds)))[:n]
        steps = sum(job.steps for job in jobs) * n // len(jobs)
        tokens = sum(job.tokens for job in jobs) * n // len(jobs)
        slots = recipe.slots or auto_slots(model, jobs, self.free) or 1
        per_step = slots * tokens / steps
        # On these cards a step is a CUDA graph, if it is small (engine/train.py).
        small = per_step * sum(p.numel() for p in model.parameters()) < 4e12
        graphs = small and self.card.name in ("H100", "H200") and model.dtype == torch.bfloat16
        # The longest job's steps come one after the other.
        steps = max(-(-steps // slots), max(job.steps for job in jobs))
        return self.training("inner loops", recipe, slots, steps, tokens, per_step,
                             RECORDED if graphs else PLAIN)

    def writing(self, name, texts, prompt, tokens, longest, rows, adapters=0, calls=1) -> Phase:
        """Decoding so many texts. adapters: bytes of those that are read in each step."""
        rows = min(texts, rows)
        need = rows * row_memory(self.model, prompt + longest) + adapters
        # A full batch until a call's texts run out; at least as long as the longest of them.
        steps = calls * max(-(-texts * tokens // (rows * calls)), longest)
        read = steps * (self.weights + adapters)
        read += texts * tokens * row_memory(self.model, prompt + tokens / 2)
        flops = 2 * self.passed * texts * (prompt + tokens)
        seconds = max(read / (OF_BANDWIDTH * self.card.bandwidth), flops / self.flops,
                      steps * DECODED * self.model.config.n_layer)
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
        phases.append(self.inner_loops(recipe, n))
        at_once = min(n, auto_answering(model, recipe.lora, self.free))
        rows = cfg.rows or auto_rows(model, texts.question + cfg.max_answer_tokens, self.free)
        phases.append(self.writing(
            "answers", round(n * texts.questions), texts.question, texts.answer,
            cfg.max_answer_tokens, min(rows, round(at_once * texts.questions)),
            2 * at_once * recipe.lora.parameters(model), calls=-(-n // at_once)))
        return phases

    def m_step(self) -> Phase:
        """The best self-edits of a round, each after its prompt, one text at a time."""
        cfg, recipe = self.cfg, outer_recipe(self.cfg)
        kept = cfg.tasks * (cfg.keep if cfg.update in ("best", "random") else cfg.edits)
        texts, tokens = recipe.epochs * kept, self.texts.prompt + self.texts.edit
        return self.training("M-step", recipe, 1, texts, texts * tokens, tokens)

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
        f"estimates: {p.flops / p.card.flops:.0%} of {p.card.flops / 1e12:.0f} TFLOP/s, "
        f"{OF_BANDWIDTH:.0%} of {p.card.bandwidth / 1e12:.2f} TB/s; of a layer {1e3 * RECORDED:g} "
        f"ms in a recorded step, {1e3 * DECODED:g} in decoding; measured (H200, 2026-11-27): "
        f"{1e3 * PLAIN:g} in a plain step; self-edits of {p.texts.edit} tokens",
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
