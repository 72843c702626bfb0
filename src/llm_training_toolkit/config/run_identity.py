"""Comparison of two configurations by field tag: are they the same run?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from llm_training_toolkit.config.load import redact_config
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.section import ConfigSection, FieldTag
from llm_training_toolkit.errors import ConfigError


@dataclass(frozen=True)
class ConfigChange:
    """Changed field. `old` or `new` is None if the field did not exist there."""

    key: str
    tag: FieldTag
    old: Any
    new: Any


def get_field_tag(info: FieldInfo) -> FieldTag | None:
    """Return the tag of a field, or None for a field that holds sections, which have tagged fields of their own."""
    return next((item for item in info.metadata if isinstance(item, FieldTag)), None)


def flatten_config(config: Config) -> dict[str, tuple[FieldTag, Any]]:
    """Return every field by dotted key, such as `data.sources.0.path`, with its tag."""
    return {key: (tag, value) for key, tag, value in _iter_leaf_fields(config, "")}


def _iter_leaf_fields(held: ConfigSection, prefix: str) -> Iterator[tuple[str, FieldTag, Any]]:
    for name, info in type(held).model_fields.items():
        key, tag, value = f"{prefix}{name}", get_field_tag(info), getattr(held, name)
        if tag is not None:
            yield key, tag, value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                yield from _iter_leaf_fields(item, f"{key}.{index}.")
        elif value is not None:
            yield from _iter_leaf_fields(value, f"{key}.")


def diff_configs(old: Config, new: Config) -> list[ConfigChange]:
    """Return every changed field; fields that exist only in the new configuration come last."""
    old_values, new_values = flatten_config(redact_config(old)), flatten_config(redact_config(new))
    found = [
        ConfigChange(key, tag, old_values.get(key, (tag, None))[1], new_values.get(key, (tag, None))[1])
        for key, (tag, _) in (old_values | new_values).items()
    ]
    return [
        change
        for change in found
        if _to_canonical_json(_normalize(change.key, change.old))
        != _to_canonical_json(_normalize(change.key, change.new))
    ]


def normalize_model_name(name: str) -> str:
    """Return the name of a size without its organization, in lower case: `Qwen/Qwen3-0.6B` is `qwen3-0.6b`."""
    return name.rstrip("/").rsplit("/", maxsplit=1)[-1].lower()


def _normalize(key: str, value: Any) -> Any:  # noqa: ANN401 - value of any field
    return normalize_model_name(value) if key == "model.name" and isinstance(value, str) else value


def fingerprint(config: Config) -> str:
    """Return the SHA-256 of the identity fields: equal if and only if no identity field differs."""
    # Null counts as absent, so that a field added to the schema later does not change the fingerprint of old runs.
    identity = {
        key: _normalize(key, value)
        for key, (tag, value) in flatten_config(redact_config(config)).items()
        if tag is FieldTag.IDENTITY and value is not None
    }
    return hashlib.sha256(_to_canonical_json(identity).encode()).hexdigest()


def _to_canonical_json(value: object) -> str:
    # JSON instead of ==, where 1 equals 1.0: a warm-up of 1 is one step, 1.0 is the whole run.
    return json.dumps(value, sort_keys=True)


def check_config_changes(
    old: Config, new: Config, *, accept: Sequence[str] = (), extend: bool = False
) -> list[ConfigChange]:
    """Check that a started run may continue with another configuration.

    Returns the accepted identity and horizon changes; free fields may always change. Raises ConfigError for every
    refused change, and for every `accept` key without a changed identity field.
    """
    differing = [change for change in diff_configs(old, new) if change.tag is not FieldTag.FREE]
    identity = [change for change in differing if change.tag is FieldTag.IDENTITY]
    lines = [_format_refused_change(change) for change in differing if not _is_accepted(change, accept, extend=extend)]
    lines += [
        _format_unused_accept(key) for key in accept if not any(_covers_key(key, change.key) for change in identity)
    ]
    if lines:
        raise ConfigError("the run has begun with another configuration:\n" + "\n".join(f"  {line}" for line in lines))
    return differing


def _is_accepted(change: ConfigChange, accept: Sequence[str], *, extend: bool) -> bool:
    return extend if change.tag is FieldTag.HORIZON else any(_covers_key(key, change.key) for key in accept)


def _covers_key(accepted: str, key: str) -> bool:
    return key == accepted or key.startswith(f"{accepted}.")


def _format_refused_change(change: ConfigChange) -> str:
    difference = f"{change.key}: {json.dumps(change.old)} -> {json.dumps(change.new)}"
    if change.tag is FieldTag.HORIZON:
        return f"{difference}; --extend takes the new length: the schedule stretches to it from here on"
    return f"{difference}; change it back, take another run.name, or --accept {change.key}"


def _format_unused_accept(key: str) -> str:
    return f"--accept {key}: no changed identity field has this key; remove it or check its spelling"
