"""A run that has no room yet: says what it waits for, at once and again and again, and knows when to give up."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.schema import duration_seconds
from llm_training_toolkit.console import Console
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch import nodes
from llm_training_toolkit.launch.autoscaler import Answer, Autoscaler
from llm_training_toolkit.launch.lacking import adding_in_words, what_is_lacking
from llm_training_toolkit.launch.room import Node, Wanted, used_by_others

_SAY_EVERY = 30.0
"""Seconds between two lines that say the same."""
_VERDICT_WITHIN = 20.0
"""Seconds an autoscaler has to say that there can never be room: it reports every five, and is asked for less twice."""
_LOOK_EVERY = 0.5


class Waiting:
    """One wait for room."""

    def __init__(self, config: Config, wanted: Wanted, autoscaler: Autoscaler, console: Console) -> None:
        self._wanted, self._autoscaler, self._console = wanted, autoscaler, console
        self._wait = config.cluster.wait
        self._began = time.monotonic()
        self._said = float("-inf")

    @property
    def seconds(self) -> float:
        """How long it has lasted."""
        return time.monotonic() - self._began

    def refuse_never(self) -> None:
        """See before anything is prepared whether there can ever be room. Raises LaunchError where there cannot.

        Nodes that an autoscaler could add are not kept for a run that has yet to be prepared.
        """
        try:
            while self.seconds < _VERDICT_WITHIN:
                living = nodes.living_nodes()
                if self._wanted.room(node.total for node in living) >= self._wanted.fewest:
                    return
                answer = self._autoscaler.ask(used_by_others(living, self._wanted, {}))
                self._refuse_never(living, answer)
                self._say(living, answer)
                time.sleep(_LOOK_EVERY)
        finally:
            self._autoscaler.withdraw()

    def go_on(self, living: Sequence[Node], good: Sequence[Node], *, quietly: bool, nodes_may_return: bool) -> None:
        """Ask for nodes and say what is lacking; `good` are the living nodes that the run may use.

        Raises LaunchError when there can never be room, or when there is none within `cluster.wait`.
        """
        answer = self._autoscaler.ask(used_by_others(living, self._wanted, {}))
        if not nodes_may_return:
            self._refuse_never(good, answer)
        if self.seconds > (duration_seconds(self._wait) or 0.0):
            ending = f"none came within cluster.wait = {self._wait}; the same command goes on once there is room"
            raise LaunchError(f"{self._lacking(good)}; {ending}")
        if not quietly:
            self._say(good, answer)

    def _say(self, good: Sequence[Node], answer: Answer | None) -> None:
        if time.monotonic() - self._said < _SAY_EVERY:
            return
        self._said = time.monotonic()
        adding = f"; {adding_in_words(answer.adding, answer.failed)}" if answer else ""
        self._console.say(f"waiting for room: {self._lacking(good)}{adding} (cluster.wait = {self._wait})")

    def _lacking(self, good: Sequence[Node]) -> str:
        return what_is_lacking(self._wanted, good, nodes.uses())

    def _refuse_never(self, good: Sequence[Node], answer: Answer | None) -> None:
        never = self._why_never(good, answer)
        if never:
            raise LaunchError(f"{self._lacking(good)}, and {never}")

    def _why_never(self, good: Sequence[Node], answer: Answer | None) -> str:
        """Why waiting is in vain, and what to do; empty where it may help."""
        could = self._wanted.room(node.total for node in good)
        if could >= self._wanted.fewest or (answer is not None and not answer.refuses):
            return ""
        why = "its autoscaler can never add enough" if answer else "no autoscaler adds nodes to it"
        lower = f"set cluster.workers to {could} (workers change the speed, not the result), " if could else ""
        return f"{why}: {lower}ask for less of each worker, or make the cluster larger"
