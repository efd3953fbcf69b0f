"""Patch: look at a model's class in a fork, not in a fresh interpreter.

Before its first start with an architecture vLLM reads properties of the model's class in another process, so that the
import of the class cannot initialize CUDA in its own. That process is a fresh interpreter, which imports vLLM again:
12 s on a machine with an H100. A fork has it imported already. Where the fork fails or hangs, vLLM's own way is taken.

Source: vLLM 0.32.0, model_executor/models/registry.py, _run_in_subprocess; the result is cached in VLLM_CACHE_ROOT.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
from collections.abc import Callable

from vllm.logger import init_logger
from vllm.model_executor.models import registry

from shoehorn_vllm.patches.patch import Patch

log = init_logger("vllm.shoehorn.model_info")

_LIMIT_SECONDS = 60.0


def apply() -> None:
    """Patch this process."""
    PATCH.apply()


def _run_in_fork(original: Callable[[Callable[[], object]], object], function: Callable[[], object]) -> object:
    """Return the function's result, computed in a fork."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _send_result(function, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        finished = bool(select.select([pipe], [], [], _LIMIT_SECONDS)[0])
        if not finished:
            os.kill(pid, signal.SIGKILL)
        result = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status or not finished:
        log.warning("Model class not readable in a fork, starting a fresh process status=%d", status)
        return original(function)
    return pickle.loads(result)  # noqa: S301  # written by the fork above


def _send_result(function: Callable[[], object], pipe: int) -> None:
    """Write the function's result and exit, without the handlers of the process that was forked."""
    status = 1
    try:
        result = pickle.dumps(function())
        with open(pipe, "wb") as file:
            file.write(result)
        status = 0
    finally:
        os._exit(status)


PATCH = Patch(registry, "_run_in_subprocess", _run_in_fork)
