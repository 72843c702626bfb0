"""Bodies of requests: parsed strictly, so that no field that asks for something is silently ignored."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from llm_training_toolkit.models.sampling import SamplingParams
from llm_training_toolkit.serving.api_error import ApiError

_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
_MAX_STOPS = 4  # as in OpenAI's API
# Fields with only one supported value, mostly the API's default; null stands for the default.
_FIXED_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
}
_LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")  # say who asks, and change no answer


def _check_text(value: str) -> str:
    """Return the text. Raises ValueError for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    value.encode()
    return value


Text = Annotated[str, AfterValidator(_check_text)]
StopText = Annotated[Text, Field(min_length=1)]


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class GenerationBody(BaseModel):
    """Fields that both endpoints share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopText | Annotated[list[StopText], Field(max_length=_MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stream_options")
    @classmethod
    def _check_stream_options(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only for a stream: add `stream: true`, or leave it out")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Return whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def asked_tokens(self) -> int | None:
        """New tokens at most; None = up to the server's limit and the end of the context."""
        return self.max_tokens

    def build_sampling_params(self, new_tokens: int) -> SamplingParams:
        """Return the sampling of an answer of `new_tokens`, with the API's defaults: temperature 1, a random seed."""
        return SamplingParams(
            new_tokens,
            1.0 if self.temperature is None else self.temperature,
            secrets.randbits(63) if self.seed is None else self.seed,
            1.0 if self.top_p is None else self.top_p,
        )


class CompletionBody(GenerationBody):
    """Body of /v1/completions; with `suffix` the model fills the gap between prompt and suffix."""

    prompt: Text
    suffix: Text | None = None

    @property
    def asked_tokens(self) -> int:
        """New tokens at most."""
        return _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class ChatBody(GenerationBody):
    """Body of /v1/chat/completions. Messages and tools are parsed as conversations of training are."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("max_completion_tokens")
    @classmethod
    def _check_one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("max_tokens") is not None:
            raise ValueError("max_tokens is the same limit by its older name: leave one out")
        return value

    @property
    def asked_tokens(self) -> int | None:
        """New tokens at most; `max_completion_tokens` is OpenAI's newer name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Body = TypeVar("Body", bound=GenerationBody)


def parse_body(content: bytes, kind: type[Body]) -> Body:
    """Return the body of a request. Raises ApiError 400 with the first wrong field."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ApiError(400, "invalid_json", f"the body is a JSON {type(values).__name__}, and should be an object")
    given = {key: value for key, value in values.items() if key not in _LABELS and not _is_fixed(key, value)}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _build_field_error(error) from error


def _is_fixed(key: str, value: Any) -> bool:  # noqa: ANN401 - whatever the body holds
    """Return whether a field has its only supported value. Raises ApiError for another value."""
    if key not in _FIXED_FIELDS:
        return False
    # Python's True equals 1.
    fits = any(isinstance(value, bool) == isinstance(only, bool) and value == only for only in _FIXED_FIELDS[key])
    if value is not None and not fits:
        only = json.dumps(_FIXED_FIELDS[key][0])
        raise ApiError(400, "unsupported_value", f"{key}: this server supports only {only}; leave it out", key)
    return True


def _build_field_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    name = ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("constrained", "list[", "function"))
    )
    if first["type"] == "extra_forbidden":
        return ApiError(400, "unknown_parameter", f"{name}: this server does not know the field; leave it out", name)
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, code, f"{name}: {first['msg'].removeprefix('Value error, ')}", name)
