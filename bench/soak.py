"""Soak test: many clients for half an hour, one fault per minute, every response compared with a reference.

Runs the appliance with the demo model on the CPU. Clients send requests through the gateway, streamed and not, at
temperature 0. The reference is the engine's response before any fault, for prompts whose response does not depend on
the rest of the batch (determined first). Every request has one of these outcomes:
- `right`: the reference;
- `wrong`: a complete response that differs;
- `told`: an error in OpenAI's format, as a response or as the last event of a stream;
- `cut`: anything else; expected only if the process that would have sent the error was killed (gateway, API server).
  Four of the faults kill or stop the engine, which may fail four times per hour before the container exits; the
  others kill helper processes or disconnect clients. Memory and open files of every long-lived process are sampled.
usage: bench/soak.py [--minutes 30] [--clients 32] [--only FAULT] [--result FILE]
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import platform
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME / "src"), str(HOME / "tests")]

from shoehorn.runtime import programs  # noqa: E402  # likewise
from shoehorn.runtime.state import Phase  # noqa: E402  # likewise
from support.running import Appliance  # noqa: E402  # the path is set just above
from support.waiting import wait_until  # noqa: E402  # likewise

RESULT = HOME / "bench" / "results" / "soak.json"
QUESTIONS = [f"{words} {number}?" for number in range(16)
             for words in ("What is the VRAM of plan", "你叫啥", "How do I set", "Why does it stop at")]
ROLES = {"supervise": programs.SUPERVISORD, "engine program": programs.ENGINE,
         "exporter": programs.EXPORTER,
         "keys": programs.KEYS, "watcher": programs.EVENT_LISTENER,
         "API server": "api_server.entry",
         "engine core": "VLLM::EngineCor", "gateway": "nginx: master"}


def body(question: str, *, stream: bool) -> dict[str, Any]:
    """Return the body of a greedy request."""
    return {"model": "shoehorn-demo", "messages": [{"role": "user", "content": question}], "max_tokens": 48,
            "temperature": 0, "stream": stream}


def ask(appliance: Appliance, question: str, *, stream: bool) -> tuple[str, str]:
    """Send a request. Returns ("text", response), or `told` or `cut` with the error."""
    try:
        with httpx.stream("POST", f"{appliance.url}/v1/chat/completions", json=body(question, stream=stream),
                          headers=appliance.headers(), timeout=120) as answer:
            raw = answer.read().decode()
    except httpx.TransportError as error:
        return "cut", repr(error)
    if answer.status_code != 200:
        return _error(raw, answer.status_code)
    if not stream:
        return "text", str(json.loads(raw)["choices"][0]["message"]["content"])
    events = [line.removeprefix("data: ") for line in raw.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return "cut", raw[-200:]
    parts = [json.loads(event) for event in events[:-1]]
    if "error" in parts[-1]:
        return _error(json.dumps(parts[-1]), 200)
    return "text", "".join(choice["delta"].get("content") or "" for part in parts for choice in part["choices"])


def _error(raw: str, status: int) -> tuple[str, str]:
    try:
        error = json.loads(raw)["error"]
        return ("told" if error["message"] and error["type"] and error["code"] else "cut"), f"{status} {error['code']}"
    except (ValueError, KeyError, TypeError):
        return "cut", f"{status} {raw[:200]}"


def reference(appliance: Appliance, clients: int) -> dict[str, str]:
    """Return the responses of the prompts whose response is the same alone and with concurrent requests."""
    alone = {question: ask(appliance, question, stream=False)[1] for question in QUESTIONS}
    stable = dict(alone)
    lock, work = threading.Lock(), iter(QUESTIONS * 3)

    def concurrent() -> None:
        while True:
            with lock:
                question = next(work, None)
            if question is None:
                return
            if ask(appliance, question, stream=True) != ("text", alone[question]):
                stable.pop(question, None)

    threads = [threading.Thread(target=concurrent) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return stable


def faults(appliance: Appliance) -> list[tuple[str, Callable[[], None]]]:
    """Return names and actions in order: every seventh is a fault of the engine, of which there are four."""
    def kill(role: str) -> Callable[[], None]:
        return lambda: appliance.find(ROLES[role]).kill()

    def leave() -> None:
        content = json.dumps({**body("long", stream=True), "max_tokens": 900, "ignore_eos": True}).encode()
        with socket.create_connection(("127.0.0.1", appliance.port)) as connection:
            head = ("POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    f"Authorization: Bearer {appliance.key}\r\nContent-Length: {len(content)}\r\n\r\n")
            connection.sendall(head.encode() + content)
            connection.recv(100)

    engine = iter([("kill engine core", kill("engine core")), ("kill API server", kill("API server")),
                   ("stop engine core", lambda: appliance.find(ROLES["engine core"]).suspend()),
                   ("kill engine program", kill("engine program"))])
    helpers = itertools.cycle([
        ("kill exporter", kill("exporter")), ("client leaves", leave), ("kill keys", kill("keys")),
        ("kill watcher", kill("watcher")), ("client leaves", leave), ("kill gateway", kill("gateway"))])
    return [(next(engine, None) if number % 7 == 3 else None) or next(helpers) for number in range(1000)]


def sample(appliance: Appliance) -> dict[str, tuple[int, int, int]]:
    """Return (pid, resident bytes, open files) of each running role."""
    processes = {}
    for process in appliance.descendants():
        try:
            words = " ".join([process.name(), *process.cmdline()])
            role = next((role for role, word in ROLES.items() if word in words), None)
            if role and role not in processes:
                processes[role] = (process.pid, process.memory_info().rss, process.num_fds())
        except psutil.Error:
            continue
    return processes


def main() -> None:
    """Run the soak test and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--only", help="repeat one fault, by its name in the results; faults of the engine at most "
                        "four times per hour")
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    outcomes: collections.Counter[str] = collections.Counter()
    messages: collections.Counter[str] = collections.Counter()
    done: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    lock, over = threading.Lock(), threading.Event()
    with tempfile.TemporaryDirectory() as home:
        appliance = Appliance(Path(home), DRAIN_TIMEOUT="5")
        try:
            appliance.wait_for(Phase.READY)
            known = reference(appliance, arguments.clients)
            print(f"{len(known)} of {len(QUESTIONS)} prompts have a response independent of the batch", flush=True)

            def client(number: int) -> None:
                chosen = random.Random(number)  # noqa: S311  # the choice of a question is not secret
                while not over.is_set():
                    question = chosen.choice(sorted(known))
                    kind, text = ask(appliance, question, stream=chosen.random() < 0.5)
                    outcome = kind if kind != "text" else ("right" if text == known[question] else "wrong")
                    with lock:
                        outcomes[outcome] += 1
                        if outcome != "right":
                            messages[f"{outcome}: {text[:120]}"] += 1
                            if done:
                                done[-1].setdefault("outcomes", collections.Counter())[outcome] += 1
                    over.wait(0.3 if outcome == "right" else 1.0)

            threads = [threading.Thread(target=client, args=(number,), daemon=True)
                       for number in range(arguments.clients)]
            for thread in threads:
                thread.start()
            begin = time.monotonic()
            chosen = [fault for fault in faults(appliance) if arguments.only in (None, fault[0])]
            if len(chosen) < arguments.minutes:
                chosen *= round(arguments.minutes)
            for (name, strike), minute in zip(chosen, range(max(1, round(arguments.minutes))), strict=False):
                while time.monotonic() - begin < 60 * minute + 30:
                    time.sleep(10)
                    samples.append({"seconds": round(time.monotonic() - begin), **sample(appliance)})
                wait_until(lambda: appliance.phase is Phase.READY, 200, "ready before the next fault")
                with lock:
                    done.append({"at_seconds": round(time.monotonic() - begin), "fault": name})
                struck = time.monotonic()
                strike()
                time.sleep(1)
                recovered = _recovered(appliance)
                done[-1]["served_again_after_seconds"] = round(time.monotonic() - struck, 1) if recovered else None
                print(done[-1], dict(outcomes), flush=True)
            while time.monotonic() - begin < 60 * arguments.minutes:
                time.sleep(1)
            over.set()
            for thread in threads:
                thread.join(130)
            ended = [thread for thread in threads if thread.is_alive()]
            samples.append({"seconds": round(time.monotonic() - begin), **sample(appliance)})
            code = appliance.end(signal.SIGTERM, 60)
        finally:
            appliance.discard()
    memory = psutil.virtual_memory()
    arguments.result.write_text(json.dumps({
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "memory_gib": round(memory.total / 2**30), "system": platform.platform()},
        "minutes": arguments.minutes, "clients": arguments.clients, "prompts": len(known), "exit_code": code,
        "requests_that_never_ended": len(ended), "outcomes": dict(outcomes), "said": dict(messages.most_common(20)),
        "faults": done, "processes": growth(samples)}, indent=1) + "\n")
    print(json.dumps(dict(outcomes)), code)


def _recovered(appliance: Appliance) -> bool:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        if appliance.phase is Phase.READY and ask(appliance, QUESTIONS[0], stream=False)[0] == "text":
            return True
        time.sleep(0.5)
    return False


def growth(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return memory and files of the longest-lived process per role, one minute after its start and at its end."""
    lives: dict[str, dict[int, list[tuple[int, int, int]]]] = {role: collections.defaultdict(list) for role in ROLES}
    for entry in samples:
        for role in ROLES:
            if role in entry:
                pid, memory, files = entry[role]
                lives[role][pid].append((entry["seconds"], memory, files))
    roles = {}
    for role, by_pid in lives.items():
        if not by_pid:
            continue
        longest = max(by_pid.values(), key=lambda seen: seen[-1][0] - seen[0][0])
        steady = [seen for seen in longest if seen[0] - longest[0][0] >= 60] or longest
        roles[role] = {"lived_seconds": longest[-1][0] - longest[0][0],
                       "resident_mib": [round(steady[0][1] / 2**20, 1), round(steady[-1][1] / 2**20, 1)],
                       "open_files": [steady[0][2], steady[-1][2]]}
    return roles


if __name__ == "__main__":
    main()
