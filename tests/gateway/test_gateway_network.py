"""Network side of the gateway: HTTPS and its certificate, proxies, other origins, slow clients."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from fakes import certificates
from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import HOME
from shoehorn.runtime.state import Phase
from support.gateway_process import BEARER, KEY, Gateway, authorization, error_of, openai_error, request
from support.waiting import wait_until

pytestmark = pytest.mark.process


def _secure(home: Path, **settings: str) -> Gateway:
    cert, key = certificates.write(home)
    return Gateway(home / "g", TLS_CERT_FILE=str(cert), TLS_KEY_FILE=str(key), **settings)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A ready gateway with HTTPS."""
    with _secure(tmp_path_factory.mktemp("tls")) as gate, gate.engine():
        yield gate


def _shown(gate: Gateway) -> bytes:
    """The certificate that a new connection gets."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection(("127.0.0.1", gate.port), timeout=30) as plain, context.wrap_socket(plain) as secured:
        return secured.getpeercert(binary_form=True) or b""


def _der(file: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(file.read_text())


# --- HTTPS

def test_api_is_served_over_https_and_http_2(secure: Gateway) -> None:
    assert secure.client.get("/v1/models", headers=BEARER).json() == {"engine": "/v1/models"}
    assert secure.client.get("/v1/models").status_code == 401
    for options, version in ((["--http2"], "2"), (["--http1.1"], "1.1")):
        answer = subprocess.run(
            ["curl", "-sS", *options, "--cacert", str(secure.settings.tls_cert_file), "-H", f"X-Api-Key: {KEY}",
             "-d", '{"stream": true, "events": 0}', "-w", "%{http_version}",
             f"https://127.0.0.1:{secure.port}/v1/completions"], capture_output=True, text=True, timeout=60, check=True)
        assert answer.stdout == f"data: [DONE]\n\n{version}"


@pytest.mark.parametrize("headers", [["X-Api-Key: {0}", "X-Api-Key: {0}"], ["Authorization: Bearer {0}"] * 2,
                                     ["Authorization: Bearer {0}", "X-Api-Key: sk-not-the-same-key"], ["X-Api-Key;"]])
def test_http_2_accepts_keys_in_the_same_headers_only(secure: Gateway, headers: list[str]) -> None:
    arguments = [word for header in headers for word in ("-H", header.format(KEY))]
    answer = subprocess.run(
        ["curl", "-sS", "--http2", "--cacert", str(secure.settings.tls_cert_file), *arguments, "-o", "/dev/null", "-w",
         "%{http_version} %{http_code}", f"https://127.0.0.1:{secure.port}/v1/models"],
        capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout in ("2 401", "2 400")


@pytest.mark.parametrize("target", [
    "/invocations", "/tokenize", "/metrics", "//invocations", "//v1/models", "/v1/../invocations", "/v1/%2e%2e/load",
    "/v1/models/../../load", "/v1/models%2f..%2f..%2fload", "/V1/models", "/v1/models/", "/v1/models;x",
    "/v1/models%00", "/%69nvocations", "/v1/chat/completions/render", "/.shoehorn/key"])
def test_http_2_rejects_alternative_spellings_of_paths(secure: Gateway, target: str) -> None:
    command = ["curl", "-sS", "--http2", "--path-as-is", "--cacert", str(secure.settings.tls_cert_file), "-H",
               f"X-Api-Key: {KEY}", "-H", "X-Original-URL: /v1/models", "-w", "%{http_version} %{http_code}"]
    for method in ("GET", "POST"):
        answer = subprocess.run([*command, "-X", method, f"https://127.0.0.1:{secure.port}{target}"],
                                capture_output=True, text=True, timeout=60, check=True).stdout
        assert re.search("2 (400|404)$", answer), answer
        assert '"engine"' not in answer


def test_plain_http_is_rejected_with_a_reason(secure: Gateway) -> None:
    for target in ("/v1/models", "/", "/livez", "/v1/messages"):
        answer = secure.send(request(target, authorization(KEY)))
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert b'"https_required"' in answer
        assert b'"engine"' not in answer


@pytest.mark.parametrize(("highest", "cipher", "taken"), [
    (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0", False), (ssl.TLSVersion.TLSv1_2, "ECDHE", True),
    (ssl.TLSVersion.TLSv1_2, "AES128-SHA:AES256-SHA256:AES128-GCM-SHA256", False),
    (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-SHA256:ECDHE-ECDSA-AES256-SHA384", False),
    (ssl.TLSVersion.TLSv1_3, "ECDHE", True)])
def test_only_modern_protocols_and_ciphers_are_accepted(secure: Gateway, highest: ssl.TLSVersion, cipher: str,
                                                        taken: bool) -> None:
    context = ssl.create_default_context(cafile=secure.settings.tls_cert_file)
    context.set_ciphers(cipher)
    if highest is ssl.TLSVersion.TLSv1_1:
        # The module warns of what is asked for here on purpose: whether an old protocol is refused.
        with pytest.warns(DeprecationWarning, match="TLS"):
            context.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="TLS"):
            context.maximum_version = highest
    else:
        context.maximum_version = highest
    with socket.create_connection(("127.0.0.1", secure.port), timeout=30) as plain:
        if taken:
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as secured:
                assert secured.version() == highest.name.replace("v1_", "v1.")
        else:
            with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
                context.wrap_socket(plain, server_hostname="127.0.0.1")


@pytest.mark.fault("A renewed certificate is damaged", "The current one stays.")
def test_valid_new_certificate_is_installed_and_an_invalid_one_is_not(tmp_path: Path) -> None:
    gate = _secure(tmp_path)
    cert, key = gate.settings.tls_cert_file, gate.settings.tls_key_file
    assert cert is not None
    assert key is not None
    with gate, gate.engine() as engine, gate.client.stream(
            "POST", "/v1/completions", headers=BEARER, json={"stream": True}) as running:
        before = _shown(gate)
        assert before == _der(cert)
        (tmp_path / "new").mkdir()
        new_cert, new_key = certificates.write(tmp_path / "new", "new.test")
        shutil.copy(new_cert, cert)  # the key is not there yet
        wait_until(lambda: "mismatch of key" in gate.log.read_text(), 6, "the mismatch is logged")
        assert _shown(gate) == before
        shutil.copy(new_key, key)
        wait_until(lambda: _shown(gate) == _der(new_cert), 6, "the new certificate is shown")
        before_damage = gate.log.read_text().count("rejected the")
        cert.write_text("-----BEGIN CERTIFICATE-----\nhalf")
        wait_until(lambda: gate.log.read_text().count("rejected the") > before_damage, 6, "the damage is logged")
        gate.stop()
        gate.launch()  # nginx dies and comes back: with the pair that was in force
        wait_until(gate.listens, 5, "nginx listens")
        assert _shown(gate) == _der(new_cert)
        running.close()
        assert engine.started.is_set()
    assert (gate.run_dir / "tls.pem").stat().st_mode & 0o777 == 0o600
    assert "PRIVATE" not in gate.log.read_text()


def test_new_certificate_interrupts_no_stream(tmp_path: Path) -> None:
    gate = _secure(tmp_path)
    with gate, gate.engine() as engine, gate.client.stream(
            "POST", "/v1/completions", headers=BEARER, json={"stream": True}) as running:
        assert engine.started.wait(60)
        new_cert, _ = certificates.write(tmp_path, "new.test")
        wait_until(lambda: _shown(gate) == _der(new_cert), 6, "the new certificate is shown")
        engine.allow(3)
        assert "[DONE]" in running.read().decode()


def test_mismatch_of_key_and_certificate_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    cert, _ = certificates.write(tmp_path)
    _, key = certificates.write(tmp_path / "other")
    with pytest.raises(SettingsError, match="mismatch of key"):
        Gateway(tmp_path / "g", TLS_CERT_FILE=str(cert), TLS_KEY_FILE=str(key))


def test_health_check_uses_https(secure: Gateway) -> None:
    script = [sys.executable, "-I", "-S", str(HOME / "healthcheck" / "healthcheck.py")]
    environment = {"PATH": os.environ["PATH"], "PORT": str(secure.port),
                   "TLS_CERT_FILE": str(secure.settings.tls_cert_file)}
    for question in ("live", "ready"):
        done = subprocess.run([*script, question], env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, f"{question}\n")
    secure.states.update(phase=Phase.LOADING)
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:9]) == (1, "not ready")
    secure.states.update(phase=Phase.READY)


# --- proxies in front, other origins

def test_client_address_is_accepted_from_trusted_proxies_only(tmp_path: Path) -> None:
    forwarded = {**BEARER, "X-Forwarded-For": "203.0.113.9, 198.51.100.7, 10.1.2.3"}
    for number, (proxies, shown) in enumerate((("", "127.0.0.1"), ("192.0.2.1", "127.0.0.1"),
                                               ("127.0.0.0/8, 10.0.0.0/8", "198.51.100.7"))):
        with Gateway(tmp_path / str(number), TRUSTED_PROXIES=proxies) as gate, gate.engine():
            assert gate.client.get("/v1/models", headers=forwarded).status_code == 200
            wait_until(lambda: " from " in gate.log.read_text(), 5, "the line is there")
            assert f"from {shown}, " in gate.log.read_text()


_ORIGIN = "https://chat.example.com"
_PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def _cors(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def test_other_origins_are_rejected_by_default(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gate, gate.engine() as engine:
        for answer in (gate.client.options("/v1/completions", headers={"Origin": _ORIGIN, **_PREFLIGHT}),
                       gate.client.get("/v1/models", headers={"Origin": _ORIGIN, **BEARER})):
            assert not _cors(answer)
        assert [seen.method for seen in engine.requests] == ["GET"]


def test_only_configured_origins_are_accepted(tmp_path: Path) -> None:
    with Gateway(tmp_path, CORS_ALLOWED_ORIGINS=f"{_ORIGIN} http://localhost:3000") as gate, gate.engine() as engine:
        for origin in (_ORIGIN, "http://localhost:3000"):
            asked = gate.client.options("/v1/completions", headers={"Origin": origin, **_PREFLIGHT})
            assert asked.status_code == 204
            assert _cors(asked) == {"access-control-allow-origin": origin, "access-control-allow-methods": "POST",
                                    "access-control-allow-headers": "authorization,content-type",
                                    "access-control-max-age": "600",
                                    "access-control-expose-headers": "Retry-After, X-Request-Id"}
            for answer in (gate.client.get("/v1/models", headers={"Origin": origin, **BEARER}),
                           gate.client.get("/v1/models", headers={"Origin": origin})):
                assert answer.headers["access-control-allow-origin"] == origin
                assert answer.headers["vary"] == "Origin"
                assert "access-control-allow-methods" not in answer.headers
        for origin in ("https://evil.example.com", f"{_ORIGIN}.evil.com", "null", "", f"{_ORIGIN}:444", "https://x, y",
                       _ORIGIN.replace("https", "http"), f"{_ORIGIN}/", f"{_ORIGIN}\tx"):
            refused = gate.client.options("/v1/completions", headers={"Origin": origin, **_PREFLIGHT})
            assert refused.status_code == 401, origin
            assert not _cors(refused)
        assert gate.client.options("/v1/completions", headers={"Origin": _ORIGIN}).status_code == 401  # asks nothing
        assert gate.client.options("/v1/unknown", headers={"Origin": _ORIGIN, **_PREFLIGHT}).status_code == 401
        assert {seen.method for seen in engine.requests} == {"GET"}


def test_star_admits_all_origins_and_still_requires_a_key(tmp_path: Path) -> None:
    with Gateway(tmp_path, CORS_ALLOWED_ORIGINS="*") as gate, gate.engine():
        asked = gate.client.options("/v1/messages", headers={"Origin": "https://any.example", **_PREFLIGHT})
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (204, "*")
        assert gate.client.post("/v1/messages", headers={"Origin": "https://any.example"}).status_code == 401
        assert not _cors(gate.client.get("/v1/models", headers=BEARER))


@pytest.mark.parametrize("settings", [
    {"TRUSTED_PROXIES": "::1 10.0.0.0/8", "CORS_ALLOWED_ORIGINS": "*"}, {"CORS_ALLOWED_ORIGINS": "http://[::1]:80"}])
@pytest.mark.parametrize("with_tls", [False, True])
def test_nginx_accepts_the_settings_without_warnings(tmp_path: Path, settings: dict[str, str], with_tls: bool) -> None:
    gate = _secure(tmp_path, **settings) if with_tls else Gateway(tmp_path, **settings)
    done = subprocess.run(["nginx", "-t", "-c", str(gate.run_dir / "nginx.conf"), "-e", "stderr"], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not re.findall(r"\[\w+\]", done.stderr)


# --- bodies

def test_body_is_streamed_to_the_engine(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gate, socket.socket(socket.AF_UNIX) as listener:
        gate.states.update(phase=Phase.READY)
        listener.bind(str(gate.run_dir / "engine.sock"))
        listener.listen()
        listener.settimeout(60)
        with socket.create_connection(("127.0.0.1", gate.port), timeout=30) as client:
            client.sendall(request("/v1/completions", f"{authorization(KEY)}Content-Length: 8\r\n", method="POST")
                           + b"half")
            engine, _ = listener.accept()
            with engine:
                engine.settimeout(60)
                seen = b""
                while not seen.endswith(b"half"):
                    seen += engine.recv(65536)
                client.sendall(b"rest")
                assert engine.recv(100) == b"rest"
                engine.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_missing_body_closes_the_connection(tmp_path: Path) -> None:
    """nginx counts it as 408 and sends nothing: who is too slow to send would be too slow to read."""
    gate = Gateway(tmp_path)
    file = gate.run_dir / "nginx.conf"
    file.write_text(file.read_text().replace("client_body_timeout 30s", "client_body_timeout 1s"))
    with gate, gate.engine():
        late = request("/v1/completions", f"{authorization(KEY)}Content-Length: 8\r\n", method="POST") + b"half"
        assert gate.send(late) == b""
        wait_until(lambda: " 408, " in gate.log.read_text(), 5, "it is in the log")
        assert gate.client.get("/v1/models", headers=BEARER).status_code == 200


@pytest.mark.fault("Thousands of connections from one client, each with half a request",
                   "Other clients are served; each of these connections is closed after 10 s.")
def test_thousands_of_incomplete_requests_block_no_client(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with Gateway(tmp_path) as gate, gate.engine(), ExitStack() as stack:
            for _ in range(3000):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", gate.port), timeout=30))
                connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Half")
            for _ in range(10):
                with httpx.Client(trust_env=False) as fresh:
                    assert fresh.get(f"{gate.url}/v1/models", headers=BEARER).status_code == 200
            connection.settimeout(30)  # nginx itself would wait for 60 s
            with pytest.raises(ConnectionResetError):
                connection.recv(100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_errors_of_nginx_on_anthropic_routes_have_their_form(tmp_path: Path) -> None:
    with Gateway(tmp_path) as gate:
        big = {"content": b"x" * (11 << 20), "headers": BEARER}
        for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/completions"):
            kinds = [error_of(answer)["type"] for answer in (
                gate.client.post(path), gate.client.get(path, headers=BEARER), gate.client.post(path, **big),
                gate.client.post(path, headers=BEARER))]
            assert kinds == (["invalid_request_error"] * 3 + ["server_error"] if path == "/v1/completions" else [
                "authentication_error", "invalid_request_error", "request_too_large", "overloaded_error"])
        assert openai_error(gate.client.get("/v1/messagesx"))["code"] == "invalid_api_key"
        assert "starting" in str(error_of(gate.client.post("/v1/messages", headers=BEARER))["message"])
