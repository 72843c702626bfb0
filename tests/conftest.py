"""Fixtures that tests share, and marks that follow from the folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Two lanes share the processors, and torch's threads spin while they wait for each other: beside other work, the cases
# of Qwen2-MoE in test_document_isolation.py took 98 s of processor time with two threads and 14 s with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings
from ruamel.yaml import YAML

from durations import Durations, slowness
from launching import Environment
from llm_training_toolkit.config import dump_config_json
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from llm_training_toolkit.runs.directory import RunDirectory
from rank_pool import RankPool
from ray_workers import forked_workers
from tiny_runs import tiny_config, write_corpus

# The seconds of an example or of its data depend on the machine, and on what else it does.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

FOLDER = Path(__file__).parent
FOLDER_MARKS = ("ranks", "cluster")
LIMIT = 20.0  # seconds for a test without a marker, on a processor as fast as that of `durations.slowness`


def pytest_configure(config: pytest.Config) -> None:
    """Keep the durations of all tests, and refuse slow ones without a marker."""
    config.pluginmanager.register(Durations(config.rootpath, LIMIT * slowness()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder, and those that need the known model: learning by heart takes seconds."""
    for item in items:
        folder = item.path.relative_to(FOLDER).parts[0] if item.path.is_relative_to(FOLDER) else ""
        if folder in FOLDER_MARKS:
            item.add_marker(folder)
        if folder == "cluster":
            item.add_marker(pytest.mark.timeout(2400))  # a mark at the test itself counts before it
        if "known_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of code."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "code")


@pytest.fixture(scope="session")
def prepared_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunDirectory]:
    """A run directory ready for workers: resolved configuration and dataset info. Copied by `fresh_run`, never run.

    A test that writes into it changes the outcome of those after it, so that the last one fails then.
    """
    runs = tmp_path_factory.mktemp("runs")
    config = tiny_config(corpus, runs)
    run = RunDirectory(runs / "tiny")
    run.dataset_info_path.parent.mkdir(parents=True)
    run.dataset_info_path.write_text(
        prepare_run_data(config, lambda _stage, _done, _total: None).dataset_info.to_json()
    )
    run.resolved_config_path.write_text(dump_config_json(config))
    run.config_path.write_text("# a test's run\n")
    files = sorted(run.path.rglob("*"))
    yield run
    assert sorted(run.path.rglob("*")) == files


@pytest.fixture
def fresh_run(prepared_run: RunDirectory, tmp_path: Path) -> Callable[[str], RunDirectory]:
    """Makes copies of the prepared run, by name."""

    def make(name: str) -> RunDirectory:
        shutil.copytree(prepared_run.path, tmp_path / name)
        return RunDirectory(tmp_path / name)

    return make


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """Pools of one to four ranks, started when first asked for."""
    started: dict[int, RankPool] = {}
    log = tmp_path_factory.mktemp("ranks")

    def pool(world_size: int) -> RankPool:
        if world_size not in started or not started[world_size].alive:
            started[world_size] = RankPool(world_size, log)
        return started[world_size]

    yield pool
    for each in started.values():
        each.close()


@pytest.fixture(scope="session")
def worker_scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """Arguments of Ray nodes that fork their workers."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported
    os.environ.update(RAY_worker_niceness="0")  # Ray's 15 starves its workers beside another lane of tests
    os.environ.update(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.5")  # after Ray's 2 s it sees that a worker group has ended
    os.environ["RAY_TMPDIR"] = str(tmp_path_factory.mktemp("ray"))
    with forked_workers(os.environ) as scripts:
        yield scripts


@pytest.fixture(scope="session")
def ray_environment(worker_scripts: Mapping[str, str]) -> Iterator[Environment]:
    """The environment of a command that joins the tests' own Ray cluster."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 8, "include_dashboard": False, **worker_scripts}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield {**os.environ, "RAY_ADDRESS": cluster.address}
    cluster.shutdown()


@pytest.fixture(scope="session")
def launch_config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes the YAML file of a small run; runs share one cache, so only the first one prepares."""
    runs = tmp_path_factory.mktemp("launch")

    def write(name: str, **sections: dict[str, Any]) -> Path:
        config = tiny_config(corpus, runs, **{"run": {"name": name}, **sections})
        path = runs / f"{name}.yaml"
        data = json.loads(config.model_dump_json(exclude_unset=True))
        with path.open("w") as file:
            YAML().dump(data, file)
        return path

    return write


@pytest.fixture(scope="session")
def known_document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that `known_model` knows by heart."""
    from known_model import KNOWN

    path = tmp_path_factory.mktemp("known") / "area.py"
    path.write_text(KNOWN)
    return path


@pytest.fixture(scope="session")
def known_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that plain transformers loads, in fp32: a small model that knows three texts by heart."""
    from known_model import export_known_model

    directory = tmp_path_factory.mktemp("known_model")
    export_known_model(directory)
    return directory
