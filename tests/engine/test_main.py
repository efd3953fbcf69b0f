"""Parts of the engine program that need no process: the address of one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoehorn.common.errors import EXIT_BAD_SETTINGS
from shoehorn.engine import main
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile


@pytest.mark.parametrize(("environment", "address"), [({}, "127.0.0.1"), ({"VLLM_HOST_IP": "10.0.0.1"}, None)])
def test_engine_on_one_machine_has_a_loopback_address(environment: dict[str, str], address: str | None) -> None:
    assert main._host_address(environment).get("VLLM_HOST_IP") == address


def test_settings_that_became_invalid_end_the_container_with_their_code(tmp_path: Path) -> None:
    environment = {"RUN_DIR": str(tmp_path), "API_KEY_FILE": str(tmp_path / "gone")}
    assert main.main(environment) == EXIT_BAD_SETTINGS
    assert RunDir(tmp_path).exit_code.read_text() == f"{EXIT_BAD_SETTINGS}\n"  # the watcher keeps it
    state = StateFile(tmp_path).read()
    assert state.phase is Phase.FAILED
    assert "API_KEY" in state.cause


def test_invalid_settings_without_a_run_directory_leave_no_files(tmp_path: Path) -> None:
    assert main.main({"RUN_DIR": str(tmp_path / "none"), "PORT": "high"}) == EXIT_BAD_SETTINGS
    assert not list(tmp_path.iterdir())
