"""ROLE=single: the rendered files are, byte for byte, those of the version before roles existed."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import yaml

from shoehorn.common.paths import HOME
from shoehorn.config.settings import load
from shoehorn.engine.environment import engine_environment
from shoehorn.engine.launch_config import engine_arguments
from shoehorn.gateway import nginx_config
from shoehorn.runtime.supervisord_config import supervisord_config

GOLDEN = HOME / "tests" / "golden" / "single"
ENVIRONMENT = {"PATH": "/usr/bin", "HOME": "/home/shoehorn", "NCCL_DEBUG": "WARN", "OTHER": "kept",
               "API_KEY": "secret-key"}


@pytest.mark.parametrize("role", [{}, {"ROLE": "single"}])
def test_rendered_files_are_unchanged(role: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(nginx_config, "_open_files", lambda: 8256)
    settings = load({"MODEL_ID": "owner/model", **role})
    rendered = {
        "supervisord.conf": supervisord_config(settings, None),
        "nginx.conf": nginx_config.render(settings, Path("/run/shoehorn"), None),
        "vllm.yaml": yaml.safe_dump(engine_arguments(settings, {"max-model-len": 8192}, Path("/models/owner/model"))),
        "engine.env": "".join(f"{name}={value}\n" for name, value in sorted(engine_environment(
            {**ENVIRONMENT, **role}, {"VLLM_HOST_IP": "127.0.0.1"}, Path("/run/shoehorn")).items()) if name != "ROLE"),
    }
    assert rendered.keys() == {path.name for path in GOLDEN.iterdir()}
    for name, text in rendered.items():
        plain = text.replace(sys.executable, "/usr/bin/python3").replace(str(HOME), "/opt/shoehorn")
        assert plain == (GOLDEN / name).read_text(encoding="utf-8"), name
