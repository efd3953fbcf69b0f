"""How fast a conversion to INT4 is, beside what it is bound by, and how much memory it takes.

A Llama with random weights in bf16, of some shards (--gigabytes), and an embedding as large as that of a 70B. In one
run:
- `read`: the source read from the disk from beginning to end, its pages dropped from the cache before;
- `arithmetic`: as many workers as the conversion has, quantizing weights that are in memory already;
- `conversion`: `shoehorn convert` of the same source, its pages dropped before; interpreter and libraries included.
`share` is the conversion's speed as a share of the lower one of the two limits. Memory is the peak of the sum over the
conversion's processes of their proportional set size (shared pages counted once), read once a second, since reading it
takes a core some time.
usage: bench/convert_speed.py [--gigabytes 6]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from shoehorn import convert, int4

HOME = Path(__file__).resolve().parents[1]
RESULT = HOME / "bench" / "results" / "convert-speed.json"
HIDDEN, INNER, VOCAB = 8192, 28672, 128256
ROWS = 1024


def write_source(folder: Path, gigabytes: float) -> int:
    """A checkpoint; returns the bytes of its shards."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)
    shards = [{"model.embed_tokens.weight": (VOCAB, HIDDEN)}]
    layers = round((gigabytes * 1e9 - 2 * VOCAB * HIDDEN) / (2 * 3 * INNER * HIDDEN))
    for layer in range(layers):
        shards.append({f"model.layers.{layer}.mlp.{name}_proj.weight": size for name, size in {
            "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.items()})
    places = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({key: (torch.randn(*size, generator=random, dtype=torch.float32) * 0.02).to(torch.bfloat16)
                   for key, size in tensors.items()}, folder / name)
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCAB,
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 8,
        "tie_word_embeddings": False}))
    os.sync()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def drop_pages(folder: Path) -> None:
    """Take the files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_all(folder: Path) -> float:
    """Seconds to read every shard once."""
    drop_pages(folder)
    begun = time.perf_counter()
    buffer = bytearray(8 << 20)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begun


def compute(seconds: float) -> int:
    """Bytes of bf16 weights that one worker quantizes in at least that time."""
    int4.use_one_thread()
    weight = torch.randn(ROWS, HIDDEN // 2, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    int4.quantize(weight, 4, 128, torch.bfloat16)
    done, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        int4.quantize(weight, 4, 128, torch.bfloat16)
        done += weight.numel() * 2
    return done


def converted(source: Path, home: Path) -> tuple[float, int, int]:
    """Seconds of a conversion, its peak of memory, and the bytes that it wrote."""
    drop_pages(source)
    models = home / "models"
    models.mkdir()
    environment = {**os.environ, "MODEL_ID": str(source), "MODEL_SOURCE": "local", "MODELS_DIR": str(models),
                   "RUN_DIR": str(home / "run")}
    begun, peak = time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-m", "shoehorn.cli", "convert"], env=environment) as process:
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds = time.perf_counter() - begun
    return seconds, peak, sum(path.stat().st_size for path in models.rglob("*.safetensors"))


def memory(pid: int) -> int:
    """Proportional set size of a process and its children."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended meanwhile
            continue
    return total


def main() -> int:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--dir", type=Path, help="where to work; on the disk that is to be measured")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        home = Path(folder)
        size = write_source(home / "source", arguments.gigabytes)
        read_seconds = read_all(home / "source")
        with convert._workers() as pool:
            many = getattr(pool, "_max_workers")  # noqa: B009  # the standard library tells it nowhere else
        with ProcessPoolExecutor(many, multiprocessing.get_context("spawn")) as pool:
            arithmetic = sum(pool.map(compute, [10.0] * many)) / 10.0
        seconds, peak, written = converted(home / "source", home)
    limit = min(size / read_seconds, arithmetic)
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
                    "python": platform.python_version(), "torch": torch.__version__, "device": int4.device()},
        "source_bytes": size, "written_bytes": written, "workers": many,
        "read_bytes_per_second": round(size / read_seconds), "arithmetic_bytes_per_second": round(arithmetic),
        "bound_by": "disk" if size / read_seconds < arithmetic else "arithmetic",
        "conversion_seconds": round(seconds, 1), "conversion_bytes_per_second": round(size / seconds),
        "share": round(size / seconds / limit, 3), "peak_memory_bytes": peak}
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
