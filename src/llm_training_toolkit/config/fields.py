"""Schema fields by dotted key, and their types in plain words. For messages and the reference."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.section import ConfigSection, Duration, Interval, Workers

KeyPath = tuple[str | int, ...]  # key of the configuration, part by part


# Types whose validator is stricter than their annotation.
_SPECIAL: Mapping[Any, str] = {
    Interval: "a number of steps of at least 1 or a duration (90s, 10m, 1.5h)",
    Duration: "a duration (90s, 10m, 1.5h)",
    Workers: "a whole number of at least 0, or two of at least 1, the smaller one first ([1, 8])",
}


def format_key(path: KeyPath) -> str:
    """Format a key in dotted form, such as `data.sources.0.path`."""
    return ".".join(map(str, path))


def iter_sections(prefix: str = "", section: type[ConfigSection] = Config) -> Iterator[tuple[str, type[ConfigSection]]]:
    """Yield every section of the schema by dotted key; `N` stands for a list index."""
    yield prefix, section
    for name, info in section.model_fields.items():
        inner = get_inner_section(info.annotation)
        if inner is not None:
            key = f"{prefix}.{name}" if prefix else name
            yield from iter_sections(f"{key}.N" if get_origin(info.annotation) is tuple else key, inner)


def get_inner_section(annotation: object) -> type[ConfigSection] | None:
    """Return the section that a field holds: itself, optional, or as the items of a list."""
    if isinstance(annotation, type) and issubclass(annotation, ConfigSection):
        return annotation
    if get_origin(annotation) in {Union, types.UnionType, tuple}:
        return next((inner for inner in map(get_inner_section, get_args(annotation)) if inner), None)
    return None


def format_type(annotation: object, metadata: Sequence[Any] = ()) -> str:
    """Describe the allowed values in plain words."""
    args = get_args(annotation)
    for special, words in _SPECIAL.items():
        if any(item in metadata for item in get_args(special)[1:]):
            return words
    if get_origin(annotation) is Annotated:
        return format_type(args[0], args[1:])
    if args:
        return _format_generic_type(get_origin(annotation), args, _collect_limits(metadata))
    if isinstance(annotation, type) and issubclass(annotation, ConfigSection):
        return f"a section ({', '.join(annotation.model_fields)})"
    return _format_scalar_type(annotation, _collect_limits(metadata))


def _format_generic_type(origin: object, args: tuple[Any, ...], limits: Mapping[str, Any]) -> str:
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(map(str, args))
    if origin is dict:
        return "a section of names and values" if args[1] is Any else f"a section of names, each {format_type(args[1])}"
    if origin is tuple:
        return _format_list_type(args, limits)
    if set(args) == {int, float, bool, str}:
        return "text, a number, true or false"
    return " or ".join(map(format_type, args))


def _format_list_type(args: tuple[Any, ...], limits: Mapping[str, Any]) -> str:
    if args[-1] is not ...:
        return f"a list of {len(args)}: {', '.join(map(format_type, args))}"
    least = f" of at least {limits['min_length']}" if "min_length" in limits else ""
    return f"a list{least}, each {format_type(args[0])}"


def _format_scalar_type(annotation: object, limits: Mapping[str, Any]) -> str:
    if annotation is str and "pattern" in limits:
        return f"text that matches `{limits['pattern']}`"
    if annotation is str:
        return "text that is not empty" if limits.get("min_length") else "text"
    if "multiple_of" in limits:
        return f"a multiple of {limits['multiple_of']}" + _format_bounds(limits)
    if annotation in {int, float}:
        return ("a whole number" if annotation is int else "a number") + _format_bounds(limits)
    return {bool: "true or false", types.NoneType: "null"}.get(annotation, "a value")


def _format_bounds(limits: Mapping[str, Any]) -> str:
    bound = {name: f"{value:g}" if value < 1e6 else str(int(value)) for name, value in limits.items()}
    low = f"from {bound['ge']}" if "ge" in bound else f"above {bound['gt']}" if "gt" in bound else ""
    high = f"to {bound['le']}" if "le" in bound else f"to below {bound['lt']}" if "lt" in bound else ""
    if "ge" in bound and not high:
        low = f"of at least {bound['ge']}"
    return "".join(f" {part}" for part in (low, high) if part)


_LIMITS = ("ge", "gt", "le", "lt", "multiple_of", "min_length", "pattern")


def _collect_limits(metadata: Sequence[Any]) -> dict[str, Any]:
    flat = [inner for item in metadata for inner in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return {name: getattr(item, name) for item in flat for name in _LIMITS if getattr(item, name, None) is not None}


def get_plain_types(annotation: object) -> set[type]:
    """Return the plain types that a field accepts; a Literal of strings does not count as str."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return get_plain_types(args[0])
    if origin in {Union, types.UnionType}:
        return set().union(*map(get_plain_types, args)) - {types.NoneType}
    if origin is Literal:
        return {type(value) for value in args} - {str}
    return {annotation} if isinstance(annotation, type) else set()


def resolve_key(loc: Sequence[str | int], root: type[ConfigSection] = Config) -> tuple[KeyPath, Any, Sequence[Any]]:
    """Return the key in an error's location without names of union branches, with its annotation and metadata."""
    path: KeyPath = ()
    annotation: Any = root
    metadata: Sequence[Any] = ()
    for part in loc:
        child = _get_child_annotation(annotation, part)
        if child is None:
            break
        path, (annotation, metadata) = (*path, part), child
    return path, annotation, metadata


def _get_child_annotation(annotation: object, part: str | int) -> tuple[Any, Sequence[Any]] | None:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is tuple and isinstance(part, int):
        return (args[0] if args[-1] is ... else args[part]), ()
    if origin is dict:
        return args[1], ()
    section = get_inner_section(annotation)
    info = section.model_fields.get(str(part)) if section else None
    return (info.annotation, info.metadata) if info else None
