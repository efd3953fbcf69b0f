"""Remedies of a refusal: the smallest changes that would make the model fit."""

from __future__ import annotations

import math
from dataclasses import replace

from shoehorn.common.units import GIB, format_size
from shoehorn.hardware.types import Hardware
from shoehorn.model.shape import ModelShape
from shoehorn.planner.inputs import PlanSettings
from shoehorn.planner.memory import fit
from shoehorn.planner.memory.breakdown import VramParts
from shoehorn.planner.memory.estimate import CONTEXT_BYTES, MARGIN_BYTES, estimate, host_bytes, kv_bytes
from shoehorn.planner.memory.offload import offloaded_bytes
from shoehorn.planner.memory.weights import layer_bytes
from shoehorn.planner.resolve import Decisions
from shoehorn.planner.serving_config import Choices

_LEAST_CONTEXT = 256


def largest(vram: tuple[VramParts, ...]) -> str:
    """The two largest parts of the fullest GPU, which say where a change would help."""
    fullest = max(vram, key=lambda parts: parts.total_bytes - parts.kv_cache_bytes)
    sizes = {key: size for key, size in fullest.to_json().items() if key not in ("total_bytes", "limit_bytes")}
    first, second = sorted(sizes, key=lambda key: -sizes[key])[:2]
    return "The largest parts are " + " and ".join(
        f"{key.removesuffix('_bytes').replace('_', ' ')} ({format_size(sizes[key])})" for key in (first, second)) + "."


def neighbours(decisions: Decisions) -> str:
    """What other processes hold of the cards, where that is much."""
    held = max(gpu.total_bytes - gpu.free_bytes for gpu in decisions.gpus)
    if held < GIB // 2:
        return ""
    return f" Other processes hold {format_size(held)} of the card (`nvidia-smi` names them): end them."


def missing_on_fullest(shape: ModelShape, choices: Choices, on_cpu: bool = False) -> int:
    """Bytes that the fullest GPU lacks, or on the CPU the KV cache; negative where there is more than enough."""
    if on_cpu:
        return kv_bytes(shape, choices) - (choices.kv_cache_bytes or 0)
    return fit.missing_bytes(shape, choices)


def vram_remedies(settings: PlanSettings, hardware: Hardware, shape: ModelShape, decisions: Decisions) -> list[str]:
    """Changes each of which would let the model fit, the least felt first; a larger card always would."""
    choices, remedies = decisions.choices, []

    def fits(changed: Choices) -> bool:
        host = host_bytes(shape, changed)
        return missing_on_fullest(shape, changed) <= 0 and (
            not hardware.host_memory_bytes or host <= hardware.host_memory_bytes)

    if fits(replace(choices, eager=True)):
        remedies.append("VLLM_EXTRA_ARGS='--enforce-eager'")
    smaller = replace(choices, max_num_batched_tokens=min(512, choices.max_num_batched_tokens),
                      max_num_seqs=min(8, choices.max_num_seqs))
    if fits(smaller):
        remedies.append(f"MAX_NUM_SEQS={smaller.max_num_seqs} with VLLM_EXTRA_ARGS="
                        f"'--max-num-batched-tokens {smaller.max_num_batched_tokens}'")
    room = min(choices.limit_bytes - MARGIN_BYTES - parts.total_bytes + parts.kv_cache_bytes
               for parts in estimate(shape, choices))
    remedies += context_remedy(shape, choices, room)
    short = missing_on_fullest(shape, choices)
    resident = replace(choices, offload_bytes=0, prefetch=(0, 0, 0), embedding_on_host=False)
    more = math.ceil(missing_on_fullest(shape, resident) / GIB * 10) / 10
    if "offload-group-size" not in decisions.fixed and more * GIB <= layer_bytes(shape, resident)[0] and fits(
            replace(resident, offload_bytes=round(more * GIB))):
        remedies.append(f"VLLM_EXTRA_ARGS='--cpu-offload-gb {more}'")
    quantized = replace(choices, quantization="bitsandbytes")
    if not shape.quantization and not choices.quantization and shape.understood and fits(quantized):
        remedies.append("QUANTIZATION=bitsandbytes")
    needed = choices.limit_bytes + short
    if needed <= min(gpu.free_bytes for gpu in decisions.gpus):
        share = math.ceil((needed - CONTEXT_BYTES) / min(gpu.total_bytes for gpu in decisions.gpus) * 1000) / 1000
        remedies.append(f"VRAM_LIMIT={math.ceil(needed / GIB * 10) / 10}GiB" if settings.vram_limit else
                        f"VLLM_EXTRA_ARGS='--gpu-memory-utilization {share}'")
    else:
        asked = decisions.options.get("gpu-memory-utilization")
        card = max(needed, (needed - CONTEXT_BYTES) / (asked if isinstance(asked, float) and asked > 0.5 else 0.92))
        many = "a GPU" if len(decisions.gpus) == 1 else f"{len(decisions.gpus)} GPUs"
        remedies.append(f"{many} with {math.ceil(card / GIB * 10) / 10} GiB or more")
    return [*remedies, "a smaller model"]


def context_remedy(shape: ModelShape, choices: Choices, room_bytes: int) -> list[str]:
    """The longest context, of those worth having, whose single request fits into that much KV cache."""
    for tokens in range(choices.max_model_len // _LEAST_CONTEXT * _LEAST_CONTEXT, 0, -_LEAST_CONTEXT):
        if tokens < choices.max_model_len and kv_bytes(shape, replace(choices, max_model_len=tokens)) <= room_bytes:
            return [f"MAX_MODEL_LEN={tokens}"]
    return []


def host_remedies(shape: ModelShape, choices: Choices, lacking: int, on_cpu: bool) -> list[str]:
    remedies = [f"give the container {format_size(lacking)} more memory"]
    if on_cpu and not choices.quantization and not shape.quantization and shape.understood:
        if lacking <= host_bytes(shape, choices, True) - host_bytes(
                shape, replace(choices, quantization="bitsandbytes"), True):
            remedies.append("QUANTIZATION=bitsandbytes")
    elif not on_cpu:
        less = offloaded_bytes(shape, choices) - lacking
        remedies.append(f"a GPU with {format_size(offloaded_bytes(shape, choices) - max(0, less))} more")
    return [*remedies, "a smaller model"]
