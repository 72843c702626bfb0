"""Configuration schema of a run: every field with its type, default and meaning.

Defaults are defined here only. The docstring of a field becomes its entry in docs/configuration.md. The tag of a field
says what happens if it changes after the run has started.
"""

from __future__ import annotations

import enum
import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llm_training_toolkit.config.timestamps import check_timestamp
from llm_training_toolkit.config.uri import has_userinfo

SECRET_ERROR = "secret"  # noqa: S105 - type of pydantic's error whose value must not be shown


class FieldTag(enum.Enum):
    """Effect of changing a field after the run has started."""

    IDENTITY = "identity"
    """Part of the run's identity: a change is refused unless accepted by name (`--accept KEY`)."""
    HORIZON = "horizon"
    """Length of the run: changed with `--extend`."""
    FREE = "free"
    """Free to change at every start."""


def _convert_integral_float(value: object) -> object:
    """Convert `2e9` to 2000000000; pass everything else on to pydantic."""
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


_MAX_COUNT = 10**15  # Maximum length, batch size or number of threads: beyond any cluster, and safe in 64 bits.
Count = Annotated[int, BeforeValidator(_convert_integral_float), Field(ge=1, le=_MAX_COUNT)]


def _check_whole_number(value: object) -> object:
    """Refuse true and 1.0, which a Literal of integers would accept as 1."""
    if isinstance(value, bool | float):
        raise ValueError("write a whole number")
    return value


Share = Annotated[float, Field(ge=0.0, le=1.0)]
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration_seconds(text: str) -> float | None:
    """Return the seconds of a duration such as `90s`, `10m` or `1.5h`, or None if the text is something else."""
    match = _DURATION.fullmatch(text)
    return float(match[1]) * _SECONDS[match[2]] if match else None


def _check_interval(value: object) -> object:
    if isinstance(value, str) and not parse_duration_seconds(value):
        raise ValueError("write a number of steps (200) or a duration above zero (90s, 10m, 1.5h)")
    return value


Interval = Annotated[Annotated[int, Field(ge=1)] | str, BeforeValidator(_check_interval)]


def _check_duration(value: object) -> object:
    if not isinstance(value, str) or not parse_duration_seconds(value):
        raise ValueError("write a duration above zero (90s, 10m, 1.5h)")
    return value


Duration = Annotated[str, BeforeValidator(_check_duration)]


def _check_worker_range(value: object) -> object:
    """Accept one number, or a minimum and a maximum; refuse true and 1.0."""
    ends = tuple(value) if isinstance(value, list | tuple) else (value,)
    numbers = [end for end in ends if isinstance(end, int) and not isinstance(end, bool)]
    pair = isinstance(value, list | tuple)
    right = len(numbers) == len(ends) == 1 + pair and min(numbers) >= pair and numbers == sorted(numbers)
    if not right:
        raise ValueError("write a number of workers (4), or the fewest (at least 1) and the most of them ([1, 8])")
    return ends if pair else value


def _check_checkpointing(value: object) -> object:
    """Refuse the values of earlier versions."""
    if isinstance(value, bool):
        raise ValueError(f"write {'full' if value else 'none'} for what was {str(value).lower()}, or auto")
    return value


def _check_no_userinfo(value: str) -> str:
    if has_userinfo(value):
        raise PydanticCustomError(
            SECRET_ERROR,
            "the address holds a user, key or token, which the run directory and logs would repeat: give keys by "
            "environment variables (docs/data.md, Addresses)",
        )
    return value


Location = Annotated[str, AfterValidator(_check_no_userinfo)]  # path, URI or hub id


Workers = Annotated[int | tuple[int, int], BeforeValidator(_check_worker_range)]


class ConfigSection(BaseModel):
    """Section of the configuration: strict and frozen, unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class RunConfig(ConfigSection):
    """Name, directory and random seed of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), FieldTag.FREE]
    """Name of the run and of its directory. Starting the same name again resumes the run."""
    dir: Annotated[Location, Field(min_length=1), FieldTag.FREE] = "runs"
    """Directory of all runs. On a cluster a path shared by all nodes, or `s3://bucket/path` (docs/checkpoints.md)."""
    seed: Annotated[int, Field(ge=0), FieldTag.IDENTITY] = 42
    """Random seed for initial weights, data order, fill-in-the-middle and dropout."""
    deterministic: Annotated[bool, FieldTag.FREE] = False
    """Use only deterministic kernels (slower on GPUs). On CPU a run is bit-for-bit reproducible without it."""


class LoraConfig(ConfigSection):
    """LoRA: train two low-rank matrices beside each linear layer; the model's own weights are frozen."""

    rank: Annotated[int, Field(ge=1), FieldTag.IDENTITY] = 16
    """Rank: inner dimension of an adapter's two matrices."""
    alpha: Annotated[int, Field(ge=1), FieldTag.IDENTITY] = 32
    """Numerator of the scaling alpha / rank of an adapter's output."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0), FieldTag.IDENTITY] = 0.0
    """Dropout on the input of an adapter. Masks depend only on seed, step and sequence."""
    target_modules: Annotated[Literal["auto"] | Annotated[tuple[str, ...], Field(min_length=1)], FieldTag.IDENTITY] = (
        "auto"
    )
    """Linear layers with adapters, by name. `auto` = attention and feed-forward (MoE models: attention only)."""
    use_rslora: Annotated[bool, FieldTag.IDENTITY] = False
    """Scale by alpha / √rank instead (rsLoRA, Kalajdzievski 2023), so that higher ranks learn as fast."""
    use_dora: Annotated[bool, FieldTag.IDENTITY] = False
    """Train the magnitude of each weight row separately from its direction (DoRA, Liu et al. 2024). Slower."""
    modules_to_save: Annotated[tuple[str, ...], FieldTag.IDENTITY] = ()
    """Modules to train in full besides the adapters: the embedding or the output layer, by name."""
    quantize: Annotated[Literal["nf4"] | None, FieldTag.IDENTITY] = None
    """Quantize the frozen linear layers to 4 bits (QLoRA, Dettmers et al. 2023). GPU only."""


class ModelConfig(ConfigSection):
    """Model architecture, initial weights and adapters."""

    name: Annotated[str, FieldTag.IDENTITY]
    """Size of a known family, such as `qwen3-0.6b`, in any case, with or without its organization. May be left out
    where `path` ends with it (`Qwen/Qwen3-0.6B`). For an unknown name `ltt plan` lists the nearest ones."""
    path: Annotated[Location | None, FieldTag.IDENTITY] = None
    """Pretrained weights: a directory or a hub id. Without `path` and `init_from` the weights are random."""
    init_from: Annotated[Location | None, FieldTag.IDENTITY] = None
    """Directory of another run. Starts from the weights of its newest checkpoint at step 0, with a new optimizer."""
    config_overrides: Annotated[dict[str, int | float | bool], FieldTag.IDENTITY] = {}
    """Changes to the size's architecture, by the names of its Hugging Face configuration. From scratch only."""
    resize_vocab_to: Annotated[Annotated[int, Field(gt=0, multiple_of=64)] | None, FieldTag.IDENTITY] = None
    """Number of embedding rows, if the tokenizer has more entries than the weights of `path`: a multiple of 64, such as
    49216. New rows start as the mean of the old ones. Absent = as in the weights; rows are never removed."""
    attn_implementation: Annotated[
        Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"],
        FieldTag.FREE,
    ] = "auto"
    """Implementation of attention. Packed documents attend to themselves alone with each of them. `varlen` and the
    flash packages compute document by document, without a mask; the flash packages and flex_attention need a GPU.
    `auto` = varlen on GPUs in bf16, else sdpa."""
    activation_checkpointing: Annotated[
        Literal["auto", "none", "selective", "full"], BeforeValidator(_check_checkpointing), FieldTag.FREE
    ] = "auto"
    """Activations recomputed in the backward pass, which leaves the result as it is. `full` keeps the input of each
    layer alone: about a third more time for much less memory. `selective` also keeps the outputs of attention and of
    every second matrix product. `auto` = the least recomputation that fits into device memory by the estimate. A resume
    keeps the value."""
    loss_chunk_size: Annotated[Annotated[int, Field(ge=0)] | Literal["auto"], FieldTag.IDENTITY] = "auto"
    """Tokens per chunk of the cross-entropy loss, so that the full logits are never materialized. `auto` = chunks of 67
    million logits (0.4 GB in bf16): 441 tokens for Qwen's vocabulary. 0 = no chunks."""
    lora: LoraConfig | None = None
    """Train adapters instead of the model. Absent = train the model itself."""

    @model_validator(mode="after")
    def _check_weights_origin(self) -> ModelConfig:
        if self.path is not None and self.init_from is not None:
            raise ValueError("path and init_from both name weights to start from: keep one")
        if self.config_overrides and (self.path is not None or self.init_from is not None):
            raise ValueError("config_overrides changes a model from scratch: saved weights bring their own; remove it")
        if self.resize_vocab_to is not None and self.path is None:
            raise ValueError(
                "resize_vocab_to is for weights of model.path; from scratch set config_overrides.vocab_size"
            )
        if self.resize_vocab_to is not None and self.lora is not None:
            raise ValueError(
                "resize_vocab_to adds rows to weights that adapters leave as they are: keep one of the two"
            )
        return self


class TrainTokenizerConfig(ConfigSection):
    """Byte-level BPE tokenizer trained for the run, with the special tokens of the model's family."""

    vocab_size: Annotated[int, Field(ge=512, le=1_000_000), FieldTag.IDENTITY]
    """Number of vocabulary entries, including special tokens."""


class TokenizerConfig(ConfigSection):
    """Tokenizer of the run: exactly one of the two fields."""

    path: Annotated[Location | None, FieldTag.IDENTITY] = None
    """Directory with a tokenizer.json, or a hub id."""
    train: TrainTokenizerConfig | None = None
    """Train a tokenizer on the run's own documents."""

    @model_validator(mode="after")
    def _check_tokenizer_origin(self) -> TokenizerConfig:
        if (self.path is None) == (self.train is None):
            raise ValueError("give exactly one of tokenizer.path and tokenizer.train")
        return self


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
    `edits` = each edited region before and after; `auto` = `commits` where the tokenizer has the tokens, else
    `diffs`."""
    before: Annotated[Annotated[str, AfterValidator(check_timestamp)] | None, FieldTag.IDENTITY] = None
    """Git: only commits before this date or time (UTC): a commit counts from the date of its newest ancestor on."""
    after: Annotated[Annotated[str, AfterValidator(check_timestamp)] | None, FieldTag.IDENTITY] = None
    """Git: only commits at this date or time, or later. A held-out source has the date of the training's `before`."""
    context: Annotated[Literal["whole", "window"], FieldTag.IDENTITY] = "whole"
    """Commits, and git in this layout: show whole files, or, as StarCoder's data did, a fifth of them whole and else up
    to 31 lines on either side of the change."""
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
    """Fill-in-the-middle for this source. Absent = off. Not for chat."""
    group_by: Annotated[Literal["file", "repository"], FieldTag.IDENTITY] = "file"
    """Code: one document per file, or per repository, with all its files in path order."""
    metadata: Annotated[bool, FieldTag.IDENTITY] = False
    """Code: put repository name, file path and star count before a document, in the family's special tokens."""
    loss: Annotated[Literal["assistant", "last_turn", "all"], FieldTag.IDENTITY] = "assistant"
    """Chat: train on all assistant turns and their end tokens, on the last assistant turn only, or on every token."""
    overlong: Annotated[Literal["auto", "split", "drop", "error"], FieldTag.IDENTITY] = "auto"
    """Documents longer than a sequence: split, drop (counted), or stop with an error. `auto` = drop for chat, else
    split."""
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
        if self.context != "whole" and self.format not in _FORMATS_OF_CHANGES:
            raise ValueError(f"context is for formats of changes, not for {self.format}; remove it")
        if "loss" in self.model_fields_set and self.format != "chat":
            raise ValueError(
                f"loss is for format chat: format {self.format} trains on every token (fim.loss is for "
                "fill-in-the-middle); remove it"
            )
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


class EvalSplitConfig(ConfigSection):
    """Held-out documents: a fraction of the training documents, or separate sources."""

    fraction: Annotated[float, Field(ge=0.0, lt=1.0), FieldTag.IDENTITY] = 0.01
    """Fraction of the documents held out of training, chosen by hash, and of their text within limits (docs/data.md).
    Must not be set with `sources`, and is then 0."""
    split_by: Annotated[Literal["document", "repository"], FieldTag.IDENTITY] = "document"
    """Unit of the fraction: documents, by the hash of their content, or repositories, by the hash of their name. With
    `repository` no file of a held-out repository is trained on."""
    sources: tuple[SourceConfig, ...] = ()
    """Sources to hold out instead, never trained on. Documents of `data.sources` with the same content are dropped and
    counted as `in_eval`."""

    @model_validator(mode="after")
    def _check_split_choice(self) -> EvalSplitConfig:
        if self.sources and "fraction" not in self.model_fields_set:
            object.__setattr__(self, "fraction", 0.0)  # frozen; earlier validators do not see strict values
        if self.sources and (self.fraction > 0.0 or self.split_by != "document"):
            given = "fraction" if self.fraction > 0.0 else "split_by"
            raise ValueError(f"{given} chooses among the training documents, sources names others: keep one of the two")
        if any(source.fim is not None for source in self.sources):
            raise ValueError("sources: held-out documents are not rearranged; remove fim")
        if any(source.weight is not None for source in self.sources):
            raise ValueError("sources: every held-out document is evaluated once; remove weight")
        return self


class NearDuplicatesConfig(ConfigSection):
    """Near-duplicates by MinHash over shingles of five words, as BigCode removes them. Conversations are left as they
    are.
    """

    threshold: Annotated[float, Field(gt=0.0, le=1.0), FieldTag.IDENTITY] = 0.8
    """Estimated Jaccard similarity with a document read before from which on a document is dropped."""


class DecontaminationConfig(ConfigSection):
    """Training documents that share a sequence of words with a benchmark are dropped, as for Qwen2.5-Coder."""

    paths: Annotated[tuple[Annotated[Location, Field(min_length=1)], ...], Field(min_length=1), FieldTag.IDENTITY]
    """Benchmarks: files, directories or globs. Of records, such as HumanEval's and MBPP's, every text counts; other
    files count as a whole."""
    ngram_words: Annotated[int, Field(ge=1, le=1000), FieldTag.IDENTITY] = 10
    """Number of words in sequence, case and punctuation aside, that must not occur in training."""


class DataConfig(ConfigSection):
    """Training data and held-out documents."""

    sequence_length: Annotated[int, Field(ge=16, le=10**9), FieldTag.IDENTITY]
    """Tokens per packed sequence."""
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    """Sources of training documents, each seen once per epoch or by its weight."""
    eval: EvalSplitConfig = EvalSplitConfig()
    """Held-out documents."""
    near_duplicates: NearDuplicatesConfig | None = None
    """Drop near-duplicates, within and across sources, also of `eval.sources`. Absent = only equal documents."""
    decontamination: DecontaminationConfig | None = None
    """Drop training documents that share text with benchmarks. Absent = off."""
    on_error: Annotated[Literal["stop", "skip"], FieldTag.IDENTITY] = "stop"
    """Unreadable documents: stop and name the document, or skip and count it."""
    max_skipped: Annotated[Share, FieldTag.IDENTITY] = 0.001
    """Maximum share of documents that `on_error: skip` may skip."""
    cache: Annotated[Location, Field(min_length=1), FieldTag.FREE] = "auto"
    """Directory for tokenized data, shared by runs. `auto` = `.cache` in `run.dir`, or `~/.cache/llm-training-toolkit`
    if `run.dir` is an object store."""

    @property
    def source_weights(self) -> tuple[float, ...]:
        """Weights of the sources; empty if they have none."""
        return tuple(source.weight for source in self.sources if source.weight is not None)

    @property
    def prompt_template(self) -> str | None:
        """Prompt template of every chat source, None for the tokenizer's own."""
        return next((source.prompt_template for source in self._chat_sources), None)

    @property
    def _chat_sources(self) -> list[SourceConfig]:
        return [source for source in (*self.sources, *self.eval.sources) if source.format == "chat"]

    @model_validator(mode="after")
    def _check_one_prompt_template(self) -> DataConfig:
        if len({source.prompt_template for source in self._chat_sources}) > 1:
            raise ValueError(
                "sources: a model has one chat template: give every chat source, held-out ones included, the same "
                "prompt_template, or none"
            )
        return self

    @model_validator(mode="after")
    def _check_source_weights(self) -> DataConfig:
        without = [source.path for source in self.sources if source.weight is None]
        if self.source_weights and without:
            raise ValueError(f"sources: a weight for every one or for none; {', '.join(without)} has none")
        return self


class OptimConfig(ConfigSection):
    """Optimizer and learning rate schedule. Norms and biases have no weight decay."""

    name: Annotated[Literal["adamw"], FieldTag.IDENTITY] = "adamw"
    """Optimizer."""
    lr: Annotated[Annotated[float, Field(gt=0.0)] | Literal["auto"], FieldTag.IDENTITY] = "auto"
    """Peak learning rate. `auto` = by training method and model size; `ltt plan` shows the value."""
    betas: Annotated[tuple[float, float], FieldTag.IDENTITY] = (0.9, 0.95)
    """Decay rates of the first and second moment. Qwen and StarCoder use 0.95 for the second."""
    eps: Annotated[float, Field(gt=0.0), FieldTag.IDENTITY] = 1e-8
    """Epsilon, added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0), FieldTag.IDENTITY] = 0.1
    """Decoupled weight decay of matrices."""
    lr_scheduler: Annotated[Literal["constant", "linear", "cosine", "wsd"], FieldTag.IDENTITY] = "cosine"
    """Learning rate schedule after warm-up; `wsd` = constant, then a linear decay over the last `decay` of the run."""
    warmup: Annotated[Share | Annotated[int, Field(ge=0)], FieldTag.IDENTITY] = 0.01
    """Length of the warm-up from zero: a share of the run (0.01) or a number of steps (100)."""
    decay: Annotated[Share, FieldTag.IDENTITY] = 0.2
    """Share of the run that the decay of `wsd` takes."""
    min_lr_ratio: Annotated[Share, FieldTag.IDENTITY] = 0.1
    """Final learning rate, as a share of the peak."""
    max_grad_norm: Annotated[float, Field(ge=0.0), FieldTag.IDENTITY] = 1.0
    """Maximum gradient norm for clipping; 0 = no clipping."""

    @model_validator(mode="after")
    def _check_betas(self) -> OptimConfig:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), not {self.betas}")
        return self


class TrainConfig(ConfigSection):
    """Length of the run, batch sizes and precision."""

    tokens: Annotated[Count | None, FieldTag.HORIZON] = None
    """Length of the run in tokens, padding included (2e9 is fine). Exactly one of tokens, steps and epochs."""
    steps: Annotated[Count | None, FieldTag.HORIZON] = None
    """Length of the run in optimizer steps."""
    epochs: Annotated[Count | None, FieldTag.HORIZON] = None
    """Length of the run in passes over the data."""
    global_batch_size: Annotated[int, Field(ge=1, le=_MAX_COUNT), FieldTag.IDENTITY] = 64
    """Sequences per optimizer step, over all workers. Does not depend on the number of workers."""
    micro_batch_size: Annotated[Annotated[int, Field(ge=1, le=_MAX_COUNT)] | Literal["auto"], FieldTag.FREE] = "auto"
    """Sequences per forward pass on one worker. Affects memory and speed, not the result. `auto` = as many as fit into
    device memory by the estimate, halved whenever an allocation fails. A resume keeps the value; a new run of the same
    file may get another value and then differs by rounding."""
    precision: Annotated[Literal["auto", "bf16", "fp32"], FieldTag.IDENTITY] = "auto"
    """Precision of the forward and backward pass. Weights are stored and updated in fp32 in either case. `auto` picks
    bf16 on GPUs that support it, and on CPUs if a measurement on every worker finds it no slower than fp32. A resume
    keeps the value."""
    router_balance: Annotated[Annotated[float, Field(gt=0.0, le=1.0)] | None, FieldTag.IDENTITY] = None
    """Mixtures of experts: weight of a loss that loads the experts evenly, such as 0.001. It is taken in each sequence,
    so that the objective does not depend on micro-batches and workers (docs/objective.md). Absent = no such loss."""

    @model_validator(mode="after")
    def _check_run_length(self) -> TrainConfig:
        if sum(length is not None for length in (self.tokens, self.steps, self.epochs)) != 1:
            raise ValueError("give exactly one of train.tokens, train.steps and train.epochs")
        return self


Offload = Literal["none", "optimizer", "optimizer_and_weights"]


class EngineConfig(ConfigSection):
    """DeepSpeed settings."""

    zero_stage: Annotated[Literal["auto", 0, 1, 2, 3], BeforeValidator(_check_whole_number), FieldTag.FREE] = "auto"
    """ZeRO stage. Stage 1 shards the optimizer state over the workers, 2 also gradients, 3 also weights. For one worker
    `auto` = the cheapest. For several it is chosen with the micro-batch, by the estimate of memory."""
    offload: Annotated[Offload, FieldTag.FREE] = "none"
    """What stays in host memory instead of on the device: `optimizer` (fp32 weights and Adam's moments, ZeRO 1 or 3) or
    `optimizer_and_weights` (ZeRO 3). A run may change it. Results are those of `none`: bit for bit at ZeRO 1, and at 3
    but for the order in which DeepSpeed adds up the gradient norm."""
    deepspeed: Annotated[dict[str, Any], FieldTag.FREE] = {}
    """Additional DeepSpeed configuration, passed on unchanged. Keys that the toolkit sets are refused."""


class CheckpointConfig(ConfigSection):
    """Checkpoint interval and retention."""

    interval: Annotated[Interval, FieldTag.FREE] = "10m"
    """Steps (200) or time (10m) between checkpoints. The last step is always saved."""
    keep_latest: Annotated[int, Field(ge=1), FieldTag.FREE] = 3
    """Number of newest checkpoints to keep."""
    keep_every: Annotated[int, Field(ge=0), FieldTag.FREE] = 0
    """Keep every checkpoint whose step is a multiple of this number. 0 = off."""
    keep_best: Annotated[int, Field(ge=0), FieldTag.FREE] = 1
    """Number of checkpoints with the lowest held-out loss to keep, among those of evaluated steps. 0 = off."""


class EvalTaskConfig(ConfigSection):
    """Evaluation task. Absent fields have the defaults of `ltt evaluate`."""

    task: Annotated[Literal["perplexity", "infill", "humaneval"], FieldTag.FREE]
    """Loss of documents, infilling of gaps in code, or functions with unit tests (docs/evaluation.md)."""
    interval: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.FREE] = None
    """Steps between evaluations of checkpoints during training; all workers wait. Absent = only at the end."""
    data: Annotated[Location | None, FieldTag.FREE] = None
    """Documents, or a file of problems. Absent = the held-out documents; for humaneval its package's 164 problems."""
    format: Annotated[Literal["code", "text", "chat"] | None, FieldTag.FREE] = None
    """Format of the documents."""
    limit: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.FREE] = None
    """infill, humaneval: number of documents or problems."""
    samples: Annotated[Annotated[int, Field(ge=1)] | None, FieldTag.FREE] = None
    """humaneval: completions per problem, for pass@10 and pass@100."""
    temperature: Annotated[Annotated[float, Field(ge=0.0)] | None, FieldTag.FREE] = None
    """humaneval: sampling temperature; 0 = greedy decoding."""

    @model_validator(mode="after")
    def _check_task_options(self) -> EvalTaskConfig:
        own = {
            "perplexity": {"format"},
            "infill": {"format", "limit"},
            "humaneval": {"limit", "samples", "temperature"},
        }
        strange = [name for name in self.get_task_options() if name not in own[self.task] | {"data"}]
        if strange:
            raise ValueError(f"{' and '.join(strange)}: not for task {self.task}; remove")
        if self.samples is not None and self.samples > 1 and not self.temperature:
            raise ValueError("samples are all the same without a temperature: 0.2 and 0.8 are usual")
        return self

    def get_task_options(self) -> dict[str, Any]:
        """Return the options that were given besides the task, as `ltt evaluate` takes them."""
        return self.model_dump(exclude={"task", "interval"}, exclude_none=True)


_EVAL_SHARE = 0.02  # of the sequences trained between two evaluations, the default of eval.max_sequences
_MIN_EVAL_TOKENS = 1 << 16


class EvalConfig(ConfigSection):
    """Evaluation of the held-out loss and of tasks."""

    interval: Annotated[int, Field(ge=1), FieldTag.FREE] = 200
    """Steps between evaluations; step 0 and the last step are always evaluated."""
    max_sequences: Annotated[Annotated[int, Field(ge=1, le=_MAX_COUNT)] | Literal["auto"], FieldTag.IDENTITY] = "auto"
    """Maximum number of held-out sequences per evaluation, a fixed random sample of all. `auto` = 2 % of the sequences
    trained between two evaluations, but at least 65,536 tokens."""
    tasks: tuple[EvalTaskConfig, ...] = ()
    """Tasks run on the exported model at the end, and during training at their `interval`. Failed tasks are only
    reported."""


class ExportConfig(ConfigSection):
    """Export at the end of the run."""

    at_end: Annotated[bool, FieldTag.FREE] = True
    """Write a Hugging Face directory to `<run>/export` when the run finishes."""


class ClusterConfig(ConfigSection):
    """Workers, their resources and placement."""

    workers: Annotated[Workers, FieldTag.FREE] = 1
    """Number of Ray Train workers, one device each. An elastic run, such as `[1, 8]`, has 1 to 8 as resources allow:
    fewer after a node is lost, more when one joins. 0 = without Ray: one process, or the ranks of torchrun."""
    resource_timeout: Annotated[Duration, FieldTag.FREE] = "10m"
    """Maximum wait for the resources of the (fewest) workers, at the start and after losing workers, before the run
    fails. At the start, resources that the cluster can never provide are refused without waiting."""
    gpus_per_worker: Annotated[Literal["auto", 0, 1], BeforeValidator(_check_whole_number), FieldTag.FREE] = "auto"
    """GPUs per worker. `auto` = 1 if the cluster has one for every worker, else 0."""
    cpus_per_worker: Annotated[int, Field(ge=1, le=_MAX_COUNT), FieldTag.FREE] = 1
    """CPU cores per worker, also its number of threads; another number changes rounding."""
    placement_strategy: Annotated[Literal["pack", "spread", "strict_pack", "strict_spread"], FieldTag.FREE] = "pack"
    """Ray's placement strategy for workers on nodes."""
    env: Annotated[dict[str, str], FieldTag.FREE] = {}
    """Environment variables of every worker, such as NCCL_SOCKET_IFNAME. No secrets: the run stores them."""

    @property
    def min_workers(self) -> int:
        """Minimum number of workers that the run continues with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Maximum number of workers that the run uses."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class FailuresConfig(ConfigSection):
    """Handling of dead workers, hangs, loss spikes and errors that a restart may avoid."""

    max_failures: Annotated[int, Field(ge=0), FieldTag.FREE] = 3
    """Consecutive failures that are followed by a restart from the newest checkpoint; one more ends the run. A
    checkpoint completed after a failure clears the failures counted before it."""
    max_same_step_failures: Annotated[int, Field(ge=1), FieldTag.FREE] = 2
    """Consecutive failures at one step that end the run: the step is then the likely cause. Lost nodes do not count."""
    on_loss_spike: Annotated[Literal["stop", "skip", "ignore"], FieldTag.FREE] = "stop"
    """Action before the update of a spike. A spike is a loss more than 6 deviations above the median of the last 128
    steps, or a gradient norm as far above and at least 10 times its median (docs/failures.md). With `stop` the run
    saves, names the documents of the step and ends. With `skip` the update is skipped and recorded, with `ignore`
    applied."""
    log_samples: Annotated[bool, FieldTag.FREE] = False
    """Log the sequences that each rank fetches, with a checksum of their tokens: one line per step, in `<run>/samples`.
    Used by `ltt drill` to audit the data."""
    hang_timeout: Annotated[Duration, FieldTag.FREE] = "10m"
    """Time without progress on any rank within a step, after which the run counts as hung and its workers are replaced.
    Three times as long during startup, evaluation and saving; no limit during the export."""


class ProfileConfig(ConfigSection):
    """Recording of some steps by torch's profiler, into `<run>/profile`: see docs/performance.md."""

    steps: Annotated[tuple[Count, Count], FieldTag.FREE]
    """First and last step to record, counted from 1. A few are enough, such as [10, 12]: a trace has every
    operator and kernel of every micro-batch. The first step of a start is not typical, because it compiles and
    allocates."""


class Config(ConfigSection):
    """Configuration of a run."""

    run: RunConfig
    """Name, directory and random seed of the run."""
    model: ModelConfig
    """Model architecture, initial weights and adapters."""
    tokenizer: TokenizerConfig
    """Tokenizer of the run. May be left out where `model.path` is given, which then has it."""
    data: DataConfig
    """Training data and held-out documents."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate schedule."""
    train: TrainConfig
    """Length of the run, batch sizes and precision."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed settings."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoint interval and retention."""
    eval: EvalConfig = EvalConfig()
    """Evaluation of the held-out loss and of tasks."""
    export: ExportConfig = ExportConfig()
    """Export at the end of the run."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers, their resources and placement."""
    failures: FailuresConfig = FailuresConfig()
    """Handling of failures."""
    profile: ProfileConfig | None = None
    """Steps to record with torch's profiler; by default none."""

    @property
    def max_eval_sequences(self) -> int:
        """Maximum number of held-out sequences per evaluation."""
        if self.eval.max_sequences != "auto":
            return self.eval.max_sequences
        steps = min(self.eval.interval, self.train.steps or self.eval.interval)
        trained = steps * self.train.global_batch_size
        return max(int(_EVAL_SHARE * trained), -(-_MIN_EVAL_TOKENS // self.data.sequence_length))

    @model_validator(mode="after")
    def _check_no_epochs_with_weights(self) -> Config:
        if self.data.source_weights and self.train.epochs is not None:
            raise ValueError(
                "train.epochs has no meaning where sources have weights, each of which runs through epochs of its own: "
                "give train.tokens or train.steps"
            )
        return self
