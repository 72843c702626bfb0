"""What a resume compares: the configuration, also without resolved.json, and the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import build_manifest
from llm_training_toolkit.config.run_identity import fingerprint
from llm_training_toolkit.data.prepare.builder import DatasetBuilder
from llm_training_toolkit.data.prepare.epochs import get_tokenization_spec
from llm_training_toolkit.data.prepare.shards import render_in_process
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.plan import with_precision
from llm_training_toolkit.setup.resume import ResumeState, check_documents_unchanged, check_run_unchanged
from tiny_runs import tiny_config, write_corpus


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


def test_another_number_of_partitions_would_be_another_order(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=20)
    parts = tiny_config(corpus, tmp_path, data={"partitions": 2})
    spec = get_tokenization_spec(parts)
    builder = DatasetBuilder(parts, spec, None, render_in_process)
    state = ResumeState(build_manifest(3), parts, builder.build_parts([1]).dataset_info)
    check_documents_unchanged(state, parts, builder, ())
    now = tiny_config(corpus, tmp_path)
    other = DatasetBuilder(now, spec, None, render_in_process)
    with pytest.raises(ConfigError, match=r"begun with 2, and would now have 1.*set data.partitions to 2"):
        check_documents_unchanged(state, now, other, ())
    check_documents_unchanged(state, now, other, ["data.partitions"])
