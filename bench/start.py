"""Benchmark of the start and of restarts with the demo model on this machine; adds a run to bench/results/start.json.

Measures the seconds from the start of the appliance until it serves, and until it serves again after `kill -9` of the
engine core; with --all also after `kill -9` of the API server and after the report of a hang. With an earlier checkout,
its figures are measured in the same run; both use the packages of this environment.
usage: bench/start.py [--before CHECKOUT] [--all]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil

HOME = Path(__file__).resolve().parents[1]
RESULT = HOME / "bench" / "results" / "start.json"
_LIMIT_SECONDS = 300.0
_VICTIMS = (("engine_core_killed", ("VLLM::EngineCor",)),
            ("api_server_killed", ("VLLM::APIServer", "api_server.entry")))


class Demo:
    """A running appliance of a checkout."""

    def __init__(self, checkout: Path, home: Path) -> None:
        self._state = home / "run" / "state.json"
        environment = {
            **os.environ, "PYTHONPATH": str(checkout / "src"), "MODEL_ID": str(checkout / "demo" / "model"),
            "MODEL_SOURCE": "local", "SERVED_MODEL_NAME": "shoehorn-demo", "VRAM_PROFILE": "cpu", "ENGINE_LOG": "file",
            "MODELS_DIR": str(home / "models"), "RUN_DIR": str(home / "run"), "PORT": "17333", "METRICS_PORT": "17334",
            "DRAIN_TIMEOUT": "3", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}
        (home / "models").mkdir(parents=True)
        self.begun = time.monotonic()
        self._process = subprocess.Popen([sys.executable, str(checkout / "entrypoint.py")], env=environment,
                                         stdout=subprocess.DEVNULL, start_new_session=True)

    def state(self) -> dict[str, object]:
        """Return the published state; empty before the first."""
        try:
            return dict(json.loads(self._state.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def wait(self, condition: Callable[[dict[str, object]], bool], begun: float) -> float:
        """Return the seconds since `begun` when the state fulfils the condition."""
        while not condition(self.state()):
            if self._process.poll() is not None or time.monotonic() - begun > _LIMIT_SECONDS:
                raise SystemExit(f"bench/start.py: not reached; state: {self.state()}")
            time.sleep(0.02)
        return round(time.monotonic() - begun, 2)

    def find(self, words: tuple[str, ...]) -> psutil.Process:
        """Return the process with one of the words in its command line."""
        for process in psutil.Process(self._process.pid).children(recursive=True):
            if any(word in " ".join(process.cmdline()) for word in words):
                return process
        raise SystemExit(f"bench/start.py: no process {words}")

    def memory_bytes(self) -> int:
        """Return the proportional memory of the engine's processes, spare included."""
        return sum(process.memory_full_info().pss
                   for process in psutil.Process(self._process.pid).children(recursive=True)
                   if any(word in " ".join(process.cmdline()) for word in ("VLLM", "fork server", "api_server")))

    def stop(self) -> None:
        """Stop it."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)


def measure(checkout: Path, all_failures: bool) -> dict[str, float]:
    """Start the checkout's appliance, let it fail in one or three ways, and stop it; return the seconds of each."""
    with tempfile.TemporaryDirectory(prefix="shoehorn-start-") as folder:
        demo = Demo(checkout, Path(folder))
        try:
            seconds = {"start": demo.wait(lambda state: state.get("phase") == "ready", demo.begun)}
            time.sleep(3.0)
            seconds["memory_mib"] = round(demo.memory_bytes() / 2**20)
            for number, (kind, words) in enumerate(_VICTIMS if all_failures else _VICTIMS[:1], 1):
                begun = time.monotonic()
                demo.find(words).kill()
                seconds[kind] = demo.wait(lambda state, number=number: state.get("restarts") == number
                                          and state.get("phase") == "ready", begun)
                time.sleep(1.0)
            if all_failures:
                demo.find(("VLLM::EngineCor",)).send_signal(signal.SIGSTOP)
                demo.wait(lambda state: bool(state.get("engine_down")), time.monotonic())
                seconds["hang_reported"] = demo.wait(lambda state: state.get("restarts") == 3
                                                     and state.get("phase") == "ready", time.monotonic())
            return seconds
        finally:
            demo.stop()


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return median, least and greatest of each figure."""
    figures: dict[str, list[float]] = {}
    for run in runs:
        for kind, figure in run.items():
            figures.setdefault(kind, []).append(figure)
    return {kind: {"median": statistics.median(each), "min": min(each), "max": max(each), "runs": len(each)}
            for kind, each in figures.items()}


def main() -> None:
    """Measure one run and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, help="earlier checkout, measured in the same run")
    parser.add_argument("--all", action="store_true", help="also kill the API server and let the engine core hang")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no appliance is left
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": []}
    run: dict[str, dict[str, float]] = {}
    results["runs"].append(run)
    for name, checkout in (("before", arguments.before), ("after", HOME)):
        if checkout is not None:
            run[name] = measure(checkout.resolve(), arguments.all)
            results |= {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "machine": {
                    "cpus": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30),
                    "system": platform.freedesktop_os_release()["PRETTY_NAME"], "python": platform.python_version()},
                "summary": {kind: summary([each[kind] for each in results["runs"] if kind in each])
                            for kind in ("before", "after") if any(kind in each for each in results["runs"])}}
            RESULT.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results["runs"][-1]))


if __name__ == "__main__":
    main()
