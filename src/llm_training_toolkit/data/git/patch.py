"""Patches as git prints them: the changes of one commit, file by file, with bounded memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

_SECTION_START = b"diff --git "
_NO_NEWLINE = b"\\"
_HASHES = b"index "  # of objects: nothing that a model could predict
_NO_TEXT = (b"Binary files ", b"GIT binary patch")
_ESCAPES = {"a": 7, "b": 8, "t": 9, "n": 10, "v": 11, "f": 12, "r": 13, '"': 34, "\\": 92}
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)")


class PatchLine(str):
    """Line of a hunk as in a patch: its kind (unchanged, removed or added), then its text with its line end.

    A string rather than a pair, because a file may have millions of lines.
    """

    __slots__ = ()

    @property
    def kind(self) -> str:
        """A blank, `-` or `+`."""
        return self[0]

    @property
    def text(self) -> str:
        """Text with its line end."""
        return self[1:]


class Hunk(NamedTuple):
    """Changed lines with the lines around them, behind a header `@@ -1,3 +1,4 @@`."""

    header: str
    lines: tuple[PatchLine, ...]

    def join_side(self, side: Literal["-", "+"]) -> str:
        """Return the text before (`-`) or after (`+`) the change."""
        return "".join(line.text for line in self.lines if line.kind in {" ", side})


@dataclass(frozen=True)
class FileChange:
    """Change of one file. `header`: the lines before the first hunk, without hashes. A path is empty on the side on
    which there is no such file.
    """

    header: tuple[str, ...]
    old_path: str
    new_path: str
    hunks: tuple[Hunk, ...]

    @property
    def path(self) -> str:
        """Path after the change, or before it for a deleted file."""
        return self.new_path or self.old_path

    def format_diff(self) -> str:
        """Format the change as a unified diff that `git apply` takes."""
        body = (format_hunk(hunk) for hunk in self.hunks)
        return "".join([*(f"{line}\n" for line in self.header), *body])


def format_hunk(hunk: Hunk) -> str:
    """Format a hunk of a unified diff."""
    return f"{hunk.header}\n" + "".join(map(_format_line, hunk.lines))


def _format_line(line: PatchLine) -> str:
    return line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


class UnusableChange(NamedTuple):
    """Change of a file that is no document, and the reason: `binary`, `too_large` or `not_utf8`."""

    reason: str


@dataclass
class _Section:
    """Lines of a file's section while they are read; `size` counts their bytes, also of those that are not kept."""

    header: list[bytes] = field(default_factory=list)
    hunks: list[tuple[bytes, list[bytes]]] = field(default_factory=list)
    size: int = 0
    is_binary: bool = False


def parse_patch(lines: Iterable[bytes], max_bytes: int) -> Iterator[FileChange | UnusableChange]:
    """Yield the files of a commit's patch in git's order. Of a section above `max_bytes` nothing is kept.

    A line of more than `max_bytes` may come in pieces, of which the last alone ends with a line end.
    """
    section: _Section | None = None
    begins_line = True
    for line in lines:
        if begins_line and line.startswith(_SECTION_START):
            if section is not None:
                yield _build_change(section, max_bytes)
            section = _Section()
        begins_line = line.endswith(b"\n")
        if section is not None:
            _add_line(section, line, max_bytes)
    if section is not None:
        yield _build_change(section, max_bytes)


def _add_line(section: _Section, line: bytes, max_bytes: int) -> None:
    section.size += len(line)
    if section.size > max_bytes:
        section.hunks.clear()
    elif line.startswith(b"@@ "):
        section.hunks.append((line, []))
    elif not section.hunks:
        section.is_binary |= line.startswith(_NO_TEXT)
        section.header.append(line)
    elif line.startswith(_NO_NEWLINE):
        section.hunks[-1][1][-1] = section.hunks[-1][1][-1].removesuffix(b"\n")
    else:
        section.hunks[-1][1].append(line)


def _build_change(section: _Section, max_bytes: int) -> FileChange | UnusableChange:
    if section.size > max_bytes:
        return UnusableChange("too_large")
    if section.is_binary:
        return UnusableChange("binary")
    try:
        hunks = tuple(
            Hunk(header.decode().rstrip("\n"), tuple(PatchLine(line.decode()) for line in lines))
            for header, lines in section.hunks
        )
        header = tuple(line.decode().rstrip("\n") for line in section.header if not line.startswith(_HASHES))
    except UnicodeDecodeError:
        return UnusableChange("not_utf8")
    return FileChange(header, _find_path(section, b"---"), _find_path(section, b"+++"), hunks)


def _find_path(section: _Section, mark: bytes) -> str:
    """Return the path behind `--- a/` or `+++ b/`, empty for /dev/null and for a change without content."""
    line = next((each for each in section.header if each.startswith(mark + b" ")), b"")
    name = line[4:].rstrip(b"\n").rstrip(b"\t")  # a tab ends a name with blanks
    if name.startswith(b'"'):
        name = _ESCAPE.sub(lambda match: bytes([_read_escape(match[1].decode())]), name[1:-1])
    return "" if name in {b"/dev/null", b""} else name[2:].decode(errors="backslashreplace")


def _read_escape(text: str) -> int:
    return int(text, 8) if len(text) == 3 else _ESCAPES.get(text, ord(text))
