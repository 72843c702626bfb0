"""Verb `publish`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def publish(
    run: Annotated[str, typer.Argument(help="Run directory, such as runs/NAME, or its URI.", show_default=False)],
    *,
    repo: Annotated[str, typer.Option(metavar="OWNER/NAME", help="Repository on the hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see; otherwise private.")] = False,
    licence: Annotated[
        str | None,
        typer.Option("--license", help="Name on the hub, such as apache-2.0.", show_default="that of the base"),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the export of another run.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Upload a run's export to the Hugging Face hub, with its card; private unless asked otherwise."""
    from llm_training_toolkit.commands.publish import PublishRequest, publish_run
    from llm_training_toolkit.runs.storage.open import open_path

    with open_path(run, export=True) as opened:
        request = PublishRequest(opened, repo, public, licence, replace)
        done = publish_run(request, lambda text: typer.echo(text, err=True))
    typer.echo(json.dumps(done.to_json()) if as_json else str(done))
