"""Log formats."""

from __future__ import annotations

import json
import logging

import pytest

from shoehorn.common import logging_config


def test_json_format_is_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    logging_config.configure("json")
    logging.getLogger("engine").info("loading %s", "a\nb 鞋")
    record = json.loads(capsys.readouterr().out)
    assert (record["program"], record["level"], record["message"]) == ("engine", "INFO", "loading a\nb 鞋")
    logging.getLogger().handlers.clear()
