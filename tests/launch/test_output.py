"""The end of a log."""

from __future__ import annotations

from pathlib import Path

from llm_training_toolkit.monitoring.logs import read_last_lines


def test_the_last_lines_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "rank_0.log"
    path.write_bytes(b"\xff" + b"".join(b"line %d\n\n" % number for number in range(10_000)) + b"no end")
    assert read_last_lines(path, 3) == ["line 9998", "line 9999", "no end"]
    path.write_text("")
    assert read_last_lines(path, 3) == []
    assert read_last_lines(tmp_path / "absent", 3) == []
