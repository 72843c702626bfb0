"""`ltt report`: one page that holds everything, whatever a run's files hold, light and dark in a real Chromium."""

from __future__ import annotations

import json
import math
import os
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_training_toolkit.commands.report import write_report
from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.plan.forecast.cluster_file import read_hardware
from llm_training_toolkit.report.charts import HEIGHT, WIDTH, build_chart, format_number, thin_out
from llm_training_toolkit.report.collect import collect_run
from llm_training_toolkit.report.page import build_attempt_rows, compare_plans, render_page
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.goodput import GOODPUT_CATEGORIES
from photograph import Page, browser, photograph
from tiny_runs import tiny_config

ROOT = Path(__file__).parents[3]
HOSTILE = "<script>document.title='taken'</script>\"'&"


def write_run(path: Path, rate: float = 1e-3) -> RunDirectory:
    """A run of two attempts: one is lost after step 12, one resumes from step 8 to 20."""
    run = RunDirectory(path)
    run.path.mkdir(parents=True)
    config = tiny_config(path, path.parent, run={"name": "report"}, cluster={"workers": 1})
    run.resolved_config_path.write_text(config.model_dump_json())
    plan = {"model": "qwen3-0.6b", "parameters": 1000, "trainable_parameters": 1000, "precision": "fp32", "lr": rate}
    plan |= {"steps": 20, "global_batch": 4, "sequence_length": 64, "tokens_per_step": 256, "flops_per_token": 6000}
    run.plan_path.write_text(json.dumps(plan | {"memory_gb_per_device": {"weights": 0.5, "optimizer": 1.0}}))
    run.environment_path.write_text(json.dumps({"command": ["ltt", "train", HOSTILE], "versions": {"torch": "2"}}))
    seconds = dict.fromkeys(GOODPUT_CATEGORIES, 0.0)
    rows: list[dict[str, float]] = []
    for attempt, steps in ((1, range(1, 13)), (2, range(9, 21))):
        seconds |= {"startup": seconds["startup"] + 5, "idle": 3.0 * (attempt - 1)}
        rows.append({"step": steps[0] - 1, "attempt": attempt, "time": 1000.0 + len(rows), "eval/loss": 9 / steps[0]})
        for step in steps:
            seconds["recomputation" if attempt == 2 and step <= 12 else "step"] += 1
            values = {"train/loss": 8 / step, "optim/lr": rate, "optim/grad_norm": 1.0, "train/tokens": 256.0 * step}
            values |= {"perf/tokens_per_second": 500.0, "perf/step_seconds": 0.5, "perf/memory_gb": 1.4}
            values |= {f"goodput/{name}_seconds": each for name, each in seconds.items()}
            rows.append({"step": step, "attempt": attempt, "time": 1000.0 + len(rows), **values})
        rows.append({"step": steps[-1], "attempt": attempt, "time": 1000.0 + len(rows), "eval/loss": 8.5 / steps[-1]})
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "att')
    run.attempts_dir.mkdir()
    for number, state in ((1, "lost"), (2, "failed")):
        record = {"attempt": number, "state": state, "started": 1e9, "workers": 2, "micro_batch": 1, "error": HOSTILE}
        (run.attempts_dir / f"{number:04d}.json").write_text(json.dumps(record))
    _write_dataset_info(run)
    return run


def _write_dataset_info(run: RunDirectory) -> None:
    source: dict[str, Any] = {"path": HOSTILE, "documents": 9, "held_out": 1, "dropped": {HOSTILE: 2}, "tokens": 5000}
    source |= {"loss_tokens": 4000, "longest": 300, "longest_document": "a.py", "truncated": 0.0}
    epoch = {"tokens": "t", "plan": "p", "sequences": 70, "filled": 4400, "lost": 0}
    info: dict[str, Any] = {"fingerprint": "f", "directory": "d", "tokenizer_path": "t", "vocab_size": 512, "pad_id": 0}
    info |= {"sequence_length": 64, "seed": 1, "sources": [source], "streams": [{"share": 1, "epochs": [epoch]}]}
    info |= {"held_out": "h", "held_out_plan": "p", "eval_sequences": 3, "padding": 0.01, "tokens_lost": 0}
    run.dataset_info_path.parent.mkdir()
    run.dataset_info_path.write_text(json.dumps(info))
    run.evaluations_dir.mkdir()
    record = {"task": "infill", "exact_match": 0.25, "data": HOSTILE, "settings": {}, "model": None, "run": run.name}
    (run.evaluations_dir / "one.json").write_text(json.dumps(record | {"step": 20, "date": "2026-01-02"}))
    broken = run.get_checkpoint_dir(8, 1)
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text(HOSTILE)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return write_run(tmp_path / "runs" / "one")


def read_text(page: str) -> str:
    """The page as it is read: no markup, no style."""
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def test_page_is_one_file_with_plan_measurements_attempts_and_dataset_info(run: RunDirectory, tmp_path: Path) -> None:
    page = write_report([str(run.path)], tmp_path / "page.html").read_text()
    assert not re.search(r"<script|<link|@import|\bsrc=|\bhref=|url\(|https?://", page)
    assert page.count("<figure>") == 6
    text = read_text(page)
    for found in (
        "steps 20 20, 4 done again",
        "1.5 GB 1.4 GB",
        "500 (median)",
        "70 sequences of 64 tokens",
        "exact_match",
    ):
        assert found in text
    assert len(page) < 100_000


def test_strings_from_files_of_a_run_are_escaped(run: RunDirectory, tmp_path: Path) -> None:
    hostile = RunDirectory(run.path.rename(run.path.with_name("<b>&amp;")))
    page = write_report([str(hostile.path)], tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>&amp;<" not in page
    # error twice (an attempt's and the run's), source, reason, evaluation's data, command, unreadable manifest aside
    assert page.count("&lt;script&gt;document.title") >= 5


def test_attempts_lie_end_to_end_along_the_time_of_the_run(run: RunDirectory) -> None:
    rows = list(build_attempt_rows(collect_run(run)))
    segments = [segment for row in rows for segment in row.segments]
    assert [segment.category for segment in rows[1].segments] == ["idle", "startup", "step", "recomputation"]
    assert math.isclose(sum(segment.width for segment in segments), 100)
    ends = [segment.left + segment.width for segment in segments]
    assert all(math.isclose(end, later.left) for end, later in zip(ends, segments[1:], strict=False))


def test_forecast_of_a_cluster_is_beside_what_was_measured(run: RunDirectory, tmp_path: Path) -> None:
    hardware = read_hardware(ROOT / "cluster" / "aws-h100.yaml")
    text = read_text(write_report([str(run.path)], tmp_path / "page.html", hardware).read_text())
    assert re.search(r"cost \$[\d.]+ \$[\d.]+ at the same price", text)


def test_runs_with_other_batches_are_compared_by_tokens(run: RunDirectory, tmp_path: Path) -> None:
    other = write_run(tmp_path / "runs" / "two", rate=2e-3)
    plan = json.loads(other.plan_path.read_text()) | {"tokens_per_step": 512}
    other.plan_path.write_text(json.dumps(plan))
    reports = [collect_run(run), collect_run(other)]
    page = render_page(reports, [None, None])
    assert re.findall(r"aria-label=\"([^\"]+)\"", page)[0] == "Training loss"
    assert page.count(">tokens</text>") == 6
    rates = next(row for row in compare_plans(reports, [None, None]) if row.name == "learning rate")
    assert [planned for planned, _ in rates.cells] == ["0.001 peak", "0.002 peak"]


def test_a_run_without_metrics_has_a_page_that_says_so(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "fresh")
    run.path.mkdir()
    run.resolved_config_path.write_text("{}")
    text = read_text(write_report([str(run.path)], tmp_path / "page.html").read_text())
    assert "fresh has no metrics yet" in text
    run.plan_path.write_text("{")
    run.dataset_info_path.parent.mkdir()
    run.dataset_info_path.write_text("[]")
    assert read_text(write_report([str(run.path)], tmp_path / "page.html").read_text()).count("unreadable:") == 2


def test_a_plan_without_a_key_is_listed_as_unreadable(run: RunDirectory, tmp_path: Path) -> None:
    plan = json.loads(run.plan_path.read_text())
    run.plan_path.write_text(json.dumps({key: value for key, value in plan.items() if key != "tokens_per_step"}))
    text = read_text(write_report([str(run.path)], tmp_path / "page.html").read_text())
    assert "plan.json: without tokens_per_step" in text


def test_undecodable_bytes_in_an_error_are_replaced(run: RunDirectory, tmp_path: Path) -> None:
    record = {"attempt": 2, "state": "failed", "error": "caf\udce9.jsonl: no such file"}
    (run.attempts_dir / "0002.json").write_text(json.dumps(record))
    page = write_report([str(run.path)], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "caf?.jsonl: no such file" in page


def test_places_without_a_run_and_runs_named_twice_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write_report([str(tmp_path)], tmp_path / "page.html")
    with pytest.raises(PlanError):
        write_report([str(run.path), str(run.path)], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    (tmp_path / "link").symlink_to(run.path)
    relative = os.path.relpath(run.path)
    for same in (f"{run.path}/", f"{run.path.parent}/./{run.name}", relative, str(tmp_path / "link")):
        with pytest.raises(PlanError, match="named twice"):
            write_report([str(run.path), same], tmp_path / "page.html")


POINTS = st.lists(st.tuples(st.integers(0, 10**6), st.floats()), max_size=900)


@given(POINTS)
def test_charts_hold_any_values(points: list[tuple[float, float]]) -> None:
    chart = build_chart("loss", "step", [("one", points)])
    if chart is None:
        assert not any(1e-290 < abs(value) < 1e290 or value == 0 for _, value in points)
        return
    [line] = chart.lines
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", line.path)]
    assert all(-1 <= number <= max(WIDTH, HEIGHT) + 1 for number in numbers)
    assert all(-0.1 <= tick.at <= WIDTH + 0.1 for tick in chart.x_ticks)


def test_thinned_lines_keep_their_peaks() -> None:
    points = [(float(step), float(step == 777)) for step in range(5000)]
    kept = thin_out(points)
    assert len(kept) < 500
    assert (777.0, 1.0) in kept
    assert kept == sorted(kept)
    assert [format_number(value) for value in (0, 2.5, 1200, 1.5e6, 3e-4)] == ["0", "2.5", "1,200", "1.5M", "0.0003"]


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_page_light_and_dark_without_network(run: RunDirectory, tmp_path: Path) -> None:
    page = write_report([str(run.path)], tmp_path / "page.html")
    drawn = (
        "const curves = [...document.querySelectorAll('path.curve')];"
        "if (curves.length !== 6 || curves.some(curve => curve.getTotalLength() < 50)) throw Error('no curves');"
        "if (document.title !== 'one') throw Error('a string of the run was executed');"
        "if (performance.getEntriesByType('resource').length) throw Error('something was fetched');"
        "if (document.documentElement.scrollWidth > innerWidth) throw Error('wider than the window');"
    )
    light = "if (getComputedStyle(document.body).backgroundColor !== 'rgb(251, 251, 250)') throw Error('not light')"
    dark = "if (getComputedStyle(document.body).backgroundColor !== 'rgb(20, 24, 29)') throw Error('not dark')"
    for colours, scheme in (("light", light), ("dark", dark)):
        shown = Page(page.as_uri(), seconds=1.0, scripts=[drawn, scheme], colours=colours)  # type: ignore[arg-type]
        photograph(shown, tmp_path / f"{colours}.png")
