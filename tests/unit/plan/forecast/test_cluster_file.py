"""Reading the hardware out of a cluster file: the same from every kind, and every mistake named."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.plan.forecast.cluster_file import ANNOTATION, read_hardware
from llm_training_toolkit.plan.forecast.hardware import ClusterHardware

FACTS: dict[str, Any] = {
    "nodes": 2,
    "device": "L40S",
    "devices_per_node": 8,
    "memory_gb": 48,
    "cpus": 192,
    "tflops": {"bf16": 362, "fp32": 91.6},
    "bandwidth_gb_per_s": {"within_node": 32, "between_nodes": 50, "storage": 1},
    "price_per_hour": {"node": 30.13, "head": 0.46, "date": "2026-11-22"},
    "spot": True,
    "shared_storage": "/shared",
}


def as_ray(facts: dict[str, Any]) -> str:
    return json.dumps({"cluster_name": "x", "provider": {"type": "aws"}, "metadata": {"hardware": facts}})


def as_kubernetes(facts: dict[str, Any]) -> str:
    claim = {"kind": "PersistentVolumeClaim", "metadata": {"name": "shared"}}
    job = {"kind": "RayJob", "metadata": {"name": "run", "annotations": {ANNOTATION: json.dumps(facts, indent=2)}}}
    return f"{json.dumps(claim)}\n---\n{json.dumps(job)}\n"


def as_slurm(facts: dict[str, Any]) -> str:
    lines = [f"#   {key}: {json.dumps(value)}" for key, value in facts.items()]
    return "\n".join(
        ["#!/bin/bash", "#SBATCH --nodes=2", "# A comment: with a colon", "#", "# hardware:", *lines, "", "x=1"]
    )


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_every_kind_of_file_says_the_same(tmp_path: Path) -> None:
    expected = ClusterHardware.model_validate(FACTS, strict=True)
    assert read_hardware(written(tmp_path, "ray.yaml", as_ray(FACTS))) == expected
    assert read_hardware(written(tmp_path, "job.yml", as_kubernetes(FACTS))) == expected
    assert read_hardware(written(tmp_path, "slurm.sh", as_slurm(FACTS))) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nodes": 0}, r"hardware.nodes = 0: .*greater than or equal to 1"),
        ({"nodes": "2"}, "hardware.nodes = 2: .*valid integer"),
        ({"spot": "no"}, "hardware.spot = no: .*valid boolean"),
        ({"device": ""}, "hardware.device = : .*at least 1 character"),
        ({"provider": 8}, r"hardware.provider: unknown key \(valid: nodes, device"),
        ({"memory": 8}, "hardware.memory: unknown key; did you mean memory_gb?"),
        ({"tflops": {"bf16": 362}}, "hardware.tflops.fp32: missing"),
        ({"tflops": {"bf16": 362, "fp32": 91, "fp23": 1}}, "hardware.tflops.fp23: unknown key; did you mean fp32?"),
        ({"price_per_hour": {"node": 1, "head": 0, "date": "today"}}, "hardware.price_per_hour.date = today"),
        ({"price_per_hour": {"node": -1, "head": 0, "date": "2026-11-22"}}, "hardware.price_per_hour.node = -1"),
        ({"utilisation": 1.5}, "hardware.utilisation = 1.5"),
        ({"device": "cpu"}, "on cpu every core is a device"),
        ({"bandwidth_gb_per_s": {"within_node": 0, "between_nodes": 1, "storage": 1}}, "within_node = 0 with several"),
        (
            {"bandwidth_gb_per_s": {"within_node": 1, "between_nodes": 0, "storage": 1}},
            "between_nodes = 0 with several",
        ),
    ],
)
def test_a_mistake_is_named_with_its_key_and_value(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    for name, kind in (("ray.yaml", as_ray), ("job.yaml", as_kubernetes), ("slurm.sh", as_slurm)):
        path = written(tmp_path, name, kind({**FACTS, **change}))
        with pytest.raises(ConfigError, match=words) as caught:
            read_hardware(path)
        assert str(path) in str(caught.value)


def test_all_mistakes_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_hardware(written(tmp_path, "ray.yaml", as_ray({**FACTS, "nodes": 0, "spot": 1, "extra": 1})))
    assert len(str(caught.value).splitlines()) == 3


def test_a_date_without_quotes_is_refused(tmp_path: Path) -> None:
    """Ray turns a cluster file into JSON, which has no dates."""
    text = as_slurm(FACTS).replace('"2026-11-22"', "2026-11-22")
    with pytest.raises(ConfigError, match=r"price_per_hour.date = 2026-11-22: .*valid string"):
        read_hardware(written(tmp_path, "slurm.sh", text))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "cluster_name: x", "no description of the hardware"),
        ("a.yaml", "", "no description of the hardware"),
        ("a.yaml", "- 1", "no description of the hardware"),
        ("a.yaml", "metadata: x", "no description of the hardware"),
        ("a.sh", "#!/bin/bash\necho hardware:", "no description of the hardware"),
        ("a.yaml", f"{as_ray(FACTS)}\n---\n{as_ray(FACTS)}", "2 descriptions of the hardware"),
        ("a.yaml", "metadata: {hardware: {", r"a\.yaml:1: not valid YAML"),
        ("a.yaml", "metadata: {hardware: {nodes: 1, nodes: 2}}", "not valid YAML: .*duplicate key"),
        ("a.sh", "# hardware:\n#   nodes: {\n", "not valid YAML"),
        ("a.yaml", 'metadata: {annotations: {llm-training-toolkit/hardware: "{"}}', "annotation .*: not valid YAML"),
        ("a.yaml", "metadata: {hardware: 8}", "hardware = 8: .*valid dictionary"),
    ],
)
def test_a_file_without_one_description_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_hardware(written(tmp_path, name, text))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_hardware(tmp_path / "none.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"# \xe4")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_hardware(path)
