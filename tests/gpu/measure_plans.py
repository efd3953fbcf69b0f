"""Compares plans with what an NVIDIA GPU shows: expected and measured bytes, KV cache and speed of each case.

For each case it writes the checkpoint of a captured model (sparse: true shapes, zeros for weights; NAME@int4 is what
`shoehorn convert` makes of NAME), plans for the GPU's budget (or takes the arguments given), allocates the rest of the
GPU in a ballast process, starts the engine once and records NVML's figures every 20 ms.
usage: measure_plans.py CASES.json OUT_DIR [WORK_DIR]      with vLLM, src/ and the plugin's entry point reachable
CASES.json: [{"name", "model": captured, "settings": {...}, "gpus": 1, "ballast": ...}]; instead of settings, without a
plan: "args": {...}, "room_bytes": what the ballast leaves. With either: "environment": {...}; "with": other captured
models, in args and settings as "{WORK}/NAME"; "speculation": what is added to the plan's speculative-config; "profile":
tokens to generate while kernels are counted. FIRST_GPU in the environment: the number of the first GPU used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pynvml

HERE = Path(__file__).resolve().parent
HOME = HERE.parents[1]
sys.path[:0] = [str(HOME / "src"), str(HOME / "tests"), str(HERE)]

import sparse_checkpoint  # noqa: E402  # the path is set just above
from planned import plan_case  # noqa: E402  # likewise

from fakes import captured  # noqa: E402  # likewise
from shoehorn.planner.plan import Plan  # noqa: E402  # likewise

MIB = 1 << 20

BALLAST = """
import sys, torch
torch.cuda.init()
free, total = torch.cuda.mem_get_info()
room = int(sys.argv[1])
processes = torch.empty(max(0, free - room), dtype=torch.uint8, device="cuda")
print("processes", flush=True)
sys.stdin.read()
"""


class Card:
    """One GPU's memory in use, sampled in a thread."""

    def __init__(self, index: int) -> None:
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        self.samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle, pynvml.nvmlMemory_v2).used)

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            self.samples.append((time.monotonic(), self.used()))

    def peak(self, begin: float, end: float) -> int:
        return max((used for at, used in self.samples if begin <= at <= end), default=0)

    def series(self, begin: float, base: int) -> list[tuple[float, int]]:
        """(seconds, MiB) wherever it changed by 64 MiB or more."""
        changes: list[tuple[float, int]] = []
        for at, used in self.samples:
            if at >= begin and (not changes or abs((used - base) // MIB - changes[-1][1]) >= 64):
                changes.append((round(at - begin, 2), (used - base) // MIB))
        return changes

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


class Runner:
    """One engine process, made ready beforehand on its GPUs."""

    def __init__(self, case: dict[str, Any], gpus: list[int], out: Path, work: Path) -> None:
        self.case, self.gpus, self.out = case, gpus, out
        self.directory = checkpoint_of(case, work)
        for name in case.get("with", []):
            checkpoint_of({"model": name}, work)
        self.plan = None if "args" in case else plan_case(case, gpus, self.directory)
        self.arguments = json.loads(json.dumps(case.get("args", {})).replace("{WORK}", str(work)))
        path = f"{HERE}:{os.environ.get('PYTHONPATH', '')}"
        self.environment = {
            **os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "PYTHONPATH": path,
            "VLLM_CACHE_ROOT": str(work / "cache"), "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "DEBUG"}
        self.ballast_environment = dict(self.environment)
        self.environment |= self.plan.engine_environment if isinstance(self.plan, Plan) else {}
        self.environment |= case.get("environment", {})
        if len(gpus) == 1:
            self.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process: nothing is imported twice
        self.task, self.answer = out / f"{case['name']}.case.json", out / f"{case['name']}.report.json"
        self.child = subprocess.Popen(
            [sys.executable, str(HERE / "engine_report.py"), str(self.task), str(self.answer)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=self.environment,
            start_new_session=True)

    def run(self) -> dict[str, Any]:
        """Plan, start, measure; the record."""
        case = self.case
        record: dict[str, Any] = {"name": case["name"], "model": case["model"], "gpus": len(self.gpus)}
        plan = self.plan
        if plan is not None:
            record["plan"] = plan.to_json()
            if not isinstance(plan, Plan):
                self.child.kill()
                self.child.wait()
                return record
        arguments = self.arguments if plan is None else dict(record["plan"]["engine_args"])
        if "speculation" in case:
            arguments["speculative-config"] = {**arguments.get("speculative-config", {}), **case["speculation"]}
        cards = [Card(gpu) for gpu in self.gpus]
        room = record["plan"]["vram"][0]["limit_bytes"] if plan else case.get("room_bytes")
        ballasts = self._ballasts(room) if case.get("ballast") else []
        time.sleep(0.3)
        before = [card.used() for card in cards]
        self.task.write_text(json.dumps({"model": str(self.directory), "args": arguments,
                                         "tokens": case.get("tokens", 64), "batches": case.get("batches", [1, 8]),
                                         "profile": case.get("profile", 0), "prompt": case.get("prompt", 0),
                                         "temperature": case.get("temperature", 0)}))
        begin, stages = time.monotonic(), self._follow(case.get("limit_seconds", 240))
        end = time.monotonic()
        ready, measured = stages.get("ready", end), stages.get("measured", end)
        loaded = stages.get("loaded", ready)
        record |= {"status": self.child.returncode, "seconds": round(end - begin, 1), "args": arguments, "nvml": [
            {"before_bytes": base, "load_peak_bytes": card.peak(begin, loaded) - base,
             "start_peak_bytes": card.peak(loaded, ready) - base, "series": card.series(begin, base),
             "run_peak_bytes": card.peak(ready, measured) - base, "end_bytes": card.peak(measured, end) - base,
             "ready_bytes": next((used for at, used in card.samples if at >= ready), base) - base}
            for card, base in zip(cards, before, strict=True)]}
        if self.answer.exists():
            record["report"] = json.loads(self.answer.read_text())
        for card in cards:
            card.end()
        for ballast in ballasts:
            ballast.kill()
            ballast.wait()
        return record

    def _ballasts(self, room_bytes: int) -> list[subprocess.Popen[str]]:
        """Processes that leave only that much of each GPU free."""
        processes = []
        for gpu in self.gpus:
            ballast = subprocess.Popen(
                [sys.executable, "-c", BALLAST, str(room_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env={**self.ballast_environment, "CUDA_VISIBLE_DEVICES": str(gpu)})
            assert ballast.stdout
            ballast.stdout.readline()
            processes.append(ballast)
        return processes

    def _follow(self, limit_seconds: float) -> dict[str, float]:
        """Let it go and wait for its end; the times of its stages."""
        child, stages = self.child, {}
        assert child.stdin
        assert child.stdout
        child.stdin.write("go\n")
        child.stdin.flush()
        limit = threading.Timer(limit_seconds, lambda: os.killpg(child.pid, 9))
        limit.start()
        with (self.out / f"{self.case['name']}.log").open("w") as log:
            for line in child.stdout:
                log.write(line)
                if line.startswith("STAGE "):
                    stages[line.split()[1]] = time.monotonic()
                elif "Model loading took" in line:
                    stages["loaded"] = time.monotonic()
        child.wait()
        limit.cancel()
        return stages


def checkpoint_of(case: dict[str, Any], work: Path) -> Path:
    """The folder of a captured model's checkpoint, written once."""

    directory = work / case["model"]
    if not directory.exists():
        name = case["model"].removesuffix("@int4")
        sparse_checkpoint.write(directory, *(sparse_checkpoint.converted(name) if case["model"] != name else (
            captured.config(name), captured.tensors(name))))
    return directory


def main() -> None:
    """All cases, one after the other; each engine is made ready while the one before it is measured."""
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    work = Path(sys.argv[3] if len(sys.argv) > 3 else "/tmp/shoehorn-plans")
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    pynvml.nvmlInit()
    count = pynvml.nvmlDeviceGetCount()
    first = int(os.environ.get("FIRST_GPU", "0"))
    cases = [case for case in cases if case.get("gpus", 1) <= count - first]
    records: list[dict[str, Any]] = []
    runners = [Runner(case, list(range(first, first + case.get("gpus", 1))), out, work) for case in cases[:1]]
    for number in range(len(cases)):
        if number + 1 < len(cases):
            following = cases[number + 1]
            runners.append(Runner(following, list(range(first, first + following.get("gpus", 1))), out, work))
        record = runners[number].run()
        records.append(record)
        (out / "records.json").write_text(json.dumps(records, indent=1))
        print(record["name"], record.get("status", "refused"), record.get("seconds"), flush=True)


if __name__ == "__main__":
    main()
