"""Tables on standard output: fitted to a terminal, one whole line for each row in a file or pipe."""

from __future__ import annotations

import sys

from rich.console import Console as Terminal
from rich.table import Table

_UNLIMITED_WIDTH = 1_000_000  # columns; rich takes 80 where it finds no terminal, and folds what is longer


def print_tables(*tables: Table) -> None:
    """Print tables one below the other; programs such as grep get every row as one line."""
    width = None if sys.stdout.isatty() else _UNLIMITED_WIDTH
    Terminal(highlight=False, width=width).print(*tables, sep="\n")
