"""Prepares the data of a run: documents to tokens and packing plans on disk, built once and shared by runs."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.data import survey as surveys
from llm_training_toolkit.data.chat_template import ChatTemplate
from llm_training_toolkit.data.markers import Markers
from llm_training_toolkit.data.packing import PackingPlan, pack
from llm_training_toolkit.data.receipt import EpochReceipt, Receipt, SourceReceipt
from llm_training_toolkit.data.rendering import Renderer, plain_text
from llm_training_toolkit.data.sources import Document, fingerprint
from llm_training_toolkit.data.store import Examples, SourceExample, complete, write_examples
from llm_training_toolkit.data.survey import Survey, all_sources, reread
from llm_training_toolkit.data.tokenizer import (
    TOKENIZER_FILES,
    TextEncoder,
    open_tokenizer,
    tokenizer_directory,
    train_tokenizer,
)
from llm_training_toolkit.errors import DataError

Progress = Callable[[str, int, int], None]

_FORMAT = 2  # part of every key: raise it when the same documents would give other files
_DOCUMENTS_PER_BATCH = 256
_CHARACTERS_PER_BATCH = 8 << 20


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
        parts = [receipt.held_out, *(name for epoch in receipt.epochs for name in (epoch.tokens, epoch.plan))]
        for path in [tokenizer, *(directory / part for part in parts)]:
            if not path.is_dir():
                raise DataError(
                    f"{path}: the prepared data is not there. Run `ltt prepare` again; on a cluster, data.cache must "
                    "be a directory that every node sees."
                )
        return cls(receipt, tokenizer, directory)


def prepare(config: Config, markers: Markers, *, epochs: int = 1, progress: Progress | None = None) -> Prepared:
    """Prepare the first `epochs` epochs, or find them prepared.

    The cache is `<run.dir>/.cache`, or data.cache. progress(stage, done, total) is called as documents pass, with
    total 0 while it is not known. Raises DataError for whatever is wrong with sources, documents or tokenizer.
    """
    if epochs < 1:
        raise DataError(f"prepare: {epochs} epochs were asked for. At least one is needed.")
    work = _Preparation(config, markers, progress or (lambda _stage, _done, _total: None))
    return work.run(epochs)


class _Preparation:
    """One call of `prepare`: every part is looked for on disk first and built when it is not there."""

    def __init__(self, config: Config, markers: Markers, progress: Progress) -> None:
        self.data, self.tokenizer, self.seed = config.data, config.tokenizer, config.run.seed
        self.markers, self.progress = markers, progress
        folder = Path(config.run.dir, ".cache") if self.data.cache == "auto" else Path(self.data.cache)
        self.cache = folder.expanduser().resolve()
        self.sources = all_sources(self.data)
        self.files = fingerprint(self.sources)
        self.tokenizer_key = self._tokenizer_key()
        self.fingerprint = _key(
            self._documents_identity(), self.tokenizer_key, asdict(markers), self.data.sequence_length
        )
        self.directory = self.cache / self.fingerprint[:16]

    def run(self, epochs: int) -> Prepared:
        complete(self.directory / "documents", self._take_survey)
        tokenizer = complete(self.tokenizer_path, self._make_tokenizer)
        complete(self.directory / "held_out", self._render_held_out)
        parts = [self._epoch(epoch) for epoch in range(epochs)]
        receipt = self._receipt(tokenizer, parts)
        return Prepared(receipt, tokenizer, self.directory)

    def _documents_identity(self) -> list[Any]:
        data = self.data
        sources = [source.model_dump(mode="json") for source in data.sources]
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

    @cached_property
    def encoder(self) -> TextEncoder:
        return open_tokenizer(str(self.tokenizer_path))

    @property
    def tokenizer_path(self) -> Path:
        return self.cache / f"tokenizer-{self.tokenizer_key[:16]}"

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.sources, self.markers, self.encoder, self.tokenizer_path, self.data.sequence_length)

    def _take_survey(self, directory: Path) -> None:
        surveys.take(self.data, directory, lambda done: self.progress("reading", done, 0))
        if fingerprint(self.sources) != self.files:
            raise DataError(
                "data.sources: files changed while they were being read. Let nothing write into the sources, and "
                "prepare again."
            )

    def _make_tokenizer(self, directory: Path) -> None:
        if self.tokenizer.train is not None:
            documents = self._reread("tokenizer", held=False)
            texts = (plain_text(document, self.sources[document.source]) for _, document in documents)
            train_tokenizer(texts, self.tokenizer.train.vocab_size, self.markers, directory)
        for name, path in self._given_tokenizer:  # copied, so that workers elsewhere and later see this very one
            shutil.copyfile(path, directory / name)
        if self._chats:  # whoever loads the trained model must write conversations as they were trained on
            template = ChatTemplate.open(directory, self.markers.chat_template)
            (directory / "chat_template.jinja").write_text(template.source, encoding="utf-8")

    def _reread(self, stage: str, *, held: bool) -> Iterator[tuple[int, Document]]:
        total = self.survey.count(held=held)
        for done, item in enumerate(reread(self.data, self.survey, held=held)):
            if done % _DOCUMENTS_PER_BATCH == 0:
                self.progress(stage, done, total)
            yield item
        self.progress(stage, total, total)

    def _render_held_out(self, directory: Path) -> None:
        self._render(directory, epoch=0, held=True, stage="held-out tokens")
        self._plan(directory, seed=0, epoch=0).write(directory)

    def _epoch(self, epoch: int) -> EpochReceipt:
        """The tokens and the plan of an epoch; without fill-in-the-middle all epochs have the same tokens."""
        drawn = any(source.fim for source in self.data.sources)
        tokens = f"tokens-seed{self.seed}-epoch{epoch}" if drawn else "tokens"
        stage = f"tokens of epoch {epoch}" if drawn else "tokens"
        rendered = complete(
            self.directory / tokens, lambda path: self._render(path, epoch=epoch, held=False, stage=stage)
        )
        plan = complete(
            self.directory / f"plan-seed{self.seed}-epoch{epoch}",
            lambda path: self._plan(rendered, seed=self.seed, epoch=epoch).write(path),
        )
        sequences = len(PackingPlan.read(plan))
        if not sequences:
            raise DataError(
                f"data.sources: every document is longer than data.sequence_length {self.data.sequence_length} and was "
                "dropped. Set too_long: continue, or raise data.sequence_length."
            )
        return EpochReceipt(tokens, plan.name, sequences)

    def _render(self, directory: Path, *, epoch: int, held: bool, stage: str) -> None:
        longest, too_long = np.zeros((2, len(self.sources)), dtype=np.int64)
        pad, vocab_size = self.encoder.id_of(self.markers.tokens.pad), self.encoder.vocab_size

        def rendered() -> Iterator[SourceExample]:
            for source, batch in _batches(self._reread(stage, held=held)):
                for document in self.renderer.render(source, batch, seed=self.seed, epoch=epoch, plain=held):
                    longest[source] = max(longest[source], document.tokens)
                    too_long[source] += not document.examples
                    yield from (SourceExample(source, example) for example in document.examples)

        write_examples(directory, rendered())
        facts = {"pad": pad, "vocab_size": vocab_size, "longest": longest.tolist(), "too_long": too_long.tolist()}
        (directory / "facts.json").write_text(json.dumps(facts), encoding="utf-8")

    def _plan(self, tokens: Path, *, seed: int, epoch: int) -> PackingPlan:
        examples = Examples(tokens)
        self.progress("packing", 0, len(examples))
        length = self.data.sequence_length
        plan = pack(examples.length, length, targets=examples.targets, seed=seed, epoch=epoch)
        self.progress("packing", len(examples), len(examples))
        return plan

    def _receipt(self, tokenizer: Path, epochs: list[EpochReceipt]) -> Receipt:
        held_facts, facts = (_facts(self.directory / part) for part in ("held_out", epochs[0].tokens))
        packed, lost = zip(*(self._accounts(epoch) for epoch in epochs), strict=True)
        space = sum(epoch.sequences for epoch in epochs) * self.data.sequence_length
        return Receipt(
            fingerprint=self.fingerprint,
            directory=str(self.directory),
            tokenizer_path=str(tokenizer),
            vocab_size=facts["vocab_size"],
            pad_id=facts["pad"],
            sequence_length=self.data.sequence_length,
            seed=self.seed,
            sources=self._source_receipts(Examples(self.directory / epochs[0].tokens), facts, held_facts),
            epochs=tuple(epochs),
            held_out="held_out",
            eval_sequences=len(PackingPlan.read(self.directory / "held_out")),
            padding=1.0 - sum(packed) / space,
            tokens_lost=sum(lost),
        )

    def _accounts(self, epoch: EpochReceipt) -> tuple[int, int]:
        """Tokens that lie in the sequences of an epoch, and rendered tokens that do not: counted, not assumed."""
        lengths = Examples(self.directory / epoch.tokens).length
        times = np.bincount(PackingPlan.read(self.directory / epoch.plan).order, minlength=len(lengths))
        return int((lengths * times).sum()), int(lengths[times == 0].sum())

    def _source_receipts(
        self, examples: Examples, facts: dict[str, Any], held_facts: dict[str, Any]
    ) -> tuple[SourceReceipt, ...]:
        return tuple(self._source_receipt(i, examples, facts, held_facts) for i in range(len(self.sources)))

    def _source_receipt(
        self, index: int, examples: Examples, facts: dict[str, Any], held_facts: dict[str, Any]
    ) -> SourceReceipt:
        of_source = examples.source == index
        held_too_long, too_long = held_facts["too_long"][index], facts["too_long"][index]
        held = self.survey.count(held=True, source=index) - held_too_long
        dropped = dict(self.survey.dropped[index])
        if too_long + held_too_long:
            dropped["too_long"] = too_long + held_too_long
        return SourceReceipt(
            path=self.sources[index].path,
            documents=self.survey.count(held=False, source=index) - too_long + held,
            held_out=held,
            dropped=dropped,
            tokens=int(examples.length[of_source].sum()),
            loss_tokens=int(examples.targets[of_source].sum()),
            longest=max(facts["longest"][index], held_facts["longest"][index]),
        )


def _batches(numbered: Iterator[tuple[int, Document]]) -> Iterator[tuple[int, list[tuple[int, Document]]]]:
    """Batches of documents of one source each, large enough to keep all cores busy and no larger."""
    for source, group in groupby(numbered, key=lambda item: item[1].source):
        batch: list[tuple[int, Document]] = []
        characters = 0
        for item in group:
            batch.append(item)
            characters += len(item[1].text)
            if len(batch) == _DOCUMENTS_PER_BATCH or characters > _CHARACTERS_PER_BATCH:
                yield source, batch
                batch, characters = [], 0
        if batch:
            yield source, batch


def _facts(directory: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((directory / "facts.json").read_text(encoding="utf-8"))
    return facts


def _key(*parts: Any) -> str:  # noqa: ANN401 - whatever JSON can say
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
