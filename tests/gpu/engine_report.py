"""Runs one engine on a GPU, in this process, and writes what it says of its memory and speed as JSON.

It imports everything first and then waits for a line on standard input, so that the next case can be made ready while
this one is measured.
usage: engine_report.py CASE.json OUT.json      with vLLM on the path
CASE.json: {"model": DIR, "args": {vLLM's option names: values}, "tokens": of each request, "batches": [1, 8],
"temperature": 0, "prompt": tokens of a prompt whose rate is measured, "profile": tokens of one request during which
kernels are counted}
Lines beginning with `STAGE ` on standard output tell the caller where it is.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


class Reporter:
    """Mixed into vLLM's worker (--worker-extension-cls): its exact figures, which its log rounds."""

    def memory_report(self) -> dict[str, Any]:
        """Bytes, as the worker holds them."""
        import torch  # only inside the engine

        from shoehorn_vllm.patches import pinned_memory  # likewise

        runner = self.model_runner  # type: ignore[attr-defined]  # the worker's own
        snapshot = getattr(self, "init_snapshot", None)
        free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
        return {
            "weights_bytes": int(getattr(runner, "model_memory_usage", 0)),
            "requested_bytes": int(getattr(self, "requested_memory", 0)),
            "consumed_bytes": int(getattr(self, "total_consumed", 0)),
            "activations_bytes": int(getattr(self, "peak_activation_memory", 0)),
            "graphs_estimate_bytes": int(getattr(self, "cudagraph_memory_estimate", 0) or 0),
            "available_kv_bytes": int(getattr(self, "available_kv_cache_memory_bytes", 0) or 0),
            "context_bytes": int(snapshot.non_torch_memory) if snapshot else 0,
            "init_free_bytes": int(snapshot.free_memory) if snapshot else 0,
            "torch_allocated_bytes": torch.cuda.memory_allocated(),
            "torch_reserved_bytes": torch.cuda.memory_reserved(),
            "free_bytes": free, "total_bytes": total,
            "pinned_bytes": pinned_memory.pinned_bytes() + int(
                torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) if torch.cuda.is_available() else 0)}


def _kernels(engine: Any, tokens: int) -> list[dict[str, Any]]:
    """The kernels that one request's tokens take, the longest first: name, calls and microseconds for each token."""
    import torch  # only inside the engine
    from vllm import SamplingParams  # slow

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        engine.generate([{"prompt_token_ids": list(range(10, 26))}],
                        SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0), use_tqdm=False)
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda entry: -entry.self_device_time_total)
    return [{"name": entry.key[:100], "calls": round(entry.count / tokens, 2),
             "microseconds": round(entry.self_device_time_total / tokens, 1)} for entry in events[:20]]


class Stacks:
    """Samples of this process' main thread while it starts: seconds in each function, callees included."""

    def __init__(self) -> None:
        self._main, self._ended = threading.main_thread().ident or 0, threading.Event()
        self._seconds: dict[str, float] = {}
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(0.02):
            frame, names, now = sys._current_frames().get(self._main), set(), time.monotonic()
            while frame:
                code = frame.f_code
                names.add(f"{'/'.join(code.co_filename.split('/')[-2:])}:{code.co_qualname}")
                frame = frame.f_back
            for name in names:
                self._seconds[name] = self._seconds.get(name, 0) + now - last
            last = now

    def end(self) -> dict[str, float]:
        """Functions of 0.3 s and more, the longest first."""
        self._ended.set()
        self._thread.join()
        return {name: round(spent, 2) for name, spent in sorted(self._seconds.items(), key=lambda item: -item[1])
                if spent >= 0.3}


def main() -> None:
    """Load, measure, generate, and write."""
    from vllm import LLM, SamplingParams  # slow, and done while another case runs

    for module in ("vllm.v1.engine.llm_engine", "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner",
                   "vllm.model_executor.models.llama", "transformers"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    print("STAGE imported", flush=True)
    sys.stdin.readline()
    case = json.loads(Path(sys.argv[1]).read_text())
    begin = time.monotonic()
    stacks = Stacks()
    print("STAGE loading", flush=True)
    arguments = {name.replace("-", "_"): value for name, value in case["args"].items()}
    engine = LLM(model=case["model"], worker_extension_cls="engine_report.Reporter", disable_log_stats=True,
                 **arguments)
    report: dict[str, Any] = {"start_seconds": round(time.monotonic() - begin, 1), "start_functions": stacks.end()}
    print("STAGE ready", flush=True)
    report["workers"] = engine.collective_rpc("memory_report")
    cache = engine.llm_engine.vllm_config.cache_config
    report["kv_cache_tokens"] = int(getattr(cache, "kv_cache_size_tokens", 0) or 0)
    report["kv_blocks"] = int(cache.num_gpu_blocks or 0)
    report["block_size"] = int(cache.block_size or 0)
    report["speed"] = {}
    heat = case.get("temperature", 0)
    length = int(case["args"].get("max-model-len", 512))
    for batch in case.get("batches", [1, 8]):
        if batch > int(case["args"].get("max-num-seqs", 256)):
            continue
        tokens = case.get("tokens", 64)
        prompts = [{"prompt_token_ids": [(7 * number + place) % 200 + 10 for place in range(16)]}
                   for number in range(batch)]
        engine.generate(prompts, SamplingParams(max_tokens=3, ignore_eos=True, temperature=heat), use_tqdm=False)
        begin = time.monotonic()
        engine.generate(prompts, SamplingParams(max_tokens=1, ignore_eos=True, temperature=heat), use_tqdm=False)
        first = time.monotonic() - begin
        begin = time.monotonic()
        engine.generate(prompts, SamplingParams(max_tokens=min(tokens, length - 20), ignore_eos=True, temperature=heat),
                        use_tqdm=False)
        spent = time.monotonic() - begin
        report["speed"][str(batch)] = round(batch * (min(tokens, length - 20) - 1) / (spent - first), 3)
    if case.get("prompt"):
        rates = []
        for turn in range(3):
            tokens = [(31 * place + 977 * turn) % 30000 + 10 for place in range(case["prompt"])]
            begin = time.monotonic()
            engine.generate([{"prompt_token_ids": tokens}], SamplingParams(max_tokens=1), use_tqdm=False)
            rates.append(round(case["prompt"] / (time.monotonic() - begin), 1))
        report["prompt_tokens_per_second"] = sorted(rates)[1]
    if case.get("profile") and len(report["workers"]) == 1:  # elsewhere this process has no CUDA, and no memory for it
        report["kernels"] = _kernels(engine, case["profile"])
    if case.get("fill", True):  # the whole batch once, as a long prompt gives it: what the reserve was for
        wide = min(int(case["args"].get("max-num-batched-tokens", 512)), length - 8)
        long = [{"prompt_token_ids": [place % 200 + 10 for place in range(wide)]}]
        engine.generate(long, SamplingParams(max_tokens=2, ignore_eos=True, temperature=heat), use_tqdm=False)
    report["workers_after"] = engine.collective_rpc("memory_report")
    print("STAGE measured", flush=True)
    time.sleep(0.5)
    Path(sys.argv[2]).write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)  # giving tens of gigabytes of host memory back in good order takes longer than the measurement


if __name__ == "__main__":
    main()
