"""`shoehorn plan` and `shoehorn profiles`, run through the command line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fakes import captured as captured_models
from fakes.checkpoint_files import CheckpointFiles, dense
from shoehorn import cli
from shoehorn.commands import plan as command
from shoehorn.commands import profiles as profiles_command
from shoehorn.common import disk
from shoehorn.common.errors import ModelUnavailableError, SettingsError
from shoehorn.hardware import detect
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.model.reference import ModelRef
from shoehorn.planner.memory.model import CONTEXT_BYTES
from shoehorn.runtime import programs
from shoehorn.store import pull

GIB = 1 << 30
HERE = Hardware((), "", 64 * GIB, 64 * GIB, 8.0, ("NVML: driver library not found",))
CARD = Gpu(0, "GPU-0", "NVIDIA GeForce RTX 5090", round(31.8 * GIB), round(31.8 * GIB), (12, 0), 5, 16, False)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setattr(detect, "detect", lambda **_: HERE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the tiny model's config and headers; the weights are a hole."""
    files = dense(256, 768, 4, 4, 2, 2048, max_position=2048, tied=True)
    for name, size in files.names().items():
        with (tmp_path / name).open("wb") as file:
            file.write(files.read(name, 0, min(size, 1 << 16)))
            file.truncate(size)
    return tmp_path


def run(*words: str, module: Any = command, **environment: str) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(words), environment))


def serve_from_hub(monkeypatch: pytest.MonkeyPatch, files: CheckpointFiles) -> list[str]:
    """The hub answers with these files; returns the models that were asked for."""
    asked: list[str] = []

    def hub_files(_: object, ref: ModelRef) -> CheckpointFiles:
        asked.append(f"{ref.source}:{ref.id}")
        return files

    monkeypatch.setattr(pull, "hub_files", hub_files)
    return asked


def test_folder_is_planned_for_the_cpu_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", str(folder), "--profile", "cpu", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is True
    assert document["engine_args"]["max-model-len"] == 2048
    assert document["vram"] == []


def test_relative_folder_is_a_local_model(folder: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(folder.parent)
    assert run("--model", folder.name, "--profile", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True


def test_hub_model_is_planned_for_a_described_gpu(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = serve_from_hub(monkeypatch, captured_models.files("deepseek-r1-distill-llama-70b"))
    assert run("--model", "a/b", "--gpu", "32GiB:RTX5090", "--ram", "64GB", MODEL_SOURCE="local", MODEL_ID="/x") == 0
    text = capsys.readouterr().out
    assert set(asked) == {"modelscope:a/b"}
    for words in ("a/b with profile auto", "memory of the GPU", "offload buffers          842 MiB",
                  "PCIe 5 with 16 lanes", "tokens/s for one request", "gpu-memory-utilization",
                  "the least that leaves memory for two requests"):
        assert words in text, text


def test_closed_reader_ends_the_command_silently(folder: Path) -> None:
    command_line = [sys.executable, "-m", programs.CLI, "plan", "--model", str(folder), "--gpu", "24GB"]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "MODEL_SOURCE": "local"}) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_other_broken_pipe_is_raised(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def broken(*arguments: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(command, "run", broken)
    with (folder / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            cli.main(["plan"])


def test_described_gpu_is_planned_for_in_the_cpu_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(folder), "--gpu", "8GB:RTX4060", "--json"]
    for more, profile in (((), "auto"), (("--set", "VRAM_PROFILE=cpu"), "cpu"), (("--profile", "cpu"), "cpu")):
        assert run(*words, *more, VRAM_PROFILE="cpu") == 0
        assert json.loads(capsys.readouterr().out)["profile"] == profile


def test_two_gpus_share_one_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    serve_from_hub(monkeypatch, captured_models.files("deepseek-r1-distill-llama-70b"))
    assert run("--gpu", "20GiB", "--gpu", "20GiB", "--ram", "64GiB") == 0
    text = capsys.readouterr().out
    assert text.count("memory of each of 2 GPUs") == 1
    assert "2 equal GPUs, 64 attention heads" in text


def test_unequal_gpus_have_a_column_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", str(folder), "--gpu", "24GB:RTX4090", "--gpu", "12GB:RTX3060", "--set",
               "VLLM_EXTRA_ARGS=--pipeline-parallel-size 2") == 0
    [limits] = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  limit ")]
    assert len(limits) == 5  # two sizes with their units
    assert float(limits[1]) > 1.5 * float(limits[3])


@pytest.mark.parametrize(("size", "total"), [("24GB:L4", 22_502), ("24gb:RTX4090", 24_024), ("24GB", 24_024),
                                             ("24GiB:L4", 24_576), ("24000MB", 22_888)])
def test_gpu_size_in_gb_is_the_size_as_sold(monkeypatch: pytest.MonkeyPatch, size: str, total: int,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    serve_from_hub(monkeypatch, captured_models.files("deepseek-r1-distill-llama-70b"))
    assert run("--gpu", size, "--ram", "64GB", "--json", VLLM_EXTRA_ARGS="--gpu-memory-utilization 1.0") == 0
    limit = json.loads(capsys.readouterr().out)["vram"][0]["limit_bytes"]
    assert limit - CONTEXT_BYTES >> 20 == total


def test_refusal_has_exit_code_3_and_remedies(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    serve_from_hub(monkeypatch, captured_models.files("deepseek-r1-distill-llama-70b"))
    assert run("--gpu", "3GiB", "--ram", "64GiB") == 3
    text = capsys.readouterr().out
    assert "does not fit: GPU memory: " in text
    assert "  -> use a GPU with" in text
    assert run("--gpu", "3GiB", "--ram", "64GiB", "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert document["fits"] is False
    assert document["missing_bytes"] > 0
    assert document["remedies"]


def test_host_memory_of_a_described_machine_is_unknown_without_ram(monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    serve_from_hub(monkeypatch, captured_models.files("deepseek-r1-distill-llama-70b"))
    assert run("--gpu", "24GiB") == 0
    assert "not checked" in capsys.readouterr().out
    assert run("--gpu", "24GiB", "--ram", "8GiB") == 3
    assert "host memory" in capsys.readouterr().out


def test_command_line_settings_override_the_environment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", str(folder), "--profile", "cpu", "--set", "MAX_MODEL_LEN=1024", "--set", "MAX_NUM_SEQS=2",
               "--json", MAX_MODEL_LEN="512", VRAM_PROFILE="7gb") == 0
    arguments = json.loads(capsys.readouterr().out)["engine_args"]
    assert (arguments["max-model-len"], arguments["max-num-seqs"]) == (1024, 2)


def test_disk_counts_for_this_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(detect, "detect", lambda **_: Hardware((CARD,), "580", 64 * GIB, 64 * GIB, 8.0))
    monkeypatch.setattr(disk, "disk_free", lambda path: 10 * GIB)
    serve_from_hub(monkeypatch, captured_models.files("deepseek-r1-distill-llama-70b"))
    assert run(MODELS_DIR=str(tmp_path)) == 3
    assert "10.00 GiB free" in capsys.readouterr().out
    assert run(MODELS_DIR=str(tmp_path / "not there")) == 0
    monkeypatch.setattr(disk, "disk_used", lambda path: (200 if path == tmp_path / "a" / "b" else 0) * GIB)
    assert run("--model", "a/b", MODELS_DIR=str(tmp_path)) == 0  # pulled already, but for the rest
    assert run("--gpu", "32GiB", MODELS_DIR=str(tmp_path)) == 0


@pytest.mark.parametrize(("words", "problem"), [
    (("--set", "MAX_LEN=1"), "unknown setting MAX_LEN"), (("--set", "PORT"), "--set PORT"),
    (("--gpu", "big"), "--gpu: 'big' is not a size"), (("--gpu", "8GB", "--ram", "x"), "--ram: 'x' is not a size"),
    (("--profile", "9gb"), "9gb: unknown profile"), (("--set", "MAX_NUM_SEQS=0"), "MAX_NUM_SEQS"),
    ((), "driver library not found"),
])
def test_invalid_argument_is_named(words: tuple[str, ...], problem: str) -> None:
    with pytest.raises(SettingsError) as caught:
        run(*words)
    assert problem in caught.value.cause


def test_profiles_are_grouped_by_result(monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(detect, "detect", lambda **_: Hardware((CARD,), "580", 64 * GIB, 64 * GIB, 8.0))
    serve_from_hub(monkeypatch, captured_models.files("deepseek-r1-distill-llama-70b"))
    assert run("--json", module=profiles_command) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert [name for name, row in rows.items() if row["chosen"]] == ["auto"]
    assert (rows["auto"]["group"], rows["auto"]["context"]) == ("slow", 8192)
    assert rows["auto"]["tokens_per_second"] > 0
    assert rows["32gb"]["group"] == "slow"
    assert rows["2x20gb"]["group"] == "does not fit"
    assert rows["2x20gb"]["why"].startswith("VRAM_PROFILE=2x20gb needs 2 GPUs")
    assert rows["cpu"]["group"] == "does not fit"
    assert run(module=profiles_command, VRAM_PROFILE="32gb") == 0
    text = capsys.readouterr().out
    assert "* 32gb" in text
    assert text.index("runs slowly") < text.index("* 32gb") < text.index("does not fit:") < text.index("2x20gb")


def test_small_model_runs_with_all_profiles_unless_vram_is_limited(
        folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(detect, "detect", lambda **_: Hardware((CARD,), "580", 64 * GIB, 64 * GIB, 8.0))
    assert run("--json", "--model", str(folder), module=profiles_command) == 0
    groups = {row["name"]: row["group"] for row in json.loads(capsys.readouterr().out)}
    assert {groups["auto"], groups["7gb"], groups["cpu"]} == {"runs"}
    assert run("--json", "--model", str(folder), module=profiles_command, VRAM_LIMIT="600MiB") == 0
    assert {row["group"] for row in json.loads(capsys.readouterr().out)} == {"does not fit"}


def test_profiles_are_listed_without_a_gpu_or_a_hub(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def unreachable(_: object, _ref: ModelRef) -> None:
        raise ModelUnavailableError("The hub cannot be reached.", "")

    monkeypatch.setattr(pull, "hub_files", unreachable)
    assert run(module=profiles_command, VRAM_PROFILE="cpu") == 0
    text = capsys.readouterr().out
    assert "a machine without a GPU: The hub cannot be reached." in text
    assert "* cpu" in text
    assert "auto" not in text


def test_gpu_size_without_a_unit_is_refused() -> None:
    with pytest.raises(SettingsError, match="--gpu: '24' has no unit; write 24GiB") as caught:
        run("--gpu", "24:RTX4090", "--model", "/nowhere")
    assert "--gpu 24GB" in caught.value.remedy


def test_auto_profile_includes_the_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    serve_from_hub(monkeypatch, captured_models.files("deepseek-r1-distill-llama-70b"))
    monkeypatch.setattr(disk, "disk_free", lambda path: 1000 * GIB)
    results = []
    for quantization in ("auto", "bitsandbytes"):
        assert run("--json", "--gpu", "32GiB:RTX5090", module=profiles_command, QUANTIZATION=quantization,
                   MODELS_DIR=str(tmp_path)) == 0
        results.append(json.loads(capsys.readouterr().out)[0])
    assert [row["name"] for row in results] == ["auto", "auto"]
    assert results[0]["tokens_per_second"] > results[1]["tokens_per_second"]
