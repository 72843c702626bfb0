"""Verbs for this machine: `init`, which writes a configuration that fits it, and `doctor`, which checks it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from llm_training_toolkit.cli.options import AsJson

InitKind = Literal["chat", "code", "text", "scratch", "search"]


def init(
    kind: Annotated[InitKind, typer.Argument(help="What to train on, or `search`.", show_default=False)],
    model: Annotated[str, typer.Option(help="Hub id, directory or known size.")] = "Qwen/Qwen3-0.6B",
    data: Annotated[
        str | None, typer.Option(help="File or folder of documents.", show_default="the standard library of Python")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run.", show_default="by model and kind")] = None,
    base: Annotated[str, typer.Option(help="Run file of a search.")] = "run.yaml",
) -> None:
    """Print a commented configuration that fits this machine: ltt init chat --data chats.jsonl > run.yaml."""
    from llm_training_toolkit.commands.init import (
        StarterRequest,
        detect_machine,
        format_starter_config,
        format_starter_search,
    )

    if kind == "search":
        typer.echo(format_starter_search(base), nl=False)
        return
    if data is None and kind == "chat":
        raise typer.BadParameter("give your conversations: --data chats.jsonl")
    request = StarterRequest(kind, model, data or "python:stdlib", name)
    typer.echo(format_starter_config(request, detect_machine()), nl=False)


def doctor(
    runs: Annotated[Path, typer.Option("--runs", help="Directory that runs are written to.")] = Path("runs"),
    *,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, devices, limits, disk, cluster and hub; say what to do. Exit code 1 = a failure."""
    from llm_training_toolkit.commands.doctor import check_whole_machine, format_checks

    checks = list(check_whole_machine(runs))
    typer.echo(json.dumps([check.to_json() for check in checks]) if as_json else "\n".join(format_checks(checks)))
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)
