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

from shoehorn.files import write_atomic
from shoehorn.settings import Settings

ENGINE_STOP_SECONDS = 15
"""The longest that ending the engine takes, SIGKILL included."""


def engine_arguments(settings: Settings, plan_arguments: Mapping[str, object], model: Path) -> dict[str, object]:
    """vLLM's options: what the plan decided and what the appliance fixes.

    The engine listens on a Unix socket only, shows no documentation pages, writes no access log (the gateway does), and
    keeps idle streams alive with a comment every 15 s.
    """
    return {
        **plan_arguments,
        "model": str(model),
        "served-model-name": settings.served_model_name,
        "uds": str(engine_socket(settings)),
        "disable-fastapi-docs": True,
        "disable-uvicorn-access-log": True,
        "sse-keep-alive-interval": 15,
    }


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

    Programs stop in the order of falling priority, each before the next: the gateway first, since the engine does not
    end while a client's stream is open.

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
        "command": _command([*python, "shoehorn.engine"]), "priority": "300", "startsecs": "0",
        # An exit with one of Shoehorn's own codes is its last word, and the watcher ends the container. Any other
        # (a kill, a defect) is tried again, within the budget that the engine program keeps.
        "autorestart": "unexpected", "exitcodes": "0,2,3,4,5",
        "stopwaitsecs": str(ENGINE_STOP_SECONDS + 5), "killasgroup": "true", **to_stdout,
    }
    config["program:gateway"] = {
        "command": _command(["nginx", "-c", str(settings.run_dir / "nginx.conf"), "-e", "stderr"]), "priority": "400",
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
