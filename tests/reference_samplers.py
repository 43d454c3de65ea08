"""The oracle of the decoding rules: LLaDA's (D.1), Dream's (D.2), Fast-dLLM's threshold and factor
(B.2, B.3), guidance, and what this project adds to them, over a cache or none.

One request, one position after the other, in float64; only Dream's schedule is in float32, as
published, because it is truncated to a count.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from reference import (
    Llada,
    Options,
    OrderNoise,
    TokenNoise,
    Trace,
    get_num_transfer_tokens,
    no_noise,
    top_gap,
)
from reference_caches import Block
from torch import Tensor

# Canvas [N] and current block -> logits [N, V]; rows nobody asks for may be NaN.
Cached = Callable[[Tensor, Block], Tensor]
LLADA = ("low_confidence", "random")
EPS = 1e-3


@dataclass(frozen=True)
class Decoding(Options):
    threshold: float | None = None
    factor: float | None = None
    alg_temp: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    cfg_scale: float = 0.0
    early_stop: bool = False

    @property
    def dream(self) -> bool:
        return self.remasking not in LLADA

    @property
    def blocks(self) -> int:
        return self.gen_length // self.block_length


def gumbel(u: Tensor) -> Tensor:
    return -torch.log(-torch.log(u))


def kept_tokens(logits: Tensor, o: Decoding) -> tuple[Tensor, float]:
    """logits [V] (tempered) with -inf for those that top_p and top_k drop (sample_tokens), and how
    far the closest of them was from the other side, in log units."""
    gap = math.inf
    if o.top_p is not None and o.top_p < 1:
        best_first, ids = logits.sort(descending=True, stable=True)
        reached = best_first.softmax(-1).cumsum(-1)
        before = torch.cat([torch.zeros(1, dtype=reached.dtype), reached[:-1]])
        logits = logits.index_fill(0, ids[before > o.top_p], -math.inf)
        gap = min(gap, 4 * float((reached - o.top_p).abs().min()))
    if o.top_k is not None and o.top_k < len(logits):
        gap = min(gap, top_gap(logits, o.top_k))
        logits = logits.masked_fill(logits < logits.topk(o.top_k).values[-1], -math.inf)
    return logits, gap


def confidence_of(probs: Tensor, token: int, rule: str) -> float:
    """How sure Dream's rule is of a position whose kept tokens have the probabilities probs [V]."""
    if rule == "topk_margin":
        best = probs.sort(descending=True).values
        return float(best[0] - best[1])
    if rule == "entropy":
        return float((probs * torch.log(probs + 1e-10)).sum())
    return float(probs[token])


def order_gap(rank: Tensor, count: int) -> float:
    """top_gap, where equal ranks are no near tie: a position of which one token is kept has a
    probability of exactly 1, and of several of these the lower one is taken."""
    best = rank.sort(descending=True).values
    if 0 < count < len(best) and best[count - 1] == best[count]:
        lower = best[best < best[count]]
        return float(best[count] - lower[0]) if len(lower) else math.inf
    return top_gap(rank, count)


def transfer_share(i: int, steps: int) -> Tensor:
    """Dream's 1 - s / t of step i; float32 []."""
    timesteps = torch.linspace(1, EPS, steps + 1)
    return 1 - timesteps[i + 1] / timesteps[i] if i < steps - 1 else torch.tensor(1.0)


def accepted_by_factor(best_first: list[float], factor: float) -> int:
    """B.3, its quirk included: a scan that reaches the last candidate accepts it."""
    n = 0
    for n, confidence in enumerate(best_first):
        if n > 0 and confidence < 1 - factor / (n + 2):
            break
    return n + 1 if n in (0, len(best_first) - 1) else n


class Decoder:
    """Decodes one request.

    `step` of the noise: passes that predicted, or with Dream's rules, whose steps that commit
    nothing are not run, the step of the schedule.
    unconditional: the model behind the canvas without anything that was given (D.1's
        prompt_index: what is no mask at the start), for cfg_scale.
    given: what stands in the response at the start [g], masks to be filled; None: masks alone.
    """

    def __init__(
        self,
        cached: Cached,
        model: Llada,
        prompt: Tensor,
        o: Decoding,
        token_noise: TokenNoise = no_noise,
        order_noise: OrderNoise = no_noise,
        unconditional: Cached | None = None,
        given: Tensor | None = None,
    ) -> None:
        self.cached, self.unconditional, self.model, self.o = cached, unconditional, model, o
        self.token_noise, self.order_noise = token_noise, order_noise
        self.first = len(prompt)
        response = torch.full((o.gen_length,), model.mask) if given is None else given
        self.x = torch.cat([prompt, response])
        self.known = self.x != model.mask
        none = torch.full((o.gen_length,), math.nan, dtype=torch.float64)
        self.trace = Trace(self.x[self.first :], none)  # a view: filled in as x is

    def clear(self, gap: float) -> None:
        """Notes a gap of two logits; guidance multiplies their error."""
        self.trace.margin = min(self.trace.margin, gap / (2 * self.o.cfg_scale + 1))

    def run(self) -> Trace:
        o, per_block = self.o, self.o.steps // self.o.blocks
        for number in range(o.blocks):
            start = self.first + number * o.block_length
            block = (start, start + o.block_length)
            quotas = get_num_transfer_tokens(len(self.masked(block)), per_block)
            for i in range(per_block):
                masked = self.masked(block)
                if not masked:
                    break
                step, count = len(self.trace.commits), quotas[i]
                adaptive = o.threshold is not None or o.factor is not None
                if o.dream:
                    step = number * per_block + i
                    share = transfer_share(i, per_block)
                    count = int(torch.tensor(float(len(masked))) * share)
                    if o.remasking == "origin":
                        masked = [j for j in masked if self.order_noise(step, j) < share]
                        count = len(masked)
                    if count == 0 and not adaptive:
                        continue
                count = max(count, int(adaptive))
                self.commit(step, block, masked, count)
                if o.early_stop and self.ended():
                    self.trace.tokens[self.trace.tokens == self.model.mask] = self.model.eos
                    return self.trace
        return self.trace

    def masked(self, block: Block) -> list[int]:
        return [j for j in range(*block) if self.x[j] == self.model.mask]

    def ended(self) -> bool:
        """An end-of-text or end-of-turn token stands, and everything before it is decided."""
        for token in self.trace.tokens.tolist():
            if token == self.model.mask:
                return False
            if token in (self.model.eos, self.model.eot):
                return True
        return False

    def logits(self, block: Block) -> Tensor:
        cond = self.cached(self.x, block)
        if self.o.cfg_scale == 0:
            return cond
        assert self.unconditional is not None
        masked = self.x.clone()
        masked[self.known] = self.model.mask
        un = self.unconditional(masked, block)
        return un + (self.o.cfg_scale + 1) * (cond - un)

    def commit(self, step: int, block: Block, masked: list[int], count: int) -> None:
        logits = self.logits(block)
        predicted = [self.predict(logits[j], step, j) for j in masked]
        chosen = self.choose([c for _, _, c in predicted], step, masked, count)
        for n in chosen:
            token, probability, _ = predicted[n]
            self.x[masked[n]] = token
            if token != self.model.mask:
                self.trace.confidences[masked[n] - self.first] = probability
        self.trace.commits.append(sorted(masked[n] for n in chosen))

    def predict(self, logits: Tensor, step: int, position: int) -> tuple[int, float, float]:
        """Token of one position, its probability, and the confidence it is ranked by."""
        o, noisy = self.o, self.o.temperature > 0
        logits = logits.clone()
        logits[list(o.suppress_tokens)] = -math.inf
        if o.logits_eos_inf:
            logits[self.model.eos] = -math.inf
        scale = o.temperature if noisy else 1.0
        kept, gap = kept_tokens(logits / scale, o)
        if noisy or o.dream:
            self.clear(gap * scale)
        score = logits
        if noisy:
            noise = gumbel(self.token_noise(step, position, self.model.vocab))
            score = (kept + noise) * scale
        self.clear(top_gap(score, 1))
        token = int(score.argmax())
        probability = float(logits.softmax(-1)[token])
        if not o.dream:
            return token, probability, probability
        return token, probability, confidence_of(kept.softmax(-1), token, o.remasking)

    def choose(
        self, confidences: list[float], step: int, masked: list[int], count: int
    ) -> list[int]:
        """Indices of those that are committed."""
        o, confidence = self.o, torch.tensor(confidences, dtype=torch.float64)
        if o.remasking == "origin":
            return list(range(len(masked)))
        # How far logits have to move for a confidence to move by one: a probability by at most a
        # quarter, the difference of two by a half, a mean of logarithms by about itself.
        unit = {"topk_margin": 2.0, "entropy": 0.5}.get(o.remasking, 4.0)
        if o.dream and o.temperature > 0:
            unit *= o.temperature
        rank = confidence
        if o.remasking == "random" or o.alg_temp > 0:
            u = torch.tensor([self.order_noise(step, j) for j in masked], dtype=torch.float64)
            rank = u if o.remasking == "random" else confidence / o.alg_temp + gumbel(u)
            unit = math.inf if o.remasking == "random" else unit * o.alg_temp
        order = rank.sort(descending=True, stable=True).indices.tolist()
        best_first = [confidences[n] for n in order]
        limits: list[float] = []
        if o.threshold is not None:
            count = max(count, sum(c >= o.threshold for c in best_first))
            limits = [o.threshold] * len(order)
        if o.factor is not None:
            count = max(count, accepted_by_factor(best_first, o.factor))
            limits = [-1.0] + [1 - o.factor / (n + 2) for n in range(1, len(order))]
        for confidence_, limit in zip(best_first, limits, strict=False):
            self.clear(abs(confidence_ - limit) * unit)
        self.clear(order_gap(rank, count) * unit)
        return order[:count]


def decode(
    cached: Cached,
    model: Llada,
    prompt: Tensor,
    o: Decoding,
    token_noise: TokenNoise = no_noise,
    order_noise: OrderNoise = no_noise,
    unconditional: Cached | None = None,
    given: Tensor | None = None,
) -> Trace:
    """What one request becomes."""
    return Decoder(cached, model, prompt, o, token_noise, order_noise, unconditional, given).run()


def uncached(model: Llada) -> Cached:
    """Every row at every step."""
    return partial(_forward, model)


def _forward(model: Llada, canvas: Tensor, _: Block) -> Tensor:
    return model.forward(canvas)
