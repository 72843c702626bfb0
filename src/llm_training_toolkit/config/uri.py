"""What is an address, such as `s3://bucket/file`, and no path. Pure."""

from __future__ import annotations

import re


def is_uri(path: str) -> bool:
    """Whether a path is an address."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None
