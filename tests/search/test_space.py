"""The space of a search: every corner looked at, points repeatable, impossible ones named or left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_config
from llm_training_toolkit.config import Config
from llm_training_toolkit.config.search import Search
from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.search.event_log import Ledger
from llm_training_toolkit.search.sampler import Suggestions
from llm_training_toolkit.search.space import Trials, check, combinations, corners, draw, grid, same

RATE = {"optim.lr": {"log_uniform": [1e-4, 1e-1]}}
CHOICES = {"optim.weight_decay": {"choice": [0.0, 0.1]}, "optim.schedule": {"choice": ["cosine", "wsd", "constant"]}}


def search(space: dict[str, Any], **fields: Any) -> Search:
    return Search.model_validate({"base": "base.yaml", "search": space, "trials": 4, **fields}, strict=False)


def trials(asked: Search, tmp_path: Path, base: Config | None = None) -> Trials:
    base = base or tiny_config(Path("corpus"), tmp_path, cluster={"workers": 1})
    return Trials(asked, base, str(tmp_path / "trials"), str(tmp_path / "cache"))


def test_corners_are_all_ends_and_all_choices_together() -> None:
    found = {same(point) for point in corners(search(RATE | CHOICES))}
    assert len(found) == 2 * 2 * 3
    assert same({"optim.lr": 1e-1, "optim.weight_decay": 0.1, "optim.schedule": "wsd"}) in found


def test_of_too_many_corners_every_value_of_every_key_is_looked_at() -> None:
    space = {f"optim.key{number}": {"choice": [0, 1, 2, 3]} for number in range(8)}
    found = list(corners(search(space)))
    assert len(found) < 4**8
    assert {(key, value) for point in found for key, value in point.items()} == {
        (key, value) for key in space for value in range(4)
    }


@given(seed=st.integers(0, 2**31), number=st.integers(0, 10_000))
def test_points_lie_within_their_ranges_and_repeat(seed: int, number: int) -> None:
    asked = search(
        {**RATE, "optim.warmup": {"integers": [1, 7]}, "optim.clip": {"uniform": [0.5, 2.0]}},
        searcher={"seed": seed},
    )
    point = draw(asked, number)
    assert all(asked.search[key].holds(value) for key, value in point.items())
    assert isinstance(point["optim.warmup"], int)
    assert same(point) == same(draw(asked, number))


def test_learning_rates_are_drawn_evenly_over_orders_of_magnitude() -> None:
    drawn = [math.log10(draw(search(RATE), number)["optim.lr"]) for number in range(600)]
    thirds = [sum(low <= value < low + 1 for value in drawn) for low in (-4, -3, -2)]
    assert min(thirds) > 150


def test_a_grid_has_every_combination_once_in_an_order_of_its_seed() -> None:
    first, second = grid(search(CHOICES)), grid(search(CHOICES, searcher={"seed": 1}))
    assert len({same(point) for point in first}) == len(first) == combinations(search(CHOICES)) == 6
    assert {same(point) for point in first} == {same(point) for point in second}
    assert first != second


def test_an_impossible_corner_is_named_with_its_reason(tmp_path: Path) -> None:
    asked = search({"train.global_batch": {"choice": [4, 8]}})
    base = tiny_config(Path("corpus"), tmp_path, cluster={"workers": 6})
    with pytest.raises(PlanError) as refused:
        check(trials(asked, tmp_path, base))
    assert "1 of 2 corners" in str(refused.value)
    assert "train.global_batch = 4" in str(refused.value)
    assert "leave_out" in str(refused.value)


def test_impossible_points_are_left_out_when_asked_and_count_as_no_trial(tmp_path: Path) -> None:
    asked = search({"train.global_batch": {"choice": [4, 8, 16]}}, impossible="leave_out", searcher={"name": "grid"})
    base = tiny_config(Path("corpus"), tmp_path, cluster={"workers": 6})
    made = trials(asked, tmp_path, base)
    assert len(check(made)) == 1
    ledger = Ledger(tmp_path / "ledger.jsonl")
    suggestions = Suggestions(made, ledger, None)
    found = []
    while (trial := suggestions.next()) is not None:
        found.append(trial.parameters["train.global_batch"])
    assert sorted(found) == [8, 16]
    assert len(ledger.left_out) == 1


def test_points_known_as_impossible_are_not_written_down_again(tmp_path: Path) -> None:
    asked = search({"train.global_batch": {"choice": [4, 8, 16]}}, impossible="leave_out", trials=10)
    made = trials(asked, tmp_path, tiny_config(Path("corpus"), tmp_path, cluster={"workers": 6}))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    while Suggestions(made, ledger, None).next() is not None:
        pass
    assert len(ledger.trials) == 2
    assert list(ledger.left_out.values()) == [{"train.global_batch": 4}]


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        ({"first_steps": 50}, "first_steps = 50, but the trial .* ends after "),
        ({"first_tokens": 1e9}, "first_tokens = 1,000,000,000, but the trial .* ends after "),
        ({"first_tokens": 1}, "a step of the trial .* has "),
    ],
)
def test_a_first_rung_that_compares_nothing_is_refused(tmp_path: Path, scheduler: dict[str, int], words: str) -> None:
    base = tiny_config(Path("corpus"), tmp_path, train={"steps": 50}, cluster={"workers": 1})
    with pytest.raises(PlanError, match=words):
        check(trials(search(RATE, scheduler={"name": "asha", **scheduler}), tmp_path, base))


def test_a_space_without_any_possible_point_is_refused_even_then(tmp_path: Path) -> None:
    asked = search({"train.global_batch": {"choice": [1, 2]}}, impossible="leave_out")
    with pytest.raises(PlanError, match="2 of 2 corners"):
        check(trials(asked, tmp_path, tiny_config(Path("corpus"), tmp_path, cluster={"workers": 6})))


def test_a_metric_that_is_never_reported_is_refused(tmp_path: Path) -> None:
    base = tiny_config(Path("corpus"), tmp_path, data={"eval": {"fraction": 0.0}}, cluster={"workers": 1})
    with pytest.raises(PlanError, match="never reported"):
        check(trials(search(RATE), tmp_path, base))
    assert check(trials(search(RATE, metric="train/loss"), tmp_path, base)) == []


@pytest.mark.parametrize("workers", [0, (1, 2)])
def test_trials_have_a_fixed_number_of_workers(tmp_path: Path, workers: Any) -> None:
    base = tiny_config(Path("corpus"), tmp_path, cluster={"workers": workers})
    with pytest.raises(PlanError, match=r"cluster\.workers"):
        check(trials(search(RATE), tmp_path, base))


def test_points_to_try_first_come_first_and_no_point_comes_twice(tmp_path: Path) -> None:
    point = {"optim.weight_decay": 0.1, "optim.schedule": "wsd"}
    asked = search(CHOICES, first=[point], trials=20)
    made, path = trials(asked, tmp_path), tmp_path / "ledger.jsonl"
    first = Suggestions(made, Ledger(path), None).next()
    assert first is not None
    assert first.parameters == point
    points = [same(point)]
    while (trial := Suggestions(made, Ledger(path), None).next()) is not None:  # each from the file alone
        points.append(same(trial.parameters))
    assert len(points) == len(set(points)) == 6


def test_a_trial_is_a_run_of_its_own_that_shares_the_prepared_data(tmp_path: Path) -> None:
    made = trials(search(RATE), tmp_path)
    config = made.config({"optim.lr": 0.002}, "t0007")
    assert (config.optim.lr, config.run.name, config.run.dir) == (0.002, "t0007", str(tmp_path / "trials"))
    assert config.data.cache == str(tmp_path / "cache")
    assert not config.export.at_end


def test_losses_per_token_are_not_compared_between_tokenizers(tmp_path: Path) -> None:
    sizes = {"tokenizer.train.vocab_size": {"choice": [512, 600]}}
    with pytest.raises(PlanError, match="bits_per_byte"):
        check(trials(search(sizes), tmp_path))
    assert check(trials(search(sizes, metric="eval/bits_per_byte"), tmp_path)) == []
