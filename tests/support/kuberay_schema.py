"""JSON schemas of RayCluster and RayJob, by hand from KubeRay's API reference (1.7): the fields that manifests here use
and their neighbours, with `"x-pod": true` where a pod template stands, which Kubernetes' own schema judges.

KubeRay's own definition is generated, half a megabyte, nearly all of it the pod template. Kubernetes drops fields that
it does not know without an error unless it is asked to be strict: a misspelt one would simply do nothing.
"""

from typing import Any

_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_COUNT = {"type": "integer", "minimum": 0}
_POD: dict[str, Any] = {"type": "object", "x-pod": True}


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


_METADATA = _object(
    {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": _TEXTS, "annotations": _TEXTS}, "name"
)
_HEAD = _object(
    {
        "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
        "enableIngress": {"type": "boolean"},
        "rayStartParams": _TEXTS,
        "labels": _TEXTS,
        "resources": _TEXTS,
        "template": _POD,
    },
    "template",
)
_WORKERS = _object(
    {
        "groupName": {"type": "string"},
        "replicas": _COUNT,
        "minReplicas": _COUNT,
        "maxReplicas": _COUNT,
        "numOfHosts": {"type": "integer", "minimum": 1},
        "idleTimeoutSeconds": _COUNT,
        "suspend": {"type": "boolean"},
        "rayStartParams": _TEXTS,
        "labels": _TEXTS,
        "resources": _TEXTS,
        "template": _POD,
    },
    "groupName",
    "minReplicas",
    "maxReplicas",
    "template",
)
_AUTOSCALER = _object(
    {
        "version": {"enum": ["v1", "v2"]},
        "idleTimeoutSeconds": _COUNT,
        "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
        "image": {"type": "string"},
        "imagePullPolicy": {"enum": ["Always", "Never", "IfNotPresent"]},
        "resources": {"type": "object"},
        "env": {"type": "array"},
    }
)
CLUSTER_SPEC = _object(
    {
        "rayVersion": {"type": "string"},
        "authOptions": _object(
            {
                "mode": {"enum": ["disabled", "token"]},
                "secretName": {"type": "string"},
                "enableK8sTokenAuth": {"type": "boolean"},
            }
        ),
        "suspend": {"type": "boolean"},
        "managedBy": {"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": _AUTOSCALER,
        "headServiceAnnotations": _TEXTS,
        "gcsFaultToleranceOptions": {"type": "object"},
        "headGroupSpec": _HEAD,
        "workerGroupSpecs": {"type": "array", "items": _WORKERS},
    },
    "headGroupSpec",
)
JOB_SPEC = _object(
    {
        "entrypoint": {"type": "string"},
        "runtimeEnvYAML": {"type": "string"},
        "metadata": _TEXTS,
        "jobId": {"type": "string"},
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        "submitterConfig": _object({"backoffLimit": _COUNT}),
        "submitterPodTemplate": _POD,
        "entrypointNumCpus": {"type": "number"},
        "entrypointNumGpus": {"type": "number"},
        "entrypointResources": {"type": "string"},
        "clusterSelector": _TEXTS,
        "managedBy": {"enum": ["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"]},
        "suspend": {"type": "boolean"},
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": _COUNT,
        "deletionStrategy": {"type": "object"},
        "backoffLimit": _COUNT,
        "activeDeadlineSeconds": {"type": "integer", "minimum": 1},
        "preRunningDeadlineSeconds": {"type": "integer", "minimum": 1},
        "rayClusterSpec": CLUSTER_SPEC,
    }
)


def _resource(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    named = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": _METADATA, "spec": spec}
    return _object(named, "apiVersion", "kind", "metadata", "spec")


RESOURCES = {"RayCluster": _resource("RayCluster", CLUSTER_SPEC), "RayJob": _resource("RayJob", JOB_SPEC)}
"""The schema of each kind."""
