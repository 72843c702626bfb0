"""Tutorials on Ray: their commands work as typed, and print the lines that the pages show."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from launching import Environment
from shell_commands import run_script, shell_environment
from tutorials import build_script, find_missing_lines, read_steps, split_output

pytestmark = pytest.mark.slow


def test_the_tutorial_of_a_search_works_as_typed(ray_environment: Environment, tmp_path: Path) -> None:
    """Typed as written, on the tests' own cluster."""
    steps = read_steps("learning-rate")
    with tempfile.TemporaryDirectory() as short, shell_environment(Path(short), ray_environment) as environment:
        code, output = run_script(build_script(steps), tmp_path, environment, seconds=1200)
    assert code == 0, output
    missing = [find_missing_lines(step, text) for step, text in zip(steps, split_output(output), strict=True)]
    assert [lines for lines in missing if lines] == []
