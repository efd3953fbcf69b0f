"""Plans for the machines of a cluster: layers across machines, matrices within each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shoehorn.common.errors import SettingsError
from shoehorn.deployment.machines import merged
from shoehorn.hardware.types import Hardware
from support.plans import CPU_ONLY, LARGE, MIDDLE, llama_8b, machine, planned

ONE, TWO = machine(MIDDLE), machine(MIDDLE, MIDDLE)


def plan(*machines: Hardware, extra: str = "") -> tuple[object, object, list[str]]:
    """Return matrices, layers and GPUs of the plan of an 8B model."""
    named = [replace(each, gpus=tuple(replace(gpu, uuid=f"GPU-{node}{gpu.index}") for gpu in each.gpus))
             for node, each in enumerate(machines)]
    result = planned(merged(named), llama_8b(), VLLM_EXTRA_ARGS=extra)
    options = result.engine_args
    return (options.get("tensor-parallel-size", 1), options.get("pipeline-parallel-size", 1),
            [gpu.uuid for gpu in result.gpus])


def test_layers_are_divided_over_machines() -> None:
    assert plan(ONE, ONE) == (1, 2, ["GPU-00", "GPU-10"])


def test_matrices_are_divided_within_a_machine() -> None:
    assert plan(TWO, TWO) == (2, 2, ["GPU-00", "GPU-01", "GPU-10", "GPU-11"])


def test_every_machine_lends_the_same_number_of_gpus() -> None:
    assert plan(TWO, machine(LARGE)) == (1, 2, ["GPU-00", "GPU-10"])


def test_options_of_the_user_decide() -> None:
    assert plan(ONE, ONE, extra="--tensor-parallel-size 2")[:2] == (2, 1)


@pytest.mark.parametrize("extra", ["--tensor-parallel-size 1", "--pipeline-parallel-size 3",
                                   "--tensor-parallel-size 2 --pipeline-parallel-size 2"])
def test_number_of_gpus_that_the_machines_cannot_lend_is_refused(extra: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan(ONE, ONE, extra=extra)
    assert caught.value.code == "too_few_gpus"
    assert "--pipeline-parallel-size 2" in caught.value.remedy


def test_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        planned(replace(merged([ONE, CPU_ONLY]), host_memory_bytes=0), llama_8b())
    assert caught.value.code == "no_gpu"


def test_gpus_of_other_machines_are_not_made_visible() -> None:
    gpu = replace(ONE.gpus[0], uuid="GPU-0")
    result = planned(merged([replace(ONE, gpus=(gpu,)), replace(ONE, gpus=(replace(gpu, uuid="GPU-1"),))]), llama_8b())
    assert len(result.vram) == 2
    assert not any("VISIBLE" in name for name in result.engine_environment)
    alone = planned(replace(ONE, gpus=(gpu,)), llama_8b())
    assert alone.engine_environment["CUDA_VISIBLE_DEVICES"] == "GPU-0"


def test_merged_machines_have_the_least_of_memory_and_processors() -> None:
    both = merged([replace(ONE, host_memory_bytes=64, cpus=4.0), replace(TWO, host_memory_bytes=32, cpus=8.0)])
    assert (both.host_memory_bytes, both.cpus, both.nodes) == (32, 4.0, (1, 2))
    assert Hardware.from_json(both.to_json()) == both
