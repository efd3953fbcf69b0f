"""Plans of one appliance: the first start, and smaller ones after failed starts.

Rules: every plan is written to RUN_DIR/plan.json and logged with its reasons; options that started after a step-down
are saved as known-good and used for the next start.
"""

from __future__ import annotations

import json
import logging

from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.units import format_size
from shoehorn.config.settings import Settings
from shoehorn.deployment import known_good
from shoehorn.deployment.inputs import Deployment
from shoehorn.deployment.plan import plan_deployment
from shoehorn.engine.diagnosis import Diagnosis
from shoehorn.planner.memory.model import MemoryModel
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.planner.step_down import KEPT_OPTIONS, MAX_STEPS, FailedStart, StepDown
from shoehorn.runtime.run_dir import RunDir

log = logging.getLogger("engine")


class Replanner:
    """Plans a deployment and remembers the steps down."""

    def __init__(self, settings: Settings, deployment: Deployment) -> None:
        self._settings, self._deployment = settings, deployment
        self._options = dict(deployment.inputs.known_good)
        self._steps: list[str] = []

    def first_plan(self) -> Plan:
        """Return the plan of the first start.

        Raises:
            DoesNotFitError: the model does not fit.
            SettingsError: the settings contradict each other, the model or the machine.
        """
        return self._publish(plan_deployment(self._settings, self._deployment))

    def step_down(self, plan: Plan, diagnosis: Diagnosis) -> Plan | None:
        """Return a smaller plan after a failed start, or None without one or after the last try.

        Raises:
            DoesNotFitError: the model does not fit with the options of the step.
        """
        hardware = self._deployment.inputs.hardware
        failure = FailedStart(diagnosis.memory, diagnosis.name == "unsupported_dtype", diagnosis.name == "gpu_in_use",
                              diagnosis.cache_made, diagnosis.missing_bytes, diagnosis.limits)
        model = MemoryModel(self._deployment.inputs.shape, plan.config)
        step = StepDown(model, plan.fixed, plan.engine_args,
                        min((gpu.total_bytes for gpu in plan.gpus), default=0),
                        hardware.host_memory_bytes).next_step(failure, len(self._steps))
        if step is None:
            return None
        unchanged = {option: plan.engine_args[option] for option in KEPT_OPTIONS
                     if option in plan.engine_args and option not in plan.fixed}
        if plan.draft:
            unchanged.pop("speculative-config", None)  # the next plan decides again if the draft is worth its memory
        self._options |= {**unchanged, **step.options}  # otherwise the next plan spends the freed memory elsewhere
        self._steps.append(f"{diagnosis.name}: {step.text}")
        log.warning("step down %d of %d after %s: %s", len(self._steps), MAX_STEPS, diagnosis.name, step.text)
        return self._publish(plan_deployment(self._settings, self._deployment, self._options))

    def save_known_good(self) -> None:
        """Save the options of a successful start after step-downs."""
        if self._steps:
            known_good.write(self._deployment.known_good, self._options, "; ".join(self._steps))

    def _publish(self, plan: Plan | Refusal) -> Plan:
        if isinstance(plan, Refusal):
            raise plan.as_error()
        write_atomic(RunDir(self._settings.run_dir).plan, json.dumps(plan.to_json(), indent=1) + "\n")
        log.info("plan: profile=%s weights=%s", plan.profile, format_size(self._deployment.inputs.shape.weights_bytes))
        for reason in plan.reasons:
            log.info("plan: %s=%s source=%s: %s", reason.option, reason.value, reason.source, reason.text)
        return plan
