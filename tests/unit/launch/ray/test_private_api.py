"""The private names of Ray in `launch/ray/private_api.py`, against the installed Ray: an update fails here by name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

import llm_training_toolkit.launch

LAUNCH = Path(llm_training_toolkit.launch.__file__).parent
FILE = "ray/private_api.py"
# Parameters of every private function and method, as private_api.py calls them.
PARAMETERS = {
    "ray._private.state.available_resources_per_node": [],
    "ray._private.state.jobs": [],
    "ray._private.state.GlobalState.get_draining_nodes": ["self"],
    "ray._private.state.GlobalState.actor_table": ["self", "actor_id", "job_id", "actor_state_name"],
    "ray._private.state.GlobalState._connect_and_get_accessor": ["self"],
    "ray._private.runtime_env.packaging._get_excludes": ["path", "excludes"],
    "ray._private.runtime_env.packaging._dir_travel": ["path", "excludes", "handler", "include_gitignore", "logger"],
    "ray._raylet.GlobalStateAccessor.get_placement_group_table": ["self"],
    "ray._raylet.InnerGcsClient.get_cluster_status": ["self", "timeout_s"],
    "ray._raylet.InnerGcsClient.drain_node": [
        "self", "node_id", "reason", "reason_message", "deadline_timestamp_ms", "timeout"
    ],
    "ray.autoscaler.v2.utils.is_autoscaler_v2": ["fetch_from_server", "gcs_client"],
    "ray.job_config.JobConfig._runtime_env_has_working_dir": ["self"],
    "ray.util.placement_group.PlacementGroup.__init__": ["self", "id", "bundle_cache"],
}  # fmt: skip
# Fields of Ray's messages that private_api.py reads.
FIELDS = {
    "gcs_pb2.PlacementGroupTableData": {"creator_job_id", "state", "bundles"},
    "common_pb2.Bundle": {"unit_resources"},
    "common_pb2.ActorDeathCause": {"oom_context", "actor_died_error_context"},
    "common_pb2.ActorDiedErrorContext": {"reason", "error_message"},
    "common_pb2.OomContext": {"error_message"},
    "autoscaler_pb2.GetClusterStatusReply": {"autoscaling_state"},
    "autoscaler_pb2.AutoscalingState": {
        "autoscaler_state_version",
        "pending_instance_requests",
        "pending_instances",
        "failed_instance_requests",
        "infeasible_cluster_resource_constraints",
    },
    "autoscaler_pb2.PendingInstanceRequest": {"ray_node_type_name", "count"},
    "autoscaler_pb2.PendingInstance": {"ray_node_type_name"},
    "autoscaler_pb2.FailedInstanceRequest": {"ray_node_type_name", "reason"},
    "autoscaler_pb2.ClusterResourceConstraint": {"resource_requests"},
    "autoscaler_pb2.ResourceRequestByCount": {"request", "count"},
    "autoscaler_pb2.ResourceRequest": {"resources_bundle"},
}
# Values of Ray's enumerations that private_api.py reads or sends.
VALUES = {
    "autoscaler_pb2.DrainNodeReason": {"DRAIN_NODE_REASON_PREEMPTION"},
    "common_pb2.ActorDiedErrorContext.Reason": {"NODE_DIED", "WORKER_DIED"},
    "gcs_pb2.PlacementGroupTableData.PlacementGroupState": {"CREATED"},
}
# Strings in Ray's source: attributes and keys that exist at run time only.
SOURCES = {
    "ray._private.node.Node": ["def node_id", "def node_ip_address"],
    "ray.dashboard.modules.dashboard_sdk.SubmissionClient": ["self._server_ray_version ="],
    "ray._private.state.GlobalState": ['"State"', '"DeathCause"', '"JobID"', '"Entrypoint"'],
}


def resolve(name: str) -> Any:
    """Return a module, or an attribute of one, by its dotted name."""
    words = name.split(".")
    inside = next(count for count in range(len(words), 0, -1) if is_module(".".join(words[:count])))
    found: Any = importlib.import_module(".".join(words[:inside]))
    for word in words[inside:]:
        assert hasattr(found, word), f"Ray {ray.__version__} has no {name} any more: see {FILE}"
        found = getattr(found, word)
    return found


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_docstring_names_the_installed_ray() -> None:
    written = f"Written for Ray {ray.__version__.rpartition('.')[0]}."
    assert written in (ast.get_docstring(ast.parse((LAUNCH / FILE).read_text())) or ""), (
        f"Ray {ray.__version__} is new to {FILE}: read what has changed, then write its version into the docstring"
    )


def test_imported_names() -> None:
    imports = [node for node in ast.walk(ast.parse((LAUNCH / FILE).read_text())) if isinstance(node, ast.ImportFrom)]
    names = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
    assert sum(name.startswith("ray.") for name in names) > 10
    for name in names:
        if name.startswith("ray."):
            resolve(name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_of_functions(name: str) -> None:
    found = list(inspect.signature(resolve(name)).parameters)
    assert found == PARAMETERS[name], f"Ray {ray.__version__} changed {name}({', '.join(found)}): see {FILE}"


@pytest.mark.parametrize("name", FIELDS)
def test_fields_of_messages(name: str) -> None:
    missing = FIELDS[name] - {field.name for field in resolve(f"ray.core.generated.{name}").DESCRIPTOR.fields}
    assert not missing, f"Ray {ray.__version__}: {name} has no {', '.join(sorted(missing))}: see {FILE}"


@pytest.mark.parametrize("name", VALUES)
def test_values_of_enumerations(name: str) -> None:
    missing = VALUES[name] - set(resolve(f"ray.core.generated.{name}").keys())
    assert not missing, f"Ray {ray.__version__}: {name} has no {', '.join(sorted(missing))}: see {FILE}"


@pytest.mark.parametrize("name", SOURCES)
def test_attributes_in_the_source(name: str) -> None:
    source = inspect.getsource(resolve(name))
    missing = [text for text in SOURCES[name] if text not in source]
    assert not missing, f"Ray {ray.__version__}: {name} has no {', '.join(missing)}: see {FILE}"


def test_constants_and_loggers() -> None:
    from llm_training_toolkit.launch.ray import private_api

    assert private_api.HEAD_RESOURCE.startswith("node:")
    assert private_api.MAX_PACKAGE_BYTES > 10e6
    for name in private_api.JOB_CLIENT_LOGGERS:
        assert is_module(name), f"Ray {ray.__version__} logs no more as {name}: see {FILE}"


def private_uses(path: Path) -> Iterator[str]:
    """Yield the private modules of Ray that a file imports, and the private attributes it reads of others."""
    for node in ast.walk(ast.parse(path.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name for name in modules if _is_private(name))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ray"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner not in {"self", "cls", "os"} and node.attr != "_asdict":
                yield f"{owner}.{node.attr}"


def _is_private(module: str) -> bool:
    words = module.split(".")
    inside = words[:1] == ["ray"] and (any(word.startswith("_") for word in words) or words[1:2] == ["core"])
    return inside or (words[:2] == ["ray", "autoscaler"] and module != "ray.autoscaler.sdk")


def test_one_file_uses_private_names() -> None:
    used = {str(path.relative_to(LAUNCH)): sorted(private_uses(path)) for path in sorted(LAUNCH.rglob("*.py"))}
    assert len(used.pop(FILE)) > 5
    assert {file: names for file, names in used.items() if names} == {}
