"""Forked Ray workers (tests/support/ray_workers.py) are found, told and killed like those that Ray starts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import pytest

from launching import Environment


class Worker:
    """An actor that tells of its process."""

    def tell(self) -> dict[str, Any]:
        import ray

        return {
            "pid": os.getpid(),
            "parent": os.getppid(),
            "raylet": int(os.environ["RAY_RAYLET_PID"]),
            "worker": ray.get_runtime_context().get_worker_id(),
            "variable": os.environ.get("AWS_REGION"),
            "group": os.getpgrp(),
            "drawn": ray.ObjectRef.from_random().hex(),
        }


@pytest.fixture
def start(ray_environment: Environment, worker_scripts: Mapping[str, str]) -> Iterator[Any]:
    """Start an actor with variables: the actor, what it tells, and the process that the raylet has started for it."""
    if not worker_scripts:
        pytest.skip("workers start plain here")
    import ray

    ray.init(address=ray_environment["RAY_ADDRESS"], log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actor's process does not find the tests

    def started(**variables: str) -> tuple[Any, dict[str, Any], psutil.Process]:
        actor: Any = ray.remote(Worker).options(num_cpus=0, runtime_env={"env_vars": variables}).remote()
        told = ray.get(actor.tell.remote())
        children = psutil.Process(told["raylet"]).children()
        [shim] = [each for each in children if each.pid == told["pid"] or told["worker"] in " ".join(each.cmdline())]
        return actor, told, shim

    yield started
    ray.shutdown()


def test_a_worker_and_its_shim_end_together(start: Any) -> None:
    import ray
    from ray.exceptions import ActorDiedError

    for victim in ("worker", "shim"):
        actor, told, shim = start(AWS_REGION="here")
        assert told["parent"] != told["raylet"]
        assert (told["group"], told["variable"]) == (told["pid"], "here")
        both = {"worker": psutil.Process(told["pid"]), "shim": shim}
        both[victim].kill()
        _, alive = psutil.wait_procs(list(both.values()), timeout=30)
        assert not [each for each in alive if each.status() != psutil.STATUS_ZOMBIE]
        with pytest.raises(ActorDiedError):
            ray.get(actor.tell.remote())


def test_workers_draw_ids_of_their_own(start: Any) -> None:
    """With equal ids, two that start at once make the same object; one crashes, and Ray replaces it after a minute."""
    told = [start()[1], start(PL_DISABLE_FORK="1")[1]]
    assert all(each["parent"] != each["raylet"] for each in told), "both are forked"
    assert told[0]["drawn"] != told[1]["drawn"]


def test_a_worker_with_a_variable_that_imports_may_read_starts_plain(start: Any) -> None:
    _, told, process = start(MALLOC_ARENA_MAX="1")
    assert (told["parent"], process.pid) == (told["raylet"], told["pid"])
