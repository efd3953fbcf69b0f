"""The plan of `shoehorn plan` is the plan of the engine program: for the same machine, volume and settings.

Secrets reach neither of them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fakes import captured
from shoehorn import cli
from shoehorn.common import disk
from shoehorn.common.errors import DoesNotFitError
from shoehorn.config import settings as settings_module
from shoehorn.config.models_dir import ModelsDir
from shoehorn.deployment import inputs, known_good
from shoehorn.deployment.plan import plan_deployment
from shoehorn.engine import main
from shoehorn.hardware import detect, kernel_probe
from shoehorn.hub.files import ModelFile
from shoehorn.int4.journal import Journal
from shoehorn.int4.layout import MAX_BIT_WIDTHS, BitWidths, PlannedFiles, layout
from shoehorn.model.files import Files
from shoehorn.model.reference import ModelRef
from shoehorn.planner.plan import Refusal
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import StateFile
from shoehorn.store import manifest, pull
from shoehorn.store.manifest import Manifest
from support.plans import machine

GIB = 1 << 30
MODELS = {"a/70b": "deepseek-r1-distill-llama-70b", "a/8b": "llama-3.1-8b-instruct"}
MODEL = ModelRef("a/70b", "modelscope", "master")
HERE = machine(("NVIDIA GeForce RTX 4090", 23.6), ram=128)
SECRETS = {"API_KEY": "canary-api-key", "HF_TOKEN": "canary-hf-token", "MODELSCOPE_API_TOKEN": "canary-ms-token"}


@cache
def hub_files(ref: ModelRef) -> captured.CapturedFiles:
    """Return the model on the hub, with a tokenizer."""
    files = captured.files(MODELS[ref.id])
    files._heads["tokenizer.json"] = b'{"model": {"vocab": {"one": 0}}}'
    return files


def write_model(models_dir: Path, ref: ModelRef, files: Files, *, complete: bool = True) -> None:
    """Write config and headers, with holes instead of weights, and the manifest of a finished pull."""
    folder = ref.directory(models_dir)
    folder.mkdir(parents=True)
    for name, size in files.names().items():
        head = files.head(name) if hasattr(files, "head") else files.read(name)  # weights are not read
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(size)
    listing = tuple(ModelFile(path.name, path.stat().st_size, "", path.stat().st_mtime_ns) for path in folder.iterdir())
    manifest.write(models_dir, ref, Manifest(ref.stored_id, ref.revision, "", complete, listing,
                                             source=ref.stored_source))


class Volume:
    """A models volume in one of several states."""

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir

    def pull(self, *, complete: bool = True) -> None:
        write_model(self.models_dir, MODEL, hub_files(MODEL), complete=complete)

    def convert(self) -> None:
        files = hub_files(MODEL)
        conversion = layout(files, MAX_BIT_WIDTHS)
        folder = MODEL.converted.directory(self.models_dir)
        planned = PlannedFiles(files, conversion)
        names = {name: planned.read(name) for name in planned.names() if name.endswith((".safetensors", "config.json"))}
        names["tokenizer.json"] = files.head("tokenizer.json")
        write_model(self.models_dir, MODEL.converted, Head(planned, names))
        source = {"model": MODEL.id, "revision": MODEL.revision, "commit": "", "shards": {}}
        Journal(source, BitWidths(4, 4), 128).write(folder)

    def remove_original(self) -> None:
        write_model(self.models_dir, MODEL, Head(hub_files(MODEL), {}), complete=False)


@dataclass(frozen=True)
class Head:
    """Some files of a checkpoint, without weights."""

    files: Files
    heads: Mapping[str, bytes]

    def names(self) -> Mapping[str, int]:
        return {name: self.files.names()[name] for name in self.heads}

    def read(self, name: str, start: int = 0, length: int | None = None) -> bytes:
        return self.heads[name]


def not_pulled(volume: Volume) -> None:
    pass


def pulled(volume: Volume) -> None:
    volume.pull()


def converted(volume: Volume) -> None:
    volume.pull()
    volume.convert()


def converted_without_original(volume: Volume) -> None:
    volume.remove_original()
    volume.convert()


STATES: tuple[Callable[[Volume], None], ...] = (not_pulled, pulled, converted, converted_without_original)


SERVED_FROM = {"bitsandbytes": (pulled, converted)}
"""States of the volume from which a value of QUANTIZATION is served without disk space; the others need INT4."""


def environment_of(models_dir: Path, **more: str) -> dict[str, str]:
    return {"MODEL_ID": MODEL.id, "MODELS_DIR": str(models_dir), "RUN_DIR": str(models_dir.parent / "run"), **SECRETS,
            **more}


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One machine with cached bandwidths, a hub with both models, and a volume; returns its MODELS_DIR."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "cuda" else find_spec(name))
    monkeypatch.setattr(detect, "detect", lambda **_: HERE)
    monkeypatch.setattr(pull, "hub_files", lambda _, ref: hub_files(ref))
    models_dir = tmp_path / "models"
    cache = ModelsDir(models_dir).bandwidths
    cache.parent.mkdir(parents=True)
    [gpu] = HERE.gpus
    cache.write_text(json.dumps({f"{gpu.uuid} {HERE.driver_version} {gpu.pcie_generation}x{gpu.pcie_width}":
                                 {"link": 12.5e9, "device": 900e9},
                                 kernel_probe.cache_key(HERE): {"read": 60e9, "tokens_1": 57e9, "tokens_8": 40e9}}))
    (tmp_path / "run").mkdir()
    return models_dir


def plan_by_cli(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch,
                capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cli.main(["plan", "--json"])
    text, errors = capsys.readouterr()
    assert text, errors
    document: dict[str, Any] = json.loads(text)
    return document


def plan_by_engine(environment: Mapping[str, str]) -> dict[str, Any]:
    """The plan that the engine program writes; of a refusal its cause."""
    settings = settings_module.load(environment)
    states = StateFile(settings.run_dir)
    try:
        main._plan(settings, inputs.detect_machine(settings, {}, measure=True), states)
    except DoesNotFitError as error:
        return {"fits": False, "cause": error.cause}
    document: dict[str, Any] = json.loads(RunDir(settings.run_dir).plan.read_text())
    return document


@pytest.mark.parametrize("free_bytes", [0, 10_000 * GIB], ids=["full", "empty"])
@pytest.mark.parametrize("stepped_down", [False, True], ids=["", "stepped_down"])
@pytest.mark.parametrize("more", [{}, {"SPECULATIVE": "a/8b"}, {"QUANTIZATION": "int4", "KEEP_ORIGINAL": "no"},
                                  {"QUANTIZATION": "bitsandbytes"}], ids=["auto", "draft", "int4", "nf4"])
@pytest.mark.parametrize("state", STATES)
def test_cli_and_engine_make_the_same_plan(
        state: Callable[[Volume], None], more: dict[str, str], stepped_down: bool, free_bytes: int, here: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(disk, "disk_free", lambda path: free_bytes)
    environment = environment_of(here, **more)
    state(Volume(here))
    if stepped_down:
        settings = settings_module.load(environment)
        deployment = inputs.gather(settings, inputs.detect_machine(settings, {}, measure=False))
        known_good.write(deployment.known_good, {"max-num-seqs": 3}, "no_kv_cache_memory: max-num-seqs 8 -> 3")
    by_cli, by_engine = plan_by_cli(environment, monkeypatch, capsys), plan_by_engine(environment)
    assert by_engine == {key: by_cli[key] for key in by_engine}
    assert by_cli["fits"] == by_engine["fits"]
    assert "canary" not in json.dumps(by_cli)
    if by_cli["fits"]:
        assert by_cli == by_engine
        assert (by_cli["engine_args"]["max-num-seqs"] == 3) == stepped_down
        assert any(reason["option"] == "host-to-device" and "12.5 GB/s" in str(reason["value"])
                   for reason in by_cli["reasons"]) == bool(by_cli["offloaded_bytes"])
    if state in SERVED_FROM.get(more.get("QUANTIZATION", ""), (converted, converted_without_original)):
        assert by_cli["fits"], "a complete model needs no disk space"


def test_plan_refusal_inputs_and_state_carry_no_secret(here: Path) -> None:
    Volume(here).convert()
    settings = settings_module.load(environment_of(here, SPECULATIVE="a/8b"))
    states = StateFile(settings.run_dir)
    deployment, _, plan = main._plan(settings, HERE, states)
    assert plan.draft
    small = settings_module.load(environment_of(here, VRAM_LIMIT="2GiB"))
    refusal = plan_deployment(small, inputs.gather(small, HERE))
    assert isinstance(refusal, Refusal)
    for value in (plan, plan.draft, refusal, deployment, deployment.inputs, states.read()):
        assert "canary" not in repr(value) + str(asdict(value)), type(value)  # asdict shows what repr hides


def test_existing_conversion_is_served_from_a_full_volume(here: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(disk, "disk_free", lambda path: 0)
    converted_without_original(Volume(here))
    for more in ({}, {"QUANTIZATION": "int4", "KEEP_ORIGINAL": "no"}):
        deployment = inputs.gather(settings_module.load(environment_of(here, **more)), HERE)
        assert deployment.inputs.disk_free_bytes is None, "a complete model needs no disk space"
        assert plan_by_cli(environment_of(here, **more), monkeypatch, capsys)["fits"]


def test_gpus_that_a_profile_hides_are_not_planned(tmp_path: Path) -> None:
    profile = tmp_path / "second.yaml"
    profile.write_text("match: {device: cuda, gpus: 1, vram: 24GB}\nenvironment: {CUDA_VISIBLE_DEVICES: 1}\n")
    settings = settings_module.load({"VRAM_PROFILE": str(profile)})
    assert inputs.gpu_environment(settings, {"CUDA_VISIBLE_DEVICES": "0", "A": "b"}) == {
        "CUDA_VISIBLE_DEVICES": "1", "A": "b"}
    assert inputs.gpu_environment(settings_module.load({}), {"A": "b"}) == {"A": "b"}
