"""Check of object keys and file names from a store or a manifest, before they become paths. Pure.

Whoever may write into a bucket chooses its keys. Joined to a directory unchecked, a key would name any file of this
machine.
"""

from __future__ import annotations

_MAX_PART_BYTES = 255  # longest file name of Linux's file systems


def find_key_problem(key: str) -> str | None:
    """Return why a key is no path below a directory, or None if it is one.

    Refused: absolute keys, empty parts, `.` and `..`, control characters, and parts longer than a file name.
    """
    parts = key.split("/")
    if any(ord(character) < 32 or character == "\x7f" for character in key):
        return "it has a control character"
    if not all(parts):
        return "it begins or ends with a slash, or has two in a row"
    if not {".", ".."}.isdisjoint(parts):
        return "it has a part that leads elsewhere ('.' or '..')"
    if any(len(part.encode(errors="surrogatepass")) > _MAX_PART_BYTES for part in parts):
        return f"it has a part of more than {_MAX_PART_BYTES} bytes"
    return None


def is_directory_marker(key: str) -> bool:
    """Return whether a key is the empty object with which consoles of stores show a directory."""
    return key.endswith("/") and find_key_problem(key.removesuffix("/")) is None


def find_name_problem(name: str) -> str | None:
    """Return why a name is no file name within one directory, or None if it is one."""
    return "it has a slash" if "/" in name else find_key_problem(name)
