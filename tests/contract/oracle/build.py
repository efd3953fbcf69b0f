"""vLLM's own configuration and model of a folder with config.json, on the meta device: shapes and no bytes.

Rules: one build a process, since vLLM keeps its groups and platform in globals; `cuda_platform.install` ran before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract.oracle import process_group


@dataclass(frozen=True)
class Built:
    """vLLM's configuration and model.

    Attributes:
        vllm_config: after the block sizes were adapted to the attention backends.
        block_size_before: tokens of a block before that.
    """

    vllm_config: Any
    model: Any
    platform: type
    block_size_before: int | None


def use_configuration(model_type: str, base: str) -> None:
    """Let vLLM read a config.json where a checkpoint's own code would, whose class derives from that of `base`.

    Args:
        base: a model type of transformers; empty for a class that adds nothing.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig
    from vllm.transformers_utils import config

    parent = CONFIG_MAPPING[base] if base else PretrainedConfig
    config._CONFIG_REGISTRY[model_type] = type("OwnConfig", (parent,), {"model_type": model_type})


def build(folder: Path, tensor_parallel: int, platform: type, **options: Any) -> Built:
    """Build the model as rank 0 of a tensor parallel group.

    Args:
        options: of vLLM's EngineArgs (quantization, kv_cache_dtype, hf_overrides, ...).
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(model=str(folder), tensor_parallel_size=tensor_parallel, skip_tokenizer_init=True,
                           load_format="dummy", distributed_executor_backend="mp", **options)
    vllm_config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    before = vllm_config.cache_config.block_size
    with set_current_vllm_config(vllm_config):
        process_group.initialize(tensor_parallel)
        with set_default_torch_dtype(vllm_config.model_config.dtype), torch.device("meta"):
            model = initialize_model(vllm_config)
        platform.update_block_size_for_backend(vllm_config)  # type: ignore[attr-defined]
    return Built(vllm_config, model, platform, before)
