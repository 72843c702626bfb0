"""Small tokenizers of several families, and documents of a source as the tokens that a model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.prepare.renderer import DocumentRenderer
from llm_training_toolkit.data.sources import read_source_documents
from llm_training_toolkit.data.tokenizer import TokenizationSpec, open_tokenizer, train_tokenizer
from llm_training_toolkit.data.types import RenderedDocument
from llm_training_toolkit.families import find_size


def train_family_tokenizer(directory: Path, model: str) -> Path:
    """A byte-level tokenizer with the special tokens of a model's family."""
    train_tokenizer(["value = 1\n"] * 4, 300, TokenizationSpec.from_family(find_size(model).family), directory / model)
    return directory / model


def open_renderer(tokenizer: Path, source: SourceConfig, length: int = 4096) -> DocumentRenderer:
    """The renderer of one source with a tokenizer named after its model."""
    markers = TokenizationSpec.from_family(find_size(tokenizer.name).family)
    return DocumentRenderer([source], markers, open_tokenizer(str(tokenizer)), tokenizer, length)


def render_source(tokenizer: Path, path: Path, length: int = 4096, **fields: Any) -> list[RenderedDocument]:
    """Every document of a source, rendered."""
    source = SourceConfig.model_validate({"path": str(path), **fields})
    renderer = open_renderer(tokenizer, source, length)
    documents = list(enumerate(read_source_documents(source, 0)))
    return renderer.render_documents(0, documents, seed=0, epoch=0, plain=False)


def decode_source(tokenizer: Path, path: Path, **fields: Any) -> list[str]:
    """Every document of a source as text, special tokens written out; each must be one example with loss on all."""
    encoder, texts = open_tokenizer(str(tokenizer)), []
    for rendered in render_source(tokenizer, path, **fields):
        (example,) = rendered.examples
        assert example.loss.all()
        texts.append(encoder.decode(example.tokens))
    return texts
