"""What a search leaves: a run file for the winner, a page to look at, a table to read, TensorBoard's HParams."""

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
from llm_training_toolkit.config.search import Search, changed
from llm_training_toolkit.runs.directory import write_atomically
from llm_training_toolkit.search.event_log import Ledger, SearchDirectory, Trial
from llm_training_toolkit.search.report import page
from llm_training_toolkit.search.results import best, ranked, row, spent
from llm_training_toolkit.search.space import shown


def write_outputs(search: Search, whole: Config, ledger: Ledger, directory: SearchDirectory) -> None:
    """Write all of it; `whole` is the base at full length, without `set`."""
    tokens = {trial.name: spent(directory.trial(trial.number).metrics) for trial in ledger.trials.values()}
    winner = best(ledger, search.mode)
    assert winner is not None, "asked for only where some trial came to a rung"
    write_atomically(directory.path / "report.html", page(search, ledger, directory.path.name, sum(tokens.values())))
    _write_table(directory.path / "results.parquet", search, ledger, tokens)
    _write_tensorboard(directory.path / "tb", search, ledger)
    write_atomically(directory.path / "best.yaml", best_run(search, whole, winner, directory))


def best_run(search: Search, whole: Config, winner: Trial, directory: SearchDirectory) -> str:
    """The run file that trains the winner at the base's full length."""
    assert winner.last is not None, "a winner has come to a rung"
    name = {"run.name": f"{directory.path.name}-best"}
    config = changed(whole, {**winner.parameters, **name}, "the winner")
    text = io.StringIO()
    YAML().dump(json.loads(config.model_dump_json(exclude_unset=True)), text)
    head = (
        f"# The winner of the search {directory.path.name}: {winner.name}, {search.metric} {winner.last.value:.6g} "
        f"after step {winner.last.step:,}.\n# {shown(winner.parameters)}\n"
    )
    return head + text.getvalue()


def _write_table(path: Path, search: Search, ledger: Ledger, tokens: dict[str, int]) -> None:
    """One row a trial, the best first; its parameters in columns of their own, as JSON where they are no numbers."""
    rows = [row(trial) for trial in ranked(ledger, search.mode)]
    columns: dict[str, list[object]] = {
        name: [found[name] for found in rows]
        for name in ("trial", "state", "value", "rung", "step", "tokens", "failures", "error")
    }
    columns["tokens_spent"] = [tokens[found["trial"]] for found in rows]
    for key in search.search:
        columns[key] = _column([found["config"][key] for found in rows])
    temporary = path.with_name(f".{path.name}")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def _column(values: list[object]) -> list[object]:
    """Numbers as they are; anything else as JSON, because a column has one type."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return [float(value) for value in values if isinstance(value, int | float)]
    return [json.dumps(value) for value in values]


def _write_tensorboard(directory: Path, search: Search, ledger: Ledger) -> None:
    """One session of HParams a trial, written anew at each end of the search."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(directory, ignore_errors=True)
    for trial in ledger.trials.values():
        if trial.last is None or not math.isfinite(trial.last.value):
            continue
        values = {key: _hparam(value) for key, value in trial.parameters.items()}
        with SummaryWriter(str(directory / trial.name)) as writer:
            measured = {search.metric: trial.last.value, "tokens": trial.last.tokens}
            writer.add_hparams(values, measured, run_name=".", global_step=trial.last.step)


def _hparam(value: object) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)
