"""Verb `serve`: an OpenAI-compatible endpoint for one model, on Ray Serve."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from llm_training_toolkit.serving.settings import KEY_VARIABLE, ServingLimits, ServingSettings

_DEFAULTS = ServingLimits()


def serve(
    model: Annotated[
        str,
        typer.Argument(
            help="A run or an exported directory, merged or with adapters; a path or the URI of a run.",
            show_default=False,
        ),
    ],
    *,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Step of the run's checkpoint.", show_default="its export, or the newest one"),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", show_default="that of its directory")
    ] = None,
    host: Annotated[str, typer.Option(help="Interface to listen on; 127.0.0.1 = this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any free port.")] = 8000,
    key: Annotated[
        str | None,
        typer.Option(envvar=KEY_VARIABLE, help="Key that requests carry.", show_default="a new one, printed once"),
    ] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Ask for no key; on loopback only.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most new tokens of a request.")] = _DEFAULTS.max_tokens,
    queue: Annotated[
        int, typer.Option(min=1, help="Most waiting requests in each replica; further ones get status 429.")
    ] = _DEFAULTS.max_queued,
    batch: Annotated[int, typer.Option(min=1, help="Most requests generated together.")] = _DEFAULTS.batch_size,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds from a request to its last token, at most.")
    ] = _DEFAULTS.timeout,
    replicas: Annotated[int, typer.Option(min=1, help="Processes that hold the model, each with a GPU if any.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda; auto = a GPU if present.")] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print url, key and model as one JSON object once requests are answered.")
    ] = False,
) -> None:
    """Serve a model as an OpenAI-compatible endpoint with a page for chat and infilling, until Ctrl-C."""
    from llm_training_toolkit.commands.serve import prepare_server

    limits = ServingLimits(max_tokens, queue, batch, timeout)
    settings = ServingSettings(model, name or "", step, device, key, limits)
    plan = prepare_server(settings, host=host, port=port, without_key=no_key)
    from llm_training_toolkit.launch.backend import prepare_environment
    from llm_training_toolkit.launch.signals import interrupt_on_stop_signals
    from llm_training_toolkit.monitoring.console import Console
    from llm_training_toolkit.monitoring.terminal import open_terminal_copy

    prepare_environment()
    with interrupt_on_stop_signals(), open_terminal_copy(1) as out, open_terminal_copy(2) as err:
        console = Console(err)

        def announce() -> None:
            console.close()
            out.write(json.dumps(plan.to_json()) + "\n" if as_json else "\n".join(plan.format_lines()) + "\n")

        try:
            from llm_training_toolkit.launch.serve.run import ServeRequest, serve_until_stopped

            request = ServeRequest(plan.settings, host, plan.port, replicas)
            serve_until_stopped(request, console, announce)
        except KeyboardInterrupt:
            console.print_line("stopped")
        finally:
            console.close()
