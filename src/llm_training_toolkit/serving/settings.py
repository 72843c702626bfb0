"""Settings of a server: the model, the key and the limits."""

from __future__ import annotations

from dataclasses import dataclass, field

KEY_VARIABLE = "LTT_SERVE_KEY"


@dataclass(frozen=True)
class ServingLimits:
    """Bounds of a request and of the queue."""

    max_tokens: int = 1024
    """New tokens of a request at most, and of a chat that asks for no number."""
    max_queued: int = 64
    """Requests that wait at most; further ones get status 429."""
    batch_size: int = 8
    """Requests that are generated together at most."""
    timeout: float = 300.0
    """Seconds from the arrival of a request to its last token at most."""


@dataclass(frozen=True)
class ServingSettings:
    """Input of a server process.

    model: path or URI, as for `ltt generate`. step: of a run's checkpoint, None = its export or the newest one. name:
    of the model in requests. key: that requests carry, None = no key.
    """

    model: str
    name: str
    step: int | None = None
    device: str = "auto"
    key: str | None = None
    limits: ServingLimits = field(default_factory=ServingLimits)
