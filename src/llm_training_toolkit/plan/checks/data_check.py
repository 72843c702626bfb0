"""Problems of the tokenizer and the data sources, found before any document is read."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.families import Family, HfValues, ModelSize, list_models_with_tokens
from llm_training_toolkit.families.document_layouts import COMMIT_MARKERS, get_required_markers
from llm_training_toolkit.plan.checks.git_check import find_git_problems
from llm_training_toolkit.plan.problem import Problem

_LAYOUTS_WITHOUT_TOKENS = {"git": "diffs", "notebooks": "script"}


def find_tokenizer_problems(config: Config) -> Iterator[Problem]:
    origin = "path" if config.model.path is not None else "init_from" if config.model.init_from is not None else None
    if config.tokenizer.train is not None and origin is not None:
        what = f"a new tokenizer does not fit the weights of model.{origin}, which know their own tokens"
        yield Problem(
            "new-tokenizer-for-weights",
            "tokenizer.train",
            what,
            "Give tokenizer.path, the tokenizer these weights were trained with",
        )


def find_data_problems(config: Config, size: ModelSize, hf: HfValues) -> Iterator[Problem]:
    family, length = size.family, config.data.sequence_length
    positions = hf[family.position_key]
    if length > positions:
        what = f"{length} tokens are more than the {positions} learned positions of {size.name}"
        more = (
            ""
            if config.model.path is not None
            else f", or raise model.config_overrides.{family.position_key} (from scratch)"
        )
        yield Problem("sequence-too-long", "data.sequence_length", what, f"Use at most {positions}{more}")
    yield from find_git_problems(config.data)
    yield from _find_partition_problems(config)
    if config.data.near_duplicates is not None and importlib.util.find_spec("rensa") is None:
        what = "near-duplicates need the library rensa, which is not installed here"
        yield Problem("near-duplicates-without-rensa", "data.near_duplicates", what, "pip install rensa==0.5.0")
    for index, source in enumerate(config.data.sources):
        yield from _find_source_problems(f"data.sources[{index}]", source, family)
    for index, source in enumerate(config.data.eval.sources):
        yield from _find_source_problems(f"data.eval.sources[{index}]", source, family)


def _find_partition_problems(config: Config) -> Iterator[Problem]:
    """Find partitions that would delay the start like a single one, or that cannot be dealt."""
    partitions, where = config.data.partitions, "data.partitions"
    if partitions is None or partitions == 1:
        return
    if config.train.epochs is not None:
        what = f"{partitions} partitions with train.epochs, whose number of steps needs every one of them first"
        yield Problem("partitions-with-epochs", where, what, "Give train.steps or train.tokens, or set it to 1")
    for index, source in enumerate(config.data.sources):
        if source.group_by == "repository":
            what = f"{partitions} partitions, and data.sources[{index}] assembles its repositories as a whole"
            yield Problem("partitions-of-repositories", where, what, "Set it to 1, or group_by: file")


def _find_source_problems(where: str, source: SourceConfig, family: Family) -> Iterator[Problem]:
    """Find options of a source that the family has no special tokens for."""
    tokens = family.special_tokens
    if source.fim is not None and not tokens.has_fim:
        what = f"{family.name} has no tokens for fill-in-the-middle"
        yield Problem("no-fim-tokens", f"{where}.fim", what, "Remove it, or use a family that has: qwen2.5, starcoder2")
    required = get_required_markers(source.format, source.layout)
    if missing := [marker for marker in required if marker not in tokens.all]:
        yield _build_missing_layout_problem(where, source, family, missing[0])
    shows_diffs = source.format == "git" and source.layout == "auto" and not set(COMMIT_MARKERS) <= set(tokens.all)
    if shows_diffs and source.context != "whole":
        what = f"{family.name} has no tokens for commits, so the history is written as diffs, whose context is fixed"
        yield Problem("context-of-diffs", f"{where}.context", what, "Remove it")
    if source.group_by == "repository" and not source.metadata and family.code_layout.needs_path:
        what = f"{family.name} tells the files of a repository apart by their paths alone"
        yield Problem("repository-needs-metadata", f"{where}.group_by", what, "Set metadata: true, or group_by: file")
    if (source.group_by == "repository" or source.metadata) and not tokens.repository:
        key = "metadata" if source.metadata else "group_by"
        what = f"{family.name} has no tokens for repositories and files"
        yield Problem(
            "no-repository-tokens",
            f"{where}.{key}",
            what,
            "Remove it, or use a family that has: qwen2.5, qwen3, starcoder2",
        )


def _build_missing_layout_problem(where: str, source: SourceConfig, family: Family, marker: str) -> Problem:
    """Build the problem of a layout whose tokens the family lacks, with a layout that needs none where there is one."""
    is_history = source.format == "git"
    models = ", ".join(list_models_with_tokens(get_required_markers(source.format, source.layout)))
    other = _LAYOUTS_WITHOUT_TOKENS.get(source.format)
    use = f"Set layout: {other}, or use" if other else "Use"
    return Problem(
        "no-layout-tokens",
        f"{where}.layout" if is_history else f"{where}.format",
        f"{family.name} has no tokens for {'commits' if is_history else source.format}, such as {marker}",
        f"{use} one of the models that have: {models}",
    )
