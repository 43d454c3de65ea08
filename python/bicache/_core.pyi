"""The compiled engine: thin bindings, no logic. Use the `bicache` package."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

class Config:
    """Sizes and flags of a checkpoint, read from its config.json."""

    @property
    def family(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def embeddings(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def experts(self) -> int: ...
    @property
    def experts_per_row(self) -> int: ...
    @property
    def tied(self) -> bool: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def shift(self) -> int: ...
    @property
    def known_ids(self) -> int: ...
    @property
    def mask_token_id(self) -> int: ...
    @property
    def eos_token_id(self) -> int: ...
    @property
    def eot_token_id(self) -> int: ...

class StepEvent:
    """One committed denoising step of one request."""

    @property
    def request(self) -> int: ...  # index into the requests given to Engine.start
    @property
    def step(self) -> int: ...  # 0, 1, ... committed steps of this request
    @property
    def positions(self) -> NDArray[np.int64]: ...  # [k] canvas positions committed now, ascending
    @property
    def tokens(self) -> NDArray[np.int32]: ...  # [k]
    @property
    def confidences(self) -> NDArray[np.float32]: ...  # [k]
    @property
    def canvas(self) -> NDArray[np.int32]: ...  # [N] prompt and response after the step

class Result:
    """What one request produced."""

    @property
    def tokens(self) -> NDArray[np.int32]: ...  # [g]
    @property
    def confidences(self) -> NDArray[np.float32]: ...  # [g]; NaN: never committed
    @property
    def finish_reason(self) -> str: ...  # "eos", "stop", "length", "cancelled"
    @property
    def stats(self) -> dict[str, Any]: ...

class Generation:
    """A batch of requests under way; made by Engine.start."""

    @property
    def done(self) -> bool: ...
    @property
    def finished(self) -> int: ...  # requests that have ended
    @property
    def steps_done(self) -> int: ...  # committed steps, all requests
    @property
    def steps_total(self) -> int: ...  # upper bound of the same
    def step(self) -> list[StepEvent]:
        """One forward pass of the batch, then sampling: what it committed. Releases the GIL."""
    def cancel(self, request: int) -> None:
        """Ends one request at its current canvas."""
    def stop(self, request: int) -> None:
        """The same, of one whose text has ended: its masks become its first end token."""
    def results(self) -> list[Result]:
        """One per request, in order; RuntimeError before `done`."""

class RequestInfo:
    """What a depth hook sees of one request."""

    @property
    def p(self) -> int: ...  # shared-prefix rows
    @property
    def u(self) -> int: ...  # own prompt rows
    @property
    def g(self) -> int: ...  # response rows
    @property
    def n(self) -> int: ...  # p + u + g
    @property
    def layers(self) -> int: ...
    @property
    def ratio(self) -> int: ...  # round(100 p / n)
    @property
    def step(self) -> int: ...
    @property
    def depth(self) -> int: ...  # in force so far; -1: none
    @property
    def drift(self) -> tuple[float, ...] | None: ...  # 1 - cosine of K and V, per layer
    @property
    def state_drift(self) -> tuple[float, ...] | None: ...  # of the residual entering it

class DepthHook:
    """A Python function that chooses depths."""

    def __init__(
        self,
        function: Callable[[RequestInfo], int],
        *,
        reachable: Sequence[int] | None = None,
        observes: bool = False,
    ) -> None: ...

class Policy:
    """A cache policy, ready for Engine.start."""

    @property
    def spec(self) -> str: ...

class Engine:
    """A loaded model and its prefix store. Safe to use from several threads: steps take turns."""

    def __init__(
        self,
        folder: str,
        *,
        dtype: str = "auto",
        kv_dtype: str = "auto",
        backend: str = "packed",
        threads: int = 0,
        prefix_budget_bytes: int = 1 << 30,
        prefix_dtype: str = "f32",
        eot_token_id: int = -1,
        known_ids: int = 0,
    ) -> None: ...
    @property
    def config(self) -> Config: ...
    @property
    def dtype(self) -> str: ...  # how weights are held: "f32", "bf16", "int8" or "int4"
    @property
    def kv_dtype(self) -> str: ...  # "f32" or "bf16": how K and V are held
    @property
    def backend(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def prefix_dtype(self) -> str: ...  # "f32" or "bf16": how prefix entries are held (not K/V)
    @property
    def fingerprint(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    def forward(
        self, tokens: NDArray[np.int32], rows: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Logits [len(rows), V] of positions `rows` (None: all N) of tokens [N], uncached."""
    def start(
        self,
        requests: list[
            tuple[
                NDArray[np.int32],
                int,
                dict[str, Any],
                Policy,
                str,
                tuple[int, int] | None,
                NDArray[np.int32] | None,
            ]
        ],
        *,
        batch_rows: int = 4096,
    ) -> Generation:
        """Requests are (prompt ids [p + u], p, options, policy, salt, discovery, response [g] with
        masks to fill or None); checked first."""
    def set_tap(self, tap: Callable[[int, str, NDArray[np.float32]], None] | None) -> None:
        """tap(layer, name, array) for every pass from now on; None: off."""
    def prefix_stats(self) -> dict[str, int]: ...
    def clear_prefixes(self) -> None: ...
    def save_prefixes(self, path: str | bytes) -> int:
        """Writes all prefix entries to a file; how many."""
    def load_prefixes(self, path: str | bytes) -> dict[str, int]:
        """Puts those of a file into the store: {"entries": in the file, "kept": in the store}."""
    def warm(self, tokens: NDArray[np.int32], policy: Policy, salt: str = "") -> bool:
        """Makes the entry of a prefix [p], unless it is there; whether it is kept."""

def read_config(folder: str) -> Config:
    """Sizes and flags of a checkpoint folder or GGUF file, checked; loads no weight."""

def parse_config(path: str) -> Config:
    """Sizes and flags from a config.json alone."""

def forecast(
    config: Config,
    policy: Policy,
    *,
    prefix_len: int = 0,
    prompt_len: int,
    options: dict[str, Any] = {},
    dtype: str = "bf16",
    kv_dtype: str = "bf16",
    tokens_per_step: float | None = None,
) -> dict[str, Any]:
    """A request's statistics from its plans alone; prefix_len shared tokens and prompt_len of its
    own."""

def checkpoint_info(folder: str) -> dict[str, Any]:
    """{"tensors": {name: (dtype, shape)}, "size_bytes", "parameters", "types": {dtype: bytes}};
    loads no weight."""

def gguf_metadata(path: str) -> dict[str, Any]:
    """The metadata of a GGUF file, by key."""

def gguf_tensor(path: str, name: str) -> NDArray[np.float32]:
    """A tensor of a GGUF model [its shape], under the name and with the rows of the folder it was
    made from."""

def option_table() -> list[dict[str, Any]]:
    """Generation options: name, type, default, help, choices."""

def policy_table() -> list[dict[str, Any]]:
    """Cache policies: name, help, fields (name, default, help), identity."""

def make_policy(cache: str, hook: DepthHook | None = None) -> Policy:
    """The policy of a cache string; `hook` is what "depth=hook" stands for."""

def compose(a: Policy, b: Policy) -> Policy:
    """One that speaks for the shared prefix rows and one for the others, in either order."""

def canonical_policy(cache: str) -> str:
    """The cache string in its usual form; ValueError as for make_policy."""

def isa() -> str:
    """The kernel table in use."""

def available_isas() -> list[str]: ...
def available_threads() -> int:
    """CPUs this process may use: affinity mask and cgroup quota."""

def parallel_backend() -> str: ...
def blas_config() -> str: ...
def uniform(seed: int, stream: str, step: int, position: int, count: int) -> NDArray[np.float64]:
    """The sampler's random numbers [count] in [0, 1): stream "token" or "confidence"."""
