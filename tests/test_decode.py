"""Many texts at once are the texts that the model writes one by one, and in fewer steps."""
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import decode
from engine.decode import Reply, Sampler, Sampling, sample
from lora import Adapters
from model import complete, load_pretrained
from support.files import UserError
from support.tokenizer import GPT2, Tokenizer
from tests.helpers import STOP, generate, in_groups, random_adapters, work
from tests.make_checkpoint import make_checkpoint


def write(model, tok, groups, *args, **settings):
    """All that decode.write yields, in groups."""
    return in_groups(decode.write(model, tok, groups, *args, **settings), groups)


def written(model, prompts, sampling, seeds=None):
    """The rows of one group of prompts, without adapters."""
    (rows,) = generate(model, [prompts], sampling, seeds)
    return rows


@pytest.fixture()
def dictate(monkeypatch):
    """A function: from then on any model writes these ids, text after text, whatever it reads."""
    def script(*texts):
        ids = torch.zeros(len(texts) + 1, 64, dtype=torch.long)     # the last is for idle rows
        for i, text in enumerate(texts):
            ids[i, :len(text)] = torch.tensor(text)

        def dictated(rows, places, h):
            token = ids[rows.text[places], rows.age[places]]
            monkeypatch.setattr(decode, "sample", lambda *_: token)
            append(rows, places, h)
        monkeypatch.setattr(decode.Rows, "append", dictated)

    append = decode.Rows.append
    return script


def test_cached_generation_equals_full_forward(peer):
    model = load_pretrained(peer[0], "cpu")
    prompts = []
    for length in (5, 33, 2, 250):      # 250 + 30 crosses a block of the cache
        prompts.append(torch.randint(0, 320, (length,)).tolist())
    sampling = Sampling(30, stop=frozenset([3, 50, 77, *range(200, 205)]))
    expected = [complete(model, prompt, 30, sampling.stop) for prompt in prompts]
    together = written(model, prompts, sampling)
    waiting = written(model, prompts, replace(sampling, max_rows=3))
    repeated = written(model, prompts, replace(sampling, n=3))
    assert together == expected
    assert waiting == expected
    for i, row in enumerate(repeated):
        assert row == expected[i // 3]
    for prompt, row in zip(prompts, expected):
        assert written(model, [prompt], sampling) == [row]


def test_a_stop_id_ends_a_row_and_is_part_of_it_and_a_late_one_not_at_once(tiny, dictate):
    dictate([5, 9, 5, 3], [5, 5, 3], [9, 5, 3])
    prompts = [[1], [2], [3]]
    assert written(tiny, prompts, Sampling(4, stop=frozenset([5]))) == [[5], [5], [9, 5]]
    late = Sampling(4, late_stop=frozenset([5]))
    assert written(tiny, prompts, late) == [[5, 9, 5], [5, 5], [9, 5]]


def test_rows_come_back_in_the_groups_of_their_prompts_and_progress_hears_how_many_ended(tiny):
    heard = []
    sampling = Sampling(30, n=2, temperature=1.0, max_rows=4, stop=STOP)
    flat = written(tiny, [[1], [2, 3], [4]], sampling, range(6))
    groups = generate(tiny, [[[1], [2, 3]], [], [[4]]], sampling, range(6),
                      progress=lambda *counts: heard.append(counts))
    assert groups == [flat[:4], [], flat[4:]]
    assert heard == sorted(heard) and heard[0][0] < 6
    assert heard[-1] == (6, 6)
    assert generate(tiny, [[], []], Sampling(6)) == [[], []]
    with pytest.raises(AssertionError, match="empty prompt"):
        written(tiny, [[1], []], Sampling(4))


def test_ended_rows_give_their_place_to_waiting_prompts_and_the_grid_is_folded(tiny, monkeypatch):
    """Two rows a prompt, six at a time: the same as one by one, and in far fewer steps than batch
    after batch."""
    widths = []     # how many rows each step has
    forward = decode.Rows.forward

    def counted(rows):
        widths.append(len(rows.text))
        forward(rows)
    monkeypatch.setattr(decode.Rows, "forward", counted)
    prompts = [[i, 3 * i + 1] * (1 + i % 5) for i in range(12)]
    one = Sampling(60, temperature=1.0, top_p=0.9, stop=STOP)
    rows = written(tiny, prompts, replace(one, n=2, max_rows=7), range(24))
    steps = len(widths)
    assert max(widths) == 6
    assert widths[-1] <= 3
    # A batch takes as many steps as its longest row has tokens.
    lengths = [len(row) for row in rows]
    batch_after_batch = sum(max(lengths[i:i + 6]) for i in range(0, 24, 6))
    assert steps < 0.8 * batch_after_batch
    assert sum(lengths) <= 6 * steps + 24   # the first token of each is the prefill's
    for i, row in enumerate(rows):
        assert written(tiny, [prompts[i // 2]], one, [i]) == [row]
    assert len({tuple(row) for row in rows}) > 20


def test_questions_of_many_adapters_in_few_rows(tiny):
    """Adapters with no prompt to four, two rows for each: a grid with holes, refilled, folded."""
    adapters = random_adapters(tiny, 4)
    groups = [[[0, 5, 9]], [[1, 5, 9], [2, 5, 18], [3, 5, 27], [4, 5, 36]], [],
              [[5, 5, 45], [6, 5, 54]]]
    sampling = Sampling(40, max_rows=8, stop=STOP)
    together = generate(tiny, groups, sampling, adapters=adapters)
    for weights, prompts, rows in zip(adapters.flat, groups, together):
        own = Adapters.stack(tiny, adapters.lora, [weights])
        assert len(rows) == len(prompts)
        for prompt, row in zip(prompts, rows):
            assert generate(tiny, [[prompt]], sampling, adapters=own) == [[row]]
    assert together != generate(tiny, groups, sampling)


@pytest.fixture()
def room_for(monkeypatch):
    """A function: from then on the device is full when more rows than that take a step."""
    def limit(most, error=torch.OutOfMemoryError("CUDA out of memory")):
        def limited(rows):
            if len(rows.text) > most:
                raise error
            forward(rows)
        monkeypatch.setattr(decode.Rows, "forward", limited)

    forward = decode.Rows.forward
    return limit


@pytest.mark.parametrize("case, left", [("sampled", [4, 2]), ("adapters", [3])])
def test_out_of_memory_halves_the_rows_and_changes_nothing(case, left, tiny, room_for, capsys):
    groups, *how = work(tiny, case)
    expected = generate(tiny, groups, *how)
    total = sum(map(len, expected))
    room_for(2)
    heard = []
    assert generate(tiny, groups, *how, lambda *counts: heard.append(counts)) == expected
    # What has ended is not written again.
    assert heard == sorted(heard) and heard[-1] == (total, total)
    assert capsys.readouterr().out.splitlines() == [
        f"out of memory: going on with {rows} rows side by side" for rows in left]


@pytest.mark.parametrize("error, kind, words", [
    (torch.OutOfMemoryError("CUDA out of memory"), UserError, "out of memory with a single text"),
    (RuntimeError("shapes differ"), RuntimeError, "shapes differ")])
def test_what_halving_can_not_mend_is_raised(error, kind, words, tiny, room_for):
    room_for(0, error)
    with pytest.raises(kind, match=words):
        written(tiny, [[1, 2]], Sampling(5))


class Recorded(TorchDispatchMode):
    """A CUDA graph on a CPU: records every operation with its tensors, and replays just that."""
    made = 0

    def __init__(self):
        super().__init__()
        self.calls = []
        self.fresh = True
        Recorded.made += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        assert func not in waits, "waits for the device"
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        # Other than on CUDA, recording has run it once already.
        if self.fresh:
            self.fresh = False
            return
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            # Later operations read the tensors that were recorded.
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.mark.parametrize("case", ["sampled", "adapters"])
def test_a_step_can_be_a_graph(case, tiny, monkeypatch):
    """To replay what one step did gives what running it gives: also when rows are refilled and
    dropped, and when the cache grows."""
    how = work(tiny, case)
    expected = generate(tiny, *how)
    monkeypatch.setattr(decode, "has_graphs", lambda device: True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)   # itself a context
    Recorded.made = 0
    rows = generate(tiny, *how)
    assert rows == expected
    assert Recorded.made > 1        # a new one when the tensors are new
    assert len(rows[-1][-1]) > 10   # the cache grew


def nucleus_by_sorting(p, top_p):
    """The law of the draws, (V,): tokens from the likeliest down until they have top_p together,
    and all that are as likely as the last of them."""
    top, index = p.double().sort(descending=True)
    outside = top.cumsum(0) - top >= top_p
    least = top[~outside].min()
    law = torch.where(p.double() >= least, p.double(), 0)
    return law / law.sum()


def assert_like(counts, expected):
    """By chi-square. Tokens of less than 5 expected draws are counted together."""
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 1e-6


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("case, temperature", [("few", 1.0), ("few", 2.0), ("many", 1.0),
                                               ("ties", 1.0)])
def test_sampling_follows_the_nucleus(case, temperature, top_p, tiny):
    """Against the sorted law. Ties are in the nucleus together or not at all."""
    logits = {"few": torch.tensor([0.05, 0.5, 0.3, 0.15]).log(), "many": 3 * torch.randn(2000),
              "ties": torch.randint(0, 4, (40,)).float()}[case]
    n = 1000 if case == "many" else 10000
    law = nucleus_by_sorting((logits / temperature).softmax(-1), top_p)
    tries = Sampler(tiny, Sampling(1, temperature=1.0, top_p=top_p), 1, [0]).u.shape[-1]
    u = torch.rand(n, tries, generator=torch.Generator().manual_seed(0))
    draws = sample(logits.expand(n, -1), temperature, top_p, u)
    assert_like(torch.bincount(draws, minlength=len(law)).double(), n * law)


def test_the_fast_sampler_draws_as_the_plain_one_does(tiny):
    """complete sorts; the engine rejects. The first tokens of a text follow the same law."""
    prompt, n = [5, 6, 7], 300
    law = nucleus_by_sorting((tiny(torch.tensor([prompt]))[0, -1] / 0.7).softmax(-1), 0.5)
    assert (law > 0).sum() > 5
    plain = [complete(tiny, prompt, 1, temperature=0.7, top_p=0.5, seed=seed)[0]
             for seed in range(n)]
    rows = written(tiny, [prompt], Sampling(1, n=n, temperature=0.7, top_p=0.5), range(n))
    for draws in (plain, [ids[0] for ids in rows]):
        assert_like(torch.bincount(torch.tensor(draws), minlength=264).double(), n * law)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_no_draw_leaves_the_nucleus_or_is_banned_by_rounding(u):
    """u is below 1; the greatest float32 of these is so near to it that rounding matters. There and
    at 0 the inverse of the CDF could be a token without mass."""
    logits = torch.randn(100, 1500)
    draws = sample(logits, 1.0, 0.7, torch.full((100, 7), u))
    for p, token in zip(logits.softmax(-1), draws):
        assert p[p > p[token]].sum() < 0.7
    logits[:, :9] = -torch.inf
    logits[:, -9:] = -torch.inf
    draws = sample(logits, 1.0, 1.0, torch.full((100, 1), u))
    assert (draws >= 9).all() and (draws < 1491).all()


@pytest.mark.parametrize("script, sampling, text, length, is_cut", [
    # The text is bare; the ids are what was written, to the end. EOS is 256.
    ([*b" Ab\ncd ", 256, *b"ef"], Sampling(20), "Ab\ncd", 8, False),
    (b"abcdef", Sampling(4), "abcd", 4, True),
    (b"abc\n", Sampling(4, newline_stops=True), "abc", 4, False),     # an end as the last token
    # A line break ends a text unless it comes first, if it is asked to.
    (b"\nab\ncd\n", Sampling(20, newline_stops=True), "ab", 4, False),
    (b"ab\ncd\nef", Sampling(6), "ab\ncd", 6, True)])
def test_how_a_text_ends(script, sampling, text, length, is_cut, tiny, tok, dictate):
    dictate(list(script))
    ((reply,),) = write(tiny, tok, [["q"]], sampling)
    assert reply == Reply(text, list(script[:length]), is_cut)


def test_what_a_token_holds_after_its_line_break_is_no_text(tiny, dictate):
    tok = Tokenizer({bytes([i]): i for i in range(256)} | {b".\nQ": 256}, GPT2, {})
    dictate([*b"ab", 256, *b"cd"])
    ((reply,),) = write(tiny, tok, [["q"]], Sampling(20, newline_stops=True))
    assert reply == Reply("ab.", [*b"ab", 256], cut=False)


def test_written_ids_are_those_of_generate_in_the_groups_of_their_prompts(tmp_path):
    """A chat model reads the prompt as a turn of the user's."""
    folder = make_checkpoint(tmp_path / "chat", end="<|im_end|>")
    model = load_pretrained(folder, "cpu")
    tok = Tokenizer.from_pretrained(folder)
    groups = [["Who?", "Where?"], [], ["When?"]]
    sampling = Sampling(20, n=2, temperature=1.5, top_p=0.95, newline_stops=True)
    adapters = random_adapters(model, 3)
    replies = write(model, tok, groups, sampling, range(6), adapters)
    prompts = [[tok.chat([("user", text)]) for text in group] for group in groups]
    filled = replace(sampling, stop=frozenset(tok.stop), late_stop=frozenset([ord("\n")]),
                     banned=tok.banned(model))
    expected = generate(model, prompts, filled, range(6), adapters)
    for group, rows in zip(replies, expected, strict=True):
        assert [reply.token_ids for reply in group] == rows
