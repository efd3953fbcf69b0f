"""A mend of vllm-bnb-plugin, by which mixtures of experts load in NF4.

vllm-bnb-plugin 0.0.3 names the experts by the module that held them before vLLM 0.32 (`…mlp.experts`; now
`…mlp.experts.routed_experts`), so it leaves them unquantized, and the load fails with "output with shape [768, 1]
doesn't match the broadcast shape [768, 2048]". This adds the names that the checkpoint has.

Source: vllm_bnb_plugin/bitsandbytes_loader.py, _get_bnb_target_modules and _classify_module_sharding.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm_bnb_plugin.bitsandbytes_loader import BitsAndBytesModelLoader

_found, _classified = BitsAndBytesModelLoader._get_bnb_target_modules, BitsAndBytesModelLoader._classify_module_sharding


def apply() -> None:
    """Mend the loader of this process."""
    BitsAndBytesModelLoader._get_bnb_target_modules = _find
    BitsAndBytesModelLoader._classify_module_sharding = _classify


def names(model: Any, mapping: list[tuple[str, str, int, str]]) -> list[str]:
    """The experts' linears by the checkpoint's names, of those that the plugin quantizes.

    `mapping` holds (parameter, weight, expert, shard) as vLLM's `get_moe_expert_mapping` gives it, with weights such as
    `experts.0.gate_proj.`.
    """
    return [name.split("experts", maxsplit=1)[0] + entry[1].removesuffix(".")
            for name, module in model.named_modules()
            if isinstance(module, RoutedExperts) and hasattr(module.quant_method, "quant_config")
            for entry in mapping]


def _find(loader: Any, model: Any) -> None:
    _found(loader, model)
    loader.target_modules.extend(names(model, loader.expert_params_mapping))


def _classify(loader: Any, model: Any) -> None:
    _classified(loader, model)
    down = [entry for entry in loader.expert_params_mapping if entry[-1] == "w2"]
    loader.column_sharded_weights_modules.extend(names(model, down))
