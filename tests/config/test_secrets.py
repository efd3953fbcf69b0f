"""No program gets a secret or a switch that it has no use for; two libraries' holes are seen open, then closed."""

from __future__ import annotations

import ast
import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from shoehorn.config import secrets
from shoehorn.config.settings import TABLE
from shoehorn.engine import environment as environment_module
from shoehorn.engine.environment import engine_environment


@pytest.mark.parametrize("name", [
    "API_KEY", "API_KEY_FILE", "MODELSCOPE_API_TOKEN", "MODELSCOPE_API_TOKEN_FILE", "HF_TOKEN", "VLLM_API_KEY",
    "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "REDIS_PASSWORD",
    "GOOGLE_APPLICATION_CREDENTIALS", "openai_api_key", "EXA_APIKEY",
])
def test_what_is_named_like_a_secret_is_one(name: str) -> None:
    assert secrets.is_secret(name)


@pytest.mark.parametrize("name", [
    "PATH", "TOKENIZERS_PARALLELISM", "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", "XAUTHORITY", "SSH_AUTH_SOCK", "TLS_KEY_FILE",
    "API_KEYS_FILE", "LD_LIBRARY_PATH", "KEYBOARD", "NVIDIA_VISIBLE_DEVICES",
])
def test_what_is_not_named_like_a_secret_stays(name: str) -> None:
    assert secrets.without_secrets({name: "x"}) == {name: "x"}


def test_every_secret_setting_is_named_like_one() -> None:
    names = [name for row in TABLE if row.secret for name in (row.name, f"{row.name}_FILE")]
    assert names
    assert [name for name in names if not secrets.is_secret(name)] == []


def test_the_engine_gets_neither_secrets_nor_switches(tmp_path: Path) -> None:
    bad = dict.fromkeys((*environment_module.SWITCHES, "PYTHONOPTIMIZE", "STANDARD_PIP_ARGS", "HF_TOKEN", "API_KEY",
                         "SAGEMAKER_MODEL_PATH", "CUSTOM_SCRIPT_FILENAME", "CUSTOM_FASTAPI_PING_HANDLER"), "1")
    good = {"PATH": "/bin", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment = engine_environment({**bad, **good}, {}, tmp_path)
    assert environment.keys() & bad.keys() == {"SAGEMAKER_MODEL_PATH"}
    assert environment["SAGEMAKER_MODEL_PATH"] == str(tmp_path / "nothing")
    assert environment.items() >= {**good, **environment_module.BOUNDS}.items()


def test_the_workers_talk_to_each_other_over_loopback(tmp_path: Path) -> None:
    """Gloo, which PyTorch also starts for a single worker, would listen on the container's network."""
    assert engine_environment({"GLOO_SOCKET_IFNAME": "eth0"}, {}, tmp_path)["GLOO_SOCKET_IFNAME"] == "lo"


def test_an_operator_may_set_other_bounds(tmp_path: Path) -> None:
    assert engine_environment({"VLLM_MAX_N_SEQUENCES": "9"}, {}, tmp_path)["VLLM_MAX_N_SEQUENCES"] == "9"


def test_the_switches_are_the_engines() -> None:
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
    """A folder in the place of /opt/ml/model, whose model.py leaves a mark when it runs."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    return folder


def _boot(planted: Path, environment: dict[str, str]) -> bool:
    """Whether model.py ran in what vLLM calls when it builds its server."""
    subprocess.run([sys.executable, "-c", _SERVER, str(planted)], env=environment, check=True, capture_output=True,
                   timeout=60)
    return (planted.parent / "ran").exists()


@pytest.mark.contract
def test_a_planted_model_py_runs_in_a_bare_environment(planted: Path) -> None:
    assert _boot(planted, dict(os.environ))


@pytest.mark.contract
@pytest.mark.parametrize("named", [False, True])
def test_a_planted_model_py_does_not_run_in_the_engines(planted: Path, tmp_path: Path, named: bool) -> None:
    outside = {**os.environ, **({"SAGEMAKER_MODEL_PATH": str(planted)} if named else {})}
    assert not _boot(planted, engine_environment(outside, {}, tmp_path))


class _Payload:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._mark), "w")


_BARE_HUB = "import modelscope_hub; modelscope_hub.HubApi(endpoint=\"http://127.0.0.1:9\")"
_OUR_HUB = """
import os
from shoehorn.config import settings
from shoehorn.hub import modelscope_download
loaded = settings.load({"RUN_DIR": os.environ["RUN_DIR"], "MODELS_DIR": os.environ["RUN_DIR"]})
modelscope_download._library(loaded).HubApi(endpoint="http://127.0.0.1:9", token=loaded.modelscope_api_token or "")
"""
_WITHOUT_TOKEN = """
import os
from shoehorn.config import settings
from shoehorn.hub import modelscope_download
loaded = settings.load({"RUN_DIR": os.environ["RUN_DIR"], "MODELS_DIR": os.environ["RUN_DIR"]})
modelscope_download._library(loaded).HubApi(endpoint="http://127.0.0.1:9")
"""


@pytest.mark.parametrize(("program", "runs"), [(_BARE_HUB, True), (_OUR_HUB, False), (_WITHOUT_TOKEN, False)])
@pytest.mark.parametrize("place", ["HOME", "MODELSCOPE_HOME", "RUN_DIR"])
def test_planted_cookies_are_unpickled_by_the_bare_library_only(tmp_path: Path, program: str, runs: bool,
                                                                place: str) -> None:
    mark = tmp_path / "ran"
    folder = {"HOME": "home/.modelscope/credentials", "MODELSCOPE_HOME": "hub/credentials",
              "RUN_DIR": "run/modelscope/credentials"}[place]
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "cookies").write_bytes(pickle.dumps(_Payload(mark)))
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MODELSCOPE_")}
    outside |= {"HOME": str(tmp_path / "home"), "RUN_DIR": str(tmp_path / "run")}
    if place == "MODELSCOPE_HOME":
        outside["MODELSCOPE_HOME"] = str(tmp_path / "hub")
    elif place == "RUN_DIR" and program == _BARE_HUB:
        outside["MODELSCOPE_HOME"] = str(tmp_path / "run" / "modelscope")
    subprocess.run([sys.executable, "-c", program], env=outside, check=False, capture_output=True, timeout=60)
    assert mark.exists() is runs
