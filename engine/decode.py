"""Many texts written at once: a KV cache, nucleus sampling, continuous batching, CUDA graphs.

A prompt is read once (the *prefill*), however many texts continue it, and its keys and values are
kept. Then every step reads one token per row. The rows of many adapters are decoded together, and
a row that has ended gives its place to a waiting prompt. `write` is the way in from text to text.
model.complete writes the same texts plainly and slowly, and the tests hold this file against it.

Shapes: B rows, T tokens of a ribbon, D = dim, V vocabulary, K key/value heads, E = head_dim.
"""
import math
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Iterator

import torch
import torch.nn.functional as F

from engine.device import (auto_rows, flash_attention, fused, has_flash, has_graphs, to_device,
                           try_memory)
from engine.ribbon import Ribbon, attention
from support.files import UserError


@dataclass
class Sampling:
    """How texts are continued."""
    max_new: int                    # most tokens of a continuation
    n: int = 1                      # continuations of each prompt
    temperature: float = 0.0        # 0 is greedy: always the likeliest token
    top_p: float = 1.0              # mass of the nucleus
    newline_stops: bool = False     # in `write`: a line break ends a text, unless it comes first
    max_rows: int = 0               # rows decoded side by side; 0: as many as fit
    # Ids of a vocabulary. `write` fills them in.
    stop: frozenset = frozenset()       # they end a row and are part of it
    late_stop: frozenset = frozenset()  # the same, unless they come first
    banned: torch.Tensor | None = None  # (V,) True: must not be drawn


@dataclass
class Reply:
    """What a model wrote."""
    text: str
    token_ids: list[int]    # exactly as sampled, the id that ended it included
    cut: bool               # it ran to max_new tokens without an end


def write(model, tok, groups: list[list[str]], sampling: Sampling, seeds=None, adapters=None,
          progress=None) -> Iterator[tuple[int, list[Reply]]]:
    """Continue texts, given in groups: yields (a prompt's number, its n replies) as they end.

    seeds: one for each reply, of its draws. With `adapters`, adapter i writes group i."""
    late_stop = frozenset()
    if sampling.newline_stops:
        late_stop = frozenset(i for i, token in tok.bytes.items() if b"\n" in token)
    prompts = []
    for group in groups:
        prompts.append([tok.prompt(text) for text in group])
    # Nothing is read or written beyond the window.
    window = model.config.max_len
    longest = max((len(ids) for group in prompts for ids in group), default=0)
    if longest >= window:
        raise UserError(f"a prompt has {longest} tokens; the model's window has {window}")
    sampling = replace(sampling, max_new=min(sampling.max_new, window - longest),
                       stop=frozenset(tok.stop), late_stop=late_stop, banned=tok.banned(model))
    for prompt, rows in generate(model, prompts, sampling, seeds, adapters, progress):
        replies = []
        for ids in rows:
            text = tok.decode(ids).strip()
            if sampling.newline_stops:
                text = text.split("\n")[0]
            ended = ids[-1] in sampling.stop or ids[-1] in late_stop
            replies.append(Reply(text, ids, cut=len(ids) == sampling.max_new and not ended))
        yield prompt, replies


def collect(pairs) -> list:
    """The results of a generator of (number, result), in the order of the numbers."""
    found = dict(pairs)
    return [found[number] for number in sorted(found)]


# ------------------------------------------------------------------------------- one token

def sample(logits, temperature, top_p, u):
    """One token per row from the nucleus: the tokens such that all likelier ones have less than
    top_p together.

    logits (B, V); u (B, tries), uniform in [0, 1), is the only randomness. Temperature 0 is greedy.
    Nothing is sorted, and on CUDA nothing waits."""
    if temperature == 0:
        return logits.argmax(-1)
    # Candidates from all tokens, by the inverse of the CDF.
    p = (logits.float() / temperature).softmax(-1)
    cdf = p.cumsum(-1)
    candidates = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)       # (B, tries)
    candidates = candidates.clamp(max=p.shape[-1] - 1)
    # The first candidate within the nucleus is an exact draw from it. If none is, the likeliest.
    token = p.argmax(-1)
    if p.is_cuda or has_graphs(p.device):
        # All are tested at once, as a look at what is found would wait.
        own = p.gather(-1, candidates)                                      # (B, tries)
        inside = own > 0
        if top_p < 1:
            inside &= fused(mass_above, p)(p, own) < top_p
        first = inside.int().argmax(-1, keepdim=True)
        return torch.where(inside.any(-1), candidates.gather(-1, first)[:, 0], token)
    found = torch.zeros_like(token, dtype=torch.bool)
    for candidate in candidates.unbind(1):
        own = p.gather(-1, candidate[:, None])                              # (B, 1)
        inside = own[:, 0] > 0
        if top_p < 1:
            inside &= (p * (p > own)).sum(-1) < top_p       # the mass of all that are likelier
        token = torch.where(inside & ~found, candidate, token)
        found |= inside
        if found.all():
            break
    return token


def mass_above(p, own):
    """Of each candidate, of probability own (B, tries): the mass of all likelier tokens."""
    return (p[:, None] * (p[:, None] > own[:, :, None])).sum(-1)            # (B, tries)


class Sampler:
    """Draws the tokens of `total` texts, and holds them, without a wait for the device."""

    def __init__(self, model, sampling, total, seeds):
        self.sampling = sampling
        # As masks over the vocabulary: a look-up on the device, in place of a set on the host.
        vocabulary = torch.arange(model.config.vocab_size)
        stop = torch.tensor(sorted(sampling.stop), dtype=torch.long)
        late_stop = torch.tensor(sorted(sampling.late_stop), dtype=torch.long)
        self.is_stop = to_device(torch.isin(vocabulary, stop), model.device)
        self.is_late = to_device(torch.isin(vocabulary, late_stop), model.device)
        # So many candidates leave none in the nucleus once in 10^8 draws, or more often if top_p is
        # below .1.
        tries = 1
        if sampling.top_p < 1:
            tries = min(175, math.ceil(math.log(1e-8) / math.log(1 - sampling.top_p)))
        # Text i draws from its own generator, so that it does not depend on its neighbours.
        shape = (sampling.max_new, tries)
        u = torch.zeros(0)
        if sampling.temperature:
            u = torch.zeros(total + 1, *shape)
            for i in range(total):
                generator = torch.Generator().manual_seed(seeds[i])
                u[i] = torch.rand(shape, generator=generator)
        self.u = to_device(u, model.device)
        # What is written, -1 where there is nothing. The last line, as `u`'s, is for idle rows.
        self.out = torch.full((total + 1, sampling.max_new), -1, device=model.device)


# ------------------------------------------------------------------------------- the rows

class Rows:
    """The rows that are being decoded. A row writes text after text, and may be idle.

    All that a step reads and writes is in tensors whose addresses never change. So on CUDA it is
    recorded once as a graph and then launched whole, not kernel by kernel."""

    def __init__(self, model, n, size, total, sampler):
        """n rows of `size` tokens at first, for `total` texts."""
        self.model = model
        self.sampler = sampler
        self.total = total
        # The cache: keys and values per layer, (2, n, K, size, E), and each row's tokens so far.
        # Every new size means new memory and, on CUDA, a new graph: so a little more is taken.
        c, device = model.config, model.device
        self.size = -(-size // 64) * 64
        shape = (2, n, c.n_kv_head, self.size, c.head_dim)
        self.kv = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in range(c.n_layer)]
        self.length = torch.zeros(n, dtype=torch.long, device=device)
        # Which text a row writes (`total`: it is idle), how many tokens of it, the last of them.
        self.text = torch.full((n,), total, device=device)
        self.age = torch.full((n,), 0, device=device)
        self.token = torch.full((n,), 0, device=device)
        # A graph is recorded at the second step, when every kernel has been loaded by the first.
        self.graph, self.warm = None, False

    def alive(self):
        """{row: tokens in its cache} of the rows that write. The only wait for the device.

        Afterwards `writing` says which text each of them writes."""
        text, length = torch.stack((self.text, self.length)).tolist()
        self.writing = {row: text[row] for row in range(len(text)) if text[row] < self.total}
        return {row: length[row] for row in self.writing}

    def prefill(self, prompts, places, texts):
        """Read prompts (lists of ids) and write the first token of each in its n `places`.

        texts: which text each of these places then writes."""
        # One pass over all prompts, end to end; their keys and values go to the n places of each.
        device = self.model.device
        ids = [i for prompt in prompts for i in prompt]
        ids = to_device(torch.tensor(ids), device)              # (T,)
        places = to_device(torch.tensor(places), device)        # (prompts, n)
        texts = to_device(torch.tensor(texts), device)          # (prompts * n,)
        ribbon = Ribbon([len(prompt) for prompt in prompts], device)
        # Lengths from the ribbon's own tensors, as these are on the device already.
        lengths = ribbon.last.diff(prepend=ribbon.last.new_full((1,), -1))
        self.length[places] = lengths[:, None]
        stored = places[ribbon.row]             # (T, n): the rows where each token is stored
        position = ribbon.position[:, None]     # (T, 1)

        def attend(layer, q, k, v):
            keys, values = self.kv[layer]
            keys[stored, :, position] = k[:, None]
            values[stored, :, position] = v[:, None]
            return ribbon.attend(layer, q, k, v)

        # The n texts of a prompt begin from the same hidden state, and draw their own tokens.
        h = self.model.hidden(ids, ribbon.position, attend)
        rows = places.flatten()
        self.text[rows] = texts
        self.age[rows] = torch.zeros_like(texts)
        self.append(rows, h[ribbon.last].repeat_interleave(places.shape[1], 0))

    def append(self, rows, h):
        """Choose a token in each of these rows from its last hidden state h (rows, D)."""
        sampler, sampling = self.sampler, self.sampler.sampling
        text, age = self.text[rows], self.age[rows]
        logits = self.model.lm_head(h)
        if sampling.banned is not None:
            logits = logits.masked_fill(sampling.banned, -torch.inf)
        u = sampler.u[text, age] if sampling.temperature else None
        token = sample(logits, sampling.temperature, sampling.top_p, u)
        sampler.out[text, age] = token
        self.token[rows] = token
        # Who has ended is idle from now on.
        late = sampler.is_late[token] & (age > 0)
        ended = sampler.is_stop[token] | late | (age == sampling.max_new - 1)
        self.text[rows] = text.masked_fill(ended, self.total)
        self.age[rows] = (age + 1).masked_fill(ended, 0)

    def to_cache(self):
        """An `attend` for one new token per row: store its k, v (B, K, E), attend to all so far."""
        _, B, K, size, E = self.kv[0].shape
        row = torch.arange(B, device=self.length.device)
        flash = has_flash(self.kv[0])
        if flash:
            # Each key head is a sequence of its own, of which only what is seen is read.
            begin = torch.arange(B * K + 1, dtype=torch.int32, device=row.device)
            bounds = [begin, begin * size]
            seen = (self.length + 1).int().repeat_interleave(K)
        else:
            # What lies beyond a row's own tokens is masked out: the same in all layers.
            unseen = torch.arange(size, device=row.device) > self.length[:, None]
            mask = torch.zeros(unseen.shape, dtype=self.kv[0].dtype, device=row.device)
            mask = mask.masked_fill_(unseen, -torch.inf)[:, None, None]     # (B, 1, 1, size)

        def attend(layer, q, k, v):
            keys, values = self.kv[layer]
            keys[row, :, self.length] = k
            values[row, :, self.length] = v
            if flash:
                y = flash_attention(q.reshape(B * K, -1, E), keys.view(-1, 1, E),
                                    values.view(-1, 1, E), bounds, [1, size], causal=False,
                                    seen=seen)
                return y.view(q.shape)
            # Query heads that share a key head take the place of query positions: (B, K, H/K, E).
            q = q.view(len(q), k.shape[1], -1, q.shape[-1])
            return attention(q, keys, values, mask).flatten(1, 2)
        return attend

    def forward(self):
        """A step as it is: one token more in every row."""
        h = self.model.hidden(self.token, self.length, self.to_cache())
        self.length.add_(1).clamp_(max=self.size - 1)   # idle rows go on and on
        self.append(slice(None), h)

    def step(self):
        """A step, as a graph where there are graphs."""
        if has_graphs(self.model.device) and self.warm and not self.graph:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, and runs nothing
                self.forward()
        if self.graph:
            self.graph.replay()
        else:
            self.forward()
        self.warm = True

    def keep(self, rows, size):
        """Drop all but the given rows (a list). Make room for `size` tokens in each."""
        # By a quarter at least, so that a text of a thousand tokens grows a few times only.
        more = 0
        if size > self.size:
            larger = max(size, self.size * 5 // 4)
            more = -(-larger // 64) * 64 - self.size
        self.size += more
        rows = to_device(torch.tensor(rows), self.model.device)
        self.length, self.token = self.length[rows], self.token[rows]
        self.text, self.age = self.text[rows], self.age[rows]
        # Layer by layer, so that the old cache and the new one are not there together.
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = F.pad(kv[:, rows], (0, 0, 0, more))
        self.graph, self.warm = None, False     # the tensors are new ones


# ------------------------------------------------------------------------------- many texts

@dataclass
class Grid:
    """Who sits where: `per` rows for each adapter, side by side; row p belongs to p // per."""
    queues: list[deque]     # for each adapter, the numbers of the prompts that wait for it
    n: int                  # rows that continue a prompt, side by side
    per: int

    def admit(self, prompts, alive, most):
        """Idle rows take waiting prompts of their adapter, until `most` tokens are to be read: a
        list of (prompt's number, adapter, the n rows that continue it)."""
        admitted, tokens = [], 0
        for adapter, queue in enumerate(self.queues):
            # The n rows of a prompt are taken together, as one pass writes to all of them.
            own = range(adapter * self.per, (adapter + 1) * self.per)
            idle = [row for row in own if row not in alive]
            while queue and len(idle) >= self.n and tokens < most:
                places, idle = idle[:self.n], idle[self.n:]
                admitted.append((queue[0], adapter, places))
                tokens += len(prompts[queue.popleft()])
        return admitted

    def fold(self, alive, must):
        """The rows to keep, those alive first: fewer for each adapter if at least half of them will
        stay idle. None if it is all of them, and none `must` be moved."""
        adapters = range(len(self.queues))
        owned = [range(i * self.per, (i + 1) * self.per) for i in adapters]
        busiest = max(sum(row in alive for row in rows) for rows in owned)
        if busiest <= self.per // 2 and not any(self.queues):
            self.per = busiest
        elif not must:
            return None
        kept = []
        for rows in owned:
            kept += sorted(rows, key=lambda row: row not in alive)[:self.per]
        return kept


@torch.inference_mode()
def generate(model, groups: list[list[list[int]]], sampling: Sampling, seeds=None, adapters=None,
             progress=None) -> Iterator[tuple[int, list[list[int]]]]:
    """Continue prompts (lists of ids), given in groups: yields (a prompt's number, its n rows of
    new ids) as they end.

    Row i of all draws from its own generator, seeded seeds[i]. With `adapters` (lora.Adapters),
    group i is read under adapter i. progress(done, total) is called with the rows that have ended.
    If memory runs out, unfinished texts restart with half as many rows; the result is the same."""
    prompts, owner = [], []         # owner: whose adapter reads a prompt
    for i, group in enumerate(groups):
        prompts += group
        owner += [i if adapters else 0] * len(group)
    assert all(prompts), "empty prompt"
    if not prompts:
        return

    n, total = sampling.n, len(prompts) * sampling.n
    sampler = Sampler(model, sampling, total, seeds)
    max_rows = sampling.max_rows or auto_rows(model, max(map(len, prompts)) + sampling.max_new)
    pending = range(len(prompts))   # not all of whose rows have ended
    while pending:
        writing = decode(model, prompts, pending, owner, sampler, adapters, max_rows)
        ok, seen = try_memory(lambda: next(writing, None))
        while seen:
            unfinished, left = seen
            ended = sorted(set(pending) - set(unfinished))
            pending = unfinished
            for prompt in ended:
                lines = sampler.out[prompt * n:prompt * n + n].tolist()
                yield prompt, [[i for i in line if i >= 0] for line in lines]
            if progress and left < total:
                progress(total - left, total)
            ok, seen = try_memory(lambda: next(writing, None))
        if not ok:
            if max_rows <= n:
                raise UserError("out of memory with a single text; try shorter ones")
            max_rows = max(n, min(max_rows, len(pending) * n) // 2)
            print(f"out of memory: going on with {max_rows} rows side by side", flush=True)
            for prompt in pending:      # its texts are to be written again
                sampler.out[prompt * n:prompt * n + n] = -1


def decode(model, prompts, pending, owner, sampler, adapters, max_rows):
    """Write the texts of the pending prompts (their numbers), about max_rows rows side by side.

    Yields what is pending and how many rows are left, at every look at what has ended."""
    # Prompts wait for their adapter, in their order.
    queues = [deque() for _ in range(adapters.n if adapters else 1)]
    for prompt in pending:
        queues[owner[prompt]].append(prompt)

    # Steps between two looks at what has ended; tokens read at once; room in the cache at first. On
    # CUDA a look is a wait, and a larger cache means a new graph: it holds a short answer at once.
    n, total = sampler.sampling.n, len(prompts) * sampler.sampling.n
    steps, most, ahead = 1, 2048, 1
    if model.device.type == "cuda":
        steps, most, ahead = 16, 65536, max(16, min(128, sampler.sampling.max_new))
    at_once = max_rows // len(queues) // n      # prompts of each adapter side by side
    grid = Grid(queues, n, per=n * max(1, min(at_once, max(map(len, queues)))))
    longest = max(len(prompts[prompt]) for prompt in pending)
    rows = Rows(model, grid.per * len(queues), longest + ahead, total, sampler)

    # Which tokens or rows belong to which adapter; without adapters it changes nothing.
    route = adapters.route if adapters else nullcontext
    decoding = route([grid.per] * len(queues))
    while True:
        alive = rows.alive()
        unfinished = {text // n for text in rows.writing.values()}
        for queue in queues:
            unfinished.update(queue)
        yield sorted(unfinished), len(alive) + n * sum(map(len, queues))
        if not unfinished:
            return

        # Rows that are idle take waiting prompts.
        admitted = grid.admit(prompts, alive, most)
        if admitted:
            tokens, texts = [0] * len(queues), []
            for prompt, adapter, places in admitted:
                tokens[adapter] += len(prompts[prompt])
                texts += range(prompt * n, prompt * n + n)
                alive |= dict.fromkeys(places, len(prompts[prompt]))
            with route(tokens):
                rows.prefill([prompts[prompt] for prompt, *_ in admitted],
                             [places for *_, places in admitted], texts)

        # Make room for the next tokens. Fold the grid when half of it is idle.
        room = max(alive.values()) + steps + 1
        kept = grid.fold(alive, must=room > rows.size)
        if kept:
            rows.keep(kept, room)
            decoding = route([grid.per] * len(queues))
        with decoding:
            for _ in range(steps):
                rows.step()
