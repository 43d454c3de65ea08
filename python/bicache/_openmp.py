"""How the OpenMP runtime waits: it reads its environment once, when the first module loads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_SPINS = "1000"


@contextmanager
def short_spins() -> Iterator[None]:
    """Threads spin briefly at barriers and then sleep, if the runtime is loaded within.

    libgomp's default spins some hundred times longer. On a shared machine a spinning thread keeps
    the CPU from the very thread it waits for (docs/measurements.md). Does nothing where the user
    has set OMP_WAIT_POLICY or GOMP_SPINCOUNT, or where somebody else loaded the runtime before;
    leaves the environment as it was.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]
