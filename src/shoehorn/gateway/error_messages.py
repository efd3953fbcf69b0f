"""Messages of the errors that nginx itself answers with, by status and, where known, by reason.

Rules: every error names what to change; a limit is named with the setting that raises it; a refused key has OpenAI's
words, which clients match.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoehorn.common.api_errors import error_bodies
from shoehorn.common.units import format_size
from shoehorn.config.settings import Settings

CODES = {404: "unknown_url", 503: "model_not_ready"}
"""Codes of nginx's own errors where they differ from the status's: other events than an engine's 404 and 503."""

_SEND = "Send it as `Authorization: Bearer KEY` or `X-Api-Key: KEY`."

_MESSAGES = {
    400: "The request is malformed.",
    401: f"Incorrect API key provided. {_SEND}",
    403: "Permission denied.",
    404: "Unknown endpoint.",
    405: "This endpoint does not support this method.",
    408: "The request timed out.",
    411: "The request has no Content-Length.",
    413: "The request body is too large.",
    414: "The request line is too long.",
    415: "Unsupported media type.",
    422: "The request is invalid.",
    429: "Too many requests. Retry in a few seconds.",
    431: "The request headers are too large.",
    500: "Internal error of the gateway.",
    501: "Unsupported transfer encoding.",
    503: "The model is not ready.",
    505: "Unsupported HTTP version.",
}

STATUSES = tuple(_MESSAGES)

REFUSED_KEYS = {
    "missing": f"You didn't provide an API key. {_SEND}",
    "incorrect": "Incorrect API key provided. `shoehorn keys list` shows the names of the valid keys.",
    "malformed": f"Incorrect API key provided: invalid form. {_SEND} A key has 8 to 512 letters, digits and . _ ~ + / "
                 "= -",
    "repeated": "Incorrect API key provided: one header is sent twice. Send one API key.",
    "conflicting": "Incorrect API key provided: `Authorization` and `X-Api-Key` contain different keys. Send one of "
                   "them.",
    "expired": "Incorrect API key provided: the key has expired. Use another one, or create one: shoehorn keys add "
               "NAME",
}
"""Reasons of the key service for a refusal, in the header `X-Shoehorn-Refusal`: the message."""

def bodies(settings: Settings) -> Mapping[tuple[int, str], Mapping[str, str]]:
    """Return the body of each error by status and kind, "" for any other kind, and by API form.

    nginx.conf.j2 has the kinds: a reason for a refused key, or what is wrong with a path.
    """
    messages: dict[tuple[int, str], tuple[str, str | None]] = {
        (status, ""): (message, CODES.get(status)) for status, message in _MESSAGES.items()}
    messages |= {(401, kind): (message, None) for kind, message in REFUSED_KEYS.items()}
    names = ", ".join((settings.served_model_name, *settings.served_aliases))
    messages |= {
        (404, "model"): (f"The model does not exist. This server serves {names}.", "model_not_found"),
        (404, "no_version"): ("Unknown endpoint: the path has no /v1. Set the client's base URL to the address of this "
                              "server followed by /v1.", "unknown_url"),
        (404, "version_twice"): ("Unknown endpoint: the path has /v1 twice. Remove it from the path or from the "
                                 "client's base URL.", "unknown_url"),
        (413, "api"): (f"The request body exceeds the limit of {format_size(settings.max_body_size)}. Send a smaller "
                       "request, or raise the setting MAX_BODY_SIZE.", None),
        (431, ""): (f"A request header exceeds the limit of {format_size(settings.max_header_size)}. Delete large "
                    "cookies of this address, or raise the setting MAX_HEADER_SIZE.", None),
    }
    return {key: error_bodies(key[0], message, code) for key, (message, code) in messages.items()}
