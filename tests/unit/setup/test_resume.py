"""A run that has lost its resolved.json is still known by the fingerprint in its checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import build_manifest
from llm_training_toolkit.config.run_identity import fingerprint
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.plan import with_precision
from llm_training_toolkit.setup.resume import ResumeState, check_run_unchanged
from tiny_runs import tiny_config


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_without_the_resolved_configuration_the_fingerprint_tells_another_identity(
    tmp_path: Path, precision: str
) -> None:
    train = {"steps": 9, "global_batch_size": 4, "micro_batch_size": 2, "precision": precision}
    config = tiny_config(tmp_path, tmp_path, train=train)
    began_with = config if precision != "auto" else with_precision(config, "bf16")
    state = ResumeState(build_manifest(3, config_fingerprint=fingerprint(began_with)), None, None)
    check_run_unchanged(state, config, (), extend=False)
    check_run_unchanged(state, tiny_config(tmp_path, tmp_path, train=train, cluster={"workers": 1}), (), extend=False)
    changed = tiny_config(tmp_path, tmp_path, train=train, optim={"lr": 0.1})
    with pytest.raises(ConfigError, match=r"resolved\.json.*is missing"):
        check_run_unchanged(state, changed, (), extend=False)
    check_run_unchanged(replace(state, config=changed), changed, (), extend=False)
