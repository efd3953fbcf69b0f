"""The Dockerfile keeps the rules that matter, each of which is also seen to catch a file that breaks it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from shoehorn.config.settings import TABLE

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL")


def instructions(text: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) in order, with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word.upper(), rest.strip()) for word, _, rest in
            (line.strip().partition(" ") for line in joined.splitlines() if line.strip())]


def problems(text: str) -> list[str]:
    """What is wrong with a Dockerfile, in words; empty when it keeps every rule."""
    found: list[str] = []
    stages: list[str] = []
    user = "root"
    pipefail = False
    for word, rest in instructions(text):
        if word == "FROM":
            found += _base(rest, stages)
            user, pipefail = "root", False
        elif word == "RUN":
            found += _run(rest, pipefail)
        elif word == "SHELL":
            pipefail = "pipefail" in rest
        elif word == "USER":
            user = rest
        elif word == "ADD":
            found.append(f"ADD fetches and unpacks: {rest}")
        elif word == "COPY" and not re.search(r"--chown=(root|0)\b", rest):
            found.append(f"COPY does not say that root owns it: {rest}")
        elif word == "WORKDIR" and not rest.startswith("/"):
            found.append(f"WORKDIR is not absolute: {rest}")
        elif word in ("ARG", "ENV"):
            names = re.findall(r"(\w+)=", rest) or rest.split()
            found += [f"{word} {name} may hold a secret" for name in names if _SECRET.search(name)]
        elif word in ("ENTRYPOINT", "CMD", "HEALTHCHECK"):
            found += _exec_form(word, rest)
    if user.split(":")[0] in ("root", "0"):
        found.append("the image runs as root")
    return found


def _base(rest: str, stages: list[str]) -> list[str]:
    name, *alias = re.split(r"\s+AS\s+", rest, flags=re.IGNORECASE)
    image = match[1] if (match := re.fullmatch(r"\$\{\w+:-(.+)\}", name)) else name
    known = [stage for stage in stages if re.fullmatch(re.sub(r"\\\$\\\{\w+\\\}", ".+", re.escape(image)), stage)]
    stages += alias
    if known:
        return []
    tag = re.search(r"(?::([\w.-]+))?(?:@sha256:[0-9a-f]{64})?$", image)
    if not tag or not tag[0]:
        return [f"FROM {image} has no tag"]
    return [f"FROM {image} is not pinned"] if tag[1] == "latest" else []


def _run(rest: str, pipefail: bool) -> list[str]:
    found = []
    if "apt-get install" in rest:
        needed = ("apt-get update", "--no-install-recommends", " -y", "rm -rf /var/lib/apt/lists/*")
        found += [f"RUN apt-get install without {word.strip()}" for word in needed if word not in rest]
    if re.search(r"\bpip install\b", rest) and "--editable ." not in rest and "--require-hashes" not in rest:
        found.append("RUN pip install without --require-hashes")
    if re.search(r"(?<!\|)\|(?!\|)", rest) and not pipefail:
        found.append("RUN pipes without pipefail")
    if re.search(r"\b(curl|wget)\b|\bsudo\b", rest):
        found.append("RUN fetches with curl or wget, or uses sudo")
    return found


def _exec_form(word: str, rest: str) -> list[str]:
    command = rest if word != "HEALTHCHECK" else rest.partition("CMD")[2].strip()
    try:
        parsed = json.loads(command)
    except ValueError:
        parsed = None
    return [] if isinstance(parsed, list) and parsed else [f"{word} is not in exec form: {rest}"]


def test_the_dockerfile_keeps_every_rule() -> None:
    assert problems(DOCKERFILE) == []


def test_the_bases_are_pinned_by_tag_and_digest() -> None:
    bases = re.findall(r"^FROM \$\{BASE_IMAGE:-(\S+)\}", DOCKERFILE, flags=re.MULTILINE)
    assert len(bases) == 2
    assert [base for base in bases if not re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base)] == []


def test_the_image_carries_its_bill_of_materials_made_by_locked_tools() -> None:
    runs = [rest for word, rest in instructions(DOCKERFILE) if word == "RUN"]
    assert any("tools/sbom.py" in rest and "/usr/share/doc/shoehorn/sbom.json" in rest for rest in runs)
    assert any("supply-chain.txt" in rest and "--require-hashes" in rest for rest in runs)


_GOOD = "FROM debian:12\nRUN true\nUSER app\n"


@pytest.mark.parametrize(("text", "complaint"), [
    ("FROM debian\nUSER app", "has no tag"),
    ("FROM ${BASE:-debian}\nUSER app", "has no tag"),
    ("FROM debian:latest\nUSER app", "not pinned"),
    ("FROM a:1 AS one\nUSER app\nFROM one", "runs as root"),
    (_GOOD + "USER 0:0", "runs as root"),
    (_GOOD + "ADD https://example.org/x /x", "ADD"),
    (_GOOD + "COPY x /x", "COPY"),
    (_GOOD + "COPY --chown=app x /x", "COPY"),
    (_GOOD + "WORKDIR app", "WORKDIR"),
    (_GOOD + "ARG HF_TOKEN", "ARG HF_TOKEN"),
    (_GOOD + "ENV A=1 \\\n  API_KEY=x", "ENV API_KEY"),
    (_GOOD + "ENTRYPOINT python x.py", "ENTRYPOINT"),
    (_GOOD + "HEALTHCHECK --interval=5s CMD python x.py", "HEALTHCHECK"),
    (_GOOD + "RUN apt-get update && apt-get install -y gcc && rm -rf /var/lib/apt/lists/*", "recommends"),
    (_GOOD + "RUN apt-get update && apt-get install -y --no-install-recommends gcc", "lists"),
    (_GOOD + "RUN pip install -r lock.txt", "require-hashes"),
    (_GOOD + "RUN cat x | sh", "pipefail"),
    (_GOOD + "RUN curl -O https://example.org/x", "curl"),
])
def test_each_rule_catches_its_breach(text: str, complaint: str) -> None:
    assert any(complaint in problem for problem in problems(text)), problems(text)


@pytest.mark.parametrize("text", [
    "FROM a:1 AS one-x\nFROM one-${X} AS two\nFROM two\nUSER app",
    "FROM ${BASE:-registry.example:5000/a@sha256:" + "0" * 64 + "}\nUSER 10001",
    _GOOD + 'SHELL ["/bin/bash", "-o", "pipefail", "-c"]\nRUN cat x | sh',
    _GOOD + "RUN false || true",
])
def test_the_rules_let_good_files_pass(text: str) -> None:
    assert problems(text) == []


def _last(word: str) -> str:
    return [rest for name, rest in instructions(DOCKERFILE) if name == word][-1]


def test_tini_starts_the_entrypoint_that_exists() -> None:
    command = json.loads(_last("ENTRYPOINT"))
    assert command[:3] == ["tini", "--", "python"]
    assert (ROOT / Path(command[3]).relative_to("/opt/shoehorn")).is_file()


def test_the_healthcheck_asks_for_readiness_and_waits_for_a_big_download() -> None:
    options, _, command = _last("HEALTHCHECK").partition("CMD")
    script = json.loads(command)[1]
    assert json.loads(command)[2] == "ready"
    assert (ROOT / Path(script).relative_to("/opt/shoehorn")).is_file()
    assert int(re.search(r"--start-period=(\d+)h", options)[1]) >= 6  # type: ignore[index]  # its absence is a failure


def test_the_exposed_ports_are_the_settings_defaults() -> None:
    defaults = {setting.name: setting.default for setting in TABLE}
    assert _last("EXPOSE").split() == [defaults["PORT"], defaults["METRICS_PORT"]]


def test_the_account_owns_every_folder_that_the_defaults_write_to() -> None:
    defaults = {setting.name: setting.default for setting in TABLE}
    made = next(rest for name, rest in instructions(DOCKERFILE) if name == "RUN" and "useradd" in rest)
    words = shlex.split(made)
    assert {defaults["MODELS_DIR"], defaults["RUN_DIR"]} <= set(words)
    assert words[words.index("--uid") + 1] == "10001"


def test_only_named_files_enter_the_build() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
             if line and not line.startswith("#")]
    assert lines[0] == "*"
    named = {line[1:].split("/")[0] for line in lines if line.startswith("!")}
    assert named.isdisjoint({".git", ".env", "secrets", "tests", "models"})
    assert {"src", "profiles", "gateway", "healthcheck", "entrypoint.py"} <= named
