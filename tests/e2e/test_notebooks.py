"""The notebooks: kept with what they showed, and executed again here with fewer steps and without Ray."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib.image
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from numpy.typing import NDArray

from llm_training_toolkit.data.collate import IGNORE_INDEX
from llm_training_toolkit.data.dataset import PackedDataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.families import FAMILIES
from llm_training_toolkit.runs.directory import RunDirectory

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("qwen_finetune", "starcoder_infill")
FAMILY_NAMES = {"qwen_finetune": "qwen3", "starcoder_infill": "starcoder2"}
STEPS = 6
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)
"""Of the curves: training and validation."""
SHORTER = {'"workers": 2': '"workers": 0', '"steps": 80': f'"steps": {STEPS}', '"interval": 20': '"interval": 3'}
Outputs = list[dict[str, Any]]


def execute(name: str, folder: Path) -> Outputs:
    """Execute a notebook with fewer steps; the last output is the directory of its run."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        for given, shorter in SHORTER.items():
            cell.source = cell.source.replace(given, shorter)
    notebook.cells.append(nbformat.v4.new_code_cell("print(result.run)"))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    changed = {"TMPDIR": str(folder), "IPYTHONDIR": str(folder / "ipython")}
    # A backend set for scripts, as CI machines do, would draw the pictures nowhere.
    client.execute(env={name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | changed)
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outputs]:
    """Outputs of both notebooks, executed side by side."""
    with ThreadPoolExecutor(len(NAMES)) as pool:
        return dict(zip(NAMES, pool.map(lambda name: execute(name, tmp_path_factory.mktemp(name)), NAMES), strict=True))


def texts(outputs: Outputs, kind: str) -> list[str]:
    """What was shown of a kind, such as text/html."""
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def pictures(outputs: Outputs) -> list[NDArray[np.uint8]]:
    """(height, width, 3) each, 0 to 255."""
    images = [base64.b64decode(text) for text in texts(outputs, "image/png")]
    return [np.rint(matplotlib.image.imread(io.BytesIO(image))[..., :3] * 255).astype(np.uint8) for image in images]


def width_of(colour: tuple[int, int, int], picture: NDArray[np.uint8]) -> float:
    """Share of a picture's columns of pixels in which a colour is found."""
    is_near = (np.abs(picture.astype(int) - np.array(colour)) < 12).all(axis=2)
    return float(is_near.any(axis=0).mean())


class Sequences(HTMLParser):
    """The sequences of a step as a notebook's HTML shows them: (text, classes) of each span."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sequences: list[list[tuple[str, set[str]]]] = []
        self._is_inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        if tag == "div":
            self.sequences.append([])
        self._is_inside = tag == "span"
        if self._is_inside:
            self.sequences[-1].append(("", classes))

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 - the parser's own name
        self._is_inside = False

    def handle_data(self, data: str) -> None:
        if self._is_inside:
            text, classes = self.sequences[-1][-1]
            self.sequences[-1][-1] = (text + data, classes)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_colours_of_a_notebook_are_the_labels_of_its_first_step(name: str, executed: dict[str, Outputs]) -> None:
    run = RunDirectory(Path(executed[name][-1]["text"].strip()))
    batch_size = json.loads(run.resolved_config_path.read_text())["train"]["global_batch_size"]
    dataset = PackedDataset(DatasetInfo.from_json(run.dataset_info_path.read_text()), global_batch=batch_size)
    encoder = open_tokenizer(dataset.dataset_info.tokenizer_path)
    markers = {encoder.get_special_token_id(text) for text in FAMILIES[FAMILY_NAMES[name]].special_tokens.all}
    batch = dataset.get_micro_batches(0, range(batch_size), batch_size)[0]
    html = next(text for text in texts(executed[name], "text/html") if 'class="ltt"' in text)
    shown = Sequences(html).sequences
    assert len(shown) == 2
    for row, (spans, pieces) in enumerate(zip(shown, dataset.get_document_spans(0), strict=False)):
        expected, begin = [], 0
        predicted = [False, *(batch.labels[row] != IGNORE_INDEX).tolist()]
        for piece in pieces:
            places = range(begin, begin + piece.tokens)
            kinds = groupby(places, key=lambda place: (predicted[place], int(batch.input_ids[row, place]) in markers))
            for (loss, special), group in kinds:
                names = {word for word, is_set in (("loss", loss), ("special", special)) if is_set}
                expected.append((encoder.decode(batch.input_ids[row, list(group)].tolist()), names))
            begin += piece.tokens
        assert spans == expected
    assert {"loss"} in [classes for spans in shown for _, classes in spans]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_trains_draws_and_lets_the_model_write(name: str, executed: dict[str, Outputs]) -> None:
    outputs = executed[name]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert f"('finished', {STEPS})" in texts(outputs, "text/plain")
    (curves,) = pictures(outputs)
    left = curves[:, : curves.shape[1] // 2]
    # Of 0.68 and 0.81; the end of one curve may lie under the other.
    assert min(width_of(BLUE, left), width_of(ORANGE, left)) > 0.5
    printed = "".join(output.get("text", "") for output in outputs)
    written = printed.count(" -> ") if name == "qwen_finetune" else texts(outputs, "text/html")[-1].count('"loss"')
    assert written == (3 if name == "qwen_finetune" else 1)
    assert any(re.fullmatch(r"'report.html: \d+ kB'", text) for text in texts(outputs, "text/plain"))


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_with_the_outputs_of_one_execution(name: str) -> None:
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert len(pictures(outputs)) == 1
    assert "('finished', 80)" in texts(outputs, "text/plain")
    assert not re.search(r"/(tmp|root|home|Users)/", path.read_text())
    assert path.stat().st_size < 200_000


def test_every_notebook_is_executed_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)
