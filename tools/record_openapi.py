"""OpenAPI document of the public API: vLLM's description of the served routes, with the gateway's error responses.

Requires vLLM. usage: python tools/record_openapi.py FILE
Routes of pooling models (embeddings, rerank, score) are missing: vLLM describes them only while it serves such a model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from shoehorn.gateway.nginx_config import ROUTES

REFERENCE = "#/components/schemas/"

_TEXT = {"type": "string"}
OPENAI_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {"error": {
        "type": "object", "required": ["message", "type", "code"],
        "properties": {"message": _TEXT, "type": _TEXT, "param": {"anyOf": [_TEXT, {"type": "null"}]},
                       "code": {"anyOf": [_TEXT, {"type": "integer"}, {"type": "null"}]}}}}}
ANTHROPIC_ERROR = {
    "type": "object", "required": ["type", "error"],
    "properties": {"type": {"const": "error"}, "error": {
        "type": "object", "required": ["type", "message"], "properties": {"type": _TEXT, "message": _TEXT}}}}
ERRORS = {
    400: "The request is invalid or exceeds a limit of the key.", 401: "No valid key.",
    404: "No such model, or the loaded model does not serve this endpoint.",
    405: "Method not allowed.", 408: "The request was sent too slowly.", 411: "No Content-Length.",
    413: "The body is too large.", 415: "The body is not JSON.", 429: "Too many requests; see Retry-After.",
    431: "The headers are too large.", 501: "The loaded model does not support this.",
    503: "The model is not ready, or the server is stopping; see Retry-After.",
}


def public(engine: dict[str, Any]) -> dict[str, Any]:
    """Derive the public document from the engine's document."""
    paths: dict[str, Any] = {}
    for route in ROUTES:
        method = route.method.lower()
        if operation := engine["paths"].get(route.path, {}).get(method):
            name = "AnthropicError" if route.path.startswith("/v1/messages") else "OpenAIError"
            error = {"application/json": {"schema": {"$ref": f"{REFERENCE}{name}"}}}
            success = {code: answer for code, answer in operation["responses"].items() if code == "200"}
            errors = {str(code): {"description": text, "content": error} for code, text in ERRORS.items()}
            paths[route.path] = {method: {**operation, "responses": {**success, **errors}}}
    schemas = {**engine["components"]["schemas"], "OpenAIError": OPENAI_ERROR, "AnthropicError": ANTHROPIC_ERROR}
    return {
        "openapi": engine["openapi"],
        "info": {"title": "Shoehorn", "version": "1", "description": "The routes that the gateway serves."},
        "paths": paths,
        "security": [{"bearer": []}, {"x-api-key": []}],
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"},
                                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"}},
            "schemas": _reachable(paths, schemas)},
    }


def _reachable(paths: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas that the paths reference, directly or indirectly."""
    needed: set[str] = set()
    new = _references(paths)
    while new:
        needed |= new
        new = set().union(*(_references(schemas[name]) for name in new)) - needed
    return {name: schemas[name] for name in sorted(needed)}


def _references(document: object) -> set[str]:
    if isinstance(document, dict):
        references = set().union(*(_references(value) for value in document.values()))
        target = document.get("$ref")
        return references | {target.removeprefix(REFERENCE)} if isinstance(target, str) else references
    return set().union(*(_references(value) for value in document)) if isinstance(document, list) else set()


def main() -> None:
    """Write the document."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    document = public(build_app(arguments, ("generate",)).openapi())
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
