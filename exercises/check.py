"""The exercises' tests.

    python -m pytest exercises/check.py                         # your stubs
    python -m pytest exercises/check.py -k Test03               # one exercise
    EXERCISES=solutions python -m pytest exercises/check.py     # the project's own functions
"""
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.train import Engine
from exercises import tiny
from inner_loop import ask, grade_all
from lora import Adapters, Job, Lora, PROJECTIONS, Recipe, dialogue
from selfedit import Task, read_self_edit


class Test01Notes:
    def test_they_teach_sixteen_towns(self):
        notes = tiny.answers_of("ex01_notes").notes
        tasks = tiny.towns(16)

        outcomes = tiny.outcomes_of(tasks, [notes(task.context[0]) for task in tasks])

        forward, backward, all_of_them = (
            tiny.accuracy(tasks, outcomes, kind) for kind in ("forward", "reversed", None))
        assert all_of_them >= 0.95, f"forward {forward:.3f}, reversed {backward:.3f}"


RECIPE = Recipe(Lora(rank=4, alpha=4, targets=PROJECTIONS), lr=1e-3, epochs=1, batch=100)
UNCLIPPED = replace(RECIPE, clip=1e9)       # a step leaves the gradient as it is


def nll_of(model, ids, learn):
    """(S,): the negative log-likelihood of each token to be learned, the textbook way."""
    ids = torch.tensor(ids)
    logits = model(ids[None])[0]
    nll = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return nll[torch.tensor(learn)[1:]]


class Test02Gradient:
    def test_the_loss_by_hand(self):
        reinforce_loss = tiny.answers_of("ex02_gradient").reinforce_loss
        a, b = torch.tensor([-1.0, -2.0]), torch.tensor([-4.0])

        assert float(reinforce_loss([[a, b]], [[0.5, 0.25]])) == pytest.approx((1.5 + 1) / 2)

    def test_the_factor_by_hand(self):
        factor = tiny.answers_of("ex02_gradient").factor

        assert factor([[10, 20], [30, 40]], [[0, 1], [1, 0]]) == pytest.approx(50 / 4)

    def test_its_gradient_is_that_of_sft_on_the_kept(self):
        exercise = tiny.answers_of("ex02_gradient")
        model, tok = tiny.load(torch.float64)
        rewards = [[0, 1, 0], [1, 0, 1]]
        pairs = []
        for task in tiny.towns(2):
            sentences = task.context[0].split(". ")
            pairs.append([dialogue(tok.prompt(task.prompt), tok.encode(sentence))
                          for sentence in sentences[:3]])

        # Eq. 3, on all self-edits, with a gradient on one adapter.
        adapters = Adapters(model, RECIPE.lora, n=1)
        adapters.init(0, seed=0)
        flat = adapters.flat.requires_grad_()
        log_p = []
        for row in pairs:
            log_p.append([])
            for ids, learn in row:
                with adapters.route([len(ids)], flat):
                    log_p[-1].append(-nll_of(model, ids, learn))
        exercise.reinforce_loss(log_p, rewards).backward()

        # The project's trainer, on the kept ones.
        kept = [pairs[i][j] for i in range(2) for j in range(3) if rewards[i][j]]
        engine = Engine(model, UNCLIPPED, n=1)
        engine.take_jobs([Job(kept, 0, UNCLIPPED)], [0])
        engine.step()
        lengths = [[len(tokens) for tokens in row] for row in log_p]
        expected = exercise.factor(lengths, rewards) * engine.read.grad

        assert expected.norm() > 0
        assert (flat.grad - expected).norm() < 1e-9 * expected.norm()


class Test03Select:
    def select(self, *args, **settings):
        return tiny.answers_of("ex03_select").select(*args, **settings)

    def test_the_best_of_each_task(self):
        rewards = [[0.1, 0.9, 0.5], [0.7, 0.2, 0.8]]
        usable = [[True] * 3] * 2

        assert self.select(rewards, usable, [0, 0]) == [(0, 1), (1, 2)]
        assert self.select(rewards, usable, [0, 0], keep=2) == [(0, 1), (0, 2), (1, 2), (1, 0)]

    def test_the_first_of_equals(self):
        assert self.select([[0.5, 0.7, 0.7]], [[True] * 3], [0]) == [(0, 1)]
        assert self.select([[0.0] * 3], [[True] * 3], [0], keep=2) == [(0, 0), (0, 1)]

    def test_what_cannot_be_read_is_never_kept(self):
        assert self.select([[0.5, 0.2]], [[False, True]], [0], keep=2) == [(0, 1)]
        assert self.select([[0.5, 0.2]], [[False, False]], [0]) == []
        assert self.select([[1.0, 1.0]], [[False, True]], [0], how="solved") == [(0, 1)]

    def test_strict_is_better_than_the_model_as_it_is(self):
        rewards = [[0.5, 0.3], [0.5, 0.6]]

        assert self.select(rewards, [[True] * 2] * 2, [0.5, 0.5], strict=True) == [(1, 1)]
        assert self.select(rewards, [[True] * 2] * 2, [0.2, 0.5], keep=2, strict=True) == [
            (0, 0), (0, 1), (1, 1)]

    def test_solved(self):
        rewards = [[1.0, 0.9, 1.0], [0.0, 0.9, 0.5]]

        assert self.select(rewards, [[True] * 3] * 2, [0, 0], how="solved") == [(0, 0), (0, 2)]


class Test04AdamW:
    def test_five_steps_are_torchs(self):
        adamw = tiny.answers_of("ex04_adamw").adamw
        n, P, clip, decay = 3, 50, 1.0, 0.1
        lr = torch.tensor([[1e-2], [1e-3], [3e-2]], dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(n, P, generator=generator, dtype=torch.float64)
        # Row 0 is never clipped, row 1 always, row 2 now and then.
        size = torch.tensor([[0.01], [5.0], [0.14]], dtype=torch.float64)
        gradients = size * torch.randn(5, n, P, generator=generator, dtype=torch.float64)

        p, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
        for step, g in enumerate(gradients):
            t = torch.full((n, 1), step + 1.0, dtype=torch.float64)
            before = p.clone(), g.clone(), m.clone(), v.clone()
            given = p, g, m, v
            p, m, v = adamw(p, g, m, v, lr, t, clip, decay)
            assert all(torch.equal(x, y) for x, y in zip(before, given)), "an input was changed"

        for row in range(n):
            expected = start[row].clone().requires_grad_()
            optimizer = torch.optim.AdamW([expected], lr=float(lr[row]), weight_decay=decay)
            for g in gradients:
                expected.grad = g[row].clone()
                torch.nn.utils.clip_grad_norm_([expected], clip)
                optimizer.step()
            assert (p[row] - expected).abs().max() < 1e-12

    def test_each_adapter_has_its_own_step_number(self):
        adamw = tiny.answers_of("ex04_adamw").adamw
        p = torch.zeros(2, 4, dtype=torch.float64)
        g = torch.full_like(p, 0.1)
        m, v, lr = torch.zeros_like(p), torch.zeros_like(p), torch.ones(2, 1, dtype=torch.float64)
        t = torch.tensor([[1.0], [2.0]], dtype=torch.float64)

        new, _, _ = adamw(p, g, m, v, lr, t, 1.0, 0.0)

        # m_hat / sqrt(v_hat): 1 in the first step; then (.1 / .19) / sqrt(.001 / .001999).
        assert new[0].tolist() == pytest.approx([-1.0] * 4, abs=1e-5)
        assert new[1].tolist() == pytest.approx([-(0.1 / 0.19) / (0.001 / 0.001999) ** 0.5] * 4,
                                                abs=1e-5)


class Test05Head:
    def inputs(self):
        g = torch.Generator().manual_seed(0)
        h, W = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((5, 6), (9, 6)))
        return h, W, torch.tensor([0, 8, 3, 3, 5])

    def test_the_loss_is_torchs(self):
        h, W, labels = self.inputs()

        with torch.no_grad():
            nll, gradient = tiny.answers_of("ex05_head").loss_and_gradient(h, W, labels)

        assert gradient.shape == h.shape
        assert torch.allclose(nll, F.cross_entropy(h @ W.T, labels, reduction="none"))

    def test_the_gradient_is_the_numerical_one(self):
        function = tiny.answers_of("ex05_head").loss_and_gradient
        h, W, labels = self.inputs()

        class Head(torch.autograd.Function):
            @staticmethod
            def forward(ctx, h):
                nll, gradient = function(h, W, labels)
                ctx.save_for_backward(gradient)
                return nll

            @staticmethod
            def backward(ctx, g):
                return g[:, None] * ctx.saved_tensors[0]

        assert torch.autograd.gradcheck(Head.apply, h.requires_grad_())


class Test06Packing:
    def test_by_hand(self):
        F_, T_ = False, True
        slots = [[([10, 11, 12], [T_, T_, T_]), ([20, 21], [F_, T_])],
                 [],
                 [([30, 31, 32, 33], [F_, F_, T_, T_])]]

        position, source, labels, weight = tiny.answers_of("ex06_packing").lay_out(slots)

        assert position == [0, 1, 2, 0, 1, 0, 1, 2, 3]
        assert source == [0, 1, 3, 6, 7]
        assert labels == [11, 12, 21, 32, 33]
        assert weight == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 2, 1 / 2])

    def test_each_slots_loss_is_the_one_it_has_alone(self):
        lay_out = tiny.answers_of("ex06_packing").lay_out
        model, tok = tiny.load(torch.float64)
        texts = []
        for task in tiny.towns(3):
            ids = tok.document(task.context[0])
            texts.append((ids, [k >= 5 for k in range(len(ids))]))
        slots = [texts[:2], texts[2:]]

        _, _, labels, weight = lay_out(slots)

        begin = 0
        for slot in slots:
            nll = torch.cat([nll_of(model, *text) for text in slot])
            own = slice(begin, begin + len(nll))
            learned = [i for ids, learn in slot for i, yes in zip(ids[1:], learn[1:]) if yes]
            assert labels[own] == learned
            assert float(nll @ nll.new_tensor(weight[own])) == pytest.approx(float(nll.mean()))
            begin += len(nll)
        assert len(labels) == begin


class Test07Mask:
    def test_the_self_edit_is_learned_with_its_eos(self):
        m_step_example = tiny.answers_of("ex07_mask").m_step_example
        prompt, edit, eos = [5, 6, 7], [8, 9], 0

        ids, learn = m_step_example(prompt, [*edit, eos])

        assert ids == [5, 6, 7, 8, 9, 0]
        assert learn == [False, False, False, True, True, True]

    def test_no_eos_is_added_and_nothing_changed(self):
        m_step_example = tiny.answers_of("ex07_mask").m_step_example
        prompt, edit = [5, 6, 7], [8, 9]

        assert m_step_example(prompt, edit)[0] == [5, 6, 7, 8, 9]
        assert (prompt, edit) == ([5, 6, 7], [8, 9])

    def test_the_trainers_loss_is_that_of_the_self_edit(self):
        m_step_example = tiny.answers_of("ex07_mask").m_step_example
        model, tok = tiny.load(torch.float64)
        (task,) = tiny.towns(1)
        prompt = tok.prompt(task.prompt)
        edit = [*tok.encode("The craft of Vane is making lace."), tok.eos]
        ids = torch.tensor(prompt + edit)
        log_p = model(ids[None])[0].log_softmax(-1)
        by_hand = [-log_p[k - 1, ids[k]].item() for k in range(len(prompt), len(ids))]

        engine = Engine(model, RECIPE, n=1)
        engine.take_jobs([Job([m_step_example(prompt, edit)], 0, RECIPE)], [0])
        engine.step()

        assert engine.losses[0].item() == pytest.approx(sum(by_hand) / len(edit))


class Test08Variance:
    def simulated(self, noise, true, passages=1500, K=5, seeds=3):
        rng = np.random.default_rng(0)
        level = rng.normal(0.5, 0.3, (passages, 1, 1))
        edit = rng.normal(0, true, (passages, K, 1))
        return level + edit + rng.normal(0, noise, (passages, K, seeds))

    def test_by_hand(self):
        luck = tiny.answers_of("ex08_variance").luck

        # Two self-edits, two seeds. Without seed 0 the first is chosen, without seed 1 the second.
        noise, true, chosen, honest = luck(np.array([[[0.2, 0.8], [0.6, 0.6]]]))

        assert noise == pytest.approx((0.18 / 2) ** 0.5)
        assert true == 0                                # variance of means .005, less .09 / 2
        assert chosen == pytest.approx(0.6)
        assert honest == pytest.approx((0.2 + 0.6) / 2)

    def test_the_parts_are_found(self):
        luck = tiny.answers_of("ex08_variance").luck

        noise, true, chosen, honest = luck(self.simulated(noise=0.2, true=0.1))

        assert noise == pytest.approx(0.2, abs=0.01)
        assert true == pytest.approx(0.1, abs=0.01)
        assert honest < chosen

    def test_where_nothing_differs_all_is_luck(self):
        luck = tiny.answers_of("ex08_variance").luck
        accuracy = self.simulated(noise=0.2, true=0)

        noise, true, chosen, honest = luck(accuracy)

        assert true < 0.03
        assert chosen > accuracy.mean() + 0.1
        assert honest == pytest.approx(accuracy.mean(), abs=0.015)


class Test09Lora:
    def inputs(self, n=3, r=2, wide=5, out=4, counts=(2, 0, 4)):
        g = torch.Generator().manual_seed(0)
        shapes = ((sum(counts), wide), (n, r, wide), (n, out, r))
        return [torch.randn(*shape, generator=g) for shape in shapes]

    def test_each_token_goes_through_its_adapter(self):
        x, A, B = self.inputs()

        y = tiny.answers_of("ex09_lora").low_rank(x, A, B, 0.5, [2, 0, 4])

        for token, adapter in enumerate([0, 0, 2, 2, 2, 2]):
            expected = 0.5 * B[adapter] @ A[adapter] @ x[token]
            assert torch.allclose(y[token], expected, atol=1e-5)

    def test_even_segments(self):
        x, A, B = self.inputs(counts=(2, 2, 2))

        y = tiny.answers_of("ex09_lora").low_rank(x, A, B, 2.0, [2, 2, 2])

        assert torch.allclose(y[3], 2.0 * B[1] @ A[1] @ x[3], atol=1e-5)

    def test_the_merged_layer_says_the_same(self):
        exercise = tiny.answers_of("ex09_lora")
        x, A, B = self.inputs(n=1, counts=(6,))
        W = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
        before = W.clone()

        merged = exercise.merge(W, A[0], B[0], 0.5)

        routed = x @ W.T + exercise.low_rank(x, A, B, 0.5, [6])
        assert torch.allclose(x @ merged.T, routed, atol=1e-5)
        assert torch.equal(W, before)

    def test_a_bfloat16_layer_is_rounded_once(self):
        merge = tiny.answers_of("ex09_lora").merge
        g = torch.Generator().manual_seed(2)
        W = torch.randn(64, 48, generator=g).bfloat16()
        A, B = torch.randn(2, 48, generator=g), torch.randn(64, 2, generator=g)

        merged = merge(W, A, B, 0.3)

        once = (W.float() + 0.3 * (B @ A)).bfloat16()
        twice = W + (0.3 * (B @ A)).bfloat16()
        assert merged.dtype == torch.bfloat16
        # A sum in another order may round otherwise here and there; twice is wrong in many places.
        wrong = (merged != once).float().mean()
        assert wrong < 0.01 < (twice != once).float().mean()


class Test10Sampling:
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()

    def sample(self, *args):
        return tiny.answers_of("ex10_sampling").sample(*args)

    def test_greedy(self):
        assert self.sample(self.logits, 0, 1.0, torch.zeros(1, 1)).tolist() == [1]

    @pytest.mark.parametrize("u, token", [(0.1, 0), (0.25, 1), (0.65, 1), (0.75, 2), (0.99, 2)])
    def test_the_inverse_cdf(self, u, token):
        assert self.sample(self.logits, 1.0, 1.0, torch.tensor([[u]])).tolist() == [token]

    def test_a_candidate_outside_the_nucleus_is_passed_over(self):
        # Likelier than token 2 is .5, than token 0 is .8: with .6 the nucleus is {1, 2}.
        assert self.sample(self.logits, 1.0, 0.6, torch.tensor([[0.1, 0.9]])).tolist() == [2]
        assert self.sample(self.logits, 1.0, 0.6, torch.tensor([[0.1, 0.1]])).tolist() == [1]

    def test_rows_draw_for_themselves(self):
        u = torch.tensor([[0.1], [0.6], [0.9]])

        assert self.sample(self.logits.repeat(3, 1), 1.0, 1.0, u).tolist() == [0, 1, 2]

    def test_the_law(self):
        g = torch.Generator().manual_seed(0)
        logits, n = torch.randn(20, generator=g), 20_000
        u = torch.rand(n, 12, generator=g)

        tokens = self.sample(logits.repeat(n, 1), 0.7, 0.8, u)

        p = (logits / 0.7).softmax(-1)
        likelier = torch.tensor([float(p[p > own].sum()) for own in p])
        nucleus = p * (likelier < 0.8)
        expected = nucleus / nucleus.sum()
        found = torch.bincount(tokens, minlength=20) / n
        assert (found - expected).abs().max() < 4 * (0.25 / n) ** 0.5


class Test11Domain:
    def tables(self, n=4):
        """[(shown, asked)] of n operators (x a + y b + z) mod 10: six asked pairs were shown."""
        made = []
        for seed in range(n):
            rng = random.Random(seed)
            x, y, z = rng.randrange(1, 10), rng.randrange(1, 10), rng.randrange(10)
            rows = [(a, b, (x * a + y * b + z) % 10) for a in range(10) for b in range(10)]
            rng.shuffle(rows)
            made.append((rows[:12], rows[:6] + rows[12:15]))
        return made

    def task(self):
        return tiny.answers_of("ex11_domain").operator_task(
            "plus", [(1, 2, 3), (4, 4, 8)], [(4, 4, 8), (2, 2, 4)])

    def test_what_is_asked(self):
        task = self.task()

        assert isinstance(task, Task)
        assert task.context == ["1 # 2 = 3\n4 # 4 = 8"]
        assert task.prompt == "1 # 2 = 3\n4 # 4 = 8\n\nNotes:\n"
        assert task.queries == task.questions == ["4 # 4 =", "2 # 2 ="]
        assert task.answers == ["8", "4"]
        assert task.kinds == ["seen", "unseen"]

    def test_what_is_right(self):
        assert grade_all([self.task()], [[" 8", "5"]]) == [[True, False]]

    def test_how_a_self_edit_is_read(self):
        edit = read_self_edit(self.task(), "I think that\n2 # 2 = 4\n2 # 2 = 44\n9 # 9 = 0")

        assert edit.documents == ["2 # 2 = 4", "9 # 9 = 0", "1 # 2 = 3", "4 # 4 = 8"]

    def test_one_that_says_nothing_has_a_note(self):
        edit = read_self_edit(self.task(), "I do not know.")

        assert edit.documents == []
        assert edit.note

    def test_the_inner_loop_teaches_what_was_shown(self):
        operator_task = tiny.answers_of("ex11_domain").operator_task
        tasks = [operator_task(f"op {i}", *table) for i, table in enumerate(self.tables())]
        model, tok = tiny.load()
        (before,) = ask(model, tok, [tasks], tiny.ANSWERING)
        assert not any(map(any, grade_all(tasks, [answers.texts for answers in before])))

        # More passes than in a town: the model has never seen an equation.
        recipe = replace(tiny.RECIPE, epochs=30)
        outcomes = tiny.outcomes_of(tasks, [task.context[0] for task in tasks], recipe)

        assert tiny.accuracy(tasks, outcomes, "seen") > 0.3


class Test12Forgetting:
    def test_by_hand(self):
        accuracy = [[[0.0, 0.2, 0.1], [0.1, 0.0, 0.2]],
                    [[0.8], [0.6]],
                    [[0.5, 0.7], [0.3, 0.9]],
                    [[0.2, 0.4, 0.6], [0.1, 0.5, 0.4]]]

        gain, left, forgotten = tiny.answers_of("ex12_forgetting").forgetting(accuracy)

        # Own edits: .8 .7 .6 and .6 .9 .4; before: .6 in all; at the end 1.2 and 1.0.
        assert gain == pytest.approx((4.0 - 0.6) / 6)
        assert left == pytest.approx((2.2 - 0.6) / 6)
        assert forgotten == pytest.approx((4.0 - 2.2) / 6)
