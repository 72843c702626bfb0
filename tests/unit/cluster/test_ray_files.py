"""Files for `ray up`: Ray takes them, the clouds know their machines, none is open to the world."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import botocore.session  # type: ignore[import-untyped]
import pytest
from botocore.validate import ParamValidator  # type: ignore[import-untyped]
from ruamel.yaml import YAML

from llm_training_toolkit.config import load_config
from llm_training_toolkit.plan import estimate_on_cluster, make_plan
from llm_training_toolkit.plan.forecast.cluster_file import read_hardware
from llm_training_toolkit.plan.forecast.device_peaks import find_device_peak

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"


def content_of(path: Path) -> dict[str, Any]:
    """The first document of a file."""
    content: dict[str, Any] = next(iter(YAML(typ="safe").load_all(path)))
    return content


FILES = [path for path in sorted(CLUSTER.glob("*.yaml")) if "provider" in content_of(path)]
"""Those that `ray up` would take; manifests for Kubernetes have another form."""
CLOUD = [path for path in FILES if content_of(path)["provider"]["type"] != "local"]
EVERY = [path for path in sorted(CLUSTER.iterdir()) if path.suffix in {".yaml", ".sh"}]
"""Cluster files of all kinds."""
of_every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def _starts(content: Mapping[str, Any], *nodes: str) -> list[str]:
    """The commands of a cluster file that start Ray on the head or on workers."""
    commands = [command for name in nodes for command in content.get(f"{name}_start_ray_commands", [])]
    return [command for command in commands if "ray start" in command]


def test_ray_takes_every_cluster_file() -> None:
    names = [path.name for path in FILES]
    assert names == ["aws-h100.yaml", "aws-l40s-spot.yaml", "gcp.yaml", "local.yaml", "onprem.yaml"]
    assert {path.name for path in EVERY} - set(names) == {"kuberay-cluster.yaml", "kuberay-job.yaml", "slurm.sh"}
    # In a process of its own: Ray settles its authentication when it is imported, for all tests after.
    check = (
        "import sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "for path in sys.argv[1:]: validate_config(prepare_config(yaml.safe_load(open(path))))"
    )
    done = subprocess.run([sys.executable, "-c", check, *FILES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@of_every_file
def test_no_cluster_is_open_to_the_world(path: Path) -> None:
    content = content_of(path)
    starts = _starts(content, "head", "worker")
    assert starts
    for command in starts:
        assert "RAY_AUTH_MODE=token" in command
    for command in _starts(content, "head"):
        assert "--dashboard-host 127.0.0.1" in command
    assert "0.0.0.0" not in path.read_text()
    if _starts(content, "worker"):  # other machines get the token by this
        assert content["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


@of_every_file
def test_workers_have_what_nccl_and_ray_train_need(path: Path) -> None:
    content = content_of(path)
    for command in _starts(content, "head", "worker"):
        assert "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0" in command
    for command in _starts(content, "head"):
        assert "RAY_TRAIN_ENABLE_STATE_TRACKING=1" in command
    for command in _starts(content, "worker"):
        assert "NCCL_SOCKET_IFNAME=^lo,docker" in command
        assert "ulimit -n 65536" in command


@pytest.mark.parametrize("path", CLOUD, ids=lambda path: path.name)
def test_the_hardware_is_that_of_the_machines(path: Path) -> None:
    content, hardware = content_of(path), read_hardware(path)
    types = dict(content["available_node_types"])
    head = types.pop(content["head_node_type"])
    assert "GPU" not in head["resources"]
    [machines] = types.values()
    assert machines["resources"] == {"CPU": hardware.cpus, "GPU": hardware.devices_per_node}
    # The launcher counts GPUs when a run starts: the machines must be there before.
    assert machines["min_workers"] == machines["max_workers"] == content["max_workers"] == hardware.nodes
    assert hardware.spot == ("SPOT" in str(machines["node_config"]).upper())
    assert "SPOT" not in str(head["node_config"]).upper()


def test_on_premises_every_machine_counts_and_is_started() -> None:
    content = content_of(CLUSTER / "onprem.yaml")
    # Version 2 of Ray's autoscaler, the default, never starts the workers of such a cluster.
    assert "RAY_enable_autoscaler_v2=0" in content["head_start_ray_commands"][-1]
    assert read_hardware(CLUSTER / "onprem.yaml").nodes == 1 + len(content["provider"]["worker_ips"])


@pytest.mark.parametrize("path", CLOUD, ids=lambda path: path.name)
def test_shared_storage_is_mounted_on_every_machine_and_in_its_container(path: Path) -> None:
    content, shared = content_of(path), read_hardware(path).shared_storage
    assert any(command.startswith(f"mountpoint -q {shared} || (") for command in content["initialization_commands"])
    for command in content["initialization_commands"]:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert not done.stderr
    assert f"-v {shared}:{shared}" in content["docker"]["run_options"]


def _aws_problems(node_config: Mapping[str, Any]) -> str:
    """What AWS's own description of `RunInstances` says against a machine; SubnetIds is Ray's word."""
    node_config = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, shape)
    text: str = report.generate_report()
    return text


@pytest.mark.parametrize("path", [path for path in CLOUD if "aws" in path.name], ids=lambda path: path.name)
def test_aws_knows_every_word_of_its_machines(path: Path) -> None:
    for machine in content_of(path)["available_node_types"].values():
        assert not _aws_problems(machine["node_config"])
    assert "Unknown parameter" in _aws_problems({"InstanceMarketOption": {}})


def test_every_efa_interface_is_a_card_of_its_own_in_the_network_of_the_head() -> None:
    types = content_of(CLUSTER / "aws-h100.yaml")["available_node_types"]
    head, links = types["head"]["node_config"], types["h100"]["node_config"]["NetworkInterfaces"]
    assert [link["NetworkCardIndex"] for link in links] == list(range(32))
    assert [link["DeviceIndex"] for link in links] == [0] + [1] * 31
    assert [link["InterfaceType"] for link in links] == ["efa"] + ["efa-only"] * 31
    # Ray would give the head a security group of its own, and the two could not talk.
    for link in links:
        assert ([link["SubnetId"]], link["Groups"]) == (head["SubnetIds"], head["SecurityGroupIds"])


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.name)
def test_the_peak_is_that_of_the_data_sheet(path: Path) -> None:
    hardware = read_hardware(path)
    known = find_device_peak(f"NVIDIA {hardware.device}")
    assert hardware.is_cpu == (known is None)
    if known:
        assert (hardware.tflops.bf16, hardware.tflops.fp32) == (known.bf16, known.fp32)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.name)
def test_a_small_run_fits_every_cluster(path: Path) -> None:
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    forecast = estimate_on_cluster(config, make_plan(config), read_hardware(path))
    assert not forecast.problems
    assert forecast.hours is not None


def test_the_quickstart_is_foreseen_on_the_machine_it_was_measured_on() -> None:
    """6,731 tokens/s on 2026-11-22, 491,520 tokens: 73 seconds."""
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    hours = estimate_on_cluster(config, make_plan(config), read_hardware(CLUSTER / "local.yaml")).hours
    assert hours is not None
    assert hours * 3600 == pytest.approx(73, rel=0.02)
