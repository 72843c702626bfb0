"""Checksums are read again only if a file was touched."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_training_toolkit.checkpoint import checksum_cache
from llm_training_toolkit.checkpoint.checksum_cache import read_sha256
from llm_training_toolkit.checkpoint.manifest import compute_sha256

SIZE = 1 << 20
LONG_AGO = 1_700_000_000


def write(file: Path, content: bytes, written: float = LONG_AGO) -> Path:
    file.write_bytes(content)
    os.utime(file, (written, written))
    return file


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def bytes_read(file: Path, cache: Path) -> tuple[str, int]:
    """The checksum, and how much this process read for it."""

    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count()
    found = read_sha256(file, cache)
    return found, count() - before


class Clock:
    """The clock of the cache: this machine's, and some seconds."""

    ahead = 3600.0

    def time(self) -> float:
        return time.time() + self.ahead


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """An hour later, because the time of a file's last change cannot be set."""
    clock = Clock()
    monkeypatch.setattr(checksum_cache, "time", clock)
    return clock


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.safetensors", b"a" * SIZE)


def test_an_untouched_file_is_hashed_once(file: Path, tmp_path: Path) -> None:
    first, read = bytes_read(file, tmp_path / "cache")
    assert (first, read >= SIZE) == (sha256(b"a" * SIZE), True)
    again, read = bytes_read(file, tmp_path / "cache")
    assert again == first
    assert read < SIZE // 10


def overwrite(file: Path) -> None:
    write(file, b"b" * SIZE)


def replace(file: Path) -> None:
    write(file.with_name("new"), b"b" * SIZE).replace(file)


@pytest.mark.parametrize("change", [overwrite, replace])
def test_a_change_that_keeps_size_and_time_is_noticed(
    file: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    read_sha256(file, tmp_path / "cache")
    change(file)
    assert (file.stat().st_size, file.stat().st_mtime) == (SIZE, LONG_AGO)
    assert read_sha256(file, tmp_path / "cache") == sha256(b"b" * SIZE)


@pytest.mark.parametrize("written", [None, LONG_AGO])
def test_a_file_that_may_still_be_written_is_not_kept(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, written: float | None
) -> None:
    """Neither by the time of the write nor by that of the change, however long the hashing takes."""

    def hash_slowly(path: Path) -> str:
        clock.ahead += 60
        return compute_sha256(path)

    monkeypatch.setattr(checksum_cache, "compute_sha256", hash_slowly)
    clock.ahead = 0
    file = write(tmp_path / "model.safetensors", b"a", written or time.time())
    read_sha256(file, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    read_sha256(file, tmp_path / "cache")
    assert (tmp_path / "cache").exists(), "a minute later"


@pytest.mark.parametrize("content", ["", "[]", "{}", "no json"])
def test_a_damaged_entry_is_computed_anew(file: Path, tmp_path: Path, content: str) -> None:
    read_sha256(file, tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_text(content)
    assert read_sha256(file, tmp_path / "cache") == sha256(b"a" * SIZE)


def test_a_cache_that_cannot_be_written_is_no_error(file: Path) -> None:
    assert read_sha256(file, file / "cache") == sha256(b"a" * SIZE)
