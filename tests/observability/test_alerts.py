"""Alert rules, checked by promtool: each fires under its condition only, and has a runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoehorn.common.paths import HOME
from shoehorn.observability import metrics

RULES = HOME / "monitoring" / "prometheus" / "rules.yml"
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
A = 'job="shoehorn",instance="a"'
E = f'{A},model_name="m",engine="0"'

FIRING: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "ShoehornDown": ({f"up{{{A}}}": "0x60"}, {"job": "shoehorn"}),
    "ShoehornFailed": ({f'shoehorn_phase{{{A},phase="failed"}}': "1x60"}, {"job": "shoehorn", "phase": "failed"}),
    "ShoehornPullStalled": ({f'shoehorn_phase{{{A},phase="pulling"}}': "1x60",
                             f"shoehorn_download_bytes{{{A}}}": "5x60"},
                            {"job": "shoehorn", "phase": "pulling"}),
    "ShoehornLoadStalled": ({f'shoehorn_phase{{{A},phase="loading"}}': "1x60"}, {}),
    "ShoehornNotReady": ({f'shoehorn_phase{{{A},phase="ready"}}': "1x30 0x30"}, {"job": "shoehorn", "phase": "ready"}),
    "ShoehornEngineHung": ({f"vllm:num_requests_running{{{E}}}": "3x60",
                            f"vllm:iteration_tokens_total_count{{{E}}}": "100x60"}, {}),
    "ShoehornRestarting": ({f"shoehorn_engine_restarts_total{{{A}}}": "0+1x60"}, {"job": "shoehorn"}),
    "ShoehornErrors": ({f'shoehorn_requests_total{{{A},key="k",outcome="ok"}}': "0+90x60",
                        f'shoehorn_requests_total{{{A},key="k",outcome="error"}}': "0+10x60"}, {}),
    "ShoehornEngineUnseen": ({f'shoehorn_phase{{{A},phase="ready"}}': "1x60",
                              f"shoehorn_engine_scrape_success{{{A}}}": "0x60"}, {"job": "shoehorn", "phase": "ready"}),
    "ShoehornReplicaLost": ({f'shoehorn_replica_up{{{A},replica="gpu1"}}': "1x10 0x50",
                             f'shoehorn_replica_up{{{A},replica="gpu2"}}': "1x60"},
                            {"job": "shoehorn", "replica": "gpu1"}),
    "ShoehornReplicaNotReady": ({f'shoehorn_replica_up{{{A},replica="gpu1"}}': "1x60",
                                 f'shoehorn_replica_ready{{{A},replica="gpu1"}}': "0x60"},
                                {"job": "shoehorn", "replica": "gpu1"}),
    "ShoehornSlowFirstToken": ({f'vllm:time_to_first_token_seconds_bucket{{{E},le="20.0"}}': "0x60",
                                f'vllm:time_to_first_token_seconds_bucket{{{E},le="80.0"}}': "0+60x60",
                                f'vllm:time_to_first_token_seconds_bucket{{{E},le="+Inf"}}': "0+60x60",
                                f"vllm:time_to_first_token_seconds_count{{{E}}}": "0+60x60"}, {}),
    "ShoehornQueueNotDraining": ({f"vllm:num_requests_waiting{{{E}}}": "1+1x60"}, {}),
    "ShoehornPreempting": ({f"vllm:num_preemptions_total{{{E}}}": "0+30x60"}, {}),
    "ShoehornKvCacheFull": ({f"vllm:kv_cache_usage_perc{{{E}}}": "0.99x60",
                             f"vllm:num_requests_waiting{{{E}}}": "2x60"}, {}),
    "ShoehornVolumeFull": ({f"shoehorn_models_volume_free_bytes{{{A}}}": "4x60",
                            f"shoehorn_models_volume_bytes{{{A}}}": "100x60"}, {"job": "shoehorn"}),
    "ShoehornGpuMissing": ({f"shoehorn_gpu_collect_success{{{A}}}": "1x5 0x60",
                            f"shoehorn_gpu_collect_last_success_timestamp_seconds{{{A}}}": "5x60"},
                           {"job": "shoehorn"}),
    "ShoehornXid": ({f'shoehorn_gpu_xid_errors_total{{{A},gpu="0",uuid="u",kind="hardware"}}': "0x40 1x20"},
                    {"job": "shoehorn", "gpu": "0", "uuid": "u", "kind": "hardware"}),
    "ShoehornVramHeadroom": ({f'shoehorn_vram_bytes{{{A},gpu="0",part="free"}}': "1000x60"},
                             {"job": "shoehorn", "gpu": "0", "part": "free"}),
    "ShoehornForeignProcess": ({f'shoehorn_vram_bytes{{{A},gpu="0",part="other_processes"}}': "3000000000x60"},
                               {"job": "shoehorn", "gpu": "0", "part": "other_processes"}),
    "ShoehornGpuHot": ({f'shoehorn_gpu_throttled{{{A},gpu="0",uuid="u",reason="thermal"}}': "1x60"},
                       {"job": "shoehorn", "gpu": "0", "uuid": "u", "reason": "thermal"}),
}
"""Alert -> (series with promtool's notation of values, the labels that it fires with besides instance and severity)."""

QUIET: dict[str, dict[str, str]] = {
    "ShoehornDown": {f"up{{{A}}}": "1x60"},
    "ShoehornFailed": {f'shoehorn_phase{{{A},phase="failed"}}': "0x60", f'shoehorn_phase{{{A},phase="ready"}}': "1x60"},
    "ShoehornPullStalled": {f'shoehorn_phase{{{A},phase="pulling"}}': "1x60",
                            f"shoehorn_download_bytes{{{A}}}": "0+1000x60"},
    "ShoehornLoadStalled": {f'shoehorn_phase{{{A},phase="converting"}}': "1x60",  # slow, but it moves
                            f"shoehorn_phase_progress_ratio{{{A}}}": "0+0.01x60"},
    "ShoehornNotReady": {f'shoehorn_phase{{{A},phase="ready"}}': "0x60"},  # it still loads for the first time
    "ShoehornEngineHung": {f"vllm:num_requests_running{{{E}}}": "3x60",
                           f"vllm:iteration_tokens_total_count{{{E}}}": "100+5x60"},
    "ShoehornRestarting": {f"shoehorn_engine_restarts_total{{{A}}}": "0x30 1x30"},
    "ShoehornErrors": {f'shoehorn_requests_total{{{A},key="k",outcome="ok"}}': "0+90x60",
                       f'shoehorn_requests_total{{{A},key="k",outcome="rate_limit_exceeded"}}': "0+90x60",
                       f'shoehorn_requests_total{{{A},key="k",outcome="error"}}': "0+1x60"},
    "ShoehornEngineUnseen": {f'shoehorn_phase{{{A},phase="ready"}}': "0x60",
                             f"shoehorn_engine_scrape_success{{{A}}}": "0x60"},
    "ShoehornReplicaLost": {f'shoehorn_replica_up{{{A},replica="gpu1"}}': "1x10 0x1 1x50"},  # a restart
    "ShoehornReplicaNotReady": {f'shoehorn_replica_up{{{A},replica="gpu1"}}': "1x60",
                                f'shoehorn_replica_ready{{{A},replica="gpu1"}}': "0x10 1x50"},
    "ShoehornSlowFirstToken": {f'vllm:time_to_first_token_seconds_bucket{{{E},le="1.0"}}': "0+60x60",
                               f'vllm:time_to_first_token_seconds_bucket{{{E},le="+Inf"}}': "0+60x60",
                               f"vllm:time_to_first_token_seconds_count{{{E}}}": "0+60x60"},
    "ShoehornQueueNotDraining": {f"vllm:num_requests_waiting{{{E}}}": "60-1x60"},
    "ShoehornPreempting": {f"vllm:num_preemptions_total{{{E}}}": "0+1x60"},
    "ShoehornKvCacheFull": {f"vllm:kv_cache_usage_perc{{{E}}}": "0.99x60", f"vllm:num_requests_waiting{{{E}}}": "0x60"},
    "ShoehornVolumeFull": {f"shoehorn_models_volume_free_bytes{{{A}}}": "40x60",
                           f"shoehorn_models_volume_bytes{{{A}}}": "100x60"},
    "ShoehornGpuMissing": {f"shoehorn_gpu_collect_success{{{A}}}": "0x60"},  # a machine that never had one
    "ShoehornXid": {f'shoehorn_gpu_xid_errors_total{{{A},gpu="0",uuid="u",kind="hardware"}}': "1x60",  # long ago
                    f'shoehorn_gpu_xid_errors_total{{{A},gpu="0",uuid="u",kind="corrected"}}': "0+1x60",
                    f'shoehorn_gpu_xid_errors_total{{{A},gpu="0",uuid="u",kind="application"}}': "0+1x60"},
    "ShoehornVramHeadroom": {f'shoehorn_vram_bytes{{{A},gpu="0",part="free"}}': "100000000x60"},
    "ShoehornForeignProcess": {f'shoehorn_vram_bytes{{{A},gpu="0",part="other_processes"}}': "1000x60"},
    "ShoehornGpuHot": {f'shoehorn_gpu_throttled{{{A},gpu="0",uuid="u",reason="power_cap"}}': "1x60"},
}


MORE: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("ShoehornPullStalled", {f'shoehorn_phase{{{A},phase="pulling"}}': "1x60"}, True),  # the hub never answered
    ("ShoehornPullStalled", {f'shoehorn_phase{{{A},phase="pulling"}}': "0x60", f"shoehorn_download_bytes{{{A}}}":
                             "5x60"}, False),
    ("ShoehornLoadStalled", {f'shoehorn_phase{{{A},phase="loading"}}': "1x20 0x40",
                             f'shoehorn_phase{{{A},phase="ready"}}': "0x20 1x40"}, False),
    ("ShoehornLoadStalled", {f'shoehorn_phase{{{A},phase="verifying"}}': "1x60",
                             f"shoehorn_phase_progress_ratio{{{A}}}": "0.4x60"}, True),
    ("ShoehornLoadStalled", {f'shoehorn_phase{{{A},phase="loading"}}': "1x25 0x35",  # from one to the other and back
                             f'shoehorn_phase{{{A},phase="stepping_down"}}': "0x25 1x35"}, True),
    ("ShoehornEngineHung", {f"vllm:num_requests_running{{{E}}}": "0x60",  # idle
                            f"vllm:iteration_tokens_total_count{{{E}}}": "100x60"}, False),
    ("ShoehornNotReady", {f'shoehorn_phase{{{A},phase="ready"}}': "1x30 0x30",  # stopped while idle
                          f'shoehorn_phase{{{A},phase="idle"}}': "0x30 1x30"}, False),
    ("ShoehornNotReady", {f'shoehorn_phase{{{A},phase="ready"}}': "1x30 0x30",  # it does not come back
                          f'shoehorn_phase{{{A},phase="idle"}}': "0x30 1x5 0x25"}, True),
    ("ShoehornNotReady", {f'shoehorn_phase{{{A},phase="ready"}}': "1x44 0x2 1x20"}, False),  # a quick restart
    ("ShoehornDown", {f"up{{{A}}}": "1x48 0x1 1x20"}, False),  # a scrape that was lost
    ("ShoehornErrors", {f'shoehorn_requests_total{{{A},key="k",outcome="aborted"}}': "0+10x60"}, True),
)
"""(alert, series, whether it fires): what the two above leave open."""


def promtool(*arguments: str) -> str:
    """Its output; fails with it when promtool does."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules_test(path: Path, cases: dict[str, tuple[dict[str, str], list[dict[str, Any]]]], rules: Path = RULES) -> Path:
    """A file for `promtool test rules`: by alert, its series and the alerts expected at minute 50."""
    path.write_text(yaml.safe_dump({"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [{
        "name": alert, "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": "50m", "alertname": alert, "exp_alerts": expected}]}
        for alert, (series, expected) in cases.items()]}))
    return path


def fired(alert: str) -> list[dict[str, Any]]:
    rule, labels = ALERTS[alert], {**FIRING[alert][1], "instance": "a", **ALERTS[alert]["labels"]}
    summary = re.sub(r"{{ \$labels\.(\w+) }}", lambda match: labels[match[1]], rule["annotations"]["summary"])
    return [{"exp_labels": labels, "exp_annotations": {**rule["annotations"], "summary": summary}}]


def test_every_alert_is_tested() -> None:
    assert set(ALERTS) == set(FIRING) == set(QUIET)


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", str(RULES))


def test_promtool_accepts_the_configuration() -> None:
    promtool("check", "config", "--lint=all", "--lint-fatal", str(RULES.with_name("prometheus.yml")))


def test_alert_fires_under_its_condition(tmp_path: Path) -> None:
    cases = {alert: (series, fired(alert)) for alert, (series, _) in FIRING.items()}
    promtool("test", "rules", str(rules_test(tmp_path / "firing.yml", cases)))


def test_alert_stays_quiet_otherwise(tmp_path: Path) -> None:
    cases: dict[str, Any] = {alert: (series, []) for alert, series in QUIET.items()}
    promtool("test", "rules", str(rules_test(tmp_path / "quiet.yml", cases)))


@pytest.mark.parametrize(("alert", "series", "fires"), MORE)
def test_borderline_cases(tmp_path: Path, alert: str, series: dict[str, str], fires: bool) -> None:
    promtool("test", "rules", str(rules_test(tmp_path / "t.yml", {alert: (series, fired(alert) if fires else [])})))


def test_broken_rule_is_detected(tmp_path: Path) -> None:
    broken = tmp_path / "rules.yml"
    broken.write_text(RULES.read_text().replace("vllm:num_preemptions_total", "vllm:num_preemptions"))
    cases = {"ShoehornPreempting": (FIRING["ShoehornPreempting"][0], fired("ShoehornPreempting"))}
    done = subprocess.run(["promtool", "test", "rules", str(rules_test(tmp_path / "t.yml", cases, broken))],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode != 0


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_a_runbook(alert: str) -> None:
    annotations = ALERTS[alert]["annotations"]
    assert annotations["runbook"] == f"docs/monitoring.md#{alert.lower()}"
    document = (HOME / "docs" / "monitoring.md").read_text(encoding="utf-8")
    assert f"\n### {alert}\n" in document


def test_every_metric_of_a_rule_exists() -> None:
    known = {metric.name for metric in metrics.TABLE} | {name for name, _ in metrics.PER_KEY}
    dump = (HOME / "tests" / "captures" / "vllm-0.32.0-cpu-metrics.txt").read_text(encoding="utf-8")
    known |= set(re.findall(r"^([a-z_:]+)[{ ]", dump, re.MULTILINE)) | {"up"}
    for alert, rule in ALERTS.items():
        used = set(re.findall(r"\b(?:shoehorn_|vllm:|up\b)[a-z_]*", rule["expr"]))
        assert used, alert
        assert used <= known, (alert, used - known)
