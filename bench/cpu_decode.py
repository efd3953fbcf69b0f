"""Measure how fast the engine on a CPU generates tokens from INT4 weights: with our kernel and with vLLM's own.

Each model is served by both in turn, in processes of their own, several rounds in the same run; the best round counts.
SmolLM2 or another model that `shoehorn convert` made, and the first layers of a mixture of true shapes (Qwen3-30B-A3B,
zero weights, random routers). vLLM's own kernel for mixtures needs AMX; where it is missing, that row is empty.
usage: bench/cpu_decode.py INT4_DIR [--users 1,4,8] [--tokens 64] [--layers 6] [--rounds 2] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME / "src"), str(HOME / "tests"), str(HOME / "tests" / "gpu")]

RESULTS = Path(__file__).resolve().parent / "results"
MIXTURE = "qwen3-30b-a3b"
PROMPT = 16
WAYS = {"ours": "auto", "vllm": "off"}


def generate(model: str, users: list[int], tokens: int) -> dict[str, float]:
    """Tokens per second of all users together, in this process."""
    import time  # here and below: only in the children

    from vllm import LLM, SamplingParams

    engine = LLM(model=model, dtype="bfloat16", max_model_len=512, max_num_seqs=max(users), enforce_eager=True,
                 kv_cache_memory_bytes=256 << 20, enable_prefix_caching=False, disable_log_stats=True)
    result = {}
    for count in users:
        prompts = [{"prompt_token_ids": [(7 * number + place) % 200 + 10 for place in range(PROMPT)]}
                   for number in range(count)]

        def timed(length: int, prompts: list[dict[str, list[int]]] = prompts) -> float:
            begin = time.perf_counter()
            engine.generate(prompts, SamplingParams(max_tokens=length, ignore_eos=True, temperature=0), use_tqdm=False)
            return time.perf_counter() - begin

        timed(2)
        first = timed(1)
        result[str(count)] = round(count * (tokens - 1) / (timed(tokens) - first), 2)
    return result


def run(model: Path, way: str, arguments: argparse.Namespace) -> dict[str, float] | None:
    """The same in a process of its own; None where the engine does not start."""
    done = subprocess.run(
        [sys.executable, __file__, "one", str(model), arguments.users, str(arguments.tokens)], text=True,
        capture_output=True, check=False, env={
            **os.environ, "SHOEHORN_CPU_COMPUTE": WAYS[way], "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{HOME / 'src'}:{os.environ.get('PYTHONPATH', '')}"})
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            speeds: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return speeds
    print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
    return None


def mixture(directory: Path, layers: int) -> Path:
    """The first layers of a mixture in INT4."""
    import sparse_checkpoint

    sparse_checkpoint.write(directory, *sparse_checkpoint.first_layers(*sparse_checkpoint.converted(MIXTURE), layers))
    return directory


def compare(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The best of all rounds of both kernels, and how many times faster ours is."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(arguments.rounds):
        for way in WAYS:
            for users, speed in (run(model, way, arguments) or {}).items():
                best.setdefault(way, {})[users] = max(speed, best.get(way, {}).get(users, 0.0))
    ours, others = best.get("ours", {}), best.get("vllm", {})
    return {"tokens_per_second": {way: best.get(way) for way in WAYS},
            "times_faster": {users: round(ours[users] / others[users], 2) for users in ours if users in others}}


def main() -> None:
    """Measure both models and write the result."""
    if sys.argv[1:2] == ["one"]:
        speeds = generate(sys.argv[2], [int(users) for users in sys.argv[3].split(",")], int(sys.argv[4]))
        print("RESULT", json.dumps(speeds), flush=True)
        os._exit(0)
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", type=Path)
    options.add_argument("--users", default="1,4,8")
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--layers", type=int, default=6, help="of the mixture; 0 leaves it out")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--out", type=Path, default=RESULTS / "cpu-decode.json")
    arguments = options.parse_args()
    from cpu_kernel import cpu_name  # imports torch

    from shoehorn_vllm.hybrid.kernel import library

    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": cpu_name(), "logical_cpus": os.cpu_count(),
        "isa": library.default_isa().name.lower(), "load_before": os.getloadavg()[0],
        "prompt_tokens": PROMPT, "generated_tokens": arguments.tokens, "rounds": arguments.rounds,
        arguments.model.name: compare(arguments.model, arguments)}
    if arguments.layers:
        with tempfile.TemporaryDirectory() as directory:
            result[f"{MIXTURE}, {arguments.layers} layers"] = compare(
                mixture(Path(directory) / MIXTURE, arguments.layers), arguments)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
