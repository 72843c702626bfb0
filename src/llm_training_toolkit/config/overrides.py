"""Overrides on the command line: `key=value`, each value written as in the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import CollectionNode, Node

from llm_training_toolkit.config.document import Document, Place
from llm_training_toolkit.config.fields import Key, dotted
from llm_training_toolkit.config.yaml_reader import Reader, compose, problem_in_words


def apply(override: str, number: int, document: Document) -> None:
    """Set one value in the document; `number` is the override's position among all."""
    place = Place((1, number), f"override {override}")
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        document.report((), "write key=value, for example train.steps=100", place=place)
        return
    problem, node = _override_node(text)
    if problem or node is None:
        document.report((), problem, place=place)
        return
    reached = _reach(parts, document, place)
    if reached is None:
        return
    path, holder = reached
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places[path] = place
    document.broken = {known for known in document.broken if known[: len(path)] != path}
    holder[path[-1]] = Reader(document, at=place).read(node, path)


def _override_node(text: str) -> tuple[str, Node | None]:
    """What is wrong with an override's value (empty where nothing is), and the value."""
    try:
        node = compose(text)
    except YAMLError as error:
        return f"the value is not valid YAML: {problem_in_words(error)[1]}; put special characters in quotes", None
    if node is None:
        return "no value after the =; write null for none, or '\"\"' for empty text", None
    if isinstance(node, CollectionNode) and not node.flow_style:
        return "write a list as [a, b] and a section as {key: value}", None
    return "", node


def _reach(parts: Sequence[str], document: Document, place: Place) -> tuple[Key, Any] | None:
    """The path that an override names and the section or list that holds it; None once the reason is reported."""
    if not isinstance(document.data, dict):
        return None  # reported when the whole is validated
    path: Key = ()
    holder: Any = document.data
    for position, part in enumerate(parts, start=1):
        step = _step(holder, part)
        if isinstance(step, _Refusal):
            document.report((), f"{dotted(path)} {step.what}", place=place)
            return None
        path = (*path, step)
        if position < len(parts):
            if holder[step] is None:
                holder[step] = {}
                document.places[path] = place
            holder = holder[step]
    return path, holder


class _Refusal(NamedTuple):
    what: str


def _step(container: object, part: str) -> str | int | _Refusal:
    if isinstance(container, dict):
        container.setdefault(part, None)
        return part
    if not isinstance(container, list):
        return _Refusal(f"is a value, not a section: it has no {part}")
    if part.isdecimal() and int(part) < len(container):
        return int(part)
    return _Refusal(f"has no entry {part}: its {len(container)} entries count from 0")
