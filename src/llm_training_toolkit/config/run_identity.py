"""Say whether two configurations are the same run, by the tags of the schema."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.fields import FieldInfo

from llm_training_toolkit.config.schema import Config, Section, Tag
from llm_training_toolkit.errors import ConfigError


@dataclass(frozen=True)
class Change:
    """One field that differs; None where it was, or is, absent."""

    key: str
    tag: Tag
    old: Any
    new: Any


def tag_of(info: FieldInfo) -> Tag | None:
    """The tag of a field; None for a field that holds sections, whose own fields are tagged."""
    return next((item for item in info.metadata if isinstance(item, Tag)), None)


def flatten(config: Config) -> dict[str, tuple[Tag, Any]]:
    """Every field by its dotted key, such as `data.sources.0.path`, with its tag."""
    return {key: (tag, value) for key, tag, value in _leaves(config, "")}


def _leaves(held: Section, prefix: str) -> Iterator[tuple[str, Tag, Any]]:
    for name, info in type(held).model_fields.items():
        key, tag, value = f"{prefix}{name}", tag_of(info), getattr(held, name)
        if tag is not None:
            yield key, tag, value
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                yield from _leaves(item, f"{key}.{index}.")
        elif value is not None:
            yield from _leaves(value, f"{key}.")


def changes(old: Config, new: Config) -> list[Change]:
    """Every field that differs; those that only the new configuration has come last."""
    before, after = flatten(old), flatten(new)
    found = [
        Change(key, tag, before.get(key, (tag, None))[1], after.get(key, (tag, None))[1])
        for key, (tag, _) in (before | after).items()
    ]
    return [change for change in found if _canonical(change.old) != _canonical(change.new)]


def fingerprint(config: Config) -> str:
    """SHA-256 of the identity fields: equal exactly where no identity field differs."""
    # An absent field counts like one that is null: a field added to the schema later leaves old runs what they are.
    identity = {
        key: value for key, (tag, value) in flatten(config).items() if tag is Tag.IDENTITY and value is not None
    }
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()


def _canonical(value: object) -> str:
    # Not ==, to which 1 and 1.0 are the same: a warm-up of 1 is a step, one of 1.0 the whole run.
    return json.dumps(value, sort_keys=True)


def refuse_changed_identity(
    old: Config, new: Config, *, accept: Sequence[str] = (), extend: bool = False
) -> list[Change]:
    """Let a begun run go on with another configuration, or say what stands against it.

    Returns the identity and horizon changes that were accepted; free fields may change unasked.
    """
    differing = [change for change in changes(old, new) if change.tag is not Tag.FREE]
    identity = [change for change in differing if change.tag is Tag.IDENTITY]
    lines = [_refused(change) for change in differing if not _is_accepted(change, accept, extend=extend)]
    lines += [_useless(key) for key in accept if not any(_covers(key, change.key) for change in identity)]
    if lines:
        raise ConfigError("the run has begun with another configuration:\n" + "\n".join(f"  {line}" for line in lines))
    return differing


def _is_accepted(change: Change, accept: Sequence[str], *, extend: bool) -> bool:
    return extend if change.tag is Tag.HORIZON else any(_covers(key, change.key) for key in accept)


def _covers(accepted: str, key: str) -> bool:
    return key == accepted or key.startswith(f"{accepted}.")


def _refused(change: Change) -> str:
    difference = f"{change.key}: {json.dumps(change.old)} -> {json.dumps(change.new)}"
    if change.tag is Tag.HORIZON:
        return f"{difference}; --extend takes the new length: the schedule stretches to it from here on"
    return f"{difference}; change it back, take another run.name, or --accept {change.key}"


def _useless(key: str) -> str:
    return f"--accept {key}: no changed identity field has this key; remove it or check its spelling"
