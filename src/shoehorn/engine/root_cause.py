"""The exception that ended the engine, found in its log.

Rules:
- each process of the engine logs its own traceback, interleaved with others; a process that only reports the end of
  another one is not the cause;
- of chained exceptions the last one counts, which its author wrote for a reader;
- a start fails at its first exception; a running engine may have logged many before its last one;
- the message has no syntax of tracebacks, of pydantic or of argparse, and is cut after 300 characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

_PROCESS = re.compile(r"\(([\w-]+ pid=\d+)\) ?")
_RECORD = re.compile(r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?")
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_EXCEPTION = re.compile(r"(?P<type>[A-Za-z_][\w.]*)(?:: ?(?P<message>.*))?")
_USAGE = re.compile(r"\S+: error: (.*)")
_SECONDARY = re.compile(
    r"initialization failed|EngineDeadError|EngineCore encountered an issue|Worker failed with error|"
    r"died unexpectedly|^(BrokenPipeError|ConnectionResetError|EOFError|asyncio\S*CancelledError)")
_PYDANTIC = re.compile(r"\d+ validation errors? for \w+")
_PYDANTIC_DETAIL = re.compile(r" \[type=.*?\]$|^Value error, |^Assertion failed, ")
_MAX_LINES, _MAX_CHARACTERS = 8, 300


@dataclass(frozen=True)
class RootCause:
    """An exception.

    Attributes:
        type: its class without modules; `argument` for a refusal of vLLM's command line.
        message: for a reader, in one line.
        text: everything that was logged of it.
        chain: classes of the exceptions before it in its chain.
    """

    type: str
    message: str
    text: str
    chain: tuple[str, ...] = ()


def find_root_cause(lines: Iterable[str], *, is_start: bool) -> RootCause | None:
    """Return the exception that ended the engine, or None.

    Args:
        lines: the engine's last lines, oldest first.
        is_start: the engine had not become ready.
    """
    numbered = sorted((each for own in _by_process(lines) for each in _exceptions(own)), key=lambda each: each[0])
    causes = [cause for _, cause in numbered if not _SECONDARY.search(f"{cause.type}: {cause.text}")]
    if not causes:
        return None
    return causes[0] if is_start else causes[-1]


_Line = tuple[int, str, bool]
"""Number, text without prefix, and whether a prefix of the logger preceded it."""


def _by_process(lines: Iterable[str]) -> Iterable[Sequence[_Line]]:
    """Return the lines of each process, without prefixes."""
    processes: dict[str, list[_Line]] = {}
    for number, line in enumerate(lines):
        process = _PROCESS.match(line)
        rest = line[process.end():] if process else line
        record = _RECORD.match(rest)
        processes.setdefault(process[1] if process else "", []).append(
            (number, rest[record.end():] if record else rest, record is not None))
    return processes.values()


def _exceptions(lines: Sequence[_Line]) -> Iterator[tuple[int, RootCause]]:
    """Return the last exception of each chain of a process, and each error of argparse, with the number of its line."""
    statement, is_traceback = "", False
    pending: tuple[int, RootCause] | None = None
    for index, (number, text, _) in enumerate(lines):
        if text.startswith(_TRACEBACK):
            is_traceback = True
        elif usage := _USAGE.fullmatch(text):
            yield number, _cause("argument", usage[1], _continuation(lines, index))
        elif is_traceback and text.startswith(" "):
            statement = statement if set(text.strip()) <= set("^~") else text.strip()
        elif is_traceback and (match := _EXCEPTION.fullmatch(text)):
            cause = _cause(match["type"], match["message"] or statement, _continuation(lines, index))
            if pending and _is_chained(lines, pending[0], number):
                cause = replace(cause, chain=(*pending[1].chain, pending[1].type))
            elif pending:
                yield pending
            pending = number, cause
            is_traceback = False
    if pending:
        yield pending


def _is_chained(lines: Sequence[_Line], start: int, end: int) -> bool:
    """Return whether two exceptions, by the numbers of their lines, belong to one chain."""
    return any(start < number < end and text.startswith(_CHAINED) for number, text, _ in lines)


def _continuation(lines: Sequence[_Line], index: int) -> list[str]:
    """Return the further lines of an exception's message."""
    following = []
    has_prefix = lines[index][2]
    for _, text, is_record in lines[index + 1:index + 1 + _MAX_LINES]:
        if not text.strip() or text.startswith((_TRACEBACK, *_CHAINED)) or is_record != has_prefix:
            break
        following.append(text.strip())
    return following


def _cause(name: str, message: str, continuation: Sequence[str]) -> RootCause:
    lines = [message, *(line for line in continuation if not line.startswith("For further information"))]
    if _PYDANTIC.search(lines[0]) and len(lines) > 1:
        subject = _PYDANTIC.sub("", lines[0]).strip(" :")
        details = [_PYDANTIC_DETAIL.sub("", _PYDANTIC_DETAIL.sub("", line)) for line in lines[1:]]
        lines = [subject, *details] if subject else details
    text = ": ".join(line.strip().rstrip(":") for line in lines[:1 if name == "KeyError" else 3])
    if name == "KeyError" and text[:1] in "'\"":
        text = text[1:].rstrip(text[0])
    if len(text) > _MAX_CHARACTERS:
        text = text[:_MAX_CHARACTERS].rsplit(" ", 1)[0] + " ..."
    return RootCause(name.rpartition(".")[2], text, "\n".join((message, *continuation)))
