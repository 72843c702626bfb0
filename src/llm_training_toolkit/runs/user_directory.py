"""Directories of this user in the machine's temporary directory, which every user may write to."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from llm_training_toolkit.errors import LaunchError

_GROUP_OTHER_WRITE = 0o022  # write permission of group and others


def create_user_directory(name: str, max_length: int | None = None) -> Path:
    """Create `NAME-UID` in the temporary directory, or in /tmp if its path would exceed `max_length`, and return it.

    Raises LaunchError if it belongs to another user, is a link, or is writable by others: whoever owns a directory can
    exchange what lies in it.
    """
    path = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    if max_length is not None and len(str(path)) > max_length:
        path = Path("/tmp") / path.name  # noqa: S108 - checked below
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise LaunchError(f"{path}: no directory can be made there ({error.strerror}): set TMPDIR elsewhere") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & _GROUP_OTHER_WRITE:
        raise LaunchError(
            f"{path}: belongs to user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}: others could exchange its "
            "content. Remove it, or set TMPDIR to a directory of your own"
        )
    return path
