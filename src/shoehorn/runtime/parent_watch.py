"""Lets child programs exit when supervisord dies.

Programs know supervisord by the process id in their environment: it may die while a program is still being loaded, and
the program's parent is another process then.
"""

from __future__ import annotations

import os

_VARIABLE = "SHOEHORN_OWNER"


def become_supervisor() -> None:
    """Make this process the supervisor of all programs that it starts from now on."""
    os.environ[_VARIABLE] = str(os.getpid())


def supervisor() -> int:
    """The supervisor's process id; the parent's where none is set."""
    return int(os.environ.get(_VARIABLE) or os.getppid())
