"""Keys at the gateway with real nginx and key service: headers, changes, failing closed."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fakes.engine import FakeEngine
from shoehorn.commands import keys as command
from support.gateway_process import BEARER, KEY, Gateway, anthropic_error, authorization, openai_error, request
from support.waiting import wait_until

pytestmark = pytest.mark.process

OTHER = "sk-another-key-0123456789"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, FakeEngine]]:
    """A ready gateway for the tests that only ask."""
    with Gateway(tmp_path_factory.mktemp("keys")) as gate, gate.engine() as engine:
        yield gate, engine


def _keys(gate: Gateway, *words: str) -> None:
    """Run `shoehorn keys ...` while the server runs."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args(words), gate.environment) == 0


def _status(gate: Gateway, key: str, path: str = "/v1/models") -> int:
    return gate.client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code


def _line(name: str, value: str) -> str:
    return f"{name}: {value}\r\n"


# --- headers

@pytest.mark.parametrize(("headers", "status"), [
    (_line("X-Api-Key", KEY), 200),
    (_line("x-api-key", KEY) + authorization(KEY), 200),
    (_line("X-Api-Key", OTHER), 401),
    (_line("X-Api-Key", ""), 401),
    (_line("X-Api-Key", f"Bearer {KEY}"), 401),
    (_line("X-Api-Key", KEY + "x" * 600), 401),
    (_line("X-Api-Key", KEY) + authorization(OTHER), 401),
    (_line("X-Api-Key", OTHER) + authorization(KEY), 401),
    (_line("X-Api-Key", "") + authorization(KEY), 401),
    (_line("X-Api-Key", KEY) + _line("Authorization", "Basic abc"), 401),
    (_line("X-Api-Key", KEY) + _line("Authorization", ""), 401),
    (_line("X-Api-Key", KEY) * 2, 401),
    (_line("X-Api-Key", KEY) + _line("X-Api-Key", OTHER), 401),
    (_line("X-Api-Key", OTHER) + _line("x-api-key", KEY), 401),
    (_line("X_Api_Key", KEY), 401),
    (_line("X-Shoehorn-Key", "default"), 401),
    (_line("Cookie", f"Authorization=Bearer {KEY}"), 401),
])
def test_one_valid_key_is_accepted(shared: tuple[Gateway, FakeEngine], headers: str, status: int) -> None:
    gate, engine = shared
    engine.requests.clear()
    for target in ("/v1/models", "/v1/messages"):
        method = "GET" if target == "/v1/models" else "POST"
        answer = gate.send(request(target, headers, method=method))
        assert re.match(rb"HTTP/1.1 %d " % status, answer), answer
    assert len(engine.requests) == (2 if status == 200 else 0)


@pytest.mark.parametrize("number", [0, 1, 900, 1100, 5_000_000])
def test_bodies_of_any_size_require_a_key(shared: tuple[Gateway, FakeEngine], number: int) -> None:
    gate, engine = shared
    engine.requests.clear()
    for headers, status in ((BEARER, 200), ({}, 401), ({"X-Api-Key": OTHER}, 401)):
        assert gate.client.post("/v1/completions", headers=headers, content=b"x" * number).status_code == status
    assert len(engine.requests) == 1
    assert len(engine.requests[0].body) == number


def test_internal_key_location_is_unreachable_for_clients(shared: tuple[Gateway, FakeEngine]) -> None:
    for path in ("/.shoehorn/key", "/.shoehorn/no-keys", "/.shoehorn/plain", "/nothing", "/keys.sock", "/keys.json"):
        for headers in ({}, BEARER):
            assert shared[0].client.get(path, headers=headers).status_code == 404


# --- names, limits, changes

def test_engine_receives_name_and_limits_that_clients_cannot_forge(tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    forged = {"X-Shoehorn-Key": "admin", "X-Shoehorn-Limits": "concurrent=1000"}
    with Gateway(tmp_path) as gate, gate.engine() as engine:
        _keys(gate, "add", "alice", "--requests-per-minute", "60", "--concurrent", "4", "--max-tokens", "512",
              "--max-body", "1MiB")
        alice = capsys.readouterr().out.strip()
        for key in (alice, KEY):
            gate.client.post("/v1/completions", json={}, headers={"X-Api-Key": key, **forged})
        (first, second) = (each.headers for each in engine.requests)
        assert first["X-Shoehorn-Key"] == "alice"
        assert first["X-Shoehorn-Limits"] == "requests_per_minute=60;concurrent=4;max_tokens=512;body_bytes=1048576"
        assert second["X-Shoehorn-Key"] == "default"
        assert "X-Shoehorn-Limits" not in second
        wait_until(lambda: "key alice," in gate.log.read_text(), 5, "the name is in the log")
        assert alice not in gate.log.read_text()


def test_key_changes_apply_immediately_and_interrupt_no_stream(tmp_path: Path,
                                                               capsys: pytest.CaptureFixture[str]) -> None:
    with Gateway(tmp_path, API_KEY="") as gate, gate.engine() as engine:
        assert gate.made is not None
        first = gate.made.token
        assert _status(gate, first) == 200
        stream = {"json": {"stream": True, "events": 4}, "headers": {"Authorization": f"Bearer {first}"}}
        with gate.client.stream("POST", "/v1/completions", **stream) as running:
            lines = running.iter_lines()
            engine.allow()
            assert '"number": 0' in next(lines)
            _keys(gate, "rotate", "default")
            second = capsys.readouterr().out.strip()
            assert (_status(gate, first), _status(gate, second)) == (401, 200)
            _keys(gate, "add", "bob")
            bob = capsys.readouterr().out.strip()
            assert (_status(gate, bob), _status(gate, second)) == (200, 200)
            _keys(gate, "revoke", "default")
            assert (_status(gate, second), _status(gate, bob)) == (401, 200)
            engine.allow(3)
            assert "data: [DONE]" in list(lines)  # what the first key started ends as it should
        assert (gate.stop_keys(), gate.pid) == (0, gate.pid)
        _keys(gate, "list", "--json")
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
        assert set(rows) == {"bob"}
        assert time.time() - 60 < rows["bob"]["last_used"] <= time.time()
        gate.launch_keys()
        gate.wait_for_keys()


def test_expired_key_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"old {OTHER} expires=2020-01-01\nyoung {OTHER}-2 expires=2999-12-31\n")
    with Gateway(tmp_path, API_KEY="", API_KEYS_FILE=str(file)) as gate, gate.engine():
        assert (_status(gate, OTHER), _status(gate, f"{OTHER}-2")) == (401, 200)


def test_key_file_is_watched_and_rejected_while_incomplete(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    whole = f"# comment\nalice {OTHER} concurrent=2\n\nbob {OTHER}-of-bob max_tokens=5\n"
    file.write_text(whole)
    with Gateway(tmp_path, API_KEYS_FILE=str(file)) as gate, gate.engine() as engine:
        assert [_status(gate, key) for key in (KEY, OTHER, f"{OTHER}-of-bob")] == [200, 200, 200]
        for size in range(len(whole)):  # in place, as an editor would: no prefix of the file lets anybody in wrongly
            file.write_text(whole[:size])
            status = _status(gate, f"{OTHER}-of-bo")
            assert status in (401, 503), whole[:size]
            if not whole[:size].endswith("\n") or "alice" not in whole[:size]:
                assert (_status(gate, OTHER), _status(gate, KEY)) == (503, 503), whole[:size]
        file.write_text(whole.replace("alice", "carol"))
        engine.requests.clear()
        assert _status(gate, OTHER) == 200
        assert engine.requests[0].headers["X-Shoehorn-Key"] == "carol"
        file.unlink()
        assert _status(gate, KEY) == 503
        text = gate.log.read_text()
    assert OTHER not in text
    assert KEY not in text
    assert "status=503" in text


# --- failing closed

@pytest.mark.parametrize("place", ["volume", "run directory"])
@pytest.mark.fault("Key file empty, damaged or half written", "503, never 200.")
def test_damaged_key_file_rejects_all_requests(tmp_path: Path, place: str) -> None:
    with Gateway(tmp_path, **({"API_KEY": ""} if place == "volume" else {})) as gate, gate.engine() as engine:
        file = (tmp_path / ".shoehorn" if place == "volume" else gate.run_dir) / "keys.json"
        key = gate.made.token if gate.made else KEY
        whole = file.read_text()
        for content in ("", "\n", "{", "null", "[]", '{"version": 1}', '{"version": 1, "keys": []}', whole[:-10]):
            assert _status(gate, key) == 200
            engine.requests.clear()
            file.write_text(content)
            for headers in ({"Authorization": f"Bearer {key}"}, {}):
                answer = gate.client.get("/v1/models", headers=headers)
                assert answer.status_code == 503, content
                assert openai_error(answer)["code"] == "keys_unavailable"
                assert answer.headers["retry-after"]
            assert anthropic_error(gate.client.post("/v1/messages"))["type"] == "overloaded_error"
            assert not engine.requests
            file.write_text(whole)


@pytest.mark.fault("Key service dead or hanging", "503 for new requests; streams continue.")
def test_missing_key_service_returns_503_and_interrupts_no_stream(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gate, gate.engine() as engine:
        assert _status(gate, KEY) == 200
        assert gate.keys is not None
        with gate.client.stream("POST", "/v1/completions", headers=BEARER, json={"stream": True}) as running:
            gate.stop_keys(signal.SIGKILL)
            engine.requests.clear()
            for path in ("/v1/models", "/v1/none"):
                for headers in ({}, BEARER):
                    dead = gate.client.get(path, headers=headers)
                    assert dead.status_code == 503
                    assert openai_error(dead)["code"] == "keys_unavailable"
            assert gate.client.get("/livez").status_code == 200
            gate.launch_keys()  # over the dead one's socket
            gate.wait_for_keys()
            assert _status(gate, KEY) == 200
            engine.requests.clear()
            os.kill(gate.keys.pid, signal.SIGSTOP)
            started = time.monotonic()
            assert _status(gate, KEY) == 503
            assert time.monotonic() - started < 10
            os.kill(gate.keys.pid, signal.SIGCONT)
            wait_until(lambda: _status(gate, KEY) == 200, 5, "it answers again")
            engine.allow(3)
            assert "[DONE]" in running.read().decode()
        assert (gate.run_dir / "keys.sock").stat().st_mode & 0o777 == 0o600


def test_only_200_with_a_name_admits_a_request(tmp_path: Path) -> None:
    """Another program on the key service's socket that answers without a name admits no request."""
    with Gateway(tmp_path) as gate, gate.engine() as engine:
        gate.stop_keys()
        (gate.run_dir / "keys.sock").unlink(missing_ok=True)
        with FakeEngine(gate.run_dir / "keys.sock") as false_service:
            for status in (200, 204, 302, 403, 404, 500, 502):
                false_service.answer_status = status
                assert gate.client.get("/v1/models", headers=BEARER).status_code == (403 if status == 403 else 503)
                assert false_service.requests
        gate.launch_keys()
        assert not engine.requests


def test_many_keys_and_clients_concurrently(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("".join(f"user-{number} sk-key-of-user-{number:04}\n" for number in range(1000)))
    with Gateway(tmp_path, API_KEYS_FILE=str(file)) as gate, gate.engine(), httpx.Client(
            base_url=f"http://127.0.0.1:{gate.port}", trust_env=False) as client:
        for number in (0, 499, 999):
            key = f"sk-key-of-user-{number:04}"
            assert client.get("/v1/models", headers={"X-Api-Key": key}).status_code == 200
            assert client.get("/v1/models", headers={"X-Api-Key": f"{key}5"}).status_code == 401
