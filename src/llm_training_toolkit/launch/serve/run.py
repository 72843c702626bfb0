"""Runs the server until a stop signal: starts Ray and Ray Serve, and leaves nothing behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import ray.exceptions
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray.cluster import connect_to_cluster
from llm_training_toolkit.launch.serve.deployment import build_deployment
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.serving.settings import ServingSettings
from llm_training_toolkit.setup.machine import is_local

_APPLICATION = "ltt"
_SERVE_CONTROLLER = "SERVE_CONTROLLER_ACTOR"  # named by Ray Serve
_PROXY_SPARE_SECONDS = 30.0  # the proxy gives up later than the server, whose error says more


@dataclass(frozen=True)
class ServeRequest:
    """Input of `serve_until_stopped`: the server's settings, its address, and its replicas."""

    settings: ServingSettings
    host: str
    port: int
    replicas: int = 1


def serve_until_stopped(request: ServeRequest, console: Console, announce: Callable[[], None]) -> None:
    """Serve until KeyboardInterrupt; `announce` is called once requests are answered.

    Raises LaunchError if Ray Serve already runs on the cluster, and if the model cannot be loaded.
    """
    with connect_to_cluster(console), _start_ray_serve(request):
        _deploy(request, console)
        announce()
        threading.Event().wait()


@contextmanager
def _start_ray_serve(request: ServeRequest) -> Iterator[None]:
    if not is_local() and _is_serve_running():
        raise LaunchError(
            f"Ray Serve runs on the cluster at {os.environ['RAY_ADDRESS']} already, with an address of its own: add "
            "the model to it with `serve deploy` (docs/serving.md)"
        )
    timeout = request.settings.limits.timeout + _PROXY_SPARE_SECONDS
    http = HTTPOptions(host=request.host, port=request.port, request_timeout_s=timeout)
    try:
        serve.start(proxy_location="HeadOnly", http_options=http)
        yield
    finally:
        serve.shutdown()


def _is_serve_running() -> bool:
    """Return whether the cluster has a Ray Serve, also one without an address or without applications."""
    found = serve.status()
    if found.proxies or found.applications:
        return True
    return any(actor["name"] == _SERVE_CONTROLLER for actor in ray.util.list_named_actors(all_namespaces=True))


def _deploy(request: ServeRequest, console: Console) -> None:
    """Start the replicas, and wait until they have loaded the model. Raises LaunchError with their reason."""
    resources = ray.cluster_resources()
    gpus = int(request.settings.device != "cpu" and resources.get("GPU", 0) >= request.replicas)
    # Ray lets a replica compute with as many threads as it has CPUs.
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cpus = 1 if gpus else compute_replica_cpus(nodes, request.replicas)
    console.update_stage("loading the model", 0, 1)
    application = build_deployment(request.settings, replicas=request.replicas, cpus=cpus, gpus=gpus)
    try:
        serve.run(application, name=_APPLICATION, route_prefix="/")
    except (RuntimeError, RayServeException, ray.exceptions.RayError) as error:
        raise LaunchError(f"{request.settings.model}: {_find_cause(str(error))}") from error
    console.update_stage("loading the model", 1, 1)


def compute_replica_cpus(nodes: Sequence[int], replicas: int) -> int:
    """Return the most CPUs of each replica with which all fit on nodes of so many CPUs; at least 1."""
    sizes = range(max(nodes, default=1), 0, -1)
    return next((size for size in sizes if sum(cpus // size for cpus in nodes) >= replicas), 1)


def _find_cause(message: str) -> str:
    """Return the exception at the end of a replica's traceback, without its class."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    causes = [line for line in lines if line.startswith("llm_training_toolkit.errors.")]
    return causes[-1].partition(": ")[2] if causes else (lines or ["Ray Serve gives no reason; its logs may"])[-1]
