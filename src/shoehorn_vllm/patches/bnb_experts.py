"""Patch of vllm-bnb-plugin: mixtures of experts load in NF4.

vllm-bnb-plugin 0.0.3 names the experts by their module of before vLLM 0.32 (`…mlp.experts`; now
`…mlp.experts.routed_experts`), so it leaves them unquantized, and the load fails with "output with shape [768, 1]
doesn't match the broadcast shape [768, 2048]". This adds the names of the checkpoint.

Source: vllm_bnb_plugin/bitsandbytes_loader.py, _get_bnb_target_modules and _classify_module_sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm_bnb_plugin.bitsandbytes_loader import BitsAndBytesModelLoader

from shoehorn_vllm.patches.patch import Patch


def apply() -> None:
    """Patch the loader of this process."""
    for patch in PATCHES:
        patch.apply()


def expert_names(model: Any, mapping: list[tuple[str, str, int, str]]) -> list[str]:
    """The checkpoint's names of the experts' linear layers that the plugin quantizes.

    `mapping` holds (parameter, weight, expert, shard) as vLLM's `get_moe_expert_mapping` returns it, with weights such
    as `experts.0.gate_proj.`.
    """
    return [name.split("experts", maxsplit=1)[0] + entry[1].removesuffix(".")
            for name, module in model.named_modules()
            if isinstance(module, RoutedExperts) and hasattr(module.quant_method, "quant_config")
            for entry in mapping]


def _add_target_modules(original: Callable[..., None], loader: Any, model: Any) -> None:
    original(loader, model)
    loader.target_modules.extend(expert_names(model, loader.expert_params_mapping))


def _add_column_sharded_modules(original: Callable[..., None], loader: Any, model: Any) -> None:
    original(loader, model)
    down = [entry for entry in loader.expert_params_mapping if entry[-1] == "w2"]
    loader.column_sharded_weights_modules.extend(expert_names(model, down))


PATCHES = (Patch(BitsAndBytesModelLoader, "_get_bnb_target_modules", _add_target_modules),
           Patch(BitsAndBytesModelLoader, "_classify_module_sharding", _add_column_sharded_modules))
