"""`shoehorn serve`: settings, hardware and profile checked, process files written, then supervisord in this process.

Rules: whatever can be found wrong at once is found here, before anything starts; secrets leave the environment before
any other program begins; the run directory starts clean and is entered by its owner only.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pwd
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from shoehorn import __version__, gateway, hardware, keys, profiles, render
from shoehorn import settings as settings_module
from shoehorn.errors import SettingsError
from shoehorn.files import write_atomic
from shoehorn.process import end_recorded_group
from shoehorn.settings import Settings
from shoehorn.state import Phase, StateFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`serve` takes no arguments: settings come from the environment."""


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Prepare everything and become supervisord; returns only by an exception."""
    settings = settings_module.load(environment)
    machine = hardware.detect()
    profile = profiles.select(settings, machine)
    if profile.match.device == "cuda":
        profiles.require_gpus(machine, profile.name)
    lock = _prepare_run_dir(settings.run_dir)
    _require_volume(settings.models_dir)
    for port, name in ((settings.port, "PORT"), (settings.metrics_port, "METRICS_PORT")):
        _require_port(port, name)
    user = pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None
    key = keys.ensure(settings)
    keys.write_map(settings.run_dir, [key.value])
    write_atomic(settings.run_dir / "nginx.conf", gateway.render(settings, settings.run_dir, user), 0o600)
    render.write_supervisord_config(settings, user)
    write_atomic(settings.run_dir / "welcome.txt", welcome(settings, key), 0o600)
    StateFile(settings.run_dir).update(phase=Phase.STARTING, detail="starting", model=settings.served_model_name)
    print(f"shoehorn {__version__}: profile {profile.name}, gateway on port {settings.port}, "
          f"metrics on port {settings.metrics_port}", flush=True)
    os.set_inheritable(lock, True)  # held until supervisord ends
    os.execve(sys.executable, [sys.executable, "-m", "shoehorn.supervise", str(settings.run_dir)],
              _without_secrets(settings, environment))


def welcome(settings: Settings, key: keys.ApiKey) -> str:
    """What is printed when the server is ready for the first time: how to call it. Shows a key only if just made."""
    bearer = {"generated": key.value, "setting": "$API_KEY", "volume": f"$({_key_reader(settings)})"}[key.origin]
    body = shlex.quote(json.dumps({"model": settings.served_model_name, "stream": True,
                                   "messages": [{"role": "user", "content": "你叫啥?"}]}, ensure_ascii=False))
    shown = [f"This key was made now and is shown once. To read it again: {_key_reader(settings)}", ""]
    return "\n".join([
        "", f"Ready: {settings.served_model_name} on port {settings.port}. Try:", "",
        f"curl -N http://127.0.0.1:{settings.port}/v1/chat/completions "
        f'-H "Authorization: Bearer {bearer}" -H "Content-Type: application/json" -d {body}', "",
        *(shown if key.origin == "generated" else [])])


def _key_reader(settings: Settings) -> str:
    """The command that prints a kept key, as typed where the `curl` is typed: on the host, when in a container."""
    in_container = Path("/.dockerenv").exists()
    return "docker compose exec -T shoehorn shoehorn keys show" if in_container else f"cat {keys.path(settings)}"


def _prepare_run_dir(run_dir: Path) -> int:
    """An empty run directory, locked; returns the lock's file descriptor.

    Raises:
        SettingsError: another appliance uses it, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if run_dir.stat().st_uid == os.geteuid():  # under another uid of the image's group it is not ours to change
            run_dir.chmod(0o700)
        lock = os.open(run_dir / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SettingsError(f"Another Shoehorn runs with RUN_DIR={run_dir}.",
                            "Stop it, or set another RUN_DIR.") from None
    except OSError as error:
        raise SettingsError(f"RUN_DIR={run_dir} cannot be used: {error.strerror}.",
                            "Mount a tmpfs there that this user may write, or set another RUN_DIR.") from error
    for record in ("engine.group", "pull.group"):
        end_recorded_group(run_dir / record)  # of an appliance that was killed
    for entry in run_dir.iterdir():
        if entry.name == "lock":
            continue
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    (run_dir / "nothing").mkdir()
    return lock


def _require_volume(models_dir: Path) -> None:
    try:
        (models_dir / ".shoehorn").mkdir(parents=True, exist_ok=True)
        probe = models_dir / ".shoehorn" / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"MODELS_DIR={models_dir} cannot be written by user {os.geteuid()}: {error.strerror}.",
            f"Mount a volume there, or on the host: sudo chown -R {os.geteuid()} THE_MOUNTED_FOLDER") from error


def _require_port(port: int, name: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104  # the gateway's own address: every interface of the container
        except OSError as error:
            raise SettingsError(f"{name}={port} cannot be listened on: {error.strerror}.",
                                f"Stop what uses it, or set {name} to a free port.") from error


def _without_secrets(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """The programs' environment: the hub's token as a file in the run directory, the API key not at all."""
    clean = {name: value for name, value in environment.items()
             if not any(name in (row.name, f"{row.name}_FILE") for row in settings_module.TABLE if row.secret)}
    if settings.modelscope_api_token:
        path = settings.run_dir / "modelscope_api_token"
        write_atomic(path, settings.modelscope_api_token, 0o600)
        clean["MODELSCOPE_API_TOKEN_FILE"] = str(path)
    return clean
