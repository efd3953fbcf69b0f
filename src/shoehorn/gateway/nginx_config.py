"""The gateway: nginx's configuration.

Rules:
- `ROUTES` is the one list of what passes to the engine, each with its only method; everything else is 404;
- every value in the template is quoted by `quote`, which refuses what nginx would read as something else;
- every error that nginx makes itself has a row in `_ERRORS`, in OpenAI's form and in Anthropic's.
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
from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import GATEWAY
from shoehorn.config.settings import Settings
from shoehorn.runtime.run_dir import RunDir

BODY_LIMIT = "10m"
RETRY_AFTER_SECONDS = 5
"""Small: OpenAI's client waits that long, and not at all when told to wait above two minutes."""
READ_SECONDS = 6 * 3600
"""The longest pause between two reads from the engine: a whole answer without streaming, at 0.4 tokens a second."""
MOST_CONNECTIONS = 8192
"""Of each of nginx's two workers; an answer takes three at most. Who sends a header slowly holds one for 10 s."""
_OTHER_FILES = 64
PAGE_FILES = ("page.css", "chat.css", "page.js", "words.js", "format.js", "status.js", "vram.js", "stream.js",
              "chat.js", "message.js", "markdown.js", "marked.esm.js", "snippets.js", "icon.svg")

_SOCKET_PATH_BYTES = 107
_UNQUOTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f$\ud800-\udfff]")


@dataclass(frozen=True)
class Route:
    """One way to the engine: the only method, and the exact path."""

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

_ERRORS = {
    400: ("bad_request", "The request is malformed."),
    401: ("invalid_api_key", "No valid API key was given. Send it as `Authorization: Bearer KEY` or `X-Api-Key: KEY`."),
    403: ("forbidden", "This is not allowed."),
    404: ("unknown_url", "There is no such endpoint here."),
    405: ("method_not_allowed", "This endpoint does not take this method."),
    408: ("request_timeout", "The request came too slowly."),
    411: ("length_required", "The request has no Content-Length."),
    413: ("request_too_large", "The request body is too large."),
    414: ("uri_too_long", "The request line is too long."),
    429: ("rate_limit_exceeded", "Too many requests. Try again in a moment."),
    431: ("headers_too_large", "The request headers are too large."),
    500: ("internal_error", "The gateway failed."),
    501: ("not_implemented", "This transfer encoding is not known here."),
    503: ("model_not_ready", "The model is not ready."),
    505: ("http_version", "This version of HTTP is not known here."),
}

TLS_CIPHERS = ":".join(f"ECDHE-{key}-{cipher}" for cipher in (
    "AES128-GCM-SHA256", "AES256-GCM-SHA384", "CHACHA20-POLY1305") for key in ("ECDSA", "RSA"))
"""For TLS 1.2, forward secrecy and authenticated encryption only; those of TLS 1.3 are all so."""


def quote(value: object) -> str:
    """A word for nginx's configuration.

    Raises:
        SettingsError: it holds a `$`, which nginx has no way to write, or a control character.
    """
    text = str(value)
    if _UNQUOTABLE.search(text):
        raise SettingsError(f"nginx cannot be told {text!r}: it has a `$` or a character that cannot be printed.",
                            "Choose another RUN_DIR, SERVED_MODEL_NAME or folder for Shoehorn.")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def render(settings: Settings, run_dir: Path, user: str | None) -> str:
    """The text of `nginx.conf`, which belongs into `run_dir`.

    Args:
        run_dir: holds state and the sockets of the engine and the key service; nginx writes nowhere else.
        user: whom nginx's workers run as when its master runs as root; else None.

    Raises:
        SettingsError: a path or the model's name cannot stand in nginx's configuration.
    """
    paths = RunDir(run_dir.absolute())
    _check_run_dir(paths)
    # The configuration is no HTML: `finalize` quotes every value that the template writes.
    environment = Environment(loader=FileSystemLoader(GATEWAY), undefined=StrictUndefined, finalize=quote,
                              autoescape=False, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701  # see above
    model = settings.served_model_name
    files = _open_files()
    return environment.get_template("nginx.conf.j2").render(
        paths=paths, user=user, port=settings.port, page=GATEWAY / "page",
        open_files=files, connections=files - _OTHER_FILES,
        page_files=PAGE_FILES, log_format=settings.log_format, drain_seconds=max(1, settings.drain_timeout),
        read_seconds=READ_SECONDS, retry_after_seconds=RETRY_AFTER_SECONDS, body_limit=BODY_LIMIT, routes=ROUTES,
        cors_origins=settings.cors_allowed_origins,
        trusted_proxies=settings.trusted_proxies, tls_ciphers=TLS_CIPHERS,
        tls_pair=paths.tls_pair if settings.tls_cert_file else None,
        errors={status: error_bodies(*words, status) for status, words in _ERRORS.items()},
        own_errors=[status for status in _ERRORS if status not in (431, 500, 503)],
        no_keys=error_bodies("keys_unavailable", "Keys cannot be checked just now. Try again in a moment.", 503),
        plain_refused=error_bodies("https_required", "Plain HTTP is not served here. Use https://, and change a key "
                                   "that was sent without.", 400)["openai"],
        not_served=error_bodies("unknown_url", "The model that is loaded does not serve this endpoint.",
                                404)["openai"].rstrip(),
        model=model, model_body=json.dumps({"id": model, "object": "model", "created": int(time.time()),
                                            "owned_by": "shoehorn"}) + "\n")


def _open_files() -> int:
    """How many files a worker may open: enough for `MOST_CONNECTIONS`, or what the system lets it."""
    wanted, most = MOST_CONNECTIONS + _OTHER_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return wanted if most == resource.RLIM_INFINITY else min(wanted, most)


def _check_run_dir(paths: RunDir) -> None:
    directory = paths.path
    quote(directory)
    if set(str(directory)) & set("*?["):
        raise SettingsError(f"RUN_DIR={directory} has a `*`, `?` or `[`, which nginx takes for a pattern.",
                            "Set another RUN_DIR.")
    if len(os.fsencode(paths.engine_socket)) > _SOCKET_PATH_BYTES:
        raise SettingsError(f"RUN_DIR={directory} is too long: a socket's path has at most {_SOCKET_PATH_BYTES} bytes.",
                            "Set a shorter RUN_DIR, for example /run/shoehorn.")
