"""What became of every source: the survey's counts and those of the rendering, put together for the receipt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from llm_training_toolkit.data.receipt import SourceReceipt
from llm_training_toolkit.data.shards import Facts, Lengths, read_facts
from llm_training_toolkit.data.store import Examples
from llm_training_toolkit.data.survey import Survey


class _Rendering(NamedTuple):
    examples: Examples
    facts: Facts

    @classmethod
    def open(cls, directory: Path) -> _Rendering:
        return cls(Examples(directory), read_facts(directory))

    def tokens(self, source: int) -> int:
        return int(self.examples.length[self.examples.source == source].sum())

    def targets(self, source: int) -> int:
        return int(self.examples.targets[self.examples.source == source].sum())


def source_receipts(
    paths: Sequence[str], survey: Survey, first: Sequence[Path], held_out: Path
) -> tuple[SourceReceipt, ...]:
    """The receipts of all sources, by the rendering of each stream's first epoch and that of what is held out.

    first: one directory, or where sources have weights one for each of those that are trained on, in their order.
    """
    held, streams = _Rendering.open(held_out), [_Rendering.open(directory) for directory in first]
    return tuple(
        _source_receipt(path, index, survey, streams[index if index < len(streams) else 0], held)
        for index, path in enumerate(paths)
    )


def _source_receipt(path: str, index: int, survey: Survey, trained: _Rendering, held: _Rendering) -> SourceReceipt:
    lengths = Lengths()
    for side in (trained, held):
        lengths.add(side.facts.lengths[index])
    held_out = survey.count(held=True, source=index) - held.facts.lengths[index].too_long
    kept = survey.count(held=False, source=index) - trained.facts.lengths[index].too_long
    tokens = trained.tokens(index)
    return SourceReceipt(
        path=path,
        documents=kept + held_out,
        held_out=held_out,
        dropped=survey.dropped[index] | ({"too_long": lengths.too_long} if lengths.too_long else {}),
        tokens=tokens,
        loss_tokens=trained.targets(index),
        longest=lengths.longest,
        longest_document=lengths.name,
        truncated=lengths.left_out / max(tokens + held.tokens(index) + lengths.left_out, 1),
    )
