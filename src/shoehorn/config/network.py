"""Environment variables of the network: proxies and certificates, as httpx and requests read them.

Rules: an invalid proxy is named, never shown, since its URL may contain a password; forms that one of the libraries
does not know are rewritten for both.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import httpx

PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy")
CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_SCHEMES = ("http", "https", "socks5", "socks5h")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")


def invalid_proxies(environment: Mapping[str, str]) -> list[str]:
    """List the invalid proxy variables, as `NAME: problem`, without their values."""
    return [f"{name}: {problem}" for name in PROXIES
            if (value := environment.get(name, "").strip()) and (problem := _problem(value))]


def proxies_in_use(environment: Mapping[str, str]) -> str:
    """Name the proxy variables that are set; "" without."""
    return ", ".join(name for name in PROXIES if environment.get(name, "").strip())


def prepare(environment: MutableMapping[str, str]) -> list[str]:
    """Rewrite the variables in place for both libraries; return remarks about values that are ignored."""
    remarks: list[str] = []
    for name in PROXIES:
        value = environment.get(name, "").strip()
        if value.lower().startswith("socks://"):  # GNOME's form of SOCKS 5
            value = "socks5h" + value[len("socks"):]
        if name in environment:
            environment[name] = value
    for name in ("NO_PROXY", "no_proxy"):
        if environment.get(name, "").strip():
            words = [re.sub(r"^\[([^/]*)\]$", r"\1", word) for word in environment[name].replace(",", " ").split()]
            ignored = [word for word in words if not _is_host(word)]
            environment[name] = ",".join(word for word in words if word not in ignored)
            remarks += [f"{name}: {word!r} ignored; it is neither a host, a domain nor an IPv4 network"
                        for word in ignored]
    for name in CERTIFICATES:
        if environment.get(name) and not Path(environment[name]).exists():
            remarks.append(f"{name}={environment[name]}: not found here; ignored. Name a file inside the container")
            del environment[name]
    bundle = next((environment[name] for name in CERTIFICATES if environment.get(name)), "")
    if bundle:
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):  # of httpx, and of requests
            if not environment.get(name) and not (name == "SSL_CERT_FILE" and Path(bundle).is_dir()):
                environment[name] = bundle
    return remarks


def _problem(value: str) -> str:
    """Return the problem of a proxy URL without repeating it; "" for a valid one."""
    match = _SCHEME.match(value)
    scheme = match[1].lower() if match else "http"
    if scheme == "socks":
        scheme = "socks5h"
    if scheme not in _SCHEMES:
        return f"a proxy of the kind {scheme} is unsupported; use {', '.join(_SCHEMES)}"
    rest = value[match.end():] if match else value
    try:
        url = httpx.URL(f"{scheme}://{rest}")
        is_bare = url.path in ("", "/") and not url.query and not url.fragment
        is_valid = bool(url.host) and 0 < (url.port or 1) <= 65535 and is_bare
    except (httpx.InvalidURL, ValueError, TypeError):
        is_valid = False
    if is_valid:
        return ""
    return ("invalid proxy URL; write SCHEME://USER:PASSWORD@HOST:PORT and percent-encode special characters of user "
            "and password (# is %23, / is %2F, @ is %40)")


def _is_host(word: str) -> bool:
    """Return whether httpx can read a word of NO_PROXY."""
    try:
        httpx.URL(_pattern(word))
    except httpx.InvalidURL:
        return False
    return True


def _pattern(word: str) -> str:
    """Return the pattern that httpx makes of a word (httpx/_utils.py, get_environment_proxies)."""
    if "://" in word:
        return word
    try:
        version = ipaddress.ip_address(word.split("/")[0]).version
    except ValueError:
        return f"all://*{word}"
    return f"all://{word}" if version == 4 else f"all://[{word}]"
