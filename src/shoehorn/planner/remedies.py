"""Remedies of a refusal: the smallest changes that would make the model fit, one function for each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from shoehorn.common.units import GIB
from shoehorn.hardware.types import Gpu
from shoehorn.planner import gpu_share
from shoehorn.planner.assembly import Assembly
from shoehorn.planner.memory.model import CONTEXT_BYTES, MARGIN_BYTES, MemoryModel
from shoehorn.planner.refusal_texts import Remedy
from shoehorn.planner.serving_config import NoOffload, ServingConfig, UvaOffload

_CONTEXT_STEP = 256
_SMALLER_MODEL = Remedy("smaller-model")


@dataclass(frozen=True)
class Shortage:
    """A configuration that does not fit on the GPUs.

    Attributes:
        vram_limit: the setting; None where it is not set.
    """

    model: MemoryModel
    gpus: tuple[Gpu, ...]
    options: dict[str, object]
    fixed: frozenset[str]
    vram_limit: int | None
    host_memory_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Memory of each GPU that would be enough."""
        return self.model.config.limit_bytes + self.model.missing_bytes()

    def fits(self, config: ServingConfig) -> bool:
        """Return whether a changed configuration fits on GPUs and host."""
        model = self.model.with_config(config)
        return model.missing_bytes() <= 0 and (
            not self.host_memory_bytes or model.host_beside_gpus().total_bytes <= self.host_memory_bytes)


def on_gpus(assembly: Assembly, gpus: tuple[Gpu, ...]) -> list[Remedy]:
    """List remedies for too little GPU memory, those that change the least first; a larger GPU is always one."""
    inputs = assembly.inputs
    shortage = Shortage(assembly.model, gpus, dict(assembly.options.values), assembly.by_user,
                        inputs.settings.vram_limit, inputs.hardware.host_memory_bytes)
    remedies = (eager(shortage), smaller_batch(shortage), text_only(shortage), *shorter_context_on_gpus(shortage),
                more_offload(shortage), nf4(shortage), larger_share(shortage) or larger_gpu(shortage), _SMALLER_MODEL)
    return [remedy for remedy in remedies if remedy]


def eager(shortage: Shortage) -> Remedy | None:
    """Run without CUDA graphs."""
    fits = shortage.fits(replace(shortage.model.config, eager=True))
    return _set(VLLM_EXTRA_ARGS="--enforce-eager") if fits else None


def text_only(shortage: Shortage) -> Remedy | None:
    """Serve a multimodal model without images, videos and sound, whose encoders are then not loaded."""
    config = shortage.model.config
    if not shortage.model.shape.encoders or config.items.text_only:
        return None
    fits = shortage.fits(replace(config, items=replace(config.items, text_only=True)))
    return _set(VLLM_EXTRA_ARGS="--language-model-only") if fits else None


def smaller_batch(shortage: Shortage) -> Remedy | None:
    """Run fewer sequences and fewer tokens at a time."""
    limits = shortage.model.config.limits
    sequences, tokens = min(8, limits.max_num_seqs), min(512, limits.max_num_batched_tokens)
    if not shortage.fits(shortage.model.config.with_limits(max_num_seqs=sequences, max_num_batched_tokens=tokens)):
        return None
    return _set(MAX_NUM_SEQS=str(sequences), VLLM_EXTRA_ARGS=f"--max-num-batched-tokens {tokens}")


def shorter_context_on_gpus(shortage: Shortage) -> list[Remedy]:
    """Serve the longest context that fits next to the other parts."""
    free = min(gpu.limit_bytes - MARGIN_BYTES - gpu.total_bytes + gpu.kv_cache_bytes for gpu in shortage.model.gpus)
    return shorter_context(shortage.model, free)


def shorter_context(model: MemoryModel, cache_bytes: int) -> list[Remedy]:
    """Serve the longest context of which one request fits into a KV cache of that size."""
    longest = model.config.limits.max_model_len
    for tokens in range(longest // _CONTEXT_STEP * _CONTEXT_STEP, 0, -_CONTEXT_STEP):
        if tokens < longest and model.with_config(
                model.config.with_limits(max_model_len=tokens)).kv_bytes() <= cache_bytes:
            return [_set(MAX_MODEL_LEN=str(tokens))]
    return []


def more_offload(shortage: Shortage) -> Remedy | None:
    """Offload more layers by UVA, in whole tenths of a GiB."""
    if "offload-group-size" in shortage.fixed:
        return None
    resident = shortage.model.with_config(
        replace(shortage.model.config, offload=NoOffload(), embedding_on_host=False))
    size = _tenths(resident.missing_bytes())
    fits = size * GIB <= resident.weights.layers_bytes and shortage.fits(
        replace(resident.config, offload=UvaOffload(round(size * GIB))))
    return _set(VLLM_EXTRA_ARGS=f"--cpu-offload-gb {size}") if fits else None


def nf4(shortage: Shortage) -> Remedy | None:
    """Quantize to NF4 while loading."""
    shape, config = shortage.model.shape, shortage.model.config
    possible = not shape.quantization and not config.nf4 and shape.plain
    return _set(QUANTIZATION="bitsandbytes") if possible and shortage.fits(replace(config, nf4=True)) else None


def larger_share(shortage: Shortage) -> Remedy | None:
    """Use more of the GPU, where enough of it is free."""
    needed = shortage.needed_bytes
    if needed > min(gpu.free_bytes for gpu in shortage.gpus):
        return None
    if shortage.vram_limit:
        return _set(VRAM_LIMIT=f"{_tenths(needed)}GiB")
    share = math.ceil((needed - CONTEXT_BYTES) / min(gpu.total_bytes for gpu in shortage.gpus) * 1000) / 1000
    return _set(VLLM_EXTRA_ARGS=f"--{gpu_share.OPTION} {share}")


def larger_gpu(shortage: Shortage) -> Remedy:
    """Use a GPU with more memory, at the share that the plan may use of it."""
    needed, share = shortage.needed_bytes, shortage.options.get(gpu_share.OPTION)
    share = share if isinstance(share, float) and share > 0.5 else gpu_share.DEFAULT_SHARE
    size = max(needed, (needed - CONTEXT_BYTES) / share)
    return Remedy("larger-gpu", {"count": len(shortage.gpus), "gib": _tenths(size)})


def on_gpus_host(model: MemoryModel, missing_bytes: int) -> list[Remedy]:
    """List remedies for too little host memory while the model runs on GPUs."""
    offloaded = model.offloaded.stage_bytes(0)
    without = model.with_config(replace(model.config, items=replace(model.config.items, text_only=True)))
    freed = model.weights.other_bytes - without.weights.other_bytes + \
        model.activations.bytes(0) - without.activations.bytes(0)
    text = [_set(VLLM_EXTRA_ARGS="--language-model-only")] if 0 < missing_bytes <= min(freed, offloaded) else []
    return [*text, Remedy("more-host-memory", missing_bytes), Remedy("more-gpu-memory", min(offloaded, missing_bytes)),
            _SMALLER_MODEL]


def on_cpu_host(model: MemoryModel, missing_bytes: int) -> list[Remedy]:
    """List remedies for too little host memory on the CPU."""
    remedies, quantized = [Remedy("more-host-memory", missing_bytes)], model.with_config(
        replace(model.config, nf4=True))
    if not model.config.nf4 and not model.shape.quantization and model.shape.plain and \
            missing_bytes <= model.host_alone().total_bytes - quantized.host_alone().total_bytes:
        remedies.append(_set(QUANTIZATION="bitsandbytes"))
    return [*remedies, _SMALLER_MODEL]


def _set(**settings: str) -> Remedy:
    return Remedy("set", settings)


def _tenths(size: float) -> float:
    """Convert bytes to GiB, rounded up to a tenth."""
    return math.ceil(size / GIB * 10) / 10
