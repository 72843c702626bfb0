"""Size of saved weights that no known name describes: read from their config.json and their tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

from llm_training_toolkit.errors import PlanError
from llm_training_toolkit.families.family import Family, HfValues, ModelSize
from llm_training_toolkit.families.hf_config import (
    find_value_problem,
    find_window_problem,
    normalize_saved_values,
    select_size_values,
)

# Configuration values that put layers without experts into a mixture, and their only supported values: parameters,
# FLOPs and memory are counted with experts in each layer.
_EXPERTS_IN_EACH_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_NULLABLE = {"n_inner"}  # transformers saves null for four times the width


def choose_family(
    families: Iterable[Family], has_token: Callable[[str], bool], model_type: str | None = None
) -> Family | None:
    """Return the family with the most special tokens of a tokenizer and the fewest others, or None without a match.

    Several families share a class of transformers (`model_type`) and differ in these tokens alone. A candidate must
    have its end of text in the tokenizer.
    """

    def count_tokens(family: Family) -> tuple[int, int]:
        present = sum(map(has_token, family.special_tokens.all))
        return present, present - len(family.special_tokens.all)

    candidates = [
        family
        for family in families
        if (model_type is None or family.model_type == model_type) and has_token(family.special_tokens.end_of_text)
    ]
    return max(candidates, key=count_tokens, default=None)


def read_tokenizer_family(families: Iterable[Family], model_type: str, files: Iterable[Path | None]) -> Family:
    """Return the family of a known class by the first tokenizer.json that is on this machine.

    Without one, and for a tokenizer of no family, it is the family of this class with the most special tokens.
    """
    of_class = [family for family in families if family.model_type == model_type]
    fallback = max(of_class, key=lambda family: len(family.special_tokens.all))
    for file in files:
        if file is not None:
            tokens = frozenset(token for family in of_class for token in family.special_tokens.all)
            present = _find_tokens(file, file.stat().st_mtime_ns, tokens)
            return choose_family(of_class, present.__contains__) or fallback
    return fallback


@lru_cache(maxsize=8)
def _find_tokens(file: Path, modified: int, tokens: frozenset[str]) -> frozenset[str]:  # noqa: ARG001 - key of the cache
    """Return the tokens that a tokenizer.json has; it is read once, as a plan looks its size up several times.

    Compared as text: parsing the 11 MB of Qwen's tokenizer would take longer than the rest of the plan.
    """
    text = file.read_text(encoding="utf-8")
    return frozenset(token for token in tokens if json.dumps(token) in text)


def build_saved_size(name: str, where: str, found: HfValues, example: ModelSize) -> ModelSize:
    """Return the size with the values of a saved configuration; `example` is a known size of its family.

    Raises PlanError with all values that are missing, of a wrong type, or not supported.
    """
    family = example.family
    values = {"tie_word_embeddings": family.tied_by_default, **normalize_saved_values(family, found)}
    missing = [key for key in example.config if values.get(key) is None and key not in _NULLABLE]
    wrong = [
        find_value_problem(key, values[key], value)
        for key, value in example.config.items()
        if values.get(key) is not None and not isinstance(value, dict)
    ]
    problems = [f"{key} is missing" for key in missing] + [problem for problem in wrong if problem is not None]
    problems += _find_layers_without_experts(family, found)
    window = find_window_problem(example, found)
    problems += [] if window is None else [window]
    if problems:
        raise PlanError("\n".join(f"{where}, config.json: {problem}" for problem in problems))
    return ModelSize(name, family, select_size_values(example, values))


def _find_layers_without_experts(family: Family, found: HfValues) -> list[str]:
    if "router_aux_loss_coef" not in family.defaults:
        return []
    return [
        f"{key} = {found[key]} puts layers without experts into a mixture, which is not supported"
        for key, supported in _EXPERTS_IN_EACH_LAYER.items()
        if found.get(key, supported) not in (supported, None)
    ]
