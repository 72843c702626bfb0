"""Every test is in a folder that says what it needs, so that each lane of the Makefile finds its own."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[2]


def test_every_test_file_is_in_a_folder_of_its_need() -> None:
    folders = {path.relative_to(TESTS).parts[0] for path in TESTS.rglob("test_*.py")}
    assert folders == {"unit", "ranks", "cluster", "e2e"}


def test_ranks_and_clusters_are_used_in_their_folders_alone() -> None:
    for folder in ("unit", "e2e"):
        for path in (TESTS / folder).rglob("test_*.py"):
            text = path.read_text()
            assert path == Path(__file__) or not any(name in text for name in ("pools(", "ray_environment")), path
