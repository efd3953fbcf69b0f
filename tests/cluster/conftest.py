"""The network of the machines."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from support.machines import Network


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Make a network of two machines."""
    if os.geteuid() != 0:
        if os.environ.get("CI"):
            pytest.fail("tests of clusters need root: they make network namespaces")
        pytest.skip("NOT TESTED: clusters need root, which makes network namespaces. Type: sudo make test-cluster")
    machines = Network()
    try:
        for number in (1, 2):
            machines.add(number)
        yield machines
    finally:
        machines.remove()
