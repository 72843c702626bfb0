"""What a family's special tokens cannot say of a source is a problem before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.plan import make_plan


def problems(model: str, source: dict[str, Any], *, held_out: bool = False) -> list[str]:
    given = {"path": "x", "format": "code", **source}
    plain = {"path": "y", "format": "code"}
    data = {"sources": [plain], "eval": {"sources": [given]}} if held_out else {"sources": [plain, given]}
    config = Config.model_validate(
        {
            "run": {"name": "x"},
            "model": {"name": model},
            "tokenizer": {"path": "t"},
            "data": {"sequence_length": 128, **data},
            "train": {"steps": 1},
        }
    )
    return [problem.where for problem in make_plan(config).problems]


FOUND = [
    ("qwen2-0.5b", {"metadata": True}, ["data.sources[1].metadata"]),
    ("qwen2-0.5b", {"per": "repository"}, ["data.sources[1].per"]),
    ("qwen2-0.5b", {"metadata": True, "fim": {}}, ["data.sources[1].fim", "data.sources[1].metadata"]),
    ("starcoderbase-1b", {"per": "repository"}, ["data.sources[1].per"]),
    ("starcoderbase-1b", {"per": "repository", "metadata": True, "fim": {}}, []),
    ("starcoder2-3b", {"per": "repository"}, []),
    ("qwen3-0.6b", {"per": "repository", "metadata": True, "fim": {}}, []),
]


@pytest.mark.parametrize(("model", "source", "where"), FOUND)
def test_sources_that_the_family_cannot_write(model: str, source: dict[str, Any], where: list[str]) -> None:
    assert problems(model, source) == where


def test_held_out_sources_are_checked_too() -> None:
    assert problems("qwen2-0.5b", {"metadata": True}, held_out=True) == ["data.eval.sources[0].metadata"]
