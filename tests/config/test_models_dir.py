"""Layout of MODELS_DIR: the names are an on-disk format."""

from __future__ import annotations

from pathlib import Path

from shoehorn.config.models_dir import ModelsDir


def test_paths_of_the_volume_keep_their_names() -> None:
    volume = ModelsDir(Path("/models"))
    assert [str(path) for path in (
        volume.model("a/b"), volume.manifest("a/b"), volume.writer_lock("a/b"), volume.use_lock("a/b"),
        volume.known_good, volume.bandwidths, volume.keys)] == [
        "/models/a/b", "/models/.shoehorn/manifests/a--b.json", "/models/.shoehorn/locks/a--b.lock",
        "/models/.shoehorn/locks/a--b.use", "/models/.shoehorn/worked", "/models/.shoehorn/speed.json",
        "/models/.shoehorn/keys.json"]


def test_every_file_of_a_volume_is_below_its_state_folder_or_its_model() -> None:
    volume = ModelsDir(Path("/models"))
    for path in (volume.manifests, volume.manifest("a/b"), volume.writer_lock("a/b"), volume.use_lock("a/b"),
                 volume.known_good, volume.bandwidths, volume.keys):
        assert path.is_relative_to(volume.state)
