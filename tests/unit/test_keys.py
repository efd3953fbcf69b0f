"""Where the key comes from, how it is kept, and the command that shows and rotates it."""

from __future__ import annotations

import argparse
import json
import logging
import re
import threading
from pathlib import Path

import pytest

from shoehorn import keys
from shoehorn.commands import keys as command
from shoehorn.errors import SettingsError
from shoehorn.settings import Settings, load

GIVEN = "sk-given-by-the-user"


def _environment(home: Path, **more: str) -> dict[str, str]:
    return {"MODELS_DIR": str(home), "RUN_DIR": str(home / "run"), "MODEL_ID": "a/b", **more}


def _settings(home: Path, **more: str) -> Settings:
    return load(_environment(home, **more))


def _run(home: Path, *words: str, **more: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words), _environment(home, **more))


def test_the_setting_wins_and_nothing_is_written(tmp_path: Path) -> None:
    keys.ensure(_settings(tmp_path / "volume"))
    key = keys.ensure(_settings(tmp_path / "volume", API_KEY=GIVEN))
    assert (key.value, key.origin) == (GIVEN, "setting")
    keys.ensure(_settings(tmp_path / "other", API_KEY=GIVEN))
    assert not (tmp_path / "other").exists()


def test_a_key_is_generated_once_and_kept_private(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    first, second = keys.ensure(settings), keys.ensure(settings)
    assert (first.origin, second.origin) == ("generated", "volume")
    assert first.value == second.value
    assert re.fullmatch(r"sk-[\w-]{43}", first.value)
    assert keys.path(settings).stat().st_mode & 0o777 == 0o600
    assert first.value not in repr(first) + str(first)


def test_many_starts_at_once_agree_on_one_key(tmp_path: Path) -> None:
    settings, found = _settings(tmp_path), []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        found.append(keys.ensure(settings))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({key.value for key in found}) == 1
    assert [key.origin for key in found].count("generated") == 1


def test_a_key_that_others_could_read_is_made_private_and_named(tmp_path: Path,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    settings = _settings(tmp_path)
    value = keys.ensure(settings).value
    keys.path(settings).chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert keys.ensure(settings).value == value
    assert keys.path(settings).stat().st_mode & 0o777 == 0o600
    assert "keys rotate" in caplog.text
    assert value not in caplog.text


def test_a_volume_without_modes_is_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings(tmp_path)
    keys.ensure(settings)
    keys.path(settings).chmod(0o666)
    monkeypatch.setattr("os.fchmod", lambda *_: None)
    keys.ensure(settings)
    assert "keeps no file modes" in caplog.text


@pytest.mark.parametrize("content", ["", "\n", "short", "two words of it", "sk-" + "x" * 600, 'sk-quo"te"', "键" * 8])
def test_a_damaged_key_file_is_refused_and_not_shown(tmp_path: Path, content: str) -> None:
    settings = _settings(tmp_path)
    keys.path(settings).parent.mkdir()
    keys.path(settings).write_text(content)
    with pytest.raises(SettingsError, match="no usable key") as caught:
        keys.ensure(settings)
    assert not content.strip() or content not in str(caught.value)
    assert "Delete the file" in caught.value.remedy


def test_a_volume_that_cannot_be_used_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / ".shoehorn").write_text("a file where the folder should be")
    for act in (keys.ensure, keys.in_force, keys.rotate):
        with pytest.raises(SettingsError, match="cannot be read or written") as caught:
            act(_settings(tmp_path))
        assert "set API_KEY" in caught.value.remedy


def test_rotation_replaces_the_volumes_key(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    old, new = keys.ensure(settings), keys.rotate(settings)
    assert old.value != new.value
    assert keys.in_force(settings) == keys.ApiKey(new.value, "volume")


def test_a_key_that_was_set_is_not_rotated(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="API_KEY"):
        _run(tmp_path, "rotate", API_KEY=GIVEN)
    assert not (tmp_path / ".shoehorn").exists()


def test_the_map_is_private_and_matches_exactly(tmp_path: Path) -> None:
    file = keys.write_map(tmp_path, ["sk-a.b+c=/~_-", "another-key"])
    assert file.stat().st_mode & 0o777 == 0o600
    patterns = re.findall(r'^"~(.+)" 1;$', file.read_text(), re.M)
    assert len(patterns) == 2
    assert re.search(patterns[0], "Bearer sk-a.b+c=/~_-")
    assert re.search(patterns[1], "bearer another-key")
    for wrong in ("Bearer sk-axb+c=/~_-", "Bearer sk-a.bbc=/~_-", "Bearer sk-A.b+c=/~_-", "xBearer sk-a.b+c=/~_-",
                  "Bearer sk-a.b+c=/~_-x", "Bearersk-a.b+c=/~_-", "Bearer "):
        assert not re.search(patterns[0], wrong), wrong


@pytest.mark.parametrize("key", ["", " ", "short", 'sk-"; default 1; "', "sk-new\nline-x", "sk-(group)", "x" * 513])
def test_no_map_is_written_for_what_can_be_no_key(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="a key has"):
        keys.write_map(tmp_path, ["sk-good-enough", key])
    assert not list(tmp_path.iterdir())


def test_show_prints_the_key_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="no key yet"):
        _run(tmp_path, "show")
    key = keys.ensure(_settings(tmp_path))
    for more, value, origin in (({}, key.value, "api_key"), ({"API_KEY": GIVEN}, GIVEN, "API_KEY")):
        assert _run(tmp_path, "show", **more) == 0
        shown = capsys.readouterr()
        assert shown.out == value + "\n"
        assert origin in shown.err
    _run(tmp_path, "show", "--json")
    assert json.loads(capsys.readouterr().out) == {
        "key": key.value, "origin": "volume", "file": str(tmp_path / ".shoehorn" / "api_key")}


def test_rotate_without_a_server_holds_from_the_next_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "rotate") == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == keys.ensure(_settings(tmp_path)).value
    assert "next start" in shown.err
    assert not (tmp_path / "run").exists()
