"""Directories are whole or absent, whatever dies; what the dead left is removed, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm_training_toolkit.data.prepare.atomic_dir import build_atomic_dir, remove_stale_builds

_BUILDS_FOR_EVER = """
import sys, time
from pathlib import Path
from llm_training_toolkit.data.prepare.atomic_dir import build_atomic_dir
def build(directory):
    (directory / "half").write_text("x")
    time.sleep(60)
build_atomic_dir(Path(sys.argv[1]), build)
"""


def test_a_part_is_whole_or_absent(tmp_path: Path) -> None:
    def dies(directory: Path) -> None:
        (directory / "half").write_text("x", encoding="utf-8")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        build_atomic_dir(tmp_path / "part", dies)
    assert not list(tmp_path.iterdir())
    build_atomic_dir(tmp_path / "part", lambda directory: (directory / "all").touch())
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["all"]


def test_what_sigkill_left_is_swept_and_what_is_being_built_is_not(tmp_path: Path) -> None:
    target = tmp_path / "fingerprint" / ".tokens.shards" / "source0-0-9"
    with subprocess.Popen([sys.executable, "-c", _BUILDS_FOR_EVER, str(target)]) as process:
        while not (half := list(target.parent.glob(".*/half"))):
            assert process.poll() is None
        remove_stale_builds(tmp_path)
        assert half[0].exists()
        os.kill(process.pid, signal.SIGKILL)
    assert half[0].exists()
    remove_stale_builds(tmp_path)
    assert not list(target.parent.iterdir())


def claimed(folder: Path, host: str, *, age: float = 0.0) -> Path:
    """A directory as a builder leaves it that died on some machine so many seconds ago."""
    folder.mkdir()
    claim = folder / ".building"
    claim.write_text(host, encoding="utf-8")
    os.utime(claim, (claim.stat().st_atime - age, claim.stat().st_mtime - age))
    return folder


def test_other_machines_builds_are_left_alone_for_a_day_and_other_directories_for_ever(tmp_path: Path) -> None:
    old = claimed(tmp_path / ".tokens.1.a", "another-machine", age=25 * 3600)
    young = claimed(tmp_path / ".tokens.1.b", "another-machine", age=23 * 3600)
    begins = claimed(tmp_path / ".tokens.1.c", "", age=25 * 3600)  # created, and not locked yet
    (tmp_path / ".mine").mkdir()
    remove_stale_builds(tmp_path)
    assert not old.exists()
    assert young.exists()
    assert begins.exists()
    assert (tmp_path / ".mine").exists()
