"""Python code in the answers of chat models."""

from __future__ import annotations

import re

# An answer that ends at its limit of new tokens leaves its last block open; some close one behind its last code.
_CODE_BLOCK = re.compile(
    r"^[ ]{0,3}```[^\n`]*\n(.*?)(?:^[ ]{0,3}```[ ]*$|(?<=[^\s`])```[ ]*$|\Z)", re.DOTALL | re.MULTILINE
)
_START_OF_THINKING, _END_OF_THINKING = "<think>", "</think>"


def extract_code(answer: str, function: str | None = None) -> str:
    """Return the first fenced block that defines `function`, else the first block, else the whole answer.

    Reasoning before `</think>` does not count, also without its end: it often holds drafts.
    """
    said = answer.rpartition(_END_OF_THINKING)[2]
    if said.lstrip().startswith(_START_OF_THINKING):
        return ""
    blocks: list[str] = _CODE_BLOCK.findall(said)
    fitting = (block for block in blocks if function is not None and defines_function(block, function))
    return next(fitting, blocks[0] if blocks else said)


def defines_function(code: str, name: str) -> bool:
    """Return whether the code defines a function of that name at the top level."""
    return re.search(rf"^(?:async[ ]+)?def[ ]+{re.escape(name)}\b", code, re.MULTILINE) is not None
