"""Layouts of Jupyter notebooks: chains of text, code and output, or a script.

Source: bigcode-dataset, preprocessing/jupyter-structured, which made the data of StarCoder (Li et al. 2023, section
5.1) and StarCoder2 (Lozhkov et al. 2024, section 5.4):
`<jupyter_start><jupyter_text>text<jupyter_code>code<jupyter_output>output<jupyter_text>…<|endoftext|>`. Neighbouring
cells of a kind are joined, the last one's first output is shown up to 1,000 characters, `<empty_output>` stands for
none. The script also strips Markdown of line breaks, `#` and tags, and drops code in front of the first text and text
behind the last code: here nothing of a cell is dropped. Scripts: StarCoder2, section 5.4:
`<jupyter_script>code<|endoftext|>`; in StarCoder 1 the code alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from llm_training_toolkit.data.layouts.marked_content import InvalidLayoutRecord
from llm_training_toolkit.data.types import MarkedText
from llm_training_toolkit.families.document_layouts import (
    EMPTY_OUTPUT,
    JUPYTER_CODE,
    JUPYTER_OUTPUT,
    JUPYTER_SCRIPT,
    JUPYTER_START,
    JUPYTER_TEXT,
)

_OUTPUT_CHARACTERS = 1000
_LINE_COMMENTS = {"c++": "//", "java": "//", "javascript": "//", "rust": "//", "scala": "//", "typescript": "//"}


class _Cell(NamedTuple):
    """Cell of a notebook; `output` is the text of its first output."""

    is_code: bool
    source: str
    output: str


def parse_notebook(content: str, *, as_script: bool) -> tuple[MarkedText, ...]:
    """Return the segments of a notebook in JSON (nbformat 3 or 4). Raises InvalidLayoutRecord if it is none."""
    try:
        notebook = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidLayoutRecord(f"is no notebook in JSON ({error})", "invalid_json") from error
    cells = [cell for cell in _read_cells(notebook) if cell.source.strip()]
    if as_script:
        return _build_script(cells, _LINE_COMMENTS.get(_read_language(notebook), "#"))
    return tuple(_build_chain(cells))


def _build_chain(cells: Sequence[_Cell]) -> Iterator[MarkedText]:
    start: tuple[str, ...] = (JUPYTER_START,)
    for is_code, group in groupby(cells, key=lambda cell: cell.is_code):
        joined = list(group)
        if is_code:
            yield MarkedText((*start, JUPYTER_CODE), "\n".join(cell.source for cell in joined).strip("\r\n"))
            yield _build_output(joined[-1].output)
        else:
            yield MarkedText((*start, JUPYTER_TEXT), "\n\n".join(cell.source for cell in joined).strip("\r\n"))
        start = ()


def _build_output(output: str) -> MarkedText:
    shown = output if len(output) <= _OUTPUT_CHARACTERS else output[:_OUTPUT_CHARACTERS] + "[...]"
    if shown.strip():
        return MarkedText((JUPYTER_OUTPUT,), shown.strip("\r\n"))
    return MarkedText((JUPYTER_OUTPUT, EMPTY_OUTPUT), "")


def _build_script(cells: Sequence[_Cell], comment: str) -> tuple[MarkedText, ...]:
    """Build a script: code as it is, text as comments, an empty line between cells (jupytext's light format)."""
    written = [cell.source.strip("\r\n") if cell.is_code else _comment_out(cell.source, comment) for cell in cells]
    return (MarkedText((JUPYTER_SCRIPT,), "\n\n".join(written) + "\n"),) if written else ()


def _comment_out(text: str, comment: str) -> str:
    return "\n".join(f"{comment} {line}".rstrip() for line in text.strip("\r\n").split("\n"))


def _read_cells(notebook: Any) -> Iterator[_Cell]:  # noqa: ANN401 - whatever JSON can say
    if not isinstance(notebook, Mapping):
        raise InvalidLayoutRecord("is no notebook (no object)", "no_text")
    sheets = notebook.get("worksheets", [notebook])  # nbformat 3 has sheets of cells
    for sheet in sheets if isinstance(sheets, list) else ():
        cells = sheet.get("cells") if isinstance(sheet, Mapping) else None
        if not isinstance(cells, list) or not all(isinstance(cell, Mapping) for cell in cells):
            raise InvalidLayoutRecord("is no notebook (no list of cells)", "no_text")
        for cell in cells:
            source = cell["source"] if "source" in cell else cell.get("input", "")
            yield _Cell(cell.get("cell_type") == "code", _join_lines(source), _read_first_output(cell))


def _read_first_output(cell: Mapping[str, Any]) -> str:
    outputs = cell.get("outputs")
    first = outputs[0] if isinstance(outputs, list) and outputs else {}
    data = first.get("data") if isinstance(first, Mapping) else None
    shown = data.get("text/plain") if isinstance(data, Mapping) else None
    text = first["text"] if isinstance(first, Mapping) and "text" in first else shown
    return "" if text is None else _join_lines(text)


def _join_lines(source: Any) -> str:  # noqa: ANN401 - whatever JSON can say
    """Return a text of a notebook, which may be a list of lines."""
    text = "".join(source) if isinstance(source, list) and all(isinstance(line, str) for line in source) else source
    if not isinstance(text, str):
        raise InvalidLayoutRecord(f"a cell's text is {type(text).__name__}, not a string", "wrong_type")
    return text


def _read_language(notebook: Mapping[str, Any]) -> str:
    metadata = notebook.get("metadata")
    kernel = metadata.get("kernelspec") if isinstance(metadata, Mapping) else None
    info = metadata.get("language_info") if isinstance(metadata, Mapping) else None
    name = info.get("name") if isinstance(info, Mapping) else None
    return str(name or (kernel.get("language") if isinstance(kernel, Mapping) else "") or "").lower()
