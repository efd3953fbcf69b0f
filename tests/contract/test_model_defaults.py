"""The recorded defaults of the configuration classes are those of the installed transformers and vLLM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.contract


def test_recording_is_that_of_the_installed_classes() -> None:
    printed = subprocess.run([sys.executable, str(ROOT / "tools" / "record_model_defaults.py"), "--print"], check=True,
                             capture_output=True, text=True).stdout
    assert printed == (ROOT / "src" / "shoehorn" / "model" / "model_defaults.json").read_text(encoding="utf-8")
