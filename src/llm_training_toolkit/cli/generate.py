"""Verb `generate`: completion, infilling or conversation, streamed to the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from llm_training_toolkit.cli.options import AsJson
from llm_training_toolkit.runs.directory import RunDirectory, check_run, find_model_directory
from llm_training_toolkit.runs.printable import escape_control_characters
from llm_training_toolkit.runs.storage.open import open_path

if TYPE_CHECKING:
    from llm_training_toolkit.generation.generator import ChatSession
    from llm_training_toolkit.models.sampling import SamplingParams


def generate(
    model: Annotated[
        str,
        typer.Argument(
            help="A run or an exported directory, merged or with adapters; a path or the URI of a run.",
            show_default=False,
        ),
    ],
    *,
    prompt: Annotated[
        str | None,
        typer.Option(help="Text to continue; with --suffix, the text before the gap; with --chat, the user's turn."),
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="Text after the gap: fill in the middle.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Chat; without --prompt each line of standard input is a turn.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System prompt, with --chat.")] = None,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="Step of the run's checkpoint.", show_default="its export, or the newest one"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 = greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto = a GPU if present.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate text: continue a prompt, fill the gap before a suffix, or chat."""
    _check_generate_options(prompt, suffix, system, chat=chat, as_json=as_json)
    with open_path(model, export=step is None) as opened:
        _check_model_path(opened, step)  # before the heavy imports
        from llm_training_toolkit.generation.load import open_model
        from llm_training_toolkit.models.sampling import SamplingParams

        generator, where = open_model(opened, step=step, device=device)
        # Reads the template, which a URI's staging directory takes with it.
        session = generator.start_chat(system) if chat else None
    how = SamplingParams(tokens, temperature, seed)
    if session is not None and prompt is None:
        _run_conversation(session, how)
        return
    assert prompt is not None, "checked above"
    screen = _StreamedOutput("" if chat else prompt, silent=as_json)
    if session is not None:
        written = session.send_message(prompt, how, screen.write_piece)
    elif suffix is None:
        written = generator.complete_prompt(prompt, how, screen.write_piece)
    else:
        written = generator.fill_middle(prompt, suffix, how, screen.write_piece)
    if as_json:
        asked = {"model": where, "prompt": prompt, "suffix": suffix}
        typer.echo(json.dumps(asked | {"written": written.text, "ended": written.ended}))
    else:
        screen.write_piece(f"{suffix or ''}\n")


class _StreamedOutput:
    """Stream of generated pieces; `before` is printed with the first one, so a refused prompt prints nothing."""

    def __init__(self, before: str, *, silent: bool) -> None:
        self._before, self._silent = before, silent

    def write_piece(self, piece: str) -> None:
        """Print a piece and flush."""
        if not self._silent:
            text = self._before + piece  # into a file or pipe exactly as the model wrote it
            typer.echo(escape_control_characters(text) if sys.stdout.isatty() else text, nl=False)
            sys.stdout.flush()
        self._before = ""


def _run_conversation(dialogue: ChatSession, how: SamplingParams) -> None:
    """Send each line of standard input as a turn."""
    for line in _read_input_lines():
        if line.strip():
            screen = _StreamedOutput("", silent=False)
            dialogue.send_message(line.rstrip("\n"), how, screen.write_piece)
            screen.write_piece("\n")


def _read_input_lines() -> Iterator[str]:
    """Yield the lines of standard input, after a `> ` prompt on a terminal."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _check_generate_options(
    prompt: str | None, suffix: str | None, system: str | None, *, chat: bool, as_json: bool
) -> None:
    if prompt is None and not chat:
        raise typer.BadParameter("give a --prompt, or --chat for a conversation")
    if chat and suffix is not None:
        raise typer.BadParameter("--suffix fills a gap in a text: not with --chat")
    if system is not None and not chat:
        raise typer.BadParameter("--system is for a conversation: give --chat, too")
    if prompt is None and as_json:
        raise typer.BadParameter("--json prints one answer: give a --prompt, too")


def _check_model_path(model: RunDirectory, step: int | None) -> None:
    if step is not None:
        check_run(model)
    elif not model.resolved_config_path.is_file():
        find_model_directory(model.path)
