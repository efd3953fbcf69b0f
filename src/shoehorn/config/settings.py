"""Settings: environment variables and `*_FILE` secrets -> one frozen `Settings`.

Rules:
- this is the only reader of the environment; everything after it takes a `Settings`;
- `TABLE` is the one place that defines a setting: the documentation, `.env.example` and the errors come from it;
- an empty variable counts as not set; a bad value is an error, never a default;
- a secret may come from NAME or from the file that NAME_FILE names, never both;
- all mistakes are reported together, by name.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import parse_size

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
GUESSES = ("auto", "off", "ngram")
"""What SPECULATIVE can say besides the name of a draft model."""

_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{8,512}")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")


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


def _speculative(text: str) -> str:
    if text not in GUESSES and "/" not in text:
        raise ValueError(f"{text!r} is none of {', '.join(GUESSES)}, and no model; write OWNER/NAME")
    return text if text in GUESSES else _model_id(text)


def _revision(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text, re.ASCII):
        raise ValueError(f"{text!r} is not a branch, tag or commit")
    return text


def _served_name(text: str) -> str:
    if not re.fullmatch(r"\w[\w./:-]*", text, re.ASCII):
        raise ValueError(f"{text!r} is no model name; use letters, digits and . / : - _")
    return text


def parse_key(text: str) -> str:
    """An API key as a client sends it. The error never shows the key.

    Raises:
        ValueError: it has characters or a length that no key may have.
    """
    if not _KEY.fullmatch(text):
        raise ValueError("a key has 8 to 512 characters out of A-Z a-z 0-9 . _ ~ + / = -")
    return text


def _networks(text: str) -> tuple[str, ...]:
    found = []
    for word in re.split(r"[\s,]+", text.strip(" ,")):
        try:
            found.append(str(ipaddress.ip_network(word)))
        except ValueError:
            raise ValueError(f"{word!r} is no address or network; write 10.0.0.1 or 10.0.0.0/8") from None
    return tuple(found)


def _origins(text: str) -> tuple[str, ...]:
    words = tuple(re.split(r"[\s,]+", text.strip(" ,")))
    if words == ("*",):
        return words
    for word in words:
        if not _ORIGIN.fullmatch(word):
            raise ValueError(f"{word!r} is no origin; write https://chat.example.com, with the port where it is not "
                             "the usual one, in small letters and without a path (or * alone)")
    return words


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"cannot be split into arguments: {error}") from error


def _rate(text: str) -> int:
    rate = parse_size(text.removesuffix("/s"))
    if rate < 1_000_000:
        raise ValueError(f"{text!r} is less than 1MB a second; write 1MB or more")
    return rate


TABLE: tuple[Setting, ...] = (
    Setting("MODEL_ID", "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
            "The model: OWNER/NAME on the hub, or the path of a folder when MODEL_SOURCE=local.", _model_id),
    Setting("MODEL_SOURCE", "modelscope", "Where the model comes from: `modelscope`, `huggingface`, or `local` for a "
            "folder that is used where it lies.", _one_of("modelscope", "huggingface", "local")),
    Setting("MODEL_REVISION", "", "Branch, tag or commit on the hub; when not set, `master` on ModelScope and `main` "
            "on Hugging Face.", _revision),
    Setting("MODEL_FALLBACK", "no", "Ask the other hub when the chosen one cannot be reached or lacks the model. Its "
            "files are used only where their SHA-256 are known from the chosen hub, or an earlier pull.", _switch),
    Setting("SERVED_MODEL_NAME", "", "The name that clients use; MODEL_ID when not set.", _served_name),
    Setting("VRAM_PROFILE", "auto", "`auto`, the name of a profile (`shoehorn profiles`), or the path of your own."),
    Setting("VRAM_LIMIT", "", "Use no more than this of each GPU, for example 7GiB.", parse_size),
    Setting("QUANTIZATION", "auto", "`int4` (converted once, in the volume), `bitsandbytes` (NF4 while loading), "
            "`none` (as the checkpoint is), or `auto`: as it is where that fits, else `int4`, or `bitsandbytes` where "
            "the volume is too small for that; a profile may choose.",
            _one_of("auto", "int4", "bitsandbytes", "none")),
    Setting("KEEP_ORIGINAL", "yes", "With `no` the conversion to INT4 removes each original file once its successor is "
            "there, so that a smaller volume suffices.", _switch),
    Setting("MAX_MODEL_LEN", "", "Longest prompt plus answer, in tokens; the profile's when not set.",
            _integer(16, 10_000_000)),
    Setting("MAX_NUM_SEQS", "", "Most requests that run at the same time; the profile's when not set.",
            _integer(1, 4096)),
    Setting("MAX_QUEUED_REQUESTS", "", "Most requests that wait for a place; more are refused with 429. Four for each "
            "that can run when not set.", _integer(0, 100_000)),
    Setting("SPECULATIVE", "auto", "Tokens are guessed, and checked together in one pass: `ngram` guesses from the "
            "text so far; OWNER/NAME is a small model with the same vocabulary that guesses, like "
            "deepseek-ai/DeepSeek-R1-Distill-Llama-8B for the 70B (a path with MODEL_SOURCE=local), used where it fits "
            "and helps; `auto` is `ngram` where layers lie in host memory; `off` does without. Requests with min_p or "
            "logit_bias are refused where tokens are guessed.", _speculative),
    Setting("API_KEY", "", "The key that clients send. When neither this nor API_KEYS_FILE is set, the first start "
            "makes one, shows it in its log, that once, and keeps its hash in MODELS_DIR.", parse_key, secret=True),
    Setting("API_KEYS_FILE", "", "A mounted file with more keys, one a line: `NAME KEY`, then what limits it has: "
            "`requests_per_minute=60 concurrent=4 max_tokens=512 body_bytes=1MiB expires=2027-01-31`. Read again when "
            "it changes: mount the folder that it lies in, not the file.", Path),
    Setting("TLS_CERT_FILE", "", "The certificate with its chain (PEM), for HTTPS on PORT; plain HTTP is refused then. "
            "Read again when it changes.", Path),
    Setting("TLS_KEY_FILE", "", "The certificate's private key (PEM, no password).", Path),
    Setting("TRUSTED_PROXIES", "", "Addresses or networks of proxies in front, whose `X-Forwarded-For` tells the "
            "client's address for the log, for example `10.0.0.0/8`.", _networks),
    Setting("CORS_ALLOWED_ORIGINS", "", "Web pages that may call the API from a browser, for example "
            "`https://chat.example.com`; `*` for all. None when not set.", _origins),
    Setting("PORT", "6333", "The public port: the API, the page, /livez, /readyz and /status.", _integer(1, 65535)),
    Setting("METRICS_PORT", "6334", "The port of /metrics.", _integer(1, 65535)),
    Setting("VLLM_EXTRA_ARGS", "", "More arguments for vLLM, which win over everything else, for example "
            "`--max-num-batched-tokens 1024`.", _words),
    Setting("MODELS_DIR", "/models", "The volume: models, their manifests, and the hashes of the keys that "
            "`shoehorn keys` made.", Path),
    Setting("PULL_RATE_LIMIT", "", "Fetch a model no faster than this, in bytes a second, for example 20MB.", _rate),
    Setting("OFFLINE", "no", "Ask no hub for anything: the model has to lie complete in MODELS_DIR, or in a folder "
            "with MODEL_SOURCE=local.", _switch),
    Setting("RUN_DIR", "/run/shoehorn", "Sockets, state and process configuration of this start; may be empty "
            "memory (tmpfs).", Path),
    Setting("LOG_FORMAT", "text", "`text`, or `json` for one JSON object a line.", _one_of("text", "json")),
    Setting("ENGINE_LOG", "stdout", "Where the engine's own lines go: `stdout` among the others, or `file` for "
            "RUN_DIR/engine.log.", _one_of("stdout", "file")),
    Setting("TRUST_REMOTE_CODE", "no", "Run Python code that comes with the model. Off unless you trust its author.",
            _switch),
    Setting("DRAIN_TIMEOUT", "60", "Seconds that running answers get to finish when the container is stopped.",
            _integer(0, 3600)),
    Setting("MODELSCOPE_API_TOKEN", "", "Token for private models on ModelScope.", secret=True),
    Setting("MODELSCOPE_ENDPOINT", "", "Another address of ModelScope, for a mirror."),
    Setting("HF_TOKEN", "", "Token for private and gated models on Hugging Face.", secret=True),
    Setting("HF_ENDPOINT", "", "Another address of Hugging Face, for a mirror."),
)


@dataclass(frozen=True)
class Settings:
    """Every setting with its parsed value; None where it is not set and has no default. Secrets stay out of `repr`."""

    model_id: str
    model_source: str
    model_revision: str
    model_fallback: bool
    served_model_name: str
    vram_profile: str
    vram_limit: int | None
    quantization: str
    keep_original: bool
    max_model_len: int | None
    max_num_seqs: int | None
    max_queued_requests: int | None
    speculative: str
    api_key: str | None = field(repr=False)
    api_keys_file: Path | None
    tls_cert_file: Path | None
    tls_key_file: Path | None
    trusted_proxies: tuple[str, ...]
    cors_allowed_origins: tuple[str, ...]
    port: int
    metrics_port: int
    vllm_extra_args: tuple[str, ...]
    models_dir: Path
    pull_rate_limit: int | None
    offline: bool
    run_dir: Path
    log_format: str
    engine_log: str
    trust_remote_code: bool
    drain_timeout: int
    modelscope_api_token: str | None = field(repr=False)
    modelscope_endpoint: str | None
    hf_token: str | None = field(repr=False)
    hf_endpoint: str | None
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
    values["model_revision"] = values["model_revision"] or default_revision(values["model_source"])
    values["served_model_name"] = values["served_model_name"] or _default_name(values)
    for name in ("vllm_extra_args", "trusted_proxies", "cors_allowed_origins"):
        values[name] = values[name] or ()
    return Settings(**values, given=frozenset(given))


def default_revision(source: str) -> str:
    """The branch that a hub's repositories have; `source` is a value of MODEL_SOURCE."""
    return "main" if source == "huggingface" else "master"


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
    if (values["tls_cert_file"] is None) != (values["tls_key_file"] is None):
        mistakes.append("TLS_CERT_FILE and TLS_KEY_FILE belong together; set both or neither")
    if values["model_source"] == "local" and not values["keep_original"]:
        mistakes.append("KEEP_ORIGINAL=no would remove files of your own folder, since MODEL_SOURCE=local; unset it")
    for name in ("MODEL_ID", "SPECULATIVE"):
        is_path = values[name.lower()] not in GUESSES and not _MODEL_ID.fullmatch(values[name.lower()])
        if values["model_source"] != "local" and is_path:
            mistakes.append(f"{name}={values[name.lower()]} is a path, but MODEL_SOURCE={values['model_source']}; "
                            "set MODEL_SOURCE=local")
    return mistakes
