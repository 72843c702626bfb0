"""The space of a search: every corner looked at, points repeatable, impossible ones named or left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.search.event_log import EventLog
from llm_training_toolkit.search.sampler import TrialSampler
from llm_training_toolkit.search.space import (
    TrialConfigBuilder,
    boundary_points,
    build_grid,
    check_search_space,
    count_combinations,
    draw_random_point,
    point_key,
)
from tiny_runs import tiny_config

RATE = {"optim.lr": {"loguniform": [1e-4, 1e-1]}}
CHOICES = {
    "optim.weight_decay": {"choice": [0.0, 0.1]},
    "optim.lr_scheduler": {"choice": ["cosine", "wsd", "constant"]},
}


def search(space: dict[str, Any], **fields: Any) -> SearchConfig:
    return SearchConfig.model_validate({"base": "base.yaml", "search": space, "trials": 4, **fields}, strict=False)


def trials(asked: SearchConfig, tmp_path: Path, base: Config | None = None) -> TrialConfigBuilder:
    base = base or tiny_config(Path("corpus"), tmp_path, cluster={"workers": 1})
    return TrialConfigBuilder(asked, base, str(tmp_path / "trials"), str(tmp_path / "cache"))


def test_corners_are_all_ends_and_all_choices_together() -> None:
    found = {point_key(point) for point in boundary_points(search(RATE | CHOICES))}
    assert len(found) == 2 * 2 * 3
    assert point_key({"optim.lr": 1e-1, "optim.weight_decay": 0.1, "optim.lr_scheduler": "wsd"}) in found


def test_of_too_many_corners_every_value_of_every_key_is_looked_at() -> None:
    space = {f"optim.key{number}": {"choice": [0, 1, 2, 3]} for number in range(8)}
    found = list(boundary_points(search(space)))
    assert len(found) < 4**8
    assert {(key, value) for point in found for key, value in point.items()} == {
        (key, value) for key in space for value in range(4)
    }


@given(seed=st.integers(0, 2**31), number=st.integers(0, 10_000))
def test_points_lie_within_their_ranges_and_repeat(seed: int, number: int) -> None:
    asked = search(
        {**RATE, "optim.warmup": {"randint": [1, 7]}, "optim.max_grad_norm": {"uniform": [0.5, 2.0]}},
        searcher={"seed": seed},
    )
    point = draw_random_point(asked, number)
    assert all(asked.search[key].contains_value(value) for key, value in point.items())
    assert isinstance(point["optim.warmup"], int)
    assert point_key(point) == point_key(draw_random_point(asked, number))


def test_learning_rates_are_drawn_evenly_over_orders_of_magnitude() -> None:
    drawn = [math.log10(draw_random_point(search(RATE), number)["optim.lr"]) for number in range(600)]
    thirds = [sum(low <= value < low + 1 for value in drawn) for low in (-4, -3, -2)]
    assert min(thirds) > 150


def test_a_grid_has_every_combination_once_in_an_order_of_its_seed() -> None:
    first, second = build_grid(search(CHOICES)), build_grid(search(CHOICES, searcher={"seed": 1}))
    assert len({point_key(point) for point in first}) == len(first) == count_combinations(search(CHOICES)) == 6
    assert {point_key(point) for point in first} == {point_key(point) for point in second}
    assert first != second


def test_an_impossible_corner_is_named_with_its_reason(tmp_path: Path) -> None:
    asked = search({"train.global_batch_size": {"choice": [4, 8]}})
    base = tiny_config(Path("corpus"), tmp_path, cluster={"workers": 6})
    with pytest.raises(PlanError) as refused:
        check_search_space(trials(asked, tmp_path, base))
    assert "1 of 2 corners" in str(refused.value)
    assert "train.global_batch_size = 4" in str(refused.value)
    assert "skip" in str(refused.value)


def test_impossible_points_are_left_out_when_asked_and_count_as_no_trial(tmp_path: Path) -> None:
    asked = search({"train.global_batch_size": {"choice": [4, 8, 16]}}, invalid="skip", searcher={"name": "grid"})
    base = tiny_config(Path("corpus"), tmp_path, cluster={"workers": 6})
    made = trials(asked, tmp_path, base)
    assert len(check_search_space(made)) == 1
    event_log = EventLog(tmp_path / "events.jsonl")
    suggestions = TrialSampler(made, event_log, None)
    found = []
    while (trial := suggestions.begin_next_trial()) is not None:
        found.append(trial.parameters["train.global_batch_size"])
    assert sorted(found) == [8, 16]
    assert len(event_log.invalid_points) == 1


def test_points_known_as_impossible_are_not_written_down_again(tmp_path: Path) -> None:
    asked = search({"train.global_batch_size": {"choice": [4, 8, 16]}}, invalid="skip", trials=10)
    made = trials(asked, tmp_path, tiny_config(Path("corpus"), tmp_path, cluster={"workers": 6}))
    event_log = EventLog(tmp_path / "events.jsonl")
    while TrialSampler(made, event_log, None).begin_next_trial() is not None:
        pass
    assert len(event_log.trials) == 2
    assert list(event_log.invalid_points.values()) == [{"train.global_batch_size": 4}]


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"grace_period_steps": 50}, "grace_period_steps = 50, but the trial .* ends after "),
        ({"grace_period_tokens": 1e9}, "grace_period_tokens = 1,000,000,000, but the trial .* ends after "),
        ({"grace_period_tokens": 1}, "a step of the trial .* has "),
    ],
)
def test_a_first_rung_that_compares_nothing_is_refused(tmp_path: Path, scheduler: dict[str, int], words: str) -> None:
    base = tiny_config(Path("corpus"), tmp_path, train={"steps": 50}, cluster={"workers": 1})
    with pytest.raises(PlanError, match=words):
        check_search_space(trials(search(RATE, scheduler={"name": "asha", **scheduler}), tmp_path, base))


def test_a_space_without_any_possible_point_is_refused_even_then(tmp_path: Path) -> None:
    asked = search({"train.global_batch_size": {"choice": [1, 2]}}, invalid="skip")
    with pytest.raises(PlanError, match="2 of 2 corners"):
        check_search_space(trials(asked, tmp_path, tiny_config(Path("corpus"), tmp_path, cluster={"workers": 6})))


def test_a_metric_that_is_never_reported_is_refused(tmp_path: Path) -> None:
    base = tiny_config(Path("corpus"), tmp_path, data={"eval": {"fraction": 0.0}}, cluster={"workers": 1})
    with pytest.raises(PlanError, match="never reported"):
        check_search_space(trials(search(RATE), tmp_path, base))
    assert check_search_space(trials(search(RATE, metric="train/loss"), tmp_path, base)) == []


@pytest.mark.parametrize("workers", [0, (1, 2)])
def test_trials_have_a_fixed_number_of_workers(tmp_path: Path, workers: Any) -> None:
    base = tiny_config(Path("corpus"), tmp_path, cluster={"workers": workers})
    with pytest.raises(PlanError, match=r"cluster\.workers"):
        check_search_space(trials(search(RATE), tmp_path, base))


def test_points_to_try_first_come_first_and_no_point_comes_twice(tmp_path: Path) -> None:
    point = {"optim.weight_decay": 0.1, "optim.lr_scheduler": "wsd"}
    asked = search(CHOICES, points_to_evaluate=[point], trials=20)
    made, path = trials(asked, tmp_path), tmp_path / "events.jsonl"
    first = TrialSampler(made, EventLog(path), None).begin_next_trial()
    assert first is not None
    assert first.parameters == point
    points = [point_key(point)]
    while (
        trial := TrialSampler(made, EventLog(path), None).begin_next_trial()
    ) is not None:  # each from the file alone
        points.append(point_key(trial.parameters))
    assert len(points) == len(set(points)) == 6


def test_a_trial_is_a_run_of_its_own_that_shares_the_prepared_data(tmp_path: Path) -> None:
    made = trials(search(RATE), tmp_path)
    config = made.build_config({"optim.lr": 0.002}, "t0007")
    assert (config.optim.lr, config.run.name, config.run.dir) == (0.002, "t0007", str(tmp_path / "trials"))
    assert config.data.cache == str(tmp_path / "cache")
    assert not config.export.at_end


def test_losses_per_token_are_not_compared_between_tokenizers(tmp_path: Path) -> None:
    sizes = {"tokenizer.train.vocab_size": {"choice": [512, 600]}}
    with pytest.raises(PlanError, match="bits_per_byte"):
        check_search_space(trials(search(sizes), tmp_path))
    assert check_search_space(trials(search(sizes, metric="eval/bits_per_byte"), tmp_path)) == []
