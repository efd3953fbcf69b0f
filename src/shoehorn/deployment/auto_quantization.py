"""Resolution of `QUANTIZATION=auto`: convert the model to INT4 once, or serve it as published.

Rules:
- a model that fits on the GPUs without offload, and one that is quantized already, is served as published;
- any other model is converted if it can be, the volume has enough free space and the result fits: INT4 is smaller and
  faster than NF4; otherwise it is quantized to NF4 while loading, as the plan decides;
- an existing conversion is used.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from shoehorn.common.errors import SettingsError
from shoehorn.config import vllm_options
from shoehorn.config.profiles import Profile
from shoehorn.config.settings import Settings
from shoehorn.deployment import served_model
from shoehorn.deployment.served_model import ShapeReader
from shoehorn.hardware.types import Hardware
from shoehorn.int4 import artifact
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan
from shoehorn.store import pull
from shoehorn.store.reference import model_reference

log = logging.getLogger("plan")


def resolve_quantization(settings: Settings, machine: Hardware, profile: Profile, shapes: ShapeReader, *,
                         volume: bool) -> Settings:
    """Return the settings with `int4` instead of `auto` where a conversion is better.

    Args:
        volume: MODELS_DIR is the volume of this machine, so its content and free space count.

    Raises:
        ModelUnavailableError: config and headers cannot be read.
        SettingsError: the settings contradict each other, the model or the machine.
    """
    if settings.quantization != "auto" or not machine.gpus or profile.match.device == "cpu" or \
            "quantization" in {*profile.engine, *vllm_options.parse_arguments(settings.vllm_extra_args)}:
        return settings
    int4 = replace(settings, quantization="int4")
    ref = model_reference(settings)
    if volume and artifact.locate(settings.models_dir, ref):
        return int4
    overrides = served_model.config_overrides(settings, profile)
    shape = shapes.read(ref, pull.locate(settings.models_dir, ref), overrides=overrides)
    published = make_plan(PlanInputs(PlanSettings.of(settings), machine, profile, shape))
    resident = isinstance(published, Plan) and not published.config.nf4 and not published.offloaded_bytes
    if shape.quantization or not shape.plain or resident:
        return settings
    try:
        free_bytes = served_model.available_bytes(settings.models_dir, ref.converted) if volume else None
        conversion = shapes.read(ref.converted, None, overrides=overrides)
        converted = make_plan(PlanInputs(PlanSettings.of(int4), machine, profile, conversion, free_bytes))
    except SettingsError as error:
        log.info("Not converting to INT4 cause=%s", error.cause)
        return settings
    if isinstance(published, Plan) and not isinstance(converted, Plan):
        log.info("Not converting to INT4 cause=%s", converted.cause)
        return settings  # if neither fits, the INT4 plan is closer to fitting, so its shortfall is reported
    log.info("Converting the model to INT4 once, in the volume; set QUANTIZATION=bitsandbytes to avoid it")
    return int4
