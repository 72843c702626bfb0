"""Commits of a repository in a fixed order, read through the program git in a stream."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple, Self

from llm_training_toolkit.config.section import parse_timestamp
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.git.patch import FileChange, UnusableChange, parse_patch
from llm_training_toolkit.errors import DataError
from llm_training_toolkit.plan.checks.git_check import (
    build_git_command,
    build_git_environment,
    init_shadow_repository,
    read_head_commit,
    resolve_object_directory,
)

_WHOLE_FILE = 1_000_000_000  # lines of context, more than any file has
_DIFF_CONTEXT = 3
_END = b"end of commit\n"  # no line of a patch begins with an e
_PATCH_OPTIONS = (
    *("--stdin", "--root", "-r", "-p", "--no-commit-id"),
    *("--no-ext-diff", "--no-textconv", "--no-color", "--ignore-submodules=all"),
    # Fixed here, because defaults differ between versions of git and by configuration.
    *("--diff-algorithm=myers", "--indent-heuristic", "--find-renames=50%", "-l1000", "--no-relative"),
    *("--src-prefix=a/", "--dst-prefix=b/", "--inter-hunk-context=0"),
)


class Commit(NamedTuple):
    """Commit with its message; its files are read from git one by one, and only once."""

    id: str
    message: str
    changes: Iterator[FileChange | UnusableChange]


class HistoryReader:
    """Reads the commits of one source, oldest first, parents before children, merges left out.

    The current commit alone decides what it reads: git runs in an empty repository that borrows the objects, because
    attributes and configuration of a clone change its patches. Holds one file at a time, of at most
    `max_document_bytes`. With a date it also holds some 130 bytes per commit.
    """

    def __init__(self, repository: Path, source: SourceConfig, dropped: Counter[str], *, whole_files: bool) -> None:
        """Prepare to read; merges are counted in `dropped` as they are passed, since a reader may stop early."""
        self._repository, self._max_bytes = repository, source.max_document_bytes
        self._before = None if source.before is None else parse_timestamp(source.before)
        self._after = None if source.after is None else parse_timestamp(source.after)
        self._dropped = dropped
        self._stack = contextlib.ExitStack()
        self._context = _WHOLE_FILE if whole_files else _DIFF_CONTEXT

    def __enter__(self) -> Self:
        shadow = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ltt-")))
        init_shadow_repository(shadow, self._repository)
        self._shadow, self._head = shadow, read_head_commit(self._repository)
        objects = str(resolve_object_directory(self._repository))
        self._environment = {**build_git_environment(shadow), "GIT_OBJECT_DIRECTORY": objects}
        # A larger file counts as binary, so that git itself does not hold it either.
        limit = ("-c", f"core.bigFileThreshold={self._max_bytes}")
        self._patches = self._start(*limit, "diff-tree", *_PATCH_OPTIONS, f"--unified={self._context}")
        self._objects = self._start("cat-file", "--batch")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read_commits(self, begin: str = "") -> Iterator[Commit]:
        """Yield the commits from the one with the id `begin` on. Raises DataError if git fails."""
        reached = not begin
        for commit in self._iter_commit_ids():
            reached = reached or commit == begin
            if reached:
                message = self._read_message(commit)
                changes = parse_patch(self._iter_patch_lines(commit), self._max_bytes)
                yield Commit(commit, message, changes)
                deque(changes, maxlen=0)  # what was not read stands before the next commit

    def _iter_commit_ids(self) -> Iterator[str]:
        """Yield the ids of the commits on the source's side of its dates.

        A commit counts from the date of its newest ancestor on. Otherwise one with a wrong clock, or an old one that
        was rebased, would be trained on although its files hold what came later.
        """
        dated = self._before is not None or self._after is not None
        process = self._start("rev-list", "--topo-order", "--reverse", "--parents", "--timestamp", self._head)
        assert process.stdout is not None
        newest: dict[bytes, int] = {}
        for line in process.stdout:
            stamp, commit, *parents = line.split()
            if dated:
                date = max([int(stamp), *(newest[bytes.fromhex(parent.decode())] for parent in parents)])
                newest[bytes.fromhex(commit.decode())] = date
                if not self._is_in_period(date):
                    continue
            if len(parents) > 1:
                self._dropped["merge"] += 1
                continue
            yield commit.decode()
        if process.wait() != 0:
            raise self._build_error("rev-list")

    def _is_in_period(self, date: int) -> bool:
        return (self._before is None or date < self._before) and (self._after is None or date >= self._after)

    def _read_message(self, commit: str) -> str:
        """Return the message as git stores it, decoded."""
        output = _send(self._objects, f"{commit}\n".encode())
        heading = output.readline().split()
        if len(heading) != 3:
            raise self._build_error("cat-file")
        content = output.read(int(heading[2]))
        output.read(1)
        head, _, message = content.partition(b"\n\n")
        named = next((line[9:] for line in head.split(b"\n") if line.startswith(b"encoding ")), b"utf-8")
        return _decode_message(message, named)

    def _iter_patch_lines(self, commit: str) -> Iterator[bytes]:
        """Yield the lines of a commit's patch. git repeats a line that is no commit, which marks the end."""
        output = _send(self._patches, f"{commit}\n".encode() + _END)
        piece_bytes = max(self._max_bytes + 2, len(_END))
        begins_line = True  # a longer line comes in pieces, and a piece is no mark
        while (line := output.readline(piece_bytes)) != _END or not begins_line:
            if not line:
                raise self._build_error("diff-tree")
            begins_line = line.endswith(b"\n")
            yield line

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            build_git_command(self._shadow, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self._environment,
        )
        self._stack.callback(_stop, process)
        return process

    def _build_error(self, command: str) -> DataError:
        return DataError(
            f"{self._repository}: git {command} ended early, so the history cannot be read. Check the repository with "
            "`git fsck`, and let nothing write into it."
        )


def _decode_message(message: bytes, encoding: bytes) -> str:
    """Return a message in the encoding that its commit names, or in UTF-8 if Python has no text in that one."""
    try:
        text = message.decode(encoding.decode(), errors="replace")
        text.encode()  # utf-7, among others, gives surrogates, which no tokenizer takes
    except (LookupError, ValueError):  # unknown, such as `none`, or of no text, such as `undefined` and `idna`
        return message.decode(errors="replace")
    return text


def _send(process: subprocess.Popen[bytes], request: bytes) -> IO[bytes]:
    """Send a request to a process that answers one at a time, and return its output."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # its output then ends, which the caller reports
        process.stdin.write(request)
        process.stdin.flush()
    return process.stdout


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
    process.wait()
