"""`QUANTIZATION=auto`: whether a model is converted to INT4, once, or served as it is.

Rules:
- a model that fits on the GPUs as it is, comfortably, stays so; one that is quantized already, too;
- any other is converted where it can be, the volume has room for it and the result fits: INT4 is smaller and faster
  than NF4; else it is quantized to NF4 while loading, as the plan says;
- what was converted already is used.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from shoehorn.common.errors import SettingsError
from shoehorn.config import vllm_options
from shoehorn.config.profiles import Profile
from shoehorn.config.settings import Settings
from shoehorn.deployment import served_model
from shoehorn.hardware.types import Hardware
from shoehorn.int4 import artifact
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan
from shoehorn.store import pull
from shoehorn.store.reference import model_reference

log = logging.getLogger("plan")


def resolve_quantization(settings: Settings, machine: Hardware, profile: Profile, disk: bool = True) -> Settings:
    """The settings, with `int4` in the place of `auto` where that is better.

    Args:
        disk: the volume is the one that the conversion would lie in, so its room counts.

    Raises:
        ModelUnavailableError: config and headers cannot be read.
        SettingsError: settings that contradict each other, the model or the machine.
    """
    if settings.quantization != "auto" or not machine.gpus or profile.match.device == "cpu" or \
            "quantization" in {*profile.engine, *vllm_options.parse_arguments(settings.vllm_extra_args)}:
        return settings
    int4 = replace(settings, quantization="int4")
    ref = model_reference(settings)
    if disk and artifact.locate(settings.models_dir, ref):
        return int4
    shape = served_model.served_shape(settings, ref, pull.locate(settings.models_dir, ref))
    plan = make_plan(PlanInputs(PlanSettings.of(settings), machine, profile, shape))
    resident = isinstance(plan, Plan) and not plan.choices.quantization and not plan.offloaded_bytes
    if shape.quantization or not shape.understood or resident:
        return settings
    try:
        free_bytes = served_model.available_bytes(settings.models_dir, ref.converted) if disk else None
        converted = served_model.served_shape(int4, ref.converted, None)
        found = make_plan(PlanInputs(PlanSettings.of(int4), machine, profile, converted, free_bytes))
    except SettingsError as refusal:
        log.info("not converted to INT4: %s", refusal.cause)
        return settings
    if isinstance(plan, Plan) and not isinstance(found, Plan):
        log.info("not converted to INT4: %s", found.cause)
        return settings  # else what INT4 lacks is the lesser want
    log.info("the model is converted to INT4, once, in the volume (QUANTIZATION=bitsandbytes would do without)")
    return int4
