"""Keeps vLLM running: starts it, follows its start, notices its end, starts it again while the budget lasts.

Rules:
- ready means that the engine's /health answered 200; not ready again the moment the process has ended;
- vLLM exits 0 when its engine core dies, so every end that nobody asked for is a failure;
- a failure that the same start would repeat (`Diagnosis.final`) is not tried again.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from shoehorn.diagnosis import Diagnosis, diagnose
from shoehorn.errors import EngineFailedError
from shoehorn.process import Child
from shoehorn.render import ENGINE_STOP_SECONDS
from shoehorn.restarts import Restarts
from shoehorn.state import Phase, StateFile

log = logging.getLogger("engine")

_TICK_SECONDS = 0.5
_STAGES = (
    (re.compile(r"Starting to load model"), "loading the weights"),
    (re.compile(r"Loading weights took|Model loading took"), "measuring memory and warming up"),
    (re.compile(r"Capturing CUDA graphs|Compiling a graph|torch\.compile took"), "compiling and capturing graphs"),
    (re.compile(r"Starting vLLM server"), "opening the API"),
)
_SHARDS = re.compile(r"Loading safetensors checkpoint shards:\s+(\d+)% Completed")

# Never handed to the engine: secrets, and switches that open routes without a key or load code over the network.
WITHHELD = frozenset({
    "API_KEY", "API_KEY_FILE", "MODELSCOPE_API_TOKEN", "MODELSCOPE_API_TOKEN_FILE", "HF_TOKEN", "VLLM_API_KEY",
    "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH", "VLLM_USE_MODELSCOPE", "PYTHONOPTIMIZE", "STANDARD_PIP_ARGS",
})


def engine_environment(environment: Mapping[str, str], plan_environment: Mapping[str, str],
                       run_dir: Path) -> dict[str, str]:
    """The engine's environment: the container's without `WITHHELD`, the plan's, and what the appliance fixes."""
    nothing = run_dir / "nothing"  # vLLM runs model.py from this folder at start, if one is there
    return {
        **{name: value for name, value in environment.items()
           if name not in WITHHELD and not name.startswith(("SAGEMAKER_", "CUSTOM_"))},
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # its kernels are compiled at run time and need nvcc
        "VLLM_ENGINE_READY_TIMEOUT_S": "7200",
        **plan_environment,
        "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false", "SAGEMAKER_MODEL_PATH": str(nothing),
    }


class Server:
    """The vLLM API server of this container.

    Args:
        config: the path of `vllm.yaml`.
        environment: all of the engine's environment.
        socket: where it will listen.
        on_ready: called at every readiness with the seconds that the start took.
        engine_log: a file for the engine's own lines; None sends them to standard output.
    """

    def __init__(self, config: Path, environment: Mapping[str, str], socket: Path, states: StateFile,
                 restarts: Restarts, on_ready: Callable[[float], None], engine_log: Path | None) -> None:
        self._command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--config", str(config)]
        self._environment = environment
        self._socket = socket
        self._states = states
        self._restarts = restarts
        self._on_ready = on_ready
        self._engine_log = engine_log
        self._tail: deque[str] = deque(maxlen=200)

    def serve(self) -> None:
        """Serve until an exception ends it, most often the caller's own on SIGTERM.

        Raises:
            EngineFailedError: the engine failed in a way that a new start would repeat, or the budget is used up.
        """
        while True:
            if self._restarts.exhausted:
                raise EngineFailedError("The engine failed too often within an hour; no further start is tried.",
                                        "The engine's lines above name the first failure.")
            diagnosis = self._once()
            failures = self._restarts.record()
            if diagnosis.final or self._restarts.exhausted:
                self._show_tail()
                raise EngineFailedError(diagnosis.cause, diagnosis.remedy)
            delay = self._restarts.delay_seconds(failures)
            log.warning("%s It is started again in %.0f s (failure %d).", diagnosis.cause, delay, failures)
            self._states.update(phase=Phase.LOADING, progress=None, detail="starting the engine again",
                                restarts=self._states.read().restarts + 1)
            time.sleep(delay)

    def _once(self) -> Diagnosis:
        """One life of the engine; returns why it ended."""
        self._socket.unlink(missing_ok=True)  # vLLM leaves it behind and does not start over it
        self._tail.clear()
        started = time.monotonic()
        child = Child(self._command, self._environment, self._line, self._states.run_dir / "engine.group")
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self._socket)), timeout=2.0) as client:
                ready = False
                while (status := child.wait(_TICK_SECONDS)) is None:
                    if not ready and _healthy(client):
                        ready = True
                        self._states.update(phase=Phase.READY, progress=None, detail="serving")
                        self._on_ready(time.monotonic() - started)
        finally:
            child.stop(ENGINE_STOP_SECONDS)
        return diagnose(self._tail, status)

    def _line(self, line: str) -> None:
        """One line of the engine's output, from the reading thread."""
        self._tail.append(line)
        if self._engine_log:
            with self._engine_log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        else:
            logging.getLogger("vllm").info("%s", line)
        if self._states.read().phase is not Phase.LOADING:
            return
        if match := _SHARDS.search(line):
            self._states.update(detail="loading the weights", progress=int(match[1]) / 100)
            return
        for pattern, detail in _STAGES:
            if pattern.search(line) and self._states.read().detail != detail:
                self._states.update(detail=detail, progress=None)
                log.info("%s", detail)

    def _show_tail(self) -> None:
        if self._engine_log:
            for line in self._tail:
                print(line, flush=True)


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("http://engine/health").status_code == httpx.codes.OK
    except httpx.TransportError:
        return False

