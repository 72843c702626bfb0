"""Text from generated tokens, piece by piece: whole characters only, and nothing behind a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from llm_training_toolkit.data.tokenizer import TextEncoder

# Decoded from the bytes of a character until all of them are generated.
_INCOMPLETE_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TokenDecoder:
    """Decodes one token at a time. Special tokens are skipped, except those of `written_ids`."""

    def __init__(self, encoder: TextEncoder, written_ids: AbstractSet[int] = frozenset()) -> None:
        self._encoder, self._written_ids = encoder, written_ids
        self._pending_ids: list[int] = []

    def push_token(self, token: int) -> str:
        """Return the text that the token completes, empty within a character."""
        if token in self._written_ids:
            return self.flush() + self._encoder.decode([token])
        self._pending_ids.append(token)
        return "" if self._decode_pending().endswith(_INCOMPLETE_CHARACTER) else self.flush()

    def flush(self) -> str:
        """Return the rest, an incomplete character included."""
        text = self._decode_pending()
        self._pending_ids.clear()
        return text

    def _decode_pending(self) -> str:
        return self._encoder.decode(self._pending_ids, skip_special_tokens=True)


class StopTextFilter:
    """Passes text up to the first stop text, and holds back an end that may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push_text(self, piece: str) -> str:
        """Return the text that can be shown now; nothing once a stop text has come."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        shown = len(text) - max((count_partial_match(text, stop) for stop in self._stops), default=0)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return the text that was held back, at the end of the generation."""
        held, self._held = self._held, ""
        return held


def count_partial_match(text: str, mark: str) -> int:
    """Return the length of the longest end of `text` with which `mark` begins, `mark` itself excluded."""
    lengths = range(min(len(text), len(mark) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(mark[:length])), 0)
