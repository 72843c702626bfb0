"""Strict loader of a run's configuration: reports every problem at once, in plain words.

    file ─► YAML nodes ─┐
    overrides ──────────┼─► RawConfig ─► JSON ─► pydantic ─► Config
    resolved.json ──────┘                                └─► lines of one ConfigError

Only files and overrides need YAML (yaml_reader.py, overrides.py); the rest is read without ruamel.yaml, too.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llm_training_toolkit.config.data_config import DataConfig
from llm_training_toolkit.config.fields import (
    KeyPath,
    format_key,
    format_type,
    get_inner_section,
    get_plain_types,
    iter_sections,
    resolve_key,
)
from llm_training_toolkit.config.raw_config import RawConfig
from llm_training_toolkit.config.renamed_keys import find_renamed_key
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.section import SECRET_ERROR, ConfigSection
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.config.uri import redact_uri
from llm_training_toolkit.errors import ConfigError

S = TypeVar("S", bound=ConfigSection)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Load the configuration in a YAML file, changed by `key=value` overrides."""
    return validate_raw_config(read_raw_config(path, overrides), Config)


def read_raw_config(path: Path, overrides: Sequence[str] = ()) -> RawConfig:
    """Read a YAML file, changed by `key=value` overrides, without validation."""
    raw_config = RawConfig(str(path))
    try:
        from llm_training_toolkit.config.yaml_reader import read_yaml_file
    except ModuleNotFoundError as error:  # plain CUDA image; plain data and resolved.json still load
        raise ConfigError(f"{path}: YAML cannot be read here: `pip install ruamel.yaml`") from error
    read_yaml_file(path, raw_config)
    _apply_overrides(overrides, raw_config)
    return raw_config


def _apply_overrides(overrides: Sequence[str], raw_config: RawConfig) -> None:
    if not overrides:
        return
    from llm_training_toolkit.config.overrides import apply_override  # needs YAML

    for number, override in enumerate(overrides):
        apply_override(override, number, raw_config)


def parse_config_json(text: str, where: str = "resolved.json") -> Config:
    """Parse the configuration written by `dump_config_json`, as strictly as `load_config`."""
    raw_config = RawConfig(where)

    def report_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = [key for key, _ in pairs]
        for key in sorted({key for key in counts if counts.count(key) > 1}):
            raw_config.report_problem((), f"duplicate key {key}; keep one")
        return dict(pairs)

    try:
        raw_config.data = json.loads(text, object_pairs_hook=report_duplicate_keys)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}:{error.lineno}: not valid JSON: {error.msg}") from error
    return validate_raw_config(raw_config, Config)


def dump_config_json(config: Config) -> str:
    """Return the whole configuration as JSON, including defaults, in schema order."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_config(data: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> Config:
    """Parse the configuration in plain data, changed by `key=value` overrides.

    `where` is the prefix of every line of the error.
    """
    raw_config = RawConfig(where)
    raw_config.data = _convert_to_json_data(data, (), raw_config)  # a copy, which the overrides may change
    _apply_overrides(overrides, raw_config)
    return validate_raw_config(raw_config, Config)


def validate_raw_config(raw_config: RawConfig, root: type[S]) -> S:
    """Validate it as `root`, the section of the whole file. Raises ConfigError with every problem."""
    if not isinstance(raw_config.data, Mapping):
        raw_config.report_problem(
            (), f"expected sections ({', '.join(root.model_fields)}), not {_format_value(raw_config.data)}"
        )
        raw_config.raise_problems()
    data = _convert_to_json_data(raw_config.data, (), raw_config)
    if root is Config:
        data = _complete_model(data)
    try:
        config = root.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        _report_validation_errors(error, raw_config, root)
        raw_config.raise_problems()
        raise
    raw_config.raise_problems()
    return config


def _complete_model(data: Any) -> Any:  # noqa: ANN401 - not validated yet
    """Return the data with the model's name and the tokenizer that follow from `model.path`, where they are absent."""
    model = data.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    if not isinstance(path, str):
        return data
    tokenizer = {key: model[key] for key in ("path", "revision") if model.get(key) is not None}
    return {"tokenizer": tokenizer} | data | {"model": {"name": PurePath(path).name} | model}


def _convert_to_json_data(value: object, path: KeyPath, raw_config: RawConfig) -> object:
    """Convert data from any source to JSON data; report values that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {str(key): _convert_to_json_data(item, (*path, str(key)), raw_config) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_convert_to_json_data(item, (*path, index), raw_config) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raw_config.reported_keys.add(path)
        raw_config.report_problem(path, "expected a finite number", str(value))
    elif not isinstance(value, str | int | float | None):
        raw_config.reported_keys.add(path)
        raw_config.report_problem(
            path, f"expected text, a number, true, false or null, not {type(value).__name__}", str(value)
        )
        return None
    return value


def _format_value(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _report_validation_errors(error: ValidationError, raw_config: RawConfig, root: type[ConfigSection]) -> None:
    """Report one line per key: pydantic has one error per union branch, its location mixed with branch names."""
    seen = set(raw_config.reported_keys)
    for detail in error.errors(include_url=False):
        path, annotation, metadata = resolve_key(detail["loc"], root)
        if detail["type"] == "extra_forbidden":
            path = tuple(detail["loc"])
        if path in seen or _is_redundant_error(detail):
            continue
        seen.add(path)
        what = _format_error(detail, path, annotation, metadata, root)
        hidden = detail["type"] in {"missing", "json_invalid", SECRET_ERROR} or _is_section(detail["input"], annotation)
        raw_config.report_problem(path, what, None if hidden else _format_value(detail["input"]))


def _is_section(value: object, annotation: object) -> bool:
    """Return whether a value is a section, too large to show, rather than the value of a field."""
    return isinstance(value, dict | list) and get_origin(annotation) not in {tuple, dict}


def _is_redundant_error(detail: ErrorDetails) -> bool:
    """Return whether a list counts as too short only because its items were refused and reported."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _format_error(
    detail: ErrorDetails, path: KeyPath, annotation: object, metadata: Sequence[Any], root: type[ConfigSection]
) -> str:
    if detail["type"] == "extra_forbidden":
        return format_unknown_key(path, root)
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if detail["type"] == SECRET_ERROR:
        return detail["msg"]
    if detail["type"] == "json_invalid":
        return f"cannot be written as JSON: {detail['ctx']['error']}"
    expected = f"expected {format_type(annotation, metadata)}"
    if detail["type"] == "missing":
        return f"missing; {expected}"
    return expected + _format_hint(detail["input"], annotation)


def _format_hint(value: object, annotation: object) -> str:
    found = get_plain_types(annotation)
    if isinstance(value, str):
        quoted = _is_number(value) if found & {int, float} else bool in found and value in {"true", "false"}
        return "; remove the quotes" if quoted else ""
    if value is None and isinstance(annotation, type) and issubclass(annotation, ConfigSection):
        return "; write {} for one without keys"
    return "; put it in quotes" if found == {str} and isinstance(value, int | float) else ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def format_unknown_key(path: KeyPath, root: type[ConfigSection]) -> str:
    """Return the message for a key that its section does not have."""
    _, section, _ = resolve_key(path[:-1], root)
    section = get_inner_section(section)
    assert section is not None, "only sections forbid unknown keys"
    key, valid = str(path[-1]), list(section.model_fields)
    renamed = find_renamed_key(path)
    if renamed in valid:
        return f"unknown key; it is {format_key((*path[:-1], renamed))} now"
    near = [format_key((*path[:-1], name)) for name in difflib.get_close_matches(key, valid, n=1)]
    near = near or [
        f"{prefix}.{key}" for prefix, other in iter_sections("", root) if prefix and key in other.model_fields
    ]
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"unknown key{meant} (valid in {format_key(path[:-1]) or 'the file'}: {', '.join(valid)})"


def redact_config(config: Config) -> Config:
    """Return a configuration in which the addresses of documents are redacted. Others cannot have a query."""
    tasks = tuple(
        task.model_copy(update={"data": redact_uri(task.data)}) if task.data else task for task in config.eval.tasks
    )
    evaluation = config.eval.model_copy(update={"tasks": tasks})
    return config.model_copy(update={"data": redact_data(config.data), "eval": evaluation})


def redact_data(data: DataConfig) -> DataConfig:
    """Return sources with addresses without a query: a signed address is new each day, its documents stay the same."""
    changes: dict[str, Any] = {
        "sources": _redact_sources(data.sources),
        "eval": data.eval.model_copy(update={"sources": _redact_sources(data.eval.sources)}),
    }
    if data.decontamination is not None:
        benchmarks = tuple(map(redact_uri, data.decontamination.paths))
        changes["decontamination"] = data.decontamination.model_copy(update={"paths": benchmarks})
    return data.model_copy(update=changes)


def _redact_sources(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    return tuple(source.model_copy(update={"path": redact_uri(source.path)}) for source in sources)
