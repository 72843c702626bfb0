"""Outputs of a search: a run file for the winner, an HTML report, a Parquet table, TensorBoard's HParams."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from ruamel.yaml import YAML

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.load import redact_config
from llm_training_toolkit.config.search import SearchConfig, replace_config_values
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.search.event_log import EventLog, SearchDirectory, TrialRecord
from llm_training_toolkit.search.report import render_report_page
from llm_training_toolkit.search.results import build_trial_row, find_best_trial, rank_trials, read_trained_tokens
from llm_training_toolkit.search.space import format_point


def write_outputs(search: SearchConfig, whole: Config, event_log: EventLog, directory: SearchDirectory) -> None:
    """Write all outputs; `whole` is the base at full length, without `overrides`."""
    tokens = {
        trial.name: read_trained_tokens(directory.get_trial_run(trial.number).metrics_path)
        for trial in event_log.trials.values()
    }
    winner = find_best_trial(event_log, search.mode)
    assert winner is not None, "asked for only where some trial came to a rung"
    write_atomically(
        directory.path / "report.html", render_report_page(search, event_log, directory.path.name, sum(tokens.values()))
    )
    _write_table(directory.path / "results.parquet", search, event_log, tokens)
    _write_tensorboard(directory.path / "tb", search, event_log)
    write_atomically(directory.path / "best.yaml", format_best_config(search, whole, winner, directory))


def format_best_config(search: SearchConfig, whole: Config, winner: TrialRecord, directory: SearchDirectory) -> str:
    """Format the run file that trains the winner at the base's full length."""
    assert winner.last_rung is not None, "a winner has come to a rung"
    name = {"run.name": f"{directory.path.name}-best"}
    config = redact_config(replace_config_values(whole, {**winner.parameters, **name}, "the winner"))
    text = io.StringIO()
    YAML().dump(json.loads(config.model_dump_json(exclude_unset=True)), text)
    head = (
        f"# The winner of the search {directory.path.name}: {winner.name}, {search.metric} "
        f"{winner.last_rung.value:.6g} "
        f"after step {winner.last_rung.step:,}.\n# {format_point(winner.parameters)}\n"
    )
    return head + text.getvalue()


def _write_table(path: Path, search: SearchConfig, event_log: EventLog, tokens: dict[str, int]) -> None:
    """Write one row per trial, the best first, with one column per parameter, as JSON if not numeric."""
    rows = [build_trial_row(trial) for trial in rank_trials(event_log, search.mode)]
    columns: dict[str, list[object]] = {
        name: [found[name] for found in rows]
        for name in ("trial", "state", "value", "rung", "step", "tokens", "failures", "error")
    }
    columns["tokens_spent"] = [tokens[found["trial"]] for found in rows]
    for key in search.search:
        columns[key] = _build_column([found["config"][key] for found in rows])
    temporary = path.with_name(f".{path.name}")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def _build_column(values: list[object]) -> list[object]:
    """Convert numbers to float, anything else to JSON, because a column has one type."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values if isinstance(value, int | float)]
    return [json.dumps(value) for value in values]


def _write_tensorboard(directory: Path, search: SearchConfig, event_log: EventLog) -> None:
    """Write one HParams session per trial, anew at each end of the search."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(directory, ignore_errors=True)
    for trial in event_log.trials.values():
        if trial.last_rung is None or not math.isfinite(trial.last_rung.value):
            continue
        values = {key: _convert_hparam(value) for key, value in trial.parameters.items()}
        with SummaryWriter(str(directory / trial.name)) as writer:
            measured = {search.metric: trial.last_rung.value, "tokens": trial.last_rung.tokens}
            writer.add_hparams(values, measured, run_name=".", global_step=trial.last_rung.step)


def _convert_hparam(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
