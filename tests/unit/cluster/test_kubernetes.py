"""Manifests: Kubernetes and KubeRay take them, their run is a run, none is open to the world."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
from ruamel.yaml import YAML

from kuberay_schema import RESOURCES
from llm_training_toolkit.config import load_config
from llm_training_toolkit.plan import check_plan, estimate_on_cluster, make_plan
from llm_training_toolkit.plan.forecast.cluster_file import read_hardware

CLUSTER = Path(__file__).parents[3] / "cluster"
VERSION = "1.34"
"""Of Kubernetes."""


def _resources(path: Path) -> list[dict[str, Any]]:
    """The resources in a file, read as kubectl does: YAML 1.1, with JSON's types only."""
    documents = list(YAML(typ="safe").load_all(path))
    assert documents == json.loads(json.dumps(documents))
    return documents


def _is_manifest(path: Path) -> bool:
    return any("apiVersion" in document for document in YAML(typ="safe").load_all(path))


FILES = [path for path in sorted(CLUSTER.glob("*.yaml")) if _is_manifest(path)]
of_every_manifest = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def _pods(value: Any, schema: Any) -> list[dict[str, Any]]:
    """Every pod template in a resource, by its schema."""
    if schema.get("x-pod"):
        return [value]
    if isinstance(value, list):
        return [pod for item in value for pod in _pods(item, schema["items"])]
    known = schema.get("properties", {})
    if not isinstance(value, dict):
        return []
    return [pod for key, item in value.items() if key in known for pod in _pods(item, known[key])]


def _ray(path: Path) -> dict[str, Any]:
    """The one resource of KubeRay in a file."""
    [found] = [resource for resource in _resources(path) if resource["kind"] in RESOURCES]
    return found


def _cluster(path: Path) -> dict[str, Any]:
    spec: dict[str, Any] = _ray(path)["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return cluster


def check(resource: dict[str, Any]) -> int:
    """Judge a resource by its schema, its pods by that of Kubernetes; how many pods there were."""
    schema = RESOURCES.get(resource["kind"])
    if schema is None:
        kubernetes_validate.validate(resource, VERSION, strict=True)
        return 0
    jsonschema.validate(resource, schema)
    pods = _pods(resource, schema)
    for pod in pods:
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": pod}
        kubernetes_validate.validate(template, VERSION, strict=True)
    return len(pods)


def test_there_are_a_cluster_and_a_job() -> None:
    assert [path.name for path in FILES] == ["kuberay-cluster.yaml", "kuberay-job.yaml"]


@of_every_manifest
def test_kubernetes_and_kuberay_take_every_manifest(path: Path) -> None:
    assert sum(check(resource) for resource in _resources(path)) == 2  # the pods of head and workers


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("spec", "backOffLimit"), 3),
        (("spec", "submissionMode"), "K8SJobMode"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "restartPolicies"), "Never"),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "terminationGracePeriodSeconds"), "1h"),
    ],
)
def test_mistakes_are_found(keys: tuple[str, ...], value: object) -> None:
    resource = _ray(CLUSTER / "kuberay-job.yaml")
    section = resource
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(resource)


@of_every_manifest
def test_every_pod_wants_a_token(path: Path) -> None:
    assert _cluster(path)["authOptions"] == {"mode": "token"}
    assert "RAY_AUTH_MODE" in path.read_text()  # said to whoever reads the file
    assert "LoadBalancer" not in path.read_text()


@of_every_manifest
def test_the_hardware_is_that_of_the_workers(path: Path) -> None:
    [group] = _cluster(path)["workerGroupSpecs"]
    hardware, pod = read_hardware(path), group["template"]["spec"]
    [container] = pod["containers"]
    limits = container["resources"]["limits"]
    assert hardware.nodes == group["maxReplicas"]
    assert hardware.devices_per_node == int(limits["nvidia.com/gpu"])
    assert hardware.cpus == int(limits["cpu"])
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@of_every_manifest
def test_pods_see_the_shared_storage_and_enough_shared_memory(path: Path) -> None:
    cluster, shared = _cluster(path), read_hardware(path).shared_storage
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert "persistentVolumeClaim" in volumes[mounts[shared]]
        if group is not cluster["headGroupSpec"]:
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claims = {
        resource["metadata"]["name"] for resource in _resources(path) if resource["kind"] == "PersistentVolumeClaim"
    }
    assert claims == {"ltt-shared"}


def test_the_job_runs_a_run_that_fits_its_cluster(tmp_path: Path) -> None:
    path = CLUSTER / "kuberay-job.yaml"
    job = _ray(path)
    [map_] = [resource for resource in _resources(path) if resource["kind"] == "ConfigMap"]
    assert job["spec"]["entrypoint"] == "exec ltt train /etc/ltt/run.yaml"
    assert "run.yaml" in map_["data"]
    file = tmp_path / "run.yaml"
    file.write_text(map_["data"]["run.yaml"])
    config = load_config(file)
    hardware = read_hardware(path)
    plan = check_plan(make_plan(config))
    assert not estimate_on_cluster(config, plan, hardware).problems
    assert config.run.dir.startswith(hardware.shared_storage)


def test_the_job_is_retried_queued_and_stopped_with_a_checkpoint() -> None:
    job = _ray(CLUSTER / "kuberay-job.yaml")
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # or Kueue refuses it
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    # Kueue refuses a cluster that changes its size without this.
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert job["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    environment = YAML(typ="safe").load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 600
