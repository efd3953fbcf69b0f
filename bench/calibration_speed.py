"""Measure the time and memory of a calibrated conversion on layers of true shapes with random weights.

The models have a few layers of DeepSeek-R1-Distill-Llama-70B or Qwen3-30B-A3B, a small vocabulary and the demo model's
tokenizer. They are converted as `shoehorn convert` does it. Reported: seconds of each layer, of the whole conversion,
and what follows for all layers of the model; peak memory of PyTorch's allocator on the GPU; output errors.
usage: bench/calibration_speed.py [70b mixture ...] [--layers 4] [--free GIB] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shoehorn.config import settings
from shoehorn.int4 import convert
from shoehorn.int4.convert import ConversionOptions
from shoehorn.int4.journal import Limits

HOME = Path(__file__).resolve().parents[1]
VOCABULARY = 4096
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "70b": (80, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192,
                 "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}),
    "8b": (32, {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096,
                "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}),
    "mixture": (48, {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
                     "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
                     "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                     "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1})}
"""Number of layers and config by name."""

OCCUPY = ("import sys, torch; memory = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device='cuda'); "
          "print('ready', flush=True); sys.stdin.read()")


class Seconds(logging.Handler):
    """Collects the seconds of each layer from the log."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[float] = []
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take one line."""
        line = record.getMessage()
        self.lines.append(line)
        print(line, flush=True)
        if match := re.match(r"Calibrated layer=.* seconds=([\d.]+)", line):
            self.layers.append(float(match[1]))


def write_model(folder: Path, name: str, layers: int) -> None:
    """Write a checkpoint with random weights, one shard per layer and one for the rest."""
    config = {**KINDS[name][1], "num_hidden_layers": layers, "vocab_size": VOCABULARY, "dtype": "bfloat16",
              "max_position_embeddings": 4096, "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (HOME / "demo" / "model" / file).exists():
            shutil.copy(HOME / "demo" / "model" / file, folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", hidden // heads)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16, device=device).normal_(0, 0.6 / columns ** 0.5).cpu()

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    weight_map: dict[str, str] = {}

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        file = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(layers):
        sizes = {"self_attn.q_proj": (heads * head, hidden), "self_attn.o_proj": (hidden, heads * head),
                 "self_attn.k_proj": (config["num_key_value_heads"] * head, hidden),
                 "self_attn.v_proj": (config["num_key_value_heads"] * head, hidden)}
        experts = config.get("num_experts", 0)
        inner = config["moe_intermediate_size"] if experts else config["intermediate_size"]
        for prefix in [f"mlp.experts.{number}" for number in range(experts)] or ["mlp"]:
            sizes |= {f"{prefix}.gate_proj": (inner, hidden), f"{prefix}.up_proj": (inner, hidden),
                      f"{prefix}.down_proj": (hidden, inner)}
        tensors = {f"{part}.weight": matrix(*size) for part, size in sizes.items()}
        tensors |= {f"{norm}_layernorm.weight": ones(hidden) for norm in ("input", "post_attention")}
        if experts:
            tensors |= {"mlp.gate.weight": matrix(experts, hidden) * 4,
                        "self_attn.q_norm.weight": ones(head), "self_attn.k_norm.weight": ones(head)}
        save(index + 1, {f"model.layers.{index}.{part}": tensor for part, tensor in tensors.items()})
    save(layers + 1, {"model.embed_tokens.weight": matrix(VOCABULARY, hidden), "model.norm.weight": ones(hidden),
                      "lm_head.weight": matrix(VOCABULARY, hidden)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def measure(name: str, layers: int, home: Path, seconds: Seconds, host_bytes: int) -> dict[str, Any]:
    """Convert one model; return the figures."""
    write_model(home / name, name, layers)
    (home / "models").mkdir(exist_ok=True)
    environment = {"MODEL_ID": str(home / name), "MODEL_SOURCE": "local", "MODELS_DIR": str(home / "models"),
                   "RUN_DIR": str(home / "run"), "QUANTIZATION": "int4", "CALIBRATION": "on"}
    seconds.layers, seconds.lines = [], []
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    options = ConversionOptions(16, limits=Limits(host_bytes))
    folder = convert.convert(settings.load(environment), options, 8, lambda _: None)
    whole = time.monotonic() - begin
    calibration = json.loads((folder / "conversion.json").read_text())["calibration"]
    errors = list(calibration["output_errors"].values())
    mean = sum(seconds.layers) / len(seconds.layers)
    result = {"model": name, "layers": layers, "seconds_by_layer": seconds.layers, "seconds": round(whole, 1),
              "minutes_for_all_layers": round(mean * KINDS[name][0] / 60, 1), "budget": calibration["budget"],
              "tokens": calibration["sequences"] * calibration["length"], "data_free": len(calibration["data_free"]),
              "output_error": round(sum(each[0] for each in errors) / len(errors), 4),
              "output_error_data_free": round(sum(each[1] for each in errors) / len(errors), 4)}
    if on_gpu:
        result |= {"gpu": torch.cuda.get_device_name(), "peak_gpu_bytes": torch.cuda.max_memory_reserved()}
    shutil.rmtree(home / name)
    shutil.rmtree(folder)
    return result


def main() -> int:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["70b", "mixture"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--free", type=float, help="leave only so many GiB of the GPU free")
    parser.add_argument("--host", type=float, default=0, help="plan with so many GiB of host memory")
    parser.add_argument("--out", type=Path, default=HOME / "bench" / "results" / "calibration-speed.json")
    arguments = parser.parse_args()
    seconds = Seconds()
    logging.getLogger("convert").addHandler(seconds)
    logging.getLogger("convert").setLevel(logging.INFO)
    results = json.loads(arguments.out.read_text())["results"] if arguments.out.exists() else []
    occupier = None
    if arguments.free:
        size = torch.cuda.mem_get_info()[0] - int(arguments.free * 2 ** 30) - (700 << 20)
        occupier = subprocess.Popen([sys.executable, "-c", OCCUPY, str(size)], stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, text=True)
        if not occupier.stdout or occupier.stdout.readline() != "ready\n":
            raise RuntimeError("the memory of the GPU cannot be occupied")
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as home:
        for name in arguments.models:
            result = measure(name, arguments.layers, Path(home), seconds, int(arguments.host * 2 ** 30))
            results.append(result | ({"free_gib": arguments.free} if arguments.free else {}))
            print(json.dumps(results[-1]), flush=True)
            arguments.out.write_text(json.dumps({"date": datetime.now(UTC).date().isoformat(),
                                                 "torch": torch.__version__, "results": results}, indent=1) + "\n")
    if occupier:
        occupier.communicate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
