"""The engine: n adapters at once are the same as one at a time, and as transformers + PEFT + torch.optim."""
import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

import sft as engine
from checkpoint import UserError
from inner_loop import ask, update_and_score
from lora import Adapters
from model import Ribbon, load_pretrained
from selfedit import SelfEdit, Task
from sft import Example, FrozenHeadLoss, Job, Recipe, auto_slots, sft, step_memory
from tests.test_model import CASES

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RECIPE = Recipe(rank=8, alpha=16,  # a multiple of 8: float32 takes the grouped matmul, float64 the padded one
                 targets=ALL, lr=1e-2, epochs=3, batch=2)


SCHEDULES = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}


def mixed_jobs(seed=0, n=7, shortest=3):
    """Jobs that differ in everything: documents, lengths, masks, learning rate and its schedule, epochs, batch size."""
    g = torch.Generator().manual_seed(seed)
    pick = lambda low, high: torch.randint(low, high, (1,), generator=g).item()
    jobs = []
    for i in range(n):
        examples = []
        for _ in range(pick(1, 6)):
            length = pick(shortest, 40)  # not 2: attention over one token gives q and k a gradient of exactly 0, whose rounding AdamW blows up
            start = pick(1, length - 1)  # as in the M-step: loss on a completion only
            examples.append((torch.randint(0, 256, (length,), generator=g).tolist(), [j >= start for j in range(length)]))
        jobs.append(Job(examples, seed=i, lr=[3e-4, 1e-3, 3e-3][pick(0, 3)], epochs=pick(1, 4), batch=pick(1, 4),
                        schedule=["linear", "cosine"][i % 2], warmup=2 * (i % 3 == 2)))
    return jobs


def run(model, jobs, recipe=RECIPE, slots=0):
    return dict(sft(model, jobs, Recipe(**vars(recipe) | {"slots": slots})))


def worst(a, b):
    return max(float((a[i].weights - b[i].weights).abs().max()) for i in a)


@pytest.fixture(scope="module")
def model64(tiny_folder):
    return load_pretrained(tiny_folder, "cpu", torch.float64)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL])
def test_many_at_once_equal_one_at_a_time(model64, targets):
    """float64; three slots for seven jobs, so that slots are refilled, and empty towards the end."""
    before = {k: v.clone() for k, v in model64.state_dict().items()}
    jobs, recipe = mixed_jobs(), Recipe(**vars(RECIPE) | {"targets": targets})
    packed = run(model64, jobs, recipe, slots=3)
    alone = {i: run(model64, [job], recipe)[0] for i, job in enumerate(jobs)}
    assert packed.keys() == alone.keys() and worst(packed, alone) <= 1e-12
    for i in packed:
        torch.testing.assert_close(torch.tensor(packed[i].losses), torch.tensor(alone[i].losses), atol=1e-12, rtol=0)
        assert len(packed[i].losses) == jobs[i].steps
    assert all(torch.equal(v, before[k]) for k, v in model64.state_dict().items())
    assert max(float(t.weights.abs().max()) for t in packed.values()) > 0.02  # they did learn


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10 ** 6), slots=st.integers(1, 6), n=st.integers(1, 6))
def test_any_mixture_equals_one_at_a_time(model64, seed, slots, n):
    jobs = mixed_jobs(seed, n)
    assert worst(run(model64, jobs, slots=slots), {i: run(model64, [job])[0] for i, job in enumerate(jobs)}) <= 1e-12


def test_changing_one_job_changes_no_other_adapter(model64):
    jobs = mixed_jobs()
    first = run(model64, jobs, slots=7)
    jobs[2] = Job([([5] * 20, [True] * 20)] * 3, seed=99, lr=1e-2, epochs=4, batch=1)
    second = run(model64, jobs, slots=7)
    for i in first:
        same = float((first[i].weights - second[i].weights).abs().max())
        assert same > 1e-3 if i == 2 else same <= 1e-12


def test_a_diverging_adapter_harms_no_other(model64):
    jobs = mixed_jobs()
    alone = {i: run(model64, [job])[0] for i, job in enumerate(jobs)}
    jobs[1] = Job(jobs[1].examples, seed=1, lr=1e200, epochs=9, batch=1)
    packed = run(model64, jobs, slots=3)
    assert packed.pop(1).diverged and alone.pop(1) and worst(packed, alone) <= 1e-12
    assert not any(t.diverged for t in packed.values())


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL])
@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3"])
def test_engine_equals_peft_and_torch_optim(case, targets, tmp_path):
    """float32, against transformers + PEFT + AdamW + a schedule of transformers' + clip_grad_norm_, one job at a time, padded."""
    torch.manual_seed(4)
    CASES[case]().save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base", "cpu")
    recipe, jobs = Recipe(rank=4, alpha=8, targets=targets, lr=1e-3, epochs=2, batch=2, weight_decay=0.1), mixed_jobs(n=4, shortest=20)
    for job in jobs:
        job.lr = 1e-3
    ours = run(model, jobs, recipe, slots=3)
    for i, job in enumerate(jobs):
        reference = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
                                        peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        adapters = Adapters(model, 1, 4, 8, targets)
        adapters.init(0, job.seed)
        parameters = dict(reference.named_parameters())
        name = lambda layer, which: parameters[f"base_model.model.{layer}.lora_{which}.default.weight"]
        for layer, (a, b) in zip(adapters.layers, adapters.pairs(adapters.flat)):
            name(layer, "A").data.copy_(a[0]), name(layer, "B").data.copy_(b[0])
        trainable = [p for p in reference.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=job.lr, weight_decay=0.1)
        decay = SCHEDULES[job.schedule](optimizer, job.warmup, job.steps)
        for batch in job.micro_batches():
            length = max(len(job.examples[e][0]) for e in batch)
            pad = lambda x, value: list(x) + [value] * (length - len(x))
            ids = torch.tensor([pad(job.examples[e][0], 0) for e in batch])
            learn = torch.tensor([pad(job.examples[e][1], False) for e in batch])
            mask = torch.tensor([pad([1] * len(job.examples[e][0]), 0) for e in batch])
            logits = reference(ids, attention_mask=mask).logits
            loss = F.cross_entropy(logits[:, :-1][learn[:, 1:]], ids[:, 1:][learn[:, 1:]])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            decay.step()
        adapters.flat[0] = ours[i].weights
        for layer, (a, b) in zip(adapters.layers, adapters.pairs(adapters.flat)):
            torch.testing.assert_close(a[0], name(layer, "A").data, atol=5e-5, rtol=0)
            torch.testing.assert_close(b[0], name(layer, "B").data, atol=5e-5, rtol=0)
        assert ours[i].losses[-1] == pytest.approx(loss.item(), abs=5e-4)


def test_frozen_head_loss_is_cross_entropy():
    h = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    weight, labels, scale = torch.randn(2 ** 19, 12, dtype=torch.float64), torch.randint(0, 2 ** 19, (50,)), torch.rand(50, dtype=torch.float64)
    (FrozenHeadLoss.apply(h, weight, labels) * scale).sum().backward()  # 2 ** 19 rows: chunks of 32 tokens
    ours, h.grad = h.grad, None
    (F.cross_entropy(h @ weight.T, labels, reduction="none") * scale).sum().backward()
    torch.testing.assert_close(ours, h.grad, atol=1e-12, rtol=1e-9)


def test_bf16_agrees_with_float32(tiny_folder):
    """Rounding apart, bf16 weights train the same adapters: the losses of the two runs agree to a few per cent."""
    jobs = mixed_jobs()
    full, half = (run(load_pretrained(tiny_folder, "cpu", d), jobs, slots=3) for d in (torch.float32, torch.bfloat16))
    a, b = (torch.tensor([t.losses[-1] for _, t in sorted(x.items())]) for x in (full, half))
    torch.testing.assert_close(a, b, atol=0.1, rtol=0.05)


def test_adamw_can_be_compiled_whole():
    """On CUDA the update is compiled; here its graph is, in one piece, and gives what the plain function gives."""
    state = [torch.randn(3, 50) for _ in range(4)]
    state[3].abs_()
    rest = (torch.tensor([[0.1], [0.0], [0.3]]), torch.tensor([[1.0], [5.0], [9.0]]), 1.0, 0.01)
    plain, traced = ([x.clone() for x in state] for _ in range(2))
    engine.adamw_(*plain, *rest)
    torch.compile(engine.adamw_, backend="aot_eager", fullgraph=True, dynamic=False)(*traced, *rest)
    for a, b, before in zip(plain, traced, state):
        torch.testing.assert_close(a, b)
        assert not torch.equal(a, before)


def test_slots_fit_the_work(tiny):
    jobs = mixed_jobs()
    assert 1 <= auto_slots(tiny, jobs, RECIPE) <= len(jobs)
    long = [Job([([1] * 1000, [True] * 1000)], 0, 1e-3, 1, 1)] * 5
    assert auto_slots(tiny, long, RECIPE) == 1


def test_edits_on_top_of_each_other_are_as_if_merged(model64, tiny_folder):
    """The second adapter trained beside the first, which is fixed, is the one trained after merging the first."""
    first, second = mixed_jobs()[:2]
    narrow, wide = Recipe(**vars(RECIPE) | {"rank": 4, "alpha": 8}), Recipe(**vars(RECIPE) | {"rank": 8, "alpha": 16})
    merged, stack = load_pretrained(tiny_folder, "cpu", torch.float64), Adapters(model64, 1, 8, 16, ALL)
    for k, job in enumerate((first, second)):
        alone = Adapters(merged, 1, 4, 8, ALL)
        alone.init(0, job.seed)
        fresh = torch.zeros_like(stack.flat)
        for (a, b), (a4, b4) in zip(stack.pairs(fresh), alone.pairs(alone.flat)):
            a[:, 4 * k:4 * k + 4], b[:, :, 4 * k:4 * k + 4] = a4, b4
        free = stack.part(4 * k, 4 * k + 4)
        assert not fresh[0][~free].any() and not stack.flat[0][free].any()
        beside = engine.replace(job, start=(stack.flat + fresh)[0], free=free)
        ((_, trained),) = sft(model64, [beside], wide)
        assert torch.equal(trained.weights[~free], stack.flat[0][~free]) and (trained.weights - beside.start)[free].abs().max() > 5e-4
        stack.flat[0] = trained.weights
        ((_, trained),) = sft(merged, [job], narrow)
        alone.flat[0] = trained.weights
        alone.merge(0)
        ids = torch.randint(0, 256, (1, 30))
        with stack.route([30]):
            torch.testing.assert_close(model64(ids), merged(ids), atol=1e-9, rtol=0)


def padded_gradient(model, ids, pad_to, pads):
    """Loss of one document as rows padded to pad_to are learned, and its gradient for a fresh adapter's B."""
    example = Example.prepare(ids, [True] * len(ids), pad_to, pads)
    adapters = Adapters(model, 1, 8, 16, ["q_proj", "v_proj"])
    adapters.init(0, 0)
    adapters.flat.requires_grad_()
    running = [engine.Running(0, None, iter([[0]]), [example], 0)]
    ribbon, counts, ids, source, labels, weight, _ = engine.pack(running, model.device)
    with adapters.route(counts):
        h = model.hidden(ids, ribbon.position, ribbon.attend)[source]
        loss = (FrozenHeadLoss.apply(h, model.lm_head.weight, labels) * weight).sum()
        loss.backward()
    return loss.item(), adapters.flat.grad[0].clone()


@pytest.mark.parametrize("case", ["llama3", "qwen2", "qwen3"])
def test_learned_pads_are_those_of_a_padded_row(case, tmp_path):
    """With every pad there, loss and gradient are transformers' on a row padded with EOS whose pads are labels."""
    torch.manual_seed(5)
    CASES[case]().save_pretrained(tmp_path / "base")
    model, ids, row = load_pretrained(tmp_path / "base", "cpu"), [*torch.randint(3, 320, (20,)).tolist(), 2], 96
    loss, gradient = padded_gradient(model, ids, row, pads=1000)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    reference, own = peft.get_peft_model(base, config), Adapters(model, 1, 8, 16, ["q_proj", "v_proj"])
    own.init(0, 0)
    loras = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in reference.modules() if hasattr(m, "lora_A")]
    for (a, b), (ours, _) in zip(loras, own.pairs(own.flat)):
        a.data.copy_(ours[0])
    filled = torch.tensor([ids + [2] * (row - len(ids))])
    theirs = reference(input_ids=filled, attention_mask=(torch.arange(row) < 20)[None].long(), labels=filled).loss
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    for (a, b), (ga, gb) in zip(loras, own.pairs(gradient[None])):
        torch.testing.assert_close(gb[0], b.grad, atol=1e-6, rtol=1e-3)
    few_loss, few = padded_gradient(model, ids, row, pads=8)  # a few of them stand for all
    assert few_loss == pytest.approx(loss, rel=0.1)
    assert F.cosine_similarity(few, gradient, dim=0) > 0.9  # .99 on SmolLM2; random weights are the worst case


def test_padded_rows_at_the_edges():
    pads = lambda n, pad_to: Example.prepare([7] * n + [2], [True] * (n + 1), pad_to)
    whole = pads(5, 0)
    assert whole.pads == 0 and len(whole.ids) == 6 and whole.weight.sum() == 5
    full = pads(9, 8)    # longer than the row: cut, no EOS
    assert full.ids.tolist() == [7] * 8 and full.pads == 0 and len(full.labels) == 7
    exact = pads(7, 8)
    assert exact.ids.tolist() == [7] * 7 + [2] and exact.pads == 0 and exact.labels.tolist() == [7] * 6 + [2]
    one = pads(6, 8)     # the row is 6 tokens and two pads: one pad predicts the other
    assert one.pads == 1 and one.position.tolist() == [0, 1, 2, 3, 4, 5, 6] and one.weight.tolist() == [1] * 7
    many = pads(5, 2048)
    assert many.pads == 8 and many.weight.sum() == 2047 and many.labels[4:].tolist() == [2] * 9
    assert many.position[5:].diff().unique().numel() <= 2 and many.position[-1] < 2047


def test_out_of_memory_halves_the_slots_and_changes_nothing(model64, monkeypatch, capsys):
    jobs, pack = mixed_jobs(), engine.pack
    expected = run(model64, jobs, slots=4)

    def small_memory(running, device, most=2):
        if sum(r is not None for r in running) > most and any(r and r.step == 3 for r in running):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return pack(running, device)
    monkeypatch.setattr(engine, "pack", small_memory)
    heard = []
    recipe = Recipe(**vars(RECIPE) | {"slots": 4})
    got = dict(sft(model64, jobs, recipe, lambda done, total: heard.append((done, total))))
    assert "going on with 2 adapters" in capsys.readouterr().out
    assert got.keys() == expected.keys() and worst(got, expected) <= 1e-12
    assert heard[-1] == (sum(job.steps for job in jobs),) * 2
    monkeypatch.setattr(engine, "pack", lambda running, device: small_memory(running, device, most=0))
    with pytest.raises(UserError, match="--recompute"):
        run(model64, jobs)


def test_recomputed_activations_train_the_same(model64):
    jobs = mixed_jobs()
    expected = run(model64, jobs, slots=3)
    model64.recompute = True
    try:
        assert worst(run(model64, jobs, slots=3), expected) <= 1e-12
    finally:
        model64.recompute = False


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL])
def test_the_memory_formula_counts_what_autograd_keeps(case, targets, tmp_path):
    torch.manual_seed(4)
    CASES[case]().save_pretrained(tmp_path / "base")
    model, kept = load_pretrained(tmp_path / "base", "cpu"), {}
    adapters, tokens = Adapters(model, 1, 8, 16, targets), 256
    ids, ribbon = torch.randint(0, 320, (tokens,)), Ribbon([tokens], "cpu")
    adapters.flat.requires_grad_()

    def keep(t):
        if t.shape[:1] == (tokens,) or t.shape[-2:-1] == (tokens,) or tokens in t.shape:  # not the weights
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), adapters.route([tokens]):
        h = model.hidden(ids, ribbon.position, ribbon.attend)
        estimate = step_memory(model, RECIPE, 1, tokens) - step_memory(model, RECIPE, 1, 0)
        assert 0.6 < estimate / sum(kept.values()) < 1.6 and h.requires_grad


# ------------------------------------------------------------------------------------------------ reward

def make_task(name="Town", questions=("Q0?", "Q1?"), answers=("a", "b")):
    return Task(name=name, prompt=f"Read {name}.", context=[name], questions=list(questions), answers=list(answers),
                queries=[f"{q} of {name}" for q in questions], grade=lambda q, gold, prediction: gold in prediction,
                read=lambda text: ([text] if text else [], {}))


def test_answers_of_many_adapters_equal_one_at_a_time(tiny, tok):
    tasks = [make_task(f"Town {i}", [f"Q{j}?" for j in range(1 + i % 3)], ["x"] * (1 + i % 3)) for i in range(5)]
    jobs = mixed_jobs(n=5)
    weights = [run(tiny, [job])[0].weights for job in jobs]
    together, cut = ask(tiny, tok, tasks, weights, RECIPE, max_new=20)
    assert (together, cut) == tuple(map(list, zip(*((a[0], c[0]) for a, c in (
        ask(tiny, tok, [t], [w], RECIPE, max_new=20) for t, w in zip(tasks, weights))))))
    assert together != ask(tiny, tok, tasks, max_new=20)[0]
    assert [len(a) for a in together] == [len(t.questions) for t in tasks]


def test_the_reward_is_the_mean_over_seeds(tiny, tok):
    """A grade that depends on nothing but the answer's first letter: the outcome's own fields must add up to its reward."""
    task = make_task()
    task.grade = lambda q, gold, prediction: ord(prediction[0]) % 2 == 0
    edits = [SelfEdit("one two three", [], ["one two", "three"]), SelfEdit("four", [], ["four"])]
    outcomes = dict(update_and_score(tiny, tok, [task, task], edits, [[1, 2, 3], [4, 5, 6]], RECIPE, max_new=10, newline=False))
    for o in outcomes.values():
        assert len(o.accuracy) == len(o.answers) == 3 and o.reward == pytest.approx(sum(o.accuracy) / 3)
        assert o.accuracy == [sum(r) / 2 for r in o.right]
        assert o.right == [[bool(a.strip()) and ord(a[0]) % 2 == 0 for a in row] for row in o.answers]


def test_directives_override_the_recipe(tiny, tok):
    task, doc = make_task(), ["some text"]
    edits = [SelfEdit("x", [], doc, {"lr": 0.0, "epochs": 7}), SelfEdit("x", [], doc)]
    outcomes = dict(update_and_score(tiny, tok, [task] * 2, edits, [[1], [1]], RECIPE, max_new=4))
    first, last = outcomes[0].losses[0]
    assert first == last and outcomes[1].losses[0][0] > outcomes[1].losses[0][1]  # a learning rate of 0 teaches nothing


def test_bad_edits_have_reward_0_and_a_note(tiny, tok):
    task = make_task()
    task.grade = lambda *_: True
    edits = [SelfEdit("", []), SelfEdit("x", [], ["hot"], {"lr": float("inf")}), SelfEdit("x", [], ["x"]), SelfEdit("x", [], ["a" * 5000])]
    outcomes = dict(update_and_score(tiny, tok, [task] * 4, edits, [[1]] * 4, RECIPE, max_new=4, newline=False))
    assert outcomes[0].reward == 0 and "nothing to learn" in outcomes[0].note
    assert outcomes[1].reward == 0 and "diverged" in outcomes[1].note
    assert outcomes[2].reward == 1 and outcomes[3].reward == 1 and not outcomes[2].note  # longer than the window: cut
