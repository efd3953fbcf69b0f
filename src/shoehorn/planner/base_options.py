"""Base options of a plan: from profile, settings, VLLM_EXTRA_ARGS and the last known good configuration.

Rules: VLLM_EXTRA_ARGS wins over the settings, a setting over the profile; two of them that contradict each
other, or the model, are a `SettingsError` that names both.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoehorn.common.errors import SettingsError
from shoehorn.config import vllm_options
from shoehorn.model.shape import ModelShape
from shoehorn.model.task import Task
from shoehorn.planner import parsers, speculation
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.memory import adapters
from shoehorn.planner.option_set import OptionSet
from shoehorn.planner.reasons import MODEL, PROFILE, SETTING, STEP_DOWN, Reason
from shoehorn.planner.serving_config import BITSANDBYTES
from shoehorn.planner.vllm_args import CACHE_FORMATS

_NOT_ESTIMATED = (
    "attention-backend", "attention-config", "compilation-config", "decode-context-parallel-size",
    "disable-sliding-window", "enable-mamba-shared-prefix-checkpoint", "hf-config-path",
    "kv-cache-dtype-skip-layers", "kv-offloading-size", "kv-transfer-config", "mamba-block-size",
    "mm-ipc-gpu-memory-gb", "model-class-overrides", "num-gpu-blocks-override",
    "prefill-context-parallel-size", "quantization-config", "spec-method", "spec-model", "spec-tokens")
"""Options that change memory in a way that the estimate does not model."""

_ALLOW_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""Variable of the engine that permits a context beyond the model's limit."""


@dataclass(frozen=True)
class BaseOptions:
    """vLLM's options before any automatic choice, and those of them that are from the user."""

    options: OptionSet
    by_user: frozenset[str]


def base_options(inputs: PlanInputs) -> BaseOptions:
    """Collect the options in the order of precedence, and check them against the model.

    Raises:
        SettingsError: settings that contradict each other or the model.
    """
    options = OptionSet()
    for option, value in inputs.profile.engine.items():
        options = options.set(option, value, PROFILE, "profile", profile=inputs.profile.name)
    if inputs.profile.is_engine_config:
        options = options.fix("max-model-len")
    options = _with_settings(options, inputs.settings)
    for option, value in vllm_options.parse_arguments(inputs.settings.vllm_extra_args).items():
        options = options.set_by_user(option, value, setting="VLLM_EXTRA_ARGS")
    by_user = options.fixed
    for option, value in inputs.known_good.items():
        if option not in by_user:
            options = options.drop(option, STEP_DOWN, "step-down-dropped") if value is None else \
                options.set(option, value, STEP_DOWN, "step-down")
            options = options.fix(option)
    options = _quantization(options, inputs.settings, inputs.shape)
    if inputs.shape.overrides and options.values.get("hf-overrides") != inputs.shape.overrides:
        options = options.set("hf-overrides", inputs.shape.overrides, MODEL, "overrides-completed")
    options = _context(options, inputs)
    options = speculation.apply_draft(options, inputs.draft)
    if served_task(inputs.task, options).is_pooling:
        options = _without_generation(options)
    else:
        options = parsers.choose(options, inputs.shape.architecture, inputs.chat)
    for option in _NOT_ESTIMATED:
        if _is_in_use(option, options.values.get(option)):
            options = options.note(option, "not-estimated")
    if options.values.get("enable-lora") and not adapters.is_estimated(inputs.shape):
        options = options.note("enable-lora", "not-estimated")
    if str(options.values.get("kv-cache-dtype", "auto")) not in ("auto", *CACHE_FORMATS):
        options = options.note("kv-cache-dtype", "not-estimated")
    return BaseOptions(options, by_user)


def served_task(task: Task, options: OptionSet) -> Task:
    """Return the task that the engine serves: vLLM's option `runner` overrides that of the model."""
    runner = options.values.get("runner", "auto")
    if runner == "generate":
        return Task.GENERATE
    return Task.EMBED if runner == "pooling" and task is Task.GENERATE else task


def _without_generation(options: OptionSet) -> OptionSet:
    """Leave out a profile's options that only text generation supports; vLLM chooses by the model's kind of pooling."""
    for option in ("enable-prefix-caching", "quantization"):
        if option in options.values and options.source_of(option) == PROFILE:
            options = options.drop(option, MODEL, "pooling")
    return options


def _is_in_use(option: str, value: object) -> bool:
    """Return whether a value switches a feature on."""
    return bool(value) and not (option.endswith("-parallel-size") and value == 1)


def _with_settings(options: OptionSet, settings: PlanSettings) -> OptionSet:
    for name, option, value in (("MAX_MODEL_LEN", "max-model-len", settings.max_model_len),
                                ("MAX_NUM_SEQS", "max-num-seqs", settings.max_num_seqs)):
        if value is not None:
            options = options.set_by_user(option, value, setting=name)
    options = speculation.apply_setting(options, settings)
    options = parsers.apply_settings(options, settings)
    if settings.trust_remote_code:
        options = options.set_by_user("trust-remote-code", True, setting="TRUST_REMOTE_CODE")
    return options


def _quantization(options: OptionSet, settings: PlanSettings, shape: ModelShape) -> OptionSet:
    """Apply QUANTIZATION, and check the result against the checkpoint's own quantization."""
    if settings.quantization == "int4":  # the shape is that of the converted checkpoint
        if "quantization" in options.fixed:
            raise SettingsError("QUANTIZATION=int4 and --quantization in VLLM_EXTRA_ARGS contradict each other.",
                                "Remove one of them.", code="contradicting_quantization")
        options = options.drop("quantization", SETTING, "converted-to-int4")
    elif settings.quantization == "none" and "quantization" not in options.fixed:
        options = options.drop("quantization", SETTING, "not-quantized").fix("quantization")
    elif settings.quantization != "auto" and "quantization" not in options.fixed:
        options = options.set_by_user("quantization", settings.quantization,
                                      setting=f"QUANTIZATION={settings.quantization}")
    if shape.quantization in (None, BITSANDBYTES) or options.values.get("quantization") != BITSANDBYTES:
        return options
    reason = options.reasons["quantization"]
    if reason.source == SETTING:
        raise SettingsError(f"{reason.params['setting']}: the checkpoint is already quantized ({shape.quantization}), "
                            "so bitsandbytes cannot quantize it.",
                            "Set QUANTIZATION=auto, or choose the model's unquantized checkpoint.",
                            code="already_quantized")
    return options.drop("quantization", MODEL, "already-quantized", method=shape.quantization)


def _context(options: OptionSet, inputs: PlanInputs) -> OptionSet:
    """Lower a profile's context to the model's limit."""
    shape, requested = inputs.shape, options.integer("max-model-len")
    longest = shape.longest_position or shape.max_position
    reason = options.reasons.get("max-model-len")
    if not reason or inputs.profile.environment.get(_ALLOW_LONGER) == "1":
        return options
    if reason.source == PROFILE:
        limit = longest if inputs.profile.is_engine_config else shape.max_position
        return options if requested <= limit else options.apply(
            Reason("max-model-len", limit, MODEL, "model-limit", replaces=reason))
    if requested <= longest:
        return options
    name = reason.params.get("setting", "The last known good configuration")
    raise SettingsError(f"{name}: a context of {requested} tokens exceeds the model's limit of {longest}.",
                        f"Set MAX_MODEL_LEN to {longest} or less.", code="context_too_long")
