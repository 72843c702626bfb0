"""A folder of code with modules named like Python's own: none of them is imported by what `ltt` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("bz2", "html", "queue", "tensorboard", "tqdm", "types")
_IMPORT_ON_WORKER = """
import importlib, sys
from llm_training_toolkit.launch.backend import prepare_environment
prepare_environment()
import ray
from llm_training_toolkit.launch.ray.cluster import connect_to_cluster
from llm_training_toolkit.monitoring.console import Console

def find_modules(names):
    return [importlib.import_module(name).__file__ for name in names]

with connect_to_cluster(Console()):
    print("\\n".join(ray.get(ray.remote(find_modules).remote(sys.argv[1:]))))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose modules leave a file when they are imported."""
    (tmp_path / "code").mkdir()
    for name in NAMES:
        (tmp_path / "code" / f"{name}.py").write_text(f"open({str(tmp_path / name)!r}, 'w')\nraise SystemExit(9)\n")
    return tmp_path / "code"


def run_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert [name for name in NAMES if (folder.parent / name).exists()] == []
    return done


@pytest.mark.slow
def test_tensorboard_is_the_installed_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1").touch()
    show = f"show_in_tensorboard({str(tmp_path)!r}, 'no-such-host.invalid', 0)"
    done = run_in(folder, "-P", "-c", f"from llm_training_toolkit.cli.tensorboard import *; {show}")
    assert done.returncode not in {0, 9}, "TensorBoard itself ends: it cannot listen there"


@pytest.mark.slow
def test_the_preparation_of_later_epochs_imports_none_of_them(folder: Path) -> None:
    start = """
import time
from pathlib import Path
from llm_training_toolkit.config import parse_config
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.setup import background_prep

background_prep.is_prepared = lambda config, facts: False
config = parse_config({
    "run": {"name": "one"},
    "model": {"name": "qwen3-0.6b"},
    "tokenizer": {"path": "/t"},
    "data": {"sequence_length": 64, "sources": [{"path": "/d", "format": "text"}]},
    "train": {"steps": 1, "global_batch_size": 1},
}, "test")
info = Path("../run/data/dataset_info.json")
info.parent.mkdir(parents=True)
info.write_text("{}")
log = Path("../run/logs/preparation.log")
with background_prep.prepare_in_background(RunDirectory(Path("../run")), config, None, Console()):
    until = time.monotonic() + 60
    while time.monotonic() < until and not (log.exists() and "DataError" in log.read_text()):
        time.sleep(0.1)
"""
    run_in(folder, "-P", "-c", start)
    said = (folder.parent / "run" / "logs" / "preparation.log").read_text()
    assert "DataError: data/dataset_info.json cannot be read" in said


@pytest.mark.cluster
@pytest.mark.slow
def test_workers_of_ray_import_none_of_them(folder: Path) -> None:
    done = run_in(folder, "-P", "-c", _IMPORT_ON_WORKER, *NAMES)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) >= len(NAMES)
    assert str(folder) not in done.stdout
