"""Generator of docs/reliability.md: failures and promises, from the `fault(FAILURE, PROMISE)` marks of the tests.

The groups of the table are folders and files of the tests.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

from shoehorn.common.paths import HOME

GROUPS = (
    ("Pulling and storing a model", ("tests/store/", "tests/commands/", "tests/appliance/test_offline")),
    ("Converting a model", ("tests/int4/", "tests/appliance/test_served_int4")),
    ("State, keys and other files", ("tests/common/", "tests/runtime/test_state", "tests/config/", "tests/gateway/")),
    ("Starts, stops and kills, in every phase", (
        "tests/appliance/test_phases", "tests/appliance/test_engine_deaths",
        "tests/appliance/test_installation", "tests/appliance/test_lifecycle")),
    ("In the container", ("tests/container/test_",)),
    ("Starting and serving", ("tests/",)),
)

_INTRODUCTION = """# Reliability

Failures, the guaranteed behaviour, and the test that covers each. The table is generated from marks in the tests, so it
contains no promise without a test. nginx, supervisord and the client libraries of the hubs are real in these tests. The
engine is the real vLLM on the CPU, or a stand-in where many starts are needed. Stand-ins take the place of the hubs and
of GPUs.

Exit codes: 2 settings, 3 does not fit, 4 no model, 5 engine. The last lines of the container's output contain cause and
remedy. After a failure the engine is restarted with growing pauses, at most five times an hour.

The tests of pulls, kills and full disks also check that no key or token is in any output, that nothing unverified would
be served, and that no process remains.
"""


class Fault(NamedTuple):
    """A failure, the promised behaviour, and the test that covers it."""

    failure: str
    promise: str
    file: str
    test: str


def faults() -> Iterator[Fault]:
    """Yield every marked test, in the order of files and lines."""
    for path in sorted((HOME / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    failure, promise = (str(ast.literal_eval(argument)) for argument in mark.args)
                    yield Fault(failure, promise, str(path.relative_to(HOME)), getattr(node, "name", ""))


def document() -> str:
    """Return the text of docs/reliability.md.

    Raises:
        ValueError: a marked test belongs to no group.
    """
    text, ungrouped = _INTRODUCTION, list(faults())
    for title, places in GROUPS:
        chosen = [fault for place in places for fault in ungrouped if fault.file.startswith(place)]
        chosen = list(dict.fromkeys(chosen))
        ungrouped = [fault for fault in ungrouped if fault not in chosen]
        text += f"\n## {title}\n\n| Failure | Behaviour | Test |\n|---|---|---|\n"
        text += "".join(f"| {fault.failure} | {fault.promise} | `{fault.file}`: `{fault.test}` |\n" for fault in chosen)
    if ungrouped:
        raise ValueError(f"in no group: {ungrouped}")
    return text
