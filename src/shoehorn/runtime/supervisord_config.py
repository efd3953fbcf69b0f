"""Rendering of supervisord's configuration."""

from __future__ import annotations

import configparser
import io
import sys
from pathlib import Path

from shoehorn.common.atomic_file import write_atomic
from shoehorn.config.settings import Settings
from shoehorn.runtime import programs
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.shutdown import ENGINE_STOP_SECONDS, MARGIN_SECONDS


def supervisord_config(settings: Settings, user: str | None) -> str:
    """Render `supervisord.conf`.

    Programs stop one after the other, the highest priority first: the engine drains while the gateway still delivers
    its last answers and refuses new requests.

    Args:
        user: the user's name when running as root (supervisord complains otherwise); else None.
    """
    python = [sys.executable, "-m"]
    paths = RunDir(settings.run_dir)
    to_stdout = {"stdout_logfile": "/dev/stdout", "stdout_logfile_maxbytes": "0", "redirect_stderr": "true"}
    config = configparser.RawConfigParser()
    config["supervisord"] = {
        "nodaemon": "true", "logfile": "/dev/null", "logfile_maxbytes": "0", "loglevel": "error",
        "pidfile": _escape(paths.supervisord_pid), **({"user": user} if user else {}),
    }
    config["eventlistener:watcher"] = {
        "command": _command([*python, programs.EVENT_LISTENER, str(settings.run_dir)]),
        "events": "PROCESS_STATE_EXITED,PROCESS_STATE_FATAL", "priority": "100", "autorestart": "true",
        "startretries": "100", "stdout_logfile": "NONE", "stderr_logfile": "/dev/stderr",
        "stderr_logfile_maxbytes": "0",
    }
    config["program:exporter"] = {
        "command": _command([*python, programs.EXPORTER]), "priority": "200", "autorestart": "true",
        "startretries": "5", "stopwaitsecs": "3", "killasgroup": "true", **to_stdout,
    }
    if settings.role == "front":
        config["program:front"] = {
            "command": _command([*python, programs.FRONT]), "priority": "400", "autorestart": "true",
            "startretries": "5", "stopwaitsecs": str(settings.drain_timeout + MARGIN_SECONDS + 5),
            "killasgroup": "true", **to_stdout,
        }
        config["program:balancer"] = {  # setpriv: HAProxy does not watch its parent
            "command": _command(["setpriv", "--pdeathsig", "KILL", "haproxy", "-db", "-f", str(paths.balancer_config)]),
            "priority": "350", "autorestart": "true", "startretries": "5", "stopwaitsecs": "3", "killasgroup": "true",
            **to_stdout,
        }
    else:
        config["program:engine"] = {
            "command": _command([*python, programs.ENGINE]), "priority": "400", "startsecs": "0",
            # An exit with one of Shoehorn's own codes is final, and the event listener stops the container. After any
            # other (a kill, a defect) the engine is restarted, within its restart budget.
            "autorestart": "unexpected", "exitcodes": "0,2,3,4,5",
            "stopwaitsecs": str(settings.drain_timeout + MARGIN_SECONDS + ENGINE_STOP_SECONDS + 5),
            "killasgroup": "true", **to_stdout,
        }
    config["program:keys"] = {
        "command": _command([*python, programs.KEYS]), "priority": "250", "autorestart": "true",
        "startretries": "5", "stopwaitsecs": "5", "killasgroup": "true", **to_stdout,
    }
    config["program:gateway"] = {
        "command": _command(["nginx", "-c", str(paths.nginx_config), "-e", "stderr"]), "priority": "300",
        "autorestart": "true", "startretries": "5", "stopsignal": "QUIT",
        "stopwaitsecs": str(settings.drain_timeout + 2), "killasgroup": "true", **to_stdout,
    }
    if settings.is_node:
        config["program:ray"] = {  # stops after the engine, whose workers it runs
            "command": _command([*python, programs.RAY]), "priority": "150", "autorestart": "true",
            "startretries": "5", "stopwaitsecs": "20", "killasgroup": "true", **to_stdout,
        }
    if settings.role == "head":
        config["program:nodes"] = {
            "command": _command([*python, programs.NODES]), "priority": "160", "autorestart": "true",
            "startretries": "5", "stopwaitsecs": "5", "killasgroup": "true", **to_stdout,
        }
    text = io.StringIO()
    config.write(text)
    return text.getvalue()


def write_supervisord_config(settings: Settings, user: str | None) -> Path:
    """Write `supervisord.conf`; returns its path."""
    path = RunDir(settings.run_dir).supervisord_config
    write_atomic(path, supervisord_config(settings, user))
    return path


def _escape(value: object) -> str:
    """Escape `%`: supervisord expands `%(...)s` in every value."""
    return str(value).replace("%", "%%")


def _command(words: list[str]) -> str:
    """Quote a command line for supervisord, which splits with shlex and also cuts comments at ` ;`."""
    quoted = ['"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"' if set(word) - _PLAIN else word
              for word in words]
    return _escape(" ".join(quoted))


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+=:@,%")
