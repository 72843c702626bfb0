"""Ray Serve applications: their arguments, and the CPUs of their replicas."""

from __future__ import annotations

import pytest

from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.launch.serve.deployment import ServeArguments, build_application
from llm_training_toolkit.launch.serve.run import compute_replica_cpus
from llm_training_toolkit.serving.settings import KEY_VARIABLE


def test_a_deployed_model_has_the_name_of_its_run_and_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "key")
    application = build_application(ServeArguments(model="/runs/mine/export"))
    [settings] = application._bound_deployment.init_args
    assert (settings.name, settings.key) == ("mine", "key")
    for key in ("", " key", "ключ"):
        monkeypatch.setenv(KEY_VARIABLE, key)
        with pytest.raises(ConfigError, match=KEY_VARIABLE):
            build_application(ServeArguments(model="/runs/mine/export"))


@pytest.mark.parametrize(
    ("nodes", "replicas", "wanted"),
    [([8], 1, 8), ([8, 8], 1, 8), ([8, 8], 3, 4), ([8, 4, 0], 3, 4), ([2], 3, 1), ([0], 1, 1), ([], 1, 1)],
)
def test_replicas_fit_on_the_nodes(nodes: list[int], replicas: int, wanted: int) -> None:
    assert compute_replica_cpus(nodes, replicas) == wanted
