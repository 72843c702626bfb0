"""Base of configuration sections: strictness, tags of fields, and types that several sections share."""

from __future__ import annotations

import enum
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from llm_training_toolkit.config.uri import has_userinfo, is_uri

SECRET_ERROR = "secret"  # noqa: S105 - type of pydantic's error whose value must not be shown


class FieldTag(enum.Enum):
    """Effect of changing a field after the run has started."""

    IDENTITY = "identity"
    """Part of the run's identity: a change is refused unless accepted by name (`--accept KEY`)."""
    HORIZON = "horizon"
    """Length of the run: changed with `--extend`."""
    FREE = "free"
    """Free to change at every start."""


def _convert_integral_float(value: object) -> object:
    """Convert `2e9` to 2000000000; pass everything else on to pydantic."""
    return int(value) if isinstance(value, float) and math.isfinite(value) and value.is_integer() else value


MAX_COUNT = 10**15  # Maximum length, batch size or number of threads: beyond any cluster, and safe in 64 bits.


Count = Annotated[int, BeforeValidator(_convert_integral_float), Field(ge=1, le=MAX_COUNT)]


Share = Annotated[float, Field(ge=0.0, le=1.0)]


Revision = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
"""Branch, tag or commit of a repository on the hub."""


_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")


_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration_seconds(text: str) -> float | None:
    """Return the seconds of a duration such as `90s`, `10m` or `1.5h`, or None if the text is something else."""
    match = _DURATION.fullmatch(text)
    return float(match[1]) * _SECONDS[match[2]] if match else None


def _check_interval(value: object) -> object:
    if isinstance(value, str) and not parse_duration_seconds(value):
        raise ValueError("write a number of steps (200) or a duration above zero (90s, 10m, 1.5h)")
    return value


Interval = Annotated[Annotated[int, Field(ge=1)] | str, BeforeValidator(_check_interval)]


def _check_duration(value: object) -> object:
    if not isinstance(value, str) or not parse_duration_seconds(value):
        raise ValueError("write a duration above zero (90s, 10m, 1.5h)")
    return value


Duration = Annotated[str, BeforeValidator(_check_duration)]


def _check_worker_range(value: object) -> object:
    """Accept one number, or a minimum and a maximum; refuse true and 1.0."""
    ends = tuple(value) if isinstance(value, list | tuple) else (value,)
    numbers = [end for end in ends if isinstance(end, int) and not isinstance(end, bool)]
    pair = isinstance(value, list | tuple)
    right = len(numbers) == len(ends) == 1 + pair and min(numbers) >= pair and numbers == sorted(numbers)
    if not right:
        raise ValueError("write a number of workers (4), or the fewest (at least 1) and the most of them ([1, 8])")
    return ends if pair else value


def _check_no_userinfo(value: str) -> str:
    if has_userinfo(value):
        raise PydanticCustomError(
            SECRET_ERROR,
            "the address holds a user, key or token, which the run directory and logs would repeat: give keys by "
            "environment variables (docs/data.md, Addresses)",
        )
    return value


def _check_home_directory(value: str) -> str:
    """Refuse `~name` of a user that does not exist here, which Python meets with a RuntimeError."""
    try:
        Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{value.partition('/')[0]} is no home directory of this machine: give the path") from error
    return value


def _check_no_query(value: str) -> str:
    if is_uri(value) and not {"?", "#"}.isdisjoint(value):  # no wildcards are meant here
        raise PydanticCustomError(
            SECRET_ERROR,
            "the address has a query or fragment, which may be a key, and the run directory and logs would repeat it: "
            "give keys by environment variables (docs/data.md, Addresses)",
        )
    return value


Location = Annotated[
    str, AfterValidator(_check_no_userinfo), AfterValidator(_check_home_directory)
]  # path, URI or hub id; of a URI with a query `redact_config` keeps the rest
PlainLocation = Annotated[Location, AfterValidator(_check_no_query)]  # stored and shown as it is


Workers = Annotated[int | tuple[int, int], BeforeValidator(_check_worker_range)]


class ConfigSection(BaseModel):
    """Section of the configuration: strict and frozen, unknown keys are errors."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


def check_whole_number(value: object) -> object:
    """Refuse true and 1.0, which a Literal of integers would accept as 1."""
    if isinstance(value, bool | float):
        raise ValueError("write a whole number")
    return value


def parse_timestamp(text: str) -> int:
    """Return the seconds since 1970 of an ISO 8601 date or time, in UTC unless it names another zone.

    Raises ValueError for any other text.
    """
    found = datetime.fromisoformat(text)
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())


def check_timestamp(text: str) -> str:
    """Return the text. Raises ValueError, saying what is expected, if it is no date or time."""
    try:
        parse_timestamp(text)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{text!r} is no date: write 2026-01-31 or 2026-01-31T12:00:00+00:00") from error
    return text
