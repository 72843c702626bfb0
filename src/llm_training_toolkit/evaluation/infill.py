"""Task `infill`: a piece is cut out of each document, and the model fills the gap from its context."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import numpy as np

from llm_training_toolkit.data.code.fim import UniformDraw, draw_uniform_numbers
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.data.types import Example
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.evaluation.batch_generate import generate_completions
from llm_training_toolkit.evaluation.documents import format_data_description, read_eval_documents
from llm_training_toolkit.evaluation.losses import LossAccumulator, pack_into_batches
from llm_training_toolkit.evaluation.model import EvalModel
from llm_training_toolkit.evaluation.task import EvalResult, GapKind, InfillTask, ProgressCallback
from llm_training_toolkit.models.sampling import Completion, SamplingParams

_LINE = re.compile(r"[^\n]+")
_MAX_LINE_CHARACTERS = 200  # longer lines are data rather than code
_MIN_MIDDLE_CHARACTERS = 4  # not counting white space; a closing bracket alone would be too easy
_MAX_SPAN_CHARACTERS = 120
_LINE_BREAKS = re.compile(r"\n*")


def measure_infill(task: InfillTask, subject: EvalModel, progress: ProgressCallback) -> EvalResult:
    """Fill one gap per document. Raises PlanError for a model without sentinels, unless `task.given` is `prefix`."""
    view = _build_prompt_format(task, subject)
    gaps, without = _draw_gaps(task, read_eval_documents(subject, task.data, task.format))
    if not gaps:
        raise DataError("--data: no document has a line of 4 to 200 characters that could be cut out")
    room = min(task.tokens, subject.context_length // 4)
    prompts = [view.build_prompt(gap, subject.context_length - room) for gap in gaps]
    stops = (view.stop_text,) if view.stop_text else ()
    written = generate_completions(
        subject,
        [ids for ids, _ in prompts],
        SamplingParams(max_new_tokens=room),
        stops=stops,
        batch_size=task.batch,
        done=lambda done: progress("gaps filled", done, len(gaps)),
    )
    items = [_build_item(gap, answer) for gap, answer in zip(gaps, written, strict=True)]
    shortened = sum(was_cut for _, was_cut in prompts)
    note = f"{shortened} of {len(items)} documents do not fit the context: the model saw what is nearest to the gap"
    return EvalResult(
        {
            "exact_match": fmean(bool(item["exact"]) for item in items),
            "edit_similarity": fmean(item["similarity"] for item in items),
            "bits_per_byte": _compute_bits_per_byte(gaps, view, subject, task.batch, progress),
            "ended": fmean(answer.ended for answer in written),
            "documents": len(items),
            "shortened": shortened,
            "without_gap": without,
        },
        format_data_description(subject, task.data),
        {
            **{name: getattr(task, name) for name in ("middle", "given", "limit", "seed")},
            "tokens": room,
            "context": subject.context_length,
        },
        [note] if shortened else [],
        items,
    )


def _build_prompt_format(task: InfillTask, subject: EvalModel) -> PromptFormat:
    """Return the prompt format of a task. Raises PlanError for chat documents and for unsupported settings."""
    if task.format == "chat":
        raise PlanError("--format chat: a conversation has no middle to fill in")
    if task.given == "both":
        return FimPromptFormat(subject)
    if task.middle != "line":
        raise PlanError(
            "--given prefix: only with --middle line: after the prefix alone nothing tells where a span ends"
        )
    return PrefixPromptFormat(subject)


def _compute_bits_per_byte(
    gaps: Sequence[InfillGap], view: PromptFormat, subject: EvalModel, batch: int, progress: ProgressCallback
) -> float:
    """Return the loss on the middles and their end markers, in bits per byte of the middles."""
    losses = LossAccumulator(subject, progress)
    examples = [_build_example(gap, view, subject.context_length, number) for number, gap in enumerate(gaps)]
    losses.add_batches(pack_into_batches(examples, subject, batch))
    found = losses.compute_loss()
    return replace(found, bytes=sum(len(gap.middle.encode()) for gap in gaps)).bits_per_byte


def _build_example(gap: InfillGap, view: PromptFormat, context: int, number: int) -> Example:
    """Build an example with loss on the target only, which is cut at half of the context."""
    answer = view.build_target(gap)[: context // 2]
    prompt, _ = view.build_prompt(gap, context - len(answer))
    loss = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return Example(np.array([*prompt, *answer], dtype=np.uint32), loss, number)


def _draw_gaps(task: InfillTask, documents: Iterable[Document]) -> tuple[list[InfillGap], int]:
    """Draw a gap in each of the `task.limit` documents with the lowest hashes, and count documents without one."""
    without = 0

    def iter_gaps() -> Iterator[tuple[bytes, InfillGap]]:
        nonlocal without
        for document in documents:
            gap = draw_gap(document, task.middle, task.seed)
            if gap is None:
                without += 1
            else:
                yield document.content_digest, gap

    return [gap for _, gap in heapq.nsmallest(task.limit, iter_gaps(), key=lambda pair: pair[0])], without


def draw_gap(document: Document, kind: GapKind, seed: int) -> InfillGap | None:
    """Draw the gap of a document from (seed, content) alone. Return None for a document without a suitable line."""
    chance = draw_uniform_numbers(seed, 0, 0, int.from_bytes(document.content_digest, "big"), "gap")
    text = document.text
    # Skip the first line: its prefix is empty, which would leave `--given prefix` without any context.
    lines = [match.span() for match in _LINE.finditer(text) if match.start() and _is_suitable_middle(match[0])]
    if not lines:
        return None
    start, stop = lines[int(chance.first * len(lines))]
    if kind == "span":
        start, stop = _draw_span(text, start, stop, chance)
    return InfillGap(document.name, text[:start], text[start:stop], text[stop:])


def _draw_span(text: str, start: int, stop: int, chance: UniformDraw) -> tuple[int, int]:
    """Draw a span of up to 120 characters over any lines; it starts before the line's last 4 non-blank characters."""
    starts = [place for place in range(start, stop) if _is_suitable_middle(text[place:stop])]
    begin = starts[int(chance.second * len(starts))]
    furthest = min(begin + _MAX_SPAN_CHARACTERS, len(text))
    ends = [place for place in range(begin + 1, furthest + 1) if _is_suitable_middle(text[begin:place])]
    return begin, ends[int(chance.order * len(ends))]


def _is_suitable_middle(text: str) -> bool:
    return len(text) <= _MAX_LINE_CHARACTERS and len("".join(text.split())) >= _MIN_MIDDLE_CHARACTERS


def _build_item(gap: InfillGap, answer: Completion) -> dict[str, Any]:
    """Compare an answer with the middle, ignoring white space at both ends."""
    wanted, given = gap.middle.strip(), answer.text.strip()
    return {
        "document": gap.document,
        "exact": wanted == given,
        "similarity": compute_edit_similarity(wanted, given),
        "wanted": gap.middle,
        "written": answer.text,
        "ended": answer.ended,
    }


class InfillGap(NamedTuple):
    """Document split into prefix, middle and suffix."""

    document: str
    prefix: str
    middle: str
    suffix: str


class PromptFormat(Protocol):
    """Presentation of a gap to the model."""

    @property
    def stop_text(self) -> str:
        """Text that ends an answer besides the special tokens; may be empty."""

    def build_prompt(self, gap: InfillGap, most: int) -> tuple[list[int], bool]:
        """Return at most `most` tokens, and whether context far from the gap was cut off."""

    def build_target(self, gap: InfillGap) -> list[int]:
        """Return the tokens of a correct answer: the middle and its end marker."""


class FimPromptFormat:
    """Prefix, suffix and middle, each after its sentinel. An answer ends with the end of text, as in training."""

    stop_text = ""

    def __init__(self, subject: EvalModel) -> None:
        """Raises PlanError if the tokenizer has no sentinels."""
        tokens, encoder = subject.tokenization_spec.tokens, subject.text_encoder
        names = (tokens.fim_prefix, tokens.fim_suffix, tokens.fim_middle)
        if not tokens.has_fim or not all(map(encoder.has_special_token, names)):
            raise PlanError(
                f"{subject.directory}: the tokenizer has no fill-in-the-middle sentinels: this model cannot fill in "
                "the middle. Measure its perplexity, show it the prefix alone (--given prefix), or take a model of a "
                "family that has them"
            )
        self._sentinels = tuple(map(encoder.get_special_token_id, names))
        self._encoder, self._end = encoder, encoder.get_special_token_id(tokens.end_of_text)

    def build_prompt(self, gap: InfillGap, most: int) -> tuple[list[int], bool]:
        """Give the suffix a third of the tokens, or more if the prefix is short."""
        before, after = map(self._encoder.encode, (gap.prefix, gap.suffix))
        room = most - len(self._sentinels)
        kept_after = min(len(after), max(room - len(before), room // 3))
        kept_before = min(len(before), room - kept_after)
        was_cut = kept_before < len(before) or kept_after < len(after)
        prefix, suffix, middle = self._sentinels
        return [prefix, *before[len(before) - kept_before :], suffix, *after[:kept_after], middle], was_cut

    def build_target(self, gap: InfillGap) -> list[int]:
        """Return the middle and the end of text."""
        return [*self._encoder.encode(gap.middle), self._end]


class PrefixPromptFormat:
    """Prefix only, for whole lines: plain left-to-right completion without fill-in-the-middle."""

    stop_text = "\n"

    def __init__(self, subject: EvalModel) -> None:
        self._encoder = subject.text_encoder

    def build_prompt(self, gap: InfillGap, most: int) -> tuple[list[int], bool]:
        """Keep the end of the prefix."""
        before = self._encoder.encode(gap.prefix)
        return before[-most:], len(before) > most

    def build_target(self, gap: InfillGap) -> list[int]:
        """Return the line and the line breaks after it: code tokens often include the break at the end of a line."""
        breaks = _LINE_BREAKS.match(gap.suffix)
        assert breaks is not None
        return self._encoder.encode(gap.middle + breaks[0])


def compute_edit_similarity(first: str, second: str) -> float:
    """Return 2 x longest common subsequence / total length: 1 for equal texts, 0 without a common character.

    Equals `fuzz.ratio` of the fuzzy-matching packages, used in code completion benchmarks, divided by 100.
    """
    total = len(first) + len(second)
    return 2 * _compute_lcs_length(first, second) / total if total else 1.0


def _compute_lcs_length(first: str, second: str) -> int:
    """Return the LCS length (Hyyrö 2004). `row` has one bit per character of `first`, 0 if counted."""
    places: dict[str, int] = {}
    for place, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << place
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for letter in second:
        matches = row & places.get(letter, 0)
        row = ((row + matches) | (row - matches)) & everywhere
    return len(first) - row.bit_count()
