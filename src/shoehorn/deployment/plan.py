"""Plan of a deployment: with or without a draft model, whichever is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from shoehorn.config.settings import Settings
from shoehorn.deployment import draft_model
from shoehorn.deployment.inputs import Deployment
from shoehorn.planner.build import make_plan
from shoehorn.planner.plan import Plan, Refusal

_SPECULATION = "speculative-config"


def plan_deployment(settings: Settings, deployment: Deployment,
                    options: Mapping[str, object] | None = None) -> Plan | Refusal:
    """Plan a deployment.

    Args:
        settings: access to the hub, for the headers of a draft model.
        options: vLLM options of a step-down, instead of the known-good ones; None as a value drops an option.

    Raises:
        SettingsError: the settings contradict each other, the model, its draft or the machine.
        ModelUnavailableError: config and headers of the draft cannot be read.
    """
    inputs = deployment.inputs if options is None else replace(deployment.inputs, known_good=options)
    plan = make_plan(inputs)
    drops_speculation = inputs.known_good.get(_SPECULATION, _SPECULATION) is None
    if isinstance(plan, Refusal) or drops_speculation or not draft_model.is_named(settings):
        return plan
    draft = draft_model.inspect_draft(settings, deployment, plan)
    return draft_model.prefer(plan, make_plan(replace(inputs, draft=draft)), draft)
