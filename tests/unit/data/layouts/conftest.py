"""Small tokenizers of both StarCoder generations and of Qwen."""

from __future__ import annotations

from pathlib import Path

import pytest

from layout_tokens import train_family_tokenizer


@pytest.fixture(scope="session")
def layout_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tokenizer directories by model."""
    directory = tmp_path_factory.mktemp("layouts")
    return {
        model: train_family_tokenizer(directory, model)
        for model in ("starcoderbase-1b", "starcoder2-3b", "qwen2.5-coder-0.5b")
    }
