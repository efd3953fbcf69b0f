"""List of all routes that the installed engine's API server can have, as JSON: `python tools/engine_routes.py`.

Rules:
- the server is built by the engine's own `build_app`, once with defaults and once per kind of model and per switch
  that adds routes; a route is reported under the first of these that has it;
- the router's list and the OpenAPI document are combined, so that neither can hide a route;
- the engine's sources are read as well, for routes of parts that are not installed;
- a route is METHOD and path; WEBSOCKET and MOUNT replace the method where a route has none. The engine executes code
  when imported and keeps routes in global tables, so this program is never imported by others.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

MODEL = Path(__file__).resolve().parents[1] / "demo" / "model"
SWITCHES = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ENABLE_COHERE_API")
OPTIONS = {"--enable-scale-out": [], "--enable-offline-docs": [], "--enable-tokenizer-info-endpoint": [],
           "--enable-fault-tolerance": [],
           "--profiler-config": ['{"profiler": "torch", "torch_profiler_dir": "/tmp"}']}
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "WEBSOCKET")
RoutesByCondition = dict[str, list[str]]


def main() -> None:
    """Print {"": [routes of a language model], condition: [added routes], ...}."""
    for name in SWITCHES:
        os.environ.pop(name, None)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # combined switches define an operation twice in the OpenAPI document
    json.dump(everything(), sys.stdout, indent=1)


def everything() -> RoutesByCondition:
    """Return each condition with the routes that it adds to the previous ones."""
    from vllm.config import ModelConfig
    from vllm.tasks import FRONTEND_TASKS, GENERATION_TASKS, POOLING_TASKS

    every_task = (*GENERATION_TASKS, *POOLING_TASKS, *FRONTEND_TASKS)
    routes_by_condition: RoutesByCondition = {}
    seen: set[str] = set()

    def add(condition: str, routes: Iterator[str]) -> None:
        routes_by_condition[condition] = sorted(set(routes) - seen)
        seen.update(routes_by_condition[condition])

    add("", _routes(("generate",)))
    add("a speech model", _routes(("transcription", "realtime")))
    embedder = ModelConfig(model=str(MODEL), runner="pooling", convert="embed")
    add("an embedding model", _routes(POOLING_TASKS, embedder))
    classifier = ModelConfig(model=str(MODEL), runner="pooling", convert="classify", hf_overrides={"num_labels": 1})
    add("a classifier", _routes(("classify",), classifier))
    add("any other task", _routes(every_task, embedder))
    for option, values in OPTIONS.items():
        add(option, _routes(every_task, embedder, option, *values))
    for name in SWITCHES:
        os.environ[name] = "1"
        add(f"{name}=1", _routes(every_task, embedder))
        del os.environ[name]
    for name in SWITCHES:  # routes that only a combination adds
        os.environ[name] = "1"
    add("everything at once", _routes(every_task, embedder, *(word for option, values in OPTIONS.items()
                                                              for word in (option, *values))))
    from vllm import entrypoints

    sources = Path(entrypoints.__path__[0])
    add("what is not installed", (route for route in in_sources(sources) if route.split()[0] in METHODS))
    return routes_by_condition


def in_sources(folder: Path) -> Iterator[str]:
    """Yield every route that a decorator or `add_api_route` in the engine's sources names by a literal path."""
    for path in sorted(folder.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.args
                    and isinstance(call.args[0], ast.Constant) and str(call.args[0].value).startswith("/")):
                continue
            target = str(call.args[0].value)
            if call.func.attr.upper() in METHODS:
                yield f"{call.func.attr.upper()} {target}"
            elif call.func.attr in ("add_api_route", "api_route"):
                methods = next((word.value for word in call.keywords if word.arg == "methods"), None)
                yield from (f"{method} {target}" for method in (ast.literal_eval(methods) if methods else ("GET",)))


def _routes(tasks: tuple[str, ...], model_config: Any = None, *arguments: str) -> Iterator[str]:
    from vllm.entrypoints.launchers.app import build_app

    app: Any = build_app(_parser().parse_args(list(arguments)), tasks, model_config)  # type: ignore[arg-type]  # tasks are its own
    for route in app.routes:
        kind = type(route).__name__
        if kind == "Mount":
            yield f"MOUNT {route.path}"
        elif kind == "APIWebSocketRoute":
            yield f"WEBSOCKET {route.path}"
        else:
            yield from (f"{method} {route.path}" for method in route.methods)
    for path, operations in app.openapi()["paths"].items():
        yield from (f"{method.upper()} {path}" for method in operations)


@cache
def _parser() -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]  # the engine's own class


if __name__ == "__main__":
    main()
