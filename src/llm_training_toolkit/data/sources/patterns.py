"""Globs and directory names: what counts as a pattern, what is never searched."""

from __future__ import annotations

import re

HIDDEN = "."
"""What a hidden name begins with."""
_MAGIC = re.compile(r"[*?\[]")
_NOT_THE_AUTHORS = frozenset({"node_modules", "__pycache__", "site-packages"})


def is_pattern(path: str) -> bool:
    """Whether a path has wildcards."""
    return _MAGIC.search(path) is not None


def split_pattern(pattern: str) -> tuple[str, str]:
    """The directory in front of the first wildcard, and the rest. `a/b/*.py` is `a/b` and `*.py`."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if is_pattern(part))
    return "/".join(parts[:fixed]) or ("/" if pattern.startswith("/") else "."), "/".join(parts[fixed:])


def is_wanted_directory(name: str) -> bool:
    """Whether a directory is searched: not a hidden one, installed packages or what Python compiled."""
    return not name.startswith(HIDDEN) and name not in _NOT_THE_AUTHORS
