"""Read a run's configuration strictly: every problem at once, in plain words.

    file ─► YAML nodes ─┐
    overrides ──────────┼─► plain data with places ─► JSON ─► pydantic ─► Config
    resolved.json ──────┘                                        └─► lines of one ConfigError

YAML is read node by node rather than loaded, because only nodes know their lines, show every duplicate
key, and leave a date in a run's name the text that it is.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llm_training_toolkit.config.fields import Key, dotted, inner_section, kinds, locate, plain_type, sections
from llm_training_toolkit.config.schema import Config, Section
from llm_training_toolkit.errors import ConfigError

_NO_YAML = ""
"""Why YAML cannot be read here; plain data and resolved.json are read all the same."""
try:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError
    from ruamel.yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode, SequenceNode
except ModuleNotFoundError:  # a plain CUDA image
    _NO_YAML = "YAML cannot be read here: `pip install ruamel.yaml`"


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, changed by `key=value` overrides."""
    if _NO_YAML:
        raise ConfigError(f"{path}: {_NO_YAML}")
    document = _Document(str(path))
    _read_file(path, document)
    for number, override in enumerate(overrides):
        _apply(override, number, document)
    return _validated(document)


def from_json(text: str, where: str = "resolved.json") -> Config:
    """The configuration that `to_json` wrote; as strict as `load`."""
    document = _Document(where)

    def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = [key for key, _ in pairs]
        for key in sorted({key for key in counts if counts.count(key) > 1}):
            document.report((), f"duplicate key {key}; keep one")
        return dict(pairs)

    try:
        document.data = json.loads(text, object_pairs_hook=pairs_once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}:{error.lineno}: not valid JSON: {error.msg}") from error
    return _validated(document)


def to_json(config: Config) -> str:
    """The whole configuration, defaults included, in the order of the schema."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse(data: Mapping[str, Any], where: str) -> Config:
    """The configuration in plain data; `where` begins every line of the error."""
    return _validated(_Document(where, data))


# Where a problem stands ------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    order: tuple[int, int]
    """File before overrides, then by line or by position: the order of the lines in the error."""
    text: str


@dataclass
class _Document:
    """Plain data on its way to a Config: where each key stands, and what is wrong so far."""

    where: str
    data: Any = field(default_factory=dict)
    places: dict[Key, _Place] = field(default_factory=dict)
    problems: list[tuple[_Place, str]] = field(default_factory=list)
    broken: set[Key] = field(default_factory=set)
    """Keys whose value has been reported: what pydantic says of them adds nothing."""

    def line(self, number: int) -> _Place:
        return _Place((0, number), f"{self.where}:{number}")

    def place(self, path: Key) -> _Place:
        """Where a key stands, or else the nearest section above it."""
        known = (self.places[path[:length]] for length in range(len(path), 0, -1) if path[:length] in self.places)
        return next(known, _Place((0, 0), self.where))

    def report(self, path: Key, what: str, shown: str | None = None, place: _Place | None = None) -> None:
        place = place or self.place(path)
        key = dotted(path)
        subject = f"{key} = {shown}: " if shown is not None else f"{key}: " if path else ""
        if place.text.startswith(f"override {key}="):
            subject = ""  # the override already shows key and value
        self.problems.append((place, f"{place.text}: {subject}{what}"))

    def raise_problems(self) -> None:
        if self.problems:
            lines = [line for _, line in sorted(self.problems, key=lambda problem: problem[0].order)]
            raise ConfigError("\n".join(lines))


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# YAML ------------------------------------------------------------------------------------------------------------

_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null")}
_AS_TEXT = {f"tag:yaml.org,2002:{name}" for name in ("timestamp", "value", "merge")}
_COLLECTIONS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq")}


def _compose(text: str) -> Node | None:
    node: Node | None = YAML(typ="safe", pure=True).compose(text)
    return node


def _read_file(path: Path, document: _Document) -> None:
    try:
        node = _compose(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; check the path and the working directory") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except YAMLError as error:
        line, what = _yaml_problem(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {what}") from error
    if node is not None:
        document.data = _Reader(document).read(node, ())


def _yaml_problem(error: YAMLError) -> tuple[str, str]:
    """The line, as `:12` where it is known, and what stands there."""
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return "", str(error).splitlines()[0]
    what = str(error.problem)
    if error.context and error.context_mark:
        what += f" ({error.context}, begun on line {error.context_mark.line + 1})"
    return f":{error.problem_mark.line + 1}", what


@dataclass
class _Reader:
    """YAML nodes to plain data, noting where each key stands."""

    document: _Document
    at: _Place | None = None
    """The place of everything read, where it is no line of the file."""
    open_nodes: list[Node] = field(default_factory=list)

    def read(self, node: Node, path: Key) -> object:
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

    def _twice(self, path: Key, first: _Place | None) -> None:
        elsewhere = f" (first at {first.text})" if first and not self.at else ""
        self.document.report(path, f"duplicate key{elsewhere}; keep one")

    def _refuse(self, path: Key, what: str) -> object:
        """Report a value; what is returned stands in its place, so that reading goes on."""
        self.document.broken.add(path)
        self.document.report(path, what)
        return None


# Overrides -------------------------------------------------------------------------------------------------------


def _apply(override: str, number: int, document: _Document) -> None:
    place = _Place((1, number), f"override {override}")
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
    holder[path[-1]] = _Reader(document, at=place).read(node, path)


def _override_node(text: str) -> tuple[str, Node | None]:
    """What is wrong with an override's value (empty where nothing is), and the value."""
    try:
        node = _compose(text)
    except YAMLError as error:
        return f"the value is not valid YAML: {_yaml_problem(error)[1]}; put special characters in quotes", None
    if node is None:
        return "no value after the =; write null for none, or '\"\"' for empty text", None
    if isinstance(node, CollectionNode) and not node.flow_style:
        return "write a list as [a, b] and a section as {key: value}", None
    return "", node


def _reach(parts: Sequence[str], document: _Document, place: _Place) -> tuple[Key, Any] | None:
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


# Validation ------------------------------------------------------------------------------------------------------


def _validated(document: _Document) -> Config:
    if not isinstance(document.data, Mapping):
        document.report((), f"expected sections ({', '.join(Config.model_fields)}), not {_shown(document.data)}")
        document.raise_problems()
    data = _plain(document.data, (), document)
    try:
        config = Config.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        _explain(error, document)
        document.raise_problems()
        raise
    document.raise_problems()
    return config


def _plain(value: object, path: Key, document: _Document) -> object:
    """What JSON can carry, whatever the source; the rest is reported."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, (*path, str(key)), document) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, index), document) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        document.broken.add(path)
        document.report(path, "expected a finite number", str(value))
    elif not isinstance(value, str | int | float | None):
        document.broken.add(path)
        document.report(path, f"expected text, a number, true, false or null, not {type(value).__name__}", str(value))
        return None
    return value


def _explain(error: ValidationError, document: _Document) -> None:
    """One line per key: pydantic reports each branch of a union apart, and hides it in the location."""
    seen = set(document.broken)
    for detail in error.errors(include_url=False):
        path, annotation, metadata = locate(detail["loc"])
        if detail["type"] == "extra_forbidden":
            path = tuple(detail["loc"])
        if path in seen or _is_echo(detail):
            continue
        seen.add(path)
        what = _in_words(detail, path, annotation, metadata)
        hidden = detail["type"] in {"missing", "json_invalid"} or _is_section(detail["input"], annotation)
        document.report(path, what, None if hidden else _shown(detail["input"]))


def _is_section(value: object, annotation: object) -> bool:
    """Too much to show: the keys of a section, rather than the value of a field."""
    return isinstance(value, dict | list) and get_origin(annotation) not in {tuple, dict}


def _is_echo(detail: ErrorDetails) -> bool:
    """A list is called too short when its items were refused; the items have lines of their own."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _in_words(detail: ErrorDetails, path: Key, annotation: object, metadata: Sequence[Any]) -> str:
    if detail["type"] == "extra_forbidden":
        return _unknown_key(path)
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] == "json_invalid":
        return f"cannot be written as JSON: {detail['ctx']['error']}"
    expected = f"expected {plain_type(annotation, metadata)}"
    if detail["type"] == "missing":
        return f"missing; {expected}"
    return expected + _hint(detail["input"], annotation)


def _hint(value: object, annotation: object) -> str:
    found = kinds(annotation)
    if isinstance(value, str):
        bare = _bare(value)
        numeric = isinstance(bare, int | float) and not isinstance(bare, bool) and found & {int, float}
        return "; remove the quotes" if numeric or (isinstance(bare, bool) and bool in found) else ""
    if value is None and isinstance(annotation, type) and issubclass(annotation, Section):
        return "; write {} for one without keys"
    return "; put it in quotes" if found == {str} and isinstance(value, int | float) else ""


def _bare(text: str) -> object:
    """What the text would be without its quotes."""
    if _NO_YAML:
        return text
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError):
        return text


def _unknown_key(path: Key) -> str:
    _, section, _ = locate(path[:-1])
    section = inner_section(section)
    assert section is not None, "only sections forbid unknown keys"
    key, valid = str(path[-1]), list(section.model_fields)
    near = [dotted((*path[:-1], name)) for name in difflib.get_close_matches(key, valid, n=1)]
    near = near or [f"{prefix}.{key}" for prefix, other in sections() if prefix and key in other.model_fields]
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown key{meant} (valid in {dotted(path[:-1]) or 'the file'}: {', '.join(valid)})"
