"""Properties of the Dockerfile that no test of the built image shows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from shoehorn.config.settings import TABLE
from shoehorn.hardware.detect import KERNEL_LIBRARY

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = {setting.name: setting.default for setting in TABLE}


def arguments(instruction: str) -> list[str]:
    """Return the arguments of every such instruction, with continued lines joined and comments removed."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = re.sub(r"\\\n\s*", " ", "\n".join(line for line in lines if not line.lstrip().startswith("#")))
    return re.findall(rf"^{instruction} (.*)$", text, re.MULTILINE)


def test_base_images_are_pinned_by_tag_and_digest() -> None:
    bases = [base for base in arguments("FROM") if base.startswith("${BASE_IMAGE:-")]
    assert len(bases) == 2
    assert all(re.match(r"\$\{BASE_IMAGE:-[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}\}", base) for base in bases)


def test_no_build_argument_or_variable_may_contain_a_secret() -> None:
    names = [name for rest in (*arguments("ARG"), *arguments("ENV")) for name in re.findall(r"(\w+)=", rest) or [rest]]
    assert {"FLAVOUR", "HOME"} <= set(names)
    assert [name for name in names if re.search(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", name)] == []


def test_every_python_package_is_verified_by_its_hash() -> None:
    commands = [command for rest in arguments("RUN") for command in rest.split("&&") if "pip install" in command]
    assert len(commands) == 4
    unverified = [command for command in commands if "--require-hashes" not in command]
    assert ["--offline" in command and "--editable ." in command for command in unverified] == [True]


def test_build_fails_without_the_library_of_the_cpu_kernel() -> None:
    [install] = [rest for rest in arguments("RUN") if "--editable ." in rest]
    assert f"&& test -r {KERNEL_LIBRARY.relative_to(ROOT)} " in install
    assert "gcc" in next(rest for rest in arguments("RUN") if "apt-get install" in rest)
    assert {"!setup.py", "**/*.so"} <= set((ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines())


def test_entry_point_health_check_and_ports_match_the_code() -> None:
    entry_point = json.loads(arguments("ENTRYPOINT")[-1])
    options, _, command = arguments("HEALTHCHECK")[-1].partition("CMD")
    health_check = json.loads(command)
    assert (entry_point[:3], health_check[2]) == (["tini", "--", "python"], "ready")
    for path in (entry_point[3], health_check[1]):
        assert (ROOT / Path(path).relative_to("/opt/shoehorn")).is_file()
    hours = re.search(r"--start-period=(\d+)h", options)
    assert hours
    assert int(hours[1]) >= 6, "a large model may take that long to be pulled"
    assert arguments("EXPOSE")[-1].split() == [DEFAULTS["PORT"], DEFAULTS["METRICS_PORT"]]


def test_unprivileged_user_owns_the_default_folders() -> None:
    words = shlex.split(next(rest for rest in arguments("RUN") if "useradd" in rest))
    assert arguments("USER") == [words[words.index("&&") - 1]]
    assert words[words.index("--uid") + 1] == "10001"
    assert {DEFAULTS["MODELS_DIR"], DEFAULTS["RUN_DIR"]} <= set(words)


def test_build_context_contains_only_listed_files() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
             if line and not line.startswith("#")]
    listed = {line[1:].split("/")[0] for line in lines if line.startswith("!")}
    assert lines[0] == "*"
    assert listed.isdisjoint({".git", ".env", "secrets", "tests", "models"})
    assert {"src", "profiles", "gateway", "healthcheck", "entrypoint.py"} <= listed
