"""Read a run's configuration strictly: every problem at once, in plain words.

    file ─► YAML nodes ─┐
    overrides ──────────┼─► Document ─► JSON ─► pydantic ─► Config
    resolved.json ──────┘                          └─► lines of one ConfigError

Only files and overrides are YAML (yaml_nodes.py, overrides.py); the rest is read where there is no library for it, too.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llm_training_toolkit.config.document import Document
from llm_training_toolkit.config.fields import Key, dotted, inner_section, kinds, locate, plain_type, sections
from llm_training_toolkit.config.schema import Config, Section
from llm_training_toolkit.errors import ConfigError

S = TypeVar("S", bound=Section)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, changed by `key=value` overrides."""
    return validated(read(path, overrides), Config)


def read(path: Path, overrides: Sequence[str] = ()) -> Document:
    """What a YAML file holds, changed by `key=value` overrides, not validated yet."""
    try:
        from llm_training_toolkit.config.overrides import apply
        from llm_training_toolkit.config.yaml_reader import read_file
    except ModuleNotFoundError as error:  # a plain CUDA image; plain data and resolved.json are read all the same
        raise ConfigError(f"{path}: YAML cannot be read here: `pip install ruamel.yaml`") from error
    document = Document(str(path))
    read_file(path, document)
    for number, override in enumerate(overrides):
        apply(override, number, document)
    return document


def from_json(text: str, where: str = "resolved.json") -> Config:
    """The configuration that `to_json` wrote; as strict as `load`."""
    document = Document(where)

    def pairs_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = [key for key, _ in pairs]
        for key in sorted({key for key in counts if counts.count(key) > 1}):
            document.report((), f"duplicate key {key}; keep one")
        return dict(pairs)

    try:
        document.data = json.loads(text, object_pairs_hook=pairs_once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}:{error.lineno}: not valid JSON: {error.msg}") from error
    return validated(document, Config)


def to_json(config: Config) -> str:
    """The whole configuration, defaults included, in the order of the schema."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse(data: Mapping[str, Any], where: str) -> Config:
    """The configuration in plain data; `where` begins every line of the error."""
    return validated(Document(where, data), Config)


def validated(document: Document, root: type[S]) -> S:
    """The document as the section that the whole file is. Raises ConfigError with every problem."""
    if not isinstance(document.data, Mapping):
        document.report((), f"expected sections ({', '.join(root.model_fields)}), not {_shown(document.data)}")
        document.raise_problems()
    data = _plain(document.data, (), document)
    try:
        config = root.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        _explain(error, document, root)
        document.raise_problems()
        raise
    document.raise_problems()
    return config


def _plain(value: object, path: Key, document: Document) -> object:
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


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _explain(error: ValidationError, document: Document, root: type[Section]) -> None:
    """One line per key: pydantic reports each branch of a union apart, and hides it in the location."""
    seen = set(document.broken)
    for detail in error.errors(include_url=False):
        path, annotation, metadata = locate(detail["loc"], root)
        if detail["type"] == "extra_forbidden":
            path = tuple(detail["loc"])
        if path in seen or _is_echo(detail):
            continue
        seen.add(path)
        what = _in_words(detail, path, annotation, metadata, root)
        hidden = detail["type"] in {"missing", "json_invalid"} or _is_section(detail["input"], annotation)
        document.report(path, what, None if hidden else _shown(detail["input"]))


def _is_section(value: object, annotation: object) -> bool:
    """Too much to show: the keys of a section, rather than the value of a field."""
    return isinstance(value, dict | list) and get_origin(annotation) not in {tuple, dict}


def _is_echo(detail: ErrorDetails) -> bool:
    """A list is called too short when its items were refused; the items have lines of their own."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _in_words(detail: ErrorDetails, path: Key, annotation: object, metadata: Sequence[Any], root: type[Section]) -> str:
    if detail["type"] == "extra_forbidden":
        return unknown_key(path, root)
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
        quoted = _is_number(value) if found & {int, float} else bool in found and value in {"true", "false"}
        return "; remove the quotes" if quoted else ""
    if value is None and isinstance(annotation, type) and issubclass(annotation, Section):
        return "; write {} for one without keys"
    return "; put it in quotes" if found == {str} and isinstance(value, int | float) else ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def unknown_key(path: Key, root: type[Section]) -> str:
    """What to say of a key whose section does not have it."""
    _, section, _ = locate(path[:-1], root)
    section = inner_section(section)
    assert section is not None, "only sections forbid unknown keys"
    key, valid = str(path[-1]), list(section.model_fields)
    near = [dotted((*path[:-1], name)) for name in difflib.get_close_matches(key, valid, n=1)]
    near = near or [f"{prefix}.{key}" for prefix, other in sections("", root) if prefix and key in other.model_fields]
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown key{meant} (valid in {dotted(path[:-1]) or 'the file'}: {', '.join(valid)})"
