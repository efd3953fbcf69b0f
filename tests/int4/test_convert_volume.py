"""Conversion to INT4 in a volume: interruptions, disk errors and disk space."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from fakes import captured
from fakes.hub import Hub
from shoehorn.common.errors import ModelUnavailableError, SettingsError, ShoehornError
from shoehorn.config import settings
from shoehorn.deployment import served_model
from shoehorn.int4 import artifact, layout, shard_writer
from shoehorn.int4.convert import ConversionOptions
from shoehorn.int4.layout import MAX_BIT_WIDTHS, ShardLayout
from shoehorn.int4.shard_writer import WrittenShard
from shoehorn.model.reference import ModelRef
from shoehorn.runtime import programs
from shoehorn.store import pull
from shoehorn.store.reference import model_reference
from support.converting import (
    LAYERS,
    MODEL,
    Pulled,
    content,
    convert_here,
    local,
    readable,
    recorded_shards,
    start,
    start_paused,
    start_paused_calibration,
    write_model,
)

pytestmark = pytest.mark.process


def volume_and_ref(environment: Mapping[str, str]) -> tuple[Path, ModelRef]:
    loaded = settings.load(environment)
    return loaded.models_dir, model_reference(loaded)


def volume_and_conversion(environment: Mapping[str, str]) -> tuple[Path, ModelRef]:
    models_dir, ref = volume_and_ref(environment)
    return models_dir, ref.converted


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("source") / "little")


@pytest.fixture
def hub(model: Path) -> Iterator[Hub]:
    with Hub({MODEL: model}) as running:
        yield running


@pytest.fixture
def expected(tmp_path: Path, model: Path) -> dict[str, str]:
    (tmp_path / "whole").mkdir()
    return content(convert_here(local(tmp_path / "whole", model), ConversionOptions(8)))


@pytest.mark.fault("`kill -9` of a conversion at any moment",
                   "Nothing is served; the next one resumes with the interrupted shard and results in the same bytes.")
def test_killed_conversion_is_resumed_to_the_same_bytes(tmp_path: Path, model: Path, expected: dict[str, str]) -> None:
    environment = local(tmp_path, model)
    folder = artifact.folder(*volume_and_ref(environment))
    times_before: dict[str, int] = {}
    for count in (0, 2, 5):
        with start_paused(environment, count, "--embedding", "8") as process:
            wait(lambda: process.poll() is not None or len(recorded_shards(folder)) > count)  # noqa: B023  # called immediately
            workers = psutil.Process(process.pid).children() if process.poll() is None else []
            process.kill()
            process.communicate()
        assert not psutil.wait_procs(workers, 10)[1], "workers are still running"
        assert artifact.locate(*volume_and_ref(environment)) is None
        times = {name: (folder / name).stat().st_mtime_ns for name in recorded_shards(folder)}
        assert times_before.items() <= times.items(), "a converted shard was converted again"
        times_before = times
    with start(environment, "--embedding", "8") as process:
        assert process.wait(300) == 0
    assert content(folder) == expected


@pytest.mark.fault("`kill -9` of a calibrated conversion at any moment",
                   "The next one resumes with the interrupted layer and results in the same bytes.")
def test_killed_calibration_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    model = readable(write_model(tmp_path / "little", 3))
    text = {"CALIBRATION": str(tmp_path / "text.txt")}
    (tmp_path / "whole").mkdir()
    with start(local(tmp_path / "whole", model, **text)) as process:
        assert process.wait(300) == 0
    environment = local(tmp_path, model, **text)
    folder = artifact.folder(*volume_and_ref(environment))
    progress = folder / "calibration" / "progress.json"
    for layer in (0, 2):
        with start_paused_calibration(environment, layer) as process:
            wait(lambda: process.poll() is not None or layer_is_next(progress, layer))  # noqa: B023  # called immediately
            process.kill()
            process.communicate()
        assert artifact.locate(*volume_and_ref(environment)) is None
    with start(environment) as process:
        assert process.wait(300) == 0
        assert process.stderr
        assert "Resuming the calibration layer=3 of=3" in process.stderr.read()
    whole = tmp_path / "whole" / "models" / "local" / "little.int4"
    assert [name for name in content(whole) if content(folder).get(name) != content(whole)[name]] in (
        [], ["conversion.json"])
    resumed, once = (json.loads((each / "conversion.json").read_text())["calibration"] for each in (folder, whole))
    assert resumed | {"budget": None} == once | {"budget": None}  # the budget is by the free memory


def layer_is_next(progress: Path, layer: int) -> bool:
    return progress.exists() and json.loads(progress.read_text())["done"] == layer


def wait(condition: object, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.fault("`docker stop` or Ctrl-C during a conversion", "It exits immediately; no process is left.")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_conversion_leaves_no_process(tmp_path: Path, model: Path, number: signal.Signals) -> None:
    environment = local(tmp_path, model)
    folder = artifact.folder(*volume_and_ref(environment))
    with start(environment) as process:
        wait(lambda: process.poll() is not None or list(folder.glob("*.partial")))
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == 128 + number
    assert not psutil.wait_procs(children, 10)[1]


@pytest.mark.fault("The disk returns other bytes than were written during a conversion",
                   "Exit code 4 with the cause; the shard is not recorded, and its original is kept.")
def test_shard_with_a_read_back_mismatch_is_not_recorded(tmp_path: Path, hub: Hub,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    volume = Pulled(tmp_path, hub, KEEP_ORIGINAL="no")
    original = pull.locate(volume.settings.models_dir, volume.ref)
    assert original is not None
    bad = volume.originals()[2]
    verify = shard_writer.verify

    def verify_on_a_bad_disk(shard: ShardLayout, written: WrittenShard, directory: Path) -> str:
        if shard.name == bad:
            path = directory / shard_writer.partial_name(shard)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 16
            path.write_bytes(data)
        return verify(shard, written, directory)

    monkeypatch.setattr(shard_writer, "verify", verify_on_a_bad_disk)
    with pytest.raises(ModelUnavailableError, match=f"{bad}.partial") as caught:
        convert_here(volume.environment)
    assert caught.value.code == "volume_failed"
    assert "Check the disk" in caught.value.remedy
    folder = artifact.folder(volume.settings.models_dir, volume.ref)
    assert bad in volume.originals()
    assert recorded_shards(folder) == {path.name for path in folder.glob("*.safetensors")}
    assert len(recorded_shards(folder)) == 2
    monkeypatch.undo()
    convert_here(volume.environment)
    assert volume.originals() == []


def test_shard_of_many_ranges_is_verified_completely(tmp_path: Path, model: Path, expected: dict[str, str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify in many small requests; the recorded digests are those of the files."""
    monkeypatch.setattr(shard_writer, "_COPY_BYTES", 4096)
    folder = convert_here(local(tmp_path, model), ConversionOptions(8))
    assert content(folder) == expected
    entries = json.loads((folder / "conversion.json").read_text())["shards"]
    assert {name: entry["sha256"] for name, entry in entries.items()} == \
        {name: digest for name, digest in expected.items() if name.endswith(".safetensors")}


@pytest.mark.fault("The disk fills during a conversion",
                   "Exit code 4 with the cause; the next one resumes when space is free.")
def test_full_disk_is_reported_and_the_conversion_resumed(tmp_path: Path, model: Path,
                                                         expected: dict[str, str]) -> None:
    """Others fill the disk after the check of the free space: here the check gets a value that is too large."""
    environment = local(tmp_path, model)
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "models").rglob("*.safetensors"))
    program = textwrap.dedent("""
        import os, sys
        from shoehorn import cli
        os.statvfs = lambda _: os.statvfs_result((4096, 4096, *[1 << 30] * 6, 0, 255))
        sys.exit(cli.main(sys.argv[1:]))
        """)
    convert = f"convert --json --embedding 8 > {tmp_path}/out 2> {tmp_path}/err"
    script = textwrap.dedent(f"""
        set -e
        mount -t tmpfs -o size={size // 2} none {tmp_path}/models
        code=0
        {sys.executable} -c {shlex.quote(program)} {convert} || code=$?
        echo "full: $code $(tail -n 1 {tmp_path}/out)"
        mount -o remount,size={2 * size} {tmp_path}/models
        {sys.executable} -m shoehorn.cli {convert}
        cd {tmp_path}/models/local/little.int4 && sha256sum *
        """)
    done = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, timeout=300,
                          env={**environment, "PATH": os.environ["PATH"],
                               "PYTHONPATH": str(Path(pull.__file__).parents[2])})
    failure, *sums = done.stdout.splitlines()
    assert failure.startswith("full: 4 "), done.stdout + done.stderr
    assert json.loads(failure.removeprefix("full: 4 "))["code"] == "disk_full"
    assert {line.split()[1]: line.split()[0] for line in sums} == expected


def test_too_little_space_is_reported_before_a_shard_is_written(tmp_path: Path, model: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9, 9, 9, 9, 9, 9, 0, 255)))
    with pytest.raises(ModelUnavailableError) as caught:
        convert_here(local(tmp_path, model))
    assert caught.value.code == "volume_too_small"
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_conversion_is_a_model_of_the_volume(tmp_path: Path, hub: Hub) -> None:
    volume = Pulled(tmp_path, hub)
    folder = convert_here(volume.environment)
    assert folder == tmp_path / "models" / f"{MODEL}.int4"
    assert served_model.served_folder(volume.settings.models_dir, volume.ref.converted) == folder
    assert len(volume.originals()) == LAYERS + 1
    listed = subprocess.run([sys.executable, "-m", programs.CLI, "models", "--json"], capture_output=True, text=True,
                            check=True, env={**os.environ, **volume.environment}).stdout
    assert {entry["model"]: entry["complete"] for entry in json.loads(listed)} == {MODEL: True, f"{MODEL}.int4": True}
    time_before = (folder / "config.json").stat().st_mtime_ns
    assert convert_here(volume.environment) == folder
    assert (folder / "config.json").stat().st_mtime_ns == time_before, "converted twice"


def test_changed_local_folder_is_converted_again(tmp_path: Path) -> None:
    model = write_model(tmp_path / "own", 1)
    environment = local(tmp_path, model)
    before = content(convert_here(environment))
    shard = model / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"].neg_()
    save_file(tensors, shard)
    assert served_model.served_folder(*volume_and_conversion(environment)) is None
    after = content(convert_here(environment))
    assert [name for name in before if before[name] != after[name]] == ["conversion.json", shard.name]
    shutil.rmtree(model)
    assert artifact.locate(*volume_and_ref(environment)) is not None


def test_flipped_byte_of_a_conversion_is_detected(tmp_path: Path, hub: Hub) -> None:
    volume = Pulled(tmp_path, hub)
    folder = convert_here(volume.environment)
    shard = next(folder.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert served_model.served_folder(volume.settings.models_dir, volume.ref.converted) is None
    assert convert_here(volume.environment) == folder
    assert content(folder)[shard.name] == json.loads((folder / "conversion.json").read_text())["shards"][shard.name][
        "sha256"]


@pytest.mark.fault("`kill -9` of a conversion with KEEP_ORIGINAL=no",
                   "The next one resumes with the remaining shards of the original, without the hub.")
def test_originals_are_deleted_and_a_killed_conversion_is_resumed_without_the_hub(tmp_path: Path, hub: Hub) -> None:
    volume = Pulled(tmp_path, hub, KEEP_ORIGINAL="no")
    folder = artifact.folder(volume.settings.models_dir, volume.ref)
    original = pull.locate(volume.settings.models_dir, volume.ref)
    assert original is not None
    copies = shutil.copytree(original, tmp_path / "copies")
    with start_paused(volume.environment, 2) as process:
        wait(lambda: process.poll() is not None or len(recorded_shards(folder)) > 2)
        process.kill()
        process.communicate()
    assert served_model.served_folder(volume.settings.models_dir, volume.ref.converted) is None
    remaining = volume.originals()
    assert remaining, "not interrupted"
    assert len(set(remaining) & recorded_shards(folder)) <= 1
    recorded = sorted(recorded_shards(folder))[0]
    shutil.copyfile(copies / recorded, original / recorded)  # left by a kill between record and deletion
    assert pull.locate(volume.settings.models_dir, volume.ref) is None, "incomplete original is served"
    requests = len(hub.requests)
    assert artifact.source(volume.settings.models_dir, volume.ref) is not None, "would be pulled again"
    assert convert_here(volume.environment) == folder
    assert len(hub.requests) == requests
    assert volume.originals() == []
    assert served_model.served_folder(volume.settings.models_dir, volume.ref.converted) == folder


def test_volume_a_seventh_larger_than_the_original_suffices(tmp_path: Path, hub: Hub) -> None:
    """As 160 GB are for 140 GB."""
    volume = Pulled(tmp_path, hub, KEEP_ORIGINAL="no")
    original = pull.locate(volume.settings.models_dir, volume.ref)
    assert original is not None
    size = sum(path.stat().st_size for path in original.iterdir())
    script = textwrap.dedent(f"""
        set -e
        mkdir {tmp_path}/small
        mount -t tmpfs -o size={size * 8 // 7} none {tmp_path}/small
        cp -a {tmp_path}/models/. {tmp_path}/small
        {sys.executable} -m shoehorn.cli convert --json 2> {tmp_path}/err
        ls {tmp_path}/small/{MODEL} {tmp_path}/small/{MODEL}.int4
        """)
    done = subprocess.run(["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, timeout=300,
                          env={**volume.environment, "MODELS_DIR": str(tmp_path / "small"), "PATH": os.environ["PATH"],
                               "PYTHONPATH": str(Path(pull.__file__).parents[2])})
    assert done.returncode == 0, (tmp_path / "err").read_text()
    assert done.stdout.count(".safetensors\n") == LAYERS + 1


def test_original_and_two_shards_of_a_70b_fit_in_160_gb() -> None:
    files = captured.files("deepseek-r1-distill-llama-70b")
    before = sum(files.names().values())
    plan = layout.layout(files, MAX_BIT_WIDTHS)
    assert before > 140e9
    assert layout.peak_pair_bytes([3, 5, 4, 1]) == 9
    assert (before + layout.peak_pair_bytes(shard.size for shard in plan.shards)) * 1.02 < 160e9


def test_originals_of_a_local_folder_are_never_deleted(tmp_path: Path, model: Path) -> None:
    with pytest.raises(SettingsError, match="KEEP_ORIGINAL"):
        settings.load(local(tmp_path, model, KEEP_ORIGINAL="no"))


def test_missing_original_is_reported_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(ShoehornError) as error:
        convert_here({"MODEL_ID": MODEL, "MODELS_DIR": str(tmp_path / "models"), "QUANTIZATION": "int4"})
    assert f"shoehorn pull {MODEL}" in str(error.value)
