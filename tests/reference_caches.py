"""The oracle of the caches that work within one request: dLLM-Cache and Fast-dLLM, by themselves
and beside BiCache.

The published loops with every cache the published code keeps: K before RoPE and V as [G, rows, D],
the attention's and the FFN's outputs apart, the residual of all rows carried along. An object
stands between the sampler and the model for one request: called with the canvas [N] and the
current block (first row, row after the last), it gives logits [N, V]; rows it does not compute
are NaN. It remembers what it computed:

    rows        per pass and layer: rows that are projected, attended and sent through the FFN
    value_rows  the same: rows of which V alone is projected

Rows whose result nobody reads are computed where the published code does, and not counted.
"""

import math
from dataclasses import dataclass

import torch
from reference import KV, Llada, top_gap
from torch import Tensor

Block = tuple[int, int]


def kv_of(model: Llada, layer: int, x: Tensor) -> KV:
    """K before RoPE and V of the rows x [R, E], of which there may be none."""
    if len(x) == 0:
        none = torch.zeros(model.kv_heads, 0, model.head_dim, dtype=model.dtype)
        return none, none
    return model.project(layer, "k", x), model.project(layer, "v", x)


def joined(*parts: KV) -> KV:
    """Segments one after the other."""
    return torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)


def part(kv: KV, first: int, end: int | None) -> KV:
    return kv[0][:, first:end], kv[1][:, first:end]


def attention(model: Llada, layer: int, x: Tensor, rows: Tensor, kv: KV) -> Tensor:
    """Of x [R, E] at positions `rows` over all keys, after the output projection [R, E]."""
    if len(x) == 0:
        return x
    return model.attend(layer, model.project(layer, "q", x), rows, kv)


def through(model: Llada, layer: int, x: Tensor, rows: Tensor, kv: KV) -> Tensor:
    """x [R, E] after the layer."""
    x = x + attention(model, layer, x, rows, kv)
    return x + model.ffn(layer, x)


def wide(model: Llada, count: int, first: int, x: Tensor) -> Tensor:
    """Logits [count, V] from the last residual x [R, E] of rows first, first + 1, ..."""
    logits = torch.full((count, model.vocab), math.nan, dtype=model.dtype)
    logits[first : first + len(x)] = model.head(x)
    return model.shifted(logits)


class NoPrefix:
    """No rows are shared."""

    p = 0

    def __init__(self, model: Llada) -> None:
        self.model = model

    def begin(self, step: int) -> None:
        """A pass at this step begins."""

    def lend(self, layer: int) -> KV:
        """K and V of the shared rows in this layer."""
        return kv_of(self.model, layer, torch.zeros(0, self.model.dim))

    def leave(self, layer: int, kv: KV) -> None:
        """The layer's K and V of all rows are known."""

    def rows(self, layer: int) -> int:
        """How many shared rows this pass computes in this layer."""
        return 0


class SharedPrefix(NoPrefix):
    """The shared rows under BiCache (3.5, 3.6), whatever is done with the others.

    Every `refresh_steps` the layers below the splice take the inter-request cache and the rows run
    in those above; otherwise all layers take what this request holds. A second pass at one step
    refreshes nothing (3.7: the block-start pass has done it). depth = layers: naive.
    """

    def __init__(
        self,
        model: Llada,
        prefix: Tensor,
        depth: int,
        refresh_steps: int,
        splice: str = "official",
    ) -> None:
        super().__init__(model)
        self.p, self.refresh_steps, self.last_step = len(prefix), refresh_steps, -1
        _, self.inter, out = model.full(prefix)
        self.cut = max(0, depth - (splice == "strict"))
        self.boundary = [model.embed(prefix), *out][self.cut]
        self.intra: list[KV] = []

    def begin(self, step: int) -> None:
        self.refresh = step % self.refresh_steps == 0 and step != self.last_step
        self.last_step = step
        if self.refresh:
            self.intra = list(self.inter)

    def lend(self, layer: int) -> KV:
        if self.refresh and layer == self.cut:
            self.x = self.boundary
        if self.rows(layer):
            self.intra[layer] = kv_of(self.model, layer, self.x)
        return self.intra[layer]

    def leave(self, layer: int, kv: KV) -> None:
        if self.rows(layer):
            self.x = through(self.model, layer, self.x, torch.arange(self.p), kv)

    def rows(self, layer: int) -> int:
        return self.p if self.refresh and layer >= self.cut else 0


# ---- dLLM-Cache (arXiv 2506.06295, A.2 and A.3) -------------------------------------------------


@dataclass
class Features:
    """What is kept of one segment in one layer. attn, mlp: [rows, E]; seen: the V that `drift`
    compares with, [G, rows, D]."""

    kv: KV
    attn: Tensor
    mlp: Tensor
    seen: Tensor


class DllmCache:
    """dLLM-Cache for one request.

    prompt_rows: p + u. On a model that shifts its logits, the last of them is a response row: the
    first response token is predicted from it.
    drift: what V of a row is compared with, "last_step" (as published) or "since_recompute", its V
    when the row was last recomputed in full.
    new_tokens: "recompute": not published; rows whose token has changed since the last step are
    recomputed as well, and the share is chosen among the others.

    `gap`: the smallest difference, over all choices, between the cosine of the last row chosen and
    of the first that was not, in units of the latter's sine, by which an error of V moves it, but
    of no less than 1/4: the cosine is rounded as well.
    """

    def __init__(
        self,
        model: Llada,
        prompt_rows: int,
        prompt_interval_steps: int,
        gen_interval_steps: int,
        transfer_ratio: float,
        drift: str = "last_step",
        prefix: NoPrefix | None = None,
        new_tokens: str = "compete",
    ) -> None:
        self.model, self.cut = model, prompt_rows - model.shift
        self.new_tokens, self.before = new_tokens, torch.arange(0)
        self.new = torch.arange(0)
        self.prompt_interval_steps = prompt_interval_steps
        self.gen_interval_steps = gen_interval_steps
        self.transfer_ratio, self.drift = transfer_ratio, drift
        self.prefix = prefix or NoPrefix(model)
        self.step, self.gap = 0, math.inf
        self.prompt: dict[int, Features] = {}
        self.gen: dict[int, Features] = {}
        self.rows: list[list[int]] = []
        self.value_rows: list[list[int]] = []

    def __call__(self, canvas: Tensor, block: Block | None = None) -> Tensor:
        m, p = self.model, self.prefix.p
        self.prefix.begin(self.step)
        if self.new_tokens == "recompute" and len(self.before):
            self.new = (canvas != self.before)[self.cut :].nonzero().flatten()
        self.before = canvas.clone()
        self.rows.append([])
        self.value_rows.append([])
        x_prompt, x_gen = m.embed(canvas[p : self.cut]), m.embed(canvas[self.cut :])
        for layer in range(m.layers):
            x_prompt, x_gen = self.layer(layer, x_prompt, x_gen)
        self.step += 1
        return wide(m, len(canvas), p, torch.cat([x_prompt, x_gen]))

    def refreshes(self, layer: int) -> tuple[bool, bool]:
        """Whether prompt and response are recomputed: in layer 0 always."""
        return (
            layer == 0 or self.step % self.prompt_interval_steps == 0,
            layer == 0 or self.step % self.gen_interval_steps == 0,
        )

    def layer(self, layer: int, x_prompt: Tensor, x_gen: Tensor) -> tuple[Tensor, Tensor]:
        m, p = self.model, self.prefix.p
        lent = self.prefix.lend(layer)
        refresh_prompt, refresh_gen = self.refreshes(layer)
        if refresh_prompt:
            empty = torch.zeros_like(x_prompt)
            kv = kv_of(m, layer, x_prompt)
            self.prompt[layer] = Features(kv, empty, empty, kv[1])
        if refresh_gen:
            empty = torch.zeros_like(x_gen)
            kv = kv_of(m, layer, x_gen)
            self.gen[layer] = Features(kv, empty, empty, kv[1])
            todo = torch.arange(len(x_gen))
        else:
            todo = self.adapt(layer, x_gen)
        prompt, gen = self.prompt[layer], self.gen[layer]
        kv = joined(lent, prompt.kv, gen.kv)
        self.prefix.leave(layer, kv)
        if refresh_prompt:
            prompt.attn = attention(m, layer, x_prompt, torch.arange(p, self.cut), kv)
        gen.attn = gen.attn.index_copy(
            0, todo, attention(m, layer, x_gen[todo], self.cut + todo, kv)
        )
        y_prompt, y_gen = x_prompt + prompt.attn, x_gen + gen.attn
        if refresh_prompt:
            prompt.mlp = m.ffn(layer, y_prompt)
        gen.mlp = gen.mlp.index_copy(0, todo, m.ffn(layer, y_gen[todo]))
        # in layer 0 a prompt row gives the same K and V as ever, and nobody reads what follows
        prompt_rows = len(x_prompt) if self.step % self.prompt_interval_steps == 0 else 0
        self.rows[-1].append(prompt_rows + len(todo) + self.prefix.rows(layer))
        adapted = not refresh_gen and self.transfer_ratio > 0
        self.value_rows[-1].append(len(x_gen) - len(todo) if adapted else 0)
        return y_prompt + prompt.mlp, y_gen + gen.mlp

    def adapt(self, layer: int, x_gen: Tensor) -> Tensor:
        """The adaptive rule: the response rows to recompute; their K and all V are renewed."""
        m, kept = self.model, self.gen[layer]
        k, v = kept.kv
        if self.transfer_ratio > 0:
            v = m.project(layer, "v", x_gen)
            todo = torch.cat([self.new, self.choose(kept.seen, v)])
        else:
            todo = self.new
            v = v.index_copy(1, todo, m.project(layer, "v", x_gen[todo])) if len(todo) else v
        if len(todo):
            k = k.index_copy(1, todo, m.project(layer, "k", x_gen[todo]))
        kept.kv = k, v
        kept.seen = v if self.drift == "last_step" else kept.seen.index_copy(1, todo, v[:, todo])
        return todo

    def choose(self, old: Tensor, new: Tensor) -> Tensor:
        """Rows whose V [G, rows, D] is least like the old one; ties: the lower row."""
        a, b = (v.transpose(0, 1).flatten(1) for v in (old, new))
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        count = min(int(len(cosine) * self.transfer_ratio), len(cosine) - len(self.new))
        cosine[self.new] = math.inf  # not asked
        order = cosine.sort(stable=True).indices
        if 0 < count < len(order) - len(self.new):
            sine = math.sqrt(max(0.0, 1 - float(cosine[order[count]]) ** 2))
            self.gap = min(self.gap, top_gap(-cosine, count) / max(0.25, sine))
        return order[:count]


# ---- Fast-dLLM (arXiv 2505.22618, B.1) ----------------------------------------------------------


class FastDllm:
    """Fast-dLLM's block-wise cache for one request.

    At a block's first step, and at every `refresh_steps`-th after it, all rows run and their K and
    V are kept; at its other steps those of the block ("dual") or all from its start on ("prefix").
    A block that the first step has finished is left (newer code: tests first). On a model that
    shifts its logits the row before the block runs with it.
    block_start: "commit", what the pass over all rows predicts is used, or "fill": it is not, and
    the block's rows run at once again (as in BiCache's engine, 3.7).
    """

    def __init__(
        self,
        model: Llada,
        mode: str,
        refresh_steps: int | None = None,
        block_start: str = "commit",
        prefix: NoPrefix | None = None,
    ) -> None:
        self.model, self.mode, self.refresh_steps = model, mode, refresh_steps
        self.block_start, self.prefix = block_start, prefix or NoPrefix(model)
        self.block: Block = (0, 0)
        self.step = self.block_step = 0
        self.kept: list[KV] = []
        self.rows: list[list[int]] = []

    def __call__(self, canvas: Tensor, block: Block) -> Tensor:
        if block != self.block:
            self.block, self.block_step = block, 0
        if self.fills():
            logits = self.forward(canvas, self.prefix.p, len(canvas))
        if not self.fills() or self.block_start == "fill":
            logits = self.forward(canvas, *self.moving(len(canvas)))
        self.step += 1
        self.block_step += 1
        return logits

    def fills(self) -> bool:
        if self.refresh_steps is None:
            return self.block_step == 0
        return self.block_step % self.refresh_steps == 0

    def moving(self, count: int) -> Block:
        """Rows of a cached step."""
        start, end = self.block
        return start - self.model.shift, end if self.mode == "dual" else count

    def forward(self, canvas: Tensor, first: int, end: int) -> Tensor:
        """One pass of the rows first..end; where it has all but the shared ones, it keeps them."""
        m, p = self.model, self.prefix.p
        self.prefix.begin(self.step)
        self.rows.append([])
        x, rows = m.embed(canvas[first:end]), torch.arange(first, end)
        everything = first == p and end == len(canvas)
        fresh: list[KV] = []
        for layer in range(m.layers):
            lent = self.prefix.lend(layer)
            fresh.append(kv_of(m, layer, x))
            kv = joined(lent, fresh[-1])
            if not everything:
                before, after = (
                    part(self.kept[layer], 0, first - p),
                    part(self.kept[layer], end - p, None),
                )
                kv = joined(lent, before, fresh[-1], after)
            self.prefix.leave(layer, kv)
            self.rows[-1].append(len(x) + self.prefix.rows(layer))
            x = through(m, layer, x, rows, kv)
        if everything:
            self.kept = fresh
        return wide(m, len(canvas), first, x)
