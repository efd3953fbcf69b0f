"""Decoder of a checkpoint, one layer in memory at a time: transformers' own model classes, weights read on demand.

Rules:
- the model is created on torch's `meta` device, without memory; a layer gets memory and weights in `load`, and loses
  both in `unload`;
- code of the model's repository is never run;
- the arguments of each layer (masks, rotary embeddings) are those that the model's own forward pass gives it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.int4.calibration.budget import LayerSize
from shoehorn.model.files import LocalFiles
from shoehorn.model.safetensors import header
from shoehorn.model.tensor_names import EMBEDDING, IN_LAYER, LM_HEAD

_RENAMED = (("block_sparse_moe.", "mlp."), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."),
            ("mlp.e_score_correction_bias", "mlp.gate.e_score_correction_bias"))
"""Names of Mixtral's checkpoints and of transformers 5 (transformers/conversion_mapping.py)."""

_NORM = re.compile(r"(?:language_model\.)?(?:model\.)+(?:language_model\.)?norm\.weight")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


class Decoder:
    """The decoder of a checkpoint in a folder.

    Args:
        directory: folder with config, headers and the shards that are still there.
        device: of the loaded layer.
        dtype: of its weights and of the hidden states.

    Raises:
        SettingsError: transformers has no class for the model without code from its repository.
    """

    def __init__(self, directory: Path, device: str, dtype: torch.dtype) -> None:
        self._directory, self._device, self._dtype = directory, torch.device(device), dtype
        self._model = _skeleton(directory)
        self._decoder: Any = self._model.get_decoder()
        self._files: dict[str, str] = {}
        files = LocalFiles(directory)
        for name, size in files.names().items():
            if name.endswith(".safetensors"):
                self._files |= {tensor.name: name for tensor in header(files, name, size)}
        self._by_layer: dict[int, dict[str, str]] = {}
        for name in self._files:
            if match := IN_LAYER.fullmatch(name):
                self._by_layer.setdefault(int(match[1]), {})[_renamed(match[2])] = name
        self.layer_of = {name: index for index, names in self._by_layer.items() for name in names.values()}
        """Layer of each tensor, by the checkpoint's name."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self._decoder.layers)

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self._decoder.config.hidden_size)

    @property
    def logit_cap(self) -> float | None:
        """Limit of the logits, as Gemma 2 has."""
        return getattr(self._decoder.config, "final_logit_softcapping", None)

    def size(self, length: int) -> LayerSize:
        """Return the largest sizes over all layers.

        Args:
            length: of a sequence.
        """
        layers = [[parameter.shape for parameter in layer.parameters()] for layer in self._decoder.layers]
        widest = max(shape[-1] for shapes in layers for shape in shapes)
        config = self._decoder.config
        scores = int(config.num_attention_heads) * length
        return LayerSize(max(sum(shape.numel() for shape in shapes) for shapes in layers), widest,
                         6 * max(widest, self.hidden_size) + scores)

    def operations(self, tokens: int, passes: int, solve: int) -> float:
        """Return the floating-point operations of a calibration, roughly.

        Args:
            passes: forward passes over the tokens.
            solve: operations of quantizing, for each weight and column of its matrix.
        """
        config, total = self._decoder.config, 0.0
        for layer in self._decoder.layers:
            for parameter in layer.parameters():
                *experts, rows, columns = parameter.shape if parameter.dim() > 1 else (1, *parameter.shape)
                number = experts[0] if experts else 1
                reached = tokens * getattr(config, "num_experts_per_tok", 1) if experts else tokens
                total += 2 * reached * (passes * rows * columns + 0.6 * columns ** 2)
                total += solve * number * rows * columns ** 2
        return total

    def begin(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        """Return the first layer's inputs of one sequence, [1, length, hidden], and each layer's keyword arguments.

        Args:
            ids: token ids, int64 [1, length].
        """
        outer = [module for name, module in self._decoder.named_modules() if not name.startswith("layers.")]
        for module in outer:
            if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                module.to_empty(device=self._device, recurse=False)
                self._initialize(module)
        embedding = self._decoder.embed_tokens
        if not getattr(embedding, "_is_read", False):
            embedding.weight = torch.nn.Parameter(self._read(self._outer(EMBEDDING)), requires_grad=False)
            embedding._is_read = True
        calls: list[tuple[torch.Tensor, dict[str, Any]]] = []

        def record(hidden: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            calls.append((hidden, named))
            return hidden

        for layer in self._decoder.layers:
            layer.forward = record
        try:
            self._decoder(input_ids=ids.to(self._device), use_cache=False)
        finally:
            for layer in self._decoder.layers:
                del layer.forward
        return calls[0][0].to(self._dtype), [named for _, named in calls]

    def end_begin(self) -> None:
        """Free the embedding."""
        self._decoder.embed_tokens.to("meta")
        self._decoder.embed_tokens._is_read = False

    @contextmanager
    def loaded(self, index: int) -> Iterator[torch.nn.Module]:
        """Load a layer for the block.

        Raises:
            ModelUnavailableError: a tensor is missing or cannot be read.
        """
        layer: torch.nn.Module = self._decoder.layers[index]
        layer.to_empty(device=self._device)
        try:
            for module in layer.modules():
                if list(module.buffers(recurse=False)):
                    self._initialize(module)
            names = self._by_layer.get(index, {})
            for name, parameter in [*layer.named_parameters(), *layer.named_buffers()]:
                if name in names:
                    parameter.data = self._read(names[name], parameter.dtype.is_floating_point)
                elif parameter.dim() == 3:
                    parameter.data = self._experts(name, names, parameter.shape)
                elif name in dict(layer.named_parameters()):
                    raise _missing(f"layer {index}: {name}")
            yield layer
        finally:
            layer.to("meta")

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the normalized hidden states that enter the output head."""
        norm = self._decoder.norm
        norm.to_empty(device=self._device)
        self._initialize(norm)
        norm.weight = torch.nn.Parameter(self._read(self._outer(_NORM)), requires_grad=False)
        return torch.as_tensor(norm(hidden.to(self._device)))

    def head(self) -> torch.Tensor:
        """Return the output head, or the embedding that serves as one, [vocabulary, hidden]."""
        names = [name for name in self._files if LM_HEAD.fullmatch(name) and name.endswith(".weight")]
        return self._read(names[0] if names else self._outer(EMBEDDING))

    def _outer(self, pattern: re.Pattern[str]) -> str:
        for name in self._files:
            if pattern.fullmatch(name):
                return name
        raise _missing(pattern.pattern)

    def _initialize(self, module: torch.nn.Module) -> None:
        """Compute the buffers that no checkpoint has, as rotary frequencies."""
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # its weights are read
        self._model._init_weights(module)

    def _experts(self, name: str, names: Mapping[str, str], shape: torch.Size) -> torch.Tensor:
        """Return [experts, rows, columns] from the tensors of each expert."""
        prefix, _, kind = name.rpartition(".")
        parts = ("gate", "up") if kind == "gate_up_proj" else ("down",)
        result = torch.empty(shape, dtype=self._dtype, device=self._device)
        rows = shape[1] // len(parts)
        for expert in range(shape[0]):
            for number, part in enumerate(parts):
                key = f"{prefix}.{expert}.{part}_proj.weight"
                if key not in names:
                    raise _missing(key)
                result[expert, number * rows:(number + 1) * rows] = self._read(names[key])
        return result

    def _read(self, name: str, is_float: bool = True) -> torch.Tensor:
        try:
            with safe_open(self._directory / self._files[name], "pt") as file:
                tensor: torch.Tensor = file.get_tensor(name)
        except (OSError, SafetensorError, KeyError) as error:
            raise _missing(name) from error
        return tensor.to(self._device, self._dtype if is_float else None)


def layer_name(name: str) -> str:
    """Return the name of a tensor within its layer, as transformers has it."""
    match = IN_LAYER.fullmatch(name)
    return _renamed(match[2]) if match else name


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name


def _missing(name: str) -> ModelUnavailableError:
    return ModelUnavailableError(f"Calibration: {name}: not found in the original.",
                                 "Run `shoehorn pull` again, or set CALIBRATION=off.", code="incomplete_model")


def _skeleton(directory: Path) -> Any:
    """Create the language model without memory."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # transformers has no types
                config, trust_remote_code=False)
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise SettingsError(f"Calibration: transformers cannot create the model ({error}).",
                            "Set CALIBRATION=off.", code="calibration_unsupported_model") from error
    model.requires_grad_(False)
    return model.eval()
