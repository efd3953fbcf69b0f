"""Isolation of ModelScope's library, which unpickles files in its home."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest


class _Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self._mark), "w")


_BARE_LIBRARY = "import modelscope_hub; modelscope_hub.HubApi(endpoint=\"http://127.0.0.1:9\")"
_OUR_USE = """
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


@pytest.mark.parametrize(("program", "runs"), [(_BARE_LIBRARY, True), (_OUR_USE, False), (_WITHOUT_TOKEN, False)])
@pytest.mark.parametrize("place", ["HOME", "MODELSCOPE_HOME", "RUN_DIR"])
def test_planted_cookies_are_not_unpickled_by_our_use_of_the_library(tmp_path: Path, program: str, runs: bool,
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
    elif place == "RUN_DIR" and program == _BARE_LIBRARY:
        outside["MODELSCOPE_HOME"] = str(tmp_path / "run" / "modelscope")
    subprocess.run([sys.executable, "-c", program], env=outside, check=False, capture_output=True, timeout=60)
    assert mark.exists() is runs
