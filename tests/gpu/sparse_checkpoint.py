"""Writes a checkpoint of true shapes whose weights are holes: a 140 GB model takes a few megabytes of disk.

Rules:
- every file is valid for the engine: config, index, safetensors, generation config, and a byte-level tokenizer of the
  model's vocabulary size with a chat template;
- weights read as zeros, so the logits are all equal and sampling at temperature 1 draws every token alike;
- written are only tensors that may not be zero: norms, the scales of FP8, the shapes and group indices of packed
  formats, bitsandbytes' states; and, for mixtures of experts, routers and embedding, so that tokens take various paths;
- `auto_map` is left out of config.json, since the code that it names is not there.
usage: sparse_checkpoint.py NAME OUT [--layers N]      with NAME of tests/captures/models
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HOME = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOME / "src"), str(HOME / "tests")]

from fakes import captured  # noqa: E402  # the path is set just above
from shoehorn.model.files import read_json  # noqa: E402  # likewise
from shoehorn.model.safetensors import Tensor, header, shards  # noqa: E402  # likewise

TEMPLATE = ("{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
SPECIAL = ("<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")

_NORM = re.compile(r".*(norm\d?|ln_f)\.weight")
_ROUTER = re.compile(r".*\.(mlp\.gate|block_sparse_moe\.gate|mlp\.router)\.weight")
_EMBEDDING = re.compile(r".*embed_tokens\.weight(_packed)?")
_SCALE = re.compile(r"(.*)\.(weight_scale(_inv)?|input_scale)")
_LAYER = re.compile(r"(?:language_model\.)?model\.layers\.(\d+)\..*")
_IMAGE_TOKENS = {"boi_token_index": "<start_of_image>", "eoi_token_index": "<end_of_image>",
                 "image_token_index": "<image_soft_token>"}


def write(directory: Path, config: Mapping[str, Any], tensors: Sequence[Tensor],
          shard_bytes: int = captured.SHARD_BYTES) -> None:
    """Write the checkpoint of a config and tensors to a new folder."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {key: value for key, value in config.items() if key != "auto_map"}
    parts = captured.split(tensors, shard_bytes)
    values = _Values(config, tensors)
    for file, part in parts.items():
        head = captured.header(part)
        with (directory / file).open("wb") as out:
            out.write(head)
            place = len(head)
            for tensor in part:
                filling = values.of(tensor)
                if filling is not None:
                    assert len(filling) == tensor.bytes, tensor
                    out.seek(place)
                    out.write(filling)
                place += tensor.bytes
            out.truncate(place)
    if len(parts) > 1:
        weight_map = {tensor.name: file for file, part in parts.items() for tensor in part}
        (directory / "model.safetensors.index.json").write_bytes(
            captured.index(weight_map, sum(tensor.bytes for tensor in tensors)))
    _json(directory / "config.json", config)
    _json(directory / "generation_config.json",
          {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None})
    _tokenizer_files(directory, config, tensors)


def converted(name: str) -> tuple[dict[str, Any], list[Tensor]]:
    """(config, tensors) of a captured model as `shoehorn convert` makes it."""
    outline = captured.converted(name)
    sizes = outline.names()
    tensors = [tensor for shard in shards(outline, sizes) for tensor in header(outline, shard, sizes[shard])]
    return read_json(outline, sizes, "config.json"), tensors


def first_layers(config: Mapping[str, Any], tensors: Sequence[Tensor], count: int,
                 ) -> tuple[dict[str, Any], list[Tensor]]:
    """The model's first `count` layers, without those for multi-token prediction."""
    def cut(section: Mapping[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {"num_hidden_layers": count} if "num_hidden_layers" in section else {}
        if isinstance(section.get("layer_types"), list):
            changed["layer_types"] = section["layer_types"][:count]
        if "num_nextn_predict_layers" in section:
            changed["num_nextn_predict_layers"] = 0
        return {**section, **changed}

    shorter = cut(config)
    if isinstance(shorter.get("text_config"), dict):
        shorter["text_config"] = cut(shorter["text_config"])
    selected = [tensor for tensor in tensors
            if not (layer := _LAYER.fullmatch(tensor.name)) or int(layer[1]) < count]
    return shorter, selected


class _Values:
    """The values of tensors that may not be zero."""

    def __init__(self, config: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        self._text = config.get("text_config") or config
        self._quantization = config.get("quantization_config") or {}
        self._by_name = {tensor.name: tensor for tensor in tensors}
        self._is_mixture = any(_ROUTER.fullmatch(tensor.name) for tensor in tensors)
        self._random = np.random.default_rng(0)

    def of(self, tensor: Tensor) -> bytes | None:
        """A tensor's bytes; None where zeros will do."""
        name, scale = tensor.name, _SCALE.fullmatch(tensor.name)
        if _NORM.fullmatch(name):
            return _encode(np.ones(tensor.elements, np.float32), tensor.dtype)
        if scale and self._dtype(f"{scale[1]}.weight").startswith("F8"):
            return _encode(np.ones(tensor.elements, np.float32), tensor.dtype)
        if self._is_mixture and scale and _EMBEDDING.fullmatch(f"{scale[1]}.weight"):
            return _encode(np.full(tensor.elements, 0.01, np.float32), tensor.dtype)
        if _ROUTER.fullmatch(name) or (self._is_mixture and _EMBEDDING.fullmatch(name)):
            return self._noise(tensor)
        if name.endswith(".weight_shape"):
            rows, packed = self._by_name[name.removesuffix("shape") + "packed"].shape
            return np.array([rows, packed * 32 // self._bits()], np.int64).tobytes()
        if name.endswith("g_idx"):
            return (np.arange(tensor.elements) // self._group()).astype(np.int32).tobytes()
        if ".weight.quant_state." in name:
            return self._quant_state(tensor)
        return None

    def _dtype(self, name: str) -> str:
        return self._by_name[name].dtype if name in self._by_name else ""

    def _weights(self) -> Mapping[str, Any]:
        """Packing of the weights: of compressed-tensors its first group, of others the whole."""
        groups = self._quantization.get("config_groups") or {}
        first: Mapping[str, Any] = next((group["weights"] for group in groups.values()), self._quantization)
        return first

    def _bits(self) -> int:
        return int(self._weights().get("num_bits", self._weights().get("bits", 4)))

    def _group(self) -> int:
        return int(self._weights()["group_size"])

    def _noise(self, tensor: Tensor) -> bytes:
        """Small random numbers; long tensors repeat theirs every few thousand rows."""
        width = tensor.shape[-1]
        rows = min(tensor.elements // width, 4096)
        if tensor.dtype == "I32":  # packed: every word is a valid one
            block = self._random.integers(-1 << 31, 1 << 31, rows * width).astype(np.int32).tobytes()
        else:
            block = _encode(self._random.normal(0, 0.02, rows * width).astype(np.float32), tensor.dtype)
        return (block * -(-tensor.bytes // len(block)))[:tensor.bytes]

    def _quant_state(self, tensor: Tensor) -> bytes:
        """bitsandbytes' JSON, padded with spaces to the length of the capture."""
        weight = tensor.name.split(".quant_state.")[0]
        heads, hidden = int(self._text["num_attention_heads"]), int(self._text["hidden_size"])
        width = hidden
        if ".down_proj." in weight:
            width = int(self._text["intermediate_size"])
        elif ".o_proj." in weight:
            width = heads * int(self._text.get("head_dim") or hidden // heads)
        shape = [self._by_name[weight].elements * 2 // width, width]
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape, "nested_blocksize": 256,
                 "nested_dtype": "float32", "nested_offset": 0.0}
        return json.dumps(state).ljust(tensor.elements).encode()


def _encode(values: np.ndarray[Any, np.dtype[np.float32]], dtype: str) -> bytes:
    """Numbers as safetensors stores them in that format."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype]).tobytes()


def _tokenizer_files(directory: Path, config: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """tokenizer.json, tokenizer_config.json and, for a model that takes images, its processor's settings."""
    vocabulary = next(tensor.shape[0] for tensor in tensors if _EMBEDDING.fullmatch(tensor.name))
    images = {int(config[key]): text for key, text in _IMAGE_TOKENS.items() if key in config}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    named = dict(enumerate((*alphabet, *SPECIAL))) | images
    words = {named.get(number, f"Ġw{number}"): number for number in range(vocabulary)}  # quicker than adding them
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (*SPECIAL, *images.values())])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>",
                                "eos_token": "<|end|>", "chat_template": TEMPLATE, "model_max_length": 131072}
    if images:
        settings |= {"processor_class": "Gemma3Processor", "extra_special_tokens": {
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}}
        side = config["vision_config"]["image_size"]
        _json(directory / "preprocessor_config.json", {
            "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor",
            "image_seq_length": config["mm_tokens_per_image"], "size": {"height": side, "width": side},
            "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2})
        _json(directory / "processor_config.json", {
            "processor_class": "Gemma3Processor", "image_seq_length": config["mm_tokens_per_image"]})
    _json(directory / "tokenizer_config.json", settings)


def _json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1), encoding="utf-8")


def main() -> None:
    """Write a captured model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=captured.names())
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    config, tensors = captured.config(arguments.name), captured.tensors(arguments.name)
    if arguments.layers:
        config, tensors = first_layers(config, tensors, arguments.layers)
    write(arguments.out, config, tensors)


if __name__ == "__main__":
    main()
