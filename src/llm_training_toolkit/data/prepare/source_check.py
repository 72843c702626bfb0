"""Check of a sample of every source, in seconds: what its records hold, their faults, and their lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.data.chat.messages import Conversation
from llm_training_toolkit.data.prepare.document_index import list_all_sources
from llm_training_toolkit.data.prepare.renderer import DocumentRenderer
from llm_training_toolkit.data.prepare.source_layouts import resolve_source_layouts
from llm_training_toolkit.data.sources import Document, DocumentStats, format_faults, list_source_files, read_sample
from llm_training_toolkit.data.tokenizer import (
    TokenizationSpec,
    open_tokenizer,
    resolve_tokenizer_directory,
)
from llm_training_toolkit.errors import DataError

_FILES = 3  # first, middle and last of a source
_PREVIEW_CHARACTERS = 160
_PREVIEW_MESSAGES, _PREVIEW_WORDS = 8, 40  # of a conversation: messages, and characters of each


@dataclass(frozen=True)
class SourceSample:
    """Sample of one source: files there are, documents read and left out, tokens, faults, and a document's beginning.

    Of all documents of the sample, None without a tokenizer: tokens, examples (pieces of a sequence at most) and their
    tokens with loss, and overlong, the documents longer than a sequence.
    """

    path: str
    files: int
    documents: int
    dropped: dict[str, int]
    tokens: int | None
    examples: int | None
    loss_tokens: int | None
    overlong: int | None
    faults: tuple[str, ...]
    preview: str

    def to_json(self) -> dict[str, Any]:
        """Return an entry of `sources` of `ltt prepare --check --json`."""
        return asdict(self)

    def format_lines(self) -> list[str]:
        """Format the sample as text."""
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in self.dropped.items())
        tokens = ""
        if self.tokens is not None and self.documents:
            tokens = (
                f", {self.tokens / self.documents:,.0f} tokens each, {self.overlong:,} longer than a sequence; "
                f"{self.examples:,} examples with loss on {self.loss_tokens:,} tokens"
            )
        left_out = f" (left out: {dropped})" if dropped else ""
        rows = [f"{self.path}: {self.files:,} files; {self.documents:,} documents of a sample{left_out}{tokens}"]
        rows += [f"  fault: {fault}" for fault in self.faults]
        return [*rows, f"  first: {self.preview}"] if self.preview else rows


def check_sources(config: Config, markers: TokenizationSpec) -> Iterator[SourceSample]:
    """Read the first records of three files of every source, render them, and yield what was found.

    Without a tokenizer of its own (`tokenizer.train`) a configuration's documents are read only. Raises DataError for
    an empty source, an unreachable store or an unusable tokenizer.
    """
    config = config.model_copy(update={"data": resolve_source_layouts(config.data, markers)})
    renderer = _open_renderer(config, markers)
    for index, source in enumerate(list_all_sources(config.data)):
        files = list_source_files(source)
        tally = DocumentStats()
        chosen = sorted({0, len(files) // 2, len(files) - 1})[:_FILES]
        documents = list(read_sample(source, index, [files[number] for number in chosen], tally))
        (tokens, examples, loss_tokens, overlong), refused = _render(
            documents, index, renderer, config.data.sequence_length
        )
        yield SourceSample(
            redact_uri(source.path),
            len(files),
            len(documents),
            dict(tally.dropped),
            tokens,
            examples,
            loss_tokens,
            overlong,
            (*format_faults([tally]), *refused),
            _build_preview(documents, source),
        )


def _open_renderer(config: Config, markers: TokenizationSpec) -> DocumentRenderer | None:
    if config.tokenizer.path is None:
        return None
    directory: Path = resolve_tokenizer_directory(config.tokenizer.path, config.tokenizer.revision)
    renderer = DocumentRenderer(
        list_all_sources(config.data),
        markers,
        open_tokenizer(str(directory)),
        directory,
        config.data.sequence_length,
        prompt_template=config.data.prompt_template,
    )
    renderer.check_special_tokens()
    return renderer


def _render(
    documents: Sequence[Document], index: int, renderer: DocumentRenderer | None, sequence_length: int
) -> tuple[tuple[int, int, int, int] | tuple[None, None, None, None], list[str]]:
    """Return tokens, examples, tokens with loss and overlong documents, and why some cannot be rendered."""
    if renderer is None:
        return (None, None, None, None), []
    lengths, examples, refused = [], [], []
    for number, document in enumerate(documents):
        try:
            (rendered,) = renderer.render_documents(index, [(number, document)], seed=0, epoch=0, plain=True)
        except DataError as error:
            refused.append(str(error))
        else:
            lengths.append(rendered.tokens)
            examples += [int(example.loss.sum()) for example in rendered.examples]
    overlong = sum(length > sequence_length for length in lengths)
    return (sum(lengths), len(examples), sum(examples), overlong), refused


def _build_preview(documents: Sequence[Document], source: SourceConfig) -> str:
    """Return the beginning of the first document on one line."""
    if not documents:
        return ""
    whole = _build_chat_preview(documents[0]) if source.format == "chat" else documents[0].text
    text = " ".join(whole[: 4 * _PREVIEW_CHARACTERS].split())
    return text if len(text) <= _PREVIEW_CHARACTERS else text[: _PREVIEW_CHARACTERS - 1] + "…"


def _build_chat_preview(document: Document) -> str:
    """Return who says what in the first messages, a few words each, with the tools that are called."""
    said = []
    for message in Conversation.from_text(document.text).messages[:_PREVIEW_MESSAGES]:
        words = " ".join(f"{message.content} {message.context or ''}".split())
        shown = words if len(words) <= _PREVIEW_WORDS else words[: _PREVIEW_WORDS - 1] + "…"
        parts = [shown, *(f"{call.name}({call.arguments[:_PREVIEW_WORDS]})" for call in message.tool_calls)]
        masked = " (no loss)" if message.loss is False else ""
        said.append(f"{message.role}{masked}: {' '.join(filter(None, parts))}")
    return " | ".join(said)
