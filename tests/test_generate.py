"""Many texts at once are the texts that the model writes one by one, and in fewer steps."""
import contextlib
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import decode
from engine.decode import Reply, Sampling, sample, tries_for, write
from lora import Adapters, Lora
from model import complete, load_pretrained
from support.files import UserError
from support.tokenizer import GPT2, Tokenizer
from tests.helpers import CASES
from tests.make_checkpoint import make_checkpoint

LORA = Lora(rank=8, alpha=16, targets=["q_proj", "up_proj"])
STOP = frozenset(range(0, 264, 12))     # one id in twelve: rows end at different times


def written(model, prompts, sampling, seeds=None):
    """The rows of one group of prompts, without adapters."""
    (rows,) = decode.generate(model, [prompts], sampling, seeds)
    return rows


def random_adapters(model, n):
    adapters = Adapters(model, LORA, n)
    adapters.flat.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return adapters


@pytest.fixture()
def widths(monkeypatch):
    """How many rows each step of decoding has, in a list that grows."""
    counts = []
    forward = decode.Rows.forward

    def counted(rows):
        counts.append(len(rows.text))
        forward(rows)
    monkeypatch.setattr(decode.Rows, "forward", counted)
    return counts


@pytest.fixture()
def dictate(monkeypatch):
    """A function: from then on any model writes these ids, text after text, whatever it reads."""
    def script(*texts):
        ids = torch.zeros(len(texts) + 1, 64, dtype=torch.long)     # the last is for idle rows
        for i, text in enumerate(texts):
            ids[i, :len(text)] = torch.tensor(text)

        def choose(sampler, logits, text, age):
            return ids[text, age]
        monkeypatch.setattr(decode.Sampler, "choose", choose)
    return script


# ------------------------------------------------------------------------------- greedy

@pytest.fixture(scope="module", params=CASES)
def model(request, tmp_path_factory):
    """A random model of every kind. Biases begin as 0 and norms as 1: here they matter."""
    torch.manual_seed(1)
    reference = CASES[request.param]()
    for p in reference.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    reference.save_pretrained(folder)
    return load_pretrained(folder, "cpu")


def test_cached_generation_equals_full_forward(model):
    prompts = []
    for length in (5, 33, 2, 250):      # 250 + 40 crosses a block of the cache
        prompts.append(torch.randint(0, 320, (length,)).tolist())
    sampling = Sampling(40, stop=frozenset([3, 50, 77, *range(200, 205)]))
    expected = [complete(model, prompt, 40, sampling.stop) for prompt in prompts]

    together = written(model, prompts, sampling)
    waiting = written(model, prompts, replace(sampling, max_rows=3))
    repeated = written(model, prompts, replace(sampling, n=3))

    assert together == expected
    assert waiting == expected
    for i, row in enumerate(repeated):
        assert row == expected[i // 3]
    for prompt, row in zip(prompts, expected):
        assert written(model, [prompt], sampling) == [row]


def test_finished_rows_make_room(tiny, widths):
    """Rows end at very different times; the grid is folded, and nothing is mixed up."""
    prompts = [[i, i + 1, 7] for i in range(20)]
    whole = [complete(tiny, prompt, 60) for prompt in prompts]
    stop = frozenset([whole[0][1], whole[1][3], whole[2][20], whole[3][40]])

    rows = written(tiny, prompts, Sampling(60, stop=stop, max_rows=20))

    assert rows == [complete(tiny, prompt, 60, stop) for prompt in prompts]
    assert widths[0] == 20
    assert widths[-1] <= 10


def test_a_stop_id_ends_a_row_and_is_part_of_it(tiny, dictate):
    dictate([5, 9, 5, 3], [9, 5, 3])

    rows = written(tiny, [[1], [2]], Sampling(4, stop=frozenset([5])))

    assert rows == [[5], [9, 5]]


def test_a_late_stop_does_not_end_a_row_at_once(tiny, dictate):
    dictate([5, 9, 5, 3], [5, 5, 3], [9, 5, 3])

    rows = written(tiny, [[1], [2], [3]], Sampling(4, late_stop=frozenset([5])))

    assert rows == [[5, 9, 5], [5, 5], [9, 5]]


def test_an_empty_prompt_is_refused(tiny):
    with pytest.raises(AssertionError, match="empty prompt"):
        written(tiny, [[1], []], Sampling(4))


# ------------------------------------------------------------------------------- groups

def test_rows_come_back_in_the_groups_of_their_prompts(tiny):
    flat = written(tiny, [[1], [2, 3], [4]], Sampling(6, n=2))

    groups = decode.generate(tiny, [[[1], [2, 3]], [], [[4]]], Sampling(6, n=2))

    assert groups == [flat[:4], [], flat[4:]]
    assert decode.generate(tiny, [[], []], Sampling(6)) == [[], []]


def test_progress_hears_how_many_rows_have_ended(tiny):
    heard = []

    def progress(done, total):
        heard.append((done, total))

    prompts = [[i, 7] for i in range(6)]
    sampling = Sampling(30, n=2, temperature=1.0, max_rows=4, stop=STOP)

    list(decode.generate_each(tiny, [prompts], sampling, range(12), progress=progress))

    assert heard == sorted(heard)
    assert heard[0][0] < 12
    assert heard[-1] == (12, 12)
    for _, total in heard:
        assert total == 12


def test_ended_rows_give_their_place_to_waiting_prompts(tiny, widths):
    """Two rows a prompt, six at a time: the same as one by one, and in far fewer steps than batch
    after batch."""
    prompts = []
    for i in range(20):
        prompts.append([i, 3 * i + 1] * (1 + i % 5))
    one = Sampling(60, temperature=1.0, top_p=0.9, stop=STOP)

    rows = written(tiny, prompts, replace(one, n=2, max_rows=7), range(40))
    steps = len(widths)
    assert max(widths) == 6

    # A batch takes as many steps as its longest row has tokens.
    lengths = [len(row) for row in rows]
    batch_after_batch = 0
    for i in range(0, 40, 6):
        batch_after_batch += max(lengths[i:i + 6])
    assert min(lengths) < 5
    assert steps < 0.8 * batch_after_batch
    assert sum(lengths) <= 6 * steps + 40   # the first token of each is the prefill's
    for i, row in enumerate(rows):
        alone = written(tiny, [prompts[i // 2]], one, [i])
        assert alone == [row]


def test_questions_of_many_adapters_in_few_rows(tiny):
    """Adapters with no prompt to four, two rows for each: a grid with holes, refilled, folded."""
    adapters = random_adapters(tiny, 4)
    groups = [
        [[0, 5, 9]],
        [[1, 5, 9], [2, 5, 18], [3, 5, 27], [4, 5, 36]],
        [],
        [[5, 5, 45], [6, 5, 54]]]
    sampling = Sampling(40, max_rows=8, stop=STOP)

    together = decode.generate(tiny, groups, sampling, adapters=adapters)

    for weights, prompts, rows in zip(adapters.flat, groups, together):
        own = Adapters.stack(tiny, LORA, [weights])
        assert len(rows) == len(prompts)
        for prompt, row in zip(prompts, rows):
            alone = decode.generate(tiny, [[prompt]], sampling, adapters=own)
            assert alone == [[row]]
    assert together != decode.generate(tiny, groups, sampling)


# ------------------------------------------------------------------------------- little memory

@pytest.fixture()
def room_for(monkeypatch):
    """A function: from then on the device is full when more rows than that take a step."""
    def limit(most, error=torch.OutOfMemoryError("CUDA out of memory")):
        forward = decode.Rows.forward

        def limited(rows):
            if len(rows.text) > most:
                raise error
            forward(rows)
        monkeypatch.setattr(decode.Rows, "forward", limited)
    return limit


def test_out_of_memory_halves_the_rows_and_changes_nothing(tiny, room_for, capsys):
    prompts = [[i, 3 * i + 1] * (1 + i % 5) for i in range(12)]
    sampling = Sampling(40, n=2, temperature=1.0, top_p=0.9, stop=STOP, max_rows=16)
    expected = written(tiny, prompts, sampling, seeds=range(24))

    room_for(4)
    heard = []
    each = decode.generate_each(tiny, [prompts], sampling, range(24),
                                progress=lambda done, total: heard.append((done, total)))
    (rows,) = decode.in_groups(each, [prompts])

    assert rows == expected
    assert heard[-1] == (24, 24)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["out of memory: going on with 8 rows side by side",
                     "out of memory: going on with 4 rows side by side"]


def test_what_has_ended_is_not_written_again(tiny, monkeypatch):
    """The device is full at the 20th step: texts that have ended by then are read once."""
    prompts = [[i, i + 1] for i in range(10)]
    sampling = Sampling(40, stop=STOP, max_rows=10)
    expected = written(tiny, prompts, sampling)
    ended = sum(len(row) < 18 for row in expected)
    steps, read = [], []
    forward, prefill = decode.Rows.forward, decode.Rows.prefill

    def full_once(rows):
        steps.append(1)
        if len(steps) == 20:
            raise MemoryError
        forward(rows)

    def counted(rows, some, places, texts):
        read.append(len(some))
        prefill(rows, some, places, texts)
    monkeypatch.setattr(decode.Rows, "forward", full_once)
    monkeypatch.setattr(decode.Rows, "prefill", counted)

    assert written(tiny, prompts, sampling) == expected
    assert ended > 2
    assert 10 < sum(read) <= 20 - ended


def test_adapters_with_little_memory_answer_the_same(tiny, room_for):
    adapters = random_adapters(tiny, 3)
    groups = [[[1, 2], [3, 4]], [[5, 6]], [[7, 8], [9, 1]]]
    sampling = Sampling(20, stop=STOP, max_rows=6)
    expected = decode.generate(tiny, groups, sampling, adapters=adapters)

    room_for(3)

    assert decode.generate(tiny, groups, sampling, adapters=adapters) == expected


def test_no_room_for_a_single_text_is_one_line(tiny, room_for):
    room_for(0)

    with pytest.raises(UserError, match="out of memory with a single text"):
        written(tiny, [[1, 2]], Sampling(5))


def test_an_error_of_another_kind_is_no_lack_of_memory(tiny, room_for):
    room_for(0, RuntimeError("shapes differ"))

    with pytest.raises(RuntimeError, match="shapes differ"):
        written(tiny, [[1, 2]], Sampling(5))


# ------------------------------------------------------------------------------- graphs

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


@contextlib.contextmanager
def recorded_steps():
    """As if the CPU had CUDA graphs."""
    Recorded.made = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "has_graphs", lambda device: True)
        patch.setattr(torch.cuda, "CUDAGraph", Recorded)
        patch.setattr(torch.cuda, "graph", lambda graph: graph)     # itself a context
        yield


def test_a_step_can_be_a_graph(tiny):
    """All that changes from step to step lies in tensors that stay where they are: to replay what
    one step did gives what running it gives. So it is when rows are refilled and dropped, and when
    the cache grows."""
    prompts = [[i, i + 1] for i in range(9)]
    prompts.append([7] * 250)   # the cache has 256 tokens at first
    sampling = Sampling(50, n=2, temperature=1.0, top_p=0.9, max_rows=8, stop=STOP)
    expected = written(tiny, prompts, sampling, range(20))

    with recorded_steps():
        rows = written(tiny, prompts, sampling, range(20))

    assert rows == expected
    assert Recorded.made > 1    # a new one when the tensors are new
    assert len(rows[-1]) > 10   # the cache grew


def test_a_step_of_many_adapters_can_be_a_graph(tiny):
    prompts = [[i, i + 1] for i in range(9)]
    prompts.append([7] * 250)   # the cache has 256 tokens at first
    groups = [prompts[:5], prompts[5:]]
    adapters = random_adapters(tiny, 2)
    sampling = Sampling(50, max_rows=6, stop=STOP)
    expected = decode.generate(tiny, groups, sampling, adapters=adapters)

    with recorded_steps():
        rows = decode.generate(tiny, groups, sampling, adapters=adapters)

    assert rows == expected
    assert Recorded.made > 1
    assert len(rows[1][-1]) > 10


# ------------------------------------------------------------------------------- sampling

def draw(logits, temperature, top_p):
    """A token per row of logits, with fresh u."""
    u = torch.rand(len(logits), tries_for(top_p), generator=torch.Generator().manual_seed(0))
    return sample(logits, temperature, top_p, u)


def nucleus_by_sorting(p, top_p):
    """The law of the draws, (V,): tokens from the likeliest down until they have top_p together,
    and all that are as likely as the last of them."""
    top, index = p.double().sort(descending=True)
    outside = top.cumsum(0) - top >= top_p
    least = top[~outside].min()
    law = torch.where(p.double() >= least, p.double(), 0)
    return law / law.sum()


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("case", ["few", "many", "ties"])
def test_sampling_follows_the_nucleus(case, top_p):
    """Against the sorted law, by chi-square. Ties are in the nucleus together or not at all."""
    g = torch.Generator().manual_seed(1)
    logits = {"few": torch.tensor([0.05, 0.5, 0.3, 0.15]).log(),
              "many": 3 * torch.randn(5000, generator=g),
              "ties": torch.randint(0, 4, (40,), generator=g).float()}[case]
    n = 2000 if case == "many" else 20000
    law = nucleus_by_sorting(logits.softmax(-1), top_p)

    draws = draw(logits.expand(n, -1), 1.0, top_p)

    counts = torch.bincount(draws, minlength=len(law)).double()
    assert counts[law == 0].sum() == 0
    # Tokens of less than 5 expected draws are counted together.
    expected = n * law
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(counts) - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 1e-6


def test_a_temperature_flattens():
    logits = torch.tensor([[0.0, 2.0]]).expand(4000, -1)
    u = (torch.arange(4000)[:, None] + 0.5) / 4000

    share = sample(logits, 2.0, 1.0, u).float().mean()

    torch.testing.assert_close(share, torch.tensor(1.0).sigmoid(), atol=1e-3, rtol=0)


def test_a_nucleus_is_never_empty():
    """The likeliest token is in it, even if none of the candidates is."""
    logits = torch.tensor([[0.1, 0.3, 0.2]])

    assert sample(logits, 1.0, 1e-9, torch.full((1, 3), 0.999)).tolist() == [1]
    assert tries_for(1e-9) == 175


def test_the_first_candidate_within_the_nucleus_is_drawn():
    logits = torch.tensor([[0.05, 0.5, 0.3, 0.15]]).log()
    # The CDF is .05, .55, .85, 1: these are tokens 0, 3, 1, 2, of which 1 and 2 have .7.
    u = torch.tensor([[0.01, 0.9, 0.1, 0.6]])

    assert sample(logits, 1.0, 0.7, u).tolist() == [1]
    assert sample(logits, 1.0, 0.9, u).tolist() == [3]
    assert sample(logits, 1.0, 1.0, u).tolist() == [0]


def test_no_draw_leaves_the_nucleus():
    """u is below 1; the greatest float32 of these is near enough to it for rounding to matter."""
    logits = torch.randn(200, 1500)
    u = torch.full((200, 7), 1 - 2**-24)
    u[100:] = 0

    draws = sample(logits, 1.0, 0.7, u)

    for p, token in zip(logits.softmax(-1), draws):
        assert p[p > p[token]].sum() < 0.7


def test_a_banned_token_is_not_drawn_by_rounding():
    """At u = 0 and next to 1 the inverse of the CDF could be a token without mass."""
    logits = torch.randn(50, 1500)
    logits[:, :9] = -torch.inf
    logits[:, -9:] = -torch.inf

    for u in (0.0, 1 - 2**-24):
        draws = sample(logits, 1.0, 1.0, torch.full((50, 1), u))
        assert (draws >= 9).all() and (draws < 1491).all()


def test_temperature_0_is_greedy():
    logits = torch.zeros(2, 5000)
    logits[0, 7] = 1
    logits[1, 4999] = 1

    assert sample(logits, 0.0, 0.95, None).tolist() == [7, 4999]


def test_sampled_rows_do_not_depend_on_neighbours(tiny):
    prompts = [[1, 2, 3], [9, 8], [4] * 30]
    seeds = [11, 12, 13, 14, 15, 16]
    one = Sampling(30, temperature=1.0, top_p=0.95, stop=frozenset([256]))

    rows = written(tiny, prompts, replace(one, n=2), seeds)

    for i, row in enumerate(rows):
        alone = written(tiny, [prompts[i // 2]], one, [seeds[i]])
        assert alone == [row]
    different = {tuple(row) for row in rows}
    assert len(different) == 6


def test_banned_ids_are_never_sampled(tiny):
    banned = torch.ones(264, dtype=torch.bool)
    banned[[65, 66]] = False
    sampling = Sampling(50, n=4, temperature=2.0, banned=banned)

    rows = written(tiny, [[1]], sampling, range(4))

    assert set(sum(rows, [])) == {65, 66}


# ------------------------------------------------------------------------------- texts

def test_a_text_that_ends_is_not_cut(tiny, tok, dictate):
    dictate([*b" Ab\ncd ", tok.eos, *b"ef"])

    ((reply,),) = write(tiny, tok, [["q"]], Sampling(20))

    # The text is bare; the ids are what was written, to the end.
    assert reply == Reply("Ab\ncd", [*b" Ab\ncd ", tok.eos], cut=False)


def test_a_text_without_an_end_is_cut(tiny, tok, dictate):
    dictate(list(b"abcdef"))

    ((reply,),) = write(tiny, tok, [["q"]], Sampling(4))

    assert reply == Reply("abcd", list(b"abcd"), cut=True)


def test_a_text_that_ends_with_its_last_token_is_not_cut(tiny, tok, dictate):
    dictate([*b"abc", tok.eos], list(b"abc\n"))

    ((first, second),) = write(tiny, tok, [["q", "r"]], Sampling(4, newline_stops=True))

    assert first == Reply("abc", [*b"abc", tok.eos], cut=False)
    assert second == Reply("abc", list(b"abc\n"), cut=False)


def test_a_line_break_ends_a_text_unless_it_comes_first(tiny, tok, dictate):
    dictate(list(b"\nab\ncd\n"))

    ((reply,),) = write(tiny, tok, [["q"]], Sampling(20, newline_stops=True))

    assert reply == Reply("ab", list(b"\nab\n"), cut=False)


def test_a_line_break_ends_nothing_by_itself(tiny, tok, dictate):
    dictate(list(b"ab\ncd\nef"))

    ((reply,),) = write(tiny, tok, [["q"]], Sampling(6))

    assert reply == Reply("ab\ncd", list(b"ab\ncd\n"), cut=True)


def test_what_a_token_holds_after_its_line_break_is_no_text(tiny, dictate):
    vocabulary = {bytes([i]): i for i in range(256)}
    vocabulary[b".\nQ"] = 256
    tok = Tokenizer(vocabulary, GPT2, {})
    dictate([*b"ab", 256, *b"cd"])

    ((reply,),) = write(tiny, tok, [["q"]], Sampling(20, newline_stops=True))

    assert reply == Reply("ab.", [*b"ab", 256], cut=False)


def test_replies_come_back_in_the_groups_of_their_prompts(tiny, tok, dictate):
    dictate([*b"a", tok.eos], [*b"b", tok.eos], [*b"c", tok.eos], [*b"d", tok.eos])

    groups = write(tiny, tok, [["q"], [], ["r"]], Sampling(5, n=2))

    first, second, third = groups
    assert [reply.text for reply in first] == ["a", "b"]
    assert second == []
    assert [reply.text for reply in third] == ["c", "d"]


def test_written_ids_are_those_of_generate(tmp_path):
    """A chat model reads the prompt as a turn of the user's."""
    folder = make_checkpoint(tmp_path / "chat", end="<|im_end|>")
    model = load_pretrained(folder, "cpu")
    tok = Tokenizer.from_pretrained(folder)
    groups = [["Who?", "Where?"], ["When?"]]
    sampling = Sampling(20, n=2, temperature=1.5, top_p=0.95, newline_stops=True)
    adapters = random_adapters(model, 2)

    replies = write(model, tok, groups, sampling, range(6), adapters)

    prompts = [
        [tok.chat([("user", "Who?")]), tok.chat([("user", "Where?")])],
        [tok.chat([("user", "When?")])]]
    filled = replace(sampling, stop=frozenset(tok.stop), late_stop=frozenset(tok.newlines()),
                     banned=tok.banned(model))
    expected = decode.generate(model, prompts, filled, range(6), adapters)
    for group, rows in zip(replies, expected, strict=True):
        assert [reply.token_ids for reply in group] == rows


def test_ids_beyond_the_vocabulary_are_never_written(tiny, tok):
    """The model has 264 and the vocabulary 259."""
    sampling = Sampling(200, n=4, temperature=5.0)

    (replies,) = write(tiny, tok, [["q"]], sampling, range(4))
    ids = set()
    for reply in replies:
        ids.update(reply.token_ids)

    assert len(ids) > 100
    assert max(ids) <= 258


def test_the_program_writes_the_same_both_ways(tiny_folder, monkeypatch, capsys):
    words = ["--model", str(tiny_folder), "--rows", "3", "--max-new", "8"]
    monkeypatch.setattr(sys, "argv", ["generate.py", *words])

    decode.main()

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 texts of 8 tokens"
    assert lines[1].startswith("model.complete ")
    assert lines[2].endswith("3 of 3 texts the same")
