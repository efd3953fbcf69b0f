"""Threads: a hang is reported, a fork is survived, a sleeper is woken, the process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from shoehorn_vllm.hybrid.kernel import cpus, library, products, team
from support.cpu_tree import machine
from support.kernel_reference import activations, matrix

SCRIPT = """
import os, pathlib, sys, threading
sys.path.insert(0, sys.argv[1])
from support.kernel_reference import activations, matrix
import torch
from shoehorn_vllm.hybrid.kernel import library, products, team

source, x = matrix((4096, 512), 128, 1), activations(4, 512, 1)
weights = products.PackedWeights(source.codes, source.scales)
team.start(reserved=0, threads=3)
before = products.linear(weights, x)

def right():
    return torch.equal(products.linear(weights, x), before)

def fork(check):
    child = os.fork()
    if child == 0:
        os._exit(0 if check() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for task in pathlib.Path("/proc/self/task").iterdir():
    blocked = next(line for line in task.joinpath("status").read_text().splitlines() if line.startswith("SigBlk"))
    print("SIGTERM BLOCKED" if int(blocked.split()[1], 16) >> 14 & 1 else "")

print("CHILD", fork(lambda: all(right() for _ in range(50)) and len(os.listdir("/proc/self/task")) >= 3), right())

stop = threading.Event()
def work():
    while not stop.is_set():
        products.linear(weights, x)
worker = threading.Thread(target=work)
worker.start()
codes = {fork(right) for _ in range(10)}
stop.set()
worker.join()
print("FORKS", codes, flush=True)

library.load().pool_inject(2, 60_000)
for _ in range(2):  # the second time at once: the thread may still write
    try:
        for _ in range(10_000):
            products.linear(weights, x, timeout_s=1.0)
    except library.ThreadHungError as error:
        print("REPORTED", error, flush=True)
print("END", flush=True)
"""


@pytest.fixture(scope="module")
def output() -> str:
    """Output of a separate process, which ends with a thread that hangs."""
    tests = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", SCRIPT, tests], text=True, capture_output=True, timeout=100,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("END\n")
    return done.stdout


def test_a_thread_that_hangs_is_named_and_does_not_keep_the_process(output: str) -> None:
    assert output.count("REPORTED CPU kernel: thread 2 timed out") == 2


def test_a_child_that_was_forked_computes_with_threads_of_its_own(output: str) -> None:
    assert "CHILD 0 True" in output


def test_forks_while_another_thread_computes(output: str) -> None:
    assert "FORKS {0}" in output


def test_threads_of_the_team_receive_no_signal(output: str) -> None:
    assert output.count("SIGTERM BLOCKED") == 2


def test_threads_that_sleep_are_woken(two_threads: team.Team) -> None:
    source, x = matrix((4096, 1024), 128, 1), activations(4, 1024, 1)
    weights = products.PackedWeights(source.codes, source.scales)
    for _ in range(5):
        time.sleep(0.02)  # a hundred times as long as they spin
        products.linear(weights, x)
    for _ in range(200):
        products.linear(weights, x)
    assert all(two_threads.items())


def test_callers_at_the_same_time_take_turns(two_threads: team.Team) -> None:
    source, x = matrix((512, 1024), 128, 1), activations(4, 1024, 1)
    weights = products.PackedWeights(source.codes, source.scales)
    expected, same = products.linear(weights, x), []

    def work() -> None:
        same.extend(torch.equal(products.linear(weights, x), expected) for _ in range(50))

    callers = [threading.Thread(target=work) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(same) == 200
    assert all(same)


def test_more_threads_than_cpus_and_restarts() -> None:
    source, x = matrix((512, 256), 128, 1), activations(2, 256, 1)
    weights = products.PackedWeights(source.codes, source.scales)
    results = []
    for count in (5, 1, 3):
        assert len(team.start(reserved=0, threads=count).cpus) == count
        results.append(products.linear(weights, x))
    team.stop()
    assert team.current() is None
    results.append(products.linear(weights, x))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_invalid_numbers_are_refused() -> None:
    with pytest.raises(library.KernelError, match="invalid arguments"):
        team.start(reserved=0, threads=1000)
    assert library.load().pool_inject(1, 10) < 0


def test_team_follows_the_cpus_of_a_cgroup_that_shrinks_and_grows(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("SHOEHORN_CPU_THREADS", raising=False)
    root = machine(tmp_path, {cpu: str(cpu) for cpu in range(4)}, files={"proc/self/cgroup": "0::/a"})
    quota = root / "sys/fs/cgroup/a/cpu.max"
    quota.parent.mkdir(parents=True)
    quota.write_text("max 100000")
    source, x = matrix((512, 256), 32, 1), activations(3, 256, 1)
    weights = products.PackedWeights(source.codes, source.scales)
    right = products.linear(weights, x)
    team.start(0, choice=cpus.choose(range(4), 0, root))
    assert not team.adapt(range(4), 0, root), "nothing changed"
    for allowed, limit, threads in ((range(4), "200000 100000", 2), (range(4), "max 100000", 4),
                                    (range(3), "max 100000", 3), ([3], "max 100000", 1)):
        quota.write_text(limit)
        assert team.adapt(allowed, 0, root)
        assert library.load().pool_threads() == threads
        assert torch.equal(products.linear(weights, x), right)
    assert "before=4 now=2 quota=2.0" in caplog.text
    monkeypatch.setenv("SHOEHORN_CPU_THREADS", "2")
    assert not team.adapt(range(4), 0, root), "the number is given"
    team.stop()
    assert not team.adapt(range(4), 0, root), "no team"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_core_that_is_taken_away_is_noticed_while_products_run() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 1 True\n"


WATCHED = """
import os, threading, time
import torch
from shoehorn_vllm.hybrid.kernel import cpus, library, products, team

team.CHECK_S = 0.05
two = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, two)
weights = products.PackedWeights(torch.full((256, 32), 0x3A5C7E19, dtype=torch.int32), torch.ones(256, 8).bfloat16())
x = torch.ones(1, 256).bfloat16()
started = team.start(reserved=0)
before, threads = products.linear(weights, x), library.load().pool_threads()
team.watch(0, two)
time.sleep(0.2)
for task in os.listdir("/proc/self/task"):  # as a cpuset does it to all threads
    os.sched_setaffinity(int(task), two[:1])
limit, same = time.monotonic() + 30, True
while library.load().pool_threads() > 1 and time.monotonic() < limit:
    same &= torch.equal(products.linear(weights, x), before)
print(threads, library.load().pool_threads(), same, flush=True)
os._exit(0)
"""
