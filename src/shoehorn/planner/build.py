"""`make_plan`: inputs -> a plan, or a refusal that names the smallest changes that would fit.

Rules: pure, and called before a byte of weights moves; a plan that the estimate says would fail is refused.
"""

from __future__ import annotations

from shoehorn.common.errors import SettingsError
from shoehorn.planner.base_options import base_options
from shoehorn.planner.inputs import PlanInputs
from shoehorn.planner.on_cpu import plan_on_cpu
from shoehorn.planner.on_gpus import plan_on_gpus
from shoehorn.planner.plan import Plan, Refusal


def make_plan(inputs: PlanInputs) -> Plan | Refusal:
    """Plan a start.

    Raises:
        SettingsError: settings that contradict each other, the profile, the model or the machine.
    """
    if inputs.shape.unreadable:
        raise SettingsError(f"{inputs.settings.model_id}: {inputs.shape.unreadable}, which vLLM 0.32 does not support.",
                            "Set MODEL_ID to a version of the model without activation order (AWQ, GPTQ with desc_act: "
                            "false, W4A16 with actorder: null or weight), or to the unquantized one with "
                            "QUANTIZATION=bitsandbytes.", code="unsupported_checkpoint")
    base = base_options(inputs)
    builder = plan_on_cpu if inputs.profile.match.device == "cpu" else plan_on_gpus
    return builder(inputs, base)
