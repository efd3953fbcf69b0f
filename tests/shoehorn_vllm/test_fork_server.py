"""Parts of the fork server: the environment that a fork may change, and the variables of OpenMP."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoehorn_vllm.fork_server import messages, threads
from shoehorn_vllm.fork_server.preload import changed_names, record_reads


def test_reads_of_the_environment_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESENT", "1")
    with record_reads() as names:
        os.environ.get("PRESENT")
        os.getenv("ABSENT")
        assert "QUESTION" not in os.environ
    os.environ.get("LATER")
    assert names >= {"PRESENT", "ABSENT", "QUESTION"}
    assert "LATER" not in names


@pytest.mark.parametrize(("requested", "changed"), [
    ({"A": "1", "READ": "1"}, []),
    ({"A": "2", "READ": "1"}, []),
    ({"A": "1", "READ": "2"}, ["READ"]),
    ({"A": "1"}, ["READ"]),
    ({"A": "1", "READ": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}, []),
    ({"A": "1", "READ": "1", "MALLOC_ARENA_MAX": "1"}, ["MALLOC_ARENA_MAX"]),
    ({"A": "1", "READ": "1", "LD_PRELOAD": "/no/such/library.so"}, ["LD_PRELOAD"]),
    ({"A": "1", "READ": "1", "LD_PRELOAD": ""}, ["LD_PRELOAD"]),
    ({"A": "1", "READ": "1", "OMP_NUM_THREADS": "1", "GOMP_CPU_AFFINITY": "0"}, []),
    ({"A": "1", "READ": "1", "OMP_SCHEDULE": "static"}, ["OMP_SCHEDULE"]),
])
def test_change_that_comes_too_late_is_found(requested: dict[str, str], changed: list[str]) -> None:
    assert changed_names({"READ", "PYTORCH_NVML_BASED_CUDA_CHECK"}, {"A": "1", "READ": "1"}, requested) == changed


def test_preloading_a_loaded_library_changes_nothing() -> None:
    library = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so" in line)
    assert changed_names(set(), {}, {"LD_PRELOAD": library}) == []


@pytest.mark.parametrize(("value", "expected"), [
    ("0 2 11", {0, 2, 11}), ("{0,2,11}", {0, 2, 11}), ("granularity=fine,explicit,proclist=[0,2,11]", {0, 2, 11}),
    ("", set()),
])
def test_cores_are_read_in_each_form_of_vllm(value: str, expected: set[int]) -> None:
    assert threads.cores(value) == expected


def test_long_message_arrives_with_its_descriptors() -> None:
    ours, theirs = messages.connect()
    environment = {f"NAME_{number}": "x" * 1000 for number in range(150)}
    with ours, theirs, open(os.devnull, "rb") as file:
        messages.send(ours, {"environment": environment}, [file.fileno()])
        message, descriptors = messages.receive(theirs)
        assert message == {"environment": environment}
        assert os.path.samestat(os.fstat(descriptors[0]), os.fstat(file.fileno()))
        assert not os.get_inheritable(descriptors[0])
        os.close(descriptors[0])
        ours.close()
        with pytest.raises(EOFError):
            messages.receive(theirs)


def test_status_of_a_killed_server_is_unknown() -> None:
    reading, writing = os.pipe()
    os.write(writing, messages.pack_status(-9))
    assert messages.read_status(reading) == -9
    os.close(writing)
    assert messages.read_status(reading) is None
    os.close(reading)
