"""Text of nginx's configuration: quoting, refused values, directives."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import pytest

from shoehorn.common.api_errors import error_bodies
from shoehorn.common.errors import SettingsError
from shoehorn.config.settings import load
from shoehorn.gateway.nginx_config import ROUTES, quote, render


def _render(run_dir: Path, user: str | None = None, **settings: str) -> str:
    return render(load({"RUN_DIR": str(run_dir), "MODEL_ID": "a/b", **settings}), run_dir, user)


def _words(text: str, directive: str) -> list[str]:
    """Arguments of a directive, without quotes, wherever it occurs."""
    return [word.strip('"') for line in re.findall(rf"^\s*{directive} (.+);", text, re.M) for word in line.split()]


@pytest.mark.parametrize(("value", "written"), [
    ("plain", '"plain"'), ("a b;{}#'", '"a b;{}#\'"'), ('"', r'"\""'), ("\\", r'"\\"'), ("\\n", r'"\\n"'),
    ("\n", r'"\n"'), (7, '"7"'), ("鞋", '"鞋"')])
def test_words_are_quoted(value: object, written: str) -> None:
    assert quote(value) == written


@pytest.mark.parametrize("value", ["$host", "a\0b", "a\rb", "\x7f", "\udcff"])
def test_characters_that_nginx_cannot_quote_are_rejected(value: str) -> None:
    with pytest.raises(SettingsError, match="unsupported by nginx"):
        quote(value)


@pytest.mark.parametrize("name", ["with $dollar", "star*", "what?", "brack[et", "x" * 100])
def test_run_directory_that_nginx_would_misread_is_rejected(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        _render(Path("/tmp") / name)
    assert caught.value.remedy


def test_model_name_that_nginx_would_misread_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "cheap$model").mkdir()
    with pytest.raises(SettingsError, match="unsupported by nginx") as caught:
        _render(tmp_path, MODEL_ID=str(tmp_path / "cheap$model"), MODEL_SOURCE="local")
    assert "SERVED_MODEL_NAME" in caught.value.remedy


def test_settings_reach_the_configuration(tmp_path: Path) -> None:
    text = _render(tmp_path, PORT="7001", DRAIN_TIMEOUT="33")
    assert _words(text, "listen") == ["7001", "default_server"]
    assert _words(text, "worker_shutdown_timeout") == ["33s"]
    assert _words(text, "pid") == [str(tmp_path / "nginx.pid")]
    assert "user" not in re.findall(r"^\w+", text, re.M)
    assert _words(_render(tmp_path, user="root"), "user") == ["root"]
    assert _words(_render(tmp_path, DRAIN_TIMEOUT="0"), "worker_shutdown_timeout") == ["1s"]


@pytest.mark.parametrize(("most", "files", "connections"), [
    (resource.RLIM_INFINITY, "8256", "8192"), (65536, "8256", "8192"), (1024, "1024", "960")])
def test_connections_are_limited_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int,
                                                  files: str, connections: str) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, most))
    text = _render(tmp_path)
    assert (_words(text, "worker_rlimit_nofile"), _words(text, "worker_connections")) == ([files], [connections])


def test_engine_is_reached_by_listed_routes_and_health_only(tmp_path: Path) -> None:
    text = _render(tmp_path)
    assert sorted(_words(text, "proxy_pass")) == ["http://engine$engine_path", "http://engine/health", "http://keys/"]
    paths = re.findall(r'^ *set \$engine_path "(.*)";', text, re.M)
    assert sorted(paths) == sorted([*(route.path for route in ROUTES), ""])  # "" is answered by nginx itself
    assert "*" not in str(paths)


def test_files_are_written_to_the_run_directory_only(tmp_path: Path) -> None:
    text = _render(tmp_path)
    written = _words(text, r"(?:pid|\w+_temp_path)")
    assert {Path(path).parent for path in written} == {tmp_path}
    assert len(written) == 6
    assert _words(text, "access_log")[0] == "/dev/stdout"


def test_configuration_contains_no_secret(tmp_path: Path) -> None:
    assert "canary" not in _render(tmp_path, API_KEY="sk-canary-key")
    assert "PRIVATE" not in _render(tmp_path, TLS_CERT_FILE="/c", TLS_KEY_FILE="/k")


def test_every_route_to_the_engine_requires_a_key(tmp_path: Path) -> None:
    text = _render(tmp_path)
    api = text[text.index('location ^~ /v1/ {'):text.index("location @engine {")]
    assert "auth_request /.shoehorn/key;" in api
    assert "auth_request off" not in text
    assert text.count("try_files /nothing @engine;") == api.count("try_files /nothing @engine;") == len(ROUTES) + 1
    assert text.count("@engine;") == len(ROUTES) + 1


def test_disabled_features_add_no_directives(tmp_path: Path) -> None:
    plain = _render(tmp_path)
    for word in ("ssl", "http2", "realip", "real_ip", "Access-Control", "preflight"):
        assert word not in plain
    secure = _render(tmp_path, TLS_CERT_FILE="/c", TLS_KEY_FILE="/k", TRUSTED_PROXIES="10.0.0.0/8",
                     CORS_ALLOWED_ORIGINS="https://a.example")
    assert _words(secure, "listen") == ["6333", "default_server", "ssl", "http2"]
    assert _words(secure, "set_real_ip_from") == ["10.0.0.0/8"]
    assert '"https://a.example" "https://a.example";' in secure
    assert "/c" not in _words(secure, "ssl_certificate")  # the checked copy in RUN_DIR


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (429, "rate_limit_error"),
                                              (500, "server_error")])
def test_errors_have_the_openai_form(status: int, kind: str) -> None:
    bodies = error_bodies(status, "Words.", "a_code")
    assert json.loads(bodies["openai"])["error"] == {"message": "Words.", "type": kind, "param": None, "code": "a_code"}


def test_relative_run_directory_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _words(_render(Path("run")), "pid") == [str(tmp_path / "run" / "nginx.pid")]


@pytest.mark.parametrize(("status", "kind"), [
    (400, "invalid_request_error"), (401, "authentication_error"), (404, "not_found_error"), (405,
     "invalid_request_error"), (413, "request_too_large"), (429, "rate_limit_error"), (500, "api_error"),
    (503, "overloaded_error")])
def test_errors_have_the_anthropic_form(status: int, kind: str) -> None:
    body = json.loads(error_bodies(status, "Words.", "a_code")["anthropic"])
    assert body == {"type": "error", "error": {"type": kind, "message": "Words."}}
