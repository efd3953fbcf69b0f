"""Answers of the key service, and its sources of keys. With nginx: tests/gateway/test_gateway_keys.py."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import Settings, load
from shoehorn.gateway.error_messages import REFUSED_KEYS
from shoehorn.gateway.keys.api_key import Key, Keyring
from shoehorn.gateway.keys.service import Headers, KeyService, RefusedKeyError, find_token, save_last_used
from shoehorn.gateway.keys.sources import KeySources, parse_lines, prepare
from shoehorn.gateway.keys.store import KeyStore
from shoehorn.runtime.server_program import listen
from shoehorn_vllm.protocol import KeyLimits

TOKEN = "sk-Canary.Key+with/all~kinds_of-Characters="
OTHER = "sk-another-key-0123456789"
NOW = 1_800_000_000.0
FILE = Path("/run/secrets/keys")


def _settings(home: Path, **more: str) -> Settings:
    return load({"MODELS_DIR": str(home), "RUN_DIR": str(home), "MODEL_ID": "a/b", **more})


def _bearer(value: str) -> tuple[bytes, bytes]:
    return b"authorization", value.encode("latin-1")


def _plain(value: str) -> tuple[bytes, bytes]:
    return b"x-api-key", value.encode("latin-1")


# --- headers

@pytest.mark.parametrize("headers", [
    [_bearer(f"Bearer {TOKEN}")], [_bearer(f"bearer {TOKEN}")], [_bearer(f"BEARER   {TOKEN}")], [_plain(TOKEN)],
    [_plain(TOKEN), _bearer(f"Bearer {TOKEN}")], [(b"cookie", b"a=b"), _plain(TOKEN), (b"accept", b"*/*")]])
def test_one_key_is_parsed(headers: Headers) -> None:
    assert find_token(headers) == TOKEN.encode()


@pytest.mark.parametrize("headers", [
    [], [(b"cookie", TOKEN.encode())], [_bearer(TOKEN)], [_bearer(f"Bearer{TOKEN}")], [_bearer(f"Bearer\t{TOKEN}")],
    [_bearer(f"Bearer {TOKEN} ")], [_bearer(f" Bearer {TOKEN}")], [_bearer(f"Bearer {TOKEN}, Bearer {TOKEN}")],
    [_bearer(f"Bearer {TOKEN} {TOKEN}")], [_bearer(f"Basic {TOKEN}")], [_bearer("")], [_bearer("Bearer")],
    [_bearer("Bearer short")], [_bearer("Bearer " + "x" * 513)], [_bearer(f"Bearer {TOKEN}\xff")],
    [_bearer(f"Bearer {TOKEN}")] * 2, [_plain(TOKEN)] * 2, [_plain("")], [_plain(f"Bearer {TOKEN}")],
    [_plain(f"{TOKEN},{TOKEN}")], [_plain(TOKEN), _bearer(f"Bearer {OTHER}")], [_plain(TOKEN), _bearer("Basic x")],
    [_plain(""), _bearer(f"Bearer {TOKEN}")], [_plain(TOKEN), _bearer(f"Bearer {TOKEN}"), _plain(OTHER)]])
def test_other_headers_contain_no_key(headers: Headers) -> None:
    with pytest.raises(RefusedKeyError):
        find_token(headers)


@pytest.mark.parametrize(("headers", "reason"), [
    ([], "missing"), ([_bearer(f"Basic {TOKEN}")], "malformed"), ([_plain(TOKEN), _bearer("Basic x")], "malformed"),
    ([_plain(TOKEN)] * 2, "repeated"), ([_plain(TOKEN), _bearer(f"Bearer {OTHER}")], "conflicting"),
    ([_plain("sk-nobody-has-this")], "incorrect"), ([_plain(OTHER)], "expired")])
def test_refusal_has_a_reason_with_a_message(headers: Headers, reason: str) -> None:
    service = _service(Key.make("alice", TOKEN, NOW), Key.make("bob", OTHER, NOW - 9, expires=NOW - 1))
    assert service.answer(headers) == (401, [(b"x-shoehorn-refusal", reason.encode())])
    assert reason in REFUSED_KEYS


# --- answers

def _service(*keys: Key) -> KeyService:
    ring = Keyring(keys)
    return KeyService(lambda: ring, lambda: NOW)


def test_valid_key_returns_its_name_and_limits() -> None:
    service = _service(Key.make("alice", TOKEN, NOW, limits=KeyLimits(concurrent=4, body_bytes=9)),
                       Key.make("bob", OTHER, NOW, expires=NOW + 1))
    assert service.answer([_plain(TOKEN)]) == (200, [(b"x-shoehorn-key", b"alice"),
                                                     (b"x-shoehorn-limits", b"concurrent=4;body_bytes=9")])
    assert service.answer([_plain(OTHER)]) == (200, [(b"x-shoehorn-key", b"bob"), (b"x-shoehorn-limits", b"")])
    assert service.last_used == {"alice": NOW, "bob": NOW}


@pytest.mark.parametrize("expires", [NOW, NOW - 1, 0.0])
def test_expired_key_is_rejected_even_if_cached(expires: float) -> None:
    times = iter([expires - 1, NOW])
    ring = Keyring([Key.make("alice", TOKEN, 0, expires=expires)])
    service = KeyService(lambda: ring, lambda: next(times))
    assert service.answer([_plain(TOKEN)])[0] == 200
    assert service.answer([_plain(TOKEN)])[0] == 401


def test_unavailable_keys_return_503_and_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    ring: list[Keyring] = []

    def current() -> Keyring:
        if not ring:
            raise SettingsError("The key file is damaged.")
        return ring[0]

    service = KeyService(current)
    with caplog.at_level(logging.INFO):
        assert [service.answer(headers) for headers in ([], [_plain(TOKEN)])] == [(503, [])] * 2
        ring.append(Keyring([Key.make("alice", TOKEN, NOW)]))
        assert [service.answer(headers)[0] for headers in ([], [_plain(TOKEN)])] == [401, 200]
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"]
    assert TOKEN not in caplog.text


def test_answer_follows_asgi() -> None:
    sent: list[dict[str, object]] = []

    async def ask() -> None:
        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        async def receive() -> dict[str, object]:
            raise AssertionError("nothing to read")

        await _service(Key.make("alice", TOKEN, NOW))({"type": "http", "headers": [_plain(TOKEN)]}, receive, send)

    asyncio.run(ask())
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    assert (b"content-length", b"0") in sent[0]["headers"]


def test_socket_is_private_and_replaces_a_stale_one(tmp_path: Path) -> None:
    for _ in range(2):
        with listen(tmp_path / "keys.sock"):
            assert (tmp_path / "keys.sock").stat().st_mode & 0o777 == 0o600
    assert os.umask(0o22) == 0o22  # put back


def test_times_of_last_use_are_saved_at_the_end(tmp_path: Path) -> None:
    service = _service(Key.make("alice", TOKEN, NOW))

    async def live() -> None:
        task = asyncio.create_task(save_last_used(service, KeyStore(tmp_path), lambda: ["alice"]))
        await asyncio.sleep(0)
        service.answer([_plain(TOKEN)])
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(live())
    assert KeyStore(tmp_path).last_used() == {"alice": NOW}


# --- sources

def test_lines_are_parsed_to_keys() -> None:
    text = (f"# who\tmay\n\nalice {TOKEN}\n  bob\t{OTHER}  max_tokens=5 body_bytes=1MiB expires=2027-01-31 # soon\n")
    alice, bob = parse_lines(text, FILE, NOW)
    assert (alice.name, alice.expires, alice.limits, alice.created) == ("alice", None, KeyLimits(), NOW)
    assert (bob.name, bob.expires, bob.limits) == ("bob", 1801353600.0, KeyLimits(max_tokens=5, body_bytes=1 << 20))
    assert alice.matches(TOKEN.encode())


@pytest.mark.parametrize(("text", "match"), [
    ("", "contains no key"), ("# only\n\n", "contains no key"), (f"alice {TOKEN}", "line 1: missing newline"),
    (f"alice {TOKEN}\nbob {OTHER} max_tok", "line 2: missing newline"), (f"{TOKEN}\n", "expected NAME KEY"),
    (f"alice {TOKEN}\nalice {OTHER}\n", "line 2: its name or its key"),
    (f"alice {TOKEN}\nbob {TOKEN}\n", "line 2: its name or its key"), ("alice short\n", "8 to 512 characters"),
    (f"alice {TOKEN} {OTHER}\n", "LIMIT=VALUE"), (f"alice {TOKEN} concurrent=2 concurrent=3\n", "each limit once"),
    (f"alice {TOKEN} rpm=3\n", "unknown limit 'rpm'"), (f"alice {TOKEN} expires=30d\n", "invalid day"),
    (f"a/b {TOKEN}\n", "invalid name"), (f"alice: {TOKEN}\n", "invalid name")])
def test_invalid_line_is_reported_without_its_text(text: str, match: str) -> None:
    with pytest.raises(SettingsError, match=match) as caught:
        parse_lines(text, FILE, NOW)
    assert TOKEN not in str(caught.value)
    assert OTHER not in str(caught.value)


def test_start_prepares_the_sources(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"default {OTHER}\n")
    new_key = prepare(_settings(tmp_path))
    assert new_key is not None
    assert prepare(_settings(tmp_path)) is None
    assert KeySources(_settings(tmp_path)).current().find(new_key.token.encode()) is not None
    prepare(_settings(tmp_path, API_KEYS_FILE=str(file)))
    assert KeySources(_settings(tmp_path, API_KEYS_FILE=str(file))).current().find(OTHER.encode()) is not None
    with pytest.raises(SettingsError, match="'default' already exists"):
        prepare(_settings(tmp_path, API_KEYS_FILE=str(file), API_KEY=TOKEN))
    with pytest.raises(SettingsError, match=r"cannot read|unreadable"):
        prepare(_settings(tmp_path, API_KEYS_FILE=str(tmp_path / "absent")))
    assert TOKEN not in (tmp_path / "keys.json").read_text()
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600


def test_first_key_is_not_created_if_others_exist(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {OTHER}\n")
    assert prepare(_settings(tmp_path, API_KEY=TOKEN)) is None
    assert prepare(_settings(tmp_path, API_KEYS_FILE=str(file))) is None
    assert not KeyStore(tmp_path).file.exists()


def test_next_request_sees_a_change_and_unchanged_files_are_not_reloaded(tmp_path: Path) -> None:
    clock = [0.0]
    settings = _settings(tmp_path)
    prepare(settings)
    sources = KeySources(settings, lambda: clock[0])
    first = sources.current()
    assert sources.current() is first
    store = KeyStore(tmp_path)
    token = store.add(Key("alice", b"", b"", NOW)).token
    second = sources.current()
    assert second.find(token.encode()) is not None
    assert sources.current() is second
    clock[0] = 1.0  # once more, in case of a second change within the clock's tick
    third = sources.current()
    assert third is not second
    clock[0] = 2.0
    assert sources.current() is third


def test_change_with_an_equal_mtime_is_detected(tmp_path: Path) -> None:
    clock = [0.0]
    file = tmp_path / "keys"
    file.write_text(f"alice {TOKEN}\n")
    settings = _settings(tmp_path, API_KEYS_FILE=str(file))
    prepare(settings)
    sources = KeySources(settings, lambda: clock[0])
    sources.current()
    status = file.stat()
    file.write_text(f"carol {TOKEN}\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # only the inode's change time differs
    clock[0] = 0.3
    assert set(sources.current().keys) == {"carol"}


def test_damaged_source_makes_all_keys_unavailable(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {OTHER}\n")
    settings = _settings(tmp_path, API_KEYS_FILE=str(file), API_KEY=TOKEN)
    prepare(settings)
    store = KeyStore(tmp_path)
    store.add(Key("bob", b"", b"", NOW))
    sources = KeySources(settings)
    for source in (file, store.file, tmp_path / "keys.json"):
        assert set(sources.current().keys) == {"alice", "bob", "default"}
        whole = source.read_text()
        source.write_text("half")
        with pytest.raises(SettingsError):
            sources.current()
        with pytest.raises(SettingsError):  # and again, without reading
            sources.current()
        source.write_text(whole)
    (tmp_path / "keys.json").unlink()
    with pytest.raises(SettingsError, match=r"cannot read|unreadable"):
        sources.current()


def test_keys_are_unavailable_if_none_exists(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    prepare(settings)
    KeyStore(tmp_path).revoke("default")
    with pytest.raises(SettingsError, match="none exist"):
        KeySources(settings).current()
    assert prepare(settings) is None  # the last key was revoked on purpose
