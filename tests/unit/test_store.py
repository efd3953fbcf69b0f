"""The store against a stand-in hub, with the hub's real client. Each pull is a process of its own, as in production."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fakes.hub import Hub
from shoehorn import checkpoint, settings, store
from shoehorn.errors import ModelUnavailableError
from shoehorn.hub import RemoteFile
from shoehorn.settings import Settings

WEIGHTS = "model.safetensors"
MODEL = "owner/tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, with files that are not to be fetched."""
    folder = tmp_path_factory.mktemp("hub")
    save_file({"model.norm.weight": torch.arange(1 << 20, dtype=torch.float32)}, folder / WEIGHTS)
    for name, text in {"config.json": '{"architectures": ["LlamaForCausalLM"]}', "tokenizer.json": "{}",
                       "README.md": "no", "pytorch_model.bin": "no", "modeling.py": "no"}.items():
        (folder / name).write_text(text)
    return folder


class Volume:
    """A volume, and pulls into it."""

    def __init__(self, home: Path, hub: Hub, **more: str) -> None:
        self.environment = {"MODEL_ID": MODEL, "MODELSCOPE_ENDPOINT": hub.url, "MODELS_DIR": str(home / "models"),
                            "RUN_DIR": str(home / "run"), "PATH": os.environ["PATH"], "HOME": str(home), **more}
        self.models = home / "models"
        self.models.mkdir(exist_ok=True)

    @property
    def settings(self) -> Settings:
        return settings.load(self.environment)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "shoehorn.cli", "pull", *arguments], env=self.environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def pull(self, *arguments: str) -> tuple[int, str, str]:
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture
def hub(model: Path) -> Hub:
    return Hub({MODEL: model})


def test_a_pull_fetches_what_serving_needs_and_says_where(tmp_path: Path, hub: Hub, model: Path) -> None:
    with hub:
        code, out, err = Volume(tmp_path, hub).pull("--json")
    assert code == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    directory = Path(lines[-1]["directory"])
    assert lines[-1]["phase"] == "done"
    assert {line["phase"] for line in lines} >= {"verifying", "done"}
    assert sorted(path.name for path in directory.glob("*") if path.is_file()) == [
        "config.json", WEIGHTS, "tokenizer.json"]
    assert (directory / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_a_complete_model_asks_the_hub_nothing(tmp_path: Path, hub: Hub) -> None:
    with hub:
        volume = Volume(tmp_path, hub)
        assert volume.pull()[0] == 0
        asked = len(hub.requests)
        assert volume.pull()[0] == 0
        assert len(hub.requests) == asked
    assert volume.pull()[0] == 0, "also with the hub gone"


def test_a_changed_file_is_found_and_fetched_again(tmp_path: Path, hub: Hub, model: Path) -> None:
    with hub:
        volume = Volume(tmp_path, hub)
        volume.pull()
        weights = volume.models / MODEL / WEIGHTS
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert store.locate(volume.settings) is None
        assert volume.pull()[0] == 0
    assert weights.read_bytes() == (model / WEIGHTS).read_bytes()


def test_a_killed_pull_goes_on_where_it_stopped(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, bytes_per_second=1_000_000) as hub:
        volume = Volume(tmp_path, hub)
        with volume.start("--json") as process:
            assert process.stdout is not None
            for line in process.stdout:
                if json.loads(line)["bytes_done"] > 1 << 20:
                    break
            process.kill()
        assert store.locate(volume.settings) is None, "half a model is no model"
        hub.bytes_per_second = 0
        assert volume.pull()[0] == 0
        starts = [int(span.removeprefix("bytes=").split("-")[0]) for span in hub.downloads(WEIGHTS) if span]
    assert max(starts) >= 1 << 20
    assert (volume.models / MODEL / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_sigterm_ends_a_pull_at_once_without_a_trace(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, bytes_per_second=100_000) as hub:
        with Volume(tmp_path, hub).start("--json") as process:
            assert process.stdout is not None
            assert process.stdout.readline()
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            assert process.wait(10) == 128 + signal.SIGTERM
            assert process.stderr is not None
            assert "Traceback" not in process.stderr.read()
        assert time.monotonic() - begun < 5


def test_flipped_bytes_are_refused_and_nothing_is_kept(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="flip") as hub:
        volume = Volume(tmp_path, hub)
        code, _, err = volume.pull()
    assert code == 4
    assert "shoehorn: " in err
    assert store.locate(volume.settings) is None
    assert not (volume.models / MODEL / WEIGHTS).exists()


def test_a_path_that_leaves_the_folder_is_refused_before_anything_is_fetched(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="traversal") as hub:
        code, _, err = Volume(tmp_path, hub).pull()
        assert code == 4
        assert "escape.json" in err
        assert hub.downloads(WEIGHTS) == []
    assert not list(tmp_path.rglob("escape.json"))


def test_a_hub_without_checksums_still_serves(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, fault="nosha") as hub:
        assert Volume(tmp_path, hub).pull()[0] == 0


def test_two_pulls_at_once_fetch_the_weights_once(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, bytes_per_second=4_000_000) as hub:
        volume = Volume(tmp_path, hub)
        with volume.start() as one, volume.start() as two:
            one.communicate(timeout=60)
            two.communicate(timeout=60)
        assert (one.returncode, two.returncode) == (0, 0)
        assert len(hub.downloads(WEIGHTS)) == 1


@pytest.mark.parametrize(("change", "words"), [
    ({"MODEL_ID": "owner/absent"}, "no model owner/absent"),
    ({"MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}, "cannot be reached"),
])
def test_trouble_is_told_in_words(tmp_path: Path, hub: Hub, change: dict[str, str], words: str) -> None:
    with hub:
        code, _, err = Volume(tmp_path, hub, **change).pull()
    assert code == 4
    assert words in err
    assert "Traceback" not in err


def test_a_token_is_needed_used_and_never_shown(tmp_path: Path, model: Path) -> None:
    with Hub({MODEL: model}, token="ms-canary") as hub:
        code, _, err = Volume(tmp_path, hub).pull()
        assert code == 4
        assert "MODELSCOPE_API_TOKEN" in err
        code, out, err = Volume(tmp_path, hub, MODELSCOPE_API_TOKEN="ms-canary").pull()
    assert code == 0, err
    assert "canary" not in out + err


def test_remote_code_is_refused_unless_trusted(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "remote"
    folder.mkdir()
    for name in (WEIGHTS, "modeling.py"):
        (folder / name).write_bytes((model / name).read_bytes())
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
    with Hub({MODEL: folder}) as hub:
        code, _, err = Volume(tmp_path, hub).pull()
        assert code == 4
        assert "TRUST_REMOTE_CODE" in err
        trusting = Volume(tmp_path, hub, TRUST_REMOTE_CODE="yes")
        assert trusting.pull()[0] == 0
    assert (trusting.models / MODEL / "modeling.py").exists()


def test_a_model_without_safetensors_is_refused(tmp_path: Path, hub: Hub) -> None:
    listing = (RemoteFile("pytorch_model.bin", 10, ""), RemoteFile("config.json", 10, ""))
    with hub, pytest.raises(ModelUnavailableError, match="no weights in safetensors"):
        store.choose(listing, Volume(tmp_path, hub).settings)


def test_a_full_volume_is_told_before_the_first_byte(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((*real[:4], 0, *real[5:])))
    with hub, pytest.raises(ModelUnavailableError, match="too small: 4 MiB"):
        store.pull(Volume(tmp_path, hub).settings, lambda _: None)
    assert hub.downloads(WEIGHTS) == []


def test_headers_are_read_by_short_ranges(tmp_path: Path, hub: Hub) -> None:
    with hub:
        files = store.hub_files(Volume(tmp_path, hub).settings)
        assert files.names()[WEIGHTS] > 4 << 20
        length = int.from_bytes(files.read(WEIGHTS, 0, 8), "little")
        assert b"model.norm.weight" in files.read(WEIGHTS, 8, length)
        assert hub.downloads(WEIGHTS) == ["bytes=0-7", f"bytes=8-{7 + length}"]


def test_a_local_folder_is_used_where_it_lies(tmp_path: Path, model: Path) -> None:
    there = settings.load({"MODEL_SOURCE": "local", "MODEL_ID": str(model)})
    assert store.locate(there) == model.resolve()
    assert isinstance(store.hub_files(there), checkpoint.LocalFiles)
    with pytest.raises(ModelUnavailableError, match="holds no model"):
        store.locate(settings.load({"MODEL_SOURCE": "local", "MODEL_ID": str(tmp_path)}))
