"""`ltt generate`, as a person calls it, with a model that knows its answers by heart."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import fork_server
from known_model import ANSWER, KNOWN, QUESTION
from llm_training_toolkit.data.sources import Document
from llm_training_toolkit.evaluation.infill import draw_gap
from llm_training_toolkit.generation.generator import TextGenerator
from llm_training_toolkit.models.sampling import SamplingParams


def ltt(*arguments: object, typed: str = "") -> str:
    command = [sys.executable, "-m", "llm_training_toolkit", "generate", *map(str, arguments)]
    return fork_server.run(command, check=True, capture_output=True, input=typed).stdout


def test_a_conversation_ends_at_the_end_of_turn(known_model: Path) -> None:
    pieces: list[str] = []
    written = (
        TextGenerator.from_directory(known_model).start_chat().send_message(QUESTION, SamplingParams(), pieces.append)
    )
    assert (written.text, written.ended) == (ANSWER, True)
    assert len(pieces) > 1
    assert "".join(pieces) == ANSWER


def test_a_conversation_of_one_question_and_of_typed_lines(known_model: Path) -> None:
    assert ltt(known_model, "--chat", "--prompt", QUESTION) == f"{ANSWER}\n"
    assert ltt(known_model, "--chat", typed=f"{QUESTION}\n\n") == f"{ANSWER}\n"


def test_a_gap_is_filled_between_what_was_given(known_model: Path) -> None:
    gap = draw_gap(Document(0, "area.py", KNOWN), "line", seed=0)
    assert gap is not None
    given = ("--prompt", gap.prefix, "--suffix", gap.suffix)
    assert ltt(known_model, *given) == f"{KNOWN}\n"
    found = json.loads(ltt(known_model, *given, "--json"))
    assert (found["written"], found["ended"]) == (gap.middle, True)
