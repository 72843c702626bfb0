"""Search files: read strictly, every problem named where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_training_toolkit.config.search import load_search, replace_config_values
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.search.space import TrialConfigBuilder, check_search_space

BASE = """
run: {name: base}
model: {name: qwen3-0.6b}
tokenizer: {train: {vocab_size: 512}}
data: {sequence_length: 64, sources: [{path: a, format: code, weight: 1}, {path: b, format: text, weight: 2}]}
train: {tokens: 2e6}
"""
SEARCH = """
base: base.yaml
trials: 4
search:
  optim.lr: {loguniform: [1e-4, 1e-2]}
  data.sources.1.weight: [1, 2.5]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "find.yaml"
    path.write_text(SEARCH)
    return path


def refusal(path: Path, *more: str) -> str:
    path.write_text(SEARCH + "\n".join(more))
    with pytest.raises(ConfigError) as refused:
        load_search(path)
    return str(refused.value)


def test_a_search_file_with_its_base(file: Path) -> None:
    read = load_search(file, ["trials=7", "overrides={train.steps: 50}"])
    assert read.search.trials == 7
    assert (read.base_config.train.tokens, read.base_config.train.steps) == (2_000_000, None)
    assert (read.trial_config.train.tokens, read.trial_config.train.steps) == (None, 50)
    assert read.search.search["data.sources.1.weight"].boundary_values == (1, 2.5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("  optim.lrr: [1.0]", r"find.yaml:7: search.optim.lrr: unknown key; did you mean optim.lr"),
        ("  optm.lr: [1.0]", "unknown key; did you mean optim"),
        ("  optim.lr.high: [1.0]", "it has no high"),
        ("  data.sources.x.weight: [1.0]", "unknown key (valid in data.sources: path"),
        ("  optim.max_grad_norm: []", "optim.max_grad_norm: has nothing to choose from"),
        ("  optim.max_grad_norm: [1.0, 1.0]", "choice has a value twice"),
        ("  optim.max_grad_norm: {uniform: [2, 1]}", "nothing lies between 2 and 1"),
        ("  optim.max_grad_norm: {loguniform: [0, 1]}", "must be above zero"),
        ("  optim.max_grad_norm: {uniform: [0, 1], choice: [1]}", "give exactly one of"),
        ("  optim.max_grad_norm: {gauss: [0, 1]}", "unknown key"),
        ("  train.steps: [10, 20]", "cannot be searched: trials of different lengths"),
        ("  data.eval.fraction: [0.0, 0.1]", "cannot be searched: trials measured on other documents"),
        ("  cluster.workers: [1, 2]", "cannot be searched: all trials take as many workers"),
        ("metric: eval/accuracy", "expected one of eval/loss"),
        ("trails: 5", "unknown key; did you mean trials"),
        ("points_to_evaluate: [{optim.lr: 1e-3}]", "points_to_evaluate.0.data.sources.1.weight: has no value"),
        (
            "points_to_evaluate: [{optim.lr: 1, data.sources.1.weight: 1}]",
            "points_to_evaluate.0.optim.lr = 1: lies outside",
        ),
        ("searcher: {name: grid}", "write out the values of optim.lr"),
        ("scheduler: {grace_period_tokens: 100, grace_period_steps: 10}", "keep one"),
    ],
)
def test_what_is_wrong_is_said_where_it_stands(file: Path, line: str, words: str) -> None:
    assert words in refusal(file, line)


def test_all_problems_are_said_at_once(file: Path) -> None:
    said = refusal(file, "  optim.lrr: [1.0]", "  optim.clp: [1.0]")
    assert len(said.splitlines()) == 2


def test_a_search_without_an_end_is_refused(file: Path) -> None:
    file.write_text(SEARCH.replace("trials: 4\n", ""))
    with pytest.raises(ConfigError, match="the search has no end"):
        load_search(file)


def test_a_list_entry_that_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match="no entry 5 there; it has entries 0 to 1"):
        replace_config_values(load_search(file).base_config, {"data.sources.5.weight": 1.0}, "trial")


def test_a_section_that_was_absent_comes_about(file: Path) -> None:
    config = replace_config_values(load_search(file).base_config, {"model.lora.rank": 8}, "trial")
    assert config.model.lora is not None
    assert config.model.lora.rank == 8


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "configs" / "search").glob("*.yaml")), ids=str)
def test_every_search_in_the_repository_can_be_trained_in_all_its_corners(path: Path, tmp_path: Path) -> None:
    search, _, base = load_search(path)
    assert check_search_space(TrialConfigBuilder(search, base, str(tmp_path), str(tmp_path))) == []
