"""`SPECULATIVE=OWNER/NAME`: a second, small model that guesses tokens, which the model checks together in one pass.

Rules:
- it is used where it fits beside the model with a useful context, and where it is expected to make one request
  faster: where a pass waits for the link it does, where the model is on the card it mostly does not; else the plan
  says why not;
- it has the model's vocabulary, token by token, or is refused before it is pulled;
- it is converted to INT4 like the model, unless the model is in NF4, whose loader wants both so, QUANTIZATION=none, or
  on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.common.units import format_size
from shoehorn.config import settings as settings_module
from shoehorn.config import vllm_options
from shoehorn.config.setting_values import SPECULATIVE_KEYWORDS
from shoehorn.config.settings import Settings
from shoehorn.deployment import served_model
from shoehorn.int4 import artifact
from shoehorn.model.files import Files, LocalFiles
from shoehorn.model.reference import ModelRef
from shoehorn.model.shape import ModelShape
from shoehorn.planner import parallelism
from shoehorn.planner.inputs import Draft
from shoehorn.planner.option_set import Reason
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.store import pull

USEFUL_CONTEXT = 2048
"""Tokens of context below which a draft's memory is better given to the KV cache."""


def is_named(settings: Settings) -> bool:
    """Whether SPECULATIVE names a model, and VLLM_EXTRA_ARGS does not say otherwise."""
    return settings.speculative not in SPECULATIVE_KEYWORDS and \
        "speculative-config" not in vllm_options.parse_arguments(settings.vllm_extra_args)


def considered(settings: Settings, shape: ModelShape, free_bytes: int | None,
               make: Callable[[Draft | None], Plan | Refusal]) -> Plan | Refusal:
    """The plan, with the draft that SPECULATIVE names where that is better.

    Args:
        shape: the model's.
        free_bytes: on the volume, beside the model; None where it does not count.
        make: makes the plan with a draft, or without one.

    Raises:
        SettingsError: the draft does not go with the model, or other settings contradict each other.
        ModelUnavailableError: the draft's config and headers cannot be read.
    """
    plan = make(None)
    if isinstance(plan, Refusal) or not is_named(settings):
        return plan
    draft = find(settings, plan, shape, free_bytes)
    return chosen(plan, make(draft), draft)


def find(settings: Settings, plan: Plan, shape: ModelShape, free_bytes: int | None) -> Draft:
    """The draft, in the number format that goes with the plan.

    Args:
        plan: without a draft.
        shape: the model's.
        free_bytes: on the volume, beside the model; None where it does not count.

    Raises:
        SettingsError: it does not go with the model.
        ModelUnavailableError: its config and headers cannot be read.
    """
    models_dir = settings.models_dir
    ref = ModelRef(settings.speculative, settings.model_source,
                   settings_module.default_revision(settings.model_source))
    nf4 = plan.choices.quantization == "bitsandbytes"
    wants_int4 = bool(plan.vram) and not nf4 and settings.quantization != "none"
    if wants_int4 and artifact.locate(models_dir, ref):
        ref = ref.converted
    found = served_model.served_shape(settings, ref, served_model.served_folder(models_dir, ref))
    if wants_int4 and not ref.is_int4 and not found.quantization:
        ref, found = _converted(settings, ref, found)
    _require_match(settings, shape, found, nf4)
    target = served_model.served_reference(settings)
    if (mine := _vocabulary(_files(settings, target))) and (its := _vocabulary(_files(settings, ref))) and mine != its:
        raise SettingsError(f"SPECULATIVE={settings.speculative} has other tokens than {settings.model_id}, so that "
                            "its guesses would mean something else.", _REMEDY)
    directory = served_model.served_folder(models_dir, ref)
    lacking = 0
    if directory is None and free_bytes is not None:
        there = disk.disk_used(ref.original.directory(models_dir))
        lacking = max(0, found.disk_bytes - there - free_bytes)
    return Draft(ref, directory or ref.directory(models_dir), found, lacking)


def chosen(plan: Plan, drafted: Plan | Refusal, draft: Draft) -> Plan:
    """The plan with the draft where that is better, else the one without, which then says why."""
    why = _against(plan, drafted, draft)
    if why is None and isinstance(drafted, Plan):
        return drafted
    return replace(plan, reasons=(*plan.reasons, Reason(
        "speculative-config", None, "machine", f"SPECULATIVE={draft.ref.id} is left out: {why}")))


_REMEDY = "Name a smaller model of the same family in SPECULATIVE, or set SPECULATIVE=off."


def _converted(settings: Settings, ref: ModelRef, shape: ModelShape) -> tuple[ModelRef, ModelShape]:
    """The draft in INT4, or as published where it cannot be converted."""
    try:
        return ref.converted, served_model.served_shape(settings, ref.converted, None)
    except SettingsError:
        return ref, shape


def _require_match(settings: Settings, shape: ModelShape, draft: ModelShape, nf4: bool) -> None:
    if draft.vocab != shape.vocab:
        raise SettingsError(f"SPECULATIVE={settings.speculative} has a vocabulary of {draft.vocab} tokens, and "
                            f"{settings.model_id} one of {shape.vocab}.", _REMEDY)
    if nf4 and draft.quantization not in (None, "bitsandbytes"):
        raise SettingsError(f"SPECULATIVE={settings.speculative} is quantized by {draft.quantization}, and the model "
                            "will be by bitsandbytes: the engine loads both in one way.",
                            "Name the draft's unquantized checkpoint, or set QUANTIZATION=int4.")


def _files(settings: Settings, ref: ModelRef) -> Files:
    directory = served_model.served_folder(settings.models_dir, ref)
    return LocalFiles(directory) if directory else pull.hub_files(settings, ref.original)


def _vocabulary(files: Files) -> object:
    """The tokens of `tokenizer.json`; None where that is not there. Special ones may differ: they are never drafted."""
    if "tokenizer.json" not in files.names():
        return None
    try:
        return json.loads(files.read("tokenizer.json"))["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelUnavailableError("tokenizer.json has no vocabulary.", "Choose another model.") from error


def _against(plan: Plan, drafted: Plan | Refusal, draft: Draft) -> str | None:
    """What speaks against the draft; None when nothing does."""
    if plan.choices.pipeline_parallel > 1:
        return "the engine knows no drafts where layers are divided over GPUs"
    if not parallelism.divides(draft.shape, plan.choices.tensor_parallel):
        return f"it cannot be divided over {plan.choices.tensor_parallel} GPUs"
    if draft.lacking_bytes:
        return f"the volume lacks {format_size(draft.lacking_bytes)} for it"
    if isinstance(drafted, Refusal):
        return f"with it nothing fits ({format_size(drafted.missing_bytes)} are missing)"
    if drafted.choices.max_model_len < min(USEFUL_CONTEXT, plan.choices.max_model_len):
        return f"with it only {drafted.choices.max_model_len} tokens of context fit"
    if drafted.choices.quantization != plan.choices.quantization:
        return "with it the model itself would have to be quantized"
    without, with_it = (each.expected_tokens_per_second["batch_1"] for each in (plan, drafted))
    if without and with_it and with_it <= without:
        return f"about {with_it:g} tokens/s are expected with it, and {without:g} without"
    return None
