"""Inputs and results of the planner carry no secret."""

from __future__ import annotations

import pickle
from dataclasses import fields

from shoehorn.config import settings
from shoehorn.deployment import inputs
from shoehorn.planner.build import make_plan
from shoehorn.planner.inputs import PlanInputs, PlanSettings
from support.plans import MIDDLE, llama_8b, machine

SECRETS = {"API_KEY": "sk-0123456789abcdef", "HF_TOKEN": "hf_0123456789abcdef", "MODELSCOPE_API_TOKEN": "ms-012345678"}


def test_planning_reads_no_secret_setting() -> None:
    secret = {setting.name.lower() for setting in settings.TABLE if setting.secret}
    assert secret
    assert not secret & {each.name for each in fields(PlanSettings)}


def test_no_secret_reaches_inputs_or_plan() -> None:
    loaded = settings.load({**SECRETS, "MAX_NUM_SEQS": "4"})
    hardware = machine(MIDDLE)
    plan_inputs = PlanInputs(PlanSettings.of(loaded), hardware, inputs.select_profile(loaded, hardware), llama_8b())
    plan = make_plan(plan_inputs)
    for value in SECRETS.values():
        assert value.encode() in pickle.dumps(loaded)
        assert value.encode() not in pickle.dumps((plan_inputs, plan))
