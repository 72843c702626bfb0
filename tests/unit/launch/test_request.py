"""Commands that a finished run suggests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_training_toolkit.launch.request import TrainRequest, TrainResult, format_next_steps
from tiny_runs import tiny_config

COMPLETION, INFILL = "--prompt 'def main():'", "--prompt 'def add(a, b):' --suffix '    return c'"
CHAT = "--chat --prompt 'What does zip do?'"


@pytest.mark.parametrize(
    ("sources", "options"),
    [
        ([{"format": "chat"}], [CHAT]),
        ([{"format": "code"}], [COMPLETION]),
        (
            [{"format": "text"}, {"format": "code", "fim": {"rate": 0.5}}, {"format": "chat"}],
            [CHAT, COMPLETION, INFILL],
        ),
    ],
)
def test_next_steps_ask_for_what_the_run_has_learnt(
    tmp_path: Path, sources: list[dict[str, Any]], options: list[str]
) -> None:
    named = [{"path": f"{number}", **source} for number, source in enumerate(sources)]
    config = tiny_config(tmp_path, tmp_path, data={"sources": named}, export={"at_end": True})
    result = TrainResult(str(tmp_path / "tiny"), 3, "finished", None)
    lines = format_next_steps(result, TrainRequest(Path("run.yaml")), config)
    asked = [line.partition("/export ")[2] for line in lines if " generate " in line]
    assert asked == options
    assert any(line.endswith("/export") and " serve " in line for line in lines)
