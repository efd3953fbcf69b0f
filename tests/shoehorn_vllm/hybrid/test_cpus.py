"""The choice of CPUs, from recordings of machines' file systems written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoehorn_vllm.hybrid.kernel import cpus
from support.cpu_tree import machine


def test_one_thread_a_core_and_some_cores_left_free(tmp_path: Path) -> None:
    root = machine(tmp_path, {cpu: f"{cpu % 8},{cpu % 8 + 8}" for cpu in range(16)})
    assert cpus.choose(range(16), 2, root) == cpus.Choice((0, 1, 2, 3, 4, 5), 8, None, (0,))


def test_a_cpuset_that_holds_a_hyperthread_only(tmp_path: Path) -> None:
    root = machine(tmp_path, {cpu: f"{cpu % 8},{cpu % 8 + 8}" for cpu in range(16)})
    assert cpus.choose([2, 8, 9, 10], 0, root).cpus == (2, 8, 9)


def test_efficient_cores_come_last(tmp_path: Path) -> None:
    siblings = {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3", **{cpu: str(cpu) for cpu in range(4, 8)}}
    root = machine(tmp_path, siblings, slow="4-7")
    assert cpus.choose(range(8), 0, root).cpus == (0, 2, 4, 5, 6, 7)
    assert cpus.choose(range(8), 2, root).cpus == (0, 2, 4, 5)


@pytest.mark.parametrize(("cpu_max", "expected"), [
    ("400000 100000", (0, 1)), ("50000 100000", (0,)), ("max 100000", (0, 1, 2, 3, 4, 5))])
def test_a_quota_limits_the_threads(tmp_path: Path, cpu_max: str, expected: tuple[int, ...]) -> None:
    root = machine(tmp_path, {cpu: str(cpu) for cpu in range(8)}, files={
        "proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": cpu_max, "sys/fs/cgroup/a/b/cpu.max": "max 100000"})
    assert cpus.choose(range(8), 2, root).cpus == expected


def test_a_quota_of_the_first_version_of_cgroups(tmp_path: Path) -> None:
    root = machine(tmp_path, {}, files={
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"})
    assert cpus.quota_cpus(root) == 3


def test_nodes(tmp_path: Path) -> None:
    root = machine(tmp_path, {cpu: str(cpu) for cpu in range(8)}, nodes={0: "0-3", 1: "4-7"})
    assert cpus.choose(range(8), 2, root).nodes == (0, 1)
    assert cpus.choose(range(8), 1, root, nodes=[1]) == cpus.Choice((4, 5, 6), 4, None, (1,))
    assert cpus.choose(range(4), 0, root, nodes=[1]).cpus == (0, 1, 2, 3), "no CPU of that node is allowed"


def test_one_thread_is_always_there_and_nothing_need_be_known(tmp_path: Path) -> None:
    assert cpus.choose([3, 5], 2, tmp_path) == cpus.Choice((3,), 2, None, (0,))


def test_lists() -> None:
    assert cpus.parse_list("0-3,8,10-11\n") == (0, 1, 2, 3, 8, 10, 11)
    assert cpus.parse_list("\n") == ()
