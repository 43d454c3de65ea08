"""llama.cpp through llama-cpp-python's low-level API: a peer of bench/peers.py."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as api
from numpy.typing import NDArray

FILE_TYPES = {
    "Q8_0": api.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": api.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": api.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


@api.llama_log_callback
def _quiet(level: int, message: bytes, _: Any) -> None:
    """llama.cpp's log without what is not an error."""


api.llama_log_set(_quiet, ctypes.c_void_p(0))


def quantise(source: Path, target: Path, kind: str, threads: int) -> None:
    """Writes a GGUF file of `source` in another type, with llama.cpp's own choices per tensor.

    Raises:
        RuntimeError: It failed.
    """
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = FILE_TYPES[kind], threads
    code = api.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(settings))
    if code != 0:
        raise RuntimeError(f"[peer_llama] quantise to {kind}: expected 0, got {code}")


class Llama:
    """A GGUF file, run without causal mask and with logits of all rows.

    Args:
        path: The file.
        threads: CPU threads.
        context: Most rows of a pass.

    Raises:
        RuntimeError: llama.cpp does not load it.
    """

    def __init__(self, path: Path, threads: int, context: int) -> None:
        api.llama_backend_init()
        loading = api.llama_model_default_params()
        loading.use_mmap = False  # or the kernel may take pages back between rounds
        self.model = api.llama_model_load_from_file(bytes(path), loading)
        if not self.model:
            raise RuntimeError(f"[peer_llama] {path.name}: llama.cpp does not load it")
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self.context = api.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"[peer_llama] {path.name}: no context of {context} rows")
        api.llama_set_causal_attn(self.context, False)
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(context, 0, 1)

    def about(self) -> dict[str, Any]:
        return {
            "version": llama_cpp.__version__,
            "system": api.llama_print_system_info().decode().strip(),
        }

    def prepare(self, tokens: Sequence[int]) -> int:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        return len(tokens)

    def forward(self, rows: int) -> Any:
        """Logits [rows, V] in llama.cpp's own memory.

        Raises:
            RuntimeError: llama_decode failed.
        """
        code = api.llama_decode(self.context, self.batch)
        if code != 0:
            raise RuntimeError(f"[peer_llama] llama_decode: expected 0, got {code}")
        api.llama_synchronize(self.context)
        return rows, api.llama_get_logits(self.context)

    def array(self, logits: Any) -> NDArray[np.float32]:
        rows, pointer = logits
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab))


if (
    __name__ == "__main__"
):  # SOURCE TARGET TYPE THREADS: llama.cpp stays out of the caller's process
    quantise(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
