"""Every recipe in configs/ plans without a problem and lets its rate decay as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llm_training_toolkit.config import load_config
from llm_training_toolkit.plan import make_plan, resolve_for_hardware
from llm_training_toolkit.plan.forecast.cluster_file import read_hardware
from llm_training_toolkit.plan.memory.memory_settings import MEMORY_FILL

CONFIGS = Path(__file__).parents[2] / "configs"
RESOURCES = Path(__file__).parents[2] / "docs" / "external-resources.md"
RECIPES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if path.parent.name != "search")
PUBLISHED = [name for name in RECIPES if "/" in name]
"""Those that start from published weights."""
CLUSTER = Path(__file__).parents[2] / "cluster" / "aws-h100.yaml"
GIGABYTES = 80
"""Of the devices that the files name."""


@pytest.mark.parametrize("name", RECIPES)
def test_it_plans_without_a_problem_and_fits(name: str) -> None:
    config, _ = resolve_for_hardware(load_config(CONFIGS / name), read_hardware(CLUSTER))
    plan = make_plan(config)
    assert plan.problems == ()
    assert sum(plan.memory_gb_per_device.values()) < MEMORY_FILL * GIGABYTES
    assert plan.global_batch % plan.replicas == 0


@pytest.mark.parametrize("name", RECIPES)
def test_its_rate_ends_where_the_file_says_and_not_at_the_peak(name: str) -> None:
    config = load_config(CONFIGS / name)
    horizon = {"steps": 8500, "tokens": None, "epochs": None}
    lengthened = config.model_copy(update={"train": config.train.model_copy(update=horizon)})
    schedule = make_plan(lengthened).build_lr_schedule()
    rates = [schedule.compute_lr(step) for step in range(8500)]
    assert max(rates) == config.optim.lr if config.optim.lr != "auto" else max(rates) > 0
    assert rates[-1] == pytest.approx(max(rates) * config.optim.min_lr_ratio)
    assert config.optim.lr_scheduler != "constant"


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_says_where_its_numbers_come_from_and_what_was_changed(name: str) -> None:
    lines = (CONFIGS / name).read_text().partition("run:")[0].splitlines()
    head = " ".join(line.removeprefix("# ") for line in lines)
    assert "#" not in head
    assert re.search(r"commit [0-9a-f]{8}\b", head)
    assert "Changed: " in head or "full-7b-one-node.yaml" in head
    assert f"{Path(name).stem}`" in RESOURCES.read_text(), "the table of recipes names it"
