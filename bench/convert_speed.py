"""How fast a conversion to INT4 is, beside what it is bound by, and how much memory it takes.

A Llama with random weights in bf16, of some shards (--gigabytes), and an embedding and a head as large as those of a
70B. In turn, --times times, each with the source's pages dropped from the cache before:
- `read`: the source read from the disk from beginning to end, plainly and as the conversion reads it (past the page
  cache, as many threads); the faster of the two counts;
- `write`: 2 GiB written to the disk; for the record only;
- `traffic`: what a conversion asks of the disk, without the arithmetic: the source read as many threads do it, a share
  of each block written, and every file's share read back while the next is read;
- `arithmetic`: a thread for each core, quantizing weights that are in memory already;
- `conversion`: `shoehorn convert` of the same source; interpreter, libraries and compilation included.
The medians count. `share` is the conversion's speed as a share of the lower one of reading and arithmetic, and
`share_of_traffic` as one of the lower one of traffic and arithmetic. Memory is the peak of the sum over the
conversion's processes of their proportional set size (shared pages counted once), read once a second, since reading it
takes a core some time. Libraries are compiled to byte code first, as they are in the image.
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

HOME = Path(__file__).resolve().parents[1]
RESULT = HOME / "bench" / "results" / "convert-speed.json"
HIDDEN, INNER, VOCAB = 8192, 28672, 128256
ROWS = 1024
BLOCK = 8 << 20
WRITTEN = 1 << 31
SHARE = (4 + 16 / 128) / 16
"""Of a bf16 weight, what a code of 4 bits and its part of a scale take."""
READERS = 4


def write_source(folder: Path, gigabytes: float) -> int:
    """A checkpoint whose layers have the same weights; returns the bytes of its shards."""
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
    """Take the files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(folder: Path) -> float:
    """Seconds to read every shard once."""
    drop_pages(folder)
    begun = time.perf_counter()
    buffer = bytearray(BLOCK)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - begun


def read_directly(folder: Path, threads: int) -> float:
    """Seconds to read every shard once, past the page cache."""
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
    """Seconds until so many bytes are on the disk."""
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
    """Seconds to read every shard, to write a share of it, and to read that back."""
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
    """Bytes of bf16 weights that so many threads quantize in a second."""
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
    """Seconds of a conversion, its seconds of processor time, its peak of memory, and the bytes that it wrote."""
    drop_pages(source)
    models = home / "models"
    models.mkdir()
    environment = {**os.environ, "MODEL_ID": str(source), "MODEL_SOURCE": "local", "MODELS_DIR": str(models),
                   "RUN_DIR": str(home / "run"), "PYTHONPYCACHEPREFIX": str(home / "compiled")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    imports = "from shoehorn import cli; from shoehorn.int4 import convert, quantizer, quantizer_cpu"
    subprocess.run([sys.executable, "-c", imports], env=environment, check=True)
    used, begun, peak = os.times(), time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-m", "shoehorn.cli", "convert"], env=environment) as process:
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
    parser.add_argument("--gigabytes", type=float, default=16)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to work; on the disk that is to be measured")
    arguments = parser.parse_args()
    machine = detect.detect()
    cores = round(machine.cpus)
    with shard_writer.workers(shard_writer.worker_count(machine.cpus, machine.host_available_bytes)) as pool:
        threads = getattr(pool, "_max_workers")  # noqa: B009  # the standard library tells it nowhere else
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
    found = {name: median(run[name] for run in runs) for name in runs[0]}
    read = max(found["plain_read"], found["direct_read"])
    limit = min(read, found["arithmetic"])
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpus": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
                    "python": platform.python_version(), "torch": torch.__version__, "numba": version("numba"),
                    "device": quantizer.device()},
        "source_bytes": size, "written_bytes": written, "threads": threads, "times": arguments.times,
        "plain_read_bytes_per_second": round(found["plain_read"]),
        "direct_read_bytes_per_second": round(found["direct_read"]),
        "write_bytes_per_second": round(found["write"]),
        "read_bytes_per_second": round(read), "arithmetic_bytes_per_second": round(found["arithmetic"]),
        "bound_by": "disk" if read < found["arithmetic"] else "arithmetic",
        "conversion_seconds": round(found["seconds"], 1),
        "conversion_seconds_least": round(min(run["seconds"] for run in runs), 1),
        "conversion_seconds_most": round(max(run["seconds"] for run in runs), 1),
        "conversion_cpu_seconds": round(found["cpu_seconds"], 1),
        "conversion_bytes_per_second": round(found["conversion"]),
        "traffic_bytes_per_second": round(found["traffic"]),
        "share": round(found["conversion"] / limit, 3),
        "share_of_traffic": round(found["conversion"] / min(found["traffic"], found["arithmetic"]), 3),
        "peak_memory_bytes": max(run["peak"] for run in runs)}
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
