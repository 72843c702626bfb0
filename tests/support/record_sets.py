"""Record sets in the form of two that people train on: code instructions, and Alpaca's with a second answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def build_code_instructions(count: int = 2017, empty: Iterable[int] = (238, 1077)) -> list[dict[str, Any]]:
    """Records of instruction, input and output; those with the numbers `empty`, from 1, have no answer."""
    nothing = set(empty)
    return [
        {
            "instruction": f"Write a function that adds {number}.",
            "input": f"x = {number}" if number % 3 == 0 else "",
            "output": "" if number in nothing else f"def add(x):\n    return x + {number}",
        }
        for number in range(1, count + 1)
    ]


def build_two_answers(count: int = 4535) -> list[dict[str, Any]]:
    """Records of instruction, input, output and response: which of the last two is the answer, they leave open."""
    return [
        {"instruction": f"Print {number}.", "input": "", "output": f"print({number})", "response": f"It is {number}."}
        for number in range(1, count + 1)
    ]


def write_json_lines(path: Path, records: Iterable[Any]) -> Path:
    """Write records, one a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
