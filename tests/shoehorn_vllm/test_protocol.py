"""Names and error forms that the appliance and the engine's side share."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from shoehorn.common.paths import HOME
from shoehorn.config.settings import load
from shoehorn.gateway import error_messages, nginx_config
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import Phase, State, StateFile
from shoehorn_vllm import protocol
from shoehorn_vllm.api import errors
from shoehorn_vllm.api.errors import Failure

PATHS = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}
CLOSED_SET = {"invalid_request_error", "authentication_error", "permission_error", "not_found_error",
              "request_too_large", "rate_limit_error", "api_error", "overloaded_error"}
"""Error types of the Anthropic API (https://docs.anthropic.com/en/api/errors)."""


def machine_parts(body: str) -> tuple[str, str | None]:
    """Type and code of an error body."""
    error = json.loads(body)["error"]
    return error["type"], error.get("code")


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[int, str]]:
    """nginx's error bodies by dialect and status, read from its rendered configuration."""
    home = tmp_path_factory.mktemp("run")
    settings = load({"RUN_DIR": str(home), "MODELS_DIR": str(home), "MODEL_ID": "a/b"})
    text = nginx_config.render(settings, home, None)
    bodies = {}
    for form in PATHS:
        [block] = re.findall(rf'map "\$status \$error_kind" \${form}_error \{{(.*?)\n    \}}', text, re.DOTALL)
        bodies[form] = {int(status): json.loads(f'"{body}"')
                        for status, body in re.findall(r'\n +"~\^([0-9]{3}) " "((?:[^"\\]|\\.)*)";', block)}
    return bodies


@pytest.mark.parametrize("form", PATHS)
@pytest.mark.parametrize("status", protocol.ERROR_FORMS)
def test_nginx_and_middleware_agree_on_type_and_code(nginx: Mapping[str, Mapping[int, str]], form: str,
                                                     status: int) -> None:
    kind, code = machine_parts(nginx[form][status])
    converted = machine_parts(errors.convert(b'{"detail":"x"}', status, PATHS[form]).decode())
    refused = machine_parts(errors.body(Failure(status, error_messages.CODES.get(status, "") or
                                                protocol.ERROR_FORMS[status].code, "x"), PATHS[form]).decode())
    assert (kind, code) == refused
    assert kind == converted[0]
    if form == "openai" and status not in error_messages.CODES:
        assert code == converted[1] == protocol.ERROR_FORMS[status].code


def test_every_status_of_nginx_has_a_form(nginx: Mapping[str, Mapping[int, str]]) -> None:
    assert set(nginx["openai"]) == set(nginx["anthropic"]) == set(protocol.ERROR_FORMS)
    assert set(error_messages.CODES) == {404, 503}, "nginx's own codes differ from the table for these only"
    assert {form.anthropic_type for form in protocol.ERROR_FORMS.values()} <= CLOSED_SET


@pytest.mark.parametrize("phase", list(Phase))
def test_bodies_of_the_state_have_the_forms_of_503(tmp_path: Path, phase: Phase) -> None:
    StateFile(tmp_path).write(State(phase=phase))
    bodies = {form: RunDir(tmp_path).unavailable_body(form).read_text() for form in PATHS}
    assert machine_parts(bodies["openai"]) == ("server_error", error_messages.CODES[503])
    assert machine_parts(bodies["anthropic"]) == ("overloaded_error", None)


def test_document_lists_the_error_forms() -> None:
    text = (HOME / "docs" / "gateway.md").read_text(encoding="utf-8")
    for status, form in protocol.ERROR_FORMS.items():
        assert f"| {status} | `{form.code}` | `{form.openai_type}` | `{form.anthropic_type}` |\n" in text


@pytest.mark.parametrize(("status", "code"), [(418, "invalid_request"), (502, "internal_error")])
def test_other_statuses_take_a_general_form(status: int, code: str) -> None:
    assert protocol.error_form(status).code == code


@pytest.mark.parametrize("name", [protocol.MIDDLEWARE_CLASS, protocol.MEMORY_HANDLER_CLASS])
def test_classes_that_vllm_loads_by_name_exist(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), attribute), type)


def test_protocol_imports_neither_vllm_nor_torch() -> None:
    code = ("import sys; import shoehorn_vllm.protocol; "
            "assert not {'vllm', 'torch', 'shoehorn_vllm.api'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
