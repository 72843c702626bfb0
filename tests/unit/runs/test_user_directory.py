"""Directories in the machine's temporary directory: nobody else's, and none without the user in its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.backend import prepare_environment
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.storage.open import create_staging_directory
from llm_training_toolkit.runs.user_directory import create_user_directory

STRANGER = 12345


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary directory that every user may write to."""
    tmp_path.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_it_is_private_and_the_same_each_time(shared: Path) -> None:
    path = create_user_directory("name")
    assert path == create_user_directory("name") == shared / f"name-{os.getuid()}"
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["of a stranger", "writable by all", "a link", "a file"])
def test_one_that_others_could_exchange_is_refused(shared: Path, kind: str) -> None:
    path = shared / f"llm-training-toolkit-{os.getuid()}"
    if kind == "of a stranger":
        if os.getuid() != 0:
            pytest.skip("only root can give a directory away")
        path.mkdir(mode=0o700)
        os.chown(path, STRANGER, STRANGER)
    elif kind == "writable by all":
        path.mkdir()
        path.chmod(0o777)
    elif kind == "a link":
        (shared / "other").mkdir(mode=0o700)
        path.symlink_to(shared / "other")
    else:
        path.touch()
    with pytest.raises(LaunchError, match=str(path)), create_staging_directory():
        pass


def test_rays_sessions_and_token_are_this_users_alone(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "RAY_ADDRESS", "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, "")  # restored at the end, whatever is set meanwhile
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(shared / "home"))
    (shared / "home" / ".ray").mkdir(parents=True)
    token = shared / "home" / ".ray" / "auth_token"
    token.write_text("secret")
    token.chmod(0o644)
    prepare_environment()
    assert os.environ["RAY_TMPDIR"] == f"/tmp/ltt-ray-{os.getuid()}", "Ray's sockets have no room below a long path"
    assert os.environ["PYTHONSAFEPATH"] == "1"
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_a_short_temporary_directory_is_kept(shared: Path) -> None:
    assert create_user_directory("x", max_length=500) == shared / f"x-{os.getuid()}"


def test_two_users_have_two_directories_for_rays_files(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_training_toolkit.launch.ray.cluster import get_ray_directory

    class Stored:
        def get_uri(self, _path: Path) -> str:
            return "s3://bucket/run"

    run = RunDirectory(shared / "run", Stored())  # type: ignore[arg-type]
    (shared / "llm-training-toolkit-ray").mkdir(mode=0o700)
    mine = get_ray_directory(run)
    assert mine.name.endswith(f"-{os.getuid()}")
