"""report.html in a real Chromium: every plot is there, nothing fails, nothing is fetched."""

from __future__ import annotations

import math
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.search.early_stopping import should_continue
from llm_training_toolkit.search.event_log import EventLog, RungResult, TrialRecord
from llm_training_toolkit.search.report import render_report_page
from llm_training_toolkit.search.space import draw_random_point
from llm_training_toolkit.search.table import build_trials_table
from photograph import Page, browser, photograph
from unit.search.test_space import CHOICES, RATE, search


def searched(path: Path) -> tuple[SearchConfig, EventLog]:
    """A search of sixteen trials on a bowl, one of which failed."""
    asked = search(RATE | CHOICES, trials=16)
    event_log = EventLog(path)
    event_log.record_start()
    for number in range(16):
        point = draw_random_point(asked, number)
        event_log.record_begin(TrialRecord(number, point, number))
        worth = (math.log10(point["optim.lr"]) + 2.3) ** 2 + 0.2 * (point["optim.lr_scheduler"] != "wsd")
        for rung, step in enumerate((4, 16, 64)):
            value = worth + 6.0 / (rung + 1)
            good = rung < 2 and should_continue(
                asked.scheduler, "min", value, event_log.get_rung_values(rung, 0, number)
            )
            event_log.record_rung(number, RungResult(rung, step, step * 512, value, promoted=good, last=rung == 2))
            if not good:
                break
        event_log.record_end(number, "finished" if rung == 2 else "stopped")
    event_log.record_begin(TrialRecord(16, draw_random_point(asked, 16), 16))
    event_log.record_end(16, "failed", "step 3: the loss is <nan> & more")
    return asked, event_log


def test_the_page_has_every_plot_once_and_escapes_errors(tmp_path: Path) -> None:
    text = render_report_page(*searched(tmp_path / "events.jsonl"), "bowl", 123_456)
    assert re.findall(r"Plotly.newPlot\(\s*\"(\w+)\"", text) == ["best", "curves", "trials", "importance"]
    assert not re.search(r"<script[^>]* src=|<link|@import", text)
    assert "the loss is &lt;nan&gt; &amp; more" in text


def test_a_search_in_which_all_failed_still_has_a_page(tmp_path: Path) -> None:
    event_log = EventLog(tmp_path / "events.jsonl")
    event_log.record_begin(TrialRecord(0, {"optim.lr": 0.01}, 0))
    event_log.record_rung(0, RungResult(0, 4, 400, math.nan, promoted=False))
    event_log.record_end(0, "failed", "gone")
    text = render_report_page(search(RATE), event_log, "none", 0)
    assert "No trial" in text
    assert "t0000" in text


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
def test_a_browser_draws_every_plot_without_network(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text(render_report_page(*searched(tmp_path / "events.jsonl"), "bowl", 123_456))
    drawn = (
        "const plots = [...document.querySelectorAll('.plotly-graph-div')];"
        "if (plots.length !== 4 || plots.some(plot => !plot.querySelector('.trace'))) throw Error('no plots');"
        "if (document.querySelector('.modebar-btn[data-title*=hare]')) throw Error('a button uploads the plot');"
        "if (performance.getEntriesByType('resource').length) throw Error('something was fetched')"
    )
    photograph(Page(report.as_uri(), seconds=3.0, scripts=[drawn]), tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_the_screen_shows_a_few_trials_the_best_first_and_all_at_work(tmp_path: Path) -> None:
    asked, event_log = searched(tmp_path / "events.jsonl")
    event_log.record_begin(TrialRecord(17, draw_random_point(asked, 17), 17))
    console = Console(width=140, record=True, file=StringIO())
    console.print(build_trials_table(asked, event_log, console.width))
    lines = console.export_text().splitlines()
    assert lines[1].startswith("t0000")
    assert sum(line.startswith("t00") for line in lines) == 12
    assert any(line.startswith("t0017") and "running" in line for line in lines)
    assert "and 6 more; 17 of 16 trials ended" in lines[-1]


def test_on_a_narrow_screen_titles_are_folded_and_no_value_is(tmp_path: Path) -> None:
    asked, event_log = searched(tmp_path / "events.jsonl")
    found = {}
    for width in (70, 60):
        console = Console(width=width, record=True, file=StringIO())
        console.print(build_trials_table(asked, event_log, width))
        found[width] = next(line for line in console.export_text().splitlines() if line.startswith("t0000")).split()
    assert found[70][:5] == ["t0000", "finished", "2.0029", "64", "32,768"]
    assert found[60][:4] == ["t0000", "finished", "2.0029", "64"], "tokens are left out first"
    assert found[60][4:] == found[70][5:]
    assert found[60][-1] == "wsd"
