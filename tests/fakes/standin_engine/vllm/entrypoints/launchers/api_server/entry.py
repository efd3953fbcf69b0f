"""API server of the stand-in: reads its YAML, writes vLLM's log lines, and serves behind the appliance's middleware.

The variable STANDIN_ENGINE (JSON) selects failures:
- `load`: with more batched tokens no memory is left for the KV cache;
- `worker`: with a KV cache of more bytes one of two workers fails and the other waits for it;
- `cache`: with a KV cache of more bytes it exits in the first full batch;
- `blocks`: it refuses CUDA graphs for more sequences;
- `no_bf16`, `speculative`: it cannot start with bf16, or with a speculative configuration;
- `alive`: it crashes so many seconds after its first full batch;
- `hold`: it keeps loading as long as this file exists.
Messages are those of vLLM 0.32.0 and torch 2.13.0.
"""

import asyncio
import importlib
import json
import logging.config
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
import yaml
from prometheus_client import Counter, Gauge, generate_latest

from vllm.engine_core import Core, EngineDeadError

log = logging.getLogger("vllm.standin")

GENERATED = Counter("vllm:generation_tokens", "Tokens generated.", ("model_name",)).labels("standin")
RUNNING = Gauge("vllm:num_requests_running", "Requests that run.", ("model_name",)).labels("standin")
UNBOUNDED = 1 << 40


class Application:
    """ASGI application: health, metrics, and completions of as many tokens as a request asks for."""

    def __init__(self, core: Core, options: dict[str, Any], limits: dict[str, Any]) -> None:
        self.core = core
        self.exits_in_batch = options.get("kv-cache-memory-bytes", 0) > limits.get("cache", UNBOUNDED)
        self.seconds_after_batch = limits.get("alive")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] == "/health":
            await answer(send, 500 if self.core.dead else 200, b"")
        elif scope["path"] == "/metrics":
            await answer(send, 200, generate_latest())
        elif scope["method"] == "POST":
            await self.complete(scope["path"], json.loads(body), send)
        else:
            await answer(send, 200, b'{"data": []}')

    async def complete(self, path: str, body: dict[str, Any], send: Any) -> None:
        """Send one token for each that the engine core produces, as a stream if the request asks for one."""
        prompt = body.get("prompt", "")
        if path == "/v1/completions" and isinstance(prompt, list) and len(prompt) > 1:
            self.run_full_batch()
        stream = body.get("stream", False)
        RUNNING.inc()
        try:
            if stream:
                await send({"type": "http.response.start", "status": 200,
                            "headers": [(b"content-type", b"text/event-stream; charset=utf-8")]})
            for _ in range(body.get("max_tokens") or 4):
                await self.core.step()
                GENERATED.inc()
                if stream:
                    await send({"type": "http.response.body", "body": b'data: {"choices": []}\n\n', "more_body": True})
            if stream:
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
            else:
                await answer(send, 200, b'{"choices": [{"message": {"content": "I am a stand-in."}}]}')
        finally:
            RUNNING.dec()
            log.info("Engine 000: Avg prompt throughput: 1.0 tokens/s, Avg generation throughput: 50.0 tokens/s, "
                     "Running: 0 reqs, Waiting: 0 reqs, GPU KV cache usage: 0.1%, Prefix cache hit rate: 0.0%")

    def run_full_batch(self) -> None:
        """Fail in the first full batch, or after it, if a limit says so."""
        if self.exits_in_batch:
            log.error("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 900.00 MiB. GPU 0 has a total "
                      "capacity of 139.80 GiB of which 100.00 MiB is free. Process 1 has 139.7 GiB memory in use.")
            exit_now(0)  # as vLLM does when its engine core is gone
        if self.seconds_after_batch is not None:
            threading.Timer(self.seconds_after_batch, crash).start()


async def answer(send: Any, status: int, body: bytes) -> None:
    """Send a whole answer."""
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


def exit_now(status: int) -> None:
    """Exit from any thread."""
    sys.stdout.flush()
    os._exit(status)


def crash() -> None:
    """Exit as after a defect of a GPU kernel."""
    log.error("RuntimeError: CUDA error: an illegal memory access was encountered")
    exit_now(1)


def load(options: dict[str, Any], limits: dict[str, Any]) -> None:
    """Write the lines of a start; exit where a limit says that it fails."""
    if limits.get("no_bf16") and options.get("dtype") != "float16":
        log.error("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0.")
        sys.exit(1)
    if limits.get("speculative") and options.get("speculative-config"):
        log.error("NotImplementedError: ngram is not supported yet.")
        sys.exit(1)
    log.info("Model loading took %s GiB memory and %.6f seconds", "15.0", 4.9)
    if options["max-num-batched-tokens"] > limits.get("load", UNBOUNDED):
        log.info("Available KV cache memory: %s GiB", "-0.05")
        log.error("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`")
        sys.exit(1)
    log.info("%s KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx", "GPU", "8,192",
             "4,096", 2.0)
    if options["max-num-seqs"] > (blocks := limits.get("blocks", UNBOUNDED)):
        log.error("ValueError: max_num_seqs (%d) exceeds available Mamba cache blocks (%d). Each decode sequence "
                  "requires one Mamba cache block, so CUDA graph capture cannot proceed. Please lower max_num_seqs to "
                  "at most %d or increase gpu_memory_utilization.", options["max-num-seqs"], blocks, blocks)
        sys.exit(1)
    if options.get("kv-cache-memory-bytes", 0) > limits.get("worker", UNBOUNDED):
        log.error("WorkerProc hit an exception.")
        log.error('RuntimeError: torch_call_dispatcher( "aten::empty", "memory_format", stack.data(), ( ((0ULL + 2) << '
                  '56))) API call failed at torch/csrc/stable/ops.h, line 631')
        time.sleep(3600)
    log.info("Graph capturing finished in %.0f secs, took %.2f GiB", 3.0, 0.11)


def hold(core: Core, file: Path) -> None:
    """Keep loading as long as the file exists and the engine core runs."""
    while file.exists():
        if core.dead:
            log.error("RuntimeError: Engine core initialization failed.")
            sys.exit(1)
        time.sleep(0.02)


async def serve(core: Core, options: dict[str, Any], limits: dict[str, Any]) -> None:
    """Serve until SIGTERM, or until the engine core exits."""
    application: Any = Application(core, options, limits)
    for name in options["middleware"]:
        module, _, member = name.rpartition(".")
        application = getattr(importlib.import_module(module), member)(application)
    server = uvicorn.Server(uvicorn.Config(application, uds=options["uds"], log_config=None, access_log=False,
                                           lifespan="off"))
    steps = asyncio.create_task(core.run())
    serving = asyncio.create_task(server.serve())
    await asyncio.wait((steps, serving), return_when=asyncio.FIRST_COMPLETED)
    if core.dead:
        log.error("%s: EngineCore encountered an issue.", EngineDeadError.__name__)
        server.should_exit = True
    await serving
    steps.cancel()


def main() -> None:
    """Run the stand-in."""
    options = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    limits = json.loads(os.environ.get("STANDIN_ENGINE", "{}"))
    logging.config.dictConfig(json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text()))
    core = Core()
    if "hold" in limits:
        hold(core, Path(limits["hold"]))
    load(options, limits)
    asyncio.run(serve(core, options, limits))


if __name__ == "__main__":
    main()
