"""Starts as vLLM does: reads its YAML, says in its log what it does, and serves on its Unix socket.

`STANDIN_ENGINE` (JSON) says where it fails: with more batched tokens than `load` it finds no memory for the KV cache;
with a larger cache than `worker` bytes one of its two workers fails and the other waits for it, and than `cache` bytes
it dies over the first full batch; with bf16 and `no_bf16` over the number format; with `guesses` over guessed tokens;
with `alive` that many seconds after its first full batch. Messages are those of vLLM 0.32.0 and torch 2.13.0.
"""

import json
import logging.config
import os
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import yaml

log = logging.getLogger("vllm.standin")


class Handler(BaseHTTPRequestHandler):
    """Health, and completions of one token."""

    dies = False
    alive: float | None = None

    def do_GET(self) -> None:
        self.answer(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        if self.path == "/v1/completions" and len(body["prompt"]) > 1 and self.dies:
            log.error("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 900.00 MiB. GPU 0 has a total "
                      "capacity of 139.80 GiB of which 100.00 MiB is free. Process 1 has 139.7 GiB memory in use.")
            sys.stdout.flush()
            os._exit(0)  # as vLLM does when its engine core is gone
        if self.path == "/v1/completions" and len(body["prompt"]) > 1 and self.alive is not None:
            threading.Timer(self.alive, crash).start()
        self.answer(200 if self.path == "/v1/completions" else 404, {"choices": []})

    def answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def address_string(self) -> str:
        return "unix"


def crash() -> None:
    log.error("RuntimeError: CUDA error: an illegal memory access was encountered")
    sys.stdout.flush()
    os._exit(1)


def main() -> None:
    options = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    limits = json.loads(os.environ["STANDIN_ENGINE"])
    logging.config.dictConfig(json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text()))
    tokens = options["max-num-batched-tokens"]
    if limits.get("no_bf16") and options.get("dtype") != "float16":
        log.error("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0.")
        sys.exit(1)
    if limits.get("guesses") and options.get("speculative-config"):
        log.error("NotImplementedError: ngram is not supported yet.")
        sys.exit(1)
    log.info("Model loading took %s GiB memory and %.6f seconds", "15.0", 4.9)
    if tokens > limits["load"]:
        log.info("Available KV cache memory: %s GiB", "-0.05")
        log.error("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`")
        sys.exit(1)
    log.info("%s KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx", "GPU", "8,192",
             "4,096", 2.0)
    cache = options.get("kv-cache-memory-bytes", 0)
    if cache > limits.get("worker", 1 << 40):
        log.error("WorkerProc hit an exception.")
        log.error('RuntimeError: torch_call_dispatcher( "aten::empty", "memory_format", stack.data(), ( ((0ULL + 2) << '
                  '56))) API call failed at torch/csrc/stable/ops.h, line 631')
        time.sleep(3600)
    log.info("Graph capturing finished in %.0f secs, took %.2f GiB", 3.0, 0.11)
    Handler.dies = cache > limits.get("cache", 1 << 40)
    Handler.alive = limits.get("alive")
    socketserver.ThreadingUnixStreamServer(options["uds"], Handler).serve_forever()


if __name__ == "__main__":
    main()
