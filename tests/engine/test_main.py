"""Parts of the engine program that need no process: the address of one machine."""

from __future__ import annotations

import pytest

from shoehorn.engine import main
from support.plans import HUGE, llama_8b, machine, planned


@pytest.mark.parametrize(("environment", "extra", "address"), [
    ({}, "", "127.0.0.1"), ({"VLLM_HOST_IP": "10.0.0.1"}, "", None),
    ({}, "--distributed-executor-backend ray", None), ({}, "--nnodes 2", None)])
def test_engine_on_one_machine_has_a_loopback_address(environment: dict[str, str], extra: str,
                                                      address: str | None) -> None:
    plan = planned(machine(HUGE), llama_8b(), VLLM_EXTRA_ARGS=extra)
    assert main._host_address(environment, plan).get("VLLM_HOST_IP") == address
