"""Prepares the data of a run: documents to tokens and packing plans on disk, built once and shared by runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from llm_training_toolkit.config.schema import Config, Data
from llm_training_toolkit.config.uri import is_address
from llm_training_toolkit.data.chat.template import ChatTemplate
from llm_training_toolkit.data.prepare import document_index as surveys
from llm_training_toolkit.data.prepare.arrow_store import Examples
from llm_training_toolkit.data.prepare.atomic_dir import complete, sweep
from llm_training_toolkit.data.prepare.dataset_info import EpochReceipt, Receipt, StreamReceipt
from llm_training_toolkit.data.prepare.document_index import Rereader, Survey, all_sources, shards
from llm_training_toolkit.data.prepare.packing import PackingPlan, pack_in_windows
from llm_training_toolkit.data.prepare.renderer import Renderer, plain_text
from llm_training_toolkit.data.prepare.shards import Job, Runner, in_this_process, join, read_facts, source_receipts
from llm_training_toolkit.data.sources import fingerprint
from llm_training_toolkit.data.tokenizer import (
    TOKENIZER_FILES,
    Markers,
    open_tokenizer,
    tokenizer_directory,
    train_tokenizer,
)
from llm_training_toolkit.errors import DataError, ToolkitError
from llm_training_toolkit.plan import whole_shares

Progress = Callable[[str, int, int], None]

_FORMAT = 5  # part of every key: raise it when the same documents would give other files
_EVERY = 256


@dataclass(frozen=True)
class Prepared:
    """Prepared data on disk: the receipt, the tokenizer's directory, and the directory of everything else."""

    receipt: Receipt
    tokenizer_path: Path
    directory: Path

    @classmethod
    def load(cls, receipt: Receipt) -> Prepared:
        """Reopen prepared data from its receipt. Raises DataError where its files are not (any more)."""
        directory, tokenizer = Path(receipt.directory), Path(receipt.tokenizer_path)
        epochs = [epoch for stream in receipt.streams for epoch in stream.epochs]
        parts = [
            receipt.held_out,
            receipt.held_out_plan,
            *(name for epoch in epochs for name in (epoch.tokens, epoch.plan)),
        ]
        for path in [tokenizer, *(directory / part for part in parts)]:
            if not path.is_dir():
                raise DataError(
                    f"{path}: the prepared data is not there. Run `ltt prepare` again; on a cluster, data.cache must "
                    "be a directory that every node sees."
                )
        return cls(receipt, tokenizer, directory)


def prepare(
    config: Config,
    markers: Markers,
    *,
    epochs: Sequence[int] = (),
    progress: Progress | None = None,
    runner: Runner = in_this_process,
) -> Prepared:
    """Prepare the first epochs, or find them prepared: `Preparation` for a single call."""
    work = Preparation(config, markers, progress or (lambda _stage, _done, _total: None), runner)
    return work.prepare(epochs or [1] * len(work.streams))


@dataclass(frozen=True)
class Stream:
    """Sources that are packed together; `name` tells the files of one stream from those of others."""

    name: str
    sources: tuple[int, ...]
    is_drawn: bool
    """Whether every epoch has tokens of its own, because of fill-in-the-middle."""


def cache_of(config: Config) -> Path:
    """Where prepared data lies, shared by runs: data.cache, or `<run.dir>/.cache`; it is mapped into memory, so of runs
    in an object store each machine has its own.
    """
    beside = "~/.cache/llm-training-toolkit" if is_address(config.run.dir) else f"{config.run.dir}/.cache"
    folder = Path(beside if config.data.cache == "auto" else config.data.cache)
    return folder.expanduser().resolve()


class Preparation:
    """The data of one configuration: every part is looked for on disk first and built when it is not there.

    The files of the sources are listed once, when it is made.
    progress(stage, done, total) is called as documents pass, with total 0 while it is not known. Raises DataError for
    whatever is wrong with sources, documents or tokenizer.
    """

    def __init__(self, config: Config, markers: Markers, progress: Progress, runner: Runner) -> None:
        self.data, self.tokenizer, self.seed = config.data, config.tokenizer, config.run.seed
        self.markers, self.progress, self.runner = markers, progress, runner
        self.cache = cache_of(config)
        self.sources = all_sources(self.data)
        self.streams = _streams(self.data)
        self._epochs: dict[tuple[str, int], EpochReceipt] = {}
        self.files = fingerprint(self.sources)
        self.tokenizer_key = self._tokenizer_key()
        self.fingerprint = _key(
            self._documents_identity(), self.tokenizer_key, asdict(markers), self.data.sequence_length
        )
        self.directory = self.cache / self.fingerprint[:16]

    def prepare(self, epochs: Sequence[int]) -> Prepared:
        """Prepare the first epochs, as many of each stream, or find them prepared."""
        sweep(self.cache)
        if not (self.directory / "documents").is_dir():
            self._check_tokenizer()
        complete(self.directory / "documents", self._take_survey)
        tokenizer = complete(self.tokenizer_path, self._make_tokenizer)
        held_out = self._rendered("held_out", range(len(self.sources)), epoch=0, held=True, stage="held-out tokens")
        complete(self.directory / "plan-held_out", lambda path: self._plan(held_out, seed=0, epoch=0).write(path))
        prepared = [
            [self._epoch(stream, epoch) for epoch in range(count)]
            for stream, count in zip(self.streams, epochs, strict=True)
        ]
        return Prepared(self._receipt(tokenizer, prepared), tokenizer, self.directory)

    @property
    def is_rendered(self) -> bool:
        """Whether documents have become tokens before, so that the receipt knows their tokenizer."""
        return (self.directory / "held_out").is_dir()

    def found(self) -> list[int]:
        """How many epochs of each stream lie prepared already, from the first on without a gap."""
        return [next(epoch for epoch in count() if not self._is_there(each, epoch)) for each in self.streams]

    def _is_there(self, stream: Stream, epoch: int) -> bool:
        return all((self.directory / name).is_dir() for name in self._names(stream, epoch))

    def verify(self) -> None:
        """Read everything again and compare it with what was prepared. Raises DataError for the first difference."""
        total = len(self.survey.sources)
        surveys.verify(self.data, self.directory / "documents", lambda done: self.progress("comparing", done, total))

    def _documents_identity(self) -> list[Any]:
        data = self.data
        # Weights change the order in which finished sequences are seen, and nothing in them.
        sources = [source.model_dump(mode="json", exclude={"weight"}) for source in data.sources]
        return [_FORMAT, self.files, sources, data.on_error, data.max_skipped, data.eval.model_dump(mode="json")]

    def _tokenizer_key(self) -> str:
        """A trained tokenizer is known by what it is trained on and how, an opened one by its content."""
        if self.tokenizer.train is not None:
            files = [[source.path, source.format, source.per] for source in self.sources]
            held_out = [self.data.eval.fraction, self.data.eval.by, len(self.data.eval.sources)]
            how = [tokenizers.__version__, self.tokenizer.train.vocab_size, asdict(self.markers)]
            return _key(_FORMAT, self.files, files, self.data.on_error, held_out, how)
        files = [[name, hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in self._given_tokenizer]
        return _key(_FORMAT, files, self.markers.chat_template if self._chats else "")

    @property
    def _chats(self) -> bool:
        return any(source.format == "chat" for source in self.sources)

    @cached_property
    def _given_tokenizer(self) -> list[tuple[str, Path]]:
        if self.tokenizer.path is None:
            return []
        directory = tokenizer_directory(self.tokenizer.path)
        return [(name, directory / name) for name in TOKENIZER_FILES if (directory / name).is_file()]

    @cached_property
    def survey(self) -> Survey:
        return Survey.read(self.directory / "documents")

    @property
    def tokenizer_path(self) -> Path:
        return self.cache / f"tokenizer-{self.tokenizer_key[:16]}"

    def _take_survey(self, directory: Path) -> None:
        surveys.take(self.data, directory, lambda done: self.progress("reading", done, 0))
        if fingerprint(self.sources) != self.files:
            raise DataError(
                "data.sources: files changed while they were being read. Let nothing write into the sources, and "
                "prepare again."
            )

    def _check_tokenizer(self) -> None:
        """Refuse a given tokenizer, or its chat template, before hours of reading."""
        if self.tokenizer.path is not None:
            directory = tokenizer_directory(self.tokenizer.path)
            encoder = open_tokenizer(str(directory))
            Renderer(self.data.sources, self.markers, encoder, directory, self.data.sequence_length).check()

    def _make_tokenizer(self, directory: Path) -> None:
        if self.tokenizer.train is not None:
            train_tokenizer(self._texts(), self.tokenizer.train.vocab_size, self.markers, directory)
        for name, path in self._given_tokenizer:  # copied, so that workers elsewhere and later see this very one
            shutil.copyfile(path, directory / name)
        if self._chats:  # whoever loads the trained model must write conversations as they were trained on
            template = ChatTemplate.open(directory, self.markers.chat_template)
            (directory / "chat_template.jinja").write_text(template.source, encoding="utf-8")

    def _texts(self) -> Iterator[str]:
        """What a tokenizer is trained on: every document that is not held out."""
        total, done = self.survey.count(held=False), 0
        rereader = Rereader(self.data, self.survey)
        for shard in shards(self.data, self.survey, range(len(self.data.sources)), held=False):
            for _, document in rereader.documents(shard, held=False):
                if done % _EVERY == 0:
                    self.progress("tokenizer", done, total)
                done += 1
                yield plain_text(document, self.sources[document.source])
        self.progress("tokenizer", total, total)

    def _epoch(self, stream: Stream, epoch: int) -> EpochReceipt:
        """The tokens and the plan of an epoch; without fill-in-the-middle all epochs have the same tokens."""
        if (stream.name, epoch) in self._epochs:
            return self._epochs[stream.name, epoch]
        tokens, plan_name = self._names(stream, epoch)
        what = f" of {self.sources[stream.sources[0]].path}" if len(self.streams) > 1 else ""
        stage = f"tokens of epoch {epoch}{what}" if stream.is_drawn else f"tokens{what}"
        rendered = self._rendered(tokens, stream.sources, epoch=epoch, held=False, stage=stage)
        plan = complete(
            self.directory / plan_name,
            lambda path: self._plan(rendered, seed=self.seed, epoch=epoch).write(path),
        )
        packed = PackingPlan.read(plan)
        if not len(packed):
            raise DataError(
                f"data.sources: no document{what} is left to train on: each is held out, or longer than "
                f"data.sequence_length {self.data.sequence_length} and was dropped. Set too_long: continue, raise "
                "data.sequence_length, or give more documents."
            )
        lengths = Examples(rendered).length
        times = np.bincount(packed.order, minlength=len(lengths))  # counted, not assumed
        filled, lost = int((lengths * times).sum()), int(lengths[times == 0].sum())
        self._epochs[stream.name, epoch] = EpochReceipt(tokens, plan_name, len(packed), filled, lost)
        return self._epochs[stream.name, epoch]

    def _names(self, stream: Stream, epoch: int) -> tuple[str, str]:
        """The directories of an epoch's tokens and of its plan."""
        of_epoch = f"-seed{self.seed}-epoch{epoch}"
        tokens = f"tokens{stream.name}{of_epoch}" if stream.is_drawn else f"tokens{stream.name}"
        return tokens, f"plan{stream.name}{of_epoch}"

    def _rendered(self, name: str, sources: Iterable[int], *, epoch: int, held: bool, stage: str) -> Path:
        """The directory of a rendering, made shard by shard unless it is there."""
        target, place = self.directory / name, self.directory / f".{name}.shards"
        if target.is_dir():
            shutil.rmtree(place, ignore_errors=True)  # of a process that was killed right before it could
            return target
        chosen = shards(self.data, self.survey, sources, held=held)
        total = sum(self.survey.count(held=held, source=source) for source in {shard.source for shard in chosen})
        documents = self.directory / "documents"
        job = Job(self.data, self.markers, self.seed, epoch, held, documents, self.tokenizer_path, place)
        try:
            self.runner(job, chosen, _counted(self.progress, stage, total))
            complete(target, lambda directory: join(job, chosen, directory, len(self.sources)))
        except (OSError, ToolkitError):  # another process was faster, and has tidied away the shards
            if not target.is_dir():
                raise
        shutil.rmtree(place, ignore_errors=True)
        self.progress(stage, total, total)
        return target

    def _plan(self, tokens: Path, *, seed: int, epoch: int) -> PackingPlan:
        examples = Examples(tokens)
        self.progress("packing", 0, len(examples))
        length = self.data.sequence_length
        plan = pack_in_windows(
            examples.batch, examples.length, length, targets=examples.targets, seed=seed, epoch=epoch
        )
        self.progress("packing", len(examples), len(examples))
        return plan

    def _receipt(self, tokenizer: Path, prepared: list[list[EpochReceipt]]) -> Receipt:
        facts = read_facts(self.directory / "held_out")
        epochs = [epoch for of_stream in prepared for epoch in of_stream]
        space = sum(epoch.sequences for epoch in epochs) * self.data.sequence_length
        return Receipt(
            fingerprint=self.fingerprint,
            directory=str(self.directory),
            tokenizer_path=str(tokenizer),
            vocab_size=facts.vocab_size,
            pad_id=facts.pad,
            sequence_length=self.data.sequence_length,
            seed=self.seed,
            sources=source_receipts(
                [source.path for source in self.sources],
                self.survey,
                [self.directory / of_stream[0].tokens for of_stream in prepared],
                self.directory / "held_out",
            ),
            streams=self._stream_receipts(prepared),
            held_out="held_out",
            held_out_plan="plan-held_out",
            eval_sequences=len(PackingPlan.read(self.directory / "plan-held_out")),
            padding=1.0 - sum(epoch.filled for epoch in epochs) / space,
            tokens_lost=sum(epoch.lost for epoch in epochs),
        )

    def _stream_receipts(self, prepared: list[list[EpochReceipt]]) -> tuple[StreamReceipt, ...]:
        """Weights are shares of tokens: a stream with more padding in its sequences needs more of them."""
        weights = self.data.weights or (1.0,)
        filled = [of_stream[0].filled / of_stream[0].sequences for of_stream in prepared]
        shares = whole_shares([weight / tokens for weight, tokens in zip(weights, filled, strict=True)])
        return tuple(StreamReceipt(share, tuple(each)) for share, each in zip(shares, prepared, strict=True))


def _streams(data: Data) -> list[Stream]:
    """All sources together, or where they have weights one for each."""
    drawn = [source.fim is not None for source in data.sources]
    if not data.weights:
        return [Stream("", tuple(range(len(drawn))), any(drawn))]
    return [Stream(f"-source{number}", (number,), is_drawn) for number, is_drawn in enumerate(drawn)]


def _counted(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """A listener that adds up what it is told and passes it on; shards found done count their held-out ones, too."""
    seen = 0

    def done(more: int) -> None:
        nonlocal seen
        seen += more
        progress(stage, min(seen, total), total)

    return done


def _key(*parts: Any) -> str:  # noqa: ANN401 - whatever JSON can say
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
