"""Will it fit, and how long does it take? Computed from a checkpoint's config.json; no weights.

    python outer_loop.py --preset knowledge --model Qwen/Qwen2.5-7B --card 24 --plan

Memory by the formulas with which a run chooses its slots and rows (engine/device.py). Time from
FLOPs, bytes and the number of steps. It is arithmetic: a trillion self-edits are planned at once.
"""
import json
import math
import tempfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from engine.device import auto_answering, auto_rows, auto_slots, row_memory, step_memory
from inner_loop import inner_recipe
from model import ModelConfig, Transformer
from outer_loop import outer_recipe
from support.checkpoint import EMBEDDED, fetch, read_config
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
            return Transformer(ModelConfig(**read_config(folder))).to(dtype)


# FLOP/s and bytes/s by NVIDIA's white papers and data sheets, for dense bfloat16 products that are
# summed in float32 (of a T4, which has none, float32 ones).
Card = namedtuple("Card", "name gib flops bandwidth")
CARDS = {8: Card("RTX 3070", 8, 40.6e12, 448e9),
         16: Card("T4", 15, 8.1e12, 320e9),
         24: Card("RTX 4090", 24, 165e12, 1008e9),
         40: Card("A100", 40, 312e12, 1555e9),
         80: Card("H100", 80, 989e12, 3350e9),
         141: Card("H200", 141, 989e12, 4800e9)}
CONTEXT = 1.5 * GIB                     # CUDA itself, and what the allocator can't use (estimate)
# Milliseconds a layer that a step takes however little it has to do. Measured on an H200 and its
# host, 2026-11-27, one epoch at a904d44: 101 to 107 ms a step of 24 layers that was no graph.
PLAIN = 4.2
# Estimates, as are the shares of the FLOP/s, .15 at 0.5B and .45 at 7.6B. What was measured is
# mostly start-up: 8.7 ms a token in 24 layers, and shares of .10 and .23 in one epoch.
RECORDED, DECODED, OF_BANDWIDTH = 0.5, 0.2, 0.4

# In tokens: a self-edit's prompt, a self-edit, a question, an answer. questions: per task.
# documents: (how many, tokens of all) of each of many self-edits.
Texts = namedtuple("Texts", "prompt edit documents questions question answer")
# knowledge: SQuAD's passages and the 250 self-edits that the authors released for their first
# round. The others were measured on runs with the presets.
TEXTS = {"knowledge": Texts(240, 433, [(len(edit), sum(edit)) for edit in LENGTHS], 4.9, 45, 12),
         "arc": Texts(1500, 110, [(200, 120000)], 32, 1500, 120),
         "tinyarc": Texts(200, 100, [(12, 600)], 8, 60, 12),
         "tinyworld": Texts(80, 70, [(6, 66)], 11, 14, 6)}


def passed_by(model):
    """How many weights a token passes through: the layers' and the output's."""
    layers = sum(p.numel() for p in model.model.layers.parameters())
    return layers + model.lm_head.weight.numel()


# side_by_side: how much of it at once, in words. memory: bytes, beside the weights.
Phase = namedtuple("Phase", "name side_by_side memory steps tokens seconds")


class Planner:
    """What each phase of a run needs on a card of so many GiB. UserError if there is none."""

    def __init__(self, cfg: Config, gib: int):
        if gib not in CARDS:
            raise UserError(f"--card {gib}: choose among {', '.join(map(str, CARDS))} (GiB)")
        self.cfg, self.card, self.texts = cfg, CARDS[gib], TEXTS[cfg.domain]
        dtype = "float32" if self.card.name == "T4" else "bfloat16"
        self.model = empty_model(cfg.model, getattr(torch, cfg.dtype or dtype))
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.weights = self.parameters * self.model.dtype.itemsize      # bytes
        self.free = self.card.gib * GIB - CONTEXT - self.weights
        self.passed = passed_by(self.model)
        share = 0.15 + 0.11 * math.log(self.passed / 0.5e9)
        self.flops = self.card.flops * min(0.45, max(0.15, share))      # a second

    def training(self, name, recipe, documents, n, engine=True) -> Phase:
        """n jobs of SFT. documents: (how many, tokens of all) of a job, of several kinds in turn.
        engine: whether the engine trains them, or the textbook's loop."""
        model, kinds = self.model, []
        for count, tokens in documents:
            steps = recipe.epochs * -(-count // recipe.batch)
            kinds.append(SimpleNamespace(recipe=recipe, steps=steps, tokens=recipe.epochs * tokens))
        # What is more than some thousands is in proportion.
        jobs = (kinds * -(-4000 // len(kinds)))[:n]
        steps = sum(job.steps for job in jobs) * n // len(jobs)
        tokens = sum(job.tokens for job in jobs) * n // len(jobs)
        # As many adapters side by side as a run would take.
        slots = recipe.slots or auto_slots(model, jobs, self.free) or 1
        per_step = slots * tokens / steps
        # Of the frozen base 2 a weight forward, and 2 for the gradient that passes through.
        flops = tokens * (4 * self.passed + 6 * recipe.lora.parameters(model))
        what = f"{slots} adapters, {per_step:.0f} tokens a step"
        need = step_memory(model, recipe.lora, slots, per_step)
        if need > self.free:
            model.recompute = True
            need = step_memory(model, recipe.lora, slots, per_step)
            model.recompute = False
            flops *= 1.5        # the forward pass again
            what += ", recomputed"
        # On these cards the engine's small steps are CUDA graphs (engine/train.py).
        small = per_step * self.parameters < 4e12
        fast = self.card.name in ("H100", "H200") and model.dtype == torch.bfloat16
        launches = RECORDED if engine and small and fast else PLAIN
        # The longest job's steps come one after the other.
        steps = max(-(-steps // slots), max(job.steps for job in jobs))
        seconds = max(flops / self.flops, steps * launches / 1000 * model.config.n_layer)
        return Phase(name, what, need, steps, tokens, seconds)

    def writing(self, name, texts, at_once, prompt, tokens, longest, adapters=0) -> Phase:
        """Decoding so many texts, at_once in a call. adapters: bytes of those read in each step."""
        model, tokens = self.model, min(tokens, longest)
        rows = min(at_once, self.cfg.rows or auto_rows(model, prompt + longest, self.free))
        need = rows * row_memory(model, prompt + longest) + adapters
        # All rows are busy until a call's texts run out; it is as long as the longest at least.
        steps = max(-(-texts * tokens // rows), longest * -(-texts // at_once))
        read = steps * (self.weights + adapters)
        read += texts * tokens * row_memory(model, prompt + tokens / 2)
        flops = 2 * self.passed * texts * (prompt + tokens)
        seconds = max(read / (OF_BANDWIDTH * self.card.bandwidth), flops / self.flops,
                      steps * DECODED / 1000 * model.config.n_layer)
        return Phase(name, f"{rows} texts", need, steps, texts * tokens, seconds)

    def phases(self, n_tasks, n_edits, n_seeds) -> list[Phase]:
        """An E-step: sampling, inner loops, answers."""
        cfg, texts, recipe = self.cfg, self.texts, inner_recipe(self.cfg)
        if cfg.domain in ("arc", "tinyarc"):    # there a self-edit chooses, and two is common
            recipe = replace(recipe, epochs=2)
        n = n_tasks * n_edits
        sampling = self.writing("self-edits", n, n, texts.prompt, texts.edit, cfg.max_edit_tokens)
        n *= n_seeds
        inner = self.training("inner loops", recipe, texts.documents, n)
        adapters = min(n, auto_answering(self.model, recipe.lora, self.free))
        answers = self.writing(
            "answers", round(n * texts.questions), round(adapters * texts.questions),
            texts.question, texts.answer, cfg.max_answer_tokens,
            2 * adapters * recipe.lora.parameters(self.model))
        return [sampling, inner, answers]

    def run(self) -> tuple[list[Phase], list[Phase], float, float]:
        """A round's phases, an evaluation's, the seconds of the whole run, its peak in bytes."""
        cfg, texts = self.cfg, self.texts
        a_round = self.phases(cfg.tasks, cfg.edits, cfg.seeds)
        # The M-step: the best self-edits of a round, each after its prompt, one text at a time.
        kept = cfg.tasks * (cfg.keep if cfg.update in ("best", "random") else cfg.edits)
        tokens = kept * (texts.prompt + min(texts.edit, cfg.max_edit_tokens))
        recipe = replace(outer_recipe(cfg), batch=1)
        a_round.append(self.training("M-step", recipe, [(kept, tokens)], 1, engine=False))
        held_out = self.phases(cfg.eval_tasks, cfg.eval_edits, 1)
        seconds = (cfg.iterations * sum(phase.seconds for phase in a_round)
                   + (cfg.iterations + 1) * sum(phase.seconds for phase in held_out))
        peak = self.weights + max(phase.memory for phase in a_round + held_out)
        return a_round, held_out, seconds, peak


def plan(cfg: Config, gib: int) -> str:
    """The plan of a run on a card of so many GiB, as text."""
    p = Planner(cfg, gib)
    lines = [
        f"computed, not measured: {cfg.model} ({p.parameters / 1e9:.2f} B parameters, "
        f"{str(p.model.dtype).removeprefix('torch.')}) on {p.card.gib:g} GiB ({p.card.name})",
        f"estimates: {p.flops / p.card.flops:.0%} of {p.card.flops / 1e12:.0f} TFLOP/s, "
        f"{OF_BANDWIDTH:.0%} of the bandwidth; of a layer {RECORDED} ms in a recorded step, "
        f"{DECODED} in decoding; measured (H200, 2026-11-27): {PLAIN} in a plain step",
        f"weights {p.weights / GIB:.1f} GiB, which leaves {max(0, p.free) / GIB:.1f}"]
    if p.free <= 0:
        return "\n".join([*lines, "the weights do not fit"])
    a_round, held_out, seconds, peak = p.run()
    lines.append(f"\n{'':<24}{'side by side':<44}   GiB   steps     tokens  minutes")
    for when, phases in (("", a_round), ("held-out ", held_out)):
        for name, what, memory, n_steps, tokens, took in phases:
            fits = "" if memory <= p.free else "  does not fit"
            lines.append(f"  {when + name:<22}{what:<44}{memory / GIB:6.1f}{n_steps:8d}"
                         f"{tokens:11d}{took / 60:9.2f}{fits}")
    lines.append(f"\nthe whole run, {cfg.iterations} rounds of {cfg.tasks} tasks and "
                 f"{cfg.iterations + 1} evaluations of {cfg.eval_tasks}: "
                 f"{seconds / 60:.1f} minutes; peak {peak / GIB:.1f} GiB")
    return "\n".join(lines)
