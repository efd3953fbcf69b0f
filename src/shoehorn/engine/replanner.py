"""Around the plan: machine and model looked at once, steps down remembered, expectation compared with the truth.

Rules: everything is known before a byte of weights moves; every plan is written to RUN_DIR/plan.json and logged with
its reasons; what worked after stepping down is used at once next time.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from shoehorn.common import disk
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.units import format_size
from shoehorn.config.models_dir import ModelsDir
from shoehorn.config.settings import Settings
from shoehorn.deployment import draft_model, inputs, known_good, served_model
from shoehorn.engine import memory_report
from shoehorn.engine import step_down as step_down_module
from shoehorn.engine.diagnosis import Diagnosis
from shoehorn.engine.memory_report import taken
from shoehorn.hardware import bandwidth_probe, detect
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import Draft, PlanInputs, PlanSettings
from shoehorn.planner.plan import Plan, Refusal
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import StateFile

log = logging.getLogger("engine")


class Planner:
    """Plans of one appliance.

    Args:
        directory: of what is served, when it is complete there; None reads config and headers where the model is.

    Raises:
        ShoehornError: the machine or the model cannot be used.
    """

    def __init__(self, settings: Settings, directory: Path | None) -> None:
        self._settings = settings
        self._machine = bandwidth_probe.with_measured_bandwidths(
            detect.detect(), ModelsDir(settings.models_dir).bandwidths)
        self._profile = inputs.select(settings, self._machine)
        ref = served_model.served_reference(settings)
        self._shape = served_model.served_shape(settings, ref, directory)
        fetched = settings.model_source != "local" or settings.quantization == "int4"
        self._disk_free = served_model.available_bytes(settings.models_dir, ref) \
            if directory is None and fetched else None
        self._beside = disk.disk_free(settings.models_dir) if self._disk_free is None else \
            self._disk_free - self._shape.disk_bytes
        self._memory = known_good.location(settings, self._machine, self._profile, self._shape)
        self._stepped = dict(known_good.recall(self._memory))
        self._steps: list[str] = []

    def plan(self) -> Plan:
        """The plan for the next start, with the steps that were made.

        Raises:
            DoesNotFitError: nothing fits.
            SettingsError: the settings contradict each other, the model or the machine.
        """
        without = "speculative-config" in self._stepped and self._stepped["speculative-config"] is None
        plan = self._made(None) if without else draft_model.considered(
            self._settings, self._shape, self._beside, self._made)
        if isinstance(plan, Refusal) and self._stepped and not self._steps:
            log.warning("what worked before does not fit any more, and is forgotten")
            self._stepped = {}
            return self.plan()
        if isinstance(plan, Refusal):
            raise plan.as_error()
        write_atomic(RunDir(self._settings.run_dir).plan, json.dumps(plan.to_json(), indent=1) + "\n")
        log.info("plan: profile %s, %s of weights", plan.profile, format_size(self._shape.weights_bytes))
        for reason in plan.reasons:
            log.info("plan: %s = %s (%s): %s", reason.option, reason.value, reason.source, reason.text)
        return plan

    def _made(self, draft: Draft | None) -> Plan | Refusal:
        return make_plan(PlanInputs(PlanSettings.of(self._settings), self._machine, self._profile, self._shape,
                                    self._disk_free, dict(self._stepped), draft))

    def step_down(self, plan: Plan, diagnosis: Diagnosis) -> Plan | None:
        """A smaller plan after a start that failed; None when there is none, or after the last try."""
        card = min((gpu.total_bytes for gpu in self._machine.gpus), default=0)
        step = step_down_module.next_step(self._shape, plan.choices, plan.fixed, plan.engine_args, card,
                                   self._machine.host_memory_bytes, diagnosis, len(self._steps))
        if step is None:
            return None
        kept = {option: plan.engine_args[option] for option in step_down_module.LADDER
                if option in plan.engine_args and option not in plan.fixed}
        if plan.draft:
            kept.pop("speculative-config", None)  # whether it is worth its memory is asked anew
        self._stepped |= {**kept, **step.options}  # else what one option frees, the next plan would spend on another
        self._steps.append(f"{diagnosis.name}: {step.text}")
        log.warning("step down %d of %d after %s: %s", len(self._steps), step_down_module.TRIES, diagnosis.name,
                    step.text)
        return self.plan()

    def record_start(self, plan: Plan, states: StateFile) -> None:
        """After the load: remember steps that were made, and compare what was expected with what is there."""
        if self._steps:
            known_good.remember(self._memory, self._stepped, "; ".join(self._steps))
        figures, tokens = memory_report.read(self._settings.run_dir, max(1, len(plan.vram)))
        if not plan.vram:
            states.update(kv_cache_tokens=tokens)
            return
        rows = memory_report.compare(plan.vram, figures, taken(self._machine, detect.detect(), len(plan.vram)))
        for line in memory_report.table(rows):
            log.info("memory: %s", line)
        for row in rows:
            if row.differs:
                log.warning("GPU %d holds %s of %s, %s were expected", row.gpu, format_size(row.measured_bytes or 0),
                            row.part.replace("_", " "), format_size(row.expected_bytes))
        if tokens:
            log.info("memory: KV cache of %d tokens, %d were expected", tokens, plan.kv_cache_tokens)
        if complaint := memory_report.offload_complaint(plan.offloaded_bytes, figures):
            log.warning("offload: %s", complaint)
        offloaded = sum(int(said.get("offloaded_bytes", 0)) for said in figures.values())
        states.update(memory=tuple(asdict(row) for row in rows), kv_cache_tokens=tokens, offloaded_bytes=offloaded)
