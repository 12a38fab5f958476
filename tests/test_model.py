"""The transformer equals transformers', in both directions, and generates what a full forward would."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
                          Qwen3ForCausalLM)

import generate as decoding
import model
from checkpoint import UserError
from generate import generate, sample
from lora import Adapters
from model import Ribbon, load_pretrained

COMMON = dict(vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=512, initializer_range=0.15)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
CASES = {
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, rope_parameters=LLAMA3)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=True)),
    "llama-mha": lambda: LlamaForCausalLM(LlamaConfig(**COMMON | {"num_key_value_heads": 4})),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=32)),
}


@pytest.fixture(scope="module", params=CASES)
def peer(request, tmp_path_factory):
    """A random model that transformers wrote, in several shards."""
    torch.manual_seed(1)
    model = CASES[request.param]().eval()
    for name, p in model.named_parameters():  # biases and norms are born as 0 and 1: make them matter
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    model.save_pretrained(folder, max_shard_size="120KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder, model


def test_logits_equal_transformers(peer):
    folder, reference = peer
    ids = torch.randint(0, 320, (2, 300))
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(folder, "cpu")(ids), reference(ids).logits, atol=1e-4, rtol=0)


def test_ragged_ribbon_equals_single_sequences(peer):
    model, lengths = load_pretrained(peer[0], "cpu"), [7, 1, 40, 13]
    parts = [torch.randint(0, 320, (n,)) for n in lengths]
    ribbon = Ribbon(lengths, "cpu")
    h = model.hidden(torch.cat(parts), ribbon.position, ribbon.attend)
    for part, rows in zip(parts, h.split(lengths)):
        torch.testing.assert_close(model.lm_head(rows), model(part[None])[0], atol=1e-4, rtol=0)


def test_saved_folder_opens_in_transformers(peer, tmp_path):
    model = load_pretrained(peer[0], "cpu")
    model.save_pretrained(tmp_path / "out")
    ids = torch.randint(0, 320, (1, 50))
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(model(ids), again(ids).logits, atol=1e-4, rtol=0)
        assert torch.equal(model(ids), load_pretrained(tmp_path / "out", "cpu")(ids))
    with pytest.raises(UserError, match="exists already"):
        model.save_pretrained(tmp_path / "out")


def naive_greedy(model, prompt, max_new, stop):
    """The slow way, kept as the test of the fast one: a full forward for every token."""
    ids = list(prompt)
    for _ in range(max_new):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in stop:
            break
    return ids[len(prompt):]


def test_cached_generation_equals_full_forward(peer):
    model = load_pretrained(peer[0], "cpu")
    prompts = [torch.randint(0, 320, (n,)).tolist() for n in (5, 33, 2, 250)]  # 250 + 40 crosses a cache block
    stop = {3, 50, 77, *range(200, 205)}
    expected = [naive_greedy(model, p, 40, stop) for p in prompts]
    assert generate(model, prompts, 40, stop) == expected                        # ragged batch
    assert [generate(model, [p], 40, stop)[0] for p in prompts] == expected      # singles
    assert generate(model, prompts, 40, stop, max_rows=3) == expected            # several batches
    assert generate(model, prompts, 40, stop, n=3) == [row for row in expected for _ in range(3)]


def test_finished_rows_make_room(tiny):
    """Rows end at very different times; the cache is compacted under way and nothing is mixed up."""
    prompts = [[i, i + 1, 7] for i in range(20)]
    full = [naive_greedy(tiny, p, 60, set()) for p in prompts]
    stop = {row[i] for i, row in zip((1, 3, 20, 40), full)}
    assert generate(tiny, prompts, 60, stop) == [naive_greedy(tiny, p, 60, stop) for p in prompts]


def test_ended_rows_give_their_place_to_waiting_prompts(tiny, monkeypatch):
    """Two rows a prompt, six at a time: the same as one by one, and in far fewer steps than batch after batch."""
    prompts = [[i, 3 * i + 1] * (1 + i % 5) for i in range(20)]
    sampling = dict(temperature=1.0, top_p=0.9, stop={i for i in range(0, 264, 12)})
    steps, forward = [], decoding.Rows.forward
    monkeypatch.setattr(decoding.Rows, "forward", lambda self: (steps.append(len(self.row)), forward(self))[1])
    rows = generate(tiny, prompts, 60, n=2, seeds=range(40), max_rows=7, **sampling)
    taken = len(steps)
    assert max(steps) == 6
    assert rows == [generate(tiny, [prompts[i // 2]], 60, seeds=[i], **sampling)[0] for i in range(40)]
    longest = sum(max(map(len, rows[i:i + 6])) for i in range(0, 40, 6))
    assert min(map(len, rows)) < 5 and taken < 0.8 * longest and sum(map(len, rows)) <= 6 * taken + 40


def test_questions_of_many_adapters_in_few_rows(tiny):
    """Adapters with one to four prompts, two rows for each: a grid with holes, refilled and folded."""
    adapters = Adapters(tiny, 3, 8, 16, ["q_proj", "up_proj"])
    adapters.flat.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    slots, stop = [0, 1, 1, 1, 1, 2, 2], set(range(0, 264, 9))
    prompts = [[i, 5, 9 * i] for i in range(7)]
    together = generate(tiny, prompts, 40, stop, adapters=adapters, slots=slots, max_rows=6)
    for prompt, slot, row in zip(prompts, slots, together):
        own = Adapters(tiny, 1, 8, 16, ["q_proj", "up_proj"])
        own.flat[0] = adapters.flat[slot]
        assert generate(tiny, [prompt], 40, stop, adapters=own, slots=[0]) == [row]
    assert together != generate(tiny, prompts, 40, stop)


def test_bf16_on_a_cpu_without_arithmetic_for_it(monkeypatch):
    """Computed in float32 it is at least as close to the truth, forward and backward, as bfloat16 arithmetic."""
    layer = model.Linear(64, 48).to(torch.bfloat16).requires_grad_(False)
    x, g = torch.randn(30, 64, dtype=torch.bfloat16), torch.randn(30, 48, dtype=torch.bfloat16)
    truth = x.double() @ layer.weight.double().T + layer.bias.double(), g.double() @ layer.weight.double()
    errors = []
    for slow in (True, False):
        monkeypatch.setattr(model, "slow_bf16", lambda x: slow)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(g)
        assert y.dtype == leaf.grad.dtype == torch.bfloat16
        errors.append([float((a.detach().double() - b).abs().mean()) for a, b in zip((y, leaf.grad), truth)])
    assert all(ours <= 1.5 * theirs and ours < 0.02 for ours, theirs in zip(*errors)), errors


class Recorded(TorchDispatchMode):
    """A CUDA graph on a CPU: records every operation with its tensors, and replays just that."""
    made = 0

    def __init__(self):
        super().__init__()
        self.calls, self.fresh = [], True
        Recorded.made += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        if not self.fresh:  # recording ran it once already
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
        self.fresh = False


def test_a_step_can_be_a_graph(tiny, monkeypatch):
    """All that changes from step to step lies in tensors that stay where they are: replaying what one step did, also when
    rows are refilled and dropped and the cache grows, gives what running it gives."""
    prompts, seeds = [[i, i + 1] for i in range(9)] + [[7] * 240], range(20)
    adapters = Adapters(tiny, 2, 8, 16, ["q_proj", "v_proj"])
    adapters.flat.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    with_adapters = dict(n=1, adapters=adapters, slots=[0] * 5 + [1] * 5, max_rows=6)
    for more in (dict(n=2, temperature=1.0, top_p=0.9, seeds=seeds, max_rows=8), with_adapters):
        expected = generate(tiny, prompts, 50, set(range(0, 264, 8)), **more)
        monkeypatch.setattr(decoding, "has_graphs", lambda device: True)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
        Recorded.made = 0
        assert generate(tiny, prompts, 50, set(range(0, 264, 8)), **more) == expected
        assert Recorded.made > 1
        monkeypatch.undo()


def test_late_stop_does_not_end_a_row_at_once(tiny):
    first = generate(tiny, [[5, 6]], 8, set())[0]
    assert generate(tiny, [[5, 6]], 8, {first[0]})[0] == first[:1]
    assert len(generate(tiny, [[5, 6]], 8, set(), late_stop={first[0]})[0]) > 1


def test_sampled_rows_do_not_depend_on_neighbours(tiny):
    prompts, seeds = [[1, 2, 3], [9, 8], [4] * 30], [11, 12, 13, 14, 15, 16]
    both = generate(tiny, prompts, 30, {256}, n=2, temperature=1.0, top_p=0.95, seeds=seeds)
    alone = [generate(tiny, [prompts[i // 2]], 30, {256}, temperature=1.0, top_p=0.95, seeds=[seeds[i]])[0] for i in range(6)]
    assert both == alone and len({tuple(r) for r in both}) == 6


def test_sampling_follows_the_nucleus():
    p = torch.tensor([0.05, 0.5, 0.3, 0.15])
    u = (torch.arange(4000) + 0.5) / 4000
    draws = sample(p.log().expand(4000, -1), 1.0, 0.9, u)  # .5 + .3 < .9 <= .5 + .3 + .15: the smallest is cut
    shares = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0, 0.5, 0.3, 0.15]) / 0.95, atol=1e-3, rtol=0)
    wide = torch.zeros(2, 5000)  # a flat distribution: the nucleus is wider than the likeliest 1024
    assert sample(wide, 1.0, 0.95, torch.tensor([0.5, 0.999])).unique().numel() == 2
    assert torch.equal(sample(wide + torch.eye(5000)[:2], 0.0, 0.95, None), torch.tensor([0, 1]))


def test_banned_ids_are_never_sampled(tiny):
    banned = torch.ones(264, dtype=torch.bool)
    banned[[65, 66]] = False
    rows = generate(tiny, [[1]], 50, set(), n=4, temperature=2.0, seeds=range(4), banned=banned)
    assert {i for row in rows for i in row} == {65, 66}


def damage(folder, name, change):
    path = folder / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize("what, words", [
    (lambda d: shutil.rmtree(d), "no such folder"),
    (lambda d: next(d.glob("model-00002*")).unlink(), "is missing"),
    (lambda d: next(d.glob("model-00002*")).write_bytes(b"\x10" * 100), "damaged"),
    (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    (lambda d: (d / "config.json").write_text("{"), "not readable as JSON"),
    (lambda d: damage(d, "config.json", lambda c: c.update(architectures=["MambaForCausalLM"])), "unsupported architecture: Mamba"),
    (lambda d: damage(d, "config.json", lambda c: c.update(hidden_act="gelu")), "unsupported architecture: 'gelu'"),
    (lambda d: damage(d, "config.json", lambda c: c["rope_parameters"].update(rope_type="yarn")), "RoPE type 'yarn'"),
    (lambda d: damage(d, "config.json", lambda c: c.pop("hidden_size")), "'hidden_size' is missing"),
    (lambda d: damage(d, "config.json", lambda c: c.update(num_hidden_layers=2)), "unexpected tensor model.layers.2"),
    (lambda d: damage(d, "config.json", lambda c: c.update(num_hidden_layers=4)), "tensor model.layers.3.* is missing"),
    (lambda d: damage(d, "config.json", lambda c: c.update(intermediate_size=128)), "has shape"),
])
def test_what_is_wrong_with_a_folder_is_one_line(what, words, tmp_path):
    CASES["llama-mha"]().save_pretrained(tmp_path / "m", max_shard_size="120KB")
    what(tmp_path / "m")
    with pytest.raises(UserError, match=words) as error:
        load_pretrained(tmp_path / "m", "cpu")
    assert "\n" not in str(error.value)


def test_hub_errors_are_one_line(monkeypatch):
    import huggingface_hub as hub
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route\nto host")))
    with pytest.raises(UserError, match="hub can't be reached.*no route"):
        load_pretrained("owner/name")


def test_hub_download_asks_for_what_is_needed(monkeypatch, tiny_folder):
    import huggingface_hub as hub
    from fnmatch import fnmatch
    asked = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: asked.update({name: allow_patterns}) or str(tiny_folder))
    load_pretrained("owner/name", "cpu")
    wanted = lambda file: any(fnmatch(file, p) for p in asked["owner/name"])
    assert all(map(wanted, ["config.json", "model.safetensors", "model-00001-of-00004.safetensors", "model.safetensors.index.json", "tokenizer.json"]))
    assert not any(map(wanted, ["original/consolidated.00.pth", "original/tokenizer.model", "pytorch_model.bin", "onnx/model.onnx", "README.md"]))


def test_programs_print_no_traceback():
    run = subprocess.run([sys.executable, "model.py", "--model", "/nowhere"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: /nowhere: no such folder") and "Traceback" not in run.stderr


def test_smollm2_logits_equal_transformers(smollm2):
    text = torch.arange(2000, 2300)[None]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()(text).logits
        torch.testing.assert_close(load_pretrained(smollm2, "cpu")(text), expected, atol=1e-4, rtol=1e-5)


def test_loading_needs_one_copy(smollm2):
    """Peak memory of a process that loads 538 MB of float32 weights as bfloat16 (269 MB), over that of the imports."""
    code = ("import resource, sys, torch; sys.path.insert(0, '.'); from model import load_pretrained\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            "before = peak(); m = load_pretrained(sys.argv[1], 'cpu', getattr(torch, sys.argv[2])); print(peak() - before)\n")
    mb = lambda dtype: float(subprocess.run([sys.executable, "-c", code, str(smollm2), dtype], capture_output=True, text=True, check=True).stdout)
    assert mb("float32") < 1.1 * 538                # the mapped file is the copy
    assert mb("bfloat16") < 1.1 * (538 + 269)       # the mapped file, which the system may drop, and the copy
