"""Stages of a pipeline: limits of their GPUs, and the layers that each of them executes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shoehorn.common.errors import SettingsError
from shoehorn.config.setting_values import partition
from shoehorn.planner.inputs import PlanInputs
from shoehorn.planner.load_tiers import CONTEXT_8K
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.serving_config import ServingConfig

PARTITION = "VLLM_PP_LAYER_PARTITION"
"""Variable of vLLM with the layers of each stage (vllm/distributed/utils.py, get_pp_indices)."""

_UNEVEN_STAGES = 3
"""Stages from which on the embedding and the output head of the outer ones weigh more than a layer."""


def with_stages(inputs: PlanInputs, config: ServingConfig, limits: Sequence[int]) -> ServingConfig:
    """Give a configuration the limits of its GPUs, and the layers of each stage.

    Args:
        limits: bytes of each GPU that may be used, in the order of the ranks.

    Raises:
        SettingsError: the user's partition does not suit the model.
    """
    tensor, stages = config.parallelism.tensor, config.parallelism.pipeline
    least = min(limits)
    spare = tuple(min(limits[stage * tensor:(stage + 1) * tensor]) - least for stage in range(stages))
    config = replace(config, limit_bytes=least,
                     parallelism=replace(config.parallelism, spare=spare if any(spare) else ()))
    layers = _users_partition(inputs, stages)
    if not layers and (any(spare) or stages >= _UNEVEN_STAGES):
        layers = balanced_layers(MemoryModel(inputs.shape, config))
    return replace(config, parallelism=replace(config.parallelism, layers=layers)) if layers else config


def environment(config: ServingConfig) -> dict[str, str]:
    """Return the engine's variable of a division by layers that is not vLLM's own."""
    layers = config.parallelism.layers
    return {PARTITION: ",".join(map(str, layers))} if layers else {}


def balanced_layers(model: MemoryModel) -> tuple[int, ...]:
    """Divide the layers in proportion to the memory that each stage has for them and their KV cache.

    Returns () where that is vLLM's own division, or where a stage has no memory for a layer.
    """
    limits, stages = model.config.limits, model.config.parallelism.pipeline
    model = model.with_config(model.config.with_limits(
        max_num_seqs=min(CONTEXT_8K.sequences, limits.max_num_seqs),
        max_num_batched_tokens=min(CONTEXT_8K.tokens, limits.max_num_batched_tokens)))
    first_ranks = model.gpus[::model.config.parallelism.tensor]
    sizes = [gpu.limit_bytes - gpu.embeddings_bytes - gpu.activations_bytes - gpu.framework_bytes
             for gpu in first_ranks]
    if min(sizes) <= 0 or model.shape.layers < stages:
        return ()
    layers = [1] * stages
    for _ in range(model.shape.layers - stages):
        layers[max(range(stages), key=lambda stage: sizes[stage] / (layers[stage] + 1))] += 1
    own = tuple(model.weights.stage_layers(stage) for stage in range(stages))
    return () if tuple(layers) == own else tuple(layers)


def users_layers(inputs: PlanInputs) -> tuple[int, ...]:
    """Return the layers of each stage that the setting or the profile asks for; () without."""
    by_profile = inputs.profile.environment.get(PARTITION, "")
    try:
        return inputs.settings.vllm_pp_layer_partition or (partition(by_profile) if by_profile else ())
    except ValueError as error:
        raise SettingsError(f"Profile {inputs.profile.name}: {PARTITION}: {error}.", "Correct the profile.",
                            code="invalid_partition") from error


def _users_partition(inputs: PlanInputs, stages: int) -> tuple[int, ...]:
    """Read the partition that the user or the profile sets; () without one."""
    layers = users_layers(inputs)
    if layers and (len(layers) != stages or sum(layers) != inputs.shape.layers):
        raise SettingsError(
            f"{PARTITION}={','.join(map(str, layers))}: {len(layers)} stages with {sum(layers)} layers; the plan has "
            f"{stages} and the model {inputs.shape.layers}.",
            f"Unset it, or set --pipeline-parallel-size {len(layers)} in VLLM_EXTRA_ARGS and as many numbers that add "
            f"up to {inputs.shape.layers}.", code="invalid_partition")
    return layers
