"""Task `infill`: a piece is cut out of each document, and the model fills the gap from what stands around it."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from llm_training_toolkit.data.middle import Draw, draw
from llm_training_toolkit.data.render import Example
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.evaluation.decoding import Writing, Written, write
from llm_training_toolkit.evaluation.documents import described, documents_of
from llm_training_toolkit.evaluation.gaps import BothSides, Gap, PrefixAlone, View
from llm_training_toolkit.evaluation.losses import Losses, packed
from llm_training_toolkit.evaluation.model import Subject
from llm_training_toolkit.evaluation.result import Measured, Progress
from llm_training_toolkit.evaluation.settings import Infill, Middle
from llm_training_toolkit.evaluation.similarity import edit_similarity

_LINE = re.compile(r"[^\n]+")
_LONGEST_LINE = 200
"""Characters: beyond it a line is data rather than code."""
_LEAST = 4
"""Characters other than white space that a middle has: what closes a bracket is no achievement."""
_LONGEST_SPAN = 120


def measure_infill(task: Infill, subject: Subject, progress: Progress) -> Measured:
    """Fill one gap of each document. Raises PlanError where the model has no sentinels to say where a gap is."""
    view = _view(task, subject)
    gaps, without = _gaps(task, documents_of(subject, task.data, task.format))
    if not gaps:
        raise DataError("--data: no document has a line of 4 to 200 characters that could be cut out")
    room = min(task.tokens, subject.context // 4)
    prompts = [view.prompt(gap, subject.context - room) for gap in gaps]
    stops = (view.stop,) if view.stop else ()
    how = Writing(tokens=room, stops=stops, batch=task.batch)
    written = write(subject, [ids for ids, _ in prompts], how, lambda done: progress("gaps filled", done, len(gaps)))
    items = [_item(gap, answer) for gap, answer in zip(gaps, written, strict=True)]
    shortened = sum(was_cut for _, was_cut in prompts)
    note = f"{shortened} of {len(items)} documents do not fit the context: the model saw what is nearest to the gap"
    return Measured(
        {
            "exact_match": fmean(bool(item["exact"]) for item in items),
            "edit_similarity": fmean(item["similarity"] for item in items),
            "bits_per_byte": _bits_per_byte(gaps, view, subject, task.batch, progress),
            "ended": fmean(answer.ended for answer in written),
            "documents": len(items),
            "shortened": shortened,
            "without_gap": without,
        },
        described(subject, task.data),
        {
            **{name: getattr(task, name) for name in ("middle", "given", "limit", "seed")},
            "tokens": room,
            "context": subject.context,
        },
        [note] if shortened else [],
        items,
    )


def _view(task: Infill, subject: Subject) -> View:
    """How the model is shown its gaps. Raises PlanError for documents without any, and gaps that cannot be shown."""
    if task.format == "chat":
        raise PlanError("--format chat: a conversation has no middle to fill in")
    if task.given == "both":
        return BothSides(subject)
    if task.middle != "line":
        raise PlanError(
            "--given prefix: only with --middle line: after the prefix alone nothing tells where a span ends"
        )
    return PrefixAlone(subject)


def _bits_per_byte(gaps: Sequence[Gap], view: View, subject: Subject, batch: int, progress: Progress) -> float:
    """What the model needs to know a middle and where it ends, in bits for each byte of the middles."""
    losses = Losses(subject, progress)
    examples = [_shown(gap, view, subject.context, number) for number, gap in enumerate(gaps)]
    losses.add(packed(examples, subject, batch))
    found = losses.result()
    return replace(found, bytes=sum(len(gap.middle.encode()) for gap in gaps)).bits_per_byte


def _shown(gap: Gap, view: View, context: int, number: int) -> Example:
    """A gap with what belongs into it, which alone is to be predicted; at most half of the context is for it."""
    answer = view.answer(gap)[: context // 2]
    prompt, _ = view.prompt(gap, context - len(answer))
    loss = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return Example(np.array([*prompt, *answer], dtype=np.uint32), loss, number)


def _gaps(task: Infill, documents: Iterable[Document]) -> tuple[list[Gap], int]:
    """A gap in each of the chosen documents, by their place among all hashes; and how many have no room for one."""
    without = 0

    def found() -> Iterator[tuple[bytes, Gap]]:
        nonlocal without
        for document in documents:
            gap = gap_of(document, task.middle, task.seed)
            if gap is None:
                without += 1
            else:
                yield document.digest, gap

    return [gap for _, gap in heapq.nsmallest(task.limit, found(), key=lambda pair: pair[0])], without


def gap_of(document: Document, kind: Middle, seed: int) -> Gap | None:
    """The gap of a document, drawn from (seed, content) alone; None where it has no place for one."""
    chance = draw(seed, 0, 0, int.from_bytes(document.digest, "big"), "gap")
    text = document.text
    # The first line has nothing before it, and whoever sees the prefix alone would see nothing.
    lines = [match.span() for match in _LINE.finditer(text) if match.start() and _is_worth_it(match[0])]
    if not lines:
        return None
    start, stop = lines[int(chance.first * len(lines))]
    if kind == "span":
        start, stop = _span(text, start, stop, chance)
    return Gap(document.name, text[:start], text[start:stop], text[stop:])


def _span(text: str, start: int, stop: int, chance: Draw) -> tuple[int, int]:
    """From anywhere in a line, so that the least characters follow in it, over up to 120 characters of any lines."""
    starts = [place for place in range(start, stop) if _is_worth_it(text[place:stop])]
    begin = starts[int(chance.second * len(starts))]
    furthest = min(begin + _LONGEST_SPAN, len(text))
    ends = [place for place in range(begin + 1, furthest + 1) if _is_worth_it(text[begin:place])]
    return begin, ends[int(chance.order * len(ends))]


def _is_worth_it(text: str) -> bool:
    return len(text) <= _LONGEST_LINE and len("".join(text.split())) >= _LEAST


def _item(gap: Gap, answer: Written) -> dict[str, Any]:
    """Whether a gap was filled as it was, white space at both ends aside."""
    wanted, given = gap.middle.strip(), answer.text.strip()
    return {
        "document": gap.document,
        "exact": wanted == given,
        "similarity": edit_similarity(wanted, given),
        "wanted": gap.middle,
        "written": answer.text,
        "ended": answer.ended,
    }
