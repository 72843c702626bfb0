"""Tutorials without a cluster: their commands work as typed, and print the lines that the pages show."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from shell_commands import run_script, shell_environment
from tutorials import build_script, find_missing_lines, read_steps, split_output

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["qwen-chat", "starcoder-repository"])
def test_a_tutorial_works_as_typed(name: str, tmp_path: Path) -> None:
    steps = read_steps(name)
    with tempfile.TemporaryDirectory() as short, shell_environment(Path(short), os.environ) as environment:
        code, output = run_script(build_script(steps), tmp_path, environment, seconds=900)
    assert code == 0, output
    printed = split_output(output)
    assert len(printed) == len(steps)
    missing = {step.commands: find_missing_lines(step, text) for step, text in zip(steps, printed, strict=True)}
    assert {commands: lines for commands, lines in missing.items() if lines} == {}
