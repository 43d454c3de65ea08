"""How the engine lives in a process: the GIL, forks, taps, CPU affinity, the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import bicache
import numpy as np
import pytest
from bicache import _core

Maker = Callable[..., Path]


def run(code: str, *arguments: object, **environment: str) -> str:
    """stdout of `code` in a fresh interpreter; fails on an error or a hang."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=env | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_step_releases_the_gil(tiny_checkpoint: Maker) -> None:
    engine = _core.Engine(str(tiny_checkpoint(dim=64, layers=4, context=1024)), threads=1)
    prompt = np.full(500, 5, np.int32)
    policy = _core.make_policy("none")
    generation = engine.start([(prompt, 0, {"gen_length": 4}, policy, "", None, None)] * 4)
    began, ended = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        generation.step()
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    turns = 0
    while not ended.is_set():
        turns += 1
        ended.wait(0.001)
    thread.join()
    assert turns > 5, "the main thread stood still during a step"


FORK = """
import os, sys
import bicache
if {torch}:
    import torch
    torch.ones(400, 400) @ torch.ones(400, 400)
else:
    bicache.LLM(sys.argv[1], threads=2).forward(list(range(4, 40)) * 3)
child = os.fork()
if child == 0:
    llm = bicache.LLM(sys.argv[1], threads=2)
    os._exit(0 if llm.forward(list(range(4, 40)) * 3).shape[0] == 108 else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.parametrize("torch", [False, True])
def test_a_forked_child_works(tiny_checkpoint: Maker, torch: bool) -> None:
    """Whether bicache or torch, which shares the OpenMP runtime, used threads before."""
    folder = tiny_checkpoint(dim=128, heads=4, ffn=256, context=256, vocab=64)
    run(FORK.format(torch=torch), folder)


def test_a_tap_cannot_use_its_own_model(tiny_checkpoint: Maker) -> None:
    llm = bicache.LLM(tiny_checkpoint(), threads=1)
    with llm.tap(lambda layer, name, array: llm.forward([4, 5])):
        with pytest.raises(RuntimeError, match="from inside a tap or a depth policy"):
            llm.forward([4, 5, 6])
    assert len(llm.forward([4, 5])) == 2


def test_threads_follow_the_affinity_mask() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from bicache import _core; print(_core.available_threads())"
    )
    assert run(code) == "1\n"


@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_importing_leaves_the_environment_alone(given: dict[str, str]) -> None:
    code = "import os; before = dict(os.environ); import bicache; print(before == dict(os.environ))"
    assert run(code, **given) == "True\n"


EXIT = """
import threading, time
import bicache
llm = bicache.LLM("records", threads=1)
def work():
    while True:
        {call}
threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""


@pytest.mark.parametrize(
    "call",
    [
        'llm.generate(["which of them are red ?"] * 100)',
        'list(llm.stream("which of them are red ?"))',
        "llm.forward([1, 10, 26] * 60)",
        "with llm.tap(lambda *a: None): llm.forward([1, 10, 26] * 60)",
    ],
)
def test_the_interpreter_may_end_while_a_daemon_thread_generates(call: str) -> None:
    for _ in range(3):
        assert run(EXIT.format(call=call)) == ""


def test_taps_may_close_in_any_order(tiny_checkpoint: Maker) -> None:
    llm = bicache.LLM(tiny_checkpoint(), threads=1)
    seen: list[str] = []
    first = llm.tap(lambda *a: seen.append("first"))
    second = llm.tap(lambda *a: seen.append("second"))
    first.__enter__()
    second.__enter__()
    llm.forward([4, 5])
    assert set(seen) == {"second"}
    first.__exit__(None, None, None)
    seen.clear()
    llm.forward([4, 5])
    assert set(seen) == {"second"}
    second.__exit__(None, None, None)
    seen.clear()
    llm.forward([4, 5])
    assert not seen
