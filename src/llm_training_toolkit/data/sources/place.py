"""Where a file of a source lies: on a local disk or at an address, and in which repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Root:
    """What the files of a source have in common.

    path: of the directory they are below, within its file system. filesystem: pyarrow's, None for a local disk.
    scheme: what an address begins with, such as `s3://`. repository: the directory's name; empty for a lone file,
    which says of no repository.
    """

    path: str
    repository: str = ""
    filesystem: Any = None
    scheme: str = ""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source. It holds little, because a source may have millions.

    relative: its path below the root, with slashes. checkout: the directory below the root whose repository it belongs
    to, empty for the root itself. stamp: size and mark of the version of a remote file.
    """

    root: Root
    relative: str
    checkout: str = ""
    stamp: str = ""

    @property
    def name(self) -> str:
        """`relative` as text, even where the file system holds bytes that are none."""
        return _printable(self.relative)

    @property
    def repository(self) -> str:
        """Name of the repository: the directory's name, or the path of a checkout below it."""
        if self.checkout == self.root.repository:  # a checkout `a` in a directory `a` is another repository than it
            return _printable(f"{self.checkout}/{self.checkout}" if self.checkout else "")
        return _printable(self.checkout or self.root.repository)

    @property
    def path(self) -> str:
        """Its path within the repository."""
        return _printable(self.relative[len(self.checkout) + 1 :] if self.checkout else self.relative)

    @property
    def location(self) -> str:
        """Its path within the file system."""
        return f"{self.root.path.rstrip('/')}/{self.relative}" if self.root.path else self.relative

    @property
    def address(self) -> str:
        """Where a person finds it: a path, or an address."""
        if self.root.filesystem is None:
            return _printable(str(Path(self.root.path, self.relative)))
        return self.root.scheme + self.location

    @property
    def version(self) -> str:
        """Size and modification time, or what the store has instead of it. Raises OSError for a local file gone."""
        if self.root.filesystem is not None:
            return self.stamp
        status = Path(self.location).stat()
        return f"{status.st_size}\0{status.st_mtime_ns}"


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()
