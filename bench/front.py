"""A front with 100 stand-in replicas on this machine: a lost replica, and the CPU time of the front under load.

The front runs as in production (entry point, nginx, key service, admission, HAProxy with mutual TLS). The replicas are
listeners in one process that answer checks, count usage and send events at a fixed pace without computing; load and
replicas share the CPUs with the front, so the reported CPU time is that of the front's own processes.

1. `prefixes`: PREFIXES conversations are sent, two at a time, then again: the share that returns to its replica.
2. `lost`: one replica is closed, and all conversations are sent a third time: errors, seconds until the front lists it
   as lost, and the share of the other replicas' conversations that moved.
3. `load`: STREAMS streams of RATE events a second each for SECONDS: events per second at the client, and CPU time of
   each program of the front, in cores.
usage: bench/front.py [--replicas N] [--streams N] [--rate N] [--seconds N]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import platform
import ssl
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME / "tests")]
RESULT = HOME / "bench" / "results" / "front.json"
FIRST_PORT = 33_000
PREFIXES = 2000
CONCURRENT = 2
EVENT = b'data: {"choices": [{"index": 0, "delta": {"content": " token"}}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n"


class Replica:
    """One stand-in replica."""

    def __init__(self, number: int) -> None:
        self.name, self.port = f"r{number}", FIRST_PORT + number
        self.streams: set[asyncio.StreamWriter] = set()
        self.connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self, context: ssl.SSLContext) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=context)

    def lose(self) -> None:
        """Close the listener and all connections, as a machine that lost power and answers with a reset."""
        if self._server:
            self._server.close()
        for writer in list(self.connections):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(line[15:]) for line in head.lower().split(b"\r\n")
                               if line.startswith(b"content-length:")), 0)
                body = await reader.readexactly(length) if length else b""
                if b'"stream": true' in body:
                    writer.write(HEAD % b"text/event-stream" + b"Transfer-Encoding: chunked\r\n\r\n")
                    self.streams.add(writer)
                    await reader.read(1)  # until the client leaves
                    return
                text = json.dumps({"replica": self.name, "run": self.name, "usage": []}).encode()
                writer.write(HEAD % b"application/json" + b"Content-Length: %d\r\n\r\n" % len(text) + text)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, ssl.SSLError):
            return
        finally:
            self.connections.discard(writer)
            self.streams.discard(writer)
            writer.close()


async def send_events(replicas: list[Replica], rate: float) -> None:
    """Send events to all streams at a pace."""
    chunk = b"%x\r\n" % len(EVENT) + EVENT + b"\r\n"
    due = time.perf_counter()
    while True:
        for replica in replicas:
            for writer in list(replica.streams):
                writer.write(chunk)
            await asyncio.sleep(0)
        due = max(due + 1 / rate, time.perf_counter() - 1)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))


def request(key: str, prompt: str, stream: bool) -> bytes:
    """Return the bytes of a request."""
    body = json.dumps({"model": "m", "stream": stream, "messages": [{"role": "user", "content": prompt}]}).encode()
    return (f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body


async def send_prefixes(port: int, key: str) -> tuple[dict[int, str], int]:
    """Send all conversations once. Returns the replica of each, and the number of errors."""
    places: dict[int, str] = {}
    errors = 0

    async def worker(first: int) -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(first, PREFIXES, CONCURRENT):
            writer.write(request(key, f"conversation {number}", False))
            head = await reader.readuntil(b"\r\n\r\n")
            if b"chunked" not in head.lower():  # an error of the gateway
                errors += 1
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                continue
            body = b""
            while (size := int((await reader.readline()).strip() or b"0", 16)):
                body += await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
            if b" 200 " in head.split(b"\r\n", 1)[0]:
                places[number] = json.loads(body)["replica"]
            else:
                errors += 1
        writer.close()

    await asyncio.gather(*(worker(number) for number in range(CONCURRENT)))
    return places, errors


async def read_stream(port: int, key: str, number: int, counts: collections.Counter[str]) -> None:
    """Read one stream until cancelled."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request(key, f"stream {number}", True))
        head = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            counts["errors"] += 1
            return
        while data := await reader.read(1 << 16):
            counts["events"] += data.count(b"data:")
        counts["ended"] += 1
    finally:
        writer.close()


async def measure(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Start everything and measure."""
    from shoehorn.runtime import peer_certificates
    from shoehorn.runtime.state import Phase
    from support.replicas import write_secret
    from support.running import TEST_KEY, Appliance

    secret = write_secret(home)
    certificate = peer_certificates.issue(secret.read_text(), "replica")
    pair = home / "pair.pem"
    pair.write_bytes(certificate.pair)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    context.load_verify_locations(cadata=certificate.authority.decode())
    context.verify_mode = ssl.CERT_REQUIRED
    replicas = [Replica(number) for number in range(1, arguments.replicas + 1)]
    for replica in replicas:
        await replica.start(context)
    front = Appliance(home / "front", ROLE="front", REPLICAS=",".join(f"127.0.0.1:{each.port}" for each in replicas),
                      CLUSTER_SECRET_FILE=str(secret))
    try:
        def states() -> list[str]:
            return [str(each["state"]) for each in front.state.replicas]

        while states().count("ready") < len(replicas):
            if front.process.poll() is not None:
                raise RuntimeError(front.output)
            await asyncio.sleep(0.1)
        async with httpx.AsyncClient() as client:
            while (await client.get(f"{front.url}/readyz")).status_code != 200:
                await asyncio.sleep(0.1)
        first, errors = await send_prefixes(front.port, TEST_KEY)
        second, more = await send_prefixes(front.port, TEST_KEY)
        print("prefixes sent", file=sys.stderr, flush=True)
        same = sum(first[number] == second[number] for number in first if number in second)
        result: dict[str, Any] = {"prefixes": {"number": PREFIXES, "errors": errors + more,
                                               "same_replica_share": round(same / PREFIXES, 4)}}
        victim = replicas[len(replicas) // 2]
        lost_at = time.perf_counter()
        victim.lose()
        repeated = asyncio.create_task(send_prefixes(front.port, TEST_KEY))
        while "lost" not in states():
            await asyncio.sleep(0.02)
        noticed = time.perf_counter() - lost_at
        third, errors = await repeated
        print("replica lost", file=sys.stderr, flush=True)
        others = [number for number in second if second[number] != victim.name]
        moved = sum(third.get(number) != second[number] for number in others)
        result["lost"] = {"errors": errors, "noticed_after_seconds": round(noticed, 2),
                          "prefixes_of_the_lost_replica": PREFIXES - len(others),
                          "moved_share_of_others": round(moved / len(others), 4)}
        result["load"] = await load(arguments, front, [each for each in replicas if each is not victim], TEST_KEY)
        if front.phase is not Phase.READY:
            raise RuntimeError(f"the front is {front.phase}")
    finally:
        front.discard()
    return result


async def load(arguments: argparse.Namespace, front: Any, replicas: list[Replica], key: str) -> dict[str, Any]:
    """Measure events per second and the front's CPU time."""
    counts: collections.Counter[str] = collections.Counter()
    readers = [asyncio.create_task(read_stream(front.port, key, number, counts)) for number in range(arguments.streams)]
    sender = asyncio.create_task(send_events(replicas, arguments.rate))
    await asyncio.sleep(8)
    programs = {process.pid: (process, name_of(process)) for process in front.descendants()}
    before = {pid: sum(process.cpu_times()[:2]) for pid, (process, _) in programs.items()}
    events, begun = counts["events"], time.perf_counter()
    await asyncio.sleep(arguments.seconds)
    seconds = time.perf_counter() - begun
    cores: collections.Counter[str] = collections.Counter()
    for pid, (process, name) in programs.items():
        cores[name] += (sum(process.cpu_times()[:2]) - before[pid]) / seconds
    measured = counts["events"] - events
    memory = max(process.memory_info().rss for process, name in programs.values() if name == "front")
    spread = sorted(len(each.streams) for each in replicas)
    for task in (sender, *readers):
        task.cancel()
    await asyncio.gather(sender, *readers, return_exceptions=True)
    return {"streams": arguments.streams, "events_per_second_and_stream": arguments.rate, "seconds": round(seconds, 1),
            "errors": counts["errors"], "ended_early": counts["ended"], "events_per_second": round(measured / seconds),
            "cores": {name: round(value, 3) for name, value in sorted(cores.items())},
            "cores_in_all": round(sum(cores.values()), 3), "front_memory_mib": round(memory / (1 << 20)),
            "streams_of_a_replica": {"least": spread[0], "median": spread[len(spread) // 2], "most": spread[-1]}}


def name_of(process: Any) -> str:
    """Return the name of a program of the front."""
    command = " ".join(process.cmdline())
    for word, name in (("front.main", "front"), ("gateway.service", "keys"), ("exporter", "exporter"),
                       ("event_listener", "watcher"), ("haproxy", "haproxy"), ("nginx", "nginx")):
        if word in command or word in process.name():
            return name
    return "supervisord"


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--streams", type=int, default=800)
    parser.add_argument("--rate", type=float, default=18.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load_before = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(prefix="front") as home:
        result = asyncio.run(measure(arguments, Path(home)))
    document = {"date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": {"cpus": os.cpu_count(), "load_before": load_before,
                            "system": platform.freedesktop_os_release()["PRETTY_NAME"],
                            "python": platform.python_version()},
                "replicas": arguments.replicas, **result}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
