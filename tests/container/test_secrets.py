"""Canary secrets and traps on paths that libraries execute: no secret appears anywhere, and no trap is executed.

One container pulls from a stand-in hub that requires the token, and serves the demo model; then everything readable of
it is searched.
"""

from __future__ import annotations

import json
import pickle
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fakes.hub import Hub
from shoehorn.common.paths import HOME
from shoehorn.runtime import programs
from support.tracked import BUILD_CANARY, Container, docker

pytestmark = pytest.mark.container

KEY = "sk-canary-5b1f0c7e9a3d4862"
TOKEN = "ms-canary-d04e8a61f2b79c35"
OTHER_TOKEN = "hf-canary-83c6e19d5a7f20b4"
SECRETS = (KEY, TOKEN, OTHER_TOKEN)
EXECUTED = "TRAP EXECUTED"
_TOKEN_FILES = ("/run/shoehorn/hf_token", "/run/shoehorn/modelscope_api_token")
"""The only copy of each; only `pull` reads them."""


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, (f"{EXECUTED} cookies",)


@pytest.fixture(scope="module")
def container(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """Start it with secrets as files, and with a model.py and a cookie file where libraries would execute them."""
    home = tmp_path_factory.mktemp("canary")
    for name, text in (("secrets/api_key", KEY), ("secrets/token", TOKEN), ("secrets/hf", OTHER_TOKEN),
                       ("model/model.py", f"print('{EXECUTED} model.py', flush=True)\n")):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text)
    (home / "credentials").mkdir()
    (home / "credentials" / "cookies").write_bytes(pickle.dumps(_Trap()))
    _make_readable(home)
    gateway = json.loads(docker("network", "inspect", "bridge"))[0]["IPAM"]["Config"][0]["Gateway"]
    with Hub({"shoehorn/demo": HOME / "demo" / "model"}, address=gateway, token=TOKEN) as hub:
        settings = {"MODEL_ID": "shoehorn/demo", "MODELSCOPE_ENDPOINT": hub.url, "DRAIN_TIMEOUT": "3",
                    "API_KEY_FILE": "/run/secrets/api_key", "MODELSCOPE_API_TOKEN_FILE": "/run/secrets/token",
                    "HF_TOKEN_FILE": "/run/secrets/hf",
                    "MODELSCOPE_HOME": "/home/shoehorn/.modelscope", "VLLM_SERVER_DEV_MODE": "1"}
        identity = docker(
            "run", "--detach", "--publish=127.0.0.1::6333", "--publish=127.0.0.1::6334", "--shm-size=1g",
            "--stop-timeout=60", *(f"--env={name}={value}" for name, value in settings.items()),
            f"--volume={home}/secrets:/run/secrets:ro", f"--volume={home}/model:/opt/ml/model:ro",
            f"--volume={home}/credentials:/home/shoehorn/.modelscope/credentials:ro", image)
        running = Container(identity.strip())
        try:
            running.wait_for("ready", 240)
            assert any(TOKEN in request.headers.get("authorization", "") for request in hub.requests)
            for key in (KEY, KEY[:-1], f"{KEY}x"):
                httpx.post(f"{running.url(6333)}/v1/chat/completions?key={KEY}", timeout=60,
                           headers={"Authorization": f"Bearer {key}"},
                           json={"model": "shoehorn/demo", "messages": [{"role": "user", "content": "hello"}],
                                 "max_tokens": 2})
            yield running
        finally:
            running.remove()


def _make_readable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _assert_no_secret(text: str) -> None:
    assert not [secret for secret in SECRETS if secret in text]


def test_key_is_valid(container: Container) -> None:
    answer = httpx.get(f"{container.url(6333)}/v1/models", headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    assert answer.status_code == 200


def test_log_contains_no_secret(container: Container) -> None:
    assert "POST /v1/chat/completions" in container.logs
    _assert_no_secret(container.logs)


def test_dockers_descriptions_contain_no_secret(container: Container, image: str) -> None:
    description = json.dumps(container.inspect())
    history = docker("history", "--no-trunc", image)
    assert "API_KEY_FILE" in description
    _assert_no_secret(description + docker("image", "inspect", image) + history)
    assert re.findall(r"(?:KEY|TOKEN|SECRET|PASSWORD)=\S+", history) == []


def test_no_process_has_a_secret_in_its_environment_or_arguments(container: Container) -> None:
    seen = container.execute("sh", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'")
    assert programs.ENGINE in seen
    _assert_no_secret(seen)


def test_engine_and_gateway_do_not_know_the_path_of_the_token(container: Container) -> None:
    script = ("for p in /proc/[0-9]*; do tr '\\0' '\\n' < $p/environ | grep -q '_TOKEN' && tr '\\0' ' ' < $p/cmdline "
              "&& echo; done; true")
    commands = container.execute("sh", "-c", script).splitlines()
    assert commands  # tini and the children of supervisord have the path of a file
    assert [line for line in commands if re.search(r"vllm|VLLM|nginx", line)] == []


def test_engine_has_no_developer_routes(container: Container) -> None:
    script = """
import http.client, socket
connection = http.client.HTTPConnection("engine")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect("/run/shoehorn/engine.sock")
connection.request("GET", "/server_info")
print(connection.getresponse().status)
"""
    assert container.execute("python", "-c", script).strip() == "404"


def test_public_pages_contain_no_secret(container: Container) -> None:
    public, metrics = container.url(6333), container.url(6334)
    for address in (f"{public}/", f"{public}/status", f"{public}/readyz", f"{public}/livez", f"{metrics}/metrics"):
        answer = httpx.get(address, timeout=60)
        assert answer.status_code == 200
        _assert_no_secret(answer.text + str(answer.headers))


def test_only_the_token_files_contain_a_secret(container: Container) -> None:
    places = "/run/shoehorn /models /home /tmp /var /etc /opt/shoehorn /root /dev/shm"
    script = f"grep -rlF {' '.join(f'-e {secret}' for secret in SECRETS)} {places} 2>/dev/null; true"
    assert sorted(container.execute("sh", "-c", script).split()) == list(_TOKEN_FILES)
    for file in _TOKEN_FILES:
        assert container.execute("stat", "-c", "%a %u", file).split() == ["600", "10001"]


def test_no_layer_of_the_image_contains_a_secret(container: Container, image: str) -> None:
    """Hidden files included; the build had a secret in its folder and its environment."""
    known = "Entry point of the container"  # is in a layer, so that the search is known to work
    assert known in (HOME / "entrypoint.py").read_text(encoding="utf-8")
    save = subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE)
    patterns = [f"-e{text}" for text in (known, BUILD_CANARY, *SECRETS)]
    matches = subprocess.run(["grep", "-aoF", *patterns], check=False, stdin=save.stdout, capture_output=True,
                             text=True, timeout=400)
    assert save.stdout is not None
    save.stdout.close()
    assert save.wait(30) == 0
    assert set(matches.stdout.split("\n")) == {known, ""}


def test_no_trap_was_executed(container: Container) -> None:
    assert container.execute("cat", "/opt/ml/model/model.py").startswith("print")
    container.execute("test", "-r", "/home/shoehorn/.modelscope/credentials/cookies")
    assert EXECUTED not in container.logs


def test_traps_are_executed_without_shoehorn(image: str, container: Container) -> None:
    """Use the libraries without Shoehorn's environment, in the same container."""
    server = ("from fastapi import FastAPI; from model_hosting_container_standards.sagemaker import bootstrap; "
              "bootstrap(FastAPI())")
    assert f"{EXECUTED} model.py" in container.execute("python", "-c", server)
    hub = "import modelscope_hub; modelscope_hub.HubApi()"
    assert f"{EXECUTED} cookies" in container.execute("python", "-c", hub, accept=(0, 1))
