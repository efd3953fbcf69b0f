"""Parsers of the values of settings: text -> value.

Rules: each raises a ValueError that says which form is expected; none returns a default in place of an invalid value.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Callable
from pathlib import Path

from shoehorn.common.units import format_size, parse_size
from shoehorn.config import vllm_parsers

SPECULATIVE_KEYWORDS = ("auto", "off", "ngram")
"""Values of SPECULATIVE besides the name of a draft model."""

AUTOMATIC = "auto"
"""Value of a limit that leaves it to the plan, as vLLM has it."""

_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{8,512}")
_ORIGIN = re.compile(r"https?://(?:[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_MODEL_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?P<hub>huggingface|hf-mirror|hf|modelscope)\.(?:co|com|cn|ai)/"
                         r"(?:api/)?(?:models/)?(?P<name>[\w.-]+/[\w.-]+)(?:[/?#].*)?", re.ASCII)
_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
                   r"(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*")
_LENGTH = re.compile(r"([0-9]{1,9}(?:\.[0-9]+)?)([kKmM]?)")
_LENGTH_UNITS = {"": 1, "k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}
_SWITCH_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False,
                 "off": False}


def one_of(*choices: str) -> Callable[[str], str]:
    """Return a parser that accepts exactly these words."""
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not one of {', '.join(choices)}")
        return text

    return parse


def calibration(text: str) -> str:
    """Return `auto`, `on` or `off`, or the absolute path of a text that exists."""
    if text in ("auto", "on", "off"):
        return text
    path = Path(text)
    if not path.exists():
        raise ValueError(f"{text!r} is not auto, on, off, or the path of a text that exists")
    return str(path.resolve())


def parser_name(option: vllm_parsers.Option) -> Callable[[str], str]:
    """Return a parser of the name of one of vLLM's parsers, `auto` or `off`."""
    def parse(text: str) -> str:
        if text not in (vllm_parsers.AUTO, vllm_parsers.OFF, *vllm_parsers.names(option)):
            raise ValueError(f"{vllm_parsers.unknown(option, text)}; use auto, off, or one of "
                             f"{', '.join(vllm_parsers.names(option))}")
        return text

    return parse


def integer(minimum: int, maximum: int) -> Callable[[str], int]:
    """Return a parser of integers within inclusive limits."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not minimum <= int(text) <= maximum:
            raise ValueError(f"{text!r} is not an integer from {minimum} to {maximum}")
        return int(text)

    return parse


def length(minimum: int, maximum: int) -> Callable[[str], int | None]:
    """Return a parser of token counts within inclusive limits: 8192, 32k (32,000), 32K (32,768); None for `auto`."""
    def parse(text: str) -> int | None:
        if text.lower() == AUTOMATIC:
            return None
        match = _LENGTH.fullmatch(text)
        tokens = float(match[1]) * _LENGTH_UNITS[match[2]] if match else 0.0
        if not tokens.is_integer() or not minimum <= tokens <= maximum:
            raise ValueError(f"{text!r} is not a number of tokens from {minimum} to {maximum}; write it like 8192, 32k "
                             "or auto")
        return int(tokens)

    return parse


def byte_size(minimum: int, maximum: int) -> Callable[[str], int]:
    """Return a parser of sizes within inclusive limits in bytes."""
    def parse(text: str) -> int:
        size = parse_size(text)
        if not minimum <= size <= maximum:
            raise ValueError(f"{text!r} is not a size from {format_size(minimum)} to {format_size(maximum)}")
        return size

    return parse


def published_address(text: str) -> str:
    """Parse ADDRESS:PORT as Docker publishes it -> the same for a client on the host; "" if Docker chooses the port.

    Every address (0.0.0.0, [::]) becomes that of the loopback.
    """
    address, _, port = text.rpartition(":")
    if not re.fullmatch(r"(?:[0-9.]+|\[[0-9a-fA-F:.]+\])?:[0-9]{1,5}(?:-[0-9]{1,5})?", text):
        raise ValueError(f"{text!r} is not ADDRESS:PORT, for example 127.0.0.1:6333")
    if not port.isdecimal() or not 0 < int(port) <= 65535:
        return ""
    everywhere = ("", "0.0.0.0", "[::]")  # noqa: S104  # recognized, not bound
    return f"{'127.0.0.1' if address in everywhere else address}:{port}"


def partition(text: str) -> tuple[int, ...]:
    """Parse positive numbers separated by commas."""
    if not re.fullmatch(r"[1-9][0-9]{0,4}(?: *, *[1-9][0-9]{0,4})*", text):
        raise ValueError(f"{text!r} is not a list of numbers, for example 30,50")
    return tuple(int(word) for word in text.split(","))


def switch(text: str) -> bool:
    """Parse yes or no."""
    if text.lower() not in _SWITCH_WORDS:
        raise ValueError(f"{text!r} is not yes or no")
    return _SWITCH_WORDS[text.lower()]


def is_repository_name(text: str) -> bool:
    """Return whether a text has the form OWNER/NAME."""
    return bool(_MODEL_ID.fullmatch(text))


def model_id(text: str) -> str:
    """Parse OWNER/NAME or a path. The address of a model's page is an error that names its parts."""
    if page := _MODEL_PAGE.fullmatch(text):
        hub = "modelscope" if page["hub"] == "modelscope" else "huggingface"
        raise ValueError(f"{text!r} is an address; write {page['name']} and set MODEL_SOURCE={hub}")
    if "://" in text:
        raise ValueError(f"{text!r} is an address; write OWNER/NAME, and set MODELSCOPE_ENDPOINT or HF_ENDPOINT for a "
                         "mirror")
    name, colon, tag = text.partition(":")
    if colon and is_repository_name(name):
        raise ValueError(f"{text!r} has the tag {tag!r}; write {name}, and set MODEL_REVISION for a branch or tag")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*", text, re.ASCII):
        raise ValueError(f"{text!r} has no owner; write OWNER/{text} as on the page of the model, or ./{text} for "
                         "a folder")
    if not is_repository_name(text) and not text.startswith(("/", "./", "../")):
        raise ValueError(f"{text!r} is neither OWNER/NAME nor a path; write ./NAME for a relative path")
    return text


def speculative(text: str) -> str:
    """Parse a keyword of SPECULATIVE or the name of a draft model."""
    if text not in SPECULATIVE_KEYWORDS and "/" not in text:
        raise ValueError(f"{text!r} is not one of {', '.join(SPECULATIVE_KEYWORDS)}, nor a model OWNER/NAME")
    return text if text in SPECULATIVE_KEYWORDS else model_id(text)


def revision(text: str) -> str:
    """Parse the name of a branch, tag or commit."""
    if not re.fullmatch(r"\w[\w.-]*(?:/\w[\w.-]*)*", text, re.ASCII) or ".." in text:
        raise ValueError(f"{text!r} is not a branch, tag, commit or reference like refs/pr/3")
    return text


def served_names(text: str) -> tuple[str, ...]:
    """Parse the model names that clients send, separated by commas or blanks."""
    words = tuple(dict.fromkeys(re.split(r"[\s,]+", text.strip(" ,"))))
    for word in words:
        if not re.fullmatch(r"\w[\w./:-]*", word, re.ASCII):
            raise ValueError(f"invalid model name {word!r}; use letters, digits and . / : - _")
    return words


def parse_key(text: str) -> str:
    """Parse an API key as a client sends it. The error never shows the key."""
    if not _KEY.fullmatch(text):
        raise ValueError("invalid key; use 8 to 512 characters of A-Z a-z 0-9 . _ ~ + / = -")
    return text


def node_address(text: str) -> str:
    """Parse the IPv4 address of a machine in a private network."""
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv4 address; write it like 10.0.0.2") from None
    if address.is_global:
        raise ValueError(f"{text} is a public address, where anybody could reach the engine; use an address of a "
                         "private network, for example of WireGuard")
    if address.is_loopback or address.is_unspecified or address.is_multicast or address.is_reserved:
        raise ValueError(f"{text} is not an address at which other machines reach this one")
    return text


def host_address(text: str) -> str:
    """Parse an address in a private network, or a host name."""
    if re.fullmatch(r"[0-9.]+", text):
        return node_address(text)
    if not _HOST.fullmatch(text):
        raise ValueError(f"{text!r} is neither an IPv4 address nor a host name; write it without scheme and port")
    return text


def networks(text: str) -> tuple[str, ...]:
    """Parse IP addresses and networks, separated by commas or blanks."""
    parsed = []
    for word in re.split(r"[\s,]+", text.strip(" ,")):
        try:
            parsed.append(str(ipaddress.ip_network(word)))
        except ValueError:
            raise ValueError(f"invalid address or network {word!r}; write 10.0.0.1 or 10.0.0.0/8") from None
    return tuple(parsed)


def origins(text: str) -> tuple[str, ...]:
    """Parse web origins, separated by commas or blanks, or `*` alone."""
    words = tuple(re.split(r"[\s,]+", text.strip(" ,")))
    if words == ("*",):
        return words
    for word in words:
        if not _ORIGIN.fullmatch(word):
            raise ValueError(f"invalid origin {word!r}; expected scheme://host[:port], lowercase, no path; or * alone")
    return words


def arguments(text: str) -> tuple[str, ...]:
    """Split a command line as a shell does."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"cannot be split into arguments: {error}") from error


def idle_time(text: str) -> int | None:
    """Parse a time such as 30m to seconds; None for `off`."""
    if text == "off":
        return None
    match = re.fullmatch(r"([1-9][0-9]{0,5})([smh])", text)
    if not match:
        raise ValueError(f"invalid time {text!r}; write for example 30m, 2h or 90s, or off")
    return int(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def rate(text: str) -> int:
    """Parse bytes a second, at least 1 MB."""
    bytes_per_second = parse_size(text.removesuffix("/s"))
    if bytes_per_second < 1_000_000:
        raise ValueError(f"{text!r} is less than 1MB a second; write 1MB or more")
    return bytes_per_second
