"""`shoehorn pull`: text and JSON output, exit codes and signals."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from fakes.hub import Hub
from shoehorn.commands.output import Lines
from shoehorn.common.progress import Progress
from support.pulling import MODEL, WEIGHTS, Volume, write_model

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


def test_json_lines_follow_the_phases_and_end_with_the_folder(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, bytes_per_second=2_000_000, fault="nosha") as hub:
        volume = Volume(tmp_path, hub, LOG_FORMAT="json")
        begin = time.monotonic()
        code, out, err = volume.pull("--json")
        seconds = time.monotonic() - begin
    assert code == 0, err
    warning = json.loads(err.splitlines()[0])
    assert (warning["phase"], warning["program"], warning["level"]) == ("log", "store", "WARNING")
    *lines, last = [json.loads(line) for line in out.splitlines()]
    assert last == {"phase": "done", "directory": str(volume.folder)}
    assert {tuple(line) for line in lines} == {("phase", "bytes_done", "bytes_total", "rate_bytes_per_second")}
    phases = [line["phase"] for line in lines]
    assert phases == sorted(phases), "pulling, then verifying"
    pulling = [line for line in lines if line["phase"] == "pulling"]
    assert [line["bytes_done"] for line in pulling] == sorted(line["bytes_done"] for line in pulling)
    assert len(pulling) >= 4, f"at least one a second, in {seconds:.0f} s"
    total = sum((model / name).stat().st_size for name in (WEIGHTS, "config.json", "tokenizer.json"))
    for phase in ("pulling", "verifying"):
        ended = [line for line in lines if line["phase"] == phase][-1]
        assert (ended["bytes_done"], ended["bytes_total"]) == (total, total)
    assert pulling[-2]["bytes_done"] / seconds < pulling[-2]["rate_bytes_per_second"] < 3_000_000


def test_text_output_has_progress_and_the_folder(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub)
        code, out, err = volume.pull()
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "pulling: 0 B of 4 MiB (0%)"
    assert lines[-1] == str(volume.folder)
    assert any(line.startswith("verifying: 4 MiB of 4 MiB (100%)") for line in lines)


def test_progress_line_is_printed_every_few_seconds_and_at_phase_ends() -> None:
    now = [0.0]
    lines: list[str] = []
    tell = Lines(lines.append, lambda: now[0])
    for second in range(8):
        now[0] = float(second)
        tell(Progress("pulling", second << 30, 7 << 30, 1 << 20))
        tell(Progress("pulling", second << 30, 7 << 30, 1 << 20))
    tell(Progress("verifying", 0, 7 << 30, 0.0))
    assert lines == [
        "pulling: 0 B of 7.00 GiB (0%), 1 MiB/s, 1 h 59 min left",
        "pulling: 3.00 GiB of 7.00 GiB (43%), 1 MiB/s, 1 h 8 min left",
        "pulling: 6.00 GiB of 7.00 GiB (86%), 1 MiB/s, 17 min 4 s left",
        "pulling: 7.00 GiB of 7.00 GiB (100%), 1 MiB/s",
        "verifying: 0 B of 7.00 GiB (0%)"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.fault("SIGTERM or SIGINT to a pull", "It ends at once; the next pull resumes it.")
def test_signal_ends_a_pull_at_once_and_silently(tmp_path: Path, model: Path, number: signal.Signals) -> None:
    with Hub({MODEL: model}, fault="slow") as hub:
        volume = Volume(tmp_path, hub)
        with volume.start("--json") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for line in process.stdout:
                if json.loads(line)["bytes_done"] > 100_000:
                    break
            begin = time.monotonic()
            process.send_signal(number)
            assert process.wait(60) == 128 + number
            assert time.monotonic() - begin < 10, "the rest of the pull takes 19 s"
            assert process.stderr.read() == ""
    assert (volume.folder / f"{WEIGHTS}.incomplete").exists()
    assert not volume.complete()


def test_pull_exits_after_its_reader_closed(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="slow") as hub, Volume(tmp_path, hub).start("--json") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(("arguments", "more", "code", "words"), [
    (["owner/absent"], {}, 4, "owner/absent: not found"),
    ([], {"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}, 4, "unavailable"),
    ([], {"MODEL_ID": "/a/folder"}, 2, "MODEL_SOURCE=local"),
    (["no model"], {}, 2, "neither OWNER/NAME nor a path"),
    ([], {"MODEL_SOURCE": "local", "MODEL_ID": "/nowhere"}, 4, "not a model")])
def test_failure_is_reported_with_its_exit_code(tmp_path: Path, model: Path, arguments: list[str],
                                                more: dict[str, str], code: int, words: str) -> None:
    with Hub({MODEL: model}) as hub:
        volume = Volume(tmp_path, hub, **more)
        as_json, as_text = volume.pull("--json", *arguments), volume.pull(*arguments)
    assert as_json[0] == as_text[0] == code
    failure = json.loads(as_json[1].splitlines()[-1])
    assert (failure["phase"], failure["exit_code"]) == ("failed", code)
    assert failure["code"]
    assert failure["remedy"]
    assert words in failure["cause"]
    assert words in as_text[2]
    assert "  -> " in as_text[2]
    assert "Traceback" not in as_json[2] + as_text[2]


def test_model_argument_overrides_the_setting(tmp_path: Path, model: Path) -> None:
    with Hub({"owner/other": model}) as hub:
        code, out, _ = Volume(tmp_path, hub).pull("owner/other")
    assert code == 0
    assert out.splitlines()[-1] == str(tmp_path / "models" / "owner" / "other")
