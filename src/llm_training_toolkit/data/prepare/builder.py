"""Preparation of a run's data: documents to tokens and packing plans on disk, built once and shared by runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.load import redact_data
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore
from llm_training_toolkit.data.prepare.atomic_dir import build_atomic_dir, remove_stale_builds
from llm_training_toolkit.data.prepare.cleaning import build_cleaning_identity
from llm_training_toolkit.data.prepare.dataset_info import (
    FAULT_REPORT_NAME,
    FORMAT_VERSION,
    DatasetInfo,
    EpochInfo,
    PreparedDataset,
    StreamInfo,
    compute_cache_key,
    get_cache_directory,
)
from llm_training_toolkit.data.prepare.dataset_tokenizer import DatasetTokenizer, StageProgressCallback
from llm_training_toolkit.data.prepare.document_index import (
    DocumentIndex,
    DocumentShard,
    build_document_index,
    list_all_sources,
    split_into_shards,
    verify_document_index,
)
from llm_training_toolkit.data.prepare.min_hash import SignatureRunner, sign_in_process
from llm_training_toolkit.data.prepare.packing import PackingPlan, pack_in_windows, shuffle_partitions
from llm_training_toolkit.data.prepare.shards import (
    RenderJob,
    ShardRunner,
    build_progress_counter,
    build_source_infos,
    join_shards,
    read_rendering_stats,
    render_in_process,
    select_shards,
)
from llm_training_toolkit.data.prepare.source_layouts import resolve_source_layouts
from llm_training_toolkit.data.sources import fingerprint_sources, inspect_sources
from llm_training_toolkit.data.tokenizer import (
    TokenizationSpec,
)
from llm_training_toolkit.errors import DataError, ToolkitError
from llm_training_toolkit.plan import compute_integer_shares, suggest_partitions


def prepare_dataset(
    config: Config,
    markers: TokenizationSpec,
    *,
    epochs: Sequence[int] = (),
    progress: StageProgressCallback | None = None,
    runner: ShardRunner = render_in_process,
) -> PreparedDataset:
    """Prepare the first epochs, a number for each stream, or reuse them: `DatasetBuilder` for a single call."""
    work = DatasetBuilder(config, markers, progress, runner)
    return work.build_parts([count * work.partitions for count in epochs or [1] * len(work.streams)])


@dataclass(frozen=True)
class SourceStream:
    """Sources that are packed together; `name` distinguishes the files of one stream from those of others."""

    name: str
    sources: tuple[int, ...]
    is_drawn: bool
    """True if every epoch has its own tokens, because of FIM."""


class DatasetBuilder:
    """Builds the data of one configuration; everything that exists on disk is reused.

    An epoch has one part, or, with several partitions, one for each of them: part n of a stream belongs to epoch
    n // partitions. The files of the sources are listed once, at construction. progress(stage, done, total) is called
    as documents pass, with total 0 while it is unknown. Raises DataError for any error in sources, documents or
    tokenizer.
    """

    def __init__(
        self,
        config: Config,
        markers: TokenizationSpec,
        progress: StageProgressCallback | None,
        runner: ShardRunner,
        signer: SignatureRunner = sign_in_process,
    ) -> None:
        self.data = resolve_source_layouts(config.data, markers)
        self.seed = config.run.seed
        self.markers, self._progress, self.runner, self.signer = markers, progress, runner, signer
        self.max_eval_sequences = config.max_eval_sequences
        self.cache = get_cache_directory(config)
        self.sources = list_all_sources(self.data)
        self.streams = _build_streams(self.data)
        self._parts: dict[tuple[str, int], EpochInfo] = {}
        self.sources_fingerprint, sizes = inspect_sources(self.sources)
        self.partitions = config.data.partitions or 1
        self.partition_note = suggest_partitions(config, sum(sizes[: len(self.data.sources)]))
        self._tokenizer = DatasetTokenizer(config.tokenizer, self.data, self.sources, markers)
        self.tokenizer_key = self._tokenizer.compute_key(self.sources_fingerprint)
        self.fingerprint = compute_cache_key(
            self._build_documents_identity(), self.tokenizer_key, asdict(markers), self.data.sequence_length
        )
        self.directory = self.cache / self.fingerprint[:16]

    def _report_progress(self, stage: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(stage, done, total)

    def build_parts(self, parts: Sequence[int]) -> PreparedDataset:
        """Prepare the first parts, a number for each stream, or reuse them."""
        remove_stale_builds(self.cache)
        if not (self.directory / "documents").is_dir():
            self._tokenizer.check()
        build_atomic_dir(self.directory / "documents", self._build_document_index)
        tokenizer = build_atomic_dir(
            self.tokenizer_path,
            lambda path: self._tokenizer.build(path, self.document_index, self._report_progress),
        )
        held_out = self._render_documents(
            "held_out", self._select_held_out_shards, epoch=0, held=True, stage="held-out tokens"
        )
        held_out_plan = self._build_held_out_plan(held_out)
        prepared = [self._build_stream(stream, count) for stream, count in zip(self.streams, parts, strict=True)]
        dataset_info = self._build_dataset_info(tokenizer, prepared, held_out_plan)
        return PreparedDataset(dataset_info, tokenizer, self.directory)

    @property
    def is_rendered(self) -> bool:
        """True if documents were rendered before, so that a DatasetInfo describes their tokenizer."""
        return (self.directory / "held_out").is_dir()

    def count_prepared_parts(self) -> list[int]:
        """Count the parts of each stream on disk, from the first one without a gap."""
        return [next(part for part in count() if not self._is_part_prepared(each, part)) for each in self.streams]

    def _is_part_prepared(self, stream: SourceStream, part: int) -> bool:
        return all((self.directory / name).is_dir() for name in self._get_part_directories(stream, part))

    def verify_documents(self) -> None:
        """Read all documents again and compare them with the index. Raises DataError for the first difference."""
        total = len(self.document_index.sources)
        verify_document_index(
            self.data,
            self.directory / "documents",
            lambda done: self._report_progress("comparing", done, total),
            signer=self.signer,
        )

    def _build_documents_identity(self) -> list[Any]:
        data = redact_data(self.data)
        # Weights change the order of finished sequences, but not their content.
        sources = [source.model_dump(mode="json", exclude={"weight"}) for source in data.sources]
        return [
            FORMAT_VERSION,
            self.sources_fingerprint,
            sources,
            data.on_error,
            data.max_skipped,
            data.eval.model_dump(mode="json"),
            build_cleaning_identity(data),
            *([] if self.partitions == 1 else [self.partitions]),  # one partition: the key of data without this field
        ]

    @cached_property
    def document_index(self) -> DocumentIndex:
        return DocumentIndex.read(self.directory / "documents")

    @property
    def tokenizer_path(self) -> Path:
        return self.cache / f"tokenizer-{self.tokenizer_key[:16]}"

    def _build_document_index(self, directory: Path) -> None:
        build_document_index(
            self.data,
            directory,
            lambda done: self._report_progress("reading", done, 0),
            signer=self.signer,
            report=self.directory / FAULT_REPORT_NAME,
        )
        if fingerprint_sources(self.sources) != self.sources_fingerprint:
            raise DataError(
                "data.sources: files changed while they were being read. Let nothing write into the sources, and "
                "prepare again."
            )

    def _build_stream(self, stream: SourceStream, count: int) -> list[EpochInfo]:
        """Build the first parts of a stream, and more until there is a sequence."""
        parts = [self._build_part(stream, part) for part in range(count)]
        while not any(part.sequences for part in parts):
            if len(parts) >= self.partitions:
                raise DataError(
                    f"data.sources: no document{self._format_stream(stream)} is left to train on: each is held out, or "
                    f"longer than data.sequence_length {self.data.sequence_length} and was dropped, or bears no loss. "
                    "Set overlong: split, raise data.sequence_length, or give more documents."
                )
            parts.append(self._build_part(stream, len(parts)))
        return parts

    def _build_part(self, stream: SourceStream, part: int) -> EpochInfo:
        """Build the tokens and the plan of a part; without FIM all epochs share their tokens."""
        if (stream.name, part) in self._parts:
            return self._parts[stream.name, part]
        (tokens, plan_name), epoch = self._get_part_directories(stream, part), part // self.partitions
        partition = self._get_partition(part)
        stage = f"tokens of epoch {epoch}" if stream.is_drawn else "tokens"
        if self.partitions > 1:
            stage += f", part {part % self.partitions + 1} of {self.partitions}"
        rendered = self._render_documents(
            tokens,
            lambda: select_shards(self.data, self.document_index, stream.sources, partition, self.partitions),
            epoch=epoch,
            held=False,
            stage=stage + self._format_stream(stream),
        )
        plan = build_atomic_dir(
            self.directory / plan_name,
            lambda path: self._build_packing_plan(rendered, seed=self.seed, part=part).write(path),
        )
        packed = PackingPlan.read(plan)
        lengths = ExampleStore(rendered).length
        times = np.bincount(packed.order, minlength=len(lengths))  # measured, to reveal lost tokens
        filled, lost = int((lengths * times).sum()), int(lengths[times == 0].sum())
        self._parts[stream.name, part] = EpochInfo(tokens, plan_name, len(packed), filled, lost)
        return self._parts[stream.name, part]

    def _format_stream(self, stream: SourceStream) -> str:
        return f" of {self.sources[stream.sources[0]].path}" if len(self.streams) > 1 else ""

    def _get_partition(self, part: int) -> int:
        """Return the partition of a part: every epoch has an order of its own."""
        epoch, position = divmod(part, self.partitions)
        return shuffle_partitions(self.partitions, self.seed, epoch)[position]

    def _get_part_directories(self, stream: SourceStream, part: int) -> tuple[str, str]:
        """Return the directories of a part's tokens and of its plan."""
        of_epoch = f"-seed{self.seed}-epoch{part // self.partitions}"
        of_partition = "" if self.partitions == 1 else f"-partition{self._get_partition(part)}"
        tokens = f"tokens{stream.name}{of_epoch if stream.is_drawn else ''}{of_partition}"
        return tokens, f"plan{stream.name}{of_epoch}{of_partition}"

    def _select_held_out_shards(self) -> list[DocumentShard]:
        return split_into_shards(self.data, self.document_index, range(len(self.sources)), held=True)

    def _render_documents(
        self, name: str, select: Callable[[], list[DocumentShard]], *, epoch: int, held: bool, stage: str
    ) -> Path:
        """Render shard by shard unless the rendering exists, and return its directory."""
        target, shards_dir = self.directory / name, self.directory / f".{name}.shards"
        if target.is_dir():
            shutil.rmtree(shards_dir, ignore_errors=True)  # left by a process killed before this line
            return target
        chosen = select()
        total = self.document_index.count_shard_documents(chosen, held=held)
        documents = self.directory / "documents"
        job = RenderJob(self.data, self.markers, self.seed, epoch, held, documents, self.tokenizer_path, shards_dir)
        try:
            self.runner(job, chosen, build_progress_counter(self._report_progress, stage, total))
            build_atomic_dir(target, lambda directory: join_shards(job, chosen, directory, len(self.sources)))
        except (OSError, ToolkitError):  # another process finished first and removed the shards
            if not target.is_dir():
                raise
        shutil.rmtree(shards_dir, ignore_errors=True)
        self._report_progress(stage, total, total)
        return target

    def _build_packing_plan(self, tokens: Path, *, seed: int, part: int) -> PackingPlan:
        examples = ExampleStore(tokens)
        self._report_progress("packing", 0, len(examples))
        length = self.data.sequence_length
        plan = pack_in_windows(examples.batch, examples.length, length, targets=examples.targets, seed=seed, epoch=part)
        self._report_progress("packing", len(examples), len(examples))
        return plan

    def _build_held_out_plan(self, held_out: Path) -> str:
        """Pack the held-out documents, and return the directory of the plan of those sequences that are evaluated."""
        whole = build_atomic_dir(
            self.directory / "plan-held_out",
            lambda path: self._build_packing_plan(held_out, seed=0, part=0).write(path),
        )
        plan, most = PackingPlan.read(whole), self.max_eval_sequences
        if len(plan) <= most:
            return whole.name
        sample = f"{whole.name}-first{most}"
        build_atomic_dir(self.directory / sample, lambda path: plan.take_first(most).write(path))
        return sample

    def _build_dataset_info(self, tokenizer: Path, prepared: list[list[EpochInfo]], held_out_plan: str) -> DatasetInfo:
        stats = read_rendering_stats(self.directory / "held_out")
        epochs = [epoch for of_stream in prepared for epoch in of_stream]
        space = sum(epoch.sequences for epoch in epochs) * self.data.sequence_length
        return DatasetInfo(
            fingerprint=self.fingerprint,
            directory=str(self.directory),
            tokenizer_path=str(tokenizer),
            vocab_size=stats.vocab_size,
            pad_id=stats.pad,
            sequence_length=self.data.sequence_length,
            seed=self.seed,
            sources=build_source_infos(
                [redact_uri(source.path) for source in self.sources],
                self.document_index,
                [[self.directory / part.tokens for part in of_stream[: self.partitions]] for of_stream in prepared],
                self.directory / "held_out",
            ),
            streams=self._build_stream_infos(prepared),
            held_out="held_out",
            held_out_plan=held_out_plan,
            eval_sequences=len(PackingPlan.read(self.directory / held_out_plan)),
            held_out_sequences=len(PackingPlan.read(self.directory / "plan-held_out")),
            padding=1.0 - sum(epoch.filled for epoch in epochs) / space,
            tokens_lost=sum(epoch.lost for epoch in epochs),
        )

    def _build_stream_infos(self, prepared: list[list[EpochInfo]]) -> tuple[StreamInfo, ...]:
        """Turn weights, shares of tokens, into shares of sequences: a stream with more padding needs more of them."""
        weights = self.data.source_weights or (1.0,)
        first = [next(part for part in of_stream if part.sequences) for of_stream in prepared]
        shares = compute_integer_shares(
            [weight / (part.filled / part.sequences) for weight, part in zip(weights, first, strict=True)]
        )
        return tuple(
            StreamInfo(share, tuple(each), self.partitions) for share, each in zip(shares, prepared, strict=True)
        )


def _build_streams(data: DataConfig) -> list[SourceStream]:
    """Build one stream of all sources, or one per source if they have weights."""
    drawn = [source.fim is not None for source in data.sources]
    if not data.source_weights:
        return [SourceStream("", tuple(range(len(drawn))), any(drawn))]
    return [SourceStream(f"-source{number}", (number,), is_drawn) for number, is_drawn in enumerate(drawn)]
