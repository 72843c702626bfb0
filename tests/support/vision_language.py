"""Checkpoints of vision-language models, of which the toolkit trains the language model alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText

_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}


def save_vision_language_model(text: Mapping[str, Any], directory: Path) -> Any:
    """Write a random model whose language model has the configuration `text`, as transformers publishes it."""
    kind = str(text["model_type"]).removesuffix("_text")
    vision = _VISION | {"out_hidden_size": text["hidden_size"]}
    tied = text["tie_word_embeddings"]
    config = AutoConfig.for_model(kind, text_config=dict(text), vision_config=vision, tie_word_embeddings=tied)
    model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(directory)
    return model
