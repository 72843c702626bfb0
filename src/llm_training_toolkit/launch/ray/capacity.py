"""A run that has no room yet: says what it waits for, at once and again and again, and knows when to give up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.schema import duration_seconds
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray import nodes
from llm_training_toolkit.launch.ray.autoscaler import Answer, Autoscaler
from llm_training_toolkit.launch.ray.resources import Node, Resources, Wanted, used_by_others
from llm_training_toolkit.monitoring.console import Console

_SAY_EVERY = 30.0
"""Seconds between two lines that say the same."""
_VERDICT_WITHIN = 20.0
"""Seconds an autoscaler has to say that there can never be room: it reports every five, and is asked for less twice."""
_LOOK_EVERY = 0.5
_ORDER = ("GPU", "CPU")
"""Resources are named in this order, then by name."""
_PLACES = {"strict_pack": " on one node", "strict_spread": " on as many nodes"}


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


def what_is_lacking(wanted: Wanted, usable: Sequence[Node], uses: Mapping[str, Resources]) -> str:
    """What the run needs, what the cluster has, and who uses how much of it: `uses` by job, as far as it is known."""
    now = wanted.room(node.free for node in usable)
    needs = f"{count(wanted.fewest, 'worker')} of {amounts(wanted.each)}{_PLACES.get(wanted.placement, '')}"
    there = f"{_nodes_in_words(usable, wanted.each)}, {_users_in_words(_in_use(usable, wanted.each), uses)}"
    return f"the run needs {needs}; the cluster has room for {now}: {there}"


def adding_in_words(adding: Mapping[str, int], failed: Sequence[str]) -> str:
    """What an autoscaler is about."""
    coming = [f"{count(number, 'node')} of type {kind}" for kind, number in sorted(adding.items()) if number]
    said = f"its autoscaler is adding {_list(coming)}" if coming else "its autoscaler adds no node yet"
    return f"{said}; it failed to start {failed[-1]}" if failed else said


def amounts(resources: Resources) -> str:
    """Amounts of resources: `1 GPU and 8 CPU`; those that are 0 are left out."""
    parts = [f"{resources[name]:g} {name}" for name in _sorted(resources) if resources[name]]
    return _list(parts) or "nothing"


def count(number: int, what: str) -> str:
    """`1 node`, `3 nodes`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _in_use(nodes: Sequence[Node], names: Iterable[str]) -> dict[str, float]:
    """How much of the named resources is in use on the nodes together."""
    used = {name: sum(node.total.get(name, 0.0) - node.free.get(name, 0.0) for node in nodes) for name in names}
    return {name: round(amount, 4) for name, amount in used.items() if round(amount, 4) > 0}


def _nodes_in_words(nodes: Sequence[Node], names: Iterable[str]) -> str:
    names = list(names)
    kinds = Counter(amounts({name: node.total.get(name, 0.0) for name in names}) for node in nodes)
    having = [(kind, number) for kind, number in kinds.most_common() if kind != "nothing"]
    if not having:
        return f"no node has {_list(_sorted(names))}"
    return _list([f"{count(number, 'node')} with {kind}" for kind, number in having])


def _users_in_words(used: Resources, uses: Mapping[str, Resources]) -> str:
    """`2 GPU in use (2 GPU by ltt train a.yaml)`."""
    if not used:
        return "none of it in use"
    by = [f"{amounts({name: use.get(name, 0.0) for name in used})} by {job}" for job, use in uses.items()]
    return f"{amounts(used)} in use" + (f" ({_list(by)})" if by else "")


def _sorted(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


def _list(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
