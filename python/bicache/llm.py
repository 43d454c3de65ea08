"""LLM: a loaded diffusion language model that generates."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .chat import ChatTemplate, Messages, encode_split, split_conversations
from .endings import EarlyStops, Ending
from .inputs import Prompt, Response, as_stop, split_prefixes, split_prompts, split_responses
from .loaded import Cache, LoadedModel
from .options import ALIASES, documented, resolve_options
from .prefixes import Discover, as_discover, as_salt
from .results import Output, RequestStats, StepEvent
from .tokenizer import Tokenizer

_log = logging.getLogger("bicache")

_Request = tuple[
    NDArray[np.int32],
    int,
    dict[str, Any],
    _core.Policy,
    str,
    tuple[int, int] | None,
    NDArray[np.int32] | None,
]


class LLM(LoadedModel):
    """A diffusion language model on the CPU.

    Args:
        path: A checkpoint folder, a GGUF file or a folder with one, or the name of a shipped
            model (`bicache.shipped_models()`).
        dtype: How weights are held, and with them the products: "f32"; "bf16" (activations are
            rounded to it, sums are float32); "int8" (a scale per output channel, activations
            quantised per row); "int4" (groups of 32 inputs; the output head stays int8); or
            "auto" (as stored).
        kv_dtype: How K and V are held, and what attention computes with: "f32", "bf16" (half the
            memory), or "auto" (f32 with f32 weights, otherwise bf16).
        threads: CPU threads; None: all this process may use (affinity and cgroup quota).
        cache: Cache policy of requests that name none: a cache string such as "none" or
            "bicache:depth=5", a policy object, or "auto" (what bicache.json beside the checkpoint
            says; "auto+dllm_cache" joins that with another policy, uncalibrated).
        prefix_budget_bytes: Memory for shared prefixes kept across requests.
        prefix_dtype: How they are held: "f32", or "bf16" (half the memory; what is reused is
            rounded, so answers may differ from f32's). Where kv_dtype is bf16, K and V are held so
            in any case, and this is about the rest.
        backend: "packed" (the engine's own kernels) or "blas" (OpenBLAS, f32 only; its results
            change with the batch in the last bits).

    Raises:
        FileNotFoundError: The folder or a file of it is missing; says what to download.
        ValueError: A file or a setting is wrong; "[where] what: expected X, got Y".
        TypeError: An argument has the wrong type.
    """

    @documented
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        prefix: Prompt | Sequence[Prompt | None] | None = None,
        response: Response | Sequence[Response | None] | None = None,
        cache: Cache | Sequence[Cache | None] | None = None,
        cache_salt: str | None = None,
        discover: bool | Discover = False,
        stop: str | Sequence[str] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[Output]:
        """Generates a response to every prompt; requests of any lengths share the passes.

        The tokens of a request depend on nothing else in the batch (except with the policy
        "naive:source=first_request", which is about who came first, with discover, and with
        backend="blas").

        Args:
            prompts: One prompt or a list of them; a prompt is text, a list of token ids, or a 1-D
                integer array of them. May be empty where there is a prefix.
            prefix: What stands before the prompts and is shared with other requests: text or ids
                for all of them, or a list with one (or None) per prompt. It is encoded by itself.
            response: What stands in the response already and never changes: token ids with None
                (or the mask's id) where they are to be filled in, or text with
                `bicache.MASK_TEXT` (or the tokenizer's mask token) for every token to fill in,
                the parts between encoded by themselves; for all prompts, or a list with one (or
                None) per prompt (a list with a number in it is one response). Its length is the
                default of gen_length. With nothing to fill in, nothing runs. cfg_scale guides
                towards it as towards the prompt.
            cache: As for LLM; None: the LLM's own; or a list with one per prompt.
            cache_salt: Whose prefixes these are. Requests with different salts never share one,
                however equal their text: give each tenant its own.
            discover: Looks for a shared prefix in prompts that come without one; True, or a
                Discover with its settings. What is reused then depends on earlier requests.
            stop: The text ends before the first of these strings; the tokens are not cut. With
                early_stop the request ends as soon as that text can change no more.
            progress: Shows a bar on stderr.
            **options: See below; None means the default. Defaults stored beside the checkpoint
                (`generation_defaults`) replace those named here.

        Returns:
            One Output per prompt, in order.

        Raises:
            TypeError: A wrong type, or an unknown option (the message lists what exists).
            ValueError: A wrong value; "[where] what: expected X, got Y".
        """
        begin = time.perf_counter()
        requests, endings = self._requests(
            split_prompts(prompts), prefix, response, cache, cache_salt, discover, stop, options
        )
        generation = self._engine.start(requests)
        stops = EarlyStops(
            generation, endings, [len(r[0]) for r in requests], [r[6] for r in requests]
        )
        with _bar(generation.steps_total, progress) as bar:
            while not generation.done:
                stops.look(generation.step())
                if bar is not None:
                    bar.update(generation.steps_done - bar.n)
        outputs = [
            _output(result, ending)
            for result, ending in zip(generation.results(), endings, strict=True)
        ]
        _log.debug(
            "generated %d requests: %d tokens, %d rows, %d prefix hits, %.3f s",
            len(outputs), sum(len(o.tokens) for o in outputs), sum(o.stats.rows for o in outputs),
            sum(bool(o.stats.prefix_hit) for o in outputs), time.perf_counter() - begin,
        )  # fmt: skip
        return outputs

    @documented
    def stream(
        self,
        prompt: Prompt,
        *,
        prefix: Prompt | None = None,
        response: Response | None = None,
        cache: Cache | None = None,
        cache_salt: str | None = None,
        discover: bool | Discover = False,
        stop: str | Sequence[str] | None = None,
        **options: Any,
    ) -> Generator[StepEvent, None, Output]:
        """Generates a response to one prompt, and yields every denoising step as it is made.

        Arguments are checked at once, not at the first step. Leaving the loop ends the request.

        Args:
            prompt: Text, a list of token ids, or a 1-D integer array of them.
            prefix: As for generate().
            response: As for generate().
            cache: As for generate().
            cache_salt: As for generate().
            discover: As for generate().
            stop: As for generate().
            **options: As for generate(), see below.

        Yields:
            One StepEvent per step.

        Returns:
            The Output, as the generator's return value.

        Raises:
            TypeError: As for generate().
            ValueError: As for generate().
        """
        prompts = split_prompts(prompt)
        if len(prompts) != 1:
            raise ValueError(f"[stream] prompt: expected one, got {len(prompts)}")
        requests, endings = self._requests(
            prompts, prefix, response, cache, cache_salt, discover, stop, options
        )
        prompt_ids, given = requests[0][0], requests[0][6]
        generation = self._engine.start(requests)
        stops = EarlyStops(generation, endings, [len(prompt_ids)], [given])
        return self._events(generation, len(prompt_ids), endings[0], stops)

    def _events(
        self, generation: _core.Generation, prompt_rows: int, ending: Ending, stops: EarlyStops
    ) -> Generator[StepEvent, None, Output]:
        while not generation.done:
            events = generation.step()
            stops.look(events)
            for e in events:
                canvas = e.canvas
                text = ending.text(canvas[prompt_rows:])[0]
                yield StepEvent(e.step, canvas, e.positions, e.tokens, e.confidences, text)
        return _output(generation.results()[0], ending)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template, read when it is first asked for.

        Raises:
            ImportError: jinja2 is not installed.
            ValueError: There is no template or no tokenizer, or a file is wrong.
        """
        return ChatTemplate.read(self.path, self._chat_tokenizer())

    def split_chat(self, messages: Messages) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids of a conversation: all that stands before the last user's text, and the rest.

        The first part never depends on that text, so that conversations which begin alike share
        it as their prefix. Nothing is added to what the template writes. A text that spells a
        special token is encoded as that token, as in transformers.

        Args:
            messages: As for chat(): one conversation.

        Returns:
            int32 [p] and int32 [u], for generate() or stream(): prefix and prompt.

        Raises:
            ImportError: As for chat().
            TypeError: As for chat().
            ValueError: As for chat().
        """
        tokenizer = self._chat_tokenizer()
        return encode_split(*self.chat_template.split(messages), tokenizer)

    @documented
    def chat(
        self,
        conversations: Messages | Sequence[Messages],
        *,
        response: Response | Sequence[Response | None] | None = None,
        cache: Cache | Sequence[Cache | None] | None = None,
        cache_salt: str | None = None,
        stop: str | Sequence[str] | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[Output]:
        """Generates the next answer of every conversation, in the checkpoint's chat template.

        As generate() with what split_chat() gives: what stands before the last user's text is the
        shared prefix.

        Args:
            conversations: One conversation or a list of them. A conversation is a list of messages
                {"role": ..., "content": ...}, both text; the last one is the user's.
            response: As for generate().
            cache: As for generate().
            cache_salt: As for generate().
            stop: As for generate().
            progress: As for generate().
            **options: As for generate(), see below.

        Returns:
            One Output per conversation, in order.

        Raises:
            ImportError: jinja2 is not installed.
            TypeError: As for generate(), or not messages.
            ValueError: As for generate(), no template in the folder, or one that refuses the
                messages or writes other prefixes for other last texts.
        """
        if "prefix" in options:
            raise TypeError("[chat] prefix: expected it in the messages, got an option")
        tokenizer, template = self._chat_tokenizer(), self.chat_template
        prefixes, prompts = [], []
        for i, messages in enumerate(split_conversations(conversations)):
            split = template.split(messages, where=f"conversation {i}")
            prefix, prompt = encode_split(*split, tokenizer)
            prefixes.append(prefix)
            prompts.append(prompt)
        return self.generate(
            prompts, prefix=prefixes, response=response, cache=cache, cache_salt=cache_salt,
            stop=stop, progress=progress, **options,
        )  # fmt: skip

    def _chat_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"[chat] tokenizer: expected one to encode text with, got none; "
                f"{Tokenizer.missing(self.path)}"
            )
        return self.tokenizer

    def _policies(self, cache: Any, count: int) -> list[_core.Policy]:
        """One policy per prompt."""
        if not isinstance(cache, (list, tuple)):
            return [self._policy if cache is None else self._as_policy(cache)] * count
        if len(cache) != count:
            raise ValueError(
                f"[generate] cache: expected one for all prompts or a list of {count}, "
                f"got a list of {len(cache)}"
            )
        return [self._policy if c is None else self._as_policy(c) for c in cache]

    def _stops(self, stop: object) -> tuple[str, ...]:
        stops = as_stop(stop)
        if stops and self.tokenizer is None:
            raise ValueError(
                f"[generate] stop: expected a tokenizer, got none; {Tokenizer.missing(self.path)}"
            )
        return stops

    def _requests(
        self,
        prompts: list[object],
        prefix: object,
        response: object,
        cache: object,
        cache_salt: object,
        discover: object,
        stop: object,
        options: dict[str, Any],
    ) -> tuple[list[_Request], list[Ending]]:
        count, stops = len(prompts), self._stops(stop)
        policies = self._policies(cache, count)
        salt, look = as_salt(cache_salt), as_discover(discover)
        shared: dict[int, NDArray[np.int32]] = {}  # by identity: one list element for all prompts
        settings: dict[int | None, tuple[dict[str, Any], Ending]] = {}  # by length of `response`
        requests: list[_Request] = []
        endings: list[Ending] = []
        for i, (prompt, before, given) in enumerate(
            zip(
                prompts,
                split_prefixes(prefix, count),
                split_responses(response, count),
                strict=True,
            )
        ):
            if id(before) not in shared:
                shared[id(before)] = self._encoder.prefix(before, f"generate] prefix {i}")
            head = shared[id(before)]
            ids = self._encoder.prompt(prompt, f"generate] prompt {i}", after_prefix=len(head) > 0)
            if len(head) + len(ids) == 0:
                raise ValueError(
                    f"[generate] prompt {i}: expected at least one token of prompt or prefix, "
                    "got none"
                )
            joined = np.concatenate([head, ids]) if len(head) else ids
            fixed = self._encoder.response(
                given, f"generate] response {i}", self.config.mask_token_id
            )
            length = None if fixed is None else len(fixed)
            if length not in settings:
                settings[length] = self._settings(options, stops, length)
            own, ending = settings[length]
            endings.append(ending)
            requests.append((joined, len(head), own, policies[i], salt, look, fixed))
        return requests, endings

    def _settings(
        self, options: dict[str, Any], stops: tuple[str, ...], length: int | None
    ) -> tuple[dict[str, Any], Ending]:
        """The engine's options, and what ends the text, of requests with (or without) a given
        response of this length."""
        names = ["gen_length", *(alias for alias, name in ALIASES.items() if name == "gen_length")]
        if length is not None and all(options.get(name) is None for name in names):
            options = options | {"gen_length": length}
        settings = resolve_options(options, self._sidecar.generation)
        ends = tuple(settings.get("end_tokens", self._ends))
        early = bool(settings.get("early_stop", False))
        if stops and not ends:
            settings["early_stop"] = False  # the engine knows no other ends
        return settings, Ending(self.tokenizer, self.config.mask_token_id, ends, stops, early)


def _output(result: _core.Result, ending: Ending) -> Output:
    tokens, reason = result.tokens, result.finish_reason
    text, ended = ending.text(tokens[tokens != ending.mask])
    if ended is not None and reason != "cancelled":
        reason = ended
    return Output(text, tokens, result.confidences, reason, RequestStats.of(result.stats))


def _bar(total: int, enabled: bool) -> AbstractContextManager[Any]:
    """A progress bar of `total` steps on stderr, or None."""
    if not enabled:
        return nullcontext(None)
    from tqdm import tqdm

    return tqdm(total=total, desc="generate", unit="step", file=sys.stderr, dynamic_ncols=True)
