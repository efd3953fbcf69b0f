"""Compares small mixtures with all experts on the GPU and with experts in host memory, in the real engine.

Two models with random weights: experts in INT4 (Qwen3-MoE) and in MXFP4 with biases and padded sizes (gpt-oss). Absent
experts are copied to the GPU, or computed on the CPU, eagerly and from CUDA graphs.
usage: mixture_answers.py OUT.json WORK_DIR      with vLLM, src/, tests/ and the plugin reachable
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HOME = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOME / "src"), str(HOME / "tests")]

from fakes import captured  # noqa: E402  # the path is set just above
from support.kernel_reference import matrix  # noqa: E402  # likewise

LAYERS, VOCABULARY, EXPERTS, CHOSEN = 4, 256, 16, 4
PROMPTS = [[(7 * i + j) % VOCABULARY for i in range(length)] for j, length in enumerate((3, 5, 40, 70, 100))]
GRAPHS = {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
          "max_cudagraph_capture_size": 8}


def _experts(**options: int) -> dict[str, Any]:
    return {"additional_config": {"shoehorn": {"experts": options}}}


WAYS = {"resident": {}, "copied": _experts(slots=8, scratch=3, divided=8),
        "copied, graphs": {**_experts(slots=8, scratch=3, divided=8), **GRAPHS},
        "computed": _experts(slots=4, scratch=5, computed=8),
        "computed, graphs": {**_experts(slots=1, scratch=16, computed=64, fills=1), **GRAPHS}}


class Checkpoint:
    """Tensors that are written to a folder."""

    def __init__(self, hidden: int) -> None:
        self.hidden, self.tensors = hidden, {}
        self._random = torch.Generator().manual_seed(0)

    def plain(self, name: str, *shape: int, size: float = 1.0) -> None:
        scale = size if len(shape) == 1 else size / shape[-1] ** 0.5
        self.tensors[name] = (torch.randn(shape, generator=self._random) * scale).to(torch.bfloat16)

    def ones(self, name: str, size: int) -> None:
        self.tensors[name] = torch.ones(size, dtype=torch.bfloat16)

    def packed(self, name: str, rows: int, k: int) -> None:
        source = matrix((rows, k), 32, len(self.tensors))
        self.tensors |= {f"{name}.weight_packed": source.codes, f"{name}.weight_shape": torch.tensor((rows, k)),
                         f"{name}.weight_scale": (source.scales.double() * 20 / k ** 0.5).to(torch.bfloat16)}

    def common(self) -> None:
        self.plain("model.embed_tokens.weight", VOCABULARY, self.hidden, size=self.hidden ** 0.5)
        self.plain("lm_head.weight", VOCABULARY, self.hidden, size=3.0)
        self.ones("model.norm.weight", self.hidden)
        for layer in range(LAYERS):
            for name in ("input_layernorm", "post_attention_layernorm"):
                self.ones(f"model.layers.{layer}.{name}.weight", self.hidden)

    def write(self, directory: Path, config: dict[str, Any]) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in self.tensors.items()}, directory / "model.safetensors",
                  {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))
        return directory


def int4(directory: Path) -> Path:
    """Qwen3-MoE."""
    hidden, inner = 256, 128
    checkpoint = Checkpoint(hidden)
    checkpoint.common()
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        for name, shape in {"q": (256, hidden), "k": (128, hidden), "v": (128, hidden), "o": (hidden, 256)}.items():
            checkpoint.packed(f"{start}self_attn.{name}_proj", *shape)
        for name in ("q_norm", "k_norm"):
            checkpoint.ones(f"{start}self_attn.{name}.weight", 64)
        checkpoint.plain(f"{start}mlp.gate.weight", EXPERTS, hidden, size=2.0)
        for expert in range(EXPERTS):
            for name, shape in {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}.items():
                checkpoint.packed(f"{start}mlp.experts.{expert}.{name}_proj", *shape)
    config = {**captured.config("qwen3-30b-a3b"), "num_hidden_layers": LAYERS, "hidden_size": hidden,
              "intermediate_size": 256, "moe_intermediate_size": inner, "num_experts": EXPERTS,
              "num_experts_per_tok": CHOSEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
              "vocab_size": VOCABULARY, "torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None,
              "quantization_config": {
                  "quant_method": "compressed-tensors", "format": "pack-quantized",
                  "ignore": ["lm_head", "re:.*mlp.gate$"], "config_groups": {"group_0": {
                      "targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True,
                                                         "strategy": "group", "group_size": 32}}}}}
    return checkpoint.write(directory, config)


def mxfp4(directory: Path) -> Path:
    """gpt-oss, of sizes that Marlin pads."""
    hidden, inner = 320, 160
    checkpoint = Checkpoint(hidden)
    checkpoint.common()
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        for name, rows, k in (("q", 256, hidden), ("k", 128, hidden), ("v", 128, hidden), ("o", hidden, 256)):
            checkpoint.plain(f"{start}self_attn.{name}_proj.weight", rows, k)
            checkpoint.plain(f"{start}self_attn.{name}_proj.bias", rows, size=0.1)
        checkpoint.plain(f"{start}self_attn.sinks", 4)
        checkpoint.plain(f"{start}mlp.router.weight", EXPERTS, hidden, size=2.0)
        checkpoint.plain(f"{start}mlp.router.bias", EXPERTS, size=0.1)
        for name, rows, k in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
            source = matrix((EXPERTS, rows, k), 32, len(checkpoint.tensors), True)
            place = f"{start}mlp.experts.{name}_proj"
            checkpoint.tensors |= {f"{place}_blocks": source.codes.view(EXPERTS, rows, k // 32, 16),
                                   f"{place}_scales": source.scales}
            checkpoint.plain(f"{place}_bias", EXPERTS, rows)
    config = {**captured.config("gpt-oss-20b"), "num_hidden_layers": LAYERS, "hidden_size": hidden,
              "intermediate_size": inner, "num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN,
              "experts_per_token": CHOSEN, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
              "vocab_size": VOCABULARY, "torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None,
              "pad_token_id": 0,
              "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}
    return checkpoint.write(directory, config)


def answers(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Tokens and log probabilities, in this process; the second round decodes five requests together."""
    from vllm import LLM, SamplingParams  # heavy, and only in the children

    engine = LLM(model=model, **{"enforce_eager": True, **arguments}, max_model_len=256, max_num_seqs=8,
                 gpu_memory_utilization=0.05, kv_cache_memory_bytes=1 << 28, dtype="bfloat16", moe_backend="marlin",
                 skip_tokenizer_init=True, enable_prefix_caching=False, disable_log_stats=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=1, prompt_logprobs=0, detokenize=False)
    done = [engine.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
    done += engine.generate(prompts, sampling, use_tqdm=False)
    return {"tokens": [list(one.outputs[0].token_ids) for one in done],
            "prompts": [[next(iter(place.values())).logprob for place in one.prompt_logprobs[1:]] for one in done],
            "logprobs": [[next(iter(step.values())).logprob for step in one.outputs[0].logprobs] for one in done]}


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Tokens up to the first other one, and distances of log probabilities up to there."""
    same, distances = [], []
    for number, (left, right) in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
        until = next((place for place in range(len(left)) if left[place] != right[place]), len(left))
        same.append(until)
        distances += [abs(a - b) for a, b in zip(one["logprobs"][number][:until], other["logprobs"][number][:until],
                                                 strict=True)]
        distances += [abs(a - b) for a, b in zip(one["prompts"][number], other["prompts"][number], strict=True)]
    return {"same_tokens": same, "mean_difference_of_logprobs": round(sum(distances) / len(distances), 5),
            "largest": round(max(distances), 4)}


def main() -> None:
    """Start all at once, and compare each way with all experts on the GPU."""
    if sys.argv[1] == "one":
        Path(sys.argv[4]).write_text(json.dumps(answers(sys.argv[2], json.loads(sys.argv[3]))))
        sys.stdout.flush()
        os._exit(0)
    out, work = Path(sys.argv[1]), Path(sys.argv[2])
    models = {"int4": int4(work / "int4"), "mxfp4": mxfp4(work / "mxfp4")}
    children = {}
    for kind, model in models.items():
        for way, arguments in WAYS.items():
            file = work / f"{kind}-{way.replace(', ', '-')}.json"
            log = file.with_suffix(".log").open("w")
            children[kind, way] = (subprocess.Popen(
                [sys.executable, __file__, "one", str(model), json.dumps(arguments), str(file)], stdout=log, stderr=log,
                env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "SHOEHORN_CPU_THREADS": "2"}), file)
    results: dict[str, Any] = {}
    for (kind, way), (child, file) in children.items():
        child.wait()
        if not file.exists():
            lines = file.with_suffix(".log").read_text().splitlines()
            results[f"{kind}, {way}"] = {"failed": child.returncode, "end": lines[-25:]}
        elif way != "resident":
            resident = children[kind, "resident"][1]
            results[f"{kind}, {way}"] = compare(json.loads(resident.read_text()), json.loads(file.read_text())) \
                if resident.exists() else "nothing to compare with"
        out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
