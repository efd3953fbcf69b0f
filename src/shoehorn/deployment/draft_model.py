"""Draft model of speculative decoding: `SPECULATIVE=OWNER/NAME`.

Rules:
- the draft is used if it fits next to the model with a useful context and is expected to make one request faster;
  usually that is so with offload and not without; otherwise a reason of the plan says why it is left out;
- a draft with another vocabulary than the model is refused before it is pulled;
- the draft is converted to INT4 like the model, except next to a model in NF4 (vLLM loads both in one way), with
  QUANTIZATION=none, or on a CPU.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.common.units import format_size
from shoehorn.config import vllm_options
from shoehorn.config.setting_values import SPECULATIVE_KEYWORDS
from shoehorn.config.settings import Settings, default_revision
from shoehorn.deployment import served_model
from shoehorn.deployment.inputs import Deployment
from shoehorn.deployment.served_model import ShapeReader
from shoehorn.int4 import artifact
from shoehorn.model.files import Files
from shoehorn.model.reference import ModelRef
from shoehorn.model.shape import ModelShape
from shoehorn.planner.inputs import Draft
from shoehorn.planner.parallelism import divides
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.planner.reasons import MACHINE, Reason
from shoehorn.store.model_check import check_model

USEFUL_CONTEXT = 2048
"""Tokens of context below which the KV cache needs the memory more than a draft does."""

_REMEDY = "Set SPECULATIVE to a smaller model of the same family, or to off."


def is_named(settings: Settings) -> bool:
    """Return True if SPECULATIVE names a model and VLLM_EXTRA_ARGS does not override it."""
    return settings.speculative not in SPECULATIVE_KEYWORDS and \
        "speculative-config" not in vllm_options.parse_arguments(settings.vllm_extra_args)


def inspect_draft(settings: Settings, deployment: Deployment, plan: Plan) -> Draft:
    """Read the headers of the draft that SPECULATIVE names, in the format that suits the plan without it.

    Raises:
        SettingsError: the draft does not match the model.
        ModelUnavailableError: its config and headers cannot be read.
    """
    models_dir, shapes = settings.models_dir, ShapeReader(settings)
    ref = ModelRef(settings.speculative, settings.model_source, default_revision(settings.model_source))
    nf4 = plan.config.nf4
    convertible = bool(plan.vram) and not nf4 and settings.quantization != "none"
    if convertible and artifact.locate(models_dir, ref):
        ref = ref.converted
    directory = served_model.served_folder(models_dir, ref)
    shape = shapes.read(ref, directory)
    if convertible and not ref.is_int4 and not shape.quantization:
        with suppress(SettingsError):  # it cannot be converted, and is served as published
            ref, shape, directory = ref.converted, shapes.read(ref.converted, None), None
    check_model(served_model.model_files(settings, ref), settings, ref.id)
    _require_match(settings, deployment.inputs.shape, shape, nf4)
    vocabularies = [_vocabulary(served_model.model_files(settings, each)) for each in (deployment.ref, ref)]
    if all(vocabularies) and vocabularies[0] != vocabularies[1]:
        raise SettingsError(f"SPECULATIVE={settings.speculative}: token mismatch with {settings.model_id}.", _REMEDY,
                            code="draft_mismatch")
    lacking_bytes = 0
    if directory is None and deployment.draft_disk_bytes is not None:
        pulled_bytes = disk.disk_used(ref.original.directory(models_dir))
        lacking_bytes = max(0, shape.disk_bytes - pulled_bytes - deployment.draft_disk_bytes)
    return Draft(ref, directory or ref.directory(models_dir), shape, lacking_bytes)


def prefer(plan: Plan, drafted: Plan | Refusal, draft: Draft) -> Plan:
    """Return the better plan: the one with the draft, or the one without and the reason against the draft."""
    objection = _misfit(plan, draft)
    if isinstance(drafted, Refusal):
        objection = objection or ("draft-does-not-fit", {"lacking": format_size(drafted.missing_bytes)})
    else:
        objection = objection or _disadvantage(plan, drafted)
        if objection is None:
            return drafted
    code, params = objection
    reason = Reason("speculative-config", None, MACHINE, code, {"model": draft.ref.id, **params})
    return replace(plan, reasons=(*plan.reasons, reason))


def _require_match(settings: Settings, shape: ModelShape, draft: ModelShape, nf4: bool) -> None:
    if draft.vocab != shape.vocab:
        raise SettingsError(f"SPECULATIVE={settings.speculative}: vocabulary mismatch: {draft.vocab} tokens, "
                            f"{settings.model_id} has {shape.vocab}.", _REMEDY, code="draft_mismatch")
    if nf4 and draft.quantization not in (None, "bitsandbytes"):
        raise SettingsError(f"SPECULATIVE={settings.speculative}: unsupported quantization {draft.quantization} next "
                            "to a model in bitsandbytes: vLLM loads both in one way.",
                            "Set SPECULATIVE to the unquantized checkpoint of the draft, or set QUANTIZATION=int4.",
                            code="draft_quantization")


def _vocabulary(files: Files) -> object:
    """Return the tokens of `tokenizer.json`, None without that file. Special tokens may differ: none is drafted."""
    if "tokenizer.json" not in files.names():
        return None
    try:
        return json.loads(files.read("tokenizer.json"))["model"]["vocab"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelUnavailableError("tokenizer.json: vocabulary missing.", "Choose another model.",
                                    code="invalid_tokenizer") from error


_Objection = tuple[str, dict[str, object]]
"""Code and parameters of a reason."""


def _misfit(plan: Plan, draft: Draft) -> _Objection | None:
    """Return the reason for which the draft cannot be used at all, or None."""
    parallelism = plan.config.parallelism
    if parallelism.pipeline > 1:
        return "draft-pipeline", {}
    if not divides(draft.shape, parallelism.tensor):
        return "draft-not-divisible", {"gpus": parallelism.tensor}
    if draft.lacking_bytes:
        return "draft-disk-full", {"lacking": format_size(draft.lacking_bytes)}
    return None


def _disadvantage(plan: Plan, drafted: Plan) -> _Objection | None:
    """Return the reason for which the plan without the draft is better, or None."""
    context = drafted.config.limits.max_model_len
    if context < min(USEFUL_CONTEXT, plan.config.limits.max_model_len):
        return "draft-short-context", {"context": context}
    if drafted.config.nf4 != plan.config.nf4:
        return "draft-needs-quantization", {}
    without, with_draft = (each.expected_tokens_per_second["batch_1"] for each in (plan, drafted))
    if without and with_draft and with_draft <= without:
        return "draft-slower", {"with_draft": with_draft, "without": without}
    return None
