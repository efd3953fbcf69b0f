"""Profile, settings, model and machine -> the engine's options, each with the one reason that decided it.

Rules:
- VLLM_EXTRA_ARGS wins over the settings, a setting over the profile, the profile over `auto`;
- `auto` fills what the others leave open; what they cannot have is taken back: a context beyond the model's, more of
  the card than there is, more offload than the model needs, a number format that the card lacks;
- two settings that contradict each other, or the model, are a `SettingsError` that names both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import GIB, format_size
from shoehorn.config import vllm_options
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.model.shape import ModelShape
from shoehorn.planner import dtype, parallelism, placement, search, serving_config, speculation, vllm_args
from shoehorn.planner.inputs import Draft, PlanInputs, PlanSettings
from shoehorn.planner.memory import fit
from shoehorn.planner.memory.estimate import CONTEXT_BYTES, MARGIN_BYTES, estimate
from shoehorn.planner.memory.offload import offloaded_bytes
from shoehorn.planner.option_set import Options, Reason
from shoehorn.planner.reasons import why
from shoehorn.planner.serving_config import Choices
from shoehorn.planner.vllm_args import FIELDS, config_of

_UNMODELLED = ("data-parallel-size", "enable-lora", "compilation-config", "spec-model", "kv-offloading-size",
               "attention-backend")

_CPU_KV_CACHE_BYTES = GIB
_WHOLE_SHARE = 0.97
"""Of a card, where the usual 0.92 would mean offload: what the CUDA context and the plan's margin leave of 20 GiB."""


@dataclass(frozen=True)
class Decisions:
    """The engine's options and what they mean for memory. `gpus` are those in use; none on the CPU."""

    options: Mapping[str, object]
    reasons: tuple[Reason, ...]
    choices: Choices
    gpus: tuple[Gpu, ...]
    fixed: frozenset[str]


def decide(inputs: PlanInputs) -> Decisions:
    """Every decision; that it fits is another question.

    Raises:
        SettingsError: settings that contradict each other, the profile, the model or the machine.
    """
    settings, hardware, profile, shape = inputs.settings, inputs.hardware, inputs.profile, inputs.shape
    draft = inputs.draft
    if shape.unreadable:
        raise SettingsError(f"{settings.model_id} is {shape.unreadable}, which vLLM 0.32 no longer reads.",
                            "Set MODEL_ID to a version of the model without activation order (AWQ, GPTQ with desc_act: "
                            "false, W4A16 with actorder: null or weight), or to the unquantized one with "
                            "QUANTIZATION=bitsandbytes.")
    options = Options()
    for option, value in profile.engine.items():
        options.set(option, value, "profile", profile.name)
    _apply_settings(options, settings)
    for option, value in vllm_options.parse_arguments(settings.vllm_extra_args).items():
        options.fix(option, value, "VLLM_EXTRA_ARGS")
    by_user = frozenset(options.fixed)
    for option, value in inputs.known_good.items():
        if option in by_user:
            continue
        if value is None:
            options.drop(option, "step-down", "the engine did not start with it here")
        else:
            options.set(option, value, "step-down", "what the engine needed to start here")
        options.fixed.add(option)
    _quantization(options, settings, shape)
    _context(options, shape)
    if draft:
        speculation.apply_draft(options, draft)
    for option in _UNMODELLED:
        if options.values.get(option) not in (None, False, 1):
            options.note(option, "its memory is not estimated")
    on_cpu = profile.match.device == "cpu"
    if on_cpu and settings.vram_limit:
        raise SettingsError(f"VRAM_LIMIT is set, but profile {profile.name} uses no GPU.",
                            "Unset VRAM_LIMIT, or choose another VRAM_PROFILE.")
    if on_cpu and shape.packed_embedding:
        raise SettingsError("The checkpoint's embedding is quantized, and on a CPU the engine fails at the first "
                            "request to such a model.", "Choose another checkpoint; for one that was converted "
                            "here, type `shoehorn models rm NAME.int4`, and start again.")
    if on_cpu and shape.experts and shape.quantization not in (None, "bitsandbytes") and not hardware.amx:
        raise SettingsError("The model's experts are quantized, and for those the engine needs AMX, which this "
                            "processor lacks.", "Set QUANTIZATION=none, or choose the model's unquantized checkpoint.")
    if on_cpu and "kv-cache-memory-bytes" not in options.values:
        options.set("kv-cache-memory-bytes", _CPU_KV_CACHE_BYTES, "machine", "left open")
    gpus = () if on_cpu else parallelism.gpus(options, hardware, profile, shape)
    if gpus:
        dtype.apply(options, gpus, shape)
    whole = deepcopy(options)
    limit = hardware.host_memory_bytes if on_cpu else _limit(options, settings, gpus)
    choices = _fill(options, hardware, shape, limit, bool(gpus), draft)
    if gpus and offloaded_bytes(shape, choices) and "gpu-memory-utilization" not in whole.values:
        whole.set("gpu-memory-utilization", _WHOLE_SHARE, "machine", "with less, weights would lie in host memory")
        resident = _fill(whole, hardware, shape, _limit(whole, settings, gpus), True, draft)
        if not offloaded_bytes(shape, resident) and fit.missing_bytes(shape, resident) <= 0:
            options, choices = whole, resident
    if gpus:
        _cache(options, shape, choices, by_user)
    if draft and not draft.shape.quantization and choices.quantization == "bitsandbytes":
        speculation.load_as_nf4(options, draft)
    least = choices.max_num_seqs * (2 if draft else 1)  # a draft takes a place of its own
    if choices.max_num_batched_tokens < least:
        choices = replace(choices, max_num_batched_tokens=least)
        options.set("max-num-batched-tokens", least, "machine", "at least one token a sequence")
    return Decisions(options.values, tuple(options.reasons.values()), choices, gpus, by_user)


def _apply_settings(options: Options, settings: PlanSettings) -> None:
    for setting, option in (("MAX_MODEL_LEN", "max-model-len"), ("MAX_NUM_SEQS", "max-num-seqs")):
        value = getattr(settings, setting.lower())
        if value is not None:
            options.fix(option, value, setting)
    speculation.apply(options, settings)
    if settings.trust_remote_code:
        options.fix("trust-remote-code", True, "TRUST_REMOTE_CODE")


def _quantization(options: Options, settings: PlanSettings, shape: ModelShape) -> None:
    """The setting, VLLM_EXTRA_ARGS or the profile against what the checkpoint is."""
    if settings.quantization == "int4":  # the shape is that of the converted checkpoint
        if "quantization" in options.fixed:
            raise SettingsError("QUANTIZATION=int4 and --quantization in VLLM_EXTRA_ARGS contradict each other.",
                                "Leave one of them out.")
        options.drop("quantization", "setting", "the checkpoint is converted to INT4, once, in the volume")
    elif settings.quantization != "auto" and "quantization" not in options.fixed:
        if settings.quantization == "none":
            options.drop("quantization", "setting", "QUANTIZATION=none")
            options.fixed.add("quantization")
        else:
            options.fix("quantization", settings.quantization, f"QUANTIZATION={settings.quantization}")
    if shape.quantization in (None, "bitsandbytes") or options.values.get("quantization") != "bitsandbytes":
        return
    reason = options.reasons["quantization"]
    if reason.source == "setting":
        raise SettingsError(f"{reason.text.split(' ')[0]} asks for bitsandbytes, but the checkpoint is quantized "
                            f"already, by {shape.quantization}.",
                            "Set QUANTIZATION=auto, or choose the model's unquantized checkpoint.")
    options.drop("quantization", "model", f"the checkpoint is quantized already, by {shape.quantization}")


def _context(options: Options, shape: ModelShape) -> None:
    longest = shape.max_position
    wanted = options.whole("max-model-len")
    if wanted <= longest:
        return
    reason = options.reasons["max-model-len"]
    if reason.source == "profile":
        options.set("max-model-len", longest, "model", f"the model's own limit; profile has {wanted}")
        return
    raise SettingsError(f"{reason.text.split(' ')[0]} asks for a context of {wanted} tokens, but the model's limit is "
                        f"{longest}.", f"Set MAX_MODEL_LEN to {longest} or less.")


def _limit(options: Options, settings: PlanSettings, gpus: tuple[Gpu, ...]) -> int:
    """What may be used of each card, as NVML counts; sets gpu-memory-utilization to it where that asks for more.

    vLLM counts from after the CUDA context was made, so the context comes on top of its share. It refuses to start
    where less than its share is free then, and the context differs by some MiB: the margin stays out of the share.
    """
    total, free = min(gpu.total_bytes for gpu in gpus), min(gpu.free_bytes for gpu in gpus)
    share = options.number("gpu-memory-utilization", 0.92)
    wanted = math.ceil(total * share) + CONTEXT_BYTES
    caps = [(free, "machine", f"{format_size(free)} of the card are free")]
    if settings.vram_limit:
        caps.append((settings.vram_limit, "setting", f"VRAM_LIMIT is {format_size(settings.vram_limit)}"))
    cap, source, why = min(caps)
    if "gpu-memory-utilization" in options.fixed:
        if wanted > cap:
            options.note("gpu-memory-utilization", f"although {why}")
        return wanted
    if wanted <= cap and "gpu-memory-utilization" in options.values:
        return wanted
    lowered = math.floor(min(share, max(0.0, (cap - CONTEXT_BYTES - MARGIN_BYTES) / total)) * 10_000) / 10_000
    options.set("gpu-memory-utilization", lowered, source,
                f"{why}, of which the CUDA context takes {format_size(CONTEXT_BYTES)} that vLLM does not count")
    return min(cap, wanted)


def _fill(options: Options, hardware: Hardware, shape: ModelShape, limit_bytes: int, on_gpu: bool,
          draft: Draft | None) -> Choices:
    """The choices, with everything that was left open filled in and written into the options."""
    left_open = frozenset(field for option, field in FIELDS.items()
                          if option not in options.values and option not in options.fixed)
    bounds = left_open | ({"offload_bytes"} if options.whole("cpu-offload-gb") and "cpu-offload-gb"
                          not in options.fixed else set())
    if options.whole("offload-group-size"):
        bounds -= {"offload_bytes"}
    if "max-model-len" in options.values and options.reasons["max-model-len"].source == "profile":
        bounds |= {"max_model_len"}
    if not speculation.possible(options, shape):
        bounds -= {"speculative_tokens"}
    start = config_of(options, shape, limit_bytes, left_open, draft)
    if not on_gpu:
        bounds -= {"quantization", "offload_bytes", "eager", "speculative_tokens"}
        start = replace(start, offload_bytes=0)
    found = search.search(shape, start, frozenset(bounds), hardware.host_memory_bytes if on_gpu else 0,
                        may_quantize=on_gpu and shape.understood and not shape.quantization) if on_gpu else None
    choices = found.choices if found else _smallest(shape, start, frozenset(bounds), on_gpu)
    written: dict[str, object] = {
        "quantization": choices.quantization, "enforce-eager": choices.eager, "max-model-len": choices.max_model_len,
        "max-num-seqs": choices.max_num_seqs, "max-num-batched-tokens": choices.max_num_batched_tokens}
    for option, field in FIELDS.items():
        if option not in written or field not in bounds or (
                option == "quantization" and (shape.quantization or not choices.quantization)):
            continue
        before = options.values.get(option)
        if before == written[option]:
            continue
        text = why(option, shape, choices, found)
        options.set(option, written[option], "machine", text + (f"; the profile has {before}" if before else ""))
    if "speculative_tokens" in bounds and choices.speculative_tokens:
        speculation.look_up(options, choices)
    if "capture_limit" in bounds and choices.capture_limit and not choices.eager:
        options.set("max-cudagraph-capture-size", choices.capture_limit, "machine",
                    "as without guesses, which would take memory for more graphs" if choices.speculative_tokens else
                    "CUDA graphs for more requests at a time would take memory that is not there without offload")
    if "offload_bytes" in bounds:
        _offload(options, shape, choices, found)
    if "block-size" not in options.values:
        options.set("block-size", choices.block_size, "machine",
                    "fixed, because the engine's default depends on the card")
    return choices


def _offload(options: Options, shape: ModelShape, choices: Choices, found: search.Found | None) -> None:
    """Write the offload that was found; the profile's bound of it has done its work."""
    bound = options.values.pop("cpu-offload-gb", None)
    wanted = vllm_args.offload_options(choices)
    if not offloaded_bytes(shape, choices):
        if bound:
            options.set("cpu-offload-gb", wanted["cpu-offload-gb"], "machine", "everything fits on the card, and there "
                        f"it is many times faster; the profile has {bound}")
        return
    for option, value in wanted.items():
        if option == "additional-config":
            given = options.values.get(option)
            value = {**value, **given} if isinstance(value, dict) and isinstance(given, dict) else value
            options.set(option, value, "machine", "the embedding in host memory: a token needs one row of it")
        elif value:
            options.set(option, value, "machine", why(option, shape, choices, found))


def _cache(options: Options, shape: ModelShape, choices: Choices, by_user: frozenset[str]) -> None:
    """The size of the KV cache, unless the user left it to the engine by giving its share of the card."""
    if "gpu-memory-utilization" in by_user or "kv-cache-memory-bytes" in options.values:
        return
    size = max(parts.kv_cache_bytes for parts in estimate(shape, choices))
    if size:
        options.set("kv-cache-memory-bytes", size, "machine", "what the other parts leave; the engine itself would "
                    "keep back what it needs for a moment while it compiles, before the cache is made")


def _smallest(shape: ModelShape, start: Choices, left_open: frozenset[str], on_gpu: bool) -> Choices:
    """What a refusal is explained with: the least of everything that is left open."""
    level = serving_config.LEVELS[-1] if on_gpu else serving_config.LEVELS[5]
    choices = search.at_level(start, level, left_open)
    if "quantization" in left_open and on_gpu and shape.understood and not shape.quantization:
        choices = replace(choices, quantization="bitsandbytes")
    if "eager" in left_open:
        choices = replace(choices, eager=True)
    return placement.least_offload(shape, choices, 1) if "offload_bytes" in left_open else choices
