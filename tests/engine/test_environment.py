"""Environment of the engine: no secrets, no switches, no planted code."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoehorn.engine import environment as environment_module
from shoehorn.engine.environment import engine_environment


def test_engine_gets_neither_secrets_nor_switches(tmp_path: Path) -> None:
    bad = dict.fromkeys((*environment_module.SWITCHES, "PYTHONOPTIMIZE", "STANDARD_PIP_ARGS", "HF_TOKEN", "API_KEY",
                         "SAGEMAKER_MODEL_PATH", "CUSTOM_SCRIPT_FILENAME", "CUSTOM_FASTAPI_PING_HANDLER"), "1")
    good = {"PATH": "/bin", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = engine_environment({**bad, **good}, {}, tmp_path)
    assert environment.keys() & bad.keys() == {"SAGEMAKER_MODEL_PATH"}
    assert environment["SAGEMAKER_MODEL_PATH"] == str(tmp_path / "nothing")
    assert environment.items() >= {**good, **environment_module.BOUNDS}.items()


def test_workers_communicate_over_loopback(tmp_path: Path) -> None:
    """Gloo, which PyTorch starts even for one worker, would listen on the container's network."""
    assert engine_environment({"GLOO_SOCKET_IFNAME": "eth0"}, {}, tmp_path)["GLOO_SOCKET_IFNAME"] == "lo"


def test_engine_sees_the_gpus_of_the_plan(tmp_path: Path) -> None:
    environment = {"CUDA_VISIBLE_DEVICES": "0,1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    planned = {"CUDA_VISIBLE_DEVICES": "GPU-b", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert engine_environment(environment, planned, tmp_path).items() >= planned.items()


def test_operator_can_set_other_bounds(tmp_path: Path) -> None:
    assert engine_environment({"VLLM_MAX_N_SEQUENCES": "9"}, {}, tmp_path)["VLLM_MAX_N_SEQUENCES"] == "9"


def test_switches_exist_in_vllm() -> None:
    specification = importlib.util.find_spec("vllm")
    assert specification is not None
    assert specification.origin is not None
    tree = ast.parse((Path(specification.origin).parent / "envs.py").read_text(encoding="utf-8"))
    real = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert real >= environment_module.SWITCHES | environment_module.BOUNDS.keys()


_SERVER = """
import sys
from fastapi import FastAPI
from model_hosting_container_standards.sagemaker import bootstrap
from model_hosting_container_standards.sagemaker.config import SageMakerDefaults
assert SageMakerDefaults.SCRIPT_PATH == "/opt/ml/model/"
SageMakerDefaults.SCRIPT_PATH = sys.argv[1]
bootstrap(FastAPI())
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Return a folder in place of /opt/ml/model, whose model.py creates a file when it runs."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    return folder


def _boot(planted: Path, environment: dict[str, str]) -> bool:
    """Run what vLLM calls when it builds its server; return whether model.py ran."""
    subprocess.run([sys.executable, "-c", _SERVER, str(planted)], env=environment, check=True, capture_output=True,
                   timeout=60)
    return (planted.parent / "ran").exists()


@pytest.mark.contract
def test_planted_model_py_runs_in_an_unsanitized_environment(planted: Path) -> None:
    assert _boot(planted, dict(os.environ))


@pytest.mark.contract
@pytest.mark.parametrize("named", [False, True])
def test_planted_model_py_does_not_run_in_the_engines_environment(planted: Path, tmp_path: Path, named: bool) -> None:
    outside = {**os.environ, **({"SAGEMAKER_MODEL_PATH": str(planted)} if named else {})}
    assert not _boot(planted, engine_environment(outside, {}, tmp_path))
