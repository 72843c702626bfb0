"""Strict reader of the hardware description in a cluster file of any kind.

Its location depends on the system that the file is for:

    Ray cluster launcher   metadata.hardware (`metadata` is the only free key of its schema)
    Kubernetes             metadata.annotations["llm-training-toolkit/hardware"], YAML in a string
    Slurm shell script     comment that starts with `# hardware:`, YAML after the `#`
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from llm_training_toolkit.config.section import ConfigSection
from llm_training_toolkit.config.yaml_reader import check_yaml_limits, format_yaml_error
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.plan.forecast.hardware import ClusterHardware

ANNOTATION = "llm-training-toolkit/hardware"
_COMMENT = "# hardware:"


def read_hardware(path: Path) -> ClusterHardware:
    """Read the hardware that a cluster file describes. Raises ConfigError with every problem of the description."""
    found = list(_find_descriptions(path, _read_text(path)))
    if len(found) != 1:
        number = "no description" if not found else f"{len(found)} descriptions"
        raise ConfigError(
            f"{path}: {number} of the hardware, one is needed: under metadata.hardware of a Ray cluster file, as "
            f"annotation {ANNOTATION} of a Kubernetes resource, or as a comment `{_COMMENT}` of a shell script"
        )
    try:
        return ClusterHardware.model_validate(found[0], strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_format_validation_errors(path, error))) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from error


def _find_descriptions(path: Path, text: str) -> Iterator[Any]:
    """Yield every description in a file as plain data."""
    if path.suffix not in {".yaml", ".yml"}:
        yield from (
            parsed["hardware"] for block in _find_hardware_comments(text) for parsed in _parse_yaml(path, block)
        )
        return
    for document in _parse_yaml(path, text):
        metadata = document.get("metadata") if isinstance(document, Mapping) else None
        if not isinstance(metadata, Mapping):
            continue
        if "hardware" in metadata:
            yield metadata["hardware"]
        annotations = metadata.get("annotations")
        if isinstance(annotations, Mapping) and ANNOTATION in annotations:
            yield from _parse_yaml(f"{path}: annotation {ANNOTATION}", str(annotations[ANNOTATION]))


def _find_hardware_comments(text: str) -> Iterator[str]:
    """Yield the YAML of each comment that starts with `# hardware:`, up to the first line outside the comment."""
    lines = text.splitlines()
    for start, line in enumerate(lines):
        if line.rstrip() == _COMMENT:
            end = next((n for n in range(start, len(lines)) if not lines[n].startswith("# ")), len(lines))
            yield "\n".join(comment[2:] for comment in lines[start:end])


def _parse_yaml(where: Path | str, text: str) -> list[Any]:
    """Return the documents of a YAML text."""
    try:
        check_yaml_limits(text)
        return list(YAML(typ="safe", pure=True).load_all(text))
    except YAMLError as error:
        line, what = format_yaml_error(error)
        raise ConfigError(f"{where}{line}: not valid YAML: {what}") from error


def _format_validation_errors(path: Path, error: ValidationError) -> Iterator[str]:
    """Yield one line per problem: key, problem, value."""
    for detail in error.errors(include_url=False):
        key = ".".join(["hardware", *map(str, detail["loc"])])
        yield f"{path}: {key}{_format_error_detail(detail)}"


def _format_error_detail(detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return ": missing"
    if detail["type"] == "value_error":
        return f": {detail['ctx']['error']}"
    if detail["type"] == "extra_forbidden":
        return f": unknown key{_suggest_key(detail)}"
    shown = str(detail["input"])
    return f" = {shown if len(shown) <= 80 else shown[:77] + '...'}: {detail['msg']}"


def _suggest_key(detail: ErrorDetails) -> str:
    """Return the valid key nearest to an unknown one."""
    section: type[ConfigSection] = ClusterHardware
    for name in detail["loc"][:-1]:
        annotation = section.model_fields[str(name)].annotation
        assert isinstance(annotation, type)  # only sections forbid unknown keys
        assert issubclass(annotation, ConfigSection)
        section = annotation
    near = difflib.get_close_matches(str(detail["loc"][-1]), section.model_fields, n=1)
    return f"; did you mean {near[0]}?" if near else f" (valid: {', '.join(section.model_fields)})"
