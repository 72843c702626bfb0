"""YAML to plain data, node by node.

Only nodes know their lines, show every duplicate key, and leave a date in a run's name the text that it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from llm_training_toolkit.config.document import Document, Place
from llm_training_toolkit.config.fields import Key
from llm_training_toolkit.errors import ConfigError

_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_AS_TEXT = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "value", "merge")}
_COLLECTIONS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq")}


def compose(text: str) -> Node | None:
    """The nodes of a YAML text; None where it is empty. Raises YAMLError."""
    node: Node | None = YAML(typ="safe", pure=True).compose(text)
    return node


def read_file(path: Path, document: Document) -> None:
    """Read a YAML file into the document. Raises ConfigError where it is none."""
    try:
        node = compose(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the path and the working directory") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except YAMLError as error:
        line, what = problem_in_words(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {what}") from error
    if node is not None:
        document.data = Reader(document).read(node, ())


def problem_in_words(error: YAMLError) -> tuple[str, str]:
    """The line, as `:12` where it is known, and what stands there."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return "", str(error).splitlines()[0]
    what = str(error.problem)
    if error.context and error.context_mark:
        what += f" ({error.context}, begun on line {error.context_mark.line + 1})"
    return f":{error.problem_mark.line + 1}", what


@dataclass
class Reader:
    """YAML nodes to plain data, noting where each key stands."""

    document: Document
    at: Place | None = None
    """The place of everything read, where it is no line of the file."""
    open_nodes: list[Node] = field(default_factory=list)

    def read(self, node: Node, path: Key) -> object:
        """The value of a node that stands under a key."""
        if any(node is parent for parent in self.open_nodes):
            return self._refuse(path, "refers to itself; write the value out")
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        if node.tag not in _COLLECTIONS or not isinstance(node, MappingNode | SequenceNode):
            return self._refuse(path, f"unknown YAML tag {node.tag}; remove it")
        self.open_nodes.append(node)
        value = self._mapping(node, path) if isinstance(node, MappingNode) else self._sequence(node, path)
        self.open_nodes.pop()
        return value

    def _scalar(self, node: ScalarNode, path: Key) -> object:
        if node.tag in _AS_TEXT:
            return node.value
        if node.tag not in _SCALARS:
            return self._refuse(path, f"unknown YAML tag {node.tag}; remove it")
        try:
            return YAML(typ="safe", pure=True).constructor.construct_object(node)
        except (ValueError, KeyError, YAMLError):  # a forced tag, such as `!!int many`
            return self._refuse(path, f"{node.value!r} does not fit its YAML tag; remove the tag")

    def _sequence(self, node: SequenceNode, path: Key) -> list[Any]:
        items = []
        for index, child in enumerate(node.value):
            self._note((*path, index), child)
            items.append(self.read(child, (*path, index)))
        return items

    def _mapping(self, node: MappingNode, path: Key) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._refuse(path, "a key must be a name, not a list or a mapping")
                continue
            key = str(key_node.value)
            here = (*path, key)
            first = self.document.places.get(here) if key in found else None
            self._note(here, key_node)
            value = self.read(value_node, here)
            if key in found:
                self._twice(here, first)
                if isinstance(found[key], dict) and isinstance(value, dict):
                    value = found[key] | value  # both halves of a section written twice are examined
            found[key] = value
        return found

    def _note(self, path: Key, node: Node) -> None:
        self.document.places[path] = self.at or self.document.line(node.start_mark.line + 1)

    def _twice(self, path: Key, first: Place | None) -> None:
        elsewhere = f" (first at {first.text})" if first and not self.at else ""
        self.document.report(path, f"duplicate key{elsewhere}; keep one")

    def _refuse(self, path: Key, what: str) -> object:
        """Report a value; what is returned stands in its place, so that reading goes on."""
        self.document.broken.add(path)
        self.document.report(path, what)
        return None
