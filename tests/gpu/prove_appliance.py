"""Proves the appliance on an NVIDIA GPU, outside a container: entrypoint.py to supervisord, vLLM, gateway, exporter.

Makes a random-weight 8B, starts the appliance with a PATH that holds nothing but what the image has, streams one
completion through the gateway with the generated key, scrapes the metrics, kills the engine core, stops, and writes
what it saw as JSON. It also records this machine's NVML as a capture for tests, and tries the start once more without
a C compiler, to show what that is needed for.
usage: prove_appliance.py OUT_DIR [MODEL_DIR]      with vLLM, nginx and src/ reachable
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil

HOME = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOME / "src"), str(HOME / "tests" / "gpu"), str(HOME / "tools")]

import nvml_recording  # noqa: E402  # the path is set just above
from shoehorn.runtime.state import Phase, StateFile  # noqa: E402  # likewise

KEY = "sk-key-for-the-proof"
TOOLS = ("sh", "nginx", "ldconfig")
COMPILER = ("gcc", "cc", "as", "ld")


def tools(directory: Path, names: tuple[str, ...]) -> str:
    """A directory with links to these programs and nothing else, to stand alone on PATH."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name in names:
        program = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
        if program:
            (directory / name).symlink_to(program)
    return str(directory)


class Run:
    """One start of the appliance."""

    def __init__(self, work: Path, log: Path, model: Path, path: str, **settings: str) -> None:
        self.run_dir, self.models = work / "run", work / "models"
        shutil.rmtree(work, ignore_errors=True)
        self.models.mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if name not in ("OUT",)}
        environment |= {"PATH": path, "MODEL_ID": str(model), "MODEL_SOURCE": "local", "SERVED_MODEL_NAME": "random-8b",
                        "RUN_DIR": str(self.run_dir), "MODELS_DIR": str(self.models), "DRAIN_TIMEOUT": "3",
                        "API_KEY": KEY, "TRITON_CACHE_DIR": str(work / "triton"),
                        "VLLM_CACHE_ROOT": str(work / "vllm"), **settings}
        self.log = log
        self.started = time.monotonic()
        self.process = subprocess.Popen([sys.executable, str(HOME / "entrypoint.py")], env=environment,
                                        stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True)

    def phase(self) -> Phase:
        return StateFile(self.run_dir).read().phase

    def wait_ready(self, seconds: float) -> float | None:
        """Seconds from the start to ready, or None when it ended or took longer."""
        while self.process.poll() is None and time.monotonic() - self.started < seconds:
            if self.phase() is Phase.READY:
                return round(time.monotonic() - self.started, 1)
            time.sleep(0.2)
        return None

    def key(self) -> str:
        return KEY

    def stop(self) -> tuple[int, float]:
        """SIGTERM; exit code and seconds."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90), round(time.monotonic() - begun, 2)


def stream(key: str) -> dict[str, object]:
    """One streamed chat completion through the gateway."""
    body = {"model": "random-8b", "stream": True, "max_tokens": 64, "ignore_eos": True, "temperature": 0,
            "stream_options": {"include_usage": True}, "messages": [{"role": "user", "content": "你叫啥?"}]}
    begun = time.monotonic()
    arrivals: list[float] = []
    usage: object = None
    with httpx.stream("POST", "http://127.0.0.1:6333/v1/chat/completions", json=body, timeout=120,
                      headers={"Authorization": f"Bearer {key}"}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.monotonic() - begun)
                usage = json.loads(line[6:]).get("usage") or usage
    rate = (len(arrivals) - 2) / (arrivals[-1] - arrivals[1]) if len(arrivals) > 3 else None
    return {"status": answer.status_code, "events": len(arrivals), "first_event_seconds": round(arrivals[0], 3),
            "events_per_second": rate and round(rate, 1), "usage": usage}


class PeakMemory:
    """The highest device memory in use, by NVML, sampled every 50 ms."""

    def __init__(self) -> None:
        import pynvml

        pynvml.nvmlInit()
        self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        self.peak = 0
        self.baseline = self.now()
        self._on = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> int:
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def _watch(self) -> None:
        while self._on:
            self.peak = max(self.peak, self.now())
            time.sleep(0.05)

    def close(self) -> None:
        self._on = False
        self._thread.join()


def serve_once(name: str, out: Path, model: Path, path: str, **settings: str) -> dict[str, object]:
    """Start, stream, scrape, kill the engine core, recover, stop."""
    memory = PeakMemory()
    run = Run(Path("/dev/shm/shoehorn-run"), out / f"{name}.log", model, path, **settings)  # memory on purpose
    seen: dict[str, object] = {"settings": settings, "ready_seconds": run.wait_ready(300)}
    if seen["ready_seconds"] is None:
        seen |= {"exit_code": run.process.poll(), "phase": run.phase(),
                 "cause": StateFile(run.run_dir).read().cause}
        if run.process.poll() is None:
            run.stop()
        memory.close()
        return seen
    stream(run.key())  # the first request compiles kernels
    seen["stream"] = stream(run.key())
    seen["memory_used_bytes"], seen["memory_peak_bytes"] = memory.now(), memory.peak
    seen["memory_baseline_bytes"] = memory.baseline
    metrics = httpx.get("http://127.0.0.1:6334/metrics", timeout=10).text
    (out / f"{name}.metrics.txt").write_text(metrics)
    seen["gpu_series"] = sorted({line.split("{")[0] for line in metrics.splitlines()
                                 if line.startswith("shoehorn_gpu")})
    seen["plan"] = json.loads((run.run_dir / "plan.json").read_text())
    seen["refused_without_key"] = httpx.post("http://127.0.0.1:6333/v1/chat/completions", json={}).status_code
    seen["invocations"] = httpx.post("http://127.0.0.1:6333/invocations", json={}).status_code
    if name == "bf16":
        core = next(process for process in psutil.process_iter(["name"]) if "EngineCor" in process.info["name"])
        core.kill()
        begun = time.monotonic()
        while run.phase() is Phase.READY and time.monotonic() - begun < 20:
            time.sleep(0.05)
        noticed = time.monotonic() - begun
        while run.phase() is not Phase.READY and time.monotonic() - begun < 240:
            time.sleep(0.2)
        seen["engine_core_killed"] = {"noticed_seconds": round(noticed, 2),
                                      "ready_again_seconds": round(time.monotonic() - begun, 1),
                                      "status_after": stream(run.key())["status"]}
    seen["stop"] = dict(zip(("exit_code", "seconds"), run.stop(), strict=True))
    time.sleep(1)
    seen["memory_after_stop_bytes"] = memory.now()
    memory.close()
    return seen


def main(out: Path, model: Path) -> None:
    """Do everything; results go to `out`."""
    import pynvml

    pynvml.nvmlInit()
    (out / "capture.json").write_text(json.dumps(nvml_recording.record(pynvml), indent=1))
    machine = {"gpu": pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)),
               "driver": pynvml.nvmlSystemGetDriverVersion(), "kernel": platform.release(),
               "cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total}
    results: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine,
        "versions": {name: version(name) for name in ("vllm", "torch", "bitsandbytes", "supervisor")}}
    everything = tools(Path("/tmp/tools"), TOOLS + COMPILER)  # a machine of our own, for minutes
    bare = tools(Path("/tmp/tools-bare"), TOOLS)  # likewise
    results["path"] = {"with_compiler": TOOLS + COMPILER, "without": TOOLS}
    common = {"VRAM_PROFILE": "32gb", "MAX_MODEL_LEN": "4096"}
    resident = {"VLLM_EXTRA_ARGS": "--cpu-offload-gb 0"}
    for name, path, settings in (
            ("bf16", everything, {**common, **resident, "QUANTIZATION": "none"}),
            ("nf4", everything, {**common, **resident, "QUANTIZATION": "bitsandbytes"}),
            ("nf4-offloaded", everything, {"VRAM_PROFILE": "7gb", "VRAM_LIMIT": "5GiB", "MAX_MODEL_LEN": "2048"}),
            ("bf16-no-compiler", bare, {**common, **resident, "QUANTIZATION": "none"})):
        begun = time.monotonic()
        results[name] = serve_once(name, out, model, path, **settings)
        print(name, f"{time.monotonic() - begun:.0f} s", json.dumps(results[name])[:600], flush=True)
        (out / "appliance.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    destination.mkdir(parents=True, exist_ok=True)
    checkpoint = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("/dev/shm/random-8b")  # 16 GB, in memory
    if not (checkpoint / "model.safetensors.index.json").exists():
        import make_model

        make_model.main(checkpoint)
    main(destination, checkpoint)
