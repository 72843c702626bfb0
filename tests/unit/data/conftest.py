"""A small tokenizer and a way to prepare small corpora, for the tests of the data layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data.tokenizer import TextEncoder, TokenizationSpec, open_tokenizer, train_tokenizer
from tiny_tokenizer import CODE, MARKERS

Configure = Callable[..., Config]


@pytest.fixture(scope="session")
def markers() -> TokenizationSpec:
    return MARKERS


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([CODE] * 4, 300, MARKERS, path)
    return path


@pytest.fixture(scope="session")
def encoder(tokenizer_path: Path) -> TextEncoder:
    return open_tokenizer(str(tokenizer_path))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty short files and one that is many sequences long."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"file{i:02}.py").write_text(f"value_{i} = {i * 7919}\n" + CODE[: 5 + 2 * i], encoding="utf-8")
    (folder / "long.py").write_text("".join(f"x{i} = 'ü{i}😀'\n" for i in range(150)), encoding="utf-8")
    return folder


@pytest.fixture
def configure(tmp_path: Path, tokenizer_path: Path, corpus: Path) -> Configure:
    """Make a configuration over the corpus; keywords change the data section."""

    def make(*, seed: int = 1, tokenizer: dict[str, Any] | None = None, fim: Any = None, **data: Any) -> Config:
        source = {"path": str(corpus), "format": "code", "fim": fim}
        values = {"sequence_length": 64, "sources": [source], "eval": {"fraction": 0.1}, **data}
        return Config.model_validate(
            {
                "run": {"name": "test", "dir": str(tmp_path / "runs"), "seed": seed},
                "model": {"name": "starcoder2-3b"},
                "tokenizer": tokenizer or {"path": str(tokenizer_path)},
                "data": values,
                "train": {"steps": 10} if "weight" in values["sources"][0] else {"epochs": 2},
            }
        )

    return make
