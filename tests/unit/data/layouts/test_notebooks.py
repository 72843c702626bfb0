"""Notebooks: chains and scripts as StarCoder read them, from files and records, in both formats of notebooks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from layout_tokens import decode_source, render_source
from llm_training_toolkit.config.source_config import SourceConfig
from llm_training_toolkit.data.sources import DocumentStats, list_source_files, read_source_documents
from llm_training_toolkit.errors import DataError
from record_sets import write_json_lines


def code(source: Any, *outputs: dict[str, Any]) -> dict[str, Any]:
    return {"cell_type": "code", "source": source, "outputs": list(outputs), "execution_count": 1, "metadata": {}}


def text(source: Any) -> dict[str, Any]:
    return {"cell_type": "markdown", "source": source, "metadata": {}}


def stream(said: Any) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": said}


CELLS = [
    text(["# Sums\n", "of *numbers*"]),
    code("import math\n"),
    code(["x = 1\n", "print(x)"], stream(["1\n"])),
    text("Then"),
    text("more"),
    code("x + 1", {"output_type": "execute_result", "data": {"text/plain": "2", "text/html": "<b>2</b>"}}),
    code("   "),
    text("The plot"),
    code("plot()", {"output_type": "display_data", "data": {"image/png": "aaaa"}}),
]
NOTEBOOK = {"nbformat": 4, "metadata": {"language_info": {"name": "python"}}, "cells": CELLS}
GOLDEN = (
    "<jupyter_start><jupyter_text># Sums\nof *numbers*"
    "<jupyter_code>import math\n\nx = 1\nprint(x)<jupyter_output>1"
    "<jupyter_text>Then\n\nmore<jupyter_code>x + 1<jupyter_output>2"
    "<jupyter_text>The plot<jupyter_code>plot()<jupyter_output><empty_output><|endoftext|>"
)
SCRIPT = (
    "# # Sums\n# of *numbers*\n\nimport math\n\nx = 1\nprint(x)\n\n# Then\n\n# more\n\nx + 1\n\n# The plot\n\nplot()\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "a.ipynb").write_text(json.dumps(NOTEBOOK), encoding="utf-8")
    (folder / "other.py").write_text("x = 1\n")
    return folder


@pytest.mark.parametrize("model", ["starcoderbase-1b", "starcoder2-3b"])
def test_notebook_is_written_as_starcoder_read_it(folder: Path, layout_tokenizers: dict[str, Path], model: str) -> None:
    assert decode_source(layout_tokenizers[model], folder, format="notebooks") == [GOLDEN]


def test_records_have_the_notebook_or_its_markers(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    rows = [
        {"content": json.dumps(NOTEBOOK), "max_stars_repo_name": "me/app", "max_stars_repo_path": "a.ipynb"},
        {"content": GOLDEN.removesuffix("<|endoftext|>") + "<jupyter_text>End"},
    ]
    path = write_json_lines(tmp_path / "a.jsonl", rows)
    written = decode_source(layout_tokenizers["starcoder2-3b"], path, format="notebooks")
    assert written == [GOLDEN, GOLDEN.replace("<|endoftext|>", "<jupyter_text>End<|endoftext|>")]
    first = next(read_source_documents(SourceConfig(path=str(path), format="notebooks"), 0))
    assert (first.repository, first.path) == ("me/app", "a.ipynb")


@pytest.mark.parametrize(
    ("model", "marker"), [("starcoderbase-1b", ""), ("starcoder2-3b", "<jupyter_script>"), ("qwen2.5-coder-0.5b", "")]
)
def test_script_is_code_behind_the_token_of_starcoder2(
    folder: Path, layout_tokenizers: dict[str, Path], model: str, marker: str
) -> None:
    written = decode_source(layout_tokenizers[model], folder, format="notebooks", layout="script")
    assert written == [f"{marker}{SCRIPT}<|endoftext|>"]


def test_long_output_is_cut_as_published(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    cells = [code("f()", stream("x" * 1000)), text("then"), code("f()", stream("x" * 1001))]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    (written,) = decode_source(layout_tokenizers["starcoder2-3b"], tmp_path, format="notebooks")
    assert [part.split("<")[0] for part in written.split("<jupyter_output>")[1:]] == ["x" * 1000, "x" * 1000 + "[...]"]


def test_first_lines_keep_their_indentation(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    cells = [text("\n    code in text\n"), code("\n    x = 1\n    y = 2\n", stream("   a  b\n0  1  2\n"))]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    written = [
        "<jupyter_start><jupyter_text>    code in text<jupyter_code>    x = 1\n    y = 2"
        "<jupyter_output>   a  b\n0  1  2<|endoftext|>"
    ]
    assert decode_source(layout_tokenizers["starcoder2-3b"], tmp_path, format="notebooks") == written


@pytest.mark.parametrize("output", [stream(None), {"output_type": "display_data", "data": {"text/plain": None}}])
def test_output_without_text_is_empty(
    tmp_path: Path, layout_tokenizers: dict[str, Path], output: dict[str, Any]
) -> None:
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [code("f()", output)], "metadata": {}}))
    written = ["<jupyter_start><jupyter_code>f()<jupyter_output><empty_output><|endoftext|>"]
    assert decode_source(layout_tokenizers["starcoder2-3b"], tmp_path, format="notebooks") == written


def test_notebook_of_format_3_is_read(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    cells = [{"cell_type": "code", "input": ["x = 1"], "outputs": [{"output_type": "pyout", "text": ["1"]}]}]
    (tmp_path / "a.ipynb").write_text(json.dumps({"worksheets": [{"cells": cells}], "metadata": {}}))
    written = ["<jupyter_start><jupyter_code>x = 1<jupyter_output>1<|endoftext|>"]
    assert decode_source(layout_tokenizers["starcoder2-3b"], tmp_path, format="notebooks") == written


def test_comments_of_a_script_are_those_of_its_language(tmp_path: Path, layout_tokenizers: dict[str, Path]) -> None:
    notebook = {"cells": [text("a\n\nb"), code("val x = 1")], "metadata": {"kernelspec": {"language": "scala"}}}
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook))
    written = decode_source(layout_tokenizers["qwen2.5-coder-0.5b"], tmp_path, format="notebooks", layout="script")
    assert written == ["// a\n//\n// b\n\nval x = 1\n<|endoftext|>"]


def test_tokenizer_without_notebook_tokens_is_refused(folder: Path, layout_tokenizers: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="starcoder2-3b"):
        render_source(layout_tokenizers["qwen2.5-coder-0.5b"], folder, format="notebooks")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "invalid_json"),
        ("[" * 2000, "invalid_json"),
        ("3", "no_text"),
        ("{}", "no_text"),
        ('{"cells": [3]}', "no_text"),
        ('{"cells": [{"cell_type": "code", "source": 3}]}', "wrong_type"),
        ('{"cells": [{"source": "' + "x" * 3200 + '"}]}', "too_large"),
    ],
)
def test_file_that_is_no_notebook_is_counted(folder: Path, content: str, reason: str) -> None:
    (folder / "b.ipynb").write_text(content)
    tally = DocumentStats()
    source = SourceConfig(path=str(folder), format="notebooks", max_document_mb=0.003)
    assert [file.name for file in list_source_files(source)] == ["a.ipynb", "b.ipynb"]
    assert len(list(read_source_documents(source, 0, on_error="collect", tally=tally))) == 1
    assert tally.skipped == {reason: 1}
    assert not tally.lost_files
