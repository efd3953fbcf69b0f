"""Plan and settings -> the files that the processes read: `vllm.yaml` and `supervisord.conf`.

Rules: every file is dumped by the library of its format, never joined from strings; written atomically into the run
directory, which only its owner may enter. The gateway's own file comes from `gateway`, its keys from `keys`.
"""

from __future__ import annotations

import configparser
import io
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from shoehorn.drain import MARGIN_SECONDS
from shoehorn.files import write_atomic
from shoehorn.settings import Settings

ENGINE_STOP_SECONDS = 15
"""The longest that ending the engine takes, SIGKILL included."""

ENGINE_DEFAULT_SEQUENCES = 256
"""What vLLM runs at a time when nobody says."""

QUEUE_FACTOR = 4
"""Requests that may wait for each one that runs, unless MAX_QUEUED_REQUESTS says otherwise."""


def engine_arguments(settings: Settings, plan_arguments: Mapping[str, object], model: Path) -> dict[str, object]:
    """vLLM's options: what the plan decided and what the appliance fixes.

    The engine listens on a Unix socket only, shows no documentation pages, writes no access log (the gateway does),
    keeps idle streams alive with a comment every 15 s, and lets the appliance's middleware hold keys to their limits.
    """
    return {
        **plan_arguments,
        "model": str(model),
        "served-model-name": settings.served_model_name,
        "uds": str(engine_socket(settings)),
        "disable-fastapi-docs": True,
        "disable-uvicorn-access-log": True,
        "sse-keep-alive-interval": 15,
        "middleware": ["shoehorn_vllm.middleware.Gate"],
    }


def most_requests(settings: Settings, plan_arguments: Mapping[str, object]) -> int:
    """How many requests the engine may hold at a time, running and queued, before more are refused."""
    running = plan_arguments.get("max-num-seqs")
    running = running if isinstance(running, int) else ENGINE_DEFAULT_SEQUENCES
    queued = settings.max_queued_requests
    return running + (queued if queued is not None else QUEUE_FACTOR * running)


def engine_socket(settings: Settings) -> Path:
    """Where vLLM listens."""
    return settings.run_dir / "engine.sock"


def write_engine_config(settings: Settings, plan_arguments: Mapping[str, object], model: Path) -> Path:
    """Write `vllm.yaml`; returns its path."""
    path = settings.run_dir / "vllm.yaml"
    arguments = engine_arguments(settings, plan_arguments, model)
    write_atomic(path, yaml.safe_dump(arguments, sort_keys=True, allow_unicode=True))
    return path


def supervisord_config(settings: Settings, user: str | None) -> str:
    """The text of `supervisord.conf`.

    Programs stop in the order of falling priority, each before the next: the engine first, which drains, while the
    gateway still carries its last answers and refuses new requests.

    Args:
        user: the user's name when running as root (supervisord complains otherwise); else None.
    """
    python = [sys.executable, "-m"]
    to_stdout = {"stdout_logfile": "/dev/stdout", "stdout_logfile_maxbytes": "0", "redirect_stderr": "true"}
    config = configparser.RawConfigParser()
    config["supervisord"] = {
        "nodaemon": "true", "logfile": "/dev/null", "logfile_maxbytes": "0", "loglevel": "warn",
        "pidfile": _escape(settings.run_dir / "supervisord.pid"), **({"user": user} if user else {}),
    }
    config["eventlistener:watcher"] = {
        "command": _command([*python, "shoehorn.watcher", str(settings.run_dir)]),
        "events": "PROCESS_STATE_EXITED,PROCESS_STATE_FATAL", "priority": "100", "autorestart": "true",
        "startretries": "100", "stdout_logfile": "NONE", "stderr_logfile": "/dev/stderr",
        "stderr_logfile_maxbytes": "0",
    }
    config["program:exporter"] = {
        "command": _command([*python, "shoehorn.exporter"]), "priority": "200", "autorestart": "true",
        "startretries": "5", "stopwaitsecs": "3", "killasgroup": "true", **to_stdout,
    }
    config["program:engine"] = {
        "command": _command([*python, "shoehorn.engine"]), "priority": "400", "startsecs": "0",
        # An exit with one of Shoehorn's own codes is its last word, and the watcher ends the container. Any other
        # (a kill, a defect) is tried again, within the budget that the engine program keeps.
        "autorestart": "unexpected", "exitcodes": "0,2,3,4,5",
        "stopwaitsecs": str(settings.drain_timeout + MARGIN_SECONDS + ENGINE_STOP_SECONDS + 5), "killasgroup": "true",
        **to_stdout,
    }
    config["program:keys"] = {
        "command": _command([*python, "shoehorn.key_service"]), "priority": "250", "autorestart": "true",
        "startretries": "5", "stopwaitsecs": "5", "killasgroup": "true", **to_stdout,
    }
    config["program:gateway"] = {
        "command": _command(["nginx", "-c", str(settings.run_dir / "nginx.conf"), "-e", "stderr"]), "priority": "300",
        "autorestart": "true", "startretries": "5", "stopsignal": "QUIT",
        "stopwaitsecs": str(settings.drain_timeout + 2), "killasgroup": "true", **to_stdout,
    }
    text = io.StringIO()
    config.write(text)
    return text.getvalue()


def write_supervisord_config(settings: Settings, user: str | None) -> Path:
    """Write `supervisord.conf`; returns its path."""
    path = settings.run_dir / "supervisord.conf"
    write_atomic(path, supervisord_config(settings, user))
    return path


def _escape(value: object) -> str:
    """supervisord expands `%(...)s` in every value."""
    return str(value).replace("%", "%%")


def _command(words: list[str]) -> str:
    """A command line for supervisord, which splits with shlex and also cuts comments at ` ;`."""
    quoted = ['"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' if set(word) - _PLAIN else word
              for word in words]
    return _escape(" ".join(quoted))


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=:@,%")
