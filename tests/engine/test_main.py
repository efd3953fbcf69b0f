"""Parts of the engine program that need no process: what a child's end means, and the address of one machine."""

from __future__ import annotations

import pytest

from shoehorn.common.errors import DoesNotFitError, ModelUnavailableError, SettingsError, ShoehornError
from shoehorn.engine import fetch, main
from support.plans import HUGE, llama_8b, machine, planned


@pytest.mark.parametrize(("status", "complaints", "kind", "cause", "remedy"), [
    (4, ["shoehorn: The volume is full.", "  -> Free space."], ModelUnavailableError, "The volume is full.",
     "Free space."),
    (4, ["of a library", "shoehorn: The hub", "is gone.", "  -> Wait."], ModelUnavailableError, "The hub\nis gone.",
     "Wait."),
    (2, ["shoehorn: It cannot be converted."], SettingsError, "It cannot be converted.", ""),
    (3, ["shoehorn: It does not fit."], DoesNotFitError, "It does not fit.", ""),
    (1, ["Traceback (most recent call last):", "KeyError: 'a'"], ModelUnavailableError,
     "Traceback (most recent call last):\nKeyError: 'a'", ""),
    (1, [], ModelUnavailableError, "`shoehorn pull` ended with status 1.", ""),
    (-9, ["shoehorn: half a"], ModelUnavailableError,
     "`shoehorn pull` was ended by signal 9, most often because memory ran out.",
     "Start again: what is done is kept and gone on with."),
    (-11, [], ModelUnavailableError, "`shoehorn pull` was ended by signal 11.",
     "Start again: what is done is kept and gone on with.")])
def test_a_childs_last_words_are_ours(status: int, complaints: list[str], kind: type[ShoehornError], cause: str,
                                      remedy: str) -> None:
    told = fetch._failed("pull", status, complaints)
    assert (type(told), told.cause, told.remedy) == (kind, cause, remedy)


@pytest.mark.parametrize(("environment", "extra", "address"), [
    ({}, "", "127.0.0.1"), ({"VLLM_HOST_IP": "10.0.0.1"}, "", None),
    ({}, "--distributed-executor-backend ray", None), ({}, "--nnodes 2", None)])
def test_an_engine_on_one_machine_looks_for_no_address(environment: dict[str, str], extra: str,
                                                       address: str | None) -> None:
    plan = planned(machine(HUGE), llama_8b(), VLLM_EXTRA_ARGS=extra)
    assert main._address(environment, plan).get("VLLM_HOST_IP") == address
