"""When an elastic run that is below its largest size makes way for more workers. Pure.

Growing costs a restart, half a minute or so, but no step: the ranks save before they leave. So it waits for the
checkpoint that is due next, or for five minutes since the group began, whichever is first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from llm_training_toolkit.distributed.context import Wish
from llm_training_toolkit.launch.ray.resources import Node, Wanted, room_beside, usable

_LOOK_EVERY = 3.0
"""Seconds between two looks for room."""
_STEADY = 5.0
"""Seconds that there must have been room: a node that has just joined, or a job that has just ended, may be between two
things."""
_AT_LATEST = 300.0
"""Seconds after its first look at which a group saves out of turn to make way."""


@dataclass
class Growth:
    """Looks for room for one group of workers."""

    wanted: Wanted
    size: int
    left_out: Collection[str]
    """Addresses that do not count."""
    _first: float | None = None
    _looked: float = float("-inf")
    _since: float | None = None

    def due(self, now: float) -> bool:
        """Whether to look for room now."""
        if self.size >= self.wanted.most or now - self._looked < _LOOK_EVERY:
            return False
        self._looked = now
        self._first = now if self._first is None else self._first
        return True

    def wish(self, nodes: Sequence[Node], own: Mapping[str, int], now: float) -> Wish:
        """What to ask of the ranks; `own` is how many of them are on each node, by id."""
        room = room_beside(usable(nodes, self.wanted, self.left_out), self.wanted, own)
        if room <= self.size:
            self._since = None
            return Wish.GO_ON
        self._since = now if self._since is None else self._since
        if now - self._since < _STEADY or self._first is None:
            return Wish.GO_ON
        return Wish.LEAVE if now - self._first >= _AT_LATEST else Wish.LEAVE_WHEN_SAVED
