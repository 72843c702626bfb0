"""Why a run does not start, in words. Pure; `nodes.py` and `autoscaler.py` ask Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from llm_training_toolkit.launch.room import Node, Resources, Wanted

_ORDER = ("GPU", "CPU")
"""Resources are named in this order, then by name."""
_PLACES = {"strict_pack": " on one node", "strict_spread": " on as many nodes"}


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
