"""Names of variables that hold secrets."""

from __future__ import annotations

import pytest

from shoehorn.config import secrets
from shoehorn.config.settings import TABLE


@pytest.mark.parametrize("name", [
    "API_KEY", "API_KEY_FILE", "MODELSCOPE_API_TOKEN", "MODELSCOPE_API_TOKEN_FILE", "HF_TOKEN", "VLLM_API_KEY",
    "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "REDIS_PASSWORD",
    "GOOGLE_APPLICATION_CREDENTIALS", "openai_api_key", "EXA_APIKEY",
])
def test_name_of_a_secret_is_detected(name: str) -> None:
    assert secrets.is_secret(name)


@pytest.mark.parametrize("name", [
    "PATH", "TOKENIZERS_PARALLELISM", "VLLM_MAX_BAD_WORDS_TOTAL_TOKENS", "XAUTHORITY", "SSH_AUTH_SOCK", "TLS_KEY_FILE",
    "API_KEYS_FILE", "LD_LIBRARY_PATH", "KEYBOARD", "NVIDIA_VISIBLE_DEVICES",
])
def test_other_variables_are_kept(name: str) -> None:
    assert secrets.without_secrets({name: "x"}) == {name: "x"}


def test_every_secret_setting_has_the_name_of_a_secret() -> None:
    names = [name for row in TABLE if row.secret for name in (row.name, f"{row.name}_FILE")]
    assert names
    assert [name for name in names if not secrets.is_secret(name)] == []
