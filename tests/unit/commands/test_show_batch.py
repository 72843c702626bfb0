"""`ltt show-batch`: what it shows is what the step trains on."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as Terminal

import fork_server
from llm_training_toolkit.commands.show_batch import build_batch_json, load_batch_sequences, print_batch
from llm_training_toolkit.config import load_config
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.epochs import prepare_run_data
from llm_training_toolkit.data.preview import _decode_tokens
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.errors import DataError, PlanError
from llm_training_toolkit.monitoring.console import Console
from run_results import decode_sequence

CHATS = [
    [("user", "What is 1 + 1? <|im_end|>"), ("assistant", "2"), ("user", "Sure?"), ("assistant", "Yes, é.")],
    [("system", "Be brief."), ("user", "Name a colour."), ("assistant", "Blue.")],
]


@pytest.fixture
def config(launch_config: Callable[..., Path], tmp_path: Path) -> Path:
    """A run on code with fill-in-the-middle and on a few conversations."""
    chats = tmp_path / "chats.jsonl"
    records = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    chats.write_text("".join(json.dumps(record) + "\n" for record in records))
    written = launch_config("shown")
    sources = load_config(written).model_dump(mode="json", exclude_unset=True)["data"]["sources"]
    sources.append({"path": str(chats), "format": "chat"})
    return launch_config(
        "shown", data={"sources": sources, "sequence_length": 128, "eval": {"fraction": 0.0}}, train={"steps": 9}
    )


def shown_json(config: Path, step: int) -> dict[str, Any]:
    verb = [sys.executable, "-m", "llm_training_toolkit", "show-batch", str(config), "--step", str(step), "--json"]
    done = fork_server.run(verb, capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_step_is_shown_as_it_is_trained_on(config: Path) -> None:
    made = load_config(config)
    dataset_info = prepare_run_data(made, lambda _stage, _done, _total: None).dataset_info
    sequences = PackedDataset(dataset_info, global_batch=made.train.global_batch_size)
    for step in (1, 4):
        found = shown_json(config, step)
        assert found["step"] == step
        rows = found["sequences"]
        assert sum(row["loss_tokens"] for row in rows) == sequences.count_loss_tokens(step - 1)
        for position, row in enumerate(rows):
            assert row["text"] == decode_sequence(sequences, step - 1, position)
            assert sum(piece["tokens"] for piece in row["documents"]) + row["padding"] == made.data.sequence_length
            assert all(piece["document"] and piece["source"] for piece in row["documents"])


def test_colours_mark_what_is_to_be_predicted(config: Path) -> None:
    made = load_config(config)
    shown = [load_batch_sequences(made, step, Console(io.StringIO())) for step in range(1, 10)]
    pieces = [piece for step in shown for sequence in step for piece in sequence.pieces]
    [brief] = {piece.spans for piece in pieces if piece.document == "chats.jsonl:2"}
    assert "".join(stretch.text for stretch in brief if stretch.loss) == "<think>\n\n</think>\n\nBlue.<|im_end|>"
    [asked] = {piece.spans for piece in pieces if piece.document == "chats.jsonl:1"}
    assert "What is 1 + 1? <|im_end|>" in "".join(stretch.text for stretch in asked if not stretch.special)
    screen = io.StringIO()
    for step, batch in enumerate(shown, start=1):
        print_batch(step, batch, Terminal(file=screen, highlight=False))
    assert "Yes, é.<|im_end|>" in screen.getvalue()
    coloured = io.StringIO()
    for step, batch in enumerate(shown, start=1):
        print_batch(step, batch, Terminal(file=coloured, force_terminal=True, color_system="standard"))
    assert "\x1b[30;102m" in coloured.getvalue().partition("Yes, é.")[0].rpartition("\n")[2], "on bright green"
    assert "\x1b[2mWhat is 1 + 1?" in coloured.getvalue(), "what was asked is dim"
    assert build_batch_json(1, shown[0])["sequences"][0]["documents"]


def test_text_of_a_broken_character_keeps_its_place(config: Path) -> None:
    encoder = open_tokenizer(prepare_run_data(load_config(config), lambda *_: None).dataset_info.tokenizer_path)
    for text in ("cut \ufffd", "é", "日本"):
        assert "".join(_decode_tokens(encoder.encode(text), encoder)) == text


def test_conversations_without_any_loss_are_refused(launch_config: Callable[..., Path], tmp_path: Path) -> None:
    silent = tmp_path / "silent.jsonl"
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]}
    told = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "loss": False}]}
    silent.write_text(json.dumps(said) + "\n" + json.dumps(told))
    config = launch_config("silent", data={"sources": [{"path": str(silent), "format": "chat"}]})
    with pytest.raises(DataError, match="or bears no loss"):
        load_batch_sequences(load_config(config), 1, Console(io.StringIO()))


def test_the_template_lies_beside_the_tokenizer(config: Path) -> None:
    tokenizer = Path(prepare_run_data(load_config(config), lambda *_: None).dataset_info.tokenizer_path)
    assert "<|im_start|>" in (tokenizer / "chat_template.jinja").read_text()


def test_a_step_beyond_the_run_is_refused(config: Path) -> None:
    with pytest.raises(PlanError, match="--step 10: the run has the steps 1 to 9"):
        load_batch_sequences(load_config(config), 10, Console(io.StringIO()))
