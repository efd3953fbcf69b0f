"""The chart for Kubernetes: rendered by Helm, validated strictly for each version, read by the settings.

No cluster runs it here. Kinds of other projects (LeaderWorkerSet, PodMonitor, ScaledObject) have no schema here: the
pods in them are validated as pods, and their own fields compared with the ones that their API defines.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoehorn.cluster import ports
from shoehorn.common.paths import HOME
from shoehorn.config.replicas import DEFAULT_PORT
from shoehorn.config.secrets import is_secret
from shoehorn.config.settings import TABLE, load

pytestmark = pytest.mark.chart

CHART = HOME / "deploy" / "chart"
TOOLS = Path(os.environ.get("CHART_TOOLS", HOME / ".venv-chart"))
VERSIONS = [f"1.{minor}" for minor in range(29, 38)]
MATRIX: dict[str, dict[str, Any]] = {
    "default": {},
    "replicas": {"replicas": 3},
    "alone": {"front": {"enabled": False}},
    "alone-tls": {"front": {"enabled": False}, "secrets": {"tls": {"name": "tls"}, "apiKeys": {"name": "keys"}}},
    "group": {"nodes": 2, "front": {"enabled": False}},
    "groups": {"nodes": 2, "replicas": 2, "gpus": 4},
    "cpu": {"gpus": 0, "image": {"tag": "cpu"}, "settings": {"VRAM_PROFILE": "cpu", "LOG_FORMAT": "json"}},
    "secrets": {"secrets": {"tls": {"name": "tls"}, "apiKeys": {"name": "keys", "key": "api.txt"},
                            "hfToken": {"name": "hub"}, "modelscopeToken": {"name": "hub", "key": "ms"}},
                "model": {"id": "Qwen/Qwen3-8B", "source": "huggingface", "servedName": "qwen, alias"}},
    "monitored": {"podMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    "scaled": {"autoscaling": {"enabled": True, "maxReplicas": 5}},
    "scaled-groups": {"nodes": 3, "autoscaling": {"enabled": True}},
    "placed": {"nodeSelector": {"gpu": "yes"}, "tolerations": [{"key": "gpu", "operator": "Exists"}],
               "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
                                              "whenUnsatisfiable": "ScheduleAnyway"}],
               "imagePullSecrets": [{"name": "registry"}], "podAnnotations": {"a": "b"},
               "storage": {"size": "300Gi", "className": "fast"}},
    "open": {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
    "closed": {"networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "chat"}}}], "monitoring": []}},
}
GROUP_FIELDS = {"replicas", "startupPolicy", "networkConfig", "rolloutStrategy", "leaderWorkerTemplate"}
GROUP_TEMPLATE_FIELDS = {"size", "restartPolicy", "leaderTemplate", "workerTemplate", "volumeClaimTemplates"}


def helm(*words: str, values: dict[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run Helm with values from standard input."""
    return subprocess.run([str(TOOLS / "bin" / "helm"), *words, "--values", "-"], input=json.dumps(values or {}),
                          capture_output=True, text=True, check=False, timeout=60)


@cache
def rendered(case: str) -> tuple[dict[str, Any], ...]:
    """Render the manifests of a case of the matrix."""
    done = helm("template", "demo", str(CHART), "--namespace", "llm", values=MATRIX[case])
    assert done.returncode == 0, done.stderr
    return tuple(document for document in yaml.safe_load_all(done.stdout) if document)


def of_kind(case: str, kind: str) -> list[dict[str, Any]]:
    """Return the manifests of a kind."""
    return [document for document in rendered(case) if document["kind"] == kind]


def pods(case: str) -> Iterator[dict[str, Any]]:
    """Yield the templates of all pods."""
    for document in rendered(case):
        if document["kind"] in ("StatefulSet", "Deployment"):
            yield document["spec"]["template"]
        elif document["kind"] == "LeaderWorkerSet":
            yield document["spec"]["leaderWorkerTemplate"]["leaderTemplate"]
            yield document["spec"]["leaderWorkerTemplate"]["workerTemplate"]


def environment(pod: dict[str, Any]) -> dict[str, str]:
    """Return the variables of a pod's container, with what Kubernetes and LeaderWorkerSet fill in."""
    return {each["name"]: "10.1.2.3" if "valueFrom" in each else
            each["value"].replace("$(LWS_LEADER_ADDRESS)", "demo-shoehorn-replica-0.demo-shoehorn-replica.llm")
            for each in pod["spec"]["containers"][0]["env"]}


def validate(manifests: list[dict[str, Any]], *versions: str) -> list[str]:
    """Return the problems of manifests."""
    done = subprocess.run([str(TOOLS / "bin" / "python"), str(HOME / "tools" / "validate_manifests.py"), *versions],
                          input=json.dumps(manifests), capture_output=True, text=True, check=True, timeout=300)
    problems: list[str] = json.loads(done.stdout)
    return problems


def core(case: str) -> list[dict[str, Any]]:
    """Return the manifests that Kubernetes' own schemas cover; pods and claims of groups in place of the group."""
    manifests = [document for document in rendered(case)
                 if document["kind"] not in ("LeaderWorkerSet", "PodMonitor", "ScaledObject")]
    for group in of_kind(case, "LeaderWorkerSet"):
        manifests += [{"apiVersion": "v1", "kind": "Pod", **template} for template in pods(case)]
        manifests += [{"apiVersion": "v1", "kind": "PersistentVolumeClaim", **claim}
                      for claim in group["spec"]["leaderWorkerTemplate"]["volumeClaimTemplates"]]
    return manifests


@pytest.mark.parametrize("case", MATRIX)
def test_lint_accepts_the_values(case: str) -> None:
    done = helm("lint", "--strict", str(CHART), values=MATRIX[case])
    assert done.returncode == 0, done.stdout


def test_manifests_are_valid_in_each_version_of_kubernetes() -> None:
    unique = {json.dumps(manifest, sort_keys=True): manifest for case in MATRIX for manifest in core(case)}
    assert len(unique) > 30
    assert validate(list(unique.values()), *VERSIONS) == []


@pytest.mark.parametrize("change", [
    ("readinessProbe", {"httpget": {"path": "/readyz", "port": 6333}}), ("stdin_once", True),
    ("resources", {"limits": [1]})])
def test_mistake_in_a_manifest_is_reported(change: tuple[str, Any]) -> None:
    manifest = json.loads(json.dumps(of_kind("default", "StatefulSet")[0]))
    manifest["spec"]["template"]["spec"]["containers"][0][change[0]] = change[1]
    assert len(validate([manifest], "1.29", "1.37")) == 2


@pytest.mark.parametrize("case", MATRIX)
def test_environment_is_accepted_by_the_settings(case: str) -> None:
    names = {setting.name for setting in TABLE} | {f"{setting.name}_FILE" for setting in TABLE if setting.secret}
    roles = []
    for pod in pods(case):
        variables = environment(pod)
        assert set(variables) <= names
        settings = load(variables, read_file=lambda path: "hub-token")
        roles.append(settings.role)
        claims = {mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert str(settings.models_dir) in claims
        assert str(settings.run_dir.parent) in claims
        for file in (settings.cluster_secret_file, settings.api_keys_file, settings.tls_cert_file):
            assert file is None or str(file.parent) in claims
        if settings.role != "front":
            assert settings.cluster_nodes == MATRIX[case].get("nodes")
    assert roles == ["front"] * (MATRIX[case].get("front") is None) + (
        ["head", "worker"] if "nodes" in MATRIX[case] else ["single"])


@pytest.mark.parametrize("case", MATRIX)
def test_pods_are_restricted_and_have_time_to_drain(case: str) -> None:
    for pod in pods(case):
        spec, container = pod["spec"], pod["spec"]["containers"][0]
        security = spec["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 10001)
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                                "capabilities": {"drop": ["ALL"]}}
        assert not spec["automountServiceAccountToken"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert {next(iter(set(volume) - {"name"})) for volume in spec["volumes"]} <= {
            "emptyDir", "secret", "persistentVolumeClaim"}  # no host path
        assert all(volume["secret"]["defaultMode"] & 0o007 == 0 for volume in spec["volumes"] if "secret" in volume)
        assert spec["terminationGracePeriodSeconds"] == int(environment(pod)["DRAIN_TIMEOUT"]) + 60
        probes = {name: container[name]["httpGet"]["path"] for name in (
            "startupProbe", "livenessProbe", "readinessProbe")}
        assert probes == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
        if environment(pod).get("ROLE") != "front":
            shm = next(volume for volume in spec["volumes"] if volume["name"] == "shm")
            assert shm["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("case", MATRIX)
def test_manifests_contain_references_to_secrets_only(case: str) -> None:
    assert not of_kind(case, "Secret")
    for pod in pods(case):
        for name, value in environment(pod).items():
            assert not is_secret(name) or name.endswith("_FILE"), name
            assert not name.endswith("_FILE") or value.startswith("/run/secrets/")


@pytest.mark.parametrize("case", ["default", "replicas", "groups", "scaled", "scaled-groups"])
def test_front_knows_the_names_of_all_replicas(case: str) -> None:
    front, replica, *_ = pods(case)
    settings = load(environment(front))
    workload, = of_kind(case, "StatefulSet") + of_kind(case, "LeaderWorkerSet")
    name = workload["metadata"]["name"]
    values = MATRIX[case]
    number = values["autoscaling"].get("maxReplicas", 4) if "autoscaling" in values else values.get("replicas", 1)
    assert [each.host for each in settings.replicas] == [
        f"{name}-{index}.{name}.llm.svc.cluster.local" for index in range(number)]
    assert load(environment(replica)).replica_port == DEFAULT_PORT == settings.replicas[0].port
    assert ("replicas" in workload["spec"]) is ("autoscaling" not in values)
    if workload["kind"] == "StatefulSet":
        service = next(each for each in of_kind(case, "Service") if each["metadata"]["name"] == name)
        assert workload["spec"]["serviceName"] == name
        assert (service["spec"]["clusterIP"], service["spec"]["publishNotReadyAddresses"]) == ("None", True)


@pytest.mark.parametrize("case", MATRIX)
def test_selectors_match_pods(case: str) -> None:
    labels = [pod["metadata"]["labels"] for pod in pods(case)]
    for document in rendered(case):
        spec = document["spec"]
        if document["kind"] == "Service":
            selected = [each for each in labels if spec["selector"].items() <= each.items()]
            assert len(selected) == 1, document
        elif document["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            selector = spec.get("podSelector") or spec["selector"]
            assert any(selector.get("matchLabels", {}).items() <= each.items() for each in labels)


def test_replicas_take_requests_of_the_front_only_and_groups_are_closed() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind("groups", "NetworkPolicy")}
    assert set(policies) == {f"demo-shoehorn-{name}" for name in ("public", "metrics", "replica", "group")}
    public = policies["demo-shoehorn-public"]
    assert public["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "front"
    replica, = policies["demo-shoehorn-replica"]["ingress"]
    assert replica["ports"] == [{"port": DEFAULT_PORT}]
    assert replica["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "front"
    group, = policies["demo-shoehorn-group"]["ingress"]
    assert set(group) == {"from"}  # every port, among the pods of groups
    assert group["from"][0]["podSelector"]["matchExpressions"][0]["values"] == ["replica", "node"]


def test_group_has_the_fields_of_its_api_and_the_ports_of_ray() -> None:
    for case in ("group", "groups", "scaled-groups"):
        group, = of_kind(case, "LeaderWorkerSet")
        assert group["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
        assert set(group["spec"]) <= GROUP_FIELDS
        template = group["spec"]["leaderWorkerTemplate"]
        assert set(template) == GROUP_TEMPLATE_FIELDS
        assert (template["restartPolicy"], template["size"]) == ("None", MATRIX[case]["nodes"])
        for pod in (template["leaderTemplate"], template["workerTemplate"]):
            sysctl, = pod["spec"]["securityContext"]["sysctls"]
            assert sysctl["value"] == f"{ports.EPHEMERAL.start} {ports.EPHEMERAL.stop - 1}"


def test_scaler_names_the_workload_and_a_metric_of_the_engine() -> None:
    for case, kind in (("scaled", "StatefulSet"), ("scaled-groups", "LeaderWorkerSet")):
        scaler, = of_kind(case, "ScaledObject")
        workload, = of_kind(case, kind)
        target = scaler["spec"]["scaleTargetRef"]
        assert target == {"apiVersion": workload["apiVersion"], "kind": kind, "name": workload["metadata"]["name"]}
        query = scaler["spec"]["triggers"][0]["metadata"]["query"]
        assert 'vllm:num_requests_waiting{job="shoehorn",namespace="llm",pod=~"demo-shoehorn-replica-.*"}' in query
    monitor, = of_kind("monitored", "PodMonitor")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == "metrics"


@pytest.mark.parametrize(("values", "named"), [
    ({"replicas": 2, "front": {"enabled": False}}, "front.enabled"), ({"replica": 2}, "replica"),
    ({"settings": {"HF_TOKEN": "hf_x"}}, "HF_TOKEN"), ({"settings": {"ROLE": "front"}}, "ROLE"),
    ({"settings": {"API_KEY": "sk-x"}}, "API_KEY"), ({"replicas": 0}, "replicas"), ({"storage": {"size": "1"}}, "size"),
    ({"autoscaling": {"enabled": True, "minReplicas": 5, "maxReplicas": 2}}, "minReplicas"),
    ({"secrets": {"cluster": {"name": ""}}}, "secrets.cluster.name")])
def test_contradicting_values_are_refused(values: dict[str, Any], named: str) -> None:
    done = helm("template", "demo", str(CHART), values=values)
    assert done.returncode != 0
    assert named in done.stderr
