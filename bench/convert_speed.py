"""Speed and memory of the INT4 conversion, compared with its limits.

The source is a Llama with random bf16 weights (--gigabytes), with an embedding and an output head as large as those
of a 70B. Each run (--times) measures, after dropping the source's pages from the cache:
- `read`: reading the source from the disk, sequentially and like the conversion (past the page cache, several
  threads); the faster of the two counts;
- `write`: writing 2 GiB to the disk; recorded only;
- `traffic`: the disk traffic of a conversion without the arithmetic: reading with several threads, writing a share of
  each block, reading every written part back while the next one is read;
- `arithmetic`: one thread per core, quantizing weights that are already in memory;
- `conversion`: `shoehorn convert`, including interpreter start, libraries and compilation. Medians are reported.
  `share` is the conversion's speed divided by the lower of reading and arithmetic, `share_of_traffic` by the lower of
  traffic and arithmetic. Memory is the peak of the summed proportional set size of the conversion's processes,
  sampled once per second because reading it takes CPU time. Libraries are compiled to byte code first, as in the
  image.
usage: bench/convert_speed.py [--gigabytes 16] [--times 3] [--dir DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from shoehorn.hardware import detect
from shoehorn.int4 import quantizer, shard_writer
from shoehorn.int4.direct_io import DirectFile
from shoehorn.runtime import programs

HOME = Path(__file__).resolve().parents[1]
RESULT = HOME / "bench" / "results" / "convert-speed.json"
HIDDEN, INNER, VOCAB = 8192, 28672, 128256
ROWS = 1024
BLOCK = 8 << 20
WRITTEN = 1 << 31
SHARE = (4 + 16 / 128) / 16
"""Bytes of a 4-bit code and its part of a scale, as a share of a bf16 weight."""
READERS = 4


def write_source(folder: Path, gigabytes: float) -> int:
    """Write a checkpoint whose layers share the same weights. Returns the bytes of its shards."""
    folder.mkdir()
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.cat([(torch.randn(rows // 8, columns, generator=random) * 0.02).to(torch.bfloat16)
                          for _ in range(8)])

    outer = matrix(VOCAB, HIDDEN)
    shards = [{"model.embed_tokens.weight": outer}, {"lm_head.weight": outer}]
    layers = round((gigabytes * 1e9 - 4 * VOCAB * HIDDEN) / (2 * 3 * INNER * HIDDEN))
    inner = {"gate": matrix(INNER, HIDDEN), "up": matrix(INNER, HIDDEN), "down": matrix(HIDDEN, INNER)}
    shards += [{f"model.layers.{layer}.mlp.{name}_proj.weight": tensor for name, tensor in inner.items()}
               for layer in range(layers)]
    places = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / name)
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCAB,
        "num_hidden_layers": layers, "num_attention_heads": 64, "num_key_value_heads": 8,
        "tie_word_embeddings": False}))
    os.sync()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def drop_pages(folder: Path) -> None:
    """Drop the files from the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(folder: Path) -> float:
    """Read every shard once. Returns the seconds."""
    drop_pages(folder)
    begun = time.perf_counter()
    buffer = bytearray(BLOCK)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begun


def read_directly(folder: Path, threads: int) -> float:
    """Read every shard once, past the page cache. Returns the seconds."""
    drop_pages(folder)
    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for path in sorted(folder.glob("*.safetensors")):
            size = path.stat().st_size
            with DirectFile(path) as file:
                list(pool.map(lambda start: len(file.read(start, min(BLOCK, size - start))),  # noqa: B023  # used up
                              range(0, size, BLOCK)))
    return time.perf_counter() - begun


def write_directly(path: Path, size: int) -> float:
    """Write and sync `size` bytes. Returns the seconds."""
    data = memoryview(os.urandom(BLOCK))
    path.write_bytes(b"")
    begun = time.perf_counter()
    with DirectFile(path, writable=True) as file:
        file.reserve(size)
        for start in range(0, size, BLOCK):
            file.write(data, start)
        file.sync()
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def traffic(folder: Path, path: Path, threads: int) -> float:
    """Read every shard, write a share of it and read that back. Returns the seconds."""
    drop_pages(folder)
    data = memoryview(os.urandom(round(BLOCK * SHARE) // 4096 * 4096))
    path.write_bytes(b"")
    sizes = {shard: shard.stat().st_size for shard in sorted(folder.glob("*.safetensors"))}
    begun, end = time.perf_counter(), 0
    with DirectFile(path, writable=True) as out, ThreadPoolExecutor(threads) as pool, \
            ThreadPoolExecutor(READERS) as readers:
        out.reserve(sum(-(-size // BLOCK) for size in sizes.values()) * len(data))
        back: list[Future[int]] = []
        for shard, size in sizes.items():
            first, blocks = end, range(0, size, BLOCK)
            with DirectFile(shard) as file:
                def move(number: int, file: DirectFile = file, size: int = size, first: int = first) -> None:
                    file.read(number * BLOCK, min(BLOCK, size - number * BLOCK))
                    out.write(data, first + number * len(data))

                list(pool.map(move, range(len(blocks))))
            end = first + len(blocks) * len(data)
            wait(back)
            back = [readers.submit(lambda start, many: len(out.read(start, many)), start, min(BLOCK, end - start))
                    for start in range(first, end, BLOCK)]
        wait(back)
        out.sync()
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def arithmetic(threads: int, seconds: float) -> float:
    """Measure the bytes of bf16 weights that this number of threads quantizes per second."""
    weight = torch.randn(ROWS, HIDDEN // 2, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    quantizer.quantize(weight, 4, 128, torch.bfloat16)
    end = time.perf_counter() + seconds

    def compute(_: int) -> float:
        quantizer.use_one_thread()
        done, begun = 0, time.perf_counter()
        while time.perf_counter() < end:
            quantizer.quantize(weight, 4, 128, torch.bfloat16)
            done += weight.numel() * 2
        return done / (time.perf_counter() - begun)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(compute, range(threads)))


def conversion(source: Path, home: Path) -> tuple[float, float, int, int]:
    """Convert. Returns seconds, seconds of CPU time, peak memory and written bytes."""
    drop_pages(source)
    models = home / "models"
    models.mkdir()
    environment = {**os.environ, "MODEL_ID": str(source), "MODEL_SOURCE": "local", "MODELS_DIR": str(models),
                   "RUN_DIR": str(home / "run"), "PYTHONPYCACHEPREFIX": str(home / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    imports = "from shoehorn import cli; from shoehorn.int4 import convert, quantizer, quantizer_cpu"
    subprocess.run([sys.executable, "-c", imports], env=environment, check=True)
    used, begun, peak = os.times(), time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-m", programs.CLI, "convert"], env=environment) as process:
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds, now = time.perf_counter() - begun, os.times()
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    written = sum(path.stat().st_size for path in models.rglob("*.safetensors"))
    shutil.rmtree(models)
    return seconds, cpu, peak, written


def memory(pid: int) -> int:
    """Sum the proportional set size of a process and its children."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        return 0
    for process in family:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # the process has exited
            continue
    return total


def main() -> int:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=16)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="work folder, on the disk to be measured")
    arguments = parser.parse_args()
    machine = detect.detect()
    cores = round(machine.cpus)
    with shard_writer.workers(shard_writer.worker_count(machine.cpus, machine.host_available_bytes)) as pool:
        threads = getattr(pool, "_max_workers")  # noqa: B009  # the standard library has no public name for it
    runs = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        home = Path(folder)
        size = write_source(home / "source", arguments.gigabytes)
        for _ in range(arguments.times):
            plain, direct = read_plainly(home / "source"), read_directly(home / "source", threads)
            moved = traffic(home / "source", home / "written", threads)
            written_in = write_directly(home / "written", WRITTEN)
            computed = arithmetic(cores, 5.0)
            seconds, cpu, peak, written = conversion(home / "source", home)
            runs.append({"plain_read": size / plain, "direct_read": size / direct,
                         "write": WRITTEN / written_in, "traffic": size / moved, "arithmetic": computed,
                         "conversion": size / seconds, "seconds": seconds, "cpu_seconds": cpu, "peak": peak})
            print({name: f"{value:,.1f}" for name, value in runs[-1].items()}, flush=True)
    medians = {name: median(run[name] for run in runs) for name in runs[0]}
    read = max(medians["plain_read"], medians["direct_read"])
    limit = min(read, medians["arithmetic"])
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
                    "python": platform.python_version(), "torch": torch.__version__, "numba": version("numba"),
                    "device": quantizer.device()},
        "source_bytes": size, "written_bytes": written, "threads": threads, "times": arguments.times,
        "plain_read_bytes_per_second": round(medians["plain_read"]),
        "direct_read_bytes_per_second": round(medians["direct_read"]),
        "write_bytes_per_second": round(medians["write"]),
        "read_bytes_per_second": round(read), "arithmetic_bytes_per_second": round(medians["arithmetic"]),
        "bound_by": "disk" if read < medians["arithmetic"] else "arithmetic",
        "conversion_seconds": round(medians["seconds"], 1),
        "conversion_seconds_least": round(min(run["seconds"] for run in runs), 1),
        "conversion_seconds_most": round(max(run["seconds"] for run in runs), 1),
        "conversion_cpu_seconds": round(medians["cpu_seconds"], 1),
        "conversion_bytes_per_second": round(medians["conversion"]),
        "traffic_bytes_per_second": round(medians["traffic"]),
        "share": round(medians["conversion"] / limit, 3),
        "share_of_traffic": round(medians["conversion"] / min(medians["traffic"], medians["arithmetic"]), 3),
        "peak_memory_bytes": max(run["peak"] for run in runs)}
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
