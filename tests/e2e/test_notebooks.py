"""The notebooks: stored without outputs, and what they show of a real run is what is in its files."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from numpy.typing import NDArray

import fork_server
from launching import command, wait_for_step
from llm_training_toolkit.data.dataset import IGNORE_INDEX, PackedDataset
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.data.tokenizer import open_tokenizer
from llm_training_toolkit.families.qwen import TOKENS
from llm_training_toolkit.runs.directory import RunDirectory
from tiny_runs import tiny_config

FOLDER = Path(__file__).parents[2] / "notebooks"
GLOBAL_BATCH = 4
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)
"""Of the curves: training and held out."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run of three attempts: one ends at step 4, one is killed after step 12, one goes from 4 to 10 instead."""
    folder = tmp_path_factory.mktemp("notebooks")
    code = folder / "code"
    code.mkdir()
    for number in range(40):
        # The last character of each comment comes once in all files, so that no tokenizer has a token for it.
        lines = [
            f"# größe {number} 漢字 😀 <b>&amp;</b> <|fim_prefix|> {chr(0x4E00 + 40 * line + number)}\n"
            f"def f{number}(a):\n\treturn a < {number}\n"
            for line in range(1 + number % 4)
        ]
        (code / f"m_{number:02}.py").write_text("\n".join(lines))
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": "three"},
        "train": {"steps": 4, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 2},
        "eval": {"interval": 3},
        "checkpoint": {"interval": 1000, "keep_latest": 9},
        "cluster": {"workers": 0},
    }
    config = folder / "three.yaml"
    # JSON is YAML.
    config.write_text(tiny_config(code, folder / "runs", **sections).model_dump_json(exclude_unset=True))
    made = RunDirectory(folder / "runs" / "three")
    fork_server.run(command(config), check=True, capture_output=True)
    longer = command(config, "train.steps=400", "--extend")
    with fork_server.popen(longer, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_step(made, 12, process)
        process.send_signal(signal.SIGKILL)
    fork_server.run(command(config, "train.steps=10", "--extend"), check=True, capture_output=True)
    return made


def executed(name: str, run: RunDirectory, folder: Path, *, more: str = "") -> list[dict[str, Any]]:
    """Outputs of a notebook on a run, in order; `more` is a last cell of the test's own."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(more))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    changed = {"LTT_RUN": str(run.path), "IPYTHONDIR": str(folder / "ipython")}
    # A backend set for scripts, as CI machines do, would draw the pictures nowhere.
    client.execute(env={name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | changed)
    outputs: list[dict[str, Any]] = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    return outputs


def texts(outputs: list[dict[str, Any]], kind: str) -> list[str]:
    """What was shown of a kind, such as text/html."""
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


def tables(outputs: list[dict[str, Any]]) -> list[list[list[str]]]:
    """Every table that was shown, as rows of cells, headers included."""
    return [
        [
            [unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL)
        ]
        for html in texts(outputs, "text/html")
        if "<table" in html
    ]


def pictures(outputs: list[dict[str, Any]]) -> list[NDArray[np.uint8]]:
    """(height, width, 3) each, 0 to 255."""
    images = [base64.b64decode(text) for text in texts(outputs, "image/png")]
    return [np.rint(matplotlib.image.imread(io.BytesIO(image))[..., :3] * 255).astype(np.uint8) for image in images]


def width_of(colour: tuple[int, int, int], picture: NDArray[np.uint8]) -> float:
    """Share of a picture's columns of pixels in which a colour is found."""
    is_near = (np.abs(picture.astype(int) - np.array(colour)) < 12).all(axis=2)
    return float(is_near.any(axis=0).mean())


@pytest.fixture(scope="module")
def run_outputs(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `look_at_a_run.ipynb` shows of it, and last the speed of the steps that count."""
    more = "print(json.dumps(history['perf/tokens_per_second'].dropna().to_dict()))"
    return executed("look_at_a_run.ipynb", run, tmp_path_factory.mktemp("kernel"), more=more)


@pytest.mark.slow
def test_a_run_with_a_lost_attempt_is_shown_as_it_counts(run: RunDirectory, run_outputs: list[dict[str, Any]]) -> None:
    steps = [row for row in map(json.loads, run.metrics_path.read_text().splitlines()) if "train/loss" in row]
    counting = {str(row["step"]): row["perf/tokens_per_second"] for row in steps if row["attempt"] != 2}
    lost = sum(row["attempt"] == 2 for row in steps)
    assert list(counting) == [str(step) for step in range(1, 11)]
    assert lost >= 8
    assert json.loads(run_outputs[-1]["text"]) == counting

    what, taken, evaluations, attempts, checkpoints, data = tables(run_outputs)
    assert ["state", "finished"] in what
    assert [row[1] for row in taken[1:]] == ["10 of 10", str(lost)]
    assert [row[0] for row in evaluations[2:]] == ["0", "3", "4", "6", "9", "10"]
    columns = [attempts[0].index(name) for name in ("", "state", "steps", "taken again")]
    assert [[row[column] for column in columns] for row in attempts[1:]] == [
        ["1", "finished", "1 to 4", "0"],
        ["2", "lost", f"5 to {4 + lost}", str(lost)],
        ["3", "finished", "5 to 10", "0"],
    ]
    assert [[row[0], row[1], row[-1]] for row in checkpoints[1:]] == [
        ["step_000000004_a1", "4", ""],
        ["step_000000010_a3", "10", "step_000000004_a1"],
    ]
    source = DatasetInfo.from_json(run.dataset_info_path.read_text()).sources[0]
    numbers = (source.documents, source.held_out, "none", source.tokens, source.loss_tokens, source.longest)
    assert data[1] == [source.path, *(f"{number:,}" if isinstance(number, int) else number for number in numbers)]


@pytest.mark.slow
def test_a_runs_pictures_hold_its_curves(run_outputs: list[dict[str, Any]]) -> None:
    loss, rest = pictures(run_outputs)
    assert width_of(BLUE, loss) > 0.6
    assert width_of(ORANGE, loss) > 0.6
    row, column = rest.shape[0] // 2, rest.shape[1] // 2
    panels = [rest[:row, :column], rest[:row, column:], rest[row:, :column], rest[row:, column:]]
    assert all(width_of(BLUE, panel) > 0.6 for panel in panels)
    assert width_of(ORANGE, panels[1]) > 0.6


class Step(HTMLParser):
    """The sequences of a step as the notebook's HTML shows them: (text, classes) of each token, and where from."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.sequences: list[list[tuple[str, set[str]]]] = []
        self.origins: list[list[str]] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = set((dict(attrs).get("class") or "").split())
        if tag == "section":
            self.sequences.append([])
            self.origins.append([])
        elif self.sequences and tag == "span":
            self.sequences[-1].append(("", classes))
            self._inside = "token"
        elif self.sequences and "from" in classes:
            self._inside = "from"

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 - the parser's own name
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "from":
            self.origins[-1].append(data)
        elif self._inside == "token":
            text, classes = self.sequences[-1][-1]
            self.sequences[-1][-1] = (text + data, classes)


@pytest.fixture
def sequences(run: RunDirectory) -> PackedDataset:
    return PackedDataset(DatasetInfo.from_json(run.dataset_info_path.read_text()), global_batch=GLOBAL_BATCH)


@pytest.fixture(scope="module")
def data_outputs(run: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `look_at_data.ipynb` shows of its first step."""
    return executed("look_at_data.ipynb", run, tmp_path_factory.mktemp("kernel"))


@pytest.mark.slow
def test_a_steps_data_is_shown_to_the_token(sequences: PackedDataset, data_outputs: list[dict[str, Any]]) -> None:
    (shown,) = (Step(text) for text in texts(data_outputs, "text/html") if "<section>" in text)
    encoder = open_tokenizer(sequences.dataset_info.tokenizer_path)
    special = [encoder.get_special_token_id(marker) for marker in TOKENS.all]
    batch = sequences.get_micro_batches(0, range(GLOBAL_BATCH), GLOBAL_BATCH)[0]
    event_log = sequences.get_document_spans(0)
    assert len(shown.sequences) == len(event_log) == GLOBAL_BATCH
    for i, tokens in enumerate(shown.sequences):
        assert "".join(text for text, _ in tokens) == sequences.decode_sequence(0, i)
        ids = batch.input_ids[i, : len(tokens)].tolist()
        assert ["special" in classes for _, classes in tokens] == [number in special for number in ids]
        predicted = [False, *(batch.labels[i] != IGNORE_INDEX).tolist()][: len(tokens)]
        assert ["loss" in classes for _, classes in tokens] == predicted
        names = [
            f"{sequences.get_document_name(piece.source, piece.document)} · {piece.tokens} tokens"
            for piece in event_log[i]
        ]
        padding = 64 - len(tokens)
        assert all(name in origin for name, origin in zip(names, shown.origins[i], strict=False))
        assert shown.origins[i][len(names) :] == ([f"{padding} tokens of padding"] if padding else [])
    marks = [classes for tokens in shown.sequences for _, classes in tokens]
    assert sum("loss" in classes for classes in marks) == sequences.count_loss_tokens(0)
    # The corpus holds what is hard to show.
    assert {"loss", "special"} in marks
    assert {"special"} in marks
    assert any(not text for tokens in shown.sequences for text, _ in tokens), "a character of several tokens"
    assert any("<b>&amp;</b> <|fim_prefix|>" in sequences.decode_sequence(0, i) for i in range(GLOBAL_BATCH))


@pytest.mark.slow
def test_the_receipt_and_the_lengths_of_documents_are_shown(
    sequences: PackedDataset, data_outputs: list[dict[str, Any]]
) -> None:
    dataset_info = sequences.dataset_info
    sources, packing = tables(data_outputs)
    assert sources[1][0] == dataset_info.sources[0].path
    assert f"{dataset_info.sources[0].tokens:,}" in sources[1]
    assert ["sequences", f"{dataset_info.total_sequences:,} of 64 tokens"] in packing
    (histogram,) = pictures(data_outputs)
    for half in (histogram[:, : histogram.shape[1] // 2], histogram[:, histogram.shape[1] // 2 :]):
        assert width_of(BLUE, half) > 0.1


def stored() -> Iterator[Path]:
    yield from sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", stored(), ids=lambda path: path.name)
def test_a_notebook_is_stored_valid_and_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[] for _ in code]
    assert {cell.execution_count for cell in code} == {None}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_both_notebooks_are_there() -> None:
    assert {path.name for path in stored()} == {"look_at_a_run.ipynb", "look_at_data.ipynb"}
