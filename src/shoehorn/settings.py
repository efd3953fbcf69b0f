"""Settings: environment variables and `*_FILE` secrets -> one frozen `Settings`.

Rules:
- this is the only reader of the environment; everything after it takes a `Settings`;
- `TABLE` is the one place that defines a setting: the documentation, `.env.example` and the errors come from it;
- an empty variable counts as not set; a bad value is an error, never a default;
- a secret may come from NAME or from the file that NAME_FILE names, never both;
- all mistakes are reported together, by name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoehorn.errors import SettingsError
from shoehorn.units import parse_size

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{8,512}")


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        parse: text -> value; raises ValueError saying what to write instead.
        default: as a person would write it; "" means not set (the field is then None).
        secret: may also come from NAME_FILE, and is never shown.
    """

    name: str
    default: str
    help: str
    parse: Callable[[str], Any] = str
    secret: bool = False

    @property
    def field(self) -> str:
        """The attribute of `Settings` that holds it."""
        return self.name.lower()


def _one_of(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def _integer(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parse


def _switch(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in words:
        raise ValueError(f"{text!r} is not yes or no")
    return words[text.lower()]


def _model_id(text: str) -> str:
    if not _MODEL_ID.fullmatch(text) and not text.startswith(("/", "./", "../")):
        raise ValueError(f"{text!r} is neither OWNER/NAME nor a path (write ./NAME for a folder beside you)")
    return text


def _revision(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
        raise ValueError(f"{text!r} is not a branch, tag or commit")
    return text


def _served_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w./:-]*", text, re.ASCII):
        raise ValueError(f"{text!r} is no model name; use letters, digits and . / : - _")
    return text


def _key(text: str) -> str:
    if not _KEY.fullmatch(text):
        raise ValueError("a key has 8 to 512 characters out of A-Z a-z 0-9 . _ ~ + / = -")  # never shows the key
    return text


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"cannot be split into arguments: {error}") from error


TABLE: tuple[Setting, ...] = (
    Setting("MODEL_ID", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
            "The model: OWNER/NAME on the hub, or the path of a folder when MODEL_SOURCE=local.", _model_id),
    Setting("MODEL_SOURCE", "modelscope", "Where the model comes from: `modelscope`, or `local` for a folder "
            "that is used where it lies.", _one_of("modelscope", "local")),
    Setting("MODEL_REVISION", "master", "Branch, tag or commit on the hub.", _revision),
    Setting("SERVED_MODEL_NAME", "", "The name that clients use; MODEL_ID when not set.", _served_name),
    Setting("VRAM_PROFILE", "auto", "`auto`, the name of a profile (`shoehorn profiles`), or the path of your own."),
    Setting("VRAM_LIMIT", "", "Use no more than this of each GPU, for example 7GiB.", parse_size),
    Setting("QUANTIZATION", "auto", "`auto` (the profile's choice), `bitsandbytes` (NF4 while loading), or `none` "
            "(as the checkpoint is).", _one_of("auto", "bitsandbytes", "none")),
    Setting("MAX_MODEL_LEN", "", "Longest prompt plus answer, in tokens; the profile's when not set.",
            _integer(16, 10_000_000)),
    Setting("MAX_NUM_SEQS", "", "Most requests that run at the same time; the profile's when not set.",
            _integer(1, 4096)),
    Setting("SPECULATIVE", "auto", "`ngram` guesses tokens from the prompt (good for code edits and summaries); "
            "`auto` and `off` do not.", _one_of("auto", "off", "ngram")),
    Setting("API_KEY", "", "The bearer key that clients send. When not set, one is generated, kept in MODELS_DIR and "
            "shown once.", _key, secret=True),
    Setting("PORT", "6333", "The public port: the API, the page, /livez, /readyz and /status.", _integer(1, 65535)),
    Setting("METRICS_PORT", "6334", "The port of /metrics.", _integer(1, 65535)),
    Setting("VLLM_EXTRA_ARGS", "", "More arguments for vLLM, which win over everything else, for example "
            "`--max-num-batched-tokens 1024`.", _words),
    Setting("MODELS_DIR", "/models", "The volume: models, their manifests and the generated key.", Path),
    Setting("RUN_DIR", "/run/shoehorn", "Sockets, state and process configuration of this start; may be empty "
            "memory (tmpfs).", Path),
    Setting("LOG_FORMAT", "text", "`text`, or `json` for one JSON object a line.", _one_of("text", "json")),
    Setting("ENGINE_LOG", "stdout", "Where the engine's own lines go: `stdout` among the others, or `file` for "
            "RUN_DIR/engine.log.", _one_of("stdout", "file")),
    Setting("TRUST_REMOTE_CODE", "no", "Run Python code that comes with the model. Off unless you trust its author.",
            _switch),
    Setting("DRAIN_TIMEOUT", "20", "Seconds that running answers get to finish when the container is stopped.",
            _integer(0, 3600)),
    Setting("MODELSCOPE_API_TOKEN", "", "Token for private models on ModelScope.", secret=True),
    Setting("MODELSCOPE_ENDPOINT", "", "Another address of the hub, for a mirror."),
)


@dataclass(frozen=True)
class Settings:
    """Every setting with its parsed value; None where it is not set and has no default. Secrets stay out of `repr`."""

    model_id: str
    model_source: str
    model_revision: str
    served_model_name: str
    vram_profile: str
    vram_limit: int | None
    quantization: str
    max_model_len: int | None
    max_num_seqs: int | None
    speculative: str
    api_key: str | None = field(repr=False)
    port: int
    metrics_port: int
    vllm_extra_args: tuple[str, ...]
    models_dir: Path
    run_dir: Path
    log_format: str
    engine_log: str
    trust_remote_code: bool
    drain_timeout: int
    modelscope_api_token: str | None = field(repr=False)
    modelscope_endpoint: str | None
    given: frozenset[str]
    """Names of the settings that the user gave, in contrast to defaults."""


def load(environment: Mapping[str, str], read_file: Callable[[str], str] | None = None) -> Settings:
    """Parse the environment.

    Args:
        environment: variables by name, for example `os.environ`.
        read_file: reads the file that a `NAME_FILE` names; raises OSError.

    Raises:
        SettingsError: with every mistake found, one a line.
    """
    read = read_file or (lambda path: Path(path).read_text(encoding="utf-8"))
    values: dict[str, Any] = {}
    given: set[str] = set()
    mistakes: list[str] = []
    for setting in TABLE:
        try:
            text = _text(setting, environment, read)
            if text:
                given.add(setting.name)
            text = text or setting.default
            values[setting.field] = setting.parse(text) if text else None
        except ValueError as error:
            mistakes.append(f"{setting.name}: {error}")
    if not mistakes:
        mistakes += _contradictions(values)
    if mistakes:
        raise SettingsError("\n".join(mistakes),
                            "correct these and start again; docs/configuration.md lists all settings")
    values["served_model_name"] = values["served_model_name"] or _default_name(values)
    values["vllm_extra_args"] = values["vllm_extra_args"] or ()
    return Settings(**values, given=frozenset(given))


def _text(setting: Setting, environment: Mapping[str, str], read: Callable[[str], str]) -> str:
    text = environment.get(setting.name, "").strip()
    path = environment.get(f"{setting.name}_FILE", "").strip() if setting.secret else ""
    if not path:
        return text
    if text:
        raise ValueError(f"both {setting.name} and {setting.name}_FILE are set; unset one of them")
    try:
        content = read(path).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting.name}_FILE={path} cannot be read: {error}") from error
    if not content:
        raise ValueError(f"{setting.name}_FILE={path} is empty")
    return content


def _default_name(values: Mapping[str, Any]) -> str:
    if values["model_source"] == "local":
        return Path(values["model_id"]).resolve().name
    return str(values["model_id"])


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    mistakes = []
    if values["port"] == values["metrics_port"]:
        mistakes.append(f"PORT and METRICS_PORT are both {values['port']}; give one of them another number")
    is_path = not _MODEL_ID.fullmatch(values["model_id"])
    if values["model_source"] != "local" and is_path:
        mistakes.append(f"MODEL_ID={values['model_id']} is a path, but MODEL_SOURCE={values['model_source']}; "
                        "set MODEL_SOURCE=local")
    return mistakes


