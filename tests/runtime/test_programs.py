"""Programs exist as modules, and supervisord starts exactly these."""

from __future__ import annotations

import configparser
import importlib.util
import shlex
from pathlib import Path

import pytest

from shoehorn.config.settings import load
from shoehorn.runtime import programs
from shoehorn.runtime.supervisord_config import supervisord_config

NAMES = {name: value for name, value in vars(programs).items() if name.isupper()}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"VLLM"}))
def test_program_is_a_module_that_runs(name: str) -> None:
    specification = importlib.util.find_spec(NAMES[name])
    assert specification is not None
    assert specification.origin is not None
    assert '__name__ == "__main__"' in Path(specification.origin).read_text(encoding="utf-8")


def test_supervisord_starts_the_programs(tmp_path: Path) -> None:
    settings = load({"RUN_DIR": str(tmp_path), "MODELS_DIR": str(tmp_path), "MODEL_ID": "a/b"})
    config = configparser.RawConfigParser()
    config.read_string(supervisord_config(settings, None))
    modules = {section.partition(":")[2]: shlex.split(config[section]["command"])[2]
               for section in config.sections() if "-m" in config[section].get("command", "").split()}
    assert modules == {"watcher": programs.EVENT_LISTENER, "exporter": programs.EXPORTER, "engine": programs.ENGINE,
                       "keys": programs.KEYS}
