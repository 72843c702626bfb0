"""Tokenizer of a dataset: files that are given, or trained on its documents."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import tokenizers

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.load import redact_data
from llm_training_toolkit.config.model_config import TokenizerConfig
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.chat.prompt_templates import build_jinja_template
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.prepare.cleaning import build_cleaning_identity
from llm_training_toolkit.data.prepare.dataset_info import FORMAT_VERSION, compute_cache_key
from llm_training_toolkit.data.prepare.document_index import (
    DocumentIndex,
    DocumentReader,
    list_all_sources,
    split_into_shards,
)
from llm_training_toolkit.data.prepare.renderer import DocumentRenderer, extract_plain_text
from llm_training_toolkit.data.tokenizer import (
    TOKENIZER_FILES,
    TokenizationSpec,
    open_tokenizer,
    resolve_tokenizer_directory,
    split_long_text,
    train_tokenizer,
)

StageProgressCallback = Callable[[str, int, int], None]

_PROGRESS_EVERY = 256  # documents


@dataclass(frozen=True)
class DatasetTokenizer:
    """Tokenizer of a dataset, before and while it is built."""

    config: TokenizerConfig
    data: DataConfig
    """Data with the layouts of its sources resolved."""
    sources: tuple[SourceConfig, ...]
    """All sources, those for evaluation included."""
    markers: TokenizationSpec

    def compute_key(self, sources_fingerprint: str) -> str:
        """Hash the training inputs and settings of a trained tokenizer, or the content of a given one."""
        if self.config.train is not None:
            files = [
                source.model_dump(mode="json", exclude={"weight", "fim", "loss", "overlong"})
                for source in list_all_sources(redact_data(self.data))
            ]
            held_out = [self.data.eval.fraction, self.data.eval.split_by, len(self.data.eval.sources)]
            how = [
                tokenizers.__version__,
                self.config.train.vocab_size,
                asdict(self.markers),
                self._written_template,
            ]
            cleaning = build_cleaning_identity(self.data)
            return compute_cache_key(
                FORMAT_VERSION, sources_fingerprint, files, self.data.on_error, held_out, cleaning, how
            )
        given = [[name, hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in self._given_files]
        template = self._written_template or self.markers.chat_template
        return compute_cache_key(FORMAT_VERSION, given, template if self._has_chat_sources else "")

    @property
    def _written_template(self) -> str | None:
        """Chat template that replaces the tokenizer's own, as Jinja."""
        if self.data.prompt_template is None:
            return None
        return build_jinja_template(self.data.prompt_template, self.markers.tokens.end_of_text)

    @property
    def _has_chat_sources(self) -> bool:
        return any(source.format == "chat" for source in self.sources)

    @cached_property
    def _given_files(self) -> list[tuple[str, Path]]:
        if self.config.path is None:
            return []
        directory = resolve_tokenizer_directory(self.config.path, self.config.revision)
        return [(name, directory / name) for name in TOKENIZER_FILES if (directory / name).is_file()]

    def check(self) -> None:
        """Reject a given tokenizer, or its chat template, before hours of reading."""
        if self.config.path is not None:
            directory = resolve_tokenizer_directory(self.config.path, self.config.revision)
            encoder = open_tokenizer(str(directory))
            DocumentRenderer(
                self.data.sources,
                self.markers,
                encoder,
                directory,
                self.data.sequence_length,
                prompt_template=self.data.prompt_template,
            ).check_special_tokens()

    def build(self, directory: Path, document_index: DocumentIndex, progress: StageProgressCallback) -> None:
        """Train or copy the tokenizer into a directory, with the chat template."""
        if self.config.train is not None:
            train_tokenizer(
                self._iter_training_texts(document_index, progress),
                self.config.train.vocab_size,
                self.markers,
                directory,
            )
        for name, path in self._given_files:  # copied, so that workers elsewhere and later use this very one
            shutil.copyfile(path, directory / name)
        if self._has_chat_sources:  # users of the trained model must render chats as in training
            template = ChatTemplate.from_tokenizer(directory, self.markers.chat_template, self._written_template)
            (directory / "chat_template.jinja").write_text(template.source, encoding="utf-8")

    def _iter_training_texts(self, document_index: DocumentIndex, progress: StageProgressCallback) -> Iterator[str]:
        """Yield the texts for tokenizer training: every document that is not held out."""
        total, done = document_index.count_documents(held=False), 0
        reader = DocumentReader(self.data, document_index)
        for shard in split_into_shards(self.data, document_index, range(len(self.data.sources)), held=False):
            for _, document in reader.read_documents(shard, held=False):
                if done % _PROGRESS_EVERY == 0:
                    progress("tokenizer", done, total)
                done += 1
                yield from split_long_text(extract_plain_text(document, self.sources[document.source]))
        progress("tokenizer", total, total)
