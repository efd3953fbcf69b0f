"""Settings: environment variables and `*_FILE` secrets -> one frozen `Settings`.

Rules:
- this module is the only reader of the environment; all other code takes a `Settings`;
- a field of the classes below defines a setting: name, type, default, help, parser. `TABLE`, the documentation and
  `.env.example` are derived from the fields;
- an empty variable counts as unset; an invalid value is an error, never a default;
- a secret comes from NAME or from the file that NAME_FILE names, never both, and is not part of `repr`;
- all mistakes are reported together, by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from shoehorn.common.errors import SettingsError
from shoehorn.common.units import parse_memory
from shoehorn.config import cluster_rules, network, replicas, spelling
from shoehorn.config.other_variables import COMPOSE, PASSED
from shoehorn.config.setting_values import (
    SPECULATIVE_KEYWORDS,
    arguments,
    byte_size,
    calibration,
    host_address,
    idle_time,
    integer,
    is_repository_name,
    length,
    model_id,
    networks,
    node_address,
    one_of,
    origins,
    parse_key,
    parser_name,
    partition,
    published_address,
    rate,
    revision,
    served_names,
    speculative,
    switch,
)


@dataclass(frozen=True)
class Setting:
    """Definition of one setting, written as the annotation of its field.

    Attributes:
        default: as a user would write it; "" means unset.
        parse: text -> value; raises a ValueError that says which form is expected.
        unset: value of the field when neither a value nor a default exists.
        secret: may also come from NAME_FILE; never shown.
        name: of the variable; `TABLE` fills it in.
    """

    default: str
    help: str
    parse: Callable[[str], Any] = str
    unset: Any = None
    secret: bool = False
    name: str = ""


class _Group:
    """Base of the groups: a `repr` without secrets."""

    def __repr__(self) -> str:
        secrets = {setting.name.lower() for setting in TABLE if setting.secret}
        shown = (f"{name}={value!r}" for name, value in vars(self).items() if name not in secrets)
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, repr=False)
class ModelSettings(_Group):
    """Selection of the model."""

    model_id: Annotated[str, Setting(
        "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
        "Model: OWNER/NAME on the hub, or the path of a folder with MODEL_SOURCE=local.", model_id)]
    model_source: Annotated[str, Setting(
        "modelscope", "Source of the model: `modelscope`, `huggingface`, or `local` for a folder that is used in "
        "place.", one_of("modelscope", "huggingface", "local"))]
    model_revision: Annotated[str, Setting(
        "", "Branch, tag or commit on the hub, or a reference like refs/pr/3. Unset: `master` on ModelScope, `main` on "
        "Hugging Face.", revision)]
    model_fallback: Annotated[bool, Setting(
        "no", "Use the other hub when the selected one is unavailable or lacks the model. Requires that the SHA-256 of "
        "every weights file is known from the selected hub or an earlier pull, and matches.", switch)]
    served_model_name: Annotated[str, Setting(
        "", "Model name that clients send; further names after a comma. Unset: MODEL_ID.", served_names)]
    trust_remote_code: Annotated[bool, Setting(
        "no", "Run Python code from the model repository. Enable only if you trust its author.", switch)]


@dataclass(frozen=True, repr=False)
class PlanSettings(_Group):
    """Input of the planner: limits and choices that the plan must respect."""

    vram_profile: Annotated[str, Setting(
        "auto", "`auto`, the name of a profile (`shoehorn profiles`), or the path of a profile file.")]
    vram_limit: Annotated[int | None, Setting(
        "", "Maximum memory to use of each GPU, for example 7GiB.", parse_memory)]
    quantization: Annotated[str, Setting(
        "auto", "`int4` (converted once, stored in the volume), `bitsandbytes` (NF4, quantized while loading), `none` "
        "(the checkpoint unchanged), or `auto`: unchanged if it fits, else `int4`, or `bitsandbytes` if the volume is "
        "too small for a conversion. A profile can override `auto`.", one_of("auto", "int4", "bitsandbytes", "none"))]
    keep_original: Annotated[bool, Setting(
        "yes", "`no`: the conversion to INT4 deletes each original file after its converted file is verified, which "
        "needs a smaller volume.", switch)]
    calibration: Annotated[str, Setting(
        "auto", "Calibration of the conversion to INT4, which loses less accuracy and takes longer: `auto` (on a CPU, "
        "if the model supports it and it takes at most an hour by estimation), `on`, `off`, or the path of your own "
        "text: a `.txt` or `.jsonl` file, or a folder of them.", calibration)]
    max_model_len: Annotated[int | None, Setting(
        "", "Maximum tokens of prompt and output together; 32k is 32,000 and 32K is 32,768, as in vLLM. Unset or "
        "`auto`: from the profile or the plan.", length(16, 10_000_000))]
    max_num_seqs: Annotated[int | None, Setting(
        "", "Maximum number of concurrent requests. Unset: from the profile or the plan.", integer(1, 4096))]
    max_queued_requests: Annotated[int | None, Setting(
        "", "Maximum number of waiting requests; further requests get status 429. Unset: four times the concurrent "
        "requests.", integer(0, 100_000))]
    speculative: Annotated[str, Setting(
        "auto", "Speculative decoding: `ngram` (prompt lookup), OWNER/NAME (draft model with the same vocabulary, for "
        "example deepseek-ai/DeepSeek-R1-Distill-Llama-8B for the 70B; a path with MODEL_SOURCE=local; used if it fits "
        "and is faster), `auto` (`ngram` if layers are offloaded to host memory), `off`. Requests with min_p or "
        "logit_bias are rejected while speculative decoding is enabled.", speculative)]
    cpu_compute: Annotated[str, Setting(
        "auto", "`auto`: the CPU multiplies INT4 weights and MXFP4 experts in host memory with Shoehorn's kernel where "
        "that is faster. `off`: weights in host memory are only copied to the GPU, and without a GPU vLLM's own "
        "kernels are used.",
        one_of("auto", "off"))]
    reasoning_parser: Annotated[str, Setting(
        "auto", "vLLM's parser of thoughts, which separates them from the answer: `auto` (from architecture and chat "
        "template), `off`, or a name (docs/parsers.md).", parser_name("reasoning-parser"))]
    tool_call_parser: Annotated[str, Setting(
        "auto", "vLLM's parser of tool calls: `auto`, `off`, or a name. Without a parser, requests with tools are "
        "refused.", parser_name("tool-call-parser"))]
    vllm_extra_args: Annotated[tuple[str, ...], Setting(
        "", "Additional vLLM arguments, which override all other settings, for example `--max-num-batched-tokens "
        "1024`.", arguments, unset=())]
    vllm_pp_layer_partition: Annotated[tuple[int, ...], Setting(
        "", "Layers of each pipeline stage instead of the plan's, for example `30,50`.", partition, unset=())]


@dataclass(frozen=True, repr=False)
class GatewaySettings(_Group):
    """Public ports, API keys, TLS and client addresses."""

    api_key: Annotated[str | None, Setting(
        "", "API key that clients send. If neither API_KEY nor API_KEYS_FILE is set, the first start creates a key, "
        "logs it once and stores its hash in MODELS_DIR.", parse_key, secret=True)]
    api_keys_file: Annotated[Path | None, Setting(
        "", "Mounted file with API keys, one a line: `NAME KEY`, then its limits: `requests_per_minute=60 concurrent=4 "
        "max_tokens=512 body_bytes=1MiB expires=2027-01-31`. Changes are reloaded: mount the folder of the file, not "
        "the file itself.", Path)]
    tls_cert_file: Annotated[Path | None, Setting(
        "", "TLS certificate chain (PEM) for HTTPS on PORT; plain HTTP is then rejected. Changes are reloaded.", Path)]
    tls_key_file: Annotated[Path | None, Setting("", "Private key of the certificate (PEM, without password).", Path)]
    trusted_proxies: Annotated[tuple[str, ...], Setting(
        "", "Addresses or networks of reverse proxies whose `X-Forwarded-For` header supplies the client address for "
        "the log, for example `10.0.0.0/8`.", networks, unset=())]
    cors_allowed_origins: Annotated[tuple[str, ...], Setting(
        "", "Web origins that may call the API from a browser, for example `https://chat.example.com`; `*` for all. "
        "Unset: none.", origins, unset=())]
    port: Annotated[int, Setting("6333", "Public port: API, status page, /livez, /readyz, /status.",
                                 integer(1, 65535))]
    metrics_port: Annotated[int, Setting("6334", "Port of /metrics.", integer(1, 65535))]
    max_body_size: Annotated[int, Setting(
        "10MiB", "Maximum size of one request to the API; more is status 413. The limit `body_bytes` of a key may be "
        "smaller.", byte_size(1 << 10, 1 << 30))]
    max_header_size: Annotated[int, Setting(
        "8KiB", "Maximum size of one request header, for example a cookie, and of the request line; more is status 431 "
        "or 414.", byte_size(1 << 10, 64 << 10))]
    published_address: Annotated[str, Setting(
        "", "ADDRESS:PORT under which the host publishes PORT, for the texts that show it; docker-compose.yml sets it.",
        published_address, unset="")]


@dataclass(frozen=True, repr=False)
class StorageSettings(_Group):
    """The volume and access to the hubs."""

    models_dir: Annotated[Path, Setting(
        "/models", "Volume: models, their manifests, and the hashes of the keys that `shoehorn keys` created.", Path)]
    pull_rate_limit: Annotated[int | None, Setting(
        "", "Maximum download rate in bytes a second, for example 20MB.", rate)]
    offline: Annotated[bool, Setting(
        "no", "Never contact a hub: the model must be complete in MODELS_DIR, or in a folder with MODEL_SOURCE=local.",
        switch)]
    modelscope_api_token: Annotated[str | None, Setting("", "Token for private models on ModelScope.", secret=True)]
    modelscope_endpoint: Annotated[str | None, Setting("", "Base URL of a ModelScope mirror.")]
    hf_token: Annotated[str | None, Setting("", "Token for private and gated models on Hugging Face.", secret=True)]
    hf_endpoint: Annotated[str | None, Setting("", "Base URL of a Hugging Face mirror.")]


@dataclass(frozen=True, repr=False)
class ProcessSettings(_Group):
    """Runtime files, logs and shutdown."""

    run_dir: Annotated[Path, Setting(
        "/run/shoehorn", "Folder for sockets, state and process configuration of one start; may be a tmpfs.", Path)]
    log_format: Annotated[str, Setting("text", "`text`, or `json` for one JSON object a line.",
                                       one_of("text", "json"))]
    engine_log: Annotated[str, Setting(
        "stdout", "Destination of vLLM's log: `stdout`, or `file` for RUN_DIR/engine.log.", one_of("stdout", "file"))]
    idle_stop: Annotated[int | None, Setting(
        "off", "Time without requests after which the engine is stopped and its GPU and host memory freed, for example "
        "`30m`, `2h` or `90s`. The next request starts it again, and gets status 503 until it serves. `off`: never.",
        idle_time)]
    drain_timeout: Annotated[int, Setting(
        "60", "Seconds that running requests have to finish when the container stops.", integer(0, 3600))]


@dataclass(frozen=True, repr=False)
class ClusterSettings(_Group):
    """Part of this container in a group of machines that serve one model."""

    role: Annotated[str, Setting(
        "single", "`single`: this machine serves alone. `head` and `worker`: several machines serve one model; the "
        "head plans and has the API, each worker lends its GPUs. `front`: distributes requests to replicas.",
        one_of("single", "head", "worker", "front"))]
    cluster_nodes: Annotated[int | None, Setting(
        "", "Number of machines that serve the model, the head included (`ROLE=head`).", integer(2, 64))]
    head_address: Annotated[str, Setting(
        "", "Address or host name of the head (`ROLE=worker`).", host_address, unset="")]
    node_address: Annotated[str, Setting(
        "", "This machine's IPv4 address in the network of the cluster (`ROLE=head` and `worker`).", node_address,
        unset="")]
    cluster_secret_file: Annotated[Path | None, Setting(
        "", "File with the secret of the cluster, the same on all its machines: at least 32 characters (`openssl rand "
        "-hex 32`), readable by the server's user and group only.", Path)]
    cluster_network: Annotated[str, Setting(
        "isolated", "`isolated`: clients reach the head through another network than the cluster's; the start is "
        "refused otherwise. `trusted`: everybody in the cluster's network may read prompts and control the engine.",
        one_of("isolated", "trusted"))]
    replicas: Annotated[tuple[replicas.Replica, ...], Setting(
        "", "Addresses of the replicas, HOST or HOST:PORT, separated by commas (`ROLE=front`); each serves the same "
        "model, with REPLICA_PORT set.", replicas.parse, unset=())]
    replica_port: Annotated[int | None, Setting(
        "", "Port for the requests of a front, usually 6335, with mutual TLS from CLUSTER_SECRET_FILE (`ROLE=single` "
        "and `head`). The API on PORT is then closed: the front checks keys and limits.", integer(1, 65535))]


_GROUPS = (ModelSettings, PlanSettings, GatewaySettings, StorageSettings, ProcessSettings, ClusterSettings)


@dataclass(frozen=True, repr=False)
class Settings(ModelSettings, PlanSettings, GatewaySettings, StorageSettings, ProcessSettings, ClusterSettings):
    """All settings with their parsed values."""

    given: frozenset[str]
    """Names of the settings that the user set, in contrast to defaults."""

    served_aliases: tuple[str, ...]
    """Further names of the model, after `served_model_name`."""

    @property
    def is_node(self) -> bool:
        """True for a machine of a cluster that serves one model."""
        return self.role in ("head", "worker")


def _table() -> tuple[Setting, ...]:
    rows = []
    for group in _GROUPS:
        hints = get_type_hints(group, include_extras=True)
        rows += [replace(hints[field.name].__metadata__[0], name=field.name.upper()) for field in fields(group)]
    return tuple(rows)


TABLE = _table()


def load(environment: Mapping[str, str], read_file: Callable[[str], str] | None = None) -> Settings:
    """Parse the environment.

    Args:
        environment: variables by name, for example `os.environ`.
        read_file: reads the file that a `NAME_FILE` names; raises OSError.

    Raises:
        SettingsError: with every mistake, one a line.
    """
    read = read_file or (lambda path: Path(path).read_text(encoding="utf-8"))
    values: dict[str, Any] = {}
    names: set[str] = set()
    mistakes = misspelled(environment)
    for setting in TABLE:
        try:
            text = _text(setting, environment, read)
            is_default, text = not text, text or setting.default
            value = values[setting.name.lower()] = setting.parse(text) if text else setting.unset
            if not is_default and value is not None:
                names.add(setting.name)
        except ValueError as error:
            mistakes.append(f"{setting.name}: {error}")
    if mistakes:
        raise _invalid(mistakes)
    served, *aliases = values.pop("served_model_name") or ("",)
    settings = _with_derived_defaults(Settings(**values, given=frozenset(names), served_model_name=served,
                                               served_aliases=tuple(aliases)))
    contradictions = _contradictions(settings) + cluster_rules.contradictions(
        settings.role, settings.head_address, settings.node_address, names)
    if not settings.offline and settings.model_source != "local":
        contradictions += network.invalid_proxies(environment)
    if contradictions:
        raise _invalid(contradictions)
    return settings


def misspelled(environment: Mapping[str, str]) -> list[str]:
    """Return a mistake for each variable whose name is one typing error away from a setting's."""
    known = {name for setting in TABLE for name in (setting.name, f"{setting.name}_FILE" if setting.secret else "")}
    others = {variable.name for variable in (*COMPOSE, *PASSED)}
    names = [name for name, value in environment.items() if value.strip() and name not in known | others]
    return [f"{name}: unknown setting; did you mean {setting}?"
            for name in names if (setting := spelling.nearest(name, sorted(known - {""})))]


def run_dir(environment: Mapping[str, str]) -> Path:
    """Return RUN_DIR whatever the other settings are."""
    default = next(setting.default for setting in TABLE if setting.name == "RUN_DIR")
    return Path(_unquoted(environment.get("RUN_DIR", "")) or default)


def default_revision(source: str) -> str:
    """Return the default branch of a hub's repositories; `source` is a value of MODEL_SOURCE."""
    return "main" if source == "huggingface" else "master"


def _invalid(mistakes: list[str]) -> SettingsError:
    return SettingsError("\n".join(mistakes), "Correct these settings and restart; docs/configuration.md lists all.")


def _text(setting: Setting, environment: Mapping[str, str], read: Callable[[str], str]) -> str:
    text = _unquoted(environment.get(setting.name, ""))
    path = _unquoted(environment.get(f"{setting.name}_FILE", "")) if setting.secret else ""
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


def _unquoted(text: str) -> str:
    """Remove quotes around a value: `docker run --env-file` keeps those that compose and shells remove."""
    text = text.strip()
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" and text[0] not in text[1:-1]
    return text[1:-1].strip() if is_quoted else text


def _with_derived_defaults(settings: Settings) -> Settings:
    local = settings.model_source == "local"
    name = Path(settings.model_id).resolve().name if local else settings.model_id
    return replace(settings, model_revision=settings.model_revision or default_revision(settings.model_source),
                   served_model_name=settings.served_model_name or name)


def _contradictions(settings: Settings) -> list[str]:
    mistakes = []
    if settings.port == settings.metrics_port:
        mistakes.append(f"PORT and METRICS_PORT are both {settings.port}; change one of them")
    if settings.replica_port and settings.idle_stop:
        mistakes.append("IDLE_STOP and REPLICA_PORT are both set: a front does not start the idle engine of a replica; "
                        "unset IDLE_STOP")
    for name, port in (("PORT", settings.port), ("METRICS_PORT", settings.metrics_port)):
        if port == settings.replica_port:
            mistakes.append(f"REPLICA_PORT and {name} are both {port}; change one of them")
    if (settings.tls_cert_file is None) != (settings.tls_key_file is None):
        mistakes.append("TLS_CERT_FILE and TLS_KEY_FILE: only one is set; set both or neither")
    if settings.model_source == "local" and not settings.keep_original:
        mistakes.append("KEEP_ORIGINAL=no would delete files of your own folder with MODEL_SOURCE=local; unset it")
    for name, value in (("MODEL_ID", settings.model_id), ("SPECULATIVE", settings.speculative)):
        is_path = value not in SPECULATIVE_KEYWORDS and not is_repository_name(value)
        if settings.model_source != "local" and is_path:
            mistakes.append(f"{name}={value} is a path, but MODEL_SOURCE={settings.model_source}; set "
                            "MODEL_SOURCE=local")
    return mistakes
