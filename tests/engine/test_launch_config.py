"""Rendered files, parsed by their readers: YAML, and supervisord's own option parser."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import yaml
from supervisor.options import ServerOptions

from shoehorn.config.settings import Settings, load
from shoehorn.engine.launch_config import engine_arguments, most_requests, write_engine_config
from shoehorn.runtime import programs
from shoehorn.runtime.shutdown import ENGINE_STOP_SECONDS, MARGIN_SECONDS
from shoehorn.runtime.supervisord_config import supervisord_config, write_supervisord_config


def _settings(run_dir: Path, **more: str) -> Settings:
    run_dir.mkdir(parents=True, exist_ok=True)
    return load({"RUN_DIR": str(run_dir), "MODEL_ID": "a/b", "API_KEY": "sk-canary-key", **more})


def _parsed(settings: Settings) -> ServerOptions:
    options = ServerOptions()
    options.realize(["-c", str(write_supervisord_config(settings, None))])
    return options


@pytest.mark.parametrize("name", ["run", "with space", "percent%d", 'quote"and;semicolon', "鞋"])
def test_supervisord_parses_any_run_dir(tmp_path: Path, name: str) -> None:
    settings = _settings(tmp_path / name)
    configs = {config.name: config.process_configs[0] for config in _parsed(settings).process_group_configs}
    assert set(configs) == {"watcher", "exporter", "engine", "keys", "gateway"}
    assert shlex.split(configs["gateway"].command)[:3] == ["nginx", "-c", str(settings.run_dir / "nginx.conf")]
    assert shlex.split(configs["watcher"].command) == [
        sys.executable, "-m", programs.EVENT_LISTENER, str(settings.run_dir)]


def test_programs_stop_engine_first_and_watcher_last(tmp_path: Path) -> None:
    groups = sorted(_parsed(_settings(tmp_path)).process_group_configs, key=lambda group: -group.priority)
    assert [group.name for group in groups] == ["engine", "gateway", "keys", "exporter", "watcher"]


def test_each_program_has_time_to_stop_and_leaves_no_process_group(tmp_path: Path) -> None:
    groups = _parsed(_settings(tmp_path, DRAIN_TIMEOUT="40")).process_group_configs
    programs = {group.name: group.process_configs[0] for group in groups}
    assert programs["gateway"].stopwaitsecs > 40
    assert programs["engine"].stopwaitsecs > 40 + MARGIN_SECONDS + ENGINE_STOP_SECONDS
    assert all(programs[name].killasgroup for name in ("gateway", "keys", "engine", "exporter"))
    assert not programs["engine"].stopasgroup


def test_documented_exit_codes_are_final(tmp_path: Path) -> None:
    groups = _parsed(_settings(tmp_path)).process_group_configs
    engine = {group.name: group.process_configs[0] for group in groups}["engine"]
    assert engine.exitcodes == [0, 2, 3, 4, 5]
    assert engine.startsecs == 0


def test_user_is_configured_for_root_only(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    assert "user = root" in supervisord_config(settings, "root")
    assert "\nuser" not in supervisord_config(settings, None)


def test_engine_listens_on_a_unix_socket_only(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    path = write_engine_config(settings, {"dtype": "bfloat16", "max-model-len": 512, "enforce-eager": True}, tmp_path)
    arguments = yaml.safe_load(path.read_text())
    assert arguments["uds"] == str(tmp_path / "engine.sock")
    assert "host" not in arguments
    assert "port" not in arguments
    assert (arguments["max-model-len"], arguments["enforce-eager"]) == (512, True)


def test_plan_cannot_override_fixed_options(tmp_path: Path) -> None:
    arguments = engine_arguments(_settings(tmp_path), {"uds": "/elsewhere", "model": "/other"}, tmp_path)
    assert arguments["uds"] == str(tmp_path / "engine.sock")
    assert arguments["model"] == str(tmp_path)


def test_rendered_files_contain_no_secret(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    write_supervisord_config(settings, None)
    write_engine_config(settings, {}, tmp_path)
    assert not [file for file in tmp_path.iterdir() if "canary" in file.read_text()]


def test_queue_is_always_bounded(tmp_path: Path) -> None:
    assert most_requests(_settings(tmp_path), {"max-num-seqs": 8}) == 40
    assert most_requests(_settings(tmp_path), {}) == 5 * 256
    assert most_requests(_settings(tmp_path, MAX_QUEUED_REQUESTS="0"), {"max-num-seqs": 8}) == 8
    assert most_requests(_settings(tmp_path, MAX_QUEUED_REQUESTS="7"), {"max-num-seqs": 8}) == 15
