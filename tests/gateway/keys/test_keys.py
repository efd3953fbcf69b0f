"""API keys: hashes, the key file of the volume, and `shoehorn keys`."""

from __future__ import annotations

import argparse
import json
import logging
import re
import threading
import time
from pathlib import Path

import pytest

from shoehorn.commands import keys as command
from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import Settings, load
from shoehorn.gateway.keys import sources
from shoehorn.gateway.keys.api_key import Key, Keyring, new_token, parse_day, parse_expiry, parse_limits
from shoehorn.gateway.keys.store import KeyStore, parse
from shoehorn_vllm.protocol import KeyLimits

TOKEN = "sk-given-by-the-user"
NOW = 1_800_000_000.0


def _environment(home: Path, **more: str) -> dict[str, str]:
    return {"MODELS_DIR": str(home), "RUN_DIR": str(home), "MODEL_ID": "a/b", **more}


def _settings(home: Path, **more: str) -> Settings:
    return load(_environment(home, **more))


def _run(home: Path, *words: str, **more: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(words), _environment(home, **more))


def _ring(home: Path) -> Keyring:
    return Keyring(KeyStore(home).read())


# --- one key

def test_key_matches_its_token_only_and_reveals_nothing() -> None:
    tokens = [new_token() for _ in range(3)]
    keys = [Key.make(f"user-{number}", token, NOW) for number, token in enumerate(tokens)]
    ring = Keyring(keys)
    for _ in range(2):  # the second time it is remembered
        assert [ring.find(token.encode()) for token in tokens] == keys
        for wrong in (b"", tokens[0][:-1].encode(), tokens[0].encode() + b"x", tokens[0].swapcase().encode(), b"\xff"):
            assert ring.find(wrong) is None
    for key, token in zip(keys, tokens, strict=True):
        assert re.fullmatch(r"sk-[\w-]{43}", token)
        assert token not in repr(key) + json.dumps(key.to_json())
        assert key.digest.hex() not in repr(key)


def test_equal_tokens_have_different_hashes() -> None:
    assert Key.make("a", TOKEN, NOW).digest != Key.make("a", TOKEN, NOW).digest


def test_every_key_is_compared_with_or_without_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    genuine = Key.matches
    monkeypatch.setattr(Key, "matches", lambda key, token: compared.append(key.name) or genuine(key, token))
    for token in ("sk-key-a-000", "sk-key-c-000", "sk-no-such-key"):
        ring = Keyring(Key.make(name, f"sk-key-{name}-000", NOW) for name in "abc")
        compared.clear()
        ring.find(token.encode())
        assert compared == ["a", "b", "c"]


def test_limits_are_formatted_as_the_engine_parses_them() -> None:
    limits = parse_limits({"requests_per_minute": "60", "body_bytes": "1MiB"})
    assert limits.to_header() == "requests_per_minute=60;body_bytes=1048576"
    assert KeyLimits().to_header() == ""
    assert KeyLimits.from_header(limits.to_header()) == limits


@pytest.mark.parametrize("words", [{"rpm": "1"}, {"concurrent": "0"}, {"concurrent": "-1"}, {"max_tokens": "1e3"},
                                   {"max_tokens": ""}, {"body_bytes": "much"}, {"concurrent": "٣"}])
def test_invalid_limit_is_rejected(words: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"limit|integer|size"):
        parse_limits(words)


@pytest.mark.parametrize(("text", "expected"), [("30d", NOW + 30 * 86400), ("12h", NOW + 43200), ("90m", NOW + 5400),
                                                ("2w", NOW + 14 * 86400), ("2027-01-31", 1801353600.0)])
def test_expiry_is_parsed(text: str, expected: float) -> None:
    assert parse_expiry(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "soon", "30", "-1d", "2027-02-30", "1y"])
def test_invalid_expiry_is_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="30d"):
        parse_expiry(text, NOW)
    with pytest.raises(ValueError, match="2027-01-31"):
        parse_day(text)


@pytest.mark.parametrize("name", ["", "a b", "-a", "ä", "a" * 65, "a\nb", "a;b", "a=b", 7, None])
def test_name_that_could_break_a_header_or_a_line_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="invalid name"):
        Key.make(name, TOKEN, NOW)


# --- the volume

def test_first_key_is_created_once_and_only_its_hash_is_stored(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    new_key = store.create_first(NOW)
    assert new_key is not None
    assert store.create_first(NOW) is None
    assert store.file.stat().st_mode & 0o777 == 0o600
    assert new_key.token not in store.file.read_text() + repr(new_key)
    assert _ring(tmp_path).find(new_key.token.encode()) == new_key.key
    assert new_key.key.name == "default"


def test_concurrent_starts_create_one_key(tmp_path: Path) -> None:
    new_keys = []
    gate = threading.Barrier(8)

    def start() -> None:
        gate.wait()
        new_keys.append(KeyStore(tmp_path).create_first(NOW))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([new_key for new_key in new_keys if new_key]) == 1


def test_concurrent_changes_lose_no_key(tmp_path: Path) -> None:
    threads = [threading.Thread(target=KeyStore(tmp_path).add, args=(Key(f"n{number}", b"", b"", NOW),))
               for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in KeyStore(tmp_path).read()} == {f"n{number}" for number in range(12)}


def test_key_file_readable_by_others_is_made_private(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    store = KeyStore(tmp_path)
    store.create_first(NOW)
    store.file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        store.read()
    assert store.file.stat().st_mode & 0o777 == 0o600
    assert "made the key file private" in caplog.text
    store.file.chmod(0o666)
    monkeypatch.setattr("os.fchmod", lambda *_: None)
    store.read()
    assert "has no file modes" in caplog.text


def test_truncated_key_file_is_rejected_at_every_length(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.create_first(NOW)
    store.add(Key("alice", b"", b"", NOW, NOW + 5, KeyLimits(concurrent=3)))
    text = store.file.read_text()
    assert len(parse(text, store.file)) == 2
    for size in range(len(text) - 2):
        with pytest.raises(SettingsError, match="is damaged"):
            parse(text[:size], store.file)
    document = json.loads(text)
    for change in ({"salt": ""}, {"digest": "00"}, {"digest": 7}, {"name": "a b"}, {"limits": {"concurrent": 0}},
                   {"limits": None}, {"expires": "never"}, {"name": "default"}):
        broken = {**document, "keys": [document["keys"][0], {**document["keys"][1], **change}]}
        with pytest.raises(SettingsError, match="is damaged"):
            parse(json.dumps(broken), store.file)
    for text in ("[" * 100_000, "7", '{"version": 2, "keys": []}'):
        with pytest.raises(SettingsError, match="is damaged"):
            parse(text, store.file)


def test_damaged_key_file_is_never_overwritten(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.create_first(NOW)
    store.file.write_text("half")
    for act in (lambda: store.create_first(NOW), lambda: store.add(Key("a", b"", b"", NOW)), lambda: store.revoke("a"),
                lambda: store.rotate("default", NOW)):
        with pytest.raises(SettingsError, match="is damaged"):
            act()
    assert store.file.read_text() == "half"


def test_unusable_volume_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / ".shoehorn").write_text("a file where the folder should be")
    store = KeyStore(tmp_path)
    for act in (store.read, lambda: store.create_first(NOW), lambda: store.revoke("a")):
        with pytest.raises(SettingsError, match="cannot read and write") as caught:
            act()
        assert "set API_KEY" in caught.value.remedy


def test_times_of_last_use_are_merged_for_known_names_only(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.save_last_used({"a": 5.0, "b": 9.0, "gone": 1.0}, ["a", "b", "never"])
    store.save_last_used({"a": 7.0, "b": 8.0}, ["a", "b"])
    assert store.last_used() == {"a": 7.0, "b": 9.0}
    store.file.with_name("keys-used.json").write_text("[]")
    assert store.last_used() == {}


# --- the command

def test_add_prints_only_the_key_and_only_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "add", "alice", "--expires", "30d", "--max-body", "1MiB", "--concurrent", "2") == 0
    shown = capsys.readouterr()
    token = shown.out.strip()
    assert "only once" in shown.err
    assert token not in shown.err
    key = _ring(tmp_path).find(token.encode())
    assert key is not None
    assert (key.name, key.limits) == ("alice", KeyLimits(concurrent=2, body_bytes=1 << 20))
    assert key.expires is not None
    assert 0 <= time.time() + 30 * 86400 - key.expires < 60
    _run(tmp_path, "list")
    _run(tmp_path, "list", "--json")
    listed = capsys.readouterr().out
    assert "alice" in listed
    assert token not in listed


@pytest.mark.parametrize(("words", "match"), [
    (["add", "a b"], "invalid name"), (["add", "a", "--concurrent", "0"], "concurrent"),
    (["add", "a", "--expires", "soon"], "30d"), (["add", "a", "--max-body", "x"], "size"),
    (["add", "default"], "already exists"), (["revoke", "absent"], "'absent': not found"),
    (["rotate", "absent"], "not found")])
def test_invalid_argument_is_reported_and_changes_no_key(tmp_path: Path, words: list[str], match: str) -> None:
    store = KeyStore(tmp_path)
    store.create_first(NOW)
    before = store.file.read_text()
    with pytest.raises(SettingsError, match=match) as caught:
        _run(tmp_path, *words)
    assert "shoehorn keys" in caught.value.remedy
    assert store.file.read_text() == before


def test_rotation_keeps_limits_and_invalidates_the_old_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _run(tmp_path, "add", "alice", "--expires", "2w", "--concurrent", "2")
    old = capsys.readouterr().out.strip()
    before = _ring(tmp_path).find(old.encode())
    _run(tmp_path, "rotate", "alice")
    after = _ring(tmp_path).find(capsys.readouterr().out.strip().encode())
    assert before is not None
    assert after is not None
    assert (after.name, after.expires, after.limits) == (before.name, before.expires, before.limits)
    assert _ring(tmp_path).find(old.encode()) is None
    _run(tmp_path, "revoke", "alice")
    assert KeyStore(tmp_path).read() == ()


def test_keys_of_other_sources_are_listed_and_not_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys"
    file.write_text(f"carol {TOKEN}-of-carol expires=2020-01-01 concurrent=3\n")
    more = {"API_KEY": TOKEN, "API_KEYS_FILE": str(file)}
    _run(tmp_path, "add", "alice", **more)
    capsys.readouterr()
    _run(tmp_path, "list", "--json", **more)
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["source"] for name, row in rows.items()} == {
        "alice": "volume", "carol": "API_KEYS_FILE", "default": "API_KEY"}
    assert (rows["carol"]["expired"], rows["carol"]["limits"]) == (True, {"concurrent": 3})
    assert rows["default"]["created"] is None
    _run(tmp_path, "list", **more)
    table = capsys.readouterr().out
    assert re.search(r"^carol +API_KEYS_FILE .* never +expired +concurrent=3$", table, re.M)
    for name, source in (("default", "API_KEY"), ("carol", "API_KEYS_FILE")):
        for action in ("rotate", "revoke", "add"):
            with pytest.raises(SettingsError, match=f"already exists in {source}"):
                _run(tmp_path, action, name, **more)


def test_list_without_keys_reports_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "list") == 0
    shown = capsys.readouterr()
    assert (shown.out, "no keys" in shown.err) == ("", True)


def test_command_lists_the_keys_of_the_sources(tmp_path: Path) -> None:
    settings = _settings(tmp_path, API_KEY=TOKEN)
    KeyStore(tmp_path).create_first(NOW)  # a key of this name in the volume gives way to API_KEY
    assert sources.prepare(settings) is None
    ring = sources.KeySources(settings).current()
    assert set(ring.keys) == set(sources.list_keys(settings)) == {"default"}
    assert ring.find(TOKEN.encode()) is not None
