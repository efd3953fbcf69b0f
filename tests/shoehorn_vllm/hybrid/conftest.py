"""A team of threads for each test, and none afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from shoehorn_vllm.hybrid.kernel import library, team
from shoehorn_vllm.hybrid.kernel.library import Isa


@pytest.fixture(autouse=True)
def one_thread_for_torch() -> Iterator[None]:
    """Compute the expected results on one thread: torch's others would spin on the CPUs of the team."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=Isa, ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest) -> Isa:
    """Each instruction set that this processor has."""
    if request.param not in library.supported_isas():
        pytest.skip(f"this processor lacks {request.param.name}")
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Use that many threads, whatever the machine has."""
    team.start(reserved=0, threads=request.param)
    yield request.param
    team.stop()


@pytest.fixture
def two_threads() -> Iterator[team.Team]:
    yield team.start(reserved=0, threads=2)
    team.stop()
