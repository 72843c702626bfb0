"""Configuration of data: sources, held-out share, cleaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from llm_training_toolkit.config.section import ConfigSection, FieldTag, Location, PlainLocation, Share
from llm_training_toolkit.config.source_config import SourceConfig

MAX_PARTITIONS = 10_000


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
    partitions: Annotated[Annotated[int, Field(ge=1, le=MAX_PARTITIONS)] | None, FieldTag.IDENTITY] = None
    """Partitions of an epoch, prepared and trained on one after the other: training begins with the first one.
    Documents mix only within their partition. Absent = one. Not with `train.epochs` or `group_by: repository`."""
    cache: Annotated[PlainLocation, Field(min_length=1), FieldTag.FREE] = "auto"
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
