"""The running gateway: not ready, failed, health, streams, shutdown, log, page, environment."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from shoehorn.common.paths import GATEWAY
from shoehorn.gateway import nginx_config
from shoehorn.runtime.state import Phase
from support.gateway_process import BEARER, KEY, MODEL, Gateway, authorization, openai_error
from support.waiting import wait_until

pytestmark = pytest.mark.process


# --- not ready, failed, health

def test_answer_while_not_ready_has_phase_and_progress(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gate:
        gate.states.update(phase=Phase.PULLING, progress=0.4, detail="pulling")
        assert gate.client.post("/v1/chat/completions", json={}).status_code == 401
        assert gate.client.get("/v1/completions", headers=BEARER).status_code == 405
        for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("GET", f"/v1/models/{MODEL}")):
            content = b"x" * 300_000 if method == "POST" else b""
            answer = gate.client.request(method, path, headers=BEARER, content=content)
            assert answer.status_code == 503
            assert 0 < int(answer.headers["retry-after"]) <= 30
            error = openai_error(answer)
            assert (error["phase"], error["progress"]) == ("pulling", 0.4)
            assert "pulling (40%)" in str(error["message"])
        assert gate.client.get("/livez").status_code == 200
        assert gate.client.get("/readyz").status_code == 503
        assert gate.client.get("/status").json()["phase"] == "pulling"
        with gate.engine():
            assert gate.client.post("/v1/chat/completions", json={}, headers=BEARER).status_code == 200
            assert gate.client.get("/readyz").status_code == 200
        for path in ("/v1/models", "/readyz"):  # the mark still exists, but no engine answers
            answer = gate.client.get(path, headers=BEARER)
            assert answer.status_code == 503
            assert "temporarily unavailable" in str(openai_error(answer)["message"])
            assert answer.headers["retry-after"]
        gate.states.update(phase=Phase.FAILED, cause="The disk is full.", remedy="Free some.")
        assert gate.client.get("/livez").status_code == 503
        assert "The disk is full." in str(openai_error(gate.client.get("/v1/models", headers=BEARER))["message"])


def test_missing_state_is_an_error_in_the_api_form(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gate:
        for name in ("state.json", "unavailable.json"):
            (gate.run_dir / name).unlink()
        for path in ("/status", "/readyz", "/v1/models"):
            answer = gate.client.get(path, headers=BEARER)
            assert answer.status_code == 503
            assert openai_error(answer)["code"] == "model_not_ready"


def test_readiness_requires_a_timely_answer_of_the_engine(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gate, gate.engine() as engine:
        for method in ("GET", "HEAD"):
            assert gate.client.request(method, "/readyz").status_code == 200
        for status in (503, 500, 404, 401):
            engine.health_status = status
            assert gate.client.get("/readyz").status_code == 503
        engine.health_status, engine.hung = 200, True
        started = time.monotonic()
        assert gate.client.get("/readyz").status_code == 503
        assert time.monotonic() - started < 25
        assert gate.client.get("/livez").status_code == 200


def test_public_paths_are_read_only(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gate, gate.engine():
        for path in ("/livez", "/readyz", "/status", "/", "/page.css"):
            assert gate.client.get(path).status_code == 200
            assert gate.client.head(path).status_code == 200
            for method in ("POST", "PUT", "DELETE"):
                answer = gate.client.request(method, path)
                assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD"), path
                openai_error(answer)


# --- streams

def test_events_are_not_buffered(tmp_path: Path) -> None:
    body = {"stream": True, "events": 5}
    with Gateway(tmp_path) as gate, gate.engine() as engine, gate.client.stream(
            "POST", "/v1/chat/completions", headers=BEARER, json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        for number in range(5):
            engine.allow()  # the next event is not sent before this
            assert next(line for line in lines if line) == f'data: {{"number": {number}}}'
        assert next(line for line in lines if line) == "data: [DONE]"


@pytest.mark.parametrize("body", [{"stream": True, "events": 9}, {"slow": True}], ids=["stream", "plain"])
def test_disconnecting_client_cancels_its_request_in_the_engine(tmp_path: Path, body: dict[str, object]) -> None:
    with Gateway(tmp_path) as gate, gate.engine() as engine:
        data = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", gate.port), timeout=30) as connection:
            connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n{authorization(KEY)}"
                               f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
            assert engine.started.wait(60)
            assert not engine.left.is_set()
        assert engine.left.wait(60)


def test_quit_finishes_streams_and_rejects_new_requests(tmp_path: Path) -> None:
    with Gateway(tmp_path, DRAIN_TIMEOUT="30") as gate, gate.engine() as engine:
        assert gate.process is not None
        with gate.client.stream("POST", "/v1/completions", headers=BEARER, json={"stream": True}) as answer:
            lines = answer.iter_lines()
            engine.allow()
            assert "0" in next(lines)
            gate.process.send_signal(signal.SIGQUIT)
            wait_until(lambda: not gate.listens(), 5, "no more connections")
            assert gate.process.poll() is None
            engine.allow(2)
            assert "data: [DONE]" in list(lines)
        assert gate.process.wait(60) == 0  # in 5 s where the client keeps its connection: nginx lingers


def test_quit_interrupts_streams_after_the_time_limit(tmp_path: Path) -> None:
    with Gateway(tmp_path, DRAIN_TIMEOUT="0") as gate, gate.engine() as engine:
        assert gate.process is not None
        with gate.client.stream("POST", "/v1/completions", headers=BEARER, json={"stream": True}) as answer:
            assert engine.started.wait(60)
            gate.process.send_signal(signal.SIGQUIT)
            with pytest.raises(httpx.RemoteProtocolError):  # no end, and no wait for one
                answer.read()
        assert engine.left.wait(60)
        assert gate.process.wait(60) == 0


# --- log, page, surroundings

@pytest.mark.parametrize("form", ["text", "json"])
def test_log_has_requests_and_no_secret(tmp_path: Path, form: str) -> None:
    with Gateway(tmp_path, LOG_FORMAT=form) as gate, gate.engine():
        for path in ("/livez", "/readyz", "/status", "/status?x=1"):
            gate.client.get(path)
        answer = gate.client.post("/v1/completions?api_key=hidden", headers=BEARER, json={"prompt": "hush"})
        gate.client.get("/v1/models?api_key=hidden", headers={"Authorization": "Bearer sk-mistyped"})
        gate.send(b"nonsense\r\n\r\n")
        wait_until(lambda: gate.log.read_text().count("\n") >= 3, 5, "three lines")
        text = gate.log.read_text()
    lines = text.splitlines()
    assert len(lines) == 3
    for secret in (KEY, "hidden", "hush", "mistyped"):
        assert secret not in text
    if form == "json":
        first, second, third = map(json.loads, lines)
        assert (first["method"], first["path"], first["status"]) == ("POST", "/v1/completions", 200)
        assert (first["key"], second["key"], first["client"]) == ("default", "", "127.0.0.1")
        assert first["request_id"] == answer.headers["x-request-id"]
        assert (second["status"], third["status"]) == (401, 400)
    else:
        assert re.fullmatch(r"\d\d:\d\d:\d\d gateway INFO POST /v1/completions 200, \d+ bytes in [\d.]+ s, "
                            r"key default, from 127\.0\.0\.1, " + answer.headers["x-request-id"], lines[0])


class _Addresses(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.found += [value for name, value in attrs if name in ("src", "href") and value]
        self.inline += [name for name in attributes if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in attributes):
            self.inline.append(tag)


def test_page_is_self_contained_under_a_strict_policy(tmp_path: Path) -> None:
    assert {file.name for file in (GATEWAY / "page").iterdir()} == {"index.html", *nginx_config.PAGE_FILES}
    with Gateway(tmp_path) as gate, gate.engine():
        page = gate.client.get("/")
        addresses = _Addresses(page.text)
        answers = {address: gate.client.get(f"/{address}") for address in set(addresses.found)}
    assert page.headers["content-type"] == "text/html"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert not addresses.inline
    assert set(nginx_config.PAGE_FILES) <= set(answers)
    for address, answer in answers.items():
        assert answer.status_code == 200, address
        text = answer.text.replace("https://github.com/markedjs/marked", "")  # marked's own home, in its words only
        assert not re.findall(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.-]+\.\w", text), address


@pytest.mark.parametrize("name", ["a space", "quo\"te's", "semi;colon{brace}#", "percent%41", "back\\slash\\n", "鞋"])
def test_run_directories_with_special_characters_work(tmp_path: Path, name: str) -> None:
    with Gateway(tmp_path / name) as gate, gate.engine():
        assert gate.client.get("/v1/models", headers=BEARER).status_code == 200
        assert gate.client.get("/status").json()["phase"] == "ready"
        assert gate.client.get("/readyz").status_code == 200


@pytest.mark.parametrize("settings", [
    {"LOG_FORMAT": "json"}, {"DRAIN_TIMEOUT": "0"}, {"DRAIN_TIMEOUT": "3600"}, {"SERVED_MODEL_NAME": "a/b:c_d.e-f"},
    {"API_KEY": "k" * 512}, {"API_KEY": ".+/=~_-." * 64}])
def test_nginx_accepts_every_configuration_without_warnings(tmp_path: Path, settings: dict[str, str]) -> None:
    file = Gateway(tmp_path, **settings).run_dir / "nginx.conf"
    done = subprocess.run(["nginx", "-t", "-c", str(file), "-e", "stderr"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"\[\w+\]", done.stderr)


def test_ordinary_user_can_run_it_and_writes_to_the_run_directory_only() -> None:
    home = Path(tempfile.mkdtemp())  # pytest's own folders can be entered by one user only
    home.chmod(0o755)
    try:
        user = "nobody" if os.geteuid() == 0 else None
        gate = Gateway(home, user=user)
        gate.states.update(phase=Phase.READY)
        if user:
            for file in (gate.log, gate.run_dir, *gate.run_dir.iterdir()):
                os.chown(file, pwd.getpwnam(user).pw_uid, -1)
        with gate:
            body = b"x" * (1 << 20)  # beyond the buffer in memory
            assert gate.client.post("/v1/completions", headers=BEARER, content=body).status_code == 503
            opened = {os.readlink(link) for link in Path(f"/proc/{gate.pid}/fd").iterdir()}
        assert not {file for file in opened if file.startswith("/") and not file.startswith(("/dev/", str(home)))}
        assert "emerg" not in gate.log.read_text()
    finally:
        shutil.rmtree(home)
