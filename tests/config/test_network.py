"""Proxies and certificates of the environment: both libraries accept what passes, and no password is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import requests

from fakes.ports import free_port
from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.config import network
from shoehorn.config.settings import load
from shoehorn.hub.huggingface import HuggingFaceRepository

PASSWORD = "pw-canary"  # to be searched for


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*network.PROXIES, *network.CERTIFICATES, "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("value", [
    "http://proxy.example.com:3128", "proxy.example.com:3128", "https://proxy.example.com", "socks5://127.0.0.1:1080",
    "socks5h://u:p@127.0.0.1:1080", "socks://127.0.0.1:1080/", "SOCKS5://h:1", f"http://u:{PASSWORD}%23@h:1",
    "http://[::1]:3128/", "  http://h:1  ", "DOMAIN\\user:p@h:1"])
@pytest.mark.parametrize("name", network.PROXIES)
def test_valid_proxy_is_accepted_by_the_library(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    assert network.invalid_proxies({name: value}) == []
    monkeypatch.setenv(name, value)
    assert network.prepare(os.environ) == []
    httpx.Client().close()


@pytest.mark.parametrize("value", [
    f"http://u:1234#{PASSWORD}@h:1",
    f"http://u:{PASSWORD}#1@h:1", f"http://u:{PASSWORD}/1@h:1", f"http://u:{PASSWORD}?@h:1", f"http://u:{PASSWORD}@h:port",
    f"socks4://u:{PASSWORD}@h:1", f"ftp://u:{PASSWORD}@h", f"http://u:{PASSWORD}@h:99999", "http://", "http://h:1/path"])
@pytest.mark.parametrize("name", network.PROXIES)
def test_invalid_proxy_is_refused_by_name_without_its_password(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({name: value})
    assert caught.value.cause.startswith(f"{name}: ")
    assert PASSWORD not in str(caught.value)
    load({name: value, "OFFLINE": "yes"})
    load({name: value, "MODEL_SOURCE": "local", "MODEL_ID": "/m"})


@pytest.mark.parametrize(("value", "left"), [
    ("localhost,127.0.0.1, .example.com", "localhost,127.0.0.1,.example.com"), ("a b", "a,b"), ("*", "*"),
    ("[::1]", "::1"),
    ("10.0.0.0/8,::1,host:8080,*.corp", "10.0.0.0/8,::1,host:8080,*.corp"),
    ("::1/128,fe80::/10,[fe80::]/10,[::1,a", "a"), (",,", ""), ("<local>,http://x", "<local>,http://x")])
def test_no_proxy_keeps_what_the_library_can_read(monkeypatch: pytest.MonkeyPatch, value: str, left: str) -> None:
    monkeypatch.setenv("NO_PROXY", value)
    monkeypatch.setenv("HTTPS_PROXY", "http://h:1")
    remarks = network.prepare(os.environ)
    assert os.environ["NO_PROXY"] == left
    assert len(remarks) == len(value.replace(",", " ").split()) - len(left.split(",") if left else [])
    httpx.Client().close()


def test_one_bundle_of_certificates_serves_both_libraries(tmp_path: Path) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.touch()
    for name in network.CERTIFICATES:
        environment = {name: str(bundle)}
        assert network.prepare(environment) == []
        assert {environment["SSL_CERT_FILE"], environment["REQUESTS_CA_BUNDLE"]} == {str(bundle)}
    environment = {"SSL_CERT_FILE": "/home/me/miniconda3/ssl/cacert.pem"}
    assert "not found here; ignored" in network.prepare(environment)[0]
    assert environment == {}


def test_socks_proxy_reaches_both_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens: the libraries must fail to connect, not to import."""
    monkeypatch.setenv("ALL_PROXY", f"socks://127.0.0.1:{free_port()}")
    network.prepare(os.environ)
    with pytest.raises(httpx.ConnectError), httpx.Client() as client:
        client.get("http://hub.invalid/")
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get("http://hub.invalid/", timeout=10)


def test_unavailable_hub_names_the_proxy_not_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://u:{PASSWORD}@127.0.0.1:{free_port()}")
    with HuggingFaceRepository(load({"HF_ENDPOINT": "http://hub.invalid"}), "a/b", "main") as hub, \
            pytest.raises(ModelUnavailableError) as caught:
        hub.listing()
    assert "HTTP_PROXY" in caught.value.remedy
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("command", [("plan", "--gpu", "24GB"), ("pull",), ("serve",), ("profiles", "--gpu", "24GB")])
@pytest.mark.fault("Invalid proxy in the environment", "Exit code 2 with the variable's name, without its password.")
def test_command_with_an_invalid_proxy_ends_with_one_message(tmp_path: Path, command: tuple[str, ...]) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": "src", "RUN_DIR": str(tmp_path / "run"),
                   "MODELS_DIR": str(tmp_path), "all_proxy": f"http://u:{PASSWORD}#@h:1"}
    done = subprocess.run([sys.executable, "-m", "shoehorn.cli", *command], env=environment, capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "all_proxy: invalid proxy URL" in done.stderr
    assert "Traceback" not in done.stderr
    assert PASSWORD not in done.stderr + done.stdout
