"""nginx configuration of the gateway.

Rules:
- `ROUTES` lists all routes to the engine, each with its only method; every other path is 404;
- `quote` quotes every value in the template, and refuses values that nginx would misread;
- every error that nginx generates has a message in `error_messages`, for the OpenAI and the Anthropic form.
"""

from __future__ import annotations

import json
import os
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shoehorn.common.api_errors import error_bodies
from shoehorn.common.atomic_file import write_atomic
from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import GATEWAY
from shoehorn.config import cluster_secret
from shoehorn.config.settings import Settings
from shoehorn.gateway import error_messages
from shoehorn.runtime import peer_certificates
from shoehorn.runtime.run_dir import RunDir
from shoehorn_vllm.protocol import UPSTREAM_STATUS_HEADER

RETRY_AFTER_SECONDS = 5
"""Small: OpenAI's client waits that long, and ignores values above two minutes."""
READ_SECONDS = 6 * 3600
"""Time limit between two reads from the engine: one answer without streaming, at 0.4 tokens per second."""
MAX_CONNECTIONS = 8192
"""Per worker of nginx (there are two); a request needs three at most. A client that sends its header slowly occupies
one for 10 s."""
_OTHER_FILES = 64
PAGE_FILES = ("page.css", "chat.css", "page.js", "words.js", "format.js", "status.js", "vram.js", "stream.js",
              "conversation.js", "chat.js", "message.js", "markdown.js", "marked.esm.js", "snippets.js", "icon.svg")

_SOCKET_PATH_BYTES = 107
_UNQUOTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f$\ud800-\udfff]")


@dataclass(frozen=True)
class Route:
    """A route to the engine: its only method and its exact path."""

    method: str
    path: str


ROUTES = (
    Route("GET", "/v1/models"),
    Route("POST", "/v1/chat/completions"),
    Route("POST", "/v1/completions"),
    Route("POST", "/v1/embeddings"),
    Route("POST", "/v1/responses"),
    Route("POST", "/v1/messages"),
    Route("POST", "/v1/messages/count_tokens"),
    Route("POST", "/v1/rerank"),
    Route("POST", "/v1/score"),
)

TLS_CIPHERS = ":".join(f"ECDHE-{key}-{cipher}" for cipher in (
    "AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305") for key in ("ECDSA", "RSA"))
"""For TLS 1.2: forward secrecy and authenticated encryption only; all ciphers of TLS 1.3 have both."""


def quote(value: object) -> str:
    """Quote a value for nginx's configuration.

    Raises:
        SettingsError: it contains a `$`, which nginx cannot quote, or a control character.
    """
    text = str(value)
    if _UNQUOTABLE.search(text):
        raise SettingsError(f"{text!r}: unsupported by nginx, contains a `$` or a control character.",
                            "Change RUN_DIR, SERVED_MODEL_NAME or the folder of Shoehorn.")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def render(settings: Settings, run_dir: Path, user: str | None) -> str:
    """Render `nginx.conf` for `run_dir`.

    Args:
        run_dir: contains the state and the sockets of the engine and the key service; nginx writes to no other folder.
        user: of nginx's workers when its master runs as root; else None.

    Raises:
        SettingsError: nginx does not support a path or the model's name.
    """
    paths = RunDir(run_dir.absolute())
    _check_run_dir(paths)
    # The output is not HTML: `finalize` quotes every value in the template.
    environment = Environment(loader=FileSystemLoader(GATEWAY), undefined=StrictUndefined, finalize=quote,
                              autoescape=False, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701  # see above
    files = _open_files()
    cards = {name: {"id": name, "object": "model", "created": int(time.time()), "owned_by": "shoehorn"}
             for name in (settings.served_model_name, *settings.served_aliases)}
    return environment.get_template("nginx.conf.j2").render(
        paths=paths, user=user, port=settings.port, page=GATEWAY / "page",
        open_files=files, connections=files - _OTHER_FILES,
        page_files=PAGE_FILES, log_format=settings.log_format, drain_seconds=max(1, settings.drain_timeout),
        read_seconds=READ_SECONDS, retry_after_seconds=RETRY_AFTER_SECONDS, body_limit=settings.max_body_size,
        header_limit=settings.max_header_size, routes=ROUTES, cors_origins=settings.cors_allowed_origins,
        trusted_proxies=settings.trusted_proxies, tls_ciphers=TLS_CIPHERS,
        tls_pair=paths.tls_pair if settings.tls_cert_file else None,
        errors=error_messages.bodies(settings),
        own_errors=[status for status in error_messages.STATUSES if status not in (431, 500, 503)],
        no_keys=error_bodies(503, "API keys are temporarily unavailable. Retry in a few seconds.", "keys_unavailable"),
        plain_refused=error_bodies(400, "Plain HTTP is unsupported. Use https://, and rotate a key that was sent "
                                   "unencrypted.", "https_required")["openai"],
        replica_port=settings.replica_port, upstream_status_header=UPSTREAM_STATUS_HEADER,
        front_subject=f"CN={peer_certificates.common_name('front')}",
        front_only=error_bodies(403, "This server is a replica: send requests to its front.",
                                "behind_front")["openai"],
        not_served=error_bodies(404, "The loaded model does not support this endpoint.",
                                "unknown_url")["openai"].rstrip(),
        models={name: json.dumps(card) + "\n" for name, card in cards.items()},
        models_body=json.dumps({"object": "list", "data": list(cards.values())}) + "\n")


def write(settings: Settings, user: str | None) -> None:
    """Write `nginx.conf`, and in a replica the certificates of the connections to its front.

    Raises:
        SettingsError: nginx does not support a path or the model's name, or the cluster's secret is invalid.
    """
    paths = RunDir(settings.run_dir)
    if settings.replica_port and settings.cluster_secret_file:
        certificate = peer_certificates.issue(cluster_secret.read(settings.cluster_secret_file), "replica")
        write_atomic(paths.peer_authority, certificate.authority.decode(), 0o600)
        write_atomic(paths.peer_pair, certificate.pair.decode(), 0o600)
    write_atomic(paths.nginx_config, render(settings, settings.run_dir, user), 0o600)


def _open_files() -> int:
    """Open files per worker: enough for `MAX_CONNECTIONS`, within the limit of the system."""
    needed, limit = MAX_CONNECTIONS + _OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return needed if limit == resource.RLIM_INFINITY else min(needed, limit)


def _check_run_dir(paths: RunDir) -> None:
    directory = paths.path
    quote(directory)
    if set(str(directory)) & set("*?["):
        raise SettingsError(f"RUN_DIR={directory}: contains `*`, `?` or `[`, which nginx treats as a pattern.",
                            "Set another RUN_DIR.")
    if len(os.fsencode(paths.engine_socket)) > _SOCKET_PATH_BYTES:
        raise SettingsError(f"RUN_DIR={directory}: too long, a socket's path has at most {_SOCKET_PATH_BYTES} bytes.",
                            "Set a shorter RUN_DIR, for example /run/shoehorn.")
