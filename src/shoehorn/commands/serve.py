"""`shoehorn serve`: check settings, hardware and profile, write the process files, then become supervisord.

Rules: every error that can be detected at once is reported here, before anything starts; secrets are removed from the
environment before any other program starts; the run directory starts clean and only its owner can enter it.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import pwd
import resource
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from shoehorn import __version__
from shoehorn.cluster import credentials, network, ports
from shoehorn.common import disk, locks, mounts
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import SettingsError
from shoehorn.common.units import format_size
from shoehorn.config import cluster_secret, secrets
from shoehorn.config import settings as settings_module
from shoehorn.config.models_dir import ModelsDir
from shoehorn.config.settings import Settings
from shoehorn.deployment import inputs
from shoehorn.front import balancer_config
from shoehorn.gateway import nginx_config, tls
from shoehorn.gateway.keys import sources
from shoehorn.gateway.keys.store import NewKey
from shoehorn.hardware import container_limits, detect, requirements
from shoehorn.runtime import programs, supervisord_config
from shoehorn.runtime.child_process import kill_recorded_group
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, StateFile
from shoehorn.runtime.welcome import Welcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no argument: settings come from the environment."""


def run(arguments: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Prepare everything and become supervisord; return only by an exception."""
    settings = settings_module.load(environment)
    purpose = f"front of {len(settings.replicas)} replicas" if settings.role == "front" else \
        f"profile {_check_machine(settings, environment)}"
    secret = cluster_secret.read(settings.cluster_secret_file) if settings.cluster_secret_file else ""
    if settings.is_node:
        _check_network(settings)
    paths = RunDir(settings.run_dir)
    lock = _prepare_run_dir(paths)
    _require_volume(settings.models_dir)
    for port, name in ((settings.port, "PORT"), (settings.metrics_port, "METRICS_PORT"),
                       (settings.replica_port, "REPLICA_PORT")):
        if port:
            _require_port(port, name)
    user = pwd.getpwuid(0).pw_name if os.geteuid() == 0 else None
    if settings.tls_cert_file:
        tls.install(settings)
    nginx_config.write(settings, user)
    if settings.role == "front":
        balancer_config.write(settings, secret)
    elif settings.is_node:
        credentials.install(secret, settings.node_address, paths)
    supervisord_config.write_supervisord_config(settings, user)
    first_key = None if settings.replica_port or settings.role == "worker" else sources.prepare(settings)
    if first_key:
        print(first_key_line(first_key), flush=True)
    write_atomic(paths.welcome, welcome(settings, first_key).to_json(), 0o600)
    StateFile(settings.run_dir).update(phase=Phase.STARTING, detail="starting", model=settings.served_model_name)
    print(f"shoehorn {__version__}: {purpose}, gateway on {_address(settings)}, "
          f"metrics on port {settings.metrics_port}", flush=True)
    append_to_files()
    disable_core_dumps()
    os.set_inheritable(lock, True)  # held until supervisord ends
    os.execve(sys.executable, [sys.executable, "-m", programs.SUPERVISORD, str(settings.run_dir)],
              _without_secrets(settings, environment))


def _check_machine(settings: Settings, environment: Mapping[str, str]) -> str:
    """Check the hardware and the container's limits; return the name of the profile."""
    machine = requirements.usable(detect.detect(environment=inputs.gpu_environment(settings, environment)))
    profile = inputs.select_profile(settings, machine)
    if profile.match.device == "cuda":
        requirements.check(machine)
        requirements.require_gpus(machine, profile.name)
    container_limits.check_shared_memory()
    if (limit := container_limits.locked_memory_limit()) is not None and machine.gpus:
        print(f"shoehorn: at most {format_size(limit)} of memory can be locked, which offload to host memory needs\n"
              f"  -> {container_limits.MEMLOCK_REMEDY}", flush=True)
    return profile.name


def _check_network(settings: Settings) -> None:
    """Check the network and the ports of a node.

    Raises:
        SettingsError: clients share the cluster's network, or a port is in use.
    """
    network.require_isolated(settings, network.interfaces(), network.default_route())
    for port in sorted(ports.FIXED):
        _require_port(port, "port of the cluster")


def _address(settings: Settings) -> str:
    """Return the address at which a client on this host reaches the gateway."""
    return settings.published_address or f"127.0.0.1:{settings.port}"


def append_to_files() -> None:
    """Make standard output and error append, so that in a file no program overwrites the lines of another one."""
    for descriptor in (1, 2):
        with suppress(OSError):  # closed
            fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)


def disable_core_dumps() -> None:
    """Prevent core dumps, which contain keys and prompts, of this process and all its children.

    A limit of 0 prevents a core file, but not a pipe to a program of the host; a limit of 1 byte prevents both (Linux,
    fs/coredump.c).
    """
    limit = 0 if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 else 1  # only root can raise a limit
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def welcome(settings: Settings, first_key: NewKey | None) -> Welcome:
    """Return the facts of the text that is printed when the server is ready, with a key only if it is new."""
    bearer = first_key.token if first_key else "$API_KEY" if settings.api_key else "YOUR_KEY"
    # -k: the certificate has the public name of this machine
    command, scheme = ("curl -k -N", "https") if settings.tls_cert_file else ("curl -N", "http")
    notice = "YOUR_KEY is shown only when it is created. For a new one, type: shoehorn keys add NAME"
    return Welcome(settings.served_model_name, f"{scheme}://{_address(settings)}", command, bearer,
                   notice if bearer == "YOUR_KEY" else "")


def first_key_line(key: NewKey) -> str:
    """Return the message that shows the first key at once, in case this start never becomes ready."""
    return (f"shoehorn: created the API key {key.key.name!r}, shown only by this start: {key.token}\n"
            f"  -> If it is lost, type: shoehorn keys rotate {key.key.name}")


def _prepare_run_dir(paths: RunDir) -> int:
    """Lock and empty the run directory; return the file descriptor of the lock.

    Raises:
        SettingsError: another appliance uses the directory, or it cannot be written.
    """
    try:
        paths.path.mkdir(parents=True, exist_ok=True)
        if paths.path.stat().st_uid == os.geteuid():  # another user of the image's group cannot change the mode
            paths.path.chmod(0o700)
        lock = locks.acquire(paths.lock, wait=False)
    except BlockingIOError:
        raise SettingsError(f"RUN_DIR={paths.path}: another appliance uses it.",
                            "Stop that appliance, or set another RUN_DIR.", code="run_dir_in_use") from None
    except OSError as error:
        raise SettingsError(f"RUN_DIR={paths.path}: {error.strerror}.",
                            "Mount a tmpfs there that this user can write, or set another RUN_DIR.",
                            code="run_dir_unusable") from error
    for record in paths.groups:
        kill_recorded_group(record)  # of an appliance that was killed
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
        if error.errno == errno.EROFS and not models_dir.exists():
            raise SettingsError(
                f"MODELS_DIR={models_dir}: not found in this container, whose file system is read-only.",
                f"Unset MODELS_DIR; with docker-compose.yml set MODELS_VOLUME={models_dir} to mount that folder of the "
                "host at /models.", code="volume_not_mounted") from error
        if error.errno == errno.EROFS:
            raise SettingsError(f"MODELS_DIR={models_dir}: mounted read-only, but keys are stored there.",
                                "Mount it writable (without :ro). Mount a read-only model elsewhere, and set "
                                "MODEL_SOURCE=local and MODEL_ID to its folder.", code="volume_read_only") from error
        if error.errno in disk.FULL:
            raise SettingsError(f"MODELS_DIR={models_dir}: disk full.",
                                "Free space there (shoehorn models rm), or mount a larger volume.",
                                code="disk_full") from error
        raise SettingsError(
            f"MODELS_DIR={models_dir}: not writable for user {os.geteuid()}: {error.strerror}.",
            f"Mount a volume there, or type on the host: sudo chown -R {os.geteuid()} THE_MOUNTED_FOLDER",
            code="volume_not_writable") from error
    mount = mounts.find_mount(models_dir)
    if mount and mount.is_anonymous:
        print(f"shoehorn: no volume is mounted at MODELS_DIR={models_dir}: models are deleted with the container\n"
              f"  -> Type: docker run -v models:{models_dir} ..., or use docker compose", flush=True)


def _require_port(port: int, name: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104  # the gateway's own address: every interface of the container
        except OSError as error:
            raise SettingsError(f"{name}={port}: cannot listen: {error.strerror}.",
                                f"Stop the program that uses the port, or set {name} to a free port.",
                                code="port_in_use") from error


def _without_secrets(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the programs' environment: hub tokens as files in the run directory, no other secret."""
    clean = secrets.without_secrets(environment)
    for name, token in (("MODELSCOPE_API_TOKEN", settings.modelscope_api_token), ("HF_TOKEN", settings.hf_token)):
        if token:
            path = RunDir(settings.run_dir).token(name)
            write_atomic(path, token, 0o600)
            clean[f"{name}_FILE"] = str(path)
    if settings.cluster_secret_file:  # the name of the file, which every program's settings need
        clean["CLUSTER_SECRET_FILE"] = str(settings.cluster_secret_file)
    return clean
