"""How the OpenMP runtime waits: it reads its environment once, when the first module loads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@contextmanager
def passive_waiting() -> Iterator[None]:
    """Threads sleep at barriers instead of spinning, if the runtime is loaded within.

    A spinning thread keeps the CPU from the very thread it waits for: on a shared machine that
    costs far more than waking up costs on an idle one (docs/measurements.md). Does nothing where
    the user has set one of the variables, or where somebody else loaded the runtime before; leaves
    the environment as it was.
    """
    if any(name in os.environ for name in _VARIABLES):
        yield
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    try:
        yield
    finally:
        del os.environ["OMP_WAIT_POLICY"]
