"""HAProxy's configuration: accepted by HAProxy, within the limit on open files."""

from __future__ import annotations

import resource
import subprocess
from pathlib import Path

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import load
from shoehorn.front import balancer_config
from support.replicas import write_secret

pytestmark = pytest.mark.process


def _write(folder: Path, replicas: str) -> Path:
    secret = write_secret(folder)
    settings = load({"ROLE": "front", "RUN_DIR": str(folder), "REPLICAS": replicas, "CLUSTER_SECRET_FILE": str(secret)})
    return balancer_config.write(settings, secret.read_text())


@pytest.mark.parametrize("replicas", ["10.0.0.2", "10.0.0.2:7000,[fd00::2],[fd00::3]:7000",
                                      "localhost,gpu2.invalid:7000"])
def test_haproxy_accepts_the_configuration_without_a_warning(tmp_path: Path, replicas: str) -> None:
    file = _write(tmp_path, replicas)
    checked = subprocess.run(["haproxy", "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    warnings = [line for line in checked.stderr.splitlines() if "[WARNING]" in line]
    assert all("could not resolve address 'gpu2.invalid'" in line for line in warnings)
    assert {path.stat().st_mode & 0o777 for path in (file, tmp_path / "peer.pem", tmp_path / "peers.pem")} == {0o600}


def test_names_are_resolved_again_and_addresses_need_no_resolver(tmp_path: Path) -> None:
    assert "resolvers system" not in _write(tmp_path, "10.0.0.2").read_text()
    assert "resolvers system resolve-prefer ipv4" in _write(tmp_path, "10.0.0.2,gpu2").read_text()


@pytest.mark.parametrize(("files", "connections"), [
    (resource.RLIM_INFINITY, balancer_config.MAX_CONNECTIONS), (1_000_000, balancer_config.MAX_CONNECTIONS),
    (20_000, 9965), (1024, 477), (64, 1)])
def test_connections_fit_into_the_open_files(files: int, connections: int) -> None:
    assert balancer_config.max_connections(3, files) == connections


def test_run_dir_that_haproxy_would_misread_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    with pytest.raises(SettingsError, match="RUN_DIR"):
        _write(folder, "10.0.0.2")
