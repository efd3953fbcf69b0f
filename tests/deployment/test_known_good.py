"""Last known good options: saved on the volume for one machine, model and settings."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from shoehorn.config import profiles, settings
from shoehorn.deployment import known_good
from shoehorn.hardware.types import Gpu, Hardware
from support.plans import GIB
from support.plans import llama_8b as model_8b
from support.plans import llama_70b as model_70b


def test_last_known_good_options_are_saved_for_the_same_start_only(tmp_path: Path,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    loaded = settings.load({"MODELS_DIR": str(tmp_path)})
    gpu = Gpu(0, "GPU-0", "NVIDIA GeForce RTX 4090", 24 * GIB, 24 * GIB, (8, 9), 4, 16, False)
    machine = Hardware((gpu,), "580.95", 64 * GIB, 60 * GIB, 8.0)
    profile = profiles.automatic()
    path = known_good.location(loaded, machine, profile, model_8b())
    assert known_good.read(path) == {}
    known_good.write(path, {"max-num-seqs": 4}, "no_kv_cache_memory: max-num-seqs 8 -> 4")
    assert known_good.read(path) == {"max-num-seqs": 4}
    same = replace(machine, host_available_bytes=GIB, gpus=(replace(gpu, free_bytes=20 * GIB),))
    assert known_good.location(loaded, same, profile, model_8b()) == path, "free memory does not count"
    others = [known_good.location(loaded, replace(machine, driver_version="590.1"), profile, model_8b()),
              known_good.location(loaded, replace(machine, gpus=(gpu, gpu)), profile, model_8b()),
              known_good.location(loaded, machine, profiles.load("7gb"), model_8b()),
              known_good.location(loaded, machine, profile, model_70b()),
              known_good.location(replace(loaded, max_model_len=100), machine, profile, model_8b()),
              known_good.location(replace(loaded, vllm_extra_args=("--seed", "1")), machine, profile, model_8b())]
    assert len({path, *others}) == 7
    assert "sk-" not in path.read_text()
    with caplog.at_level(logging.WARNING):
        path.write_text('{"options": ')
        assert known_good.read(path) == {}
    assert "Ignoring unreadable known-good options" in caplog.text


def test_read_only_volume_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        known_good.write(tmp_path / "file" / "worked" / "x.json", {}, "")
    assert "Cannot save known-good options" in caplog.text
