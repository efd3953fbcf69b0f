"""Memory figures of the engine: the handler in vLLM's processes, and the comparison with the plan."""

from __future__ import annotations

import json
import logging
import logging.config
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoehorn.engine import memory_report
from shoehorn.hardware.types import Gpu, Hardware
from shoehorn.observability.exporter import vram_samples
from shoehorn.observability.gpu_metrics import GpuSample
from shoehorn.planner.memory.device import DeviceMemory
from shoehorn.runtime.state import State
from shoehorn_vllm.protocol import MEMORY_DIR_VARIABLE
from shoehorn_vllm.telemetry import memory_log, quant_state

GIB, MIB = 1 << 30, 1 << 20
PARTS = DeviceMemory("gpu0", limit_bytes=20 * GIB, weights_bytes=10 * GIB, quant_state_bytes=GIB, embeddings_bytes=GIB,
                     kv_cache_bytes=4 * GIB, activations_bytes=GIB, cuda_graphs_bytes=GIB, framework_bytes=GIB)


@pytest.mark.parametrize(("template", "arguments", "figures"), [
    ("Model loading took %s GiB memory and %.6f seconds", ("14.99", 12.5), {"weights_bytes": round(14.99 * GIB)}),
    (quant_state.TEMPLATE, (1 << 30,), {"quant_state_bytes": GIB}),
    ("Available KV cache memory: %s GiB", ("-0.5",), {"kv_cache_bytes": -GIB // 2}),
    ("Graph capturing finished in %.0f secs, took %.2f GiB", (5.0, 0.123456), {"cuda_graphs_bytes": 132_559_871}),
    ("%s KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx",
     ("GPU", "13,424", "512", 26.2), {"kv_cache_tokens": 13424, "max_concurrency": 26.2}),
    ("Total CPU offloaded parameters: %s", ("31.88",), {"offloaded_bytes": round(31.88 * GIB)}),
    ("[PrefetchOffloader] Initialized 80 modules. Total GPU memory saved: 35.2977 GB, Static buffer pool: 0.8824 GB "
     "(group_size=1, num_in_group=1, prefetch_step=2, mode=cpu)", (),
     {"offloaded_bytes": 35_297_700_000, "offload_buffer_bytes": 882_400_000}),
    ("Free memory on device (23.1/23.6 GiB) on startup. Desired GPU memory utilization is (0.92, 21.7 GiB). Actual "
     "usage is 15.21 GiB for consumed memory (weights + non-torch), 1.02 GiB for peak activation, and 0.41 GiB for "
     "CUDAGraph memory. Replace", (),
     {"consumed_bytes": round(15.21 * GIB), "peak_activation_bytes": round(1.02 * GIB)}),
    ("Starting to load model %s...", ("x",), {}),
])
def test_relevant_log_records_are_parsed(template: str, arguments: tuple[Any, ...],
                                                figures: dict[str, Any]) -> None:
    assert memory_log.figures(template, arguments) == figures


def log_as_vllm(run_dir: Path, monkeypatch: pytest.MonkeyPatch, *records: tuple[str, tuple[Any, ...]]) -> None:
    """Send records through the configuration that `prepare` writes."""
    for name, value in memory_report.prepare(run_dir).items():
        monkeypatch.setenv(name, value)
    handler = memory_log.MemoryLogHandler()
    for template, arguments in records:
        handler.emit(logging.LogRecord("vllm", logging.INFO, "x.py", 1, template, arguments, None))


def test_handler_writes_one_file_per_process_with_the_last_capture(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_as_vllm(tmp_path, monkeypatch, ("Model loading took %s GiB memory and %.6f seconds", ("12.0", 1.0)),
                ("Graph capturing finished in %.0f secs, took %.2f GiB", (5.0, 0.9)),
                ("Graph capturing finished in %.0f secs, took %.2f GiB", (5.0, 0.5)),
                ("%s KV cache size: %s tokens, Maximum concurrency for %s tokens per request: %.2fx",
                 ("GPU", "1,000", "512", 2.0)))
    figures, tokens = memory_report.read(tmp_path, 1)
    assert tokens == 1000
    assert figures[0]["weights_bytes"] == 12 * GIB
    assert figures[0]["cuda_graphs_bytes"] == GIB // 2
    memory_report.prepare(tmp_path)
    assert memory_report.read(tmp_path, 1) == ({}, 0), "a new start begins with nothing"


def test_unknown_record_format_does_not_disturb_the_engine(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    log_as_vllm(tmp_path, monkeypatch, ("Model loading took %s GiB memory", ("lots",)), ("Model loading took", ()))
    assert memory_report.read(tmp_path, 1) == ({}, 0)
    assert "Logging error" in capsys.readouterr().err


def test_logging_configuration_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = memory_report.prepare(tmp_path)
    document = json.loads(Path(variables["VLLM_LOGGING_CONFIG_PATH"]).read_text())
    document["loggers"] = {"some.test": document["loggers"]["vllm"]}
    document["formatters"]["vllm"] = {"format": "%(message)s"}
    monkeypatch.setenv(MEMORY_DIR_VARIABLE, variables["SHOEHORN_MEMORY_DIR"])
    logging.config.dictConfig(document)
    logging.getLogger("some.test").info("Available KV cache memory: %s GiB", "2.0")
    logging.getLogger("some.test").handlers.clear()
    [report] = Path(variables["SHOEHORN_MEMORY_DIR"]).glob("*.json")
    assert json.loads(report.read_text())["kv_cache_bytes"] == 2 * GIB


def report(run_dir: Path, pid: int, process: str, **figures: int) -> None:
    (run_dir / "engine-memory" / f"{pid}.json").write_text(json.dumps({"process": process, **figures}))


def test_ranks_are_ordered_and_damaged_files_ignored(tmp_path: Path) -> None:
    memory_report.prepare(tmp_path)
    report(tmp_path, 30, "Worker_PP1_TP0", weights_bytes=3)
    report(tmp_path, 20, "Worker_PP0_TP1", weights_bytes=2)
    report(tmp_path, 40, "Worker_PP0_TP0", weights_bytes=1)
    report(tmp_path, 50, "EngineCore", kv_cache_tokens=77)
    (tmp_path / "engine-memory" / "9.json").write_text("{")
    figures, tokens = memory_report.read(tmp_path, 4)
    assert [figures[index]["weights_bytes"] for index in range(3)] == [1, 2, 3]
    assert tokens == 77


def test_framework_is_the_rest_of_the_total() -> None:
    reports = {0: {"weights_bytes": 12 * GIB, "kv_cache_bytes": 4 * GIB, "cuda_graphs_bytes": GIB}}
    rows = {row.part: row for row in memory_report.compare([PARTS], reports, [18 * GIB])}
    assert {part: row.measured_bytes for part, row in rows.items()} == {
        "weights": 12 * GIB, "kv_cache": 4 * GIB, "cuda_graphs": GIB, "framework": GIB, "activations": None,
        "total": 18 * GIB}
    assert rows["weights"].expected_bytes == 12 * GIB
    assert not any(row.differs for row in rows.values())


def test_reported_quantization_state_is_a_part_of_its_own() -> None:
    reports = {0: {"weights_bytes": 12 * GIB, "quant_state_bytes": GIB + GIB // 2, "kv_cache_bytes": 4 * GIB,
                "cuda_graphs_bytes": GIB}}
    rows = {row.part: row for row in memory_report.compare([PARTS], reports, [18 * GIB])}
    assert (rows["weights"].expected_bytes, rows["weights"].measured_bytes) == (11 * GIB, 10 * GIB + GIB // 2)
    assert (rows["quant_state"].expected_bytes, rows["quant_state"].measured_bytes) == (GIB, GIB + GIB // 2)
    assert rows["framework"].measured_bytes == GIB, "nothing is counted twice"
    without = {row.part for row in memory_report.compare([PARTS], {0: {"quant_state_bytes": GIB}}, [18 * GIB])}
    assert "quant_state" not in without


def test_only_state_in_32_bits_is_counted_and_shared_state_once(monkeypatch: pytest.MonkeyPatch,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    class State:
        def __init__(self, absmax: torch.Tensor, nested: bool = False) -> None:
            self.absmax, self.nested = absmax, nested

    def weight(*states: State) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(torch.zeros(1), requires_grad=False)
        if states:
            parameter.bnb_quant_state = dict(enumerate(states)) if len(states) > 1 else states[0]
        return parameter

    monkeypatch.setattr(quant_state, "_bytes_by_address", {})
    caplog.set_level(logging.INFO)
    model, shared = torch.nn.Module(), State(torch.zeros(100))
    quant_state.report(model)
    assert caplog.records == [], "an unquantized model has none"
    for name, parameter in {"a": weight(shared, State(torch.zeros(10))), "b": weight(shared), "c": weight(),
                            "d": weight(State(torch.zeros(50, dtype=torch.uint8), nested=True))}.items():
        model.register_parameter(name, parameter)
    quant_state.report(model)
    [record] = caplog.records
    assert memory_log.figures(str(record.msg), record.args) == {"quant_state_bytes": 4 * 110}  # type: ignore[arg-type]


def test_part_that_differs_by_more_than_a_tenth_is_marked() -> None:
    reports = {0: {"weights_bytes": 14 * GIB, "kv_cache_bytes": 2 * GIB, "cuda_graphs_bytes": GIB}}
    rows = memory_report.compare([PARTS], reports, [18 * GIB])
    assert {row.part for row in rows if row.differs} == {"weights", "kv_cache"}
    marked = [line for line in memory_report.table(rows) if "differs" in line]
    assert len(marked) == 2
    assert "14.00 GiB" in marked[0]
    small = memory_report.compare([replace(PARTS, cuda_graphs_bytes=10 * MIB)], reports, [18 * GIB])
    assert "framework" not in {row.part for row in small if row.differs}, "a few megabytes are ignored"


def test_unreported_part_is_unknown_without_a_warning() -> None:
    rows = memory_report.compare([PARTS], {}, [])
    assert all(row.measured_bytes is None and not row.differs for row in rows)
    assert "unknown" in memory_report.table(rows)[1]


def test_missing_offload_is_detected() -> None:
    assert not memory_report.offload_is_short(10 * GIB, {0: {"offloaded_bytes": 10 * GIB}})
    assert not memory_report.offload_is_short(0, {0: {}})
    assert memory_report.offload_is_short(10 * GIB, {0: {"weights_bytes": 1}})


def test_offload_that_is_reported_but_undone_is_detected() -> None:
    def rows(weights_bytes: int) -> list[memory_report.Row]:
        return memory_report.compare([PARTS], {0: {"weights_bytes": weights_bytes}}, [18 * GIB])

    assert memory_report.offload_is_undone(14 * GIB, rows(26 * GIB))
    assert not memory_report.offload_is_undone(14 * GIB, rows(13 * GIB))
    assert not memory_report.offload_is_undone(0, rows(26 * GIB))
    assert not memory_report.offload_is_undone(14 * GIB, memory_report.compare([PARTS], {}, []))


def test_report_has_the_numbers_of_nvml_and_measures_the_plans_gpus() -> None:
    first = Gpu(3, "GPU-3", "RTX 4090", 24 * GIB, 23 * GIB, (8, 9), 4, 16, False)
    second = replace(first, index=1, uuid="GPU-1", free_bytes=22 * GIB)
    now = Hardware((replace(second, free_bytes=12 * GIB), replace(first, index=0, uuid="GPU-0", free_bytes=0),
                    replace(first, free_bytes=3 * GIB)), "580", 0, 0, 1.0)
    assert memory_report.used_bytes((first, second), now) == [20 * GIB, 10 * GIB]
    rows = memory_report.compare([PARTS, PARTS], {}, [20 * GIB, 10 * GIB], [3, 1])
    assert {(row.gpu, row.index) for row in rows} == {(0, 3), (1, 1)}
    assert [line.split()[0] for line in memory_report.table(rows) if " total " in line] == ["3", "1"]
    labels = {labels[0] for labels, _ in vram_samples(State(memory=tuple(map(asdict, rows))), tuple(
        replace(SAMPLE, index=index) for index in range(4)))["shoehorn_vram_expected_bytes"]}
    assert labels == {"1", "3"}


SAMPLE = GpuSample(0, "GPU-0", "RTX 4090", 24 * GIB, GIB, 23 * GIB, 0, 0.0, 1.0, 1.0, ())
