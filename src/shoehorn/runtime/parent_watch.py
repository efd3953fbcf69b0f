"""supervisord, with which the programs that it starts end: when it was killed, nobody else would end them.

It is known by the number that it puts into their environment: a parent that died while a program was still being loaded
is not its parent any more when the program looks.
"""

from __future__ import annotations

import os

_VARIABLE = "SHOEHORN_OWNER"


def own() -> None:
    """Be the owner of all programs that this process starts from now on."""
    os.environ[_VARIABLE] = str(os.getpid())


def owner() -> int:
    """The owner's process id; the parent's where no owner is named."""
    return int(os.environ.get(_VARIABLE) or os.getppid())
