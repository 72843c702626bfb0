"""Fill-in-the-middle as it lies on disk after a whole preparation: as often, and in the order, as was asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore
from llm_training_toolkit.data.prepare.builder import prepare_dataset
from llm_training_toolkit.data.prepare.dataset_info import PreparedDataset
from llm_training_toolkit.data.tokenizer import TokenizationSpec, open_tokenizer
from llm_training_toolkit.families import find_size

RATE, SPM_RATE = 0.6, 0.25
CHARACTERS = 59
"""Of every short document."""
LIMITS = {1: 10.83, 2: 13.82}
"""Chi-square by degrees of freedom at p = 0.001."""


def prepared_from(texts: Sequence[str], model: str, folder: Path) -> PreparedDataset:
    """Documents prepared for a model, none of them held out."""
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in texts), encoding="utf-8")
    fim = {"rate": RATE, "spm_rate": SPM_RATE}
    values: dict[str, Any] = {
        "run": {"name": "shares", "dir": str(folder), "seed": 11},
        "model": {"name": model},
        "tokenizer": {"train": {"vocab_size": 512}},
        "data": {
            "sequence_length": 128,
            "sources": [{"path": str(path), "format": "code", "fim": fim}],
            "eval": {"fraction": 0.0},
        },
        "train": {"steps": 1},
    }
    return prepare_dataset(Config.model_validate(values), TokenizationSpec.from_family(find_size(model).family))


def kinds(prepared: PreparedDataset, model: str) -> list[int]:
    """How many examples on disk are plain, begin with a prefix, and begin with a suffix. Sentinels come as a set."""
    tokens = find_size(model).family.special_tokens
    encoder = open_tokenizer(str(prepared.tokenizer_path))
    prefix, suffix, middle = (
        encoder.get_special_token_id(name) for name in (tokens.fim_prefix, tokens.fim_suffix, tokens.fim_middle)
    )
    examples = ExampleStore(prepared.directory / prepared.dataset_info.streams[0].epochs[0].tokens)
    counts = [0, 0, 0]
    for number in range(len(examples)):
        ids = examples[number].tokens.tolist()
        sentinels = [token for token in ids if token in {prefix, suffix, middle}]
        assert sentinels in ([], [prefix, suffix, middle])
        counts[bool(sentinels) + (ids[:2] == [prefix, suffix])] += 1
    return counts


def chi_square(observed: Sequence[int], shares: Sequence[float]) -> float:
    expected = sum(observed) * np.array(shares)
    return float(((np.array(observed) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("model", ["qwen2.5-coder-0.5b", "starcoder2-3b"])
def test_documents_are_rearranged_as_often_as_asked_and_in_both_orders(tmp_path: Path, model: str) -> None:
    texts = [f"value_{i:05d} = {i * 7919:012d}  # first + second".ljust(CHARACTERS, "x") for i in range(4000)]
    observed = kinds(prepared_from(texts, model, tmp_path), model)
    assert sum(observed) == 4000
    # Where the first cut lies before the first character, a prefix of nothing comes first: it looks like the other.
    empty = 1 - (CHARACTERS / (CHARACTERS + 1)) ** 2
    suffix_first = SPM_RATE + (1 - SPM_RATE) * empty
    assert chi_square(observed, [1 - RATE, RATE * (1 - suffix_first), RATE * suffix_first]) < LIMITS[2]


@pytest.mark.parametrize("model", ["qwen2.5-coder-0.5b", "starcoder2-3b"])
def test_chunks_of_long_documents_are_rearranged_as_often_as_asked(tmp_path: Path, model: str) -> None:
    texts = ["".join(f"value_{i} = {j * 7919} + first(second)\n" for j in range(500 + i)) for i in range(40)]
    plain, *moved = kinds(prepared_from(texts, model, tmp_path), model)
    assert plain + sum(moved) > 2500
    assert chi_square([plain, sum(moved)], [1 - RATE, RATE]) < LIMITS[1]
