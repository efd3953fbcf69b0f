"""Settings: parsing, defaults, secrets and contradictions."""

from __future__ import annotations

import importlib.util
from dataclasses import fields, replace
from pathlib import Path

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.common.paths import HOME
from shoehorn.config.other_variables import COMPOSE, PASSED
from shoehorn.config.settings import TABLE, GatewaySettings, load, misspelled


def test_unset_settings_have_their_defaults() -> None:
    settings = load({})
    assert settings.model_id == "deepseek-ai/DeepSeek-R1-Distill-Llama-70B"
    assert settings.served_model_name == settings.model_id
    assert (settings.port, settings.metrics_port) == (6333, 6334)
    assert settings.vram_limit is None
    assert settings.given == frozenset()


def test_every_default_has_the_type_of_its_parsed_value() -> None:
    settings = load({})
    for row in TABLE:
        value = getattr(settings, row.name.lower())
        assert row.default == "" or value == row.parse(row.default), row.name
        assert row.help.endswith("."), row.name


def test_values_are_parsed_and_recorded_as_given() -> None:
    settings = load({"VRAM_LIMIT": "7GiB", "PORT": "8080", "VLLM_EXTRA_ARGS": "--max-num-seqs 2", "MODEL_ID": "a/b"})
    assert settings.vram_limit == 7 << 30
    assert settings.vllm_extra_args == ("--max-num-seqs", "2")
    assert settings.given == {"VRAM_LIMIT", "PORT", "VLLM_EXTRA_ARGS", "MODEL_ID"}


def test_empty_variable_counts_as_unset() -> None:
    assert load({"PORT": " ", "API_KEY": ""}).port == 6333


def test_all_mistakes_are_reported_together_by_name() -> None:
    with pytest.raises(SettingsError) as caught:
        load({"PORT": "high", "MODEL_SOURCE": "ftp", "TRUST_REMOTE_CODE": "maybe", "VRAM_LIMIT": "much"})
    for name in ("PORT", "MODEL_SOURCE", "TRUST_REMOTE_CODE", "VRAM_LIMIT"):
        assert f"{name}: " in caught.value.cause
    assert (caught.value.code, caught.value.exit_code) == ("invalid_settings", 2)


@pytest.mark.parametrize(("name", "value"), [
    ("PUBLISHED_ADDRESS", "8000"), ("PUBLISHED_ADDRESS", "example.com:80"), ("PUBLISHED_ADDRESS", "::1:80"),
    ("PORT", "0"), ("PORT", "65536"), ("PORT", "-1"), ("PORT", "6333.0"), ("PORT", "٦"),
    ("MAX_MODEL_LEN", "8"), ("MAX_NUM_SEQS", "0"), ("VRAM_LIMIT", "0"), ("VRAM_LIMIT", "7 gallons"),
    ("QUANTIZATION", "int3"), ("MODEL_ID", "llama"), ("MODEL_ID", "../../etc/passwd/x y"), ("MODEL_REVISION", "a/../b"),
    ("API_KEY", "short"), ("API_KEY", "has a space in it"), ("API_KEY", "x" * 513), ("API_KEY", 'quote"quote"'),
    ("TRUSTED_PROXIES", "proxy.example.com"), ("TRUSTED_PROXIES", "10.0.0.1/8"), ("TRUSTED_PROXIES", "10.0.0.0/33"),
    ("CORS_ALLOWED_ORIGINS", "example.com"), ("CORS_ALLOWED_ORIGINS", "https://a.example/"),
    ("CORS_ALLOWED_ORIGINS", "https://A.example"), ("CORS_ALLOWED_ORIGINS", "https://a.example *"),
    ("CORS_ALLOWED_ORIGINS", "https://*.example"), ("CORS_ALLOWED_ORIGINS", "null"),
    ("VLLM_EXTRA_ARGS", "'unclosed"), ("LOG_FORMAT", "xml"), ("SERVED_MODEL_NAME", "a b$"), ("DRAIN_TIMEOUT", "soon"),
])
def test_invalid_value_is_an_error_and_never_a_default(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}"):
        load({name: value})


@pytest.mark.parametrize(("name", "value", "words"), [
    ("MODEL_ID", "https://huggingface.co/Qwen/Qwen3-8B/tree/main", "write Qwen/Qwen3-8B and set MODEL_SOURCE=hugg"),
    ("MODEL_ID", "hf.co/Qwen/Qwen3-8B", "MODEL_SOURCE=huggingface"),
    ("MODEL_ID", "https://www.modelscope.cn/models/Qwen/Qwen3-8B", "write Qwen/Qwen3-8B and set MODEL_SOURCE=mode"),
    ("MODEL_ID", "https://mirror.example.com/Qwen/Qwen3-8B", "HF_ENDPOINT"),
    ("MODEL_ID", "Qwen3-8B", "write OWNER/Qwen3-8B"), ("MODEL_ID", "Qwen/Qwen3-8B-GGUF:Q4_K_M", "'Q4_K_M'"),
    ("VRAM_LIMIT", "7", "write 7GiB"), ("VRAM_LIMIT", "7.5", "write 7.5GiB"), ("MAX_MODEL_LEN", "1.0001k", "32k"),
    ("MODEL_REVISION", "refs//pr", "refs/pr/3"), ("MODEL_REVISION", "../x", "refs/pr/3"),
    ("MAX_BODY_SIZE", "2", "1 KiB"), ("MAX_HEADER_SIZE", "1GiB", "64 KiB")])
def test_common_mistake_reports_what_to_write(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load({name: value})
    assert caught.value.cause.startswith(f"{name}: ")
    assert words in caught.value.cause


@pytest.mark.parametrize(("name", "value", "parsed"), [
    ("MAX_MODEL_LEN", "32k", 32_000), ("MAX_MODEL_LEN", "32K", 32_768), ("MAX_MODEL_LEN", "1.5k", 1500),
    ("MAX_MODEL_LEN", "auto", None), ("MAX_MODEL_LEN", '"4096"', 4096), ("MODEL_ID", "'a/b'", "a/b"),
    ("VLLM_EXTRA_ARGS", '"--max-num-seqs 4"', ("--max-num-seqs", "4")),
    ("VLLM_EXTRA_ARGS", '"--seed" "4"', ("--seed", "4")), ("MODEL_REVISION", "refs/pr/3", "refs/pr/3"),
    ("VRAM_LIMIT", "7516192768", 7 << 30), ("SERVED_MODEL_NAME", "gpt-4o", "gpt-4o")])
def test_common_form_is_understood(name: str, value: str, parsed: object) -> None:
    assert getattr(load({name: value}), name.lower()) == parsed


def test_automatic_value_is_not_one_that_the_user_set() -> None:
    assert load({"MAX_MODEL_LEN": "auto"}).given == frozenset()


def test_further_names_of_the_model_are_aliases() -> None:
    settings = load({"SERVED_MODEL_NAME": "gpt-4o, mine mine"})
    assert (settings.served_model_name, settings.served_aliases) == ("gpt-4o", ("mine",))
    assert load({}).served_aliases == ()


@pytest.mark.parametrize(("typed", "meant"), [
    ("MODELID", "MODEL_ID"), ("model_id", "MODEL_ID"), ("MODEL_IDS", "MODEL_ID"), ("MDOEL_ID", "MODEL_ID"),
    ("VRAM_LIMITS", "VRAM_LIMIT"), ("MAX_MODEL_LEM", "MAX_MODEL_LEN"), ("HFTOKEN", "HF_TOKEN"),
    ("APIKEY", "API_KEY"), ("API_KEY_FILES", "API_KEY_FILE"), ("QUANTISATION", "QUANTIZATION"), ("OFLINE", "OFFLINE")])
def test_name_with_a_typing_error_is_an_error(typed: str, meant: str) -> None:
    with pytest.raises(SettingsError, match=f"^{typed}: unknown setting; did you mean {meant}"):
        load({typed: "x"})


def test_variables_of_other_programs_are_allowed() -> None:
    others = [
        "PATH", "HOME", "HOSTNAME", "TZ", "LANG", "LC_ALL", "TERM", "PWD", "SHLVL", "USER", "POST", "PORTS",
        "SPORT", "HOST", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_REQUIRE_CUDA",
        "CUDA_VERSION", "LD_LIBRARY_PATH", "PYTHONPATH", "HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_ENABLE_HF_TRANSFER",
        "OPENAI_API_KEY", "KUBERNETES_PORT", "SHOEHORN_PORT", "SHOEHORN_SERVICE_PORT", "MODEL_NAME",
        "MODELSCOPE_CACHE", "VLLM_LOGGING_LEVEL", "VLLM_ATTENTION_BACKEND", "RAY_ADDRESS", "OMP_NUM_THREADS",
        "GPG_KEY", "PYTHON_VERSION", "COMPOSE_PROJECT_NAME", "LOG_LEVEL", "DEBUG"]
    known = [variable.name for variable in (*COMPOSE, *PASSED) if variable.name not in {row.name for row in TABLE}]
    assert misspelled(dict.fromkeys([*others, *known], "x")) == []


def test_secret_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("sk-from-the-file\n")
    assert load({"API_KEY_FILE": str(file)}).api_key == "sk-from-the-file"


def test_lists_are_split_at_commas_and_spaces() -> None:
    settings = load({"TRUSTED_PROXIES": "10.0.0.0/8, ::1", "CORS_ALLOWED_ORIGINS": "https://a.example:8443 http://[::1]"})
    assert settings.trusted_proxies == ("10.0.0.0/8", "::1/128")
    assert settings.cors_allowed_origins == ("https://a.example:8443", "http://[::1]")
    assert load({"CORS_ALLOWED_ORIGINS": "*"}).cors_allowed_origins == ("*",)
    assert load({}).cors_allowed_origins == load({}).trusted_proxies == ()


@pytest.mark.parametrize("alone", ["TLS_CERT_FILE", "TLS_KEY_FILE"])
def test_certificate_and_key_must_be_set_together(alone: str) -> None:
    with pytest.raises(SettingsError, match="TLS_CERT_FILE and TLS_KEY_FILE"):
        load({alone: "/x"})


def test_secret_set_as_value_and_as_file_is_an_error() -> None:
    with pytest.raises(SettingsError, match="API_KEY and API_KEY_FILE"):
        load({"API_KEY": "sk-12345678", "API_KEY_FILE": "/somewhere"})


def test_unreadable_or_empty_secret_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"API_KEY_FILE=.*absent"):
        load({"API_KEY_FILE": str(tmp_path / "absent")})
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SettingsError, match=r"API_KEY_FILE=.*empty"):
        load({"API_KEY_FILE": str(tmp_path / "empty")})


def test_only_secrets_have_a_file_form() -> None:
    assert load({"PORT_FILE": "/nowhere"}).port == 6333


def test_secrets_are_absent_from_repr_and_errors() -> None:
    secrets = {row.name: f"canary-{index}-secret" for index, row in enumerate(TABLE) if row.secret}
    settings = load(secrets)
    assert len(secrets) == 3
    assert "canary" not in repr(settings)
    assert "canary" not in repr(replace(settings, hf_token="canary-replaced"))  # a made-up token
    gateway = GatewaySettings(**{field.name: getattr(settings, field.name) for field in fields(GatewaySettings)})
    assert "canary" not in repr(gateway)
    assert "port=6333" in repr(gateway)
    with pytest.raises(SettingsError) as caught:
        load({"API_KEY": "sk canary"})
    assert "canary" not in str(caught.value)


def test_contradicting_settings_are_named() -> None:
    with pytest.raises(SettingsError, match="PORT and METRICS_PORT"):
        load({"PORT": "7000", "METRICS_PORT": "7000"})
    with pytest.raises(SettingsError, match="MODEL_ID=/models/mine"):
        load({"MODEL_ID": "/models/mine"})


def test_local_model_is_served_under_the_name_of_its_folder(tmp_path: Path) -> None:
    assert load({"MODEL_ID": str(tmp_path / "mine"), "MODEL_SOURCE": "local"}).served_model_name == "mine"


def test_generated_documents_are_current() -> None:
    specification = importlib.util.spec_from_file_location("generate_docs", HOME / "tools" / "generate_docs.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for path, text in module.DOCUMENTS.items():
        assert (HOME / path).read_text(encoding="utf-8") == text(), f"{path} is stale: make docs"
