"""Distinction of URIs, such as `s3://bucket/file`, from paths. Pure."""

from __future__ import annotations

import re


def is_uri(path: str) -> bool:
    """Return whether a path is a URI."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None
