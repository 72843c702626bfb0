"""Reader from YAML nodes to plain data.

Nodes keep line numbers and every duplicate key, and leave a date in a run's name as text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from llm_training_toolkit.config.fields import KeyPath
from llm_training_toolkit.config.raw_config import ConfigLocation, RawConfig
from llm_training_toolkit.errors import ConfigError

_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_AS_TEXT = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "value", "merge")}
_COLLECTIONS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq")}


# Far above any file that a person writes; below what takes seconds, or Python's own depth of recursion.
_MAX_CHARACTERS, _MAX_DEPTH, _MAX_VALUES = 1_000_000, 50, 10_000


def check_yaml_limits(text: str) -> None:
    """Raise YAMLError for a text that is too long or too deeply nested to be parsed safely."""
    if len(text) > _MAX_CHARACTERS:
        raise YAMLError(f"{len(text):,} characters, {_MAX_CHARACTERS:,} are read")
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise MarkedYAMLError(problem=f"nested more than {_MAX_DEPTH} deep", problem_mark=event.start_mark)


def compose_yaml(text: str) -> Node | None:
    """Parse a YAML text to nodes, or to None if it is empty. Raises YAMLError."""
    check_yaml_limits(text)
    node: Node | None = YAML(typ="safe", pure=True).compose(text)
    return node


def read_yaml_file(path: Path, raw_config: RawConfig) -> None:
    """Read a YAML file into `raw_config`. Raises ConfigError for unreadable files and invalid YAML."""
    try:
        node = compose_yaml(path.read_text(encoding="utf-8-sig"))
        if node is not None:
            raw_config.data = YamlNodeReader(raw_config).read_node(node, ())
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the path and the working directory") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except YAMLError as error:
        line, what = format_yaml_error(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {what}") from error


def format_yaml_error(error: YAMLError) -> tuple[str, str]:
    """Return the line of the error, as `:12` if it is known, and the problem."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return "", str(error).splitlines()[0]
    what = str(error.problem)
    if error.context and error.context_mark:
        what += f" ({error.context}, begun on line {error.context_mark.line + 1})"
    return f":{error.problem_mark.line + 1}", what


@dataclass
class YamlNodeReader:
    """Converter of YAML nodes to plain data. Records the location of each key."""

    raw_config: RawConfig
    fixed_location: ConfigLocation | None = None
    """Location of everything read, for text that is not in the file (overrides)."""
    open_nodes: list[Node] = field(default_factory=list)

    values_read: int = 0

    def read_node(self, node: Node, path: KeyPath) -> object:
        """Return the value of a node; `path` is its key. Raises YAMLError if aliases multiply the values."""
        self.values_read += 1
        if self.values_read > _MAX_VALUES:
            raise YAMLError(f"more than {_MAX_VALUES:,} values, those that aliases repeat counted; shorten it")
        if len(self.open_nodes) > _MAX_DEPTH:
            raise YAMLError(f"its aliases are nested more than {_MAX_DEPTH} deep; write them out")
        if any(node is parent for parent in self.open_nodes):
            return self._report_invalid_value(path, "refers to itself; write the value out")
        if isinstance(node, ScalarNode):
            return self._read_scalar(node, path)
        if node.tag not in _COLLECTIONS or not isinstance(node, MappingNode | SequenceNode):
            return self._report_invalid_value(path, f"unknown YAML tag {node.tag}; remove it")
        self.open_nodes.append(node)
        value = self._read_mapping(node, path) if isinstance(node, MappingNode) else self._read_sequence(node, path)
        self.open_nodes.pop()
        return value

    def _read_scalar(self, node: ScalarNode, path: KeyPath) -> object:
        if node.tag in _AS_TEXT:
            return node.value
        if node.tag not in _SCALARS:
            return self._report_invalid_value(path, f"unknown YAML tag {node.tag}; remove it")
        try:
            return YAML(typ="safe", pure=True).constructor.construct_object(node)
        except (ValueError, KeyError, YAMLError):  # a forced tag, such as `!!int many`
            return self._report_invalid_value(path, f"{node.value!r} does not fit its YAML tag; remove the tag")

    def _read_sequence(self, node: SequenceNode, path: KeyPath) -> list[Any]:
        items = []
        for index, child in enumerate(node.value):
            self._record_location((*path, index), child)
            items.append(self.read_node(child, (*path, index)))
        return items

    def _read_mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._report_invalid_value(path, "a key must be a name, not a list or a mapping")
                continue
            key = str(key_node.value)
            here = (*path, key)
            first = self.raw_config.locations.get(here) if key in found else None
            self._record_location(here, key_node)
            value = self.read_node(value_node, here)
            if key in found:
                self._report_duplicate_key(here, first)
                if isinstance(found[key], dict) and isinstance(value, dict):
                    value = found[key] | value  # validate both halves of a section written twice
            found[key] = value
        return found

    def _record_location(self, path: KeyPath, node: Node) -> None:
        self.raw_config.locations[path] = self.fixed_location or self.raw_config.locate_line(node.start_mark.line + 1)

    def _report_duplicate_key(self, path: KeyPath, first: ConfigLocation | None) -> None:
        elsewhere = f" (first at {first.text})" if first and not self.fixed_location else ""
        self.raw_config.report_problem(path, f"duplicate key{elsewhere}; keep one")

    def _report_invalid_value(self, path: KeyPath, what: str) -> object:
        """Report a value. Returns None in its place, so that reading continues."""
        self.raw_config.reported_keys.add(path)
        self.raw_config.report_problem(path, what)
        return None
