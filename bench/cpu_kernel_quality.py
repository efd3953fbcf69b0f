"""Measure the quality that the CPU kernel's int8 activations cost on a trained model.

A checkpoint that `shoehorn convert` made (compressed-tensors, INT4) and the bf16 model that it came from. Three
models predict the same text: bf16; INT4 with bf16 activations (the weights unpacked, as the engine's own kernels see
them); INT4 through the CPU kernel, `--tokens` at a time. Reported: perplexity, and the KL divergence from bf16 over
all positions.
usage: bench/cpu_kernel_quality.py BF16_DIR INT4_DIR [--length 2048] [--tokens 16] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # transformers below reads the line above
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoehorn_vllm.hybrid.kernel import library, products, team
from shoehorn_vllm.hybrid.kernel.products import PackedWeights

HOME = Path(__file__).resolve().parents[1]
TEXTS = ("README.md", "docs/architecture.md", "docs/gateway.md", "docs/reliability.md", "docs/int4.md")
CONTEXT = 512

Product = Callable[[PackedWeights, torch.Tensor], torch.Tensor]


def exact(weights: PackedWeights, x: torch.Tensor) -> torch.Tensor:
    """Unpacked weights, bf16 activations."""
    values = torch.empty(weights.rows, weights.k, dtype=torch.bfloat16)
    products.unpack(weights, values)
    return torch.nn.functional.linear(x, values)


def by_kernel(tokens: int) -> Product:
    """The CPU kernel, so many tokens at a time."""
    return lambda weights, x: torch.cat([products.linear(weights, part) for part in x.split(tokens)])


class Int4Linear(torch.nn.Module):
    """A linear layer with packed weights."""

    def __init__(self, weights: PackedWeights, bias: torch.Tensor | None, multiply: Product) -> None:
        super().__init__()
        self.weights, self.bias, self.multiply = weights, bias, multiply

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.multiply(self.weights, x.flatten(0, -2)).view(*x.shape[:-1], self.weights.rows)
        return y if self.bias is None else y + self.bias


def quantized(model: torch.nn.Module, directory: Path, multiply: Product) -> int:
    """Replace the model's linears by those that the checkpoint has in INT4; their number."""
    count = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a mapping
                owner, _, kind = name.rpartition(".")
                if kind != "weight_packed" or "embed" in owner or "lm_head" in owner:
                    continue
                weights = PackedWeights(tensors.get_tensor(name), tensors.get_tensor(f"{owner}.weight_scale"))
                parent, _, own = owner.rpartition(".")
                layer = model.get_submodule(owner)
                setattr(model.get_submodule(parent), own, Int4Linear(weights, layer.bias, multiply))
                count += 1
    return count


def predict(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Log probabilities [positions, vocabulary]."""
    with torch.inference_mode():
        return torch.cat([model(part[None]).logits[0].float().log_softmax(-1) for part in ids.split(CONTEXT)])


def main() -> None:
    """Measure, print and write the result."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("bf16", type=Path)
    options.add_argument("int4", type=Path)
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--tokens", type=int, default=16)
    options.add_argument("--out", type=Path, default=HOME / "bench" / "results" / "cpu-kernel-quality.json")
    arguments = options.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.bf16)
    text = "\n\n".join((HOME / name).read_text(encoding="utf-8") for name in TEXTS)
    ids = torch.tensor(tokenizer(text)["input_ids"][:arguments.length])
    team.start(reserved=0)
    targets = torch.cat([torch.cat((part[1:], part[:1] * 0 - 1)) for part in ids.split(CONTEXT)])
    counted = targets >= 0
    ways: dict[str, Product | None] = {"bf16": None, "int4": exact, "kernel": by_kernel(arguments.tokens)}
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "model": arguments.bf16.name,
        "positions": int(counted.sum()), "isa": library.default_isa().name.lower(), "tokens": arguments.tokens}
    base = torch.empty(0)
    for name, multiply in ways.items():
        model = AutoModelForCausalLM.from_pretrained(arguments.bf16, dtype=torch.bfloat16)
        layers = quantized(model, arguments.int4, multiply) if multiply else 0
        logs = predict(model, ids)[counted]
        base = logs if name == "bf16" else base
        loss = -logs.gather(1, targets[counted, None]).mean()
        figures = {"layers": layers, "perplexity": round(float(loss.exp()), 4)}
        if multiply:
            divergence = (base.exp() * (base - logs)).sum(-1)
            figures |= {"kl_mean": round(float(divergence.mean()), 6),
                      "kl_p99": round(float(divergence.quantile(0.99)), 5),
                      "same_likeliest": round(float((base.argmax(-1) == logs.argmax(-1)).float().mean()), 4)}
        result[name] = figures
        print(name, json.dumps(figures), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
