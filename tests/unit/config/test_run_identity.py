"""What makes a run the same run: tags, differences, refusals, the fingerprint."""

from __future__ import annotations

from typing import Any

import pytest

from llm_training_toolkit.config import (
    Config,
    ConfigChange,
    FieldTag,
    check_config_changes,
    diff_configs,
    fingerprint,
    flatten_config,
    parse_config,
)
from llm_training_toolkit.config.fields import get_inner_section, iter_sections
from llm_training_toolkit.errors import ConfigError


def config(**changed: dict[str, Any]) -> Config:
    data: dict[str, dict[str, Any]] = {
        "run": {"name": "small"},
        "model": {"name": "qwen3-0.6b"},
        "tokenizer": {"path": "t"},
        "data": {"sequence_length": 64, "sources": [{"path": "a", "format": "code"}]},
        "train": {"steps": 10},
    }
    for section, values in changed.items():
        data[section] = data.get(section, {}) | values
    return parse_config(data, "test")


FIM = {"sources": [{"path": "a", "format": "code", "fim": {"rate": 0.3}}]}
TWO = {"sources": [{"path": "a", "format": "code"}, {"path": "b", "format": "text"}]}


def test_every_leaf_carries_exactly_one_tag_and_no_section_does() -> None:
    for key, section in iter_sections():
        for name, info in section.model_fields.items():
            tags = [item for item in info.metadata if isinstance(item, FieldTag)]
            expected = 1 if get_inner_section(info.annotation) is None else 0
            assert len(tags) == expected, f"{key}.{name} carries {tags}"


def test_flatten_names_list_items_by_position() -> None:
    flat = flatten_config(config(data=FIM))
    assert flat["data.sources.0.path"] == (FieldTag.IDENTITY, "a")
    assert flat["data.sources.0.fim.rate"] == (FieldTag.IDENTITY, 0.3)
    assert flat["train.steps"] == (FieldTag.HORIZON, 10)
    assert flat["cluster.workers"] == (FieldTag.FREE, 1)
    assert flat["optim.betas"] == (FieldTag.IDENTITY, (0.9, 0.95))
    assert "data.sources" not in flat


def test_no_change() -> None:
    assert diff_configs(config(), config()) == []
    assert check_config_changes(config(), config()) == []


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "QWEN3-0.6B", "qwen3-0.6b"])
def test_a_name_typed_in_another_way_is_no_change(name: str) -> None:
    assert diff_configs(config(), config(model={"name": name})) == []


def test_changes_name_old_and_new() -> None:
    assert diff_configs(config(), config(run={"seed": 7}, cluster={"workers": 2})) == [
        ConfigChange("run.seed", FieldTag.IDENTITY, 42, 7),
        ConfigChange("cluster.workers", FieldTag.FREE, 1, 2),
    ]


def test_a_section_that_appears_or_goes_gives_its_leaves() -> None:
    assert ConfigChange("data.sources.0.fim.rate", FieldTag.IDENTITY, None, 0.3) in diff_configs(
        config(), config(data=FIM)
    )
    assert ConfigChange("data.sources.0.fim.loss", FieldTag.IDENTITY, "all", None) in diff_configs(
        config(data=FIM), config()
    )
    assert ConfigChange("data.sources.1.path", FieldTag.IDENTITY, None, "b") in diff_configs(config(), config(data=TWO))


def test_one_step_of_warmup_is_not_the_whole_run() -> None:
    step, whole = config(optim={"warmup": 1}), config(optim={"warmup": 1.0})
    assert [change.key for change in diff_configs(step, whole)] == ["optim.warmup"]
    assert fingerprint(step) != fingerprint(whole)


def test_the_order_of_names_in_a_mapping_means_nothing() -> None:
    one, two = (
        config(model={"config_overrides": {"a": 1, "b": 2}}),
        config(model={"config_overrides": {"b": 2, "a": 1}}),
    )
    assert diff_configs(one, two) == []
    assert fingerprint(one) == fingerprint(two)


def test_free_fields_change_unasked() -> None:
    assert check_config_changes(config(), config(cluster={"workers": 4}, engine={"zero_stage": 3})) == []


def test_every_changed_identity_field_is_refused_with_its_flag() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config_changes(config(), config(run={"seed": 7}, optim={"lr": 0.1}, cluster={"workers": 2}))
    header, *lines = str(caught.value).splitlines()
    assert header == "the run has begun with another configuration:"
    assert [line.strip().split(";")[0] for line in lines] == ["run.seed: 42 -> 7", 'optim.lr: "auto" -> 0.1']
    assert lines[0].endswith("--accept run.seed")


def test_accept_takes_the_key_and_everything_below() -> None:
    accepted = check_config_changes(config(), config(data=TWO), accept=["data.sources"])
    assert {change.key for change in accepted} >= {"data.sources.1.path", "data.sources.1.format"}
    with pytest.raises(ConfigError, match=r"--accept data\.source:"):
        check_config_changes(config(), config(data=TWO), accept=["data.source"])


@pytest.mark.parametrize("key", ["optim.lr", "run.sed", "cluster.workers", "train.steps"])
def test_accept_that_matches_nothing_is_an_error(key: str) -> None:
    new = config(run={"seed": 7}, cluster={"workers": 2}, train={"steps": 20})
    with pytest.raises(ConfigError, match=f"--accept {key}: no changed identity field"):
        check_config_changes(config(), new, accept=["run.seed", key], extend=True)


def test_a_changed_horizon_needs_extend() -> None:
    new = config(train={"steps": 20})
    with pytest.raises(ConfigError, match=r"train\.steps: 10 -> 20; --extend .*the schedule stretches"):
        check_config_changes(config(), new)
    assert check_config_changes(config(), new, extend=True) == [ConfigChange("train.steps", FieldTag.HORIZON, 10, 20)]


def test_extend_accepts_no_identity() -> None:
    with pytest.raises(ConfigError, match=r"run\.seed"):
        check_config_changes(config(), config(run={"seed": 7}), extend=True)


def test_fingerprint_covers_identity_alone() -> None:
    base = fingerprint(config())
    assert len(base) == 64
    assert fingerprint(config(train={"steps": 99}, cluster={"workers": 9}, run={"name": "other"})) == base
    assert fingerprint(config(run={"seed": 1})) != base
    assert fingerprint(config(data=FIM)) != base
