"""Text from outside, as it may be shown on a terminal: file names, errors, logs, and what a model wrote. Pure."""

from __future__ import annotations

import re

# Control characters but line feed and tab, and those that reorder what follows (Unicode's bidirectional controls).
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def escape_control_characters(text: str) -> str:
    """Return a text whose control characters are written out, so that a terminal does not obey them."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
