"""`shoehorn serve`: settings, hardware and profile checked, process files written, then supervisord in this process.

Rules: whatever can be found wrong at once is found here, before anything starts; secrets leave the environment before
any other program begins; the run directory starts clean and is entered by its owner only.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import pwd
import resource
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from shoehorn import __version__
from shoehorn.common import disk, locks, mounts
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import SettingsError
from shoehorn.config import secrets
from shoehorn.config import settings as settings_module
from shoehorn.config.models_dir import ModelsDir
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs
from shoehorn.gateway import nginx_config, tls
from shoehorn.gateway.keys import sources
from shoehorn.gateway.keys.store import NewKey
from shoehorn.hardware import detect, requirements
from shoehorn.runtime import supervisord_config
from shoehorn.runtime.child_process import end_recorded_group
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`serve` takes no arguments: settings come from the environment."""


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Prepare everything and become supervisord; returns only by an exception."""
    settings = settings_module.load(environment)
    machine = detect.detect()
    profile = inputs.select_profile(settings, machine)
    if profile.match.device == "cuda":
        requirements.check(machine)
        requirements.require_gpus(machine, profile.name)
    paths = RunDir(settings.run_dir)
    lock = _prepare_run_dir(paths)
    _require_volume(settings.models_dir)
    for port, name in ((settings.port, "PORT"), (settings.metrics_port, "METRICS_PORT")):
        _require_port(port, name)
    user = pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None
    if settings.tls_cert_file:
        tls.install(settings)
    write_atomic(paths.nginx_config, nginx_config.render(settings, settings.run_dir, user), 0o600)
    supervisord_config.write_supervisord_config(settings, user)
    made = sources.prepare(settings)
    if made:
        print(first_key_line(made), flush=True)
    write_atomic(paths.welcome, welcome(settings, made), 0o600)
    StateFile(settings.run_dir).update(phase=Phase.STARTING, detail="starting", model=settings.served_model_name)
    print(f"shoehorn {__version__}: profile {profile.name}, gateway on port {settings.port}, "
          f"metrics on port {settings.metrics_port}", flush=True)
    no_core_dumps()
    os.set_inheritable(lock, True)  # held until supervisord ends
    os.execve(sys.executable, [sys.executable, "-m", "shoehorn.runtime.supervisord", str(settings.run_dir)],
              _without_secrets(settings, environment))


def no_core_dumps() -> None:
    """Let no program dump its memory, with keys and prompts, to a disk: from here on, and for all that is started.

    A limit of 0 keeps Linux from writing a file, not from piping the dump to a program of the host's; one of 1 byte
    keeps it from both (Linux, fs/coredump.c).
    """
    limit = 0 if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 else 1  # nobody but root raises a limit
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def welcome(settings: Settings, made: NewKey | None) -> str:
    """What is printed when the server is ready: how to call it. Shows a key only if it was just made."""
    bearer = made.token if made else "$API_KEY" if settings.api_key else "YOUR_KEY"
    body = shlex.quote(json.dumps({"model": settings.served_model_name, "stream": True,
                                   "messages": [{"role": "user", "content": "你叫啥?"}]}, ensure_ascii=False))
    command = "curl -N"
    scheme = "http"
    if settings.tls_cert_file:  # -k: the certificate is for the name by which clients know this machine
        command, scheme = "curl -k -N", "https"
    return "\n".join([
        "", f"Ready: {settings.served_model_name} on port {settings.port}. Try:", "",
        f"{command} {scheme}://127.0.0.1:{settings.port}/v1/chat/completions "
        f'-H "Authorization: Bearer {bearer}" -H "Content-Type: application/json" -d {body}', "",
        *(["YOUR_KEY is shown only when it is made. A new one: shoehorn keys add NAME", ""]
          if bearer == "YOUR_KEY" else [])])


def first_key_line(made: NewKey) -> str:
    """What a start that makes the first key prints at once: it is known then, even if that start never gets ready."""
    return (f"shoehorn: made the API key {made.key.name!r}, which only this start shows: {made.token}\n"
            f"  -> lost it? Type: shoehorn keys rotate {made.key.name}")


def _prepare_run_dir(paths: RunDir) -> int:
    """An empty run directory, locked; returns the lock's file descriptor.

    Raises:
        SettingsError: another appliance uses it, or it cannot be written.
    """
    try:
        paths.path.mkdir(parents=True, exist_ok=True)
        if paths.path.stat().st_uid == os.geteuid():  # under another uid of the image's group it is not ours to change
            paths.path.chmod(0o700)
        lock = locks.acquire(paths.lock, wait=False)
    except BlockingIOError:
        raise SettingsError(f"Another Shoehorn runs with RUN_DIR={paths.path}.",
                            "Stop it, or set another RUN_DIR.") from None
    except OSError as error:
        raise SettingsError(f"RUN_DIR={paths.path} cannot be used: {error.strerror}.",
                            "Mount a tmpfs there that this user may write, or set another RUN_DIR.") from error
    for record in paths.groups:
        end_recorded_group(record)  # of an appliance that was killed
    for entry in paths.path.iterdir():
        if entry == paths.lock:
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    paths.empty.mkdir()
    return lock


def _require_volume(models_dir: Path) -> None:
    try:
        state = ModelsDir(models_dir).state
        state.mkdir(parents=True, exist_ok=True)
        probe = state / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno == errno.EROFS:
            raise SettingsError(f"MODELS_DIR={models_dir} is mounted read-only, and the keys are kept there.",
                                "Mount it writable (without :ro). Models that nobody may change can lie elsewhere: "
                                "MODEL_SOURCE=local, and MODEL_ID their folder.") from error
        if error.errno in disk.FULL:
            raise SettingsError(f"The volume MODELS_DIR={models_dir} is full.",
                                "Free space there (shoehorn models), or mount a larger volume.") from error
        raise SettingsError(
            f"MODELS_DIR={models_dir} cannot be written by user {os.geteuid()}: {error.strerror}.",
            f"Mount a volume there, or on the host: sudo chown -R {os.geteuid()} THE_MOUNTED_FOLDER") from error
    mount = mounts.find_mount(models_dir)
    if mount and mount.is_anonymous:
        print(f"shoehorn: no volume is mounted at MODELS_DIR={models_dir}: what is pulled goes with the container\n"
              f"  -> Type: docker run -v models:{models_dir} ..., or use docker compose", flush=True)


def _require_port(port: int, name: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104  # the gateway's own address: every interface of the container
        except OSError as error:
            raise SettingsError(f"{name}={port} cannot be listened on: {error.strerror}.",
                                f"Stop what uses it, or set {name} to a free port.") from error


def _without_secrets(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """The programs' environment: the hubs' tokens as files in the run directory, other secrets not at all."""
    clean = secrets.without_secrets(environment)
    for name, token in (("MODELSCOPE_API_TOKEN", settings.modelscope_api_token), ("HF_TOKEN", settings.hf_token)):
        if token:
            path = RunDir(settings.run_dir).token(name)
            write_atomic(path, token, 0o600)
            clean[f"{name}_FILE"] = str(path)
    return clean
