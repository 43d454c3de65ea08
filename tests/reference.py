"""The oracle: LLaDA, its sampler and the published caching loops in plain torch.

Written from descriptions of the published code and sharing nothing with the engine: K and V are
cached before RoPE as [heads, rows, D], a pass is a handful of matrix products over all of its
rows, and everything is float64 unless asked otherwise.

Letters: N rows of the canvas = p shared prefix + u own prompt + g response; V vocabulary; E model
dim; G KV heads; D head dim.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from families import FAMILIES, family_of, short_names
from safetensors.torch import load_file
from torch import Tensor

torch.set_num_threads(1)
KV = tuple[Tensor, Tensor]  # K before RoPE and V, [G, rows, D]


@dataclass(frozen=True)
class Knobs:
    """Ways to be another model: each must show in a parity test. None: as in config.json."""

    rope: str = "halves"  # or "interleaved"
    gqa: str = "repeat"  # query head h reads KV head h // (H / G); or "tile": h % G
    eps: float | None = None
    theta: float | None = None
    scale: float | None = None  # of the attention scores
    qk_norm: bool | None = None
    shift: bool | None = None
    causal: bool = False
    bias: bool = True
    top_k: int | None = None  # experts of a row
    renormalise: bool = False  # the weights of a row's experts add up to 1
    sigmoid: bool = False  # in place of softmax over the experts
    swap_gate: bool = False  # gate and up projections exchanged


class Llada:
    """The model of one checkpoint folder of any family, without any cache."""

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.float64, knobs: Knobs | None = None
    ) -> None:
        c = json.loads((folder / "config.json").read_text())
        self.knobs = k = knobs or Knobs()
        self.dtype = dtype
        name = family_of(c)
        family = FAMILIES[name]
        size = {x: c.get(key) for x, key in family.keys.items()}
        self.layers, self.dim, self.heads = size["layers"], size["dim"], size["heads"]
        self.kv_heads = size["kv_heads"] or self.heads
        self.head_dim, self.vocab = self.dim // self.heads, size["vocab"]
        self.experts = size.get("experts", 0)
        self.top_k = size.get("top_k", 0) if k.top_k is None else k.top_k
        self.eps = c["rms_norm_eps"] if k.eps is None else k.eps
        self.theta = c["rope_theta"] if k.theta is None else k.theta
        self.scale = 1 / math.sqrt(self.head_dim) if k.scale is None else k.scale
        qk_norm = c.get("qk_layernorm", False)
        shift = c.get("shift_logits", family.flags.get("shift", False))
        self.qk_norm = qk_norm if k.qk_norm is None else k.qk_norm
        self.shift = shift if k.shift is None else k.shift
        self.mask: int = c["mask_token_id"]
        self.eos: int | None = c.get("eos_token_id")
        self.eot: int | None = c.get("eot_token_id")
        # Per attention that ran: the largest probability, mean over rows and heads.
        self.peaks: list[float] = []
        # Smallest distance of an expert's logit that was among a row's best to one that was not.
        self.routing_gap = math.inf
        short = short_names(name, self.layers, self.experts)
        self.weights = {
            short[stored]: t.to(dtype)
            for file in sorted(folder.glob("*.safetensors"))
            for stored, t in load_file(file).items()
        }
        if c.get("tie_word_embeddings"):
            self.weights["ff_out.weight"] = self.weights["wte.weight"]

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        return self.weights[f"{name if layer is None else f'blocks.{layer}.{name}'}.weight"]

    def product(self, x: Tensor, name: str, layer: int | None = None) -> Tensor:
        """x [R, inputs] times a weight matrix, [R, outputs]."""
        return x @ self.weight(name, layer).T

    def attended(self, x: Tensor) -> Tensor:
        """q, k, v and softmax weights as attention multiplies them."""
        return x

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * weight

    def embed(self, tokens: Tensor) -> Tensor:
        return self.weight("wte")[tokens]

    def project(self, layer: int, which: str, x: Tensor) -> Tensor:
        """q, k or v [heads, R, D] of the rows x [R, E], before RoPE."""
        y = self.product(self.norm(x, self.weight("attn_norm", layer)), f"{which}_proj", layer)
        bias = self.weights.get(f"blocks.{layer}.{which}_proj.bias")
        if bias is not None and self.knobs.bias:
            y = y + bias
        y = y.reshape(len(x), -1, self.head_dim).transpose(0, 1)
        if self.qk_norm and which != "v":
            y = self.norm(y, self.weight(f"{which}_norm", layer))
        return y

    def rope(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [heads, R, D] at the positions `rows`: coordinate pairs turned as complex numbers."""
        pairs = self.head_dim // 2
        speed = self.theta ** (-torch.arange(pairs, dtype=self.dtype) / pairs)
        turn = torch.polar(torch.ones((), dtype=self.dtype), rows[:, None].to(self.dtype) * speed)
        if self.knobs.rope == "interleaved":
            z = torch.complex(x[..., 0::2].contiguous(), x[..., 1::2].contiguous()) * turn
            return torch.stack([z.real, z.imag], -1).flatten(-2)
        z = torch.complex(x[..., :pairs].contiguous(), x[..., pairs:].contiguous()) * turn
        return torch.cat([z.real, z.imag], -1)

    def attend(self, layer: int, q: Tensor, rows: Tensor, kv: KV) -> Tensor:
        """Rows at positions `rows` over keys at 0, 1, ...; after the output projection, [R, E]."""
        keys = torch.arange(kv[0].shape[1])
        return self.mix(layer, self.rope(q, rows), rows, (self.rope(kv[0], keys), kv[1]))

    def mix(self, layer: int, q: Tensor, rows: Tensor, kv: KV) -> Tensor:
        """As attend(), of q and k after RoPE."""
        group = self.heads // self.kv_heads
        repeat = self.knobs.gqa == "repeat"
        source = [h // group if repeat else h % self.kv_heads for h in range(self.heads)]
        k, v = (self.attended(x)[source] for x in kv)
        score = self.attended(q) @ k.transpose(1, 2) * self.scale
        if self.knobs.causal:
            keys = torch.arange(k.shape[1])
            score = score.masked_fill(keys[None, :] > rows[:, None], -math.inf)
        weight = self.attended(torch.exp(score - score.amax(-1, keepdim=True)))
        total = weight.sum(-1, keepdim=True)
        self.peaks.append((1 / total).mean().item())
        mixed = (weight @ v / total).transpose(0, 1).reshape(len(rows), -1)
        return self.product(mixed, "attn_out", layer)

    def ffn(self, layer: int, x: Tensor) -> Tensor:
        n = self.norm(x, self.weight("ff_norm", layer))
        return self.mixture(layer, n) if self.experts else self.swiglu(layer, n)

    def swiglu(self, layer: int, n: Tensor, where: str = "") -> Tensor:
        gate, up = (self.product(n, f"{where}{x}", layer) for x in ("ff_proj", "up_proj"))
        if self.knobs.swap_gate:
            gate, up = up, gate
        return self.product(F.silu(gate) * up, f"{where}ff_out", layer)

    def mixture(self, layer: int, n: Tensor) -> Tensor:
        """A row's FFN: its `top_k` most probable experts, weighted by their probabilities."""
        logits = n @ self.weight("router", layer).T
        best = logits.sort(-1, descending=True).values
        if self.top_k < self.experts:
            gaps = best[:, self.top_k - 1] - best[:, self.top_k]
            self.routing_gap = min(self.routing_gap, gaps.min().item())
        chance = torch.sigmoid(logits) if self.knobs.sigmoid else torch.softmax(logits, -1)
        weight = torch.where(logits >= best[:, self.top_k - 1 : self.top_k], chance, 0.0)
        if self.knobs.renormalise:
            weight = weight / weight.sum(-1, keepdim=True)
        y = torch.zeros_like(n)
        for x in range(self.experts):
            rows = weight[:, x].nonzero().flatten()
            y[rows] += weight[rows, x, None] * self.swiglu(layer, n[rows], f"experts.{x}.")
        return y

    def block(self, layer: int, x: Tensor, first: int, lent: KV | None = None) -> tuple[Tensor, KV]:
        """Rows x at positions first, first + 1, ...; `lent`: K and V of the rows before them.

        Returns x after the layer, and K and V of all rows."""
        q, k, v = (self.project(layer, which, x) for which in "qkv")
        if lent is not None:
            k, v = torch.cat([lent[0], k], 1), torch.cat([lent[1], v], 1)
        x = x + self.attend(layer, q, torch.arange(first, first + len(x)), (k, v))
        return x + self.ffn(layer, x), (k, v)

    def head(self, x: Tensor) -> Tensor:
        return self.product(self.norm(x, self.weight("ln_f")), "ff_out")[:, : self.vocab]

    def shifted(self, logits: Tensor) -> Tensor:
        return torch.cat([logits[:1], logits[:-1]]) if self.shift else logits

    def full(self, tokens: Tensor) -> tuple[Tensor, list[KV], list[Tensor]]:
        """Logits [N, V]; per layer K and V, and the residual that leaves it."""
        x, kv, out = self.embed(tokens), [], []
        for layer in range(self.layers):
            x, pair = self.block(layer, x, 0)
            kv.append(pair)
            out.append(x)
        return self.shifted(self.head(x)), kv, out

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [N, V]."""
        return self.full(tokens)[0]


# ---- LLaDA's generate() -------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    gen_length: int
    steps: int
    block_length: int
    temperature: float = 0.0
    remasking: str = "low_confidence"
    logits_eos_inf: bool = False
    confidence_eos_eot_inf: bool = False


@dataclass
class Trace:
    """What generate() did.

    Attributes:
        tokens: The response [g].
        confidences: Probability of each token when it was committed [g]; NaN: never.
        commits: Positions committed at every step, ascending.
        margin: How far the closest decision was from going the other way, in log units: the best
            token's score over the next one's, and the last confidence that was committed over the
            first that was not.
    """

    tokens: Tensor
    confidences: Tensor
    commits: list[list[int]] = field(default_factory=list)
    margin: float = math.inf


# The model as the sampler sees it: canvas [N] -> logits [N, V]; rows nobody asks for may be NaN.
Logits = Callable[[Tensor], Tensor]
TokenNoise = Callable[[int, int, int], Tensor]  # (step, position, V) -> u [V]
OrderNoise = Callable[[int, int], float]  # (step, position) -> u; for remasking="random"


def get_num_transfer_tokens(masks: int, steps: int) -> list[int]:
    return [masks // steps + (1 if i < masks % steps else 0) for i in range(steps)]


def add_gumbel_noise(logits: Tensor, temperature: float, u: Callable[[], Tensor]) -> Tensor:
    if temperature == 0:
        return logits
    return logits.double().exp() / (-torch.log(u())) ** temperature


def top_gap(values: Tensor, count: int) -> float:
    """Between the count-th largest value and the next one; inf where there is no choice."""
    best = values.sort(descending=True).values
    if count == 0 or count >= len(best) or best[count] == -math.inf:
        return math.inf
    return float(best[count - 1] - best[count])


def predict(
    logits: Tensor, model: Llada, o: Options, noise: Callable[[], Tensor]
) -> tuple[int, float, float]:
    """Token of one position, its probability, and the gap to the second best in log units."""
    logits = logits.clone()
    if o.logits_eos_inf:
        logits[model.eos] = -math.inf
    logits_with_noise = add_gumbel_noise(logits, o.temperature, noise)
    gap = top_gap(logits_with_noise.log() if o.temperature else logits_with_noise, 1)
    x0 = int(logits_with_noise.argmax())
    if o.confidence_eos_eot_inf:
        # Published as one chained assignment: at temperature 0 both names are the same tensor.
        logits_with_noise[model.eos] = -math.inf
        logits[model.eot] = -math.inf
    return x0, float(torch.softmax(logits, -1)[x0]), gap


def no_noise(*_: int) -> Tensor:
    raise AssertionError("noise was asked for and none was given")


def generate(
    logits_of: Logits,
    model: Llada,
    prompt: Tensor,
    o: Options,
    token_noise: TokenNoise = no_noise,
    order_noise: OrderNoise | None = None,
) -> Trace:
    """generate() of the LLaDA repository, for one request.

    One difference, on purpose: prompt positions are never masked, whatever their ids. Passes over
    a block without masks are left out, because they change nothing. `step` of the noise counts
    the passes that predicted.
    """
    n, mask = len(prompt) + o.gen_length, model.mask
    x = torch.cat([prompt, torch.full((o.gen_length,), mask)])
    blocks = o.gen_length // o.block_length
    assert o.gen_length % o.block_length == 0 and o.steps % blocks == 0
    trace = Trace(x, torch.full((o.gen_length,), math.nan, dtype=torch.float64))
    for start in range(len(prompt), n, o.block_length):
        for transfer in get_num_transfer_tokens(o.block_length, o.steps // blocks):
            masked = [i for i in range(start, start + o.block_length) if x[i] == mask]
            if not masked:
                break
            logits, step = logits_of(x), len(trace.commits)
            predicted = [
                predict(logits[i], model, o, partial(token_noise, step, i, model.vocab))
                for i in masked
            ]
            rank = torch.tensor([p for _, p, _ in predicted], dtype=torch.float64)
            if o.remasking == "random":
                rank = torch.tensor([order_noise(step, i) for i in masked], dtype=torch.float64)
            trace.margin = min(
                trace.margin, top_gap(rank.log(), transfer), *(gap for _, _, gap in predicted)
            )
            chosen = rank.sort(descending=True, stable=True).indices[:transfer].tolist()
            for j in chosen:
                x[masked[j]], trace.confidences[masked[j] - len(prompt)], _ = predicted[j]
            trace.commits.append(sorted(masked[j] for j in chosen))
    trace.tokens = x[len(prompt) :]
    return trace


# ---- the published caching loops: what stands between the sampler and the model -----------------


class NoCache:
    """Every row at every step. `rows`: how many were computed, per pass and layer."""

    def __init__(self, model: Llada) -> None:
        self.model = model
        self.rows: list[list[int]] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.rows.append([len(x)] * self.model.layers)
        return self.model.forward(x)


class BiCache:
    """Plain BiCache (arXiv 2606.07571) for one request; `rows` as in NoCache.

    Every `refresh_steps` the first `depth` layers take the prefix's K/V from the inter-request
    cache (the prefix by itself) and the prefix rows run in the layers above; in between, no layer
    runs them. splice: where their state comes from, "official": out of layer depth - 1, "strict":
    one layer earlier. depth 0, which the published code does not implement: from the embeddings.
    """

    def __init__(
        self,
        model: Llada,
        prefix: Tensor,
        depth: int | Sequence[int],
        refresh_steps: int,
        splice: str,
    ) -> None:
        """`depth`: of every refresh, or one after the other."""
        self.model, self.p, self.refresh_steps, self.step = model, len(prefix), refresh_steps, 0
        self.rows: list[list[int]] = []
        _, self.inter, self.out = model.full(prefix)
        self.embedded, self.depths, self.splice = model.embed(prefix), depth, splice
        self.reused, self.boundary = 0, self.embedded
        self.intra: Sequence[KV] = ()

    def __call__(self, x: Tensor) -> Tensor:
        if self.step % self.refresh_steps == 0:
            n, depths = self.step // self.refresh_steps, self.depths
            depth = depths if isinstance(depths, int) else depths[n]
            self.reused = max(0, depth - (self.splice == "strict"))
            self.boundary = self.out[self.reused - 1] if self.reused else self.embedded
            logits, kv = self.layer_partitioned(x, self.inter[: self.reused])
            self.intra = [(k[:, : self.p], v[:, : self.p]) for k, v in kv]
        else:
            logits, _ = self.layer_partitioned(x, self.intra)
        self.step += 1
        return logits

    def layer_partitioned(self, canvas: Tensor, cache: Sequence[KV]) -> tuple[Tensor, list[KV]]:
        m, p = self.model, self.p
        x, kv, rows = m.embed(canvas[p:]), [], []
        for layer in range(m.layers):
            if layer == len(cache):
                x = torch.cat([self.boundary, x])
            lent = cache[layer] if layer < len(cache) else None
            rows.append(len(x))
            x, pair = m.block(layer, x, len(canvas) - len(x), lent)
            kv.append(pair)
        self.rows.append(rows)
        logits = torch.full((len(canvas), m.vocab), math.nan, dtype=m.dtype)
        logits[p:] = m.head(x[len(x) - len(canvas) + p :])
        return m.shifted(logits), kv


class Naive(BiCache):
    """LLM-style prefix caching: K/V computed once, reused in every layer, step and request.

    They come from the prefix by itself, or, with `first_canvas`, as they stood when the first
    request with this prefix began, its masks included.
    """

    def __init__(self, model: Llada, prefix: Tensor, first_canvas: Tensor | None = None) -> None:
        super().__init__(model, prefix, model.layers, 1, "official")
        if first_canvas is not None:
            assert torch.equal(first_canvas[: self.p], prefix)
            _, kv, _ = model.full(first_canvas)
            self.inter = [(k[:, : self.p], v[:, : self.p]) for k, v in kv]
