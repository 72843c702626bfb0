"""Pages of docs/tutorials: their commands, and the lines that the pages say they print.

Blocks of `bash` are typed; the block of `text` after one shows lines that it prints. Blocks of `console` show text that
a model wrote, which differs between processors and is not compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
_BLOCK = re.compile(r"^```(bash|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = "=== block "
_OMITTED = "…"


@dataclass
class Step:
    """Commands of one block, and what the page says that they print."""

    commands: str
    printed: str = ""


def read_steps(name: str) -> list[Step]:
    """Read the steps of a page. A block of text belongs to the commands before it."""
    steps: list[Step] = []
    for kind, content in _BLOCK.findall((FOLDER / f"{name}.md").read_text(encoding="utf-8")):
        if kind == "bash":
            steps.append(Step(content))
        else:
            steps[-1].printed = content
    return steps


def build_script(steps: list[Step]) -> str:
    """Return one script of all steps, which ends at the first command that fails."""
    return "set -eo pipefail\n" + "\n".join(
        f"echo '{_MARK}{number}'\n{step.commands}" for number, step in enumerate(steps)
    )


def split_output(output: str) -> list[str]:
    """Split the script's output into that of each step."""
    return [part.partition("\n")[2] for part in output.split(_MARK)[1:]]


def find_missing_lines(step: Step, output: str) -> list[str]:
    """Return the lines of the page that were not printed, numbers and spaces aside."""
    found = {mask_numbers(line) for line in output.splitlines()}
    lines = [line for line in step.printed.splitlines() if line.strip() and line.strip() != _OMITTED]
    return [line for line in lines if mask_numbers(line) not in found]


def mask_numbers(line: str) -> str:
    """Replace numbers, which depend on the machine, and runs of spaces."""
    return " ".join(re.sub(r"-?\d[\d.,:]*(?:e[+-]?\d+)?", "#", line).split())
