"""The event listener: supervisord's protocol, and what it stops and kills."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoehorn.runtime import event_listener, supervisord
from shoehorn.runtime.child_process import kill_group, members


def _event(name: str, body: str) -> str:
    return f"ver:3.0 server:supervisor serial:21 pool:watcher poolserial:10 eventname:{name} len:{len(body)}\n{body}"


def _run(events: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[tuple[int, int]]]:
    killed: list[tuple[int, int]] = []
    sink = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(event_listener.os, "kill", lambda pid, number: killed.append((pid, number)))
        event_listener.run(io.StringIO(events), sink, run_dir, 4242)
    return sink.getvalue(), killed


def test_every_event_is_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "processname:exporter groupname:exporter from_state:RUNNING expected:0 pid:0"
    output, killed = _run(_event("PROCESS_STATE_EXITED", body) * 2, tmp_path, monkeypatch)
    assert output == "READY\nRESULT 2\nOKREADY\nRESULT 2\nOKREADY\n"
    assert killed == []


def test_final_exit_of_the_engine_stops_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exit_code").write_text("3\n")
    body = "processname:engine groupname:engine from_state:RUNNING expected:1 pid:77"
    _, killed = _run(_event("PROCESS_STATE_EXITED", body), tmp_path, monkeypatch)
    assert killed == [(4242, signal.SIGTERM)]
    assert (tmp_path / "exit_code").read_text() == "3\n"


def test_fatal_program_stops_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "processname:gateway groupname:gateway from_state:BACKOFF"
    _, killed = _run(_event("PROCESS_STATE_FATAL", body), tmp_path, monkeypatch)
    assert killed == [(4242, signal.SIGTERM)]
    assert (tmp_path / "exit_code").read_text() == "1\n"


def test_killed_engine_program_is_restarted_by_supervisord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "processname:engine groupname:engine from_state:RUNNING expected:0 pid:0"
    _, killed = _run(_event("PROCESS_STATE_EXITED", body), tmp_path, monkeypatch)
    assert killed == []
    assert not (tmp_path / "exit_code").exists()


@pytest.mark.parametrize("group", [-1, 0, 1])
def test_other_groups_are_not_killed(group: int) -> None:
    kill_group(group)  # a kill here would end this very test


def test_group_of_a_dead_program_is_killed(tmp_path: Path) -> None:
    """A group whose leader has exited, as nginx's workers after a kill of their master."""
    leader = subprocess.Popen([sys.executable, "-c", "import subprocess, sys, time; subprocess.Popen([sys.executable, "
                               "'-c', 'import time; time.sleep(600)']); print('up', flush=True); time.sleep(600)"],
                              start_new_session=True, stdout=subprocess.PIPE)
    assert leader.stdout is not None
    leader.stdout.readline()
    os.kill(leader.pid, signal.SIGKILL)
    leader.wait()
    leader.stdout.close()
    assert len(members(leader.pid)) == 1
    body = {"processname": "gateway", "expected": "0", "pid": str(leader.pid)}
    assert not event_listener.handle({"eventname": "PROCESS_STATE_EXITED"}, body, tmp_path)
    assert members(leader.pid) == []


@contextmanager
def in_place_of_nginx(run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a group of its own and is written down as nginx."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    (run_dir / "nginx.pid").write_text(f"{process.pid}\n")
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_nginx_is_killed_with_supervisord(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_place_of_nginx(tmp_path) as nginx:
        _run("", tmp_path, monkeypatch)
        assert nginx.wait(60) == -signal.SIGKILL
    (tmp_path / "nginx.pid").write_text("")
    _run("", tmp_path, monkeypatch)


class Closing(io.StringIO):
    """A pipe whose reader goes away after so many writes."""

    def __init__(self, writes: int) -> None:
        super().__init__()
        self._left = writes

    def write(self, text: str) -> int:
        if not self._left:
            raise BrokenPipeError
        self._left -= 1
        return super().write(text)


@pytest.mark.parametrize("answers", [0, 1])
def test_nginx_is_killed_if_supervisord_died_before_the_answer(tmp_path: Path, answers: int) -> None:
    """Killed while its listener is still being loaded, or is busy with an event."""
    with in_place_of_nginx(tmp_path) as nginx:
        events = io.StringIO(_event("PROCESS_STATE_EXITED", "processname:exporter expected:0"))
        event_listener.run(events, Closing(answers), tmp_path, 4242)
        assert nginx.wait(60) == -signal.SIGKILL


def test_nginx_is_killed_if_supervisord_died_before_the_signal(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_pid: int, _number: int) -> None:
        raise ProcessLookupError

    with in_place_of_nginx(tmp_path) as nginx:
        with monkeypatch.context() as patch:
            patch.setattr(event_listener.os, "kill", fail)
            events = io.StringIO(_event("PROCESS_STATE_FATAL", "processname:gateway"))
            event_listener.run(events, io.StringIO(), tmp_path, 4242)
        assert nginx.wait(60) == -signal.SIGKILL


_SUPERVISORD = """
import os, signal, subprocess, sys
listener = subprocess.Popen([sys.executable, "-m", "shoehorn.runtime.event_listener", sys.argv[1]],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0)
listener.stdout.readline()
listener.send_signal(signal.SIGSTOP)
os.waitpid(listener.pid, os.WUNTRACED)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nginx_is_killed_if_supervisord_died_while_the_listener_was_stopped(tmp_path: Path) -> None:
    """The kernel sends SIGHUP and SIGCONT to a stopped group that has lost its parent."""
    with in_place_of_nginx(tmp_path) as nginx:
        assert subprocess.run([sys.executable, "-c", _SUPERVISORD, str(tmp_path)], check=False).returncode < 0
        assert nginx.wait(60) == -signal.SIGKILL


def test_full_disk_does_not_prevent_the_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "exit_code").symlink_to("/dev/full")
    monkeypatch.setattr(Path, "exists", lambda _path: False)
    _, killed = _run(_event("PROCESS_STATE_FATAL", "processname:gateway"), tmp_path, monkeypatch)
    assert killed == [(4242, signal.SIGTERM)]


@pytest.mark.parametrize(("written", "code"), [("", 1), ("4\n", 4), (None, 0)])
def test_container_exits_with_the_recorded_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                           written: str | None, code: int) -> None:
    if written is not None:
        (tmp_path / "exit_code").write_text(written)
    monkeypatch.setattr(supervisord.supervisord, "main", lambda _arguments: None)
    assert supervisord.main(tmp_path) == code
