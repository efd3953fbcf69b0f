"""Profile, settings, model and machine -> the engine's options, each with the one reason that decided it.

Rules:
- VLLM_EXTRA_ARGS wins over the settings, a setting over the profile, the profile over what is worked out here;
- worked out is what the others leave open, and what they cannot have: a profile's context beyond the model's, more of
  the card than there is, more offload than the model needs;
- two settings that contradict each other, or the model, are a `SettingsError` that names both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from shoehorn import engine_options
from shoehorn.checkpoint import ModelShape
from shoehorn.errors import SettingsError
from shoehorn.estimate import CONTEXT_BYTES, Choices, estimate, kv_bytes, layer_bytes
from shoehorn.hardware import Gpu, Hardware
from shoehorn.profiles import Profile, require_gpus
from shoehorn.settings import Settings
from shoehorn.units import GIB, format_size

NGRAM = {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4, "prompt_lookup_min": 2}

_ENGINE_DEFAULTS: Mapping[str, object] = {"max-num-seqs": 256, "max-num-batched-tokens": 8192, "block-size": 16,
                                          "enforce-eager": False}
_UNMODELLED = ("pipeline-parallel-size", "data-parallel-size", "enable-lora", "compilation-config", "spec-model",
               "kv-offloading-size", "attention-backend")
_CPU_KV_CACHE_BYTES = GIB


@dataclass(frozen=True)
class Reason:
    """Why an option has its value; `source` is `setting`, `profile`, `model` or `machine`."""

    option: str
    value: object
    source: str
    text: str


@dataclass(frozen=True)
class Decisions:
    """The engine's options and what they mean for memory. `gpus` are those in use; none on the CPU."""

    options: Mapping[str, object]
    reasons: tuple[Reason, ...]
    choices: Choices
    gpus: tuple[Gpu, ...]


class _Draft:
    """Options under construction; the last reason of an option stands."""

    def __init__(self) -> None:
        self.options: dict[str, object] = {}
        self.reasons: dict[str, Reason] = {}
        self.fixed: set[str] = set()

    def set(self, option: str, value: object, source: str, text: str) -> None:
        self.options[option] = value
        self.reasons[option] = Reason(option, value, source, text)

    def drop(self, option: str, source: str, text: str) -> None:
        before = self.options.pop(option, None)
        self.reasons[option] = Reason(option, None, source, text + (f" instead of {before}" if before else ""))

    def number(self, option: str, default: float = 0) -> float:
        value = self.options.get(option, default)
        return value if isinstance(value, int | float) else default

    def whole(self, option: str, default: int = 0) -> int:
        return int(self.number(option, default))


def decide(settings: Settings, hardware: Hardware, profile: Profile, shape: ModelShape) -> Decisions:
    """Everything that can be decided without asking whether it fits.

    Raises:
        SettingsError: settings that contradict each other, the profile, the model or the machine.
    """
    draft = _Draft()
    for option, value in profile.engine.items():
        draft.set(option, value, "profile", profile.name)
    _apply_settings(draft, settings)
    for option, value in engine_options.parse_arguments(settings.vllm_extra_args).items():
        before, instead = draft.reasons.get(option), ""
        if before and before.value != value:
            instead = f" instead of {before.value} ({before.source} {before.text})"
        draft.set(option, value, "setting", f"VLLM_EXTRA_ARGS{instead}")
        draft.fixed.add(option)
    _quantization(draft, settings, shape)
    _context(draft, settings, shape)
    for option, value in _ENGINE_DEFAULTS.items():
        if option not in draft.options:
            draft.set(option, value, "machine", "left open; fixed, because the engine's default depends on the card")
    if draft.whole("max-num-batched-tokens") < draft.whole("max-num-seqs"):
        draft.set("max-num-batched-tokens", draft.whole("max-num-seqs"), "machine", "at least one token a sequence")
    for option in _UNMODELLED:
        if draft.options.get(option) not in (None, False, 1):
            _note(draft, option, "its memory is not estimated")
    on_cpu = profile.match.device == "cpu"
    if on_cpu and settings.vram_limit:
        raise SettingsError(f"VRAM_LIMIT is set, but profile {profile.name} uses no GPU.",
                            "Unset VRAM_LIMIT, or choose another VRAM_PROFILE.")
    if on_cpu and "kv-cache-memory-bytes" not in draft.options:
        draft.set("kv-cache-memory-bytes", _CPU_KV_CACHE_BYTES, "machine", "left open")
    gpus = () if on_cpu else _gpus(draft, hardware, profile, shape)
    limit = hardware.host_memory_bytes if on_cpu else _limit(draft, settings, gpus)
    choices = _choices(draft, shape, limit)
    if gpus:
        choices = _least_offload(draft, shape, choices)
    return Decisions(draft.options, tuple(draft.reasons.values()), choices, gpus)


def _apply_settings(draft: _Draft, settings: Settings) -> None:
    for setting, option in (("MAX_MODEL_LEN", "max-model-len"), ("MAX_NUM_SEQS", "max-num-seqs")):
        value = getattr(settings, setting.lower())
        if value is not None:
            draft.set(option, value, "setting", setting)
    if settings.speculative == "ngram":
        draft.set("speculative-config", dict(NGRAM), "setting", "SPECULATIVE=ngram")
    if settings.trust_remote_code:
        draft.set("trust-remote-code", True, "setting", "TRUST_REMOTE_CODE")


def _quantization(draft: _Draft, settings: Settings, shape: ModelShape) -> None:
    """The setting, VLLM_EXTRA_ARGS or the profile against what the checkpoint is."""
    is_setting = settings.quantization != "auto" and "quantization" not in draft.fixed
    if is_setting and settings.quantization == "none":
        draft.drop("quantization", "setting", "QUANTIZATION=none")
    elif is_setting:
        draft.set("quantization", settings.quantization, "setting", f"QUANTIZATION={settings.quantization}")
    if shape.quantization in (None, "bitsandbytes") or draft.options.get("quantization") != "bitsandbytes":
        return
    reason = draft.reasons["quantization"]
    if reason.source == "setting":
        raise SettingsError(f"{reason.text.split(' ')[0]} asks for bitsandbytes, but the checkpoint is quantized "
                            f"already, by {shape.quantization}.",
                            "Set QUANTIZATION=auto, or choose the model's unquantized checkpoint.")
    draft.drop("quantization", "model", f"the checkpoint is quantized already, by {shape.quantization}")


def _context(draft: _Draft, settings: Settings, shape: ModelShape) -> None:
    longest = shape.max_position
    if "max-model-len" not in draft.options:
        draft.set("max-model-len", longest, "model", "left open: the model's own limit")
        return
    wanted, reason = draft.whole("max-model-len"), draft.reasons["max-model-len"]
    if wanted <= longest:
        return
    if reason.source == "profile":
        draft.set("max-model-len", longest, "model", f"the model's own limit; profile has {wanted}")
        return
    raise SettingsError(f"{reason.text.split(' ')[0]} asks for a context of {wanted} tokens, but the model's limit is "
                        f"{longest}.", f"Set MAX_MODEL_LEN to {longest} or less.")


def _gpus(draft: _Draft, hardware: Hardware, profile: Profile, shape: ModelShape) -> tuple[Gpu, ...]:
    """The GPUs that the options use, checked against machine and model."""
    parallel = draft.whole("tensor-parallel-size", 1)
    count = parallel * draft.whole("pipeline-parallel-size", 1)
    if count < 1:
        raise SettingsError("The number of GPUs to divide the model over is less than one.",
                            "Correct tensor-parallel-size or pipeline-parallel-size.")
    gpus = require_gpus(hardware, profile.name, count)[:count]
    if any(gpu.mig for gpu in gpus):
        raise SettingsError("The GPU is divided by MIG, and the size of a slice is not understood.",
                            "Pass a whole GPU in, or switch MIG off on the host: nvidia-smi -mig 0")
    if parallel > 1 and shape.heads % parallel:
        raise SettingsError(f"The model's {shape.heads} attention heads cannot be divided over {parallel} GPUs.",
                            "Set VRAM_PROFILE or --tensor-parallel-size in VLLM_EXTRA_ARGS to a number that divides "
                            "them.")
    if parallel > 1 and shape.quantization == "bitsandbytes":
        raise SettingsError(
            f"The checkpoint is quantized by bitsandbytes, and such a one cannot be divided over {parallel} GPUs.",
            "Choose the model's unquantized checkpoint, or set VLLM_EXTRA_ARGS='--tensor-parallel-size 1 "
            f"--pipeline-parallel-size {parallel}'.")
    return gpus


def _limit(draft: _Draft, settings: Settings, gpus: tuple[Gpu, ...]) -> int:
    """What may be used of each card, as NVML counts; sets gpu-memory-utilization to it where that asks for more.

    vLLM counts from after the CUDA context was made, so the context comes on top of its share.
    """
    total, free = min(gpu.total_bytes for gpu in gpus), min(gpu.free_bytes for gpu in gpus)
    share = draft.number("gpu-memory-utilization", 0.92)
    wanted = math.ceil(total * share) + CONTEXT_BYTES
    caps = [(free, "machine", f"{format_size(free)} of the card are free")]
    if settings.vram_limit:
        caps.append((settings.vram_limit, "setting", f"VRAM_LIMIT is {format_size(settings.vram_limit)}"))
    cap, source, why = min(caps)
    if "gpu-memory-utilization" in draft.fixed:
        if wanted > cap:
            _note(draft, "gpu-memory-utilization", f"although {why}")
        return wanted
    if wanted <= cap and "gpu-memory-utilization" in draft.options:
        return wanted
    lowered = math.floor(min(share, max(0.0, (cap - CONTEXT_BYTES) / total)) * 10_000) / 10_000
    draft.set("gpu-memory-utilization", lowered, source,
              f"{why}, of which the CUDA context takes {format_size(CONTEXT_BYTES)} that vLLM does not count")
    return math.ceil(total * lowered) + CONTEXT_BYTES


def _choices(draft: _Draft, shape: ModelShape, limit_bytes: int) -> Choices:
    width = 4 if draft.options.get("dtype") in ("float32", "float") else 2
    kv_dtype = str(draft.options.get("kv-cache-dtype", "auto"))
    nf4 = "bitsandbytes" in (draft.options.get("quantization"), shape.quantization)
    group = draft.whole("offload-group-size")
    return Choices(
        limit_bytes=limit_bytes, max_model_len=draft.whole("max-model-len"), max_num_seqs=draft.whole("max-num-seqs"),
        max_num_batched_tokens=draft.whole("max-num-batched-tokens"),
        quantization="bitsandbytes" if nf4 else None,
        tensor_parallel=draft.whole("tensor-parallel-size", 1),
        offload_bytes=0 if group else round(draft.number("cpu-offload-gb") * GIB),
        prefetch=(group, draft.whole("offload-num-in-group", 1), draft.whole("offload-prefetch-step", 1))
        if group else (0, 0, 0),
        dtype_bytes=width, kv_dtype_bytes=width if kv_dtype in ("auto", "bfloat16", "float16") else 1,
        block_size=draft.whole("block-size"), eager=bool(draft.options.get("enforce-eager")),
        kv_cache_bytes=draft.whole("kv-cache-memory-bytes") or None)


def _least_offload(draft: _Draft, shape: ModelShape, choices: Choices) -> Choices:
    """Take no more of a profile's offload than leaves room for two requests of full length."""
    most = choices.offload_bytes
    if not most or "cpu-offload-gb" in draft.fixed:
        return choices
    resident = estimate(shape, replace(choices, offload_bytes=0))
    room = choices.kv_cache_bytes or kv_bytes(shape, choices, 2 * choices.max_model_len)
    needed = resident.total_bytes - resident.kv_cache_bytes + room - choices.limit_bytes
    if needed <= 0:
        draft.set("cpu-offload-gb", 0, "model", "everything fits on the card, and there it is many times faster")
        return replace(choices, offload_bytes=0)
    if needed >= min(most, layer_bytes(shape, choices)[0]):
        return choices
    gib = math.ceil(needed / GIB * 10) / 10
    draft.set("cpu-offload-gb", gib, "model",
              f"leaves room for two requests of {choices.max_model_len} tokens; the profile has {most / GIB:g}")
    return replace(choices, offload_bytes=round(gib * GIB))


def _note(draft: _Draft, option: str, text: str) -> None:
    reason = draft.reasons[option]
    draft.reasons[option] = replace(reason, text=f"{reason.text}; {text}")
