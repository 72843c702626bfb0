"""Verbs before training: `plan`, `prepare`, `show-batch`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_training_toolkit.cli.options import AsJson, ConfigFile, Overrides
from llm_training_toolkit.errors import ConfigError
from llm_training_toolkit.runs.printable import escape_control_characters

if TYPE_CHECKING:
    from llm_training_toolkit.config import Config


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    cluster: Annotated[
        Path | None,
        typer.Option(
            help="Cluster file (cluster/*.yaml, cluster/slurm.sh): check that it fits, estimate time and cost."
        ),
    ] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="With --cluster: the fastest and cheapest workers, ZeRO, offload, micro-batch."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: steps, batch, memory, DeepSpeed JSON, every problem. Takes no hardware."""
    from llm_training_toolkit.commands.plan import plan_run
    from llm_training_toolkit.config import load_config
    from llm_training_toolkit.plan import format_plan

    if search:
        _search_settings(load_config(config, overrides or ()), cluster, as_json=as_json)
        return
    made, there = plan_run(load_config(config, overrides or ()), cluster)
    if as_json:
        typer.echo(json.dumps(made.to_json() | (there.to_json() if there else {"hours": None, "cost": None})))
    else:
        typer.echo("\n".join(format_plan(made, there)))
    if made.problems:
        raise typer.Exit(2)


def _search_settings(config: Config, cluster: Path | None, *, as_json: bool) -> None:
    """Print the search of `ltt plan --search`. Exits with 2 if nothing fits."""
    from llm_training_toolkit.commands.plan import search_run_settings
    from llm_training_toolkit.plan.forecast.settings_search import format_search

    if cluster is None:
        raise ConfigError("--search compares settings on a cluster: give its file, --cluster cluster/aws-h100.yaml")
    plan, found = search_run_settings(config, cluster)
    if as_json:
        typer.echo(json.dumps(plan.to_json() | {"search": found.to_json()}))
    else:
        typer.echo("\n".join(format_search(found)))
    if not found.by_workers:
        raise typer.Exit(2)


def prepare(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    verify: Annotated[bool, typer.Option("--verify", help="Reread the documents and compare their content.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only read and render a sample of every source.")] = False,
    as_json: AsJson = False,
) -> None:
    """Tokenize and pack the documents into a cache; `train` does it where needed."""
    from llm_training_toolkit.config import load_config

    read = load_config(config, overrides or ())  # reports configuration errors before torch is imported
    if check:
        _check_sample(read, as_json=as_json)
        return
    from llm_training_toolkit.commands.prepare import prepare_dataset
    from llm_training_toolkit.data.prepare.epochs import (
        build_data_facts,
        build_dataset_info_json,
        format_dataset_info,
    )
    from llm_training_toolkit.monitoring.console import Console
    from llm_training_toolkit.monitoring.terminal import open_terminal_copy
    from llm_training_toolkit.plan import format_mixture, make_plan
    from llm_training_toolkit.setup.stored_plan import recall_stored_plan

    read = recall_stored_plan(read)
    with open_terminal_copy(2 if as_json else 1) as screen:
        console = Console(screen)
        try:
            dataset_info = prepare_dataset(read, console, verify=verify)
        finally:
            console.close()
    if as_json:
        typer.echo(json.dumps(build_dataset_info_json(dataset_info)))
    else:
        typer.echo(
            "\n".join(
                [
                    *format_dataset_info(dataset_info),
                    *format_mixture(make_plan(read).with_data(build_data_facts(dataset_info))),
                ]
            )
        )


def _check_sample(config: Config, *, as_json: bool) -> None:
    """Print what a sample of every source holds; exit 1 if it has faults."""
    from llm_training_toolkit.data.prepare.epochs import get_tokenization_spec
    from llm_training_toolkit.data.prepare.source_check import check_sources

    samples = list(check_sources(config, get_tokenization_spec(config)))
    if as_json:
        typer.echo(json.dumps({"sources": [sample.to_json() for sample in samples]}))
    else:
        typer.echo(escape_control_characters("\n".join(line for sample in samples for line in sample.format_lines())))
    if any(sample.faults for sample in samples):
        raise typer.Exit(1)


def show_batch(
    config: ConfigFile,
    overrides: Overrides = None,
    *,
    step: Annotated[int, typer.Option(min=1, help="Step, as in metrics.jsonl: the first is 1.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show the sequences of a step as text: loss mask in colour, the document of each part."""
    from rich.console import Console as Terminal

    from llm_training_toolkit.commands.show_batch import build_batch_json, print_batch
    from llm_training_toolkit.commands.show_batch import load_batch_sequences as show
    from llm_training_toolkit.config import load_config
    from llm_training_toolkit.monitoring.console import Console

    console = Console(sys.stderr)
    try:
        shown = show(load_config(config, overrides or ()), step, console)
    finally:
        console.close()
    if as_json:
        typer.echo(json.dumps(build_batch_json(step, shown)))
    else:
        print_batch(step, shown, Terminal(highlight=False))
