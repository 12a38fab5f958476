"""Generation: a KV cache, nucleus sampling, rows that refill, CUDA graphs."""
from collections import deque
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from model import Ribbon, free_memory, to_device


class Cache:
    """Keys and values of so many rows, per layer (rows, K, size, E)."""

    def __init__(self, model, rows, size):
        c, self.size = model.config, round_up(size, 64)
        zeros = lambda: torch.zeros(rows, c.n_kv_head, self.size, c.head_dim,
                                    dtype=model.dtype, device=model.device)
        self.kv = [(zeros(), zeros()) for _ in range(c.n_layer)]
        self.length = torch.zeros(rows, dtype=torch.long, device=model.device)  # tokens so far

    def prefill(self, ribbon, places):
        """An `attend` that stores prompt i's keys and values in the rows places[i] (n, copies)."""
        self.length[places] = ribbon.last.diff(prepend=ribbon.last.new_tensor([-1]))[:, None]
        rows, position = places[ribbon.row], ribbon.position[:, None]  # (T, copies), (T, 1)

        def attend(layer, q, k, v):
            for cache, new in zip(self.kv[layer], (k, v)):
                cache[rows, :, position] = new[:, None]
            return ribbon.attend(layer, q, k, v)
        return attend

    def step(self):
        """An `attend` for one new token per row: store its k, v (rows, K, E), attend to all so far.
        """
        row = torch.arange(len(self.length), device=self.length.device)
        unseen = torch.arange(self.size, device=row.device) > self.length[:, None]
        mask = torch.zeros(unseen.shape, dtype=self.kv[0][0].dtype, device=row.device)
        mask = mask.masked_fill_(unseen, -torch.inf)[:, None, None]  # (rows, 1, 1, size)

        def attend(layer, q, k, v):
            K, V = self.kv[layer]
            K[row, :, self.length], V[row, :, self.length] = k, v
            q = q.view(len(q), k.shape[1], -1, q.shape[-1])  # heads that share a key: the L axis
            return F.scaled_dot_product_attention(q, K, V, mask).flatten(1, 2)
        return attend

    def keep(self, rows, size):
        """Drop all but the given rows (LongTensor); make room for `size` tokens in each."""
        more = 0
        if size > self.size:
            more = round_up(max(size, self.size * 5 // 4), 64) - self.size
        self.size, self.length = self.size + more, self.length[rows]
        self.kv = [tuple(F.pad(t[rows], (0, 0, 0, more)) for t in kv) for kv in self.kv]


def round_up(n, block):
    return -(-n // block) * block


def sample(logits, temperature, top_p, u):
    """One token per row from the nucleus, the likeliest tokens whose mass reaches top_p.

    logits (B, V); u (B,), uniform in [0, 1), is the only randomness. Temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    top, index = p.topk(min(1024, p.shape[-1]))  # on a CPU ten times faster than sorting all
    if top.shape[-1] < p.shape[-1] and (p.is_cuda or (top.sum(-1) < top_p).any()):
        top, index = p.sort(-1, descending=True)
    before = top.cumsum(-1) - top
    mass = (top * (before < top_p)).cumsum(-1)  # cut a token if those before it reach top_p
    pick = (mass < u[:, None] * mass[:, -1:]).sum(-1, keepdim=True)  # the inverse of the CDF, at u
    return index.gather(-1, pick)[:, 0]


class Rows:
    """The rows being decoded. All that a step reads and writes is in tensors that stay where they
    are: on CUDA it is recorded once as a graph, and then launched whole, not kernel by kernel."""

    def __init__(self, model, n, size, total, max_new, choose, ends):
        """n rows of `size` tokens at first. choose: (logits, output row, age) -> token;
        ends: (token, age) -> bool."""
        new = lambda *shape, value=0: torch.full(shape, value, device=model.device)
        self.model, self.choose, self.ends = model, choose, ends
        self.cache, self.graph, self.warm = Cache(model, n, size), None, False
        self.out = new(total + 1, max_new, value=-1)  # the last row takes what idle rows write
        self.row = new(n, value=total)                # (n,) where in `out` a row writes
        self.age, self.token = new(n), new(n)         # (n,) tokens written, the last of them

    def write(self, at, h):
        """Choose a token in the rows `at` from their last hidden states h (rows, D)."""
        row, age = self.row[at], self.age[at]
        token = self.choose(self.model.lm_head(h), row, age)
        self.out[row, age] = self.token[at] = token
        over = self.ends(token, age)
        self.row[at] = row.masked_fill(over, len(self.out) - 1)
        self.age[at] = (age + 1).masked_fill(over, 0)

    def prefill(self, ids, ribbon, places, row):
        """Read prompts, and write the first token of each into its `places` (prompts, n)."""
        h = self.model.hidden(ids, ribbon.position, self.cache.prefill(ribbon, places))
        at = places.flatten()
        self.row[at], self.age[at] = row, torch.zeros_like(row)
        self.write(at, h[ribbon.last].repeat_interleave(places.shape[1], 0))

    def forward(self):
        h = self.model.hidden(self.token, self.cache.length, self.cache.step())
        self.cache.length.add_(1).clamp_(max=self.cache.size - 1)  # idle rows go on and on
        self.write(slice(None), h)

    def step(self):
        """One token more in every row."""
        if has_graphs(self.model.device) and self.warm and not self.graph:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, and runs nothing
                self.forward()
        self.graph.replay() if self.graph else self.forward()
        self.warm = True

    def keep(self, rows, size):
        """Drop all but the given rows (LongTensor); make room for `size` tokens in each."""
        self.cache.keep(rows, size)
        self.row, self.age, self.token = self.row[rows], self.age[rows], self.token[rows]
        self.graph, self.warm = None, False


def has_graphs(device):
    return device.type == "cuda"


def auto_rows(model, length):
    """How many rows of `length` tokens to decode side by side: a third of the free memory."""
    c = model.config
    per_row = 2 * c.n_layer * c.n_kv_head * c.head_dim * length * model.dtype.itemsize  # bytes
    return max(1, min(256, free_memory(model.device) // 3 // per_row))


@torch.inference_mode()
def generate(model, prompts, max_new, stop, n=1, temperature=0.0, top_p=1.0, seeds=None,
             late_stop=(), banned=None, adapters=None, slots=None, max_rows=None,
             progress=lambda done, total: None):
    """Continue each prompt (a list of ids) n times: len(prompts) * n lists of new ids.

    Greedy at temperature 0, else from the nucleus, and row i draws from its own generator, seeded
    seeds[i]: its text does not depend on its neighbours. `stop` ids end a row and are part of it;
    `late_stop` ids too, unless they come first. `banned` (V,) marks ids that must not be drawn.
    With `adapters` (lora.Adapters), prompt j is read under slot slots[j].
    About `max_rows` rows are decoded at a time; one that has ended gives its place to a waiting
    prompt: continuous batching. `progress` hears how many have ended."""
    assert all(prompts), "empty prompt"
    if not prompts:
        return []
    device, total, longest = model.device, len(prompts) * n, max(map(len, prompts))
    is_stop, is_late = (to_device(torch.zeros(model.config.vocab_size, dtype=torch.bool).index_fill(
        0, torch.tensor(list(ids), dtype=torch.long), True), device) for ids in (stop, late_stop))
    u = torch.zeros(total + 1, max_new)
    for i in range(total if temperature else 0):
        u[i] = torch.rand(max_new, generator=torch.Generator().manual_seed(seeds[i]))
    u = to_device(u, device)

    def choose(logits, row, age):
        logits = logits if banned is None else logits.masked_fill(banned, -torch.inf)
        return sample(logits, temperature, top_p, u[row, age])

    def ends(token, age):
        return is_stop[token] | is_late[token] & (age > 0) | (age == max_new - 1)

    # The rows are a grid: `per` for each adapter, side by side.
    waiting = [deque() for _ in range(adapters.n if adapters else 1)]
    for j, slot in enumerate(slots or [0] * len(prompts)):
        waiting[slot].append(j)
    per = (max_rows or auto_rows(model, longest + max_new)) // len(waiting) // n
    per = n * max(1, min(per, max(map(len, waiting))))
    route = lambda counts: adapters.route(counts) if adapters else nullcontext()
    every, most = (16, 16384) if device.type == "cuda" else (1, 2048)
    rows = Rows(model, per * len(waiting), longest + every, total, max_new, choose, ends)
    here = route([per] * len(waiting))
    while True:
        state = torch.stack((rows.row, rows.cache.length)).tolist()  # the one wait for the device
        length = {p: length for p, (row, length) in enumerate(zip(*state)) if row < total}
        if done := total - len(length) - n * sum(map(len, waiting)):
            progress(done, total)
        if done == total:
            return [[i for i in row if i >= 0] for row in rows.out[:total].tolist()]
        batch, tokens = [], 0               # (slot, prompt, its places) to be read now
        for slot, queue in enumerate(waiting):
            idle = [p for p in range(slot * per, slot * per + per) if p not in length]
            while queue and len(idle) >= n and tokens < most:
                j, places, idle = queue.popleft(), idle[:n], idle[n:]
                batch.append((slot, j, places))
                length |= dict.fromkeys(places, len(prompts[j]))
                tokens += len(prompts[j])
        if batch:
            ids, places, row = (to_device(torch.tensor(x), device) for x in (
                [i for _, j, _ in batch for i in prompts[j]], [places for *_, places in batch],
                [j * n + k for _, j, _ in batch for k in range(n)]))
            ribbon = Ribbon([len(prompts[j]) for _, j, _ in batch], device)
            with route([sum(len(prompts[j]) for slot, j, _ in batch if slot == s)
                        for s in range(len(waiting))]):
                rows.prefill(ids, ribbon, places, row)
        # Make room for the next tokens; fold the grid when half of it is idle for good.
        room = max(length.values()) + every + 1
        most_live = max(sum(p // per == s for p in length) for s in range(len(waiting)))
        folds = most_live <= per // 2 and not any(waiting)
        if folds or room > rows.cache.size:
            grid = [sorted(range(s * per, s * per + per), key=lambda p: p not in length)
                    for s in range(len(waiting))]
            per = most_live if folds else per
            rows.keep(to_device(torch.tensor([p for at in grid for p in at[:per]]), device), room)
            here = route([per] * len(waiting))
        with here:
            for _ in range(every):
                rows.step()
