"""Stand-in for the engine of a replica: the real admission middleware with an application that generates no text.

    python -m fakes.replica_engine RUN_DIR NAME

A request controls it by its body: `tokens` (of the answer; 4), `pause` (seconds before each token; 0), `stream`,
`die` (the process ends without an answer). A prompt has 3 tokens. An answer contains the name of the replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import uvicorn

from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.server_program import GracefulServer, listen
from shoehorn_vllm.api.ledger import UsageLedger
from shoehorn_vllm.api.meter import CURRENT, Meter
from shoehorn_vllm.api.middleware import AdmissionMiddleware, Scope
from shoehorn_vllm.api.request import Receive, Send


class Application:
    """The application behind the middleware."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, unless its client leaves."""
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        steer = json.loads(body) if body else {}
        if steer.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        meter = CURRENT.get()
        if meter and steer:
            meter.count_prompt("", 3)
        work = asyncio.create_task(self._answer(steer, meter, send))
        leaving = asyncio.create_task(receive())
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _answer(self, steer: dict[str, float], meter: Meter | None, send: Send) -> None:
        tokens = int(steer.get("tokens", 4)) if steer else 0
        is_stream = bool(steer.get("stream"))
        kind = b"text/event-stream; charset=utf-8" if is_stream else b"application/json"
        text = json.dumps({"replica": self._name, "tokens": tokens}).encode()
        if is_stream:
            await send(_start(kind))
        for number in range(tokens):
            await asyncio.sleep(steer.get("pause", 0))
            if meter:
                meter.count_completion(1)
            if is_stream:
                await send(_chunk(b"data: " + json.dumps({"replica": self._name, "n": number}).encode() + b"\n\n"))
        if is_stream:
            await send(_chunk(b"data: [DONE]\n\n"))
            await send(_chunk(b"", more=False))
        else:
            await send(_start(kind))
            await send(_chunk(text, more=False))


def _start(kind: bytes) -> dict[str, object]:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}


def _chunk(body: bytes, more: bool = True) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def main() -> None:
    """Serve until SIGTERM."""
    paths = RunDir(Path(sys.argv[1]))
    middleware = AdmissionMiddleware(Application(sys.argv[2]), ledger=UsageLedger())
    server = GracefulServer(uvicorn.Config(middleware, lifespan="off", log_config=None, access_log=False))
    asyncio.run(server.serve(sockets=[listen(paths.engine_socket)]))


if __name__ == "__main__":
    main()
