"""Fuzzing: of thousands of malformed, forged and misleading requests without a valid key none reaches the engine.

The requests come from a seeded generator, so that a failure can be repeated; SEED in the environment takes another one.
"""

from __future__ import annotations

import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoehorn.gateway.nginx_config import ROUTES
from support.gateway_process import KEY, Gateway, authorization, request

pytestmark = pytest.mark.process

NUMBER = 10_000
TARGETS = (
    "/invocations", "/tokenize", "/detokenize", "/metrics", "/health", "/version", "/docs", "/openapi.json", "/pooling",
    "/inference/v1/generate", "/scale_elastic_ep", "/-/drain?seconds=0", "/-/probe", "/", "/livez", "/status", "*",
    "/v1", "/v1/",
    "/v1/models/x", "/v1/chat/completions/render", "/.shoehorn/error", *(route.path for route in ROUTES),
)
METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PRI", "get", "P\x00ST", "")
HOSTS = ("x", "localhost", "127.0.0.1:6333", "engine", "x/?", "x#", "evil@engine", "[::1]", "", "a" * 300, "x\ty")
FORGED = (
    "X-Shoehorn-Key: default", "X-Shoehorn-Limits: concurrent=9", "X-Original-URL: /invocations",
    "X-Rewrite-URL: /v1/models", "X-Forwarded-For: 127.0.0.1", "X-Forwarded-Host: engine", "X-Forwarded-Uri: /health",
    "X-Accel-Redirect: /v1/models", "X-HTTP-Method-Override: POST", "Forwarded: for=127.0.0.1", "X-Real-IP: 127.0.0.1",
    "Connection: close, Authorization", "Connection: X-Shoehorn-Key", "Upgrade: websocket", "Upgrade: h2c",
    "Expect: 100-continue", "Proxy-Authorization: Bearer " + KEY, "Cookie: Authorization=Bearer " + KEY,
    "X-Authorization: Bearer " + KEY, "Referer: http://x/?key=" + KEY,
    "Content-Type: multipart/form-data; boundary=x", "Range: bytes=0-",
)
MALFORMED = (
    "Authorization : Bearer " + KEY, " Authorization: Bearer " + KEY, "Transfer-Encoding: chunked",
    "Transfer-Encoding: identity", "Transfer-Encoding: xchunked", "Content-Length: 0",
    "Content-Length: 5", "Content-Length: -1", "Content-Length: 99999999999999999999", "X-Long: " + "a" * 40_000,
    "X-Nul: a\x00b", "X-Latin: \xff\xfe", "NoColon", ": empty", "X-Fold: a\r\n b",
)


def _key(dice: random.Random) -> str:
    """A key that is not the valid one, often by one character only."""
    place = dice.randrange(len(KEY))
    if dice.random() < 0.05:
        return dice.choice([KEY[:place] + "\x00" + KEY[place:], "a" * 9000, "\xe9" * 20])
    return dice.choice([
        "", "null", "undefined", "*", ".*", "default", KEY[:-1], KEY[1:], KEY + "x", KEY * 2, KEY.swapcase(),
        KEY[:place] + dice.choice("abcXYZ019!") + "~" + KEY[place + 1:], KEY[:place], KEY.replace("/", "%2f"),
        "a" * dice.choice([1, 511, 513]), '"' + KEY + '"', "sk-" + "".join(dice.choices("0123456789abcdef", k=40)),
        "{}", "' OR 1=1 --", "$http_authorization", "\\" + KEY])


def _target(dice: random.Random) -> str:
    """One of the targets, as often as not bent."""
    target = dice.choice(TARGETS)
    if dice.random() < 0.5:
        return target
    place = dice.randrange(len(target) + 1)
    return dice.choice([
        target.upper(), "/" + target, target + "/", target + "?key=" + KEY, target + "#x",
        target + ";x", "/v1/.." + target, "/livez/.." + target, "/./" + target, "http://engine" + target,
        "//engine" + target, target.replace("/", "%2f"), target.replace("/", "\\"), target.replace("o", "%6f"),
        target[:place] + dice.choice(["%00", "%0d%0a", "\x00", " ", "%", "\xff", "..", "/../", "%2e%2e/"]) +
        target[place:], target + "?" + "a" * dice.choice([1, 5000, 40_000]), "/v1/models/.." + target])


def _without_key(dice: random.Random) -> bytes:
    """A request, or what looks like one, without a valid key."""
    headers = [*dice.sample(FORGED, dice.choice([0, 0, 1, 2, 3])), *dice.sample(MALFORMED, dice.random() < 0.15)]
    scheme = dice.choice(["Bearer ", "bearer ", "Basic ", "Digest ", "", "Bearer\t", "Bearer Bearer ", "Token "])
    for name in dice.choice([(), ("Authorization",), ("x-api-key",), ("Authorization", "x-api-key"),
                             ("AUTHORIZATION", "authorization"), ("api-key",)]):
        headers.append(f"{name}: {scheme if name.lower() == 'authorization' else ''}{_key(dice)}")
    dice.shuffle(headers)
    odd = ["HTTP/0.9", "HTTP/2.0", "HTTP/1.10", "HTTP/9", "", "XTTP/1.1"]
    version = dice.choice(["HTTP/1.1"] * 20 + ["HTTP/1.0"] * 4 + [dice.choice(odd)])
    method = dice.choice(["GET", "POST"] * 5 + [dice.choice(METHODS)])
    host = dice.choice(HOSTS) if dice.random() < 0.2 else "x"
    lines = [f"{method} {_target(dice)} {version}".rstrip(), f"Host: {host}", *headers]
    if dice.random() < 0.8:
        lines.append("Connection: close")
    end = dice.choice(["\r\n"] * 20 + ["\n", "\r"])
    body = dice.choice(["", "", "{}", '{"model": "x", "prompt": "x"}', "0\r\n\r\n", "5\r\nabcde\r\n0\r\n\r\n",
                        request("/v1/chat/completions", "Content-Length: 0\r\n", method="POST").decode(),
                        request("/invocations", "Content-Length: 0\r\n", method="POST").decode()])
    if body and dice.random() < 0.7:
        lines.append(f"Content-Length: {len(body) + dice.choice([0, 0, 0, -1, 7])}")
    return (end.join(lines) + end * 2 + body).encode("latin-1")


def _exchange(port: int, data: bytes) -> bytes:
    """The first bytes of the answer; empty when none comes."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        try:
            connection.sendall(data)
            connection.settimeout(0.2)  # nginx still waits for the rest of some of them
            while piece := connection.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionResetError, BrokenPipeError):
            pass
    return answer


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gateway]:
    """A gateway of this test's own."""
    with Gateway(tmp_path) as gateway:
        yield gateway


def test_fuzzed_requests_without_a_key_do_not_reach_the_engine(gate: Gateway) -> None:
    seed = int(os.environ.get("SEED", "20261123"))
    dice = random.Random(seed)  # noqa: S311  # a test's data, not a secret
    requests = [_without_key(dice) for _ in range(NUMBER)]
    with gate.engine() as engine, ThreadPoolExecutor(16) as pool:
        valid = request("/v1/completions", authorization(KEY) + "Content-Length: 2\r\n", method="POST") + b"{}"
        assert gate.send(valid).startswith(b"HTTP/1.1 200"), "a valid key does get through"
        assert [each.target for each in engine.requests] == ["/v1/completions"]
        engine.requests.clear()
        statuses: Counter[bytes] = Counter()
        for number, answer in enumerate(pool.map(lambda data: _exchange(gate.port, data), requests)):
            statuses[answer[9:12] if answer.startswith(b"HTTP/1.") else b"none"] += 1
            assert not engine.requests, (seed, number, requests[max(0, number - 20):number + 20], engine.requests)
            assert b'"engine":' not in answer, (seed, number, requests[number])
            assert b"HTTP/1.1 500" not in answer, (seed, number, requests[number])
            assert KEY.encode() not in answer, (seed, number, requests[number])
        assert not engine.requests, seed
        assert gate.client.get("/livez").status_code == 200
    print(dict(statuses))
    assert statuses[b"401"] > NUMBER // 10, statuses
    assert statuses[b"404"] > NUMBER // 10, statuses
    assert statuses.keys() <= {b"none", b"100", b"200", b"301", b"308", b"400", b"401", b"403", b"404", b"405", b"408",
                               b"411", b"413", b"414", b"415", b"431", b"501", b"505"}, statuses
