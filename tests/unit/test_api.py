"""Python API: errors of arguments that are neither files nor lists."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import llm_training_toolkit as ltt
from llm_training_toolkit.errors import ConfigError
from tiny_runs import tiny_config


@pytest.fixture
def mapping(tmp_path: Path) -> dict[str, Any]:
    config = tiny_config(tmp_path / "corpus", tmp_path / "runs")
    data: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    return data


def test_a_text_in_place_of_overrides_is_one_problem(mapping: dict[str, Any]) -> None:
    for call in (ltt.load_config, ltt.plan, ltt.train, ltt.tune):
        with pytest.raises(ConfigError, match=r"overrides = 'train\.steps=3'") as caught:
            call(mapping, "train.steps=3")
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize("call", [ltt.load_config, ltt.train, ltt.tune])
def test_something_else_than_a_configuration_is_refused(call: Any) -> None:
    with pytest.raises(ConfigError, match="configuration = None"):
        call(None)


def test_overrides_leave_the_mapping_unchanged(mapping: dict[str, Any]) -> None:
    steps = mapping["train"]["steps"]
    assert ltt.load_config(mapping, [f"train.steps={steps + 1}"]).train.steps == steps + 1
    assert mapping["train"]["steps"] == steps


def test_errors_of_a_mapping_name_the_mapping(mapping: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^the mapping: train\.stesp = 3: unknown key") as caught:
        ltt.load_config(mapping | {"train": mapping["train"] | {"stesp": 3}}, ["train.steps=7"])
    assert [problem.where for problem in caught.value.problems] == ["train.stesp"]
    base = tmp_path / "base.yaml"
    base.write_text("{}")
    with pytest.raises(ConfigError, match=r"^the mapping: trails = 3: unknown key"):
        ltt.tune({"name": "s", "base": str(base), "search": {"optim.lr": [1e-3, 1e-2]}, "trails": 3}, progress=list)


def test_the_stub_types_exactly_the_public_names() -> None:
    stub = ast.parse(Path(ltt.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    typed = [name.asname for line in stub.body if isinstance(line, ast.ImportFrom) for name in line.names]
    public = vars(ltt)["__all__"]
    assert sorted(filter(None, typed)) == sorted(public)
    assert all(hasattr(ltt, name) for name in public)
