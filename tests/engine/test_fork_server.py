"""Fork server of the engine, with a package in place of vLLM that has its structure: an API server starts a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from shoehorn.engine import forked_process
from shoehorn.engine.fork_server import SPARE_FREE_BYTES, ForkServer
from shoehorn.engine.launch_spec import LaunchSpec
from shoehorn.runtime.child_process import Child, members
from shoehorn.runtime.run_dir import RunDir
from shoehorn_vllm.fork_server import messages
from support.waiting import wait_until

_ENTRY = """
import multiprocessing, os, sys, time
print("importing", os.environ.get("READ_AT_IMPORT"), flush=True)
exec(os.environ.get("AT_IMPORT", ""))

def core(queue, lock, receiver):
    with lock:
        print("core", os.getppid(), os.environ["PLANNED"], receiver.recv(), flush=True)
    queue.put(os.getpid())
    exec(os.environ.get("IN_CORE", "time.sleep(600)"))

def main():
    print("serving", sys.argv[1:], os.environ["PLANNED"], flush=True)
    context = multiprocessing.get_context("spawn")
    queue, lock, (receiver, sender) = context.Queue(), context.Lock(), context.Pipe(duplex=False)
    exec(os.environ.get("BEFORE_CORE", ""))
    process = context.Process(target=core, args=(queue, lock, receiver))
    process.start()
    sender.send("a message")
    print("started", queue.get(), flush=True)
    process.join()
    print("exited", process.exitcode, flush=True)
    sys.exit(7)

if __name__ == "__main__":
    main()
"""


class Engine:
    """A fork server and the engines that it starts."""

    def __init__(self, home: Path) -> None:
        package = home / "packages" / "vllm" / "entrypoints" / "launchers" / "api_server"
        package.mkdir(parents=True)
        for folder in (package, *package.parents[:3]):
            (folder / "__init__.py").touch()  # otherwise the installed vLLM takes precedence
        (package / "entry.py").write_text(_ENTRY)
        self.run_dir = RunDir(home)
        assert package.parents[2].name == "vllm"
        self.available, self.lines = 4 * SPARE_FREE_BYTES, list[str]()
        self.spec = LaunchSpec(self.run_dir, {**os.environ, "PYTHONPATH": str(home / "packages")},
                               "model", {})
        self.server = ForkServer(self.run_dir, self.lines.append, lambda: self.available)
        self.children = list[Child]()

    def launch(self, **environment: str) -> Child:
        """Start an engine with further variables."""
        spec = replace(self.spec, environment={**self.spec.environment, "PLANNED": "yes", **environment})
        self.children.append(self.server.launch(spec, self.lines.append))
        return self.children[-1]

    def wait_for(self, word: str) -> list[str]:
        """Wait for a line with that first word; return its words."""
        wait_until(lambda: any(line.startswith(word) for line in self.lines), 30, lambda: f"{word} in {self.lines}")
        return next(line for line in self.lines if line.startswith(word)).split()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.server.stop()
    for child in engine.children:
        child.stop(0.0)


def _server(engine: Engine) -> psutil.Process:
    return next(each for each in psutil.Process().children() if "fork server" in " ".join(each.cmdline()))


def test_processes_are_forked_from_one_import(engine: Engine) -> None:
    engine.server.begin(engine.spec.environment)
    child = engine.launch(IN_CORE="sys.exit(3)")
    assert child.wait(30) == 7
    assert engine.wait_for("exited") == ["exited", "3"]
    assert engine.lines.count("importing None") == 1
    assert f"serving ['--config', '{engine.run_dir.engine_config}'] yes" in engine.lines
    assert any(line.startswith("core") and line.endswith("yes a message") for line in engine.lines)
    assert engine.wait_for("core")[1] == str(_server(engine).pid)
    assert engine.launch(IN_CORE="sys.exit(0)").wait(30) == 7
    assert engine.lines.count("importing None") == 1


def test_variable_that_was_read_during_the_import_needs_another_import(engine: Engine) -> None:
    engine.server.begin(engine.spec.environment)
    assert engine.launch(READ_AT_IMPORT="plan", IN_CORE="sys.exit(0)").wait(30) == 7
    assert [line for line in engine.lines if line.startswith("importing")] == ["importing None", "importing plan"]


def test_process_with_another_environment_than_the_import_is_a_fresh_program(engine: Engine) -> None:
    child = engine.launch(BEFORE_CORE="os.environ['MALLOC_ARENA_MAX'] = '1'", IN_CORE="sys.exit(0)")
    assert child.wait(30) == 7
    assert engine.wait_for("core")[1] == str(child.pid)
    assert len([line for line in engine.lines if line.startswith("importing")]) == 2


def test_death_of_the_api_server_ends_its_group(engine: Engine) -> None:
    child = engine.launch()
    core = int(engine.wait_for("started")[1])
    assert set(members(child.pid)) >= {child.pid, core}
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(30) == -signal.SIGKILL
    assert members(child.pid) == []
    assert engine.server.is_running
    assert not engine.run_dir.engine_group.exists()


def test_sigterm_reaches_a_forked_engine(engine: Engine) -> None:
    child = engine.launch()
    engine.wait_for("started")
    assert child.stop(20) == -signal.SIGTERM
    assert members(child.pid) == []


def test_sigterm_to_an_engine_whose_exit_is_not_reported_yet_is_ignored() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as exited:
        exited.wait()
    status, writing = os.pipe()
    data, lifeline = os.pipe()
    with open(os.devnull, encoding="utf-8") as output:
        process = forked_process.ForkedProcess(exited.pid, status, lifeline, output, lambda: None)
        process.terminate()
        assert process.poll() is None
        os.write(writing, messages.pack_status(-11))
        assert process.wait(5) == -11
    for descriptor in (writing, data):
        os.close(descriptor)


def test_engine_outlives_its_server_and_a_spare_replaces_it(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoehorn.engine.fork_server._CHECK_SECONDS", 0.0)
    child = engine.launch()
    engine.wait_for("started")
    _server(engine).kill()
    wait_until(lambda: not engine.server.is_running, 10, "its exit")
    assert child.poll() is None
    engine.server.keep_spare()
    assert engine.server.is_running
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(30) == forked_process.UNKNOWN_STATUS
    assert members(child.pid) == []
    assert engine.launch(IN_CORE="sys.exit(0)").wait(30) == 7


def test_exit_is_noticed_although_the_server_hangs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoehorn.engine.forked_process._REPORT_SECONDS", 0.2)
    child = engine.launch()
    engine.wait_for("started")
    _server(engine).send_signal(signal.SIGSTOP)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(30) == forked_process.UNKNOWN_STATUS
    assert not engine.server.is_running
    assert members(child.pid) == []


def test_no_spare_is_kept_if_memory_is_short(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoehorn.engine.fork_server._CHECK_SECONDS", 0.0)
    child = engine.launch()
    engine.wait_for("started")
    engine.available = SPARE_FREE_BYTES - 1
    engine.server.keep_spare()
    assert not engine.server.is_running
    engine.available = SPARE_FREE_BYTES + 1  # not yet: it would be stopped again at once
    engine.server.keep_spare()
    assert not engine.server.is_running
    assert child.poll() is None
    assert child.stop(20) == forked_process.UNKNOWN_STATUS


@pytest.mark.parametrize(("at_import", "reason"), [
    ("import threading; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()", "2 threads"),
    ("os.kill(os.getpid(), 9)", "it exited"),
])
def test_engine_is_a_fresh_program_if_the_import_cannot_be_forked(
        engine: Engine, caplog: pytest.LogCaptureFixture, at_import: str, reason: str) -> None:
    once = f"if 'fork_server' in sys.orig_argv[2]:\n {at_import}"
    engine.server.begin({**engine.spec.environment, "AT_IMPORT": once})
    child = engine.launch(AT_IMPORT=once, IN_CORE="sys.exit(0)")
    assert child.wait(30) == 7
    assert engine.wait_for("core")[1] == str(child.pid)
    assert reason in caplog.text
    assert not engine.server.is_running


def test_failed_import_ends_the_engine_as_a_failed_start(engine: Engine) -> None:
    assert engine.launch(AT_IMPORT="raise RuntimeError('no driver')").wait(30) == 1
    assert "RuntimeError: no driver" in engine.lines


def test_engine_ends_with_its_program(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    code = ("import sys, os, time; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
            "from engine.test_fork_server import Engine, ForkServer, LaunchSpec, RunDir\n"
            "home = Path(sys.argv[1]); environment = {**os.environ, 'PYTHONPATH': str(home / 'packages')}\n"
            "server = ForkServer(RunDir(home), print)\n"
            "server.launch(LaunchSpec(RunDir(home), {**environment, 'PLANNED': 'yes'}, 'model', {}), "
            "lambda line: print(line, flush=True))\n"
            "time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parents[1])],
                          stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        for line in owner.stdout:
            if line.startswith("started"):
                break
        processes = psutil.Process(owner.pid).children(recursive=True)
        owner.kill()
    assert len(processes) >= 3
    assert psutil.wait_procs(processes, timeout=30)[1] == []
    assert engine.run_dir.engine_group.exists(), "for the next engine program"


def test_sigterm_interrupts_the_wait_for_the_import(engine: Engine) -> None:
    class StopError(Exception):
        pass

    def stop(*_: object) -> None:
        raise StopError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    begun = time.monotonic()
    try:
        with pytest.raises(StopError):
            engine.launch(AT_IMPORT="time.sleep(600)")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < 60
