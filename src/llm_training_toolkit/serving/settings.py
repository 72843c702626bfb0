"""Settings of a server: the model, the key and the limits, with the checks of name, key and host."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from llm_training_toolkit.config.uri import is_uri

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
    """Seconds from the arrival of a request to its last token at most; the body must arrive within them, too."""


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


def get_default_name(model: str) -> str:
    """Return the name of the run or directory; of RUN/export that of the run."""
    path = PurePosixPath(model.rstrip("/")) if is_uri(model) else Path(model).expanduser().absolute()
    return path.parent.name if path.name == "export" and path.parent.name else path.name


def find_key_problem(key: str) -> str | None:
    """Return the reason why no header can carry a key; None if one can."""
    fits = key.isascii() and key.isprintable() and key == key.strip() and key
    return None if fits else "use printable ASCII characters without spaces at the ends"


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone: localhost, or an address such as 127.0.0.2 or ::1."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
