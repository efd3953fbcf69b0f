"""A real Prometheus scrapes the running appliance: every query of a panel returns data, every rule has its metrics.

The engine is the real one on the CPU. A second exporter over the same run directory replays NVML as recorded on an
H200, with the memory that an engine on a GPU would have reported, so that the panels of the GPU have data.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fakes.ports import free_port
from shoehorn.common.paths import HOME
from shoehorn.runtime.run_dir import RunDir
from shoehorn.runtime.state import StateFile
from support.running import Appliance
from support.waiting import wait_until

pytestmark = pytest.mark.engine

DASHBOARDS = sorted((HOME / "monitoring" / "grafana" / "dashboards").glob("*.json"))
EXPORTER = """
import json, os, sys
from pathlib import Path
from fakes.nvml import FakeNvml
from shoehorn.observability import exporter
nvml = FakeNvml(json.loads(Path(sys.argv[1]).read_text()))
gpu = nvml.capture["gpus"][0]  # recorded idle: now it has the memory of the engine, and a power cap
gpu["nvmlDeviceGetCurrentClocksEventReasons"] = 0x4
gpu["nvmlDeviceGetMemoryInfo_v2"]["used"] += 490 << 20
gpu["nvmlDeviceGetMemoryInfo_v2"]["free"] -= 490 << 20
gpu["nvmlDeviceGetComputeRunningProcesses"] = [{"pid": os.getpid(), "usedGpuMemory": 490 << 20}]
sys.exit(exporter.main(os.environ, nvml))
"""
MEMORY = tuple({"gpu": 0, "part": part, "expected_bytes": size, "measured_bytes": size} for part, size in (
    ("weights", 100 << 20), ("kv_cache", 80 << 20), ("cuda_graphs", 10 << 20), ("framework", 300 << 20),
    ("total", 490 << 20)))
CONCURRENCY = {1: "1", 3: "2 to 3", 6: "4 to 7", 12: "8 to 15"}
"""Concurrent requests, and the bar that shows them: the CPU profile runs eight, and four wait, so that eight run."""

EMPTY = re.compile(r" by concurrency: (16 to 31|32 to 63|64 or more)$")
"""Queries without data here: more concurrent requests than there were."""

OF_FRONT = {"shoehorn_replica_up", "shoehorn_replica_ready"}
"""Metrics of ROLE=front alone."""


class Prometheus:
    """A running Prometheus and its API."""

    def __init__(self, home: Path, target: int) -> None:
        self.port = free_port()
        config = yaml.safe_load((HOME / "monitoring" / "prometheus" / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{target}"]
        config["rule_files"] = [str(HOME / "monitoring" / "prometheus" / "rules.yml")]
        (home / "prometheus.yml").write_text(yaml.safe_dump(config))
        with (home / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                ["prometheus", f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/data",
                 f"--web.listen-address=127.0.0.1:{self.port}"], stdout=log, stderr=subprocess.STDOUT)

    def ask(self, path: str, **parameters: str) -> Any:
        """Return `data` of an API answer."""
        answer = httpx.get(f"http://127.0.0.1:{self.port}/api/v1/{path}", params=parameters, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def values(self, query: str) -> list[float]:
        """Return the samples of an instant query that are numbers."""
        samples = [float(sample["value"][1]) for sample in self.ask("query", query=query)["result"]]
        return [value for value in samples if not math.isnan(value)]

    def up(self) -> bool:
        """Return True if it is ready and has scraped."""
        try:
            ready = httpx.get(f"http://127.0.0.1:{self.port}/-/ready", timeout=60).status_code == 200
        except httpx.TransportError:
            return False
        return ready and bool(self.values('up{job="shoehorn"} == 1'))


@pytest.fixture(scope="module")
def prometheus(shared_appliance: Appliance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    home = tmp_path_factory.mktemp("prometheus")
    before = StateFile(shared_appliance.run_dir).read()
    StateFile(shared_appliance.run_dir).update(memory=MEMORY, failures={"killed": 1}, bytes_done=7, bytes_total=7,
                                               progress=1.0)
    experts = RunDir(shared_appliance.run_dir).expert_lookups  # as an engine on a GPU with a cache of experts writes it
    experts.parent.mkdir(exist_ok=True)
    experts.write_text(json.dumps({"gpu": 30, "cpu": 10}), encoding="utf-8")
    port = free_port()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{HOME / 'src'}:{HOME / 'tests'}",
                   "RUN_DIR": str(shared_appliance.run_dir), "MODELS_DIR": str(shared_appliance.models_dir),
                   "METRICS_PORT": str(port)}
    with subprocess.Popen([sys.executable, "-c", EXPORTER, str(HOME / "tests" / "captures" / "nvml-h200.json")],
                          env=environment) as exporter:
        running = Prometheus(home, port)
        try:
            wait_until(running.up, 30, "the first scrape")
            experts.write_text(json.dumps({"gpu": 60, "cpu": 20}), encoding="utf-8")
            for number, bars in CONCURRENCY.items():
                seen, queries = threading.Event(), by_concurrency(bars)
                with ThreadPoolExecutor(number) as pool:
                    asking = [pool.submit(send_until, shared_appliance, seen) for _ in range(number)]
                    try:
                        time.sleep(3.0)  # three samples, more if the machine is busy
                        wait_until(lambda queries=queries: all(map(running.values, queries)), 60,
                                   f"{number} concurrent requests")
                    finally:
                        seen.set()
                for each in asking:
                    each.result()
            wait_until(lambda: running.values("sum(increase(vllm:request_success_total[1m])) > 0"), 30,
                       "a count of requests")
            yield running
        finally:
            running.process.terminate()
            running.process.wait(60)
            exporter.terminate()
            experts.unlink()
            StateFile(shared_appliance.run_dir).update(
                memory=before.memory, failures=before.failures, progress=before.progress, bytes_done=before.bytes_done,
                bytes_total=before.bytes_total)


def send_until(appliance: Appliance, seen: threading.Event) -> None:
    """Send one request after another until `seen` is set."""
    while not seen.is_set():
        answer = httpx.post(f"{appliance.url}/v1/chat/completions", headers=appliance.headers(), timeout=60, json={
            "model": "shoehorn-demo", "max_tokens": 200, "ignore_eos": True,
            "messages": [{"role": "user", "content": "hello, and once more hello " * 4}]})
        assert answer.status_code == 200, answer.text


def filled(query: str, interval: str = "10s") -> str:
    """Return a query of a panel with values for Grafana's variables."""
    for variable, value in (("$__rate_interval", interval), ("$__range", "5m"), ("$__interval", "1s"),
                            ("$instance", ".+"), ("$gpu", "0")):
        query = query.replace(variable, value)
    return query


def by_concurrency(bars: str) -> list[str]:
    """Return the queries of the bars with this name."""
    panels = json.loads((HOME / "monitoring" / "grafana" / "dashboards" / "capacity.json").read_text())["panels"]
    queries = [filled(target["expr"]) for panel in panels if panel["title"].endswith(" by concurrency")
             for target in panel["targets"] if target["legendFormat"] == bars]
    assert len(queries) == 3
    return queries


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_has_data(prometheus: Prometheus, path: Path) -> None:
    empty, expected = set(), set()
    for panel in json.loads(path.read_text())["panels"]:
        for target in panel["targets"]:
            name = f"{panel['title']}: {target['legendFormat']}"
            expected |= {name} if EMPTY.search(name) else set()
            if not prometheus.values(filled(target["expr"], interval="5m")):  # which covers all the requests
                empty.add(name)
    assert empty == expected


def test_token_rates_are_shown_by_concurrency(prometheus: Prometheus) -> None:
    panels = json.loads((HOME / "monitoring" / "grafana" / "dashboards" / "capacity.json").read_text())["panels"]
    [bars] = [panel for panel in panels if panel["title"] == "Tokens a second by concurrency"]
    rates = {}
    for target in bars["targets"]:
        rates[target["legendFormat"]] = prometheus.values(filled(target["expr"], interval="5s"))
    assert min(rates["8 to 15"][0], rates["1"][0]) > 0


def test_every_metric_of_a_rule_exists(prometheus: Prometheus) -> None:
    names = set(prometheus.ask("label/__name__/values"))
    rules = yaml.safe_load((HOME / "monitoring" / "prometheus" / "rules.yml").read_text())
    used = {name for group in rules["groups"] for rule in group["rules"]
            for name in re.findall(r"\b(?:shoehorn_|vllm:|up\b)[a-z_]*", rule["expr"])}
    assert used - names == OF_FRONT


def test_rules_are_loaded_and_none_fires(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {rule["alert"] for group in yaml.safe_load(
        (HOME / "monitoring" / "prometheus" / "rules.yml").read_text())["groups"] for rule in group["rules"]}
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []


def test_memory_parts_of_a_gpu_add_up_to_its_total(prometheus: Prometheus) -> None:
    [total] = prometheus.values('shoehorn_gpu_memory_total_bytes{gpu="0"}')
    assert prometheus.values('sum(shoehorn_vram_bytes{gpu="0"})') == [total]


def test_broken_query_returns_no_data(prometheus: Prometheus) -> None:
    assert prometheus.values("sum(rate(vllm:generation_tokens[1m]))") == []
