"""Child processes (real ones): stubborn children, orphans, groups of killed programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoehorn.runtime.child_process import Child, command, kill_recorded_group, members

_ORPHAN = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "


def _start(code: str, tmp_path: Path, lines: list[str] | None = None) -> Child:
    return Child(command([sys.executable, "-u", "-c", code], os.environ), (lines if lines is not None else []).append,
                 tmp_path / "group")


def _wait_for(condition: object, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]  # any callable without arguments
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_lines_of_both_streams_and_of_progress_bars_are_read(tmp_path: Path) -> None:
    lines: list[str] = []
    child = _start("import sys; print('out'); print('err', file=sys.stderr); print('10%\\r20%\\r', end='')", tmp_path,
                   lines)
    assert child.wait(60) == 0
    assert sorted(lines) == ["10%", "20%", "err", "out"]
    assert not (tmp_path / "group").exists()


def test_exit_status_is_returned(tmp_path: Path) -> None:
    assert _start("raise SystemExit(3)", tmp_path).wait(60) == 3


def test_stop_terminates_an_obedient_child(tmp_path: Path) -> None:
    lines: list[str] = []
    child = _start("print('up'); import time; time.sleep(600)", tmp_path, lines)
    _wait_for(lambda: lines)
    assert child.stop(10) == -signal.SIGTERM


def test_sigterm_is_repeated_to_a_child_that_lost_it(tmp_path: Path) -> None:
    lines: list[str] = []
    code = ("import signal, sys, time; seen = []\n"
            "def take(*_):\n seen.append(1)\n if len(seen) == 2: sys.exit(7)\n"
            "signal.signal(signal.SIGTERM, take); print('up')\nwhile True: time.sleep(0.1)")
    child = _start(code, tmp_path, lines)
    _wait_for(lambda: lines)
    assert child.stop(20) == 7


def test_child_that_ignores_sigterm_is_killed_after_the_time_limit(tmp_path: Path) -> None:
    lines: list[str] = []
    child = _start("import signal, time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)", tmp_path,
                   lines)
    _wait_for(lambda: lines)
    assert child.stop(0.5) == -signal.SIGKILL


def test_descendants_are_killed_with_the_child(tmp_path: Path) -> None:
    child = _start(_ORPHAN + "print('up'); time.sleep(600)", tmp_path)
    _wait_for(lambda: len(members(child.pid)) == 2)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    assert members(child.pid) == []


def test_successor_kills_the_group_of_a_killed_program(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", (
        "import sys, os, pathlib, time; from shoehorn.runtime.child_process import Child, command; "
        f"Child(command([sys.executable, '-c', {_ORPHAN + 'time.sleep(600)'!r}], os.environ), print, "
        f"pathlib.Path({str(tmp_path / 'group')!r})); time.sleep(600)")])
    _wait_for((tmp_path / "group").exists)
    group = json.loads((tmp_path / "group").read_text())["group"]
    _wait_for(lambda: len(members(group)) == 2)
    owner.kill()
    owner.wait()
    assert len(members(group)) == 2
    assert len(kill_recorded_group(tmp_path / "group")) == 2
    assert members(group) == []
    assert not (tmp_path / "group").exists()


@pytest.mark.parametrize("content", [None, "", "{}", '{"group": "x"}', '{"group": 4194000}'])
def test_invalid_record_kills_no_process(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "group").write_text(content)
    assert kill_recorded_group(tmp_path / "group") == []


def test_sigterm_during_the_start_is_handled_after_the_record(tmp_path: Path,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopped(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    born: list[Late] = []

    class Late(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            born.append(self)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    monkeypatch.setattr(subprocess, "Popen", Late)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped):
            _start("import time; time.sleep(600)", tmp_path)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
    ended = kill_recorded_group(tmp_path / "group")
    with born[0]:
        born[0].kill()
    assert ended == [born[0].pid]
