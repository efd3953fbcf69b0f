"""Command-line options of vLLM as recorded data: validates VLLM_EXTRA_ARGS and profiles without importing vLLM.

Rules:
- tools/record_engine_options.py writes `vllm_options.json` from vLLM's real parser; a test compares the two;
- the error of an unknown option suggests the nearest name, that of a removed option its replacement, and that of an
  option set by Shoehorn the setting to use;
- names are vLLM's long names without leading dashes; all mistakes are reported together.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from shoehorn.common.errors import SettingsError
from shoehorn.config import json_values

OWNED = {
    "model": "MODEL_ID", "served-model-name": "SERVED_MODEL_NAME", "tokenizer": "MODEL_ID",
    "revision": "MODEL_REVISION", "code-revision": "MODEL_REVISION", "tokenizer-revision": "MODEL_REVISION",
    "download-dir": "MODELS_DIR", "hf-token": "HF_TOKEN", "trust-remote-code": "TRUST_REMOTE_CODE",
    "api-key": "API_KEY", "port": "PORT", "config": "VRAM_PROFILE (the path of your own profile)",
    **dict.fromkeys(("host", "uds", "root-path", "grpc", "grpc-port", "headless", "ssl-keyfile", "ssl-certfile",
                     "ssl-ca-certs", "ssl-cert-reqs", "ssl-ciphers", "enable-ssl-refresh", "middleware",
                     "allow-credentials", "allowed-origins", "allowed-methods", "allowed-headers",
                     "disable-fastapi-docs", "enable-offline-docs", "disable-uvicorn-access-log",
                     "sse-keep-alive-interval", "trust-request-chat-template", "trust-request-mm-kwargs",
                     "data-parallel-supervisor-port", "master-addr", "master-port", "ray-workers-use-nsight"), ""),
    "distributed-executor-backend": "ROLE=head, and ROLE=worker on the other machines",
    "nnodes": "ROLE=head and CLUSTER_NODES", "node-rank": "ROLE=worker and HEAD_ADDRESS",
    **dict.fromkeys(("data-parallel-size", "data-parallel-size-local", "data-parallel-rank", "data-parallel-start-rank",
                     "data-parallel-address", "data-parallel-rpc-port", "data-parallel-backend",
                     "data-parallel-hybrid-lb", "data-parallel-external-lb",
                     "data-parallel-multi-port-external-lb"), "independent replicas up"),
}
"""Options that Shoehorn sets: the setting to use instead, or ""."""

REMOVED = {
    "swap-space": "preempted sequences are recomputed, not swapped",
    "max-seq-len-to-capture": "use max-cudagraph-capture-size, which counts tokens of a batch",
    "disable-log-requests": "requests are not logged by default",
    "calculate-kv-scales": "the checkpoint must contain the scales",
    "use-v2-block-manager": "vLLM has one block manager",
    "device": "the vLLM build determines the device",
    "task": "use runner and convert",
    "guided-decoding-backend": "use structured-outputs-config",
    "num-scheduler-steps": "asynchronous scheduling is always enabled",
    "preemption-mode": "preempted sequences are recomputed",
    "worker-use-ray": "use distributed-executor-backend",
    "disable-frontend-multiprocessing": "the engine always runs in a separate process",
    "disable-async-output-proc": "output is always processed asynchronously",
    "multi-step-stream-outputs": "multi-step scheduling was removed",
    "num-lookahead-slots": "use num_speculative_tokens of speculative-config",
    "scheduler-delay-factor": "the scheduler does not delay requests",
    "max-num-partial-prefills": "the scheduler limits partial prefills",
    "max-long-partial-prefills": "the scheduler limits partial prefills",
    "enable-reasoning": "use reasoning-parser",
    "enable-prompt-adapter": "prompt adapters are gone",
    "max-prompt-adapters": "prompt adapters are gone",
    "max-prompt-adapter-token": "prompt adapters are gone",
    "qlora-adapter-name-or-path": "use lora-modules",
    "lora-extra-vocab-size": "adapters cannot extend the vocabulary",
    "long-lora-scaling-factors": "use the configuration of the adapter",
    "tokenizer-pool-size": "tokenizing has its own threads",
    "tokenizer-pool-type": "tokenizing has its own threads",
    "tokenizer-pool-extra-config": "tokenizing has its own threads",
    "quantization-param-path": "the checkpoint must contain the scales",
    "override-neuron-config": "unsupported accelerator",
    "override-pooler-config": "use pooler-config",
    "ngram-prompt-lookup-max": "use speculative-config",
    "ngram-prompt-lookup-min": "use speculative-config",
    "speculative-max-model-len": "use speculative-config",
    "speculative-draft-tensor-parallel-size": "use speculative-config",
    "spec-decoding-acceptance-method": "use speculative-config",
    "typical-acceptance-sampler-posterior-threshold": "use speculative-config",
    "typical-acceptance-sampler-posterior-alpha": "use speculative-config",
    "disable-logprobs-during-spec-decoding": "use speculative-config",
    "model-impl-backend": "use model-impl",
    "logits-processor-pattern": "use logits-processors",
    "max-context-len-to-capture": "use max-cudagraph-capture-size, which counts tokens of a batch",
    "engine-use-ray": "use distributed-executor-backend",
    "rope-scaling": "use hf-overrides",
    "rope-theta": "use hf-overrides",
    "speculative-model": "use speculative-config",
    "num-speculative-tokens": "use speculative-config",
}
"""Options of older vLLM versions that guides still mention: the replacement."""

_ADAPTER_KEYS = ("name", "path", "base_model_name", "is_3d_lora_weight")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)")
_MULTIPLIERS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
                "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_NEGATIVE = re.compile(r"-\d+(\.\d+)?")


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        takes: `value`, `list` (one or more) or `switch`.
        kind: of its values: `int`, `size` (an integer that may be written 8k), `float`, `json` or `text`.
        short: aliases, including dashes.
        negatable: `--no-NAME` exists.
        accepts: of JSON, the types `object`, `list`, `number` and `text`.
        keys: of an object that refuses others; empty if it takes any.
        values: what the values inside an object accept, by key (see `json_values`); `*` stands for any key.
    """

    takes: str
    kind: str = "text"
    choices: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    negatable: bool = False
    accepts: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict, hash=False)


@functools.cache
def recorded() -> Mapping[str, Option]:
    """Return every option by name."""
    document = json.loads(resources.files("shoehorn.config").joinpath("vllm_options.json").read_text(encoding="utf-8"))
    return {name: Option(entry["takes"], entry.get("kind", "text"), tuple(entry.get("choices", ())),
                         tuple(entry.get("short", ())), entry.get("negatable", False),
                         tuple(entry.get("accepts", ())), tuple(entry.get("keys", ())), entry.get("values", {}))
            for name, entry in document["options"].items()}


def parse_arguments(words: Sequence[str]) -> dict[str, object]:
    """Parse words of a command line as vLLM's parser does; return values by option name.

    Values are int, float, str, dict (JSON objects), bool (switches) or a list of them; the last one wins.

    Raises:
        SettingsError: with every mistake in VLLM_EXTRA_ARGS, one a line.
    """
    parsed: dict[str, object] = {}
    mistakes: list[str] = []
    rest = list(words)
    while rest:
        try:
            name, value = _take(rest)
        except ValueError as error:
            mistakes.append(f"VLLM_EXTRA_ARGS: {error}")
            continue
        before = parsed.get(name)
        parsed[name] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    if mistakes:
        raise SettingsError("\n".join(mistakes), "Correct VLLM_EXTRA_ARGS and restart.")
    return parsed


def check(name: str, value: object) -> object:
    """Check one option of a profile, as YAML returns it, and return the value to use.

    Raises:
        ValueError: invalid option or value; says what to write.
    """
    option = _option(name)
    if option.takes == "switch":
        if not isinstance(value, bool):
            raise ValueError(f"{name}: {value!r} is not true or false")
        if not value and not option.negatable:
            raise ValueError(f"{name}: cannot be switched off; remove it")
        return value
    if isinstance(value, dict) and option.kind == "json":
        return _checked(name, option, value)
    values = value if isinstance(value, list) and option.takes == "list" else [value]
    if name == "lora-modules":
        values = [json.dumps(each) if isinstance(each, dict) else each for each in values]
    if not values or any(isinstance(each, bool | list | dict) or each is None for each in values):
        raise ValueError(f"{name}: {value!r} is not a {option.takes}")
    converted = [_convert(name, option, str(each)) for each in values]
    return converted if option.takes == "list" else converted[0]


def _take(rest: list[str]) -> tuple[str, object]:
    """Remove one option with its values from the front. Raises ValueError after removing at least a word."""
    word = rest.pop(0)
    spelled, has_value, text = word.partition("=")
    if re.fullmatch(r"-O=?\d", word):
        return "optimization-level", word[-1]
    if not spelled.startswith("-") or spelled in ("-", "--"):
        raise ValueError(f"{word!r} is not an option; options begin with --")
    name, dot, path = spelled.partition(".")
    name = name[2:].replace("_", "-") if name.startswith("--") else _long_name(name)
    no = name.removeprefix("no-")
    if name not in recorded() and no != name and no in recorded() and recorded()[no].negatable:
        _option(no)
        return _switch(no, False, bool(has_value))
    try:
        option = _option(name)
    except ValueError:
        while rest and not rest[0].startswith("-"):
            rest.pop(0)  # report the option once, not each of its values
        raise
    if option.takes == "switch":
        return _switch(name, True, bool(has_value))
    values = [text] if has_value else []
    while rest and (not rest[0].startswith("-") or _NEGATIVE.fullmatch(rest[0])) and (
            not values or (option.takes == "list" and not has_value)):
        values.append(rest.pop(0))
    if not values:
        raise ValueError(f"--{name}: value missing")
    if dot:
        return name, _nested(name, option, path, values[0])
    converted = [_convert(name, option, value) for value in values]
    return name, converted if option.takes == "list" else converted[0]


def _long_name(spelled: str) -> str:
    for name, option in recorded().items():
        if spelled in option.short:
            return name
    raise ValueError(f"unknown vLLM option {spelled}; options begin with --")


def _option(name: str) -> Option:
    """Return a known option that a user may set. Raises ValueError for others."""
    if name in OWNED:
        instead = f"; set {OWNED[name]} instead" if OWNED[name] else ""
        raise ValueError(f"--{name} is set by Shoehorn{instead}")
    if name in REMOVED:
        raise ValueError(f"--{name} was removed from vLLM: {REMOVED[name]}")
    if name not in recorded():
        similar = difflib.get_close_matches(name, recorded().keys() - OWNED.keys(), 1)
        raise ValueError(f"unknown vLLM option --{name}" + (f"; did you mean --{similar[0]}?" if similar else ""))
    return recorded()[name]


def _switch(name: str, on: bool, has_value: bool) -> tuple[str, bool]:
    if has_value:
        raise ValueError(f"--{name}: a switch has no value" +
                         (f"; write --{name} or --no-{name}" if recorded()[name].negatable else ""))
    return name, on


def _convert(name: str, option: Option, text: str) -> object:
    """Convert a text to the kind of the option. Raises ValueError."""
    if option.kind == "int":
        if not re.fullmatch(r"-?\d+", text):
            raise ValueError(f"--{name}: {text!r} is not an integer")
        value: Any = int(text)
    elif option.kind == "size":
        match = _SIZE.fullmatch(text)
        if not match or (match[2].isupper() and "." in match[1]):
            raise ValueError(f"--{name}: {text!r} is not a number; write it like 8192 or 8k")
        value = round(float(match[1]) * _MULTIPLIERS[match[2]])
    elif option.kind == "float":
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"--{name}: {text!r} is not a number") from None
        if not 0 <= value < float("inf"):
            raise ValueError(f"--{name}: {text!r} is not a finite number >= 0")
    elif option.kind == "json" and text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--{name}: {text!r} is not valid JSON ({error})") from error
        _checked(name, option, value)
    elif option.kind == "json" and option.accepts and "text" not in option.accepts and not _is_accepted(option, text):
        raise ValueError(f"--{name}: {text!r} is not {' or '.join(_JSON_FORMS[each] for each in option.accepts)}")
    else:
        value = text
    if name == "lora-modules":
        _check_adapter(text)
    if option.choices and text not in option.choices and text.replace("-", "_") not in option.choices:
        raise ValueError(f"--{name}: {text!r} is not one of {', '.join(option.choices)}")
    return value


def _check_adapter(text: str) -> None:
    """Check an adapter, NAME=FOLDER or a JSON object (LoRAModulePath of vLLM). Raises ValueError."""
    if not text.lstrip().startswith("{"):
        if not re.fullmatch(r"[^=,]+=[^,]+", text):
            raise ValueError(f"--lora-modules: {text!r} is not NAME=FOLDER, nor a JSON object with name and path; "
                             "separate adapters by blanks")
        return
    try:
        adapter = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--lora-modules: {text!r} is not valid JSON ({error})") from error
    wrong = [key for key in adapter if key not in _ADAPTER_KEYS]
    if wrong or not all(isinstance(adapter.get(key), str) for key in ("name", "path")):
        raise ValueError(f"--lora-modules: {text!r} needs the keys name and path, and may have "
                         f"{' and '.join(_ADAPTER_KEYS[2:])}")


_JSON_FORMS = {"object": "a JSON object like {\"key\": 1}", "list": "a JSON list", "number": "a number"}


def _is_accepted(option: Option, text: str) -> bool:
    """Return whether a text that is not an object has a JSON type that the option accepts."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return ("list" if isinstance(value, list) else "number" if isinstance(value, int | float) else "") in option.accepts


def _checked(name: str, option: Option, value: dict[str, object]) -> dict[str, object]:
    """Check the keys and values of an object. Raises ValueError."""
    for key in value:
        if option.keys and str(key).partition(".")[0] not in option.keys:
            similar = difflib.get_close_matches(str(key), option.keys, 1)
            raise ValueError(f"--{name}: unknown key {key!r}" + (f"; did you mean {similar[0]}?" if similar else ""))
    records = json_values.GENERATION if name == "override-generation-config" else option.values
    for key, each in value.items():
        if record := records.get(str(key), records.get("*")):
            json_values.check_value(f"--{name}: {key}", each, record)
    return value


def _nested(name: str, option: Option, path: str, text: str) -> dict[str, object]:
    """Convert `--NAME.a.b 1` to {"a": {"b": 1}}, as vLLM does."""
    if option.kind != "json" or not all(path.split(".")):
        raise ValueError(f"--{name}.{path}: --{name} has no keys")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for key in reversed(path.split(".")):
        value = {key: value}
    return _checked(name, option, dict(value))


def _merged(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, object]:
    result = dict(old)
    for key, value in new.items():
        before = result.get(key)
        result[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result
