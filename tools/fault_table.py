"""docs/reliability.md: what may go wrong and what is promised then, from the marks of the tests that show it.

A test says so with `@pytest.mark.fault(WHAT, PROMISE)`; the table's groups are the tests' folders and files.
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
    ("Starts, stops and kills, in every phase", ("tests/appliance/test_phases", "tests/appliance/test_dying",
                                                 "tests/appliance/test_lifecycle")),
    ("In the container", ("tests/container/test_",)),
    ("Starting and serving", ("tests/",)),
)

_INTRODUCTION = """# Reliability

What may go wrong, what is promised then, and the test that shows it. The table is made from the tests' own marks, so a
promise without a test cannot stand here. The engine in these tests is the real vLLM on the CPU, with nginx, supervisord
and the hubs' own client libraries; a stand-in takes the place of the hub, and of the GPU where one is needed.

Exit codes: 2 settings, 3 does not fit, 4 no model, 5 the engine; the container's last lines say the cause and what to
type. After a failure the engine is started again with growing pauses, at most five times an hour.

Beside what the table says, the tests of pulls, kills and full disks check after each of them that no key or token
stands in any output, that nothing unverified would be served, and that no process is left.
"""


class Fault(NamedTuple):
    """One promise: what goes wrong, what is promised, and the test's place."""

    what: str
    promise: str
    file: str
    test: str


def faults() -> Iterator[Fault]:
    """Every marked test, in the order of files and lines."""
    for path in sorted((HOME / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    what, promise = (str(ast.literal_eval(argument)) for argument in mark.args)
                    yield Fault(what, promise, str(path.relative_to(HOME)), getattr(node, "name", ""))


def document() -> str:
    """The text of docs/reliability.md.

    Raises:
        ValueError: a marked test belongs to no group.
    """
    text, left = _INTRODUCTION, list(faults())
    for title, places in GROUPS:
        chosen = [fault for place in places for fault in left if fault.file.startswith(place)]
        chosen = list(dict.fromkeys(chosen))
        left = [fault for fault in left if fault not in chosen]
        text += f"\n## {title}\n\n| what goes wrong | what is promised | shown by |\n|---|---|---|\n"
        text += "".join(f"| {fault.what} | {fault.promise} | `{fault.file}`: `{fault.test}` |\n" for fault in chosen)
    if left:
        raise ValueError(f"in no group: {left}")
    return text
