"""One repository of 30 commits, and small tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from git_histories import History, write_history
from layout_tokens import train_family_tokenizer


@pytest.fixture(scope="session")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    return write_history(tmp_path_factory.mktemp("histories") / "app")


@pytest.fixture(scope="session")
def git_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer directories by model."""
    directory = tmp_path_factory.mktemp("git-tokenizers")
    return {model: train_family_tokenizer(directory, model) for model in ("starcoderbase-1b", "qwen2.5-coder-0.5b")}
