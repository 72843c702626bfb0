"""Progress display of a search: the trials table on a terminal, otherwise one line per change of a trial's state."""

from __future__ import annotations

import time

from rich.live import Live
from rich.table import Table

from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.search.event_log import EventLog
from llm_training_toolkit.search.table import build_trials_table, format_trial_line

_REDRAW_SECONDS = 1.0


class SearchProgressDisplay:
    """Progress display of a search, called by `EventLogCallback` after each iteration of Tune."""

    def __init__(self, search: SearchConfig, event_log: EventLog, console: Console) -> None:
        self._search, self._event_log, self._console = search, event_log, console
        self._drawn_at = 0.0
        self._shown_states = {trial.number: trial.state for trial in event_log.trials.values()}
        self._live: Live | None = None
        console.close()
        if console.terminal.is_terminal:
            self._live = Live(self._build_table(), console=console.terminal, auto_refresh=False)
            self._live.start()

    def __call__(self) -> None:
        """Redraw the table, or print the changes."""
        if self._live is None:
            self._print_changes()
        elif time.monotonic() - self._drawn_at > _REDRAW_SECONDS:
            self._drawn_at = time.monotonic()
            self._live.update(self._build_table(), refresh=True)

    def close(self) -> None:
        """Show the final state and leave it on the screen."""
        if self._live is None:
            self._print_changes()
            return
        self._live.update(self._build_table(), refresh=True)
        self._live.stop()
        self._live = None

    def _build_table(self) -> Table:
        return build_trials_table(self._search, self._event_log, self._console.terminal.width)

    def _print_changes(self) -> None:
        for trial in list(self._event_log.trials.values()):
            if self._shown_states.get(trial.number) != trial.state:
                self._shown_states[trial.number] = trial.state
                self._console.print_line(format_trial_line(self._search, trial))
