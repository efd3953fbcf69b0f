"""The proof of offloaded weights."""

from __future__ import annotations

import pytest
from torch import nn

from shoehorn_vllm.hybrid import offload_proof
from shoehorn_vllm.hybrid.offload_proof import OffloadUndoneError

GIB = 1 << 30


def test_weights_that_were_moved_to_the_gpu_fail_the_start() -> None:
    offload_proof.check(14 * GIB, 14 * GIB)
    offload_proof.check(14 * GIB, 8 * GIB)
    offload_proof.check(0, 0)
    with pytest.raises(OffloadUndoneError, match=r"13.92 GiB planned in host memory, of which only 0.50 GiB are there"):
        offload_proof.check(round(13.92 * GIB), GIB // 2)


@pytest.mark.parametrize("option", ["experts", "hybrid"])
def test_option_without_an_effect_fails_the_start(option: str) -> None:
    offload_proof.check_options({option: {"slots": 1}}, 5)
    offload_proof.check_options({"embedding": "host"}, 0)
    with pytest.raises(OffloadUndoneError, match=f"option `{option}` of --additional-config had no effect"):
        offload_proof.check_options({option: {"slots": 1}}, 0)


def test_parameters_count_where_their_memory_is() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False))
    model.append(model[0])  # shared weights count once
    assert offload_proof.host_bytes(model.modules()) == (32 + 8) * 4
    there = model[1].weight.data_ptr()
    assert offload_proof.host_bytes(model.modules(), lambda data: data.data_ptr() == there) == 8 * 4
