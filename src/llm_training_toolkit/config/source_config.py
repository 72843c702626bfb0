"""One source of documents: its format, fields, filters, chat options and fill-in-the-middle."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from llm_training_toolkit.config.section import ConfigSection, FieldTag, Location, Share, check_timestamp


class FimConfig(ConfigSection):
    """Fill-in-the-middle: a document is split at two points and its middle is moved to the end."""

    rate: Annotated[Share, FieldTag.IDENTITY] = 0.5
    """Share of documents, or of the files of a repository, that are transformed; StarCoder used 0.5."""
    spm_rate: Annotated[Share, FieldTag.IDENTITY] = 0.5
    """Share of transformed documents in suffix-prefix-middle order; the others are prefix-suffix-middle."""
    loss: Annotated[Literal["all", "middle"], FieldTag.IDENTITY] = "all"
    """Train on every token, or only on the middle and its end token."""
    level: Annotated[Literal["context", "document"], FieldTag.IDENTITY] = "context"
    """Order of operations. `context`: split a long document into chunks of a sequence, then transform each. `document`:
    transform the whole document, or file of a repository, then split."""


SourceFormat = Literal["code", "text", "chat", "commits", "issues", "notebooks", "git"]


SourceLayout = Literal["auto", "structured", "script", "commits", "diffs", "edits"]


_LAYOUTS: dict[str, tuple[SourceLayout, ...]] = {
    "notebooks": ("auto", "structured", "script"),
    "git": ("auto", "commits", "diffs", "edits"),
}


_FORMATS_OF_CHANGES = frozenset({"commits", "git"})


_LAYOUTS_OF_HUNKS = frozenset({"diffs", "edits"})


PROMPT_TEMPLATES = ("alpaca", "starchat", "starcoder")


_PLACEHOLDER = re.compile(r"\{(\w*)\}")


def find_prompt_template_problem(template: str) -> str | None:
    """Return the fault of a prompt template given by name or as text, None if it can be used."""
    names = _PLACEHOLDER.findall(template)
    if template in PROMPT_TEMPLATES:
        return None
    if not names:
        return (
            f"{template!r} is neither one of {', '.join(PROMPT_TEMPLATES)} nor a text with {{prompt}}, {{completion}}"
        )
    strange = [name for name in names if name not in {"prompt", "context", "completion"}]
    if strange:
        return f"has {{{strange[0]}}}; known are {{prompt}}, {{context}} and {{completion}}"
    if sorted(set(names)) != sorted(names) or not {"prompt", "completion"} <= set(names):
        return "must have {prompt} and {completion} once, and may have {context} once"
    return None if names[-1] == "completion" else "must have {completion} last"


class FieldsConfig(ConfigSection):
    """Columns of a source's records. An absent one is found by its usual names (docs/data.md, Records)."""

    prompt: Annotated[str | None, FieldTag.IDENTITY] = None
    """Chat: column of the question or instruction."""
    context: Annotated[str | None, FieldTag.IDENTITY] = None
    """Chat: column of an input that belongs to the prompt, such as Alpaca's `input`."""
    completion: Annotated[str | None, FieldTag.IDENTITY] = None
    """Chat: column of the answer."""
    system: Annotated[str | None, FieldTag.IDENTITY] = None
    """Chat: column of the system text."""
    messages: Annotated[str | None, FieldTag.IDENTITY] = None
    """Chat: column of a list of messages. Not together with `prompt`, `context` and `completion`."""
    text: Annotated[str | None, FieldTag.IDENTITY] = None
    """Text: column of the document."""
    content: Annotated[str | None, FieldTag.IDENTITY] = None
    """Code and notebooks: column of the document."""
    path: Annotated[str | None, FieldTag.IDENTITY] = None
    """Code, commits and notebooks: column of the file's path."""
    repository: Annotated[str | None, FieldTag.IDENTITY] = None
    """All but text and chat: column of the repository's name."""
    before: Annotated[str | None, FieldTag.IDENTITY] = None
    """Commits: column of the file before the commit."""
    message: Annotated[str | None, FieldTag.IDENTITY] = None
    """Commits: column of the message or its first line."""
    after: Annotated[str | None, FieldTag.IDENTITY] = None
    """Commits: column of the file after the commit."""
    title: Annotated[str | None, FieldTag.IDENTITY] = None
    """Issues: column of the title."""
    events: Annotated[str | None, FieldTag.IDENTITY] = None
    """Issues: column of the list of events."""
    stars: Annotated[str | None, FieldTag.IDENTITY] = None
    """Code: column of the repository's number of stars."""
    language: Annotated[str | None, FieldTag.IDENTITY] = None
    """Column that a filter by `language` reads."""

    @property
    def given(self) -> dict[str, str]:
        """The columns that were named, by field."""
        return self.model_dump(exclude_none=True)


FIELDS_BY_FORMAT = {
    "chat": frozenset({"prompt", "context", "completion", "system", "messages", "language"}),
    "text": frozenset({"text", "language"}),
    "code": frozenset({"content", "path", "repository", "stars", "language"}),
    "commits": frozenset({"before", "message", "after", "path", "repository", "language"}),
    "issues": frozenset({"title", "events", "repository", "language"}),
    "notebooks": frozenset({"content", "path", "repository", "language"}),
    "git": frozenset(),
}


FilterValue = str | int | float | bool


class QualityConfig(ConfigSection):
    """Filters of code data, as BigCode publishes them (docs/code-data.md). Absent = not applied."""

    max_line_length: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.IDENTITY] = None
    """Maximum length of the longest line in characters. StarCoder and StarCoder2 used 1000."""
    max_mean_line_length: Annotated[Annotated[float, Field(gt=0.0)] | None, FieldTag.IDENTITY] = None
    """Maximum mean length of the lines in characters. StarCoder and StarCoder2 used 100."""
    max_lines: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.IDENTITY] = None
    """Maximum number of lines. StarCoder2 used 100000."""
    min_alphanumeric: Annotated[Share | None, FieldTag.IDENTITY] = None
    """Minimum share of letters and digits among the characters. StarCoder used 0.25."""
    min_alphabetic: Annotated[Share | None, FieldTag.IDENTITY] = None
    """Minimum share of letters among the characters. StarCoder2 used 0.25."""
    drop_generated: Annotated[bool, FieldTag.IDENTITY] = False
    """Drop files that call themselves generated in their first five lines, by StarCoder2's phrases."""
    licenses: Annotated[Annotated[tuple[str, ...], Field(min_length=1)] | None, FieldTag.IDENTITY] = None
    """Licences to keep, in any case: every licence of a record must be among them. `no_license` keeps records and
    files without one."""


def _convert_filter_values(value: object) -> object:
    """Convert a single value, as in `{language: Python}`, to a list of one."""
    if not isinstance(value, dict):
        return value
    return {name: tuple(each) if isinstance(each, list) else (each,) for name, each in value.items()}


class SourceConfig(ConfigSection):
    """Source of documents."""

    path: Annotated[Location, Field(min_length=1), FieldTag.IDENTITY]
    """File, directory, glob, URI (`s3://`, `gs://`, `hf://`) or `python:stdlib` (the standard library of the running
    Python). Files may be compressed (.gz, .bz2, .xz, .zst)."""
    format: Annotated[SourceFormat, FieldTag.IDENTITY]
    """Format of the documents. `code`: one document per file, or per record with `content`. `text`: the same with
    `text`. `chat`: one conversation per record. `commits`, `issues`: one per record, in StarCoder's special tokens.
    `notebooks`: the same per .ipynb file or record. `git`: the commits of a local repository. Records are lines of
    .jsonl files, or rows of .parquet and .arrow files."""
    layout: Annotated[SourceLayout, FieldTag.IDENTITY] = "auto"
    """Notebooks: `structured` = text, code and output in special tokens (`auto`), `script` = one piece of code. Git:
    `commits` = each changed file in StarCoder's commit tokens, `diffs` = each commit as message and unified diff,
    `edits` = each edited region before and after. `auto` = `commits` where the tokenizer has the tokens, else
    `diffs`."""
    before: Annotated[Annotated[str, AfterValidator(check_timestamp)] | None, FieldTag.IDENTITY] = None
    """Git: only commits before this date or time (UTC): a commit counts from the date of its newest ancestor on."""
    after: Annotated[Annotated[str, AfterValidator(check_timestamp)] | None, FieldTag.IDENTITY] = None
    """Git: only commits at this date or time, or later. A held-out source has the date of the training's `before`."""
    context: Annotated[Literal["whole", "window"], FieldTag.IDENTITY] = "whole"
    """Commits, and git with `layout: commits`: show whole files, or, as StarCoder's data did, a fifth of them whole and
    else up to 31 lines on either side of the change."""
    fields: FieldsConfig | None = None
    """Columns of the records. Absent = found by their usual names."""
    subset: Annotated[Annotated[str, Field(min_length=1)] | None, FieldTag.IDENTITY] = None
    """Subset of a data set of several: a configuration of its README, or a directory."""
    split: Annotated[Annotated[str, Field(min_length=1)] | None, FieldTag.IDENTITY] = None
    """Split, such as `train`: the files named after it, or in a directory of its name. Absent = all files."""
    filter: Annotated[
        dict[str, Annotated[tuple[FilterValue, ...], Field(min_length=1)]] | None,
        BeforeValidator(_convert_filter_values),
        FieldTag.IDENTITY,
    ] = None
    """Records to keep: column and the values it may have, such as `{language: [Python, Rust]}`."""
    quality: QualityConfig | None = None
    """Filters of code data. Absent = none. Not for chat."""
    limit: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.IDENTITY] = None
    """Maximum number of documents, the first ones in reading order. The rest of the source is not read."""
    max_document_mb: Annotated[float, Field(gt=0.0, le=1024.0), FieldTag.IDENTITY] = 32.0
    """Maximum size of a document in MiB of UTF-8, which bounds the memory of a preparation. Larger files are cut at
    line ends into documents of at most this size, repositories between files. Larger records are unreadable."""
    prompt_template: Annotated[Annotated[str, Field(min_length=1)] | None, FieldTag.IDENTITY] = None
    """Chat: write conversations by this template instead of the tokenizer's. `alpaca`, `starchat`, `starcoder`, or a
    text with `{prompt}`, `{completion}` and perhaps `{context}`. The same for every chat source of a run."""
    follow_symlinks: Annotated[bool, FieldTag.IDENTITY] = False
    """Read files that are reached through a symbolic link out of a directory or glob, such as to a home directory."""
    fim: FimConfig | None = None
    """Code and text: fill-in-the-middle for this source. Absent = off."""
    group_by: Annotated[Literal["file", "repository"], FieldTag.IDENTITY] = "file"
    """Code: one document per file, or per repository, with all its files in path order."""
    metadata: Annotated[bool, FieldTag.IDENTITY] = False
    """Code: put repository name, file path and star count before a document, in the family's special tokens."""
    loss: Annotated[Literal["assistant", "last_turn", "all"], FieldTag.IDENTITY] = "assistant"
    """Chat: train on all assistant turns and their end tokens, on the last assistant turn only, or on `all` tokens but
    the first, the results of tools, and turns whose own `loss` is off."""
    failed_steps: Annotated[Literal["train", "mask"], FieldTag.IDENTITY] = "train"
    """Chat: train on turns of an agent whose tool result failed, or mask their loss: they stay in the context
    (docs/data.md, Trajectories). Only successful runs: a `filter`, such as `{resolved: true}`."""
    overlong: Annotated[Literal["auto", "split", "window", "drop", "error"], FieldTag.IDENTITY] = "auto"
    """Documents longer than a sequence: split, drop (counted), or stop with an error. Chat: `window` = cut between
    turns, each window with system text, task and earlier turns. `auto` = drop for chat and next edits
    (`layout: edits`), else split."""
    weight: Annotated[Annotated[float, Field(gt=0.0)] | None, FieldTag.IDENTITY] = None
    """Mixture weight: share of the tokens, relative to the weights of the other sources. Set for all sources or for
    none. Without weights every source is seen once per epoch."""

    @property
    def max_document_bytes(self) -> int:
        """Maximum size of a document in bytes."""
        return max(int(self.max_document_mb * (1 << 20)), 1)

    @model_validator(mode="after")
    def _check_format_options(self) -> SourceConfig:
        for_code = [
            name for name in ("group_by", "metadata") if getattr(self, name) != type(self).model_fields[name].default
        ]
        if for_code and self.format != "code":
            raise ValueError(f"{' and '.join(for_code)}: only for format code, not for {self.format}; remove")
        if self.fim is not None and self.format not in {"code", "text"}:
            raise ValueError(f"fim is for formats code and text, not for {self.format}; remove it")
        if self.quality is not None and self.format == "chat":
            raise ValueError("quality is for code and text, not for chat; remove it")
        if self.quality is not None and self.quality.licenses and self.format == "git":
            raise ValueError("quality.licenses: commits have no licence; remove it")
        if self.layout not in _LAYOUTS.get(self.format, ("auto",)):
            known = ", ".join(_LAYOUTS.get(self.format, ("auto",)))
            raise ValueError(f"layout {self.layout}: format {self.format} has {known}")
        for_git = [name for name in ("before", "after") if getattr(self, name) is not None]
        if for_git and self.format != "git":
            raise ValueError(f"{' and '.join(for_git)}: only for format git, not for {self.format}; remove")
        for_files = [name for name in ("fields", "filter", "subset", "split") if getattr(self, name) is not None]
        if for_files and self.format == "git":
            raise ValueError(f"{' and '.join(for_files)}: not for format git, which reads no records; remove")
        if "loss" in self.model_fields_set and self.format != "chat":
            raise ValueError(
                f"loss is for format chat: format {self.format} trains on every token (fim.loss is for "
                "fill-in-the-middle); remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_chat_options(self) -> SourceConfig:
        if self.format != "chat" and (self.overlong == "window" or self.failed_steps != "train"):
            given = "overlong: window" if self.overlong == "window" else "failed_steps"
            raise ValueError(f"{given} is for format chat, not for {self.format}; remove it")
        return self

    @model_validator(mode="after")
    def _check_context(self) -> SourceConfig:
        if self.context != "whole" and self.format not in _FORMATS_OF_CHANGES:
            raise ValueError(f"context is for formats of changes, not for {self.format}; remove it")
        if self.context != "whole" and self.layout in _LAYOUTS_OF_HUNKS:
            raise ValueError(f"context is for layout commits, not for {self.layout}, whose context is fixed; remove it")
        return self

    @model_validator(mode="after")
    def _check_fields(self) -> SourceConfig:
        given = set(self.fields.given) if self.fields else set()
        if strange := sorted(given - FIELDS_BY_FORMAT[self.format]):
            known = ", ".join(sorted(FIELDS_BY_FORMAT[self.format]))
            raise ValueError(f"fields has {' and '.join(strange)}: format {self.format} has {known}")
        if "messages" in given and given & {"prompt", "context", "completion"}:
            raise ValueError("fields has messages and a prompt or completion: a conversation is one or the other")
        return self

    @model_validator(mode="after")
    def _check_prompt_template(self) -> SourceConfig:
        if self.prompt_template is None:
            return self
        if self.format != "chat":
            raise ValueError(f"prompt_template is for format chat, not for {self.format}; remove it")
        if problem := find_prompt_template_problem(self.prompt_template):
            raise ValueError(f"prompt_template {problem}")
        return self

    @model_serializer(mode="wrap")
    def _serialize_applicable_fields(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `loss` for formats that refuse it, so that the result can be loaded again."""
        values: dict[str, Any] = whole(self)
        return values if self.format == "chat" else {name: value for name, value in values.items() if name != "loss"}
