"""Commits: StarCoder's layout as published, its windows, and records of CommitPack and StarCoderData."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layout_tokens import decode_source, render_source
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.layouts.commits import build_commit_segments
from llm_training_toolkit.data.sources import DocumentStats, read_source_documents
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.errors import DataError
from record_sets import write_json_lines

# A record of bigcode/commitpackft, with its field names.
RECORD = {
    "commit": "0c17311f7fd511f5dae8f8e4acc2dce1a2de3cf5",
    "old_file": "main.py",
    "new_file": "app/main.py",
    "old_contents": "x = 5\n",
    "new_contents": "import math\nx = math.pi\n",
    "subject": "Change to pi",
    "message": "Change to pi\n\nIt is rounder.\n",
    "lang": "Python",
    "license": "mit",
    "repos": "me/circle,you/circle",
}
GOLDEN = "<commit_before>x = 5\n<commit_msg>Change to pi<commit_after>import math\nx = math.pi\n<|endoftext|>"


def read(path: Path, tally: DocumentStats | None = None, **fields: Any) -> list[Any]:
    source = SourceConfig.model_validate({"path": str(path), "format": "commits", **fields})
    return list(read_source_documents(source, 0, tally=tally, on_error="collect" if tally else "stop"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_commit_is_written_as_starcoder_read_it(tmp_path: Path, layout_tokenizers: dict[str, Path], kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_json_lines(path, [RECORD])
    else:
        pq.write_table(pa.Table.from_pylist([RECORD]), path)
    assert decode_source(layout_tokenizers["starcoderbase-1b"], path, format="commits") == [GOLDEN]
    (document,) = read(path)
    assert (document.repository, document.path) == ("me/circle", "app/main.py")


def test_content_of_starcoderdata_gets_tokens_for_its_markers(
    tmp_path: Path, layout_tokenizers: dict[str, Path]
) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [{"content": GOLDEN.removesuffix("<|endoftext|>")}])
    tokenizer = layout_tokenizers["starcoderbase-1b"]
    assert decode_source(tokenizer, path, format="commits") == [GOLDEN]
    (rendered,) = render_source(tokenizer, path, format="commits")
    special = [open_tokenizer(str(tokenizer)).get_special_token_id(f"<commit_{name}>") for name in ("before", "after")]
    assert set(special) <= set(rendered.examples[0].tokens.tolist())


def test_marker_text_inside_of_a_file_stays_text(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [{**RECORD, "old_contents": "a <commit_msg> b"}])
    tokenizer = layout_tokenizers["starcoderbase-1b"]
    (rendered,) = render_source(tokenizer, path, format="commits")
    message = open_tokenizer(str(tokenizer)).get_special_token_id("<commit_msg>")
    assert rendered.examples[0].tokens.tolist().count(message) == 1


@pytest.mark.parametrize("model", ["starcoder2-3b", "qwen2.5-coder-0.5b"])
def test_tokenizer_without_commit_tokens_is_refused(
    tmp_path: Path, layout_tokenizers: dict[str, Path], model: str
) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [RECORD])
    with pytest.raises(DataError, match="starcoderbase-1b"):
        render_source(layout_tokenizers[model], path, format="commits")


def test_long_commit_is_split_without_loss_of_a_token(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [{**RECORD, "new_contents": "y = 1\n" * 200}])
    tokenizer = layout_tokenizers["starcoderbase-1b"]
    (whole,) = render_source(tokenizer, path, length=1 << 20, format="commits")
    (split,) = render_source(tokenizer, path, length=64, format="commits")
    assert len(split.examples) > 1
    assert [t for e in split.examples for t in e.tokens.tolist()] == whole.examples[0].tokens.tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"old_contents": 3}, "no_text"),
        ({"subject": None, "message": None}, "no_text"),
        ({"new_file": ["a"]}, "wrong_type"),
    ],
)
def test_record_that_is_no_commit_is_counted(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", [RECORD, {**RECORD, **change}])
    tally = DocumentStats()
    assert len(read(path, tally)) == 1
    assert tally.skipped == {reason: 1}


def test_columns_can_be_named(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    row = {"old": "x = 5\n", "why": "Change to pi", "new": "import math\nx = math.pi\n"}
    path = write_json_lines(tmp_path / "a.jsonl", [row])
    named = {"before": "old", "message": "why", "after": "new"}
    assert decode_source(layout_tokenizers["starcoderbase-1b"], path, format="commits", fields=named) == [GOLDEN]


LINES = st.lists(st.sampled_from(["a\n", "b\n", "\n", "c = 1\n"]), max_size=120).map("".join)


@given(LINES, LINES)
def test_window_holds_the_change_and_at_most_31_lines_around_it(before: str, after: str) -> None:
    shown, _, changed = build_commit_segments(before, "m", after, "window")
    old, new = shown.text, changed.text
    assert old in before
    assert new in after
    if (old, new) == (before, after):
        return
    starts = [at for at in range(len(before) + 1) if before.startswith(old, at)]
    # What was cut off in front and behind is the same on both sides: the change is inside.
    assert any(after == before[:start] + new + before[start + len(old) :] for start in starts)


def test_windows_are_drawn_from_the_texts_alone() -> None:
    before = "".join(f"x{number} = {number}\n" for number in range(400))
    cut = [build_commit_segments(before, "m", before.replace(f"x{n} =", f"y{n} ="), "window") for n in range(100, 300)]
    whole = sum(segments[0].text == before for segments in cut)
    assert 20 <= whole <= 60  # a fifth
    lines = [segments[0].text.count("\n") for segments in cut if segments[0].text != before]
    assert max(lines) <= 63
    assert min(lines) < 20
