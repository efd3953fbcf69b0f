"""Settings, machine, profile and model -> `Plan`, or a `Refusal` that names the smallest change that would fit.

Rules: pure, and made before a byte of weights moves; what is expected stands beside what is decided; a plan that the
estimate says would fail is refused. `decisions` says which source wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shoehorn import auto, speed
from shoehorn.checkpoint import ModelShape
from shoehorn.decisions import Decisions, decide
from shoehorn.errors import DoesNotFitError
from shoehorn.estimate import (
    CONTEXT_BYTES,
    MARGIN_BYTES,
    Choices,
    estimate,
    host_bytes,
    kv_bytes,
    kv_tokens,
    layer_bytes,
    offloaded_bytes,
    pinned_bytes,
)
from shoehorn.hardware import Hardware
from shoehorn.options import Reason
from shoehorn.profiles import Profile
from shoehorn.settings import Settings
from shoehorn.speculation import Draft
from shoehorn.units import GIB, format_size
from shoehorn.vram_parts import VramParts

_LEAST_CONTEXT = 256


ALLOCATOR = "PYTORCH_ALLOC_CONF"


@dataclass(frozen=True)
class Plan:
    """What will be started.

    Attributes:
        engine_args: vLLM's options without dashes in front; model, name and addresses are added when rendering.
        vram: one entry a GPU; none on the CPU.
        host_bytes: host memory that all processes need; host_pinned_bytes: of it, what offload pins;
            offloaded_bytes: the weights that lie there.
        kv_cache_tokens: of all requests together.
        expected_tokens_per_second: `batch_1` and `batch_8`; None where nothing is known.
        disk_bytes: the model's files, and the draft's.
        choices: what the estimate was made of; fixed: the options that the user gave.
        draft: the model that guesses tokens, if one does.
    """

    engine_args: Mapping[str, object]
    engine_environment: Mapping[str, str]
    reasons: tuple[Reason, ...]
    profile: str
    vram: tuple[VramParts, ...]
    host_bytes: int
    host_pinned_bytes: int
    offloaded_bytes: int
    kv_cache_tokens: int
    expected_tokens_per_second: Mapping[str, float | None]
    disk_bytes: int
    choices: Choices = field(repr=False)
    fixed: frozenset[str] = field(repr=False)
    draft: Draft | None = field(repr=False, default=None)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; `fits` is true."""
        return {"fits": True, "profile": self.profile, "engine_args": dict(self.engine_args),
                "engine_environment": dict(self.engine_environment),
                "reasons": [asdict(reason) for reason in self.reasons],
                "vram": [parts.to_json() for parts in self.vram], "host_bytes": self.host_bytes,
                "host_pinned_bytes": self.host_pinned_bytes,
                "offloaded_bytes": self.offloaded_bytes, "kv_cache_tokens": self.kv_cache_tokens,
                "expected_tokens_per_second": dict(self.expected_tokens_per_second), "disk_bytes": self.disk_bytes}


@dataclass(frozen=True)
class Refusal:
    """Why nothing is started.

    Attributes:
        missing: of what there is too little: `vram` (of each GPU), `host_memory` or `disk`.
        remedies: changes each of which would do, the smallest first, as a person would type them.
    """

    cause: str
    missing: str
    missing_bytes: int
    remedies: tuple[str, ...]
    profile: str
    reasons: tuple[Reason, ...] = field(repr=False)
    vram: tuple[VramParts, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; `fits` is false."""
        return {"fits": False, "profile": self.profile, "cause": self.cause, "missing": self.missing,
                "missing_bytes": self.missing_bytes, "remedies": list(self.remedies),
                "reasons": [asdict(reason) for reason in self.reasons],
                "vram": [parts.to_json() for parts in self.vram]}

    def as_error(self) -> DoesNotFitError:
        """The same as an error, whose exit code is 3."""
        return DoesNotFitError(self.cause, "Any one of these would do: " + "; ".join(self.remedies) + "."
                               if len(self.remedies) > 1 else "".join(self.remedies) + ".")


def make_plan(settings: Settings, hardware: Hardware, profile: Profile, shape: ModelShape,
              disk_free_bytes: int | None, stepped: Mapping[str, object] | None = None,
              draft: Draft | None = None) -> Plan | Refusal:
    """Plan a start.

    Args:
        stepped: options that an earlier start had to step down to; only what the user fixed wins over them.
        draft: the model that is to guess tokens.
        hardware: host memory of 0 bytes counts as unknown, and is not checked.
        disk_free_bytes: where the model will be stored; None when it is there already.

    Raises:
        SettingsError: settings that contradict each other, the profile, the model or the machine.
    """
    decisions = decide(settings, hardware, profile, shape, stepped or {}, draft)
    choices, on_cpu = decisions.choices, not decisions.gpus
    vram = () if on_cpu else estimate(shape, choices)
    host = host_bytes(shape, choices, on_cpu)
    reasons = (*decisions.reasons, *_remarks(hardware, profile, shape, decisions, host))

    def refuse(cause: str, missing: str, missing_bytes: int, remedies: list[str]) -> Refusal:
        return Refusal(cause, missing, missing_bytes, tuple(remedies), profile.name, reasons, vram)

    if disk_free_bytes is not None and shape.disk_bytes > disk_free_bytes:
        lacking = shape.disk_bytes - disk_free_bytes
        return refuse(f"The model's files take {format_size(shape.disk_bytes)}, and {settings.models_dir} has "
                      f"{format_size(disk_free_bytes)} free.", "disk", lacking,
                      [f"free {format_size(lacking)} there", "mount a larger volume at MODELS_DIR"])
    short = _short(shape, choices, on_cpu)
    if short > 0 and not on_cpu:
        needed = choices.limit_bytes + short
        return refuse(f"The model needs {format_size(needed)} on each GPU, and may use "
                      f"{format_size(choices.limit_bytes)}: {format_size(short)} are missing. {_largest(vram)}"
                      f"{_neighbours(decisions)}",
                      "vram", short, _vram_remedies(settings, hardware, shape, decisions))
    if short > 0:
        return refuse(f"The KV cache of {format_size(choices.kv_cache_bytes or 0)} is too small for one request of "
                      f"{choices.max_model_len} tokens: {format_size(short)} are missing.", "host_memory", short,
                      _context_remedy(shape, choices, choices.kv_cache_bytes or 0))
    if hardware.host_memory_bytes and host > hardware.host_memory_bytes:
        lacking = host - hardware.host_memory_bytes
        layers = "" if on_cpu else f", {format_size(pinned_bytes(shape, choices))} of it for offloaded layers"
        return refuse(f"The start needs {format_size(host)} of host memory{layers}, and this container has "
                      f"{format_size(hardware.host_memory_bytes)}.", "host_memory", lacking,
                      _host_remedies(shape, choices, lacking, on_cpu))
    cache = choices.kv_cache_bytes or 0 if on_cpu else vram[0].kv_cache_bytes
    return Plan(
        engine_args=decisions.options, engine_environment={**_allocator(decisions), **profile.environment},
        reasons=reasons, profile=profile.name,
        vram=vram, host_bytes=host, host_pinned_bytes=0 if on_cpu else pinned_bytes(shape, choices),
        offloaded_bytes=0 if on_cpu else sum(
            offloaded_bytes(shape, choices, stage) for stage in range(choices.pipeline_parallel)
        ) * choices.tensor_parallel,
        kv_cache_tokens=kv_tokens(shape, choices, cache),
        expected_tokens_per_second={"batch_1": None, "batch_8": None} if on_cpu else
        speed.expected(shape, choices, decisions.gpus[0]),
        disk_bytes=shape.disk_bytes + (draft.shape.disk_bytes if draft else 0),
        choices=choices, fixed=decisions.fixed, draft=draft)


def _allocator(decisions: Decisions) -> dict[str, str]:
    """Settings of PyTorch's allocator: no holes that the KV cache cannot use, and never more than the limit.

    Quantizing and compiling leave blocks behind that are free but held; at the bound the allocator gives them back.
    Source: measured, see docs/estimator.md.
    """
    if not decisions.gpus:
        return {}
    bound = decisions.choices.limit_bytes - CONTEXT_BYTES
    share = math.floor(bound / max(gpu.total_bytes for gpu in decisions.gpus) * 10_000) / 10_000
    return {ALLOCATOR: f"expandable_segments:True,per_process_memory_fraction:{min(1.0, share)}"}


def _largest(vram: tuple[VramParts, ...]) -> str:
    """The two largest parts of the fullest GPU, which say where a change would help."""
    fullest = max(vram, key=lambda parts: parts.total_bytes - parts.kv_cache_bytes)
    sizes = {key: size for key, size in fullest.to_json().items() if key not in ("total_bytes", "limit_bytes")}
    first, second = sorted(sizes, key=lambda key: -sizes[key])[:2]
    return "The largest parts are " + " and ".join(
        f"{key.removesuffix('_bytes').replace('_', ' ')} ({format_size(sizes[key])})" for key in (first, second)) + "."


def _neighbours(decisions: Decisions) -> str:
    """What other processes hold of the cards, where that is much."""
    held = max(gpu.total_bytes - gpu.free_bytes for gpu in decisions.gpus)
    if held < GIB // 2:
        return ""
    return f" Other processes hold {format_size(held)} of the card (`nvidia-smi` names them): end them."


def _short(shape: ModelShape, choices: Choices, on_cpu: bool = False) -> int:
    """Bytes that the fullest GPU lacks, or on the CPU the KV cache; negative where there is more than enough."""
    if on_cpu:
        return kv_bytes(shape, choices) - (choices.kv_cache_bytes or 0)
    return auto.missing_bytes(shape, choices)


def _vram_remedies(settings: Settings, hardware: Hardware, shape: ModelShape, decisions: Decisions) -> list[str]:
    """Changes each of which would let the model fit, the least felt first; a larger card always would."""
    choices, remedies = decisions.choices, []

    def fits(changed: Choices) -> bool:
        host = host_bytes(shape, changed)
        return _short(shape, changed) <= 0 and (not hardware.host_memory_bytes or host <= hardware.host_memory_bytes)

    if fits(replace(choices, eager=True)):
        remedies.append("VLLM_EXTRA_ARGS='--enforce-eager'")
    smaller = replace(choices, max_num_batched_tokens=min(512, choices.max_num_batched_tokens),
                      max_num_seqs=min(8, choices.max_num_seqs))
    if fits(smaller):
        remedies.append(f"MAX_NUM_SEQS={smaller.max_num_seqs} with VLLM_EXTRA_ARGS="
                        f"'--max-num-batched-tokens {smaller.max_num_batched_tokens}'")
    room = min(choices.limit_bytes - MARGIN_BYTES - parts.total_bytes + parts.kv_cache_bytes
               for parts in estimate(shape, choices))
    remedies += _context_remedy(shape, choices, room)
    short = _short(shape, choices)
    resident = replace(choices, offload_bytes=0, prefetch=(0, 0, 0), embedding_on_host=False)
    more = math.ceil(_short(shape, resident) / GIB * 10) / 10
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


def _context_remedy(shape: ModelShape, choices: Choices, room_bytes: int) -> list[str]:
    """The longest context, of those worth having, whose single request fits into that much KV cache."""
    for tokens in range(choices.max_model_len // _LEAST_CONTEXT * _LEAST_CONTEXT, 0, -_LEAST_CONTEXT):
        if tokens < choices.max_model_len and kv_bytes(shape, replace(choices, max_model_len=tokens)) <= room_bytes:
            return [f"MAX_MODEL_LEN={tokens}"]
    return []


def _host_remedies(shape: ModelShape, choices: Choices, lacking: int, on_cpu: bool) -> list[str]:
    remedies = [f"give the container {format_size(lacking)} more memory"]
    if on_cpu and not choices.quantization and not shape.quantization and shape.understood:
        if lacking <= host_bytes(shape, choices, True) - host_bytes(
                shape, replace(choices, quantization="bitsandbytes"), True):
            remedies.append("QUANTIZATION=bitsandbytes")
    elif not on_cpu:
        less = offloaded_bytes(shape, choices) - lacking
        remedies.append(f"a GPU with {format_size(offloaded_bytes(shape, choices) - max(0, less))} more")
    return [*remedies, "a smaller model"]


def _remarks(hardware: Hardware, profile: Profile, shape: ModelShape, decisions: Decisions, host: int) -> list[Reason]:
    """What a person should know besides the options."""
    remarks = [Reason("profile", profile.name, "profile", note) for note in profile.notes]
    remarks += [Reason("model", shape.architecture, "model", note) for note in shape.notes]
    if not hardware.host_memory_bytes:
        remarks.append(Reason("host-memory", format_size(host), "machine",
                              "unknown, so it is not checked that there is this much"))
    elif host > hardware.host_available_bytes:
        remarks.append(Reason("host-memory", format_size(host), "machine",
                              f"at this moment only {format_size(hardware.host_available_bytes)} are free"))
    if not decisions.gpus:
        remarks.append(Reason("speed", None, "machine", "no expectation: nothing is known of this processor"))
        return remarks
    gpu = decisions.gpus[0]
    if len({each.name for each in decisions.gpus}) > 1:
        remarks.append(Reason("gpus", len(decisions.gpus), "machine", "unequal cards: all run as the smallest"))
    if offloaded_bytes(shape, decisions.choices):
        link, known = speed.link_bytes_per_second(gpu)
        remarks.append(Reason("host-to-device", f"{link / 1e9:.3g} GB/s", "machine", "pinned memory over " + (
            f"PCIe {gpu.pcie_generation} with {gpu.pcie_width} lanes" if known else
            "an unknown link; PCIe 4 with 16 lanes is assumed")))
    if speed.device_bytes_per_second(gpu.name) is None:
        remarks.append(Reason("device-memory", None, "machine",
                              f"nothing is known of the speed of {gpu.name or 'this card'}"))
    return remarks
