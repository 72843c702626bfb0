"""Command line overrides: `key=value`, with values in YAML as in the file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import CollectionNode, Node

from llm_training_toolkit.config.fields import KeyPath, format_key
from llm_training_toolkit.config.raw_config import ConfigLocation, RawConfig
from llm_training_toolkit.config.yaml_reader import YamlNodeReader, compose_yaml, format_yaml_error


def apply_override(override: str, number: int, raw_config: RawConfig) -> None:
    """Set one value; `number` is the position among all overrides."""
    location = ConfigLocation((1, number), f"override {override}")
    key, equals, text = override.partition("=")
    segments = key.strip().split(".")
    if not equals or not all(segments):
        raw_config.report_problem((), "write key=value, for example train.steps=100", location=location)
        return
    problem, node = _parse_override_value(text)
    if problem or node is None:
        raw_config.report_problem((), problem, location=location)
        return
    reached = _resolve_parent(segments, raw_config, location)
    if reached is None:
        return
    path, holder = reached
    for known in [known for known in raw_config.locations if known[: len(path)] == path]:
        del raw_config.locations[known]
    raw_config.locations[path] = location
    raw_config.reported_keys = {known for known in raw_config.reported_keys if known[: len(path)] != path}
    try:
        holder[path[-1]] = YamlNodeReader(raw_config, fixed_location=location).read_node(node, path)
    except YAMLError as error:  # aliases that multiply
        raw_config.report_problem(path, str(error), location=location)


def _parse_override_value(text: str) -> tuple[str, Node | None]:
    """Return the problem of an override's value (empty if there is none) and the value."""
    try:
        node = compose_yaml(text)
    except YAMLError as error:
        return f"the value is not valid YAML: {format_yaml_error(error)[1]}; put special characters in quotes", None
    if node is None:
        return "no value after the =; write null for none, or '\"\"' for empty text", None
    if isinstance(node, CollectionNode) and not node.flow_style:
        return "write a list as [a, b] and a section as {key: value}", None
    return "", node


def _resolve_parent(
    segments: Sequence[str], raw_config: RawConfig, location: ConfigLocation
) -> tuple[KeyPath, Any] | None:
    """Return the path of an override's key and the container that holds it, or None after reporting a problem."""
    if not isinstance(raw_config.data, dict):
        return None  # reported by `validate_raw_config`
    path: KeyPath = ()
    holder: Any = raw_config.data
    for position, part in enumerate(segments, start=1):
        step = _resolve_step(holder, part)
        if isinstance(step, _InvalidStep):
            raw_config.report_problem((), f"{format_key(path)} {step.what}", location=location)
            return None
        path = (*path, step)
        if position < len(segments):
            if holder[step] is None:
                holder[step] = {}
                raw_config.locations[path] = location
            holder = holder[step]
    return path, holder


class _InvalidStep(NamedTuple):
    what: str


def _resolve_step(container: object, part: str) -> str | int | _InvalidStep:
    if isinstance(container, dict):
        container.setdefault(part, None)
        return part
    if not isinstance(container, list):
        return _InvalidStep(f"is a value, not a section: it has no {part}")
    if part.isdecimal() and int(part) < len(container):
        return int(part)
    return _InvalidStep(f"has no entry {part}: its {len(container)} entries count from 0")
