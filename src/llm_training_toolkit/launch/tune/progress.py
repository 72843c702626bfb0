"""What a person sees while a search works: its table where there is a terminal, otherwise a line for each trial."""

from __future__ import annotations

import time

from rich.live import Live
from rich.table import Table

from llm_training_toolkit.config.search import Search
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.search.event_log import Ledger
from llm_training_toolkit.search.table import line, table

_DRAW_EVERY = 1.0


class Screen:
    """The screen of a search; called whenever Tune has looked around."""

    def __init__(self, search: Search, ledger: Ledger, console: Console) -> None:
        self._search, self._ledger, self._console = search, ledger, console
        self._drawn = 0.0
        self._said = {trial.number: trial.state for trial in ledger.trials.values()}
        self._live: Live | None = None
        console.close()
        if console.terminal.is_terminal:
            self._live = Live(self._table(), console=console.terminal, auto_refresh=False)
            self._live.start()

    def __call__(self) -> None:
        """Show what has changed."""
        if self._live is None:
            self._say()
        elif time.monotonic() - self._drawn > _DRAW_EVERY:
            self._drawn = time.monotonic()
            self._live.update(self._table(), refresh=True)

    def close(self) -> None:
        """Leave the last table on the screen."""
        if self._live is None:
            self._say()
            return
        self._live.update(self._table(), refresh=True)
        self._live.stop()
        self._live = None

    def _table(self) -> Table:
        return table(self._search, self._ledger, self._console.terminal.width)

    def _say(self) -> None:
        for trial in list(self._ledger.trials.values()):
            if self._said.get(trial.number) != trial.state:
                self._said[trial.number] = trial.state
                self._console.say(line(self._search, trial))
