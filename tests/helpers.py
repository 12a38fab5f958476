"""What several test files share: random peers, jobs that differ in everything, programs, runs."""
import argparse
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from data import judges
from data.arc import read_grid
from data.judges import each
from data.tasks import load_data
from engine import decode
from engine.decode import Sampling
from lora import Adapters, Job, Lora, Recipe
from model import load_pretrained
from outer_loop import rest_em
from support.config import add_flags, read_flags
from support.run import Run

ROOT = Path(__file__).resolve().parent.parent

COMMON = dict(vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=3,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
              initializer_range=0.15)
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def model_of(kind, **settings):
    """A random model of transformers, of the family that a config.json calls so."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON | settings))


# Of every kind that model.py implements.
CASES = {
    "llama3": partial(model_of, "llama", rope_parameters=LLAMA3_ROPE),
    "llama-tied": partial(model_of, "llama", tie_word_embeddings=True),
    "llama-mha": partial(model_of, "llama", num_key_value_heads=4),
    "qwen2": partial(model_of, "qwen2",
                     rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2-tied": partial(model_of, "qwen2", tie_word_embeddings=True),
    "qwen3": partial(model_of, "qwen3", head_dim=32)}

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A rank that is a multiple of 8: float32 takes the grouped product, float64 the padded one.
RECIPE = Recipe(Lora(rank=8, alpha=16, targets=ALL), lr=1e-2, epochs=3, batch=2)


def mixed_jobs(seed=0, n=7, shortest=3, recipe=RECIPE):
    """Jobs that differ in everything: documents, lengths, masks, learning rate and its schedule,
    epochs, batch size."""
    g = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return torch.randint(low, high, (1,), generator=g).item()

    jobs = []
    for i in range(n):
        examples = []
        for _ in range(pick(1, 6)):
            # Not two tokens: then q's gradient is but rounding noise, which AdamW blows up.
            length = pick(shortest, 40)
            start = pick(1, length - 1)     # as in the M-step: loss on a completion only
            ids = torch.randint(0, 256, (length,), generator=g).tolist()
            examples.append((ids, [j >= start for j in range(length)]))
        lr = [3e-4, 1e-3, 3e-3][pick(0, 3)]
        own = replace(recipe, lr=lr, epochs=pick(1, 4), batch=pick(1, 4),
                      schedule=["linear", "cosine"][i % 2], warmup=2 * (i % 3 == 2))
        jobs.append(Job(examples, seed=i, recipe=own))
    return jobs


def random_adapters(model, n, lora=Lora(rank=8, alpha=16, targets=["q_proj", "up_proj"]), std=0.1):
    adapters = Adapters(model, lora, n)
    generator = torch.Generator(model.device).manual_seed(0)
    adapters.flat.normal_(std=std, generator=generator)
    return adapters


def in_groups(written, groups):
    """All that `write` or `generate` yields: for each group a list, n texts for each prompt."""
    found = dict(written)
    numbers = iter(range(len(found)))
    return [[text for _ in group for text in found[next(numbers)]] for group in groups]


def generate(model, groups, *args, **settings):
    """All that decode.generate yields, in groups."""
    return in_groups(decode.generate(model, groups, *args, **settings), groups)


STOP = frozenset(range(0, 264, 12))     # one id in twelve: rows end at different times


def work(model, case):
    """Arguments for `generate`: groups, sampling, seeds, adapters."""
    prompts = [[i, i + 1] for i in range(9)]
    prompts.append([7] * 250)   # the cache has 256 tokens at first
    if case == "sampled":
        sampling = Sampling(50, n=2, temperature=1.0, top_p=0.9, max_rows=8, stop=STOP)
        return [prompts], sampling, range(20), None
    sampling = Sampling(50, max_rows=6, stop=STOP)
    return [prompts[:5], prompts[5:]], sampling, None, random_adapters(model, 2)


def call(program, *words):
    """What one of our programs prints, given these words."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr("sys.argv", [program.__name__, *map(str, words)])
        program.main()
    return out.getvalue()


def python(*words, status=0, **options):
    """Python with these words in a process of its own, with one thread: what it said."""
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
                          "CUDA_VISIBLE_DEVICES": ""}, **{"cwd": ROOT} | options)
    assert done.returncode == status, done.stderr
    return done


SMALL = ("--preset knowledge --iterations 2 --tasks 2 --edits 3 --seeds 2 --eval-tasks 2 "
         "--max-edit-tokens 24 --max-answer-tokens 6 --inner-rank 4 --inner-epochs 2 "
         "--outer-rank 4 --device cpu")


def parse(argv, needed=("model", "train_data", "eval_data")):
    """A Config from flags, as outer_loop.py reads it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser)
    return read_flags(parser.parse_args([str(word) for word in argv]), needed)


def run_it(argv):
    """The outer loop with these flags: the run."""
    run = open_run(parse(argv))
    run_rest_em(run)
    return run


def open_run(cfg):
    return Run(cfg, load_pretrained)


def run_rest_em(run, learn=None):
    """Algorithm 1 on the run's own data: the held-out tasks."""
    train, held_out = load_data(run)
    rest_em(run, train, held_out, learn)
    return held_out


# A line of rollouts.jsonl about nothing, and one of metrics.jsonl.
ROLLOUT = {"iteration": 0, "split": "eval", "arm": "", "task": 0, "edit": 0, "title": "",
           "reward": 0.0, "unadapted": 0.0, "text": "", "token_ids": [], "documents": 1,
           "questions": [], "gold": [], "answers": [], "right": [], "losses": [], "cut": 0,
           "replies": 0, "seconds": 0.0, "note": ""}
MEASURED = {"iteration": 0, "eval_reward": 0.5, "eval_ci": [0.4, 0.6], "eval_by_kind": {},
            "eval_unadapted": 0.0, "eval_tasks": 2, "baselines": [], "train_reward": None,
            "made_of": {}, "seconds": 1.0}


def read_lines(path):
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def even_length(question, gold, prediction):
    """A rule whose rewards differ on a random model: is the number of letters even?"""
    return len(prediction) % 2 == 0


def grids_in(text):
    """The grids of a prompt or an answer, in order: what stands in lines of digits."""
    return [read_grid(lines) for lines in re.findall(r"(?:^\d+$\n?)+", text, re.MULTILINE)]


DELETED = "deleted"
# What may stand in place of a value in a file that comes from outside.
WRONG = [None, True, False, -1, 0, 0.5, 2 ** 31, 10 ** 40, float("inf"), float("nan"),
         "", "x", "12", "a\nb", "!!!", "\ud800", "\0\x1b[2J\n", [], {}, ["x"], [-1], [[]],
         [[1] * 31], [[[1]]], {"content": 1}, DELETED]


def places(value, path=()):
    """The path of every value in a JSON document; of long lists and objects, of the first few."""
    keys = []
    if isinstance(value, dict):
        keys = list(value)[:40]
        if len(value) > 40:
            keys = keys[:2]
    if isinstance(value, list):
        keys = range(min(len(value), 2))
    for key in keys:
        yield (*path, key)
        yield from places(value[key], (*path, key))


def changed(document, path, value):
    """A copy of a JSON document with another value at a path."""
    document = json.loads(json.dumps(document))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if value is DELETED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return document


def varied_run(model, data, folder, *words):
    """A small run whose rewards differ, although its model is random."""
    argv = ["--model", model, "--train-data", data, "--eval-data", data, "--run-dir", folder]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(judges.RULES, "rule", each(even_length))
        return run_it([*argv, *SMALL.split(), *words])


def weight_of(folder, name="model.layers.0.mlp.up_proj.weight"):
    """A weight of a checkpoint: one that every M-step changes."""
    return load_pretrained(folder, "cpu").state_dict()[name]


def spy_on_sft(monkeypatch, module, name="sft"):
    """The lists of jobs that a module gives to sft, or the jobs that it gives to sft_one."""
    seen, train = [], getattr(module, name)

    def spy(model, jobs, progress=None):
        seen.append(jobs)
        return train(model, jobs, progress)

    monkeypatch.setattr(module, name, spy)
    return seen


def without(keys, records):
    return [{key: value for key, value in r.items() if key not in keys} for r in records]


def what_was_computed(folder, *but_for):
    """Everything that a run wrote but for times, in an order of its own."""
    found = []
    for name in ("edits", "rollouts", "metrics"):
        records = without({"seconds", *but_for}, read_lines(folder / f"{name}.jsonl"))
        if name != "metrics":
            records.sort(key=lambda r: json.dumps(r, sort_keys=True))
        found.append(records)
    return found


def assert_same(folder, other, *but_for):
    """Two runs wrote the same. In float64 everything is equal, losses as well as weights."""
    assert what_was_computed(folder, *but_for) == what_was_computed(other, *but_for)
    for t in (1, 2):
        ours = load_file(folder / f"iter_{t}" / "model.safetensors")
        theirs = load_file(other / f"iter_{t}" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name])
    assert not list(folder.glob("*.part*"))
