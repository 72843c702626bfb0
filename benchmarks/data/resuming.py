"""From packed sequences on disk to the first batch after a resume, beside HF Trainer's skipping, in turns.

    python resuming.py ROUNDS SEQUENCE...

Both have the same million sequences of 128 tokens in memory-mapped files, both give ten sequences as tensors. Timed is
from opening the files until the batch is there: for the toolkit `Feed` and its batch of the step, for Trainer its
`get_train_dataloader`, accelerate's `skip_first_batches` and the first batch. Trainer has them once as a data set that
can be indexed, where it skips numbers, and once as a stream, where it has to read what it skips.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset

from llm_training_toolkit.data.dataloader import DataLoader
from llm_training_toolkit.data.prepare.arrow_store import ExampleStore, SourceExample, join_examples, write_examples
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, EpochInfo
from llm_training_toolkit.data.prepare.packing import pack_in_windows
from llm_training_toolkit.data.types import Example
from single_stream import describe_single_stream

LENGTH = 128
BATCH = 10
Row = dict[str, torch.Tensor]


class Rows(Dataset[Row]):
    """Packed sequences that can be indexed."""

    def __init__(self, path: Path) -> None:
        self._tokens = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> Row:
        row = torch.from_numpy(self._tokens[index].astype(np.int64))
        return {"input_ids": row, "labels": row}


class Stream(IterableDataset[Row]):
    """The same, one after the other."""

    def __init__(self, path: Path) -> None:
        self._rows = Rows(path)

    def __iter__(self) -> Iterator[Row]:
        return (self._rows[index] for index in range(len(self._rows)))


def moved(file: Path, to: Path) -> None:
    """Bring a file of tokens to its place."""
    file.replace(to)


def prepared(tokens: NDArray[np.uint32], folder: Path) -> DatasetInfo:
    """The sequences as `ltt prepare` leaves them, each an example of its own."""
    loss = np.ones(LENGTH, dtype=np.bool_)
    for name in ("part", "tokens", "plan", "tokenizer"):
        (folder / name).mkdir()
    write_examples(folder / "part", (SourceExample(0, Example(row, loss, i)) for i, row in enumerate(tokens)))
    join_examples([folder / "part"], folder / "tokens", moved)
    shutil.rmtree(folder / "part")
    examples = ExampleStore(folder / "tokens")
    plan = pack_in_windows(examples.batch, examples.length, LENGTH, targets=examples.targets)
    plan.write(folder / "plan")
    epoch = EpochInfo("tokens", "plan", len(plan), filled=tokens.size, lost=0)
    return describe_single_stream(folder, epoch, sequence_length=LENGTH, vocab_size=4096, eval_sequences=len(plan))


def by_toolkit(dataset_info: str, sequence: int) -> float:
    """Seconds until the toolkit's first batch."""
    start = time.perf_counter()
    dataloader = DataLoader(DatasetInfo.from_json(dataset_info), global_batch=BATCH, epochs=None)
    [batch] = dataloader.get_micro_batches(sequence // BATCH, range(BATCH), BATCH, 1)
    assert batch.input_ids.shape == (BATCH, LENGTH)
    return time.perf_counter() - start


def by_trainer(trainer: Any, rows: type[Rows] | type[Stream], path: Path, sequence: int) -> float:
    """Seconds until Trainer's first batch. Making the Trainer itself is not counted."""
    from accelerate import skip_first_batches

    start = time.perf_counter()
    trainer.train_dataset = rows(path)
    loader = skip_first_batches(trainer.get_train_dataloader(), sequence // BATCH)
    batch = next(iter(loader))
    assert batch["input_ids"].shape == (BATCH, LENGTH)
    return time.perf_counter() - start


def trainer_for(path: Path, folder: Path) -> Any:
    """A Trainer of a tiny model."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=10_000_000,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=Rows(path))


def measure(rounds: int, places: Sequence[int], folder: Path) -> dict[str, dict[int, list[float]]]:
    """Seconds by loader and place."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, 4096, (max(places) + BATCH, LENGTH), dtype=np.uint32)
    dataset_info = prepared(tokens, folder).to_json()
    np.save(folder / "rows.npy", tokens)
    trainer = trainer_for(folder / "rows.npy", folder)
    loaders: dict[str, Callable[[int], float]] = {
        "this toolkit": lambda place: by_toolkit(dataset_info, place),
        "HF Trainer, indexed": lambda place: by_trainer(trainer, Rows, folder / "rows.npy", place),
        "HF Trainer, stream": lambda place: by_trainer(trainer, Stream, folder / "rows.npy", place),
    }
    for load in loaders.values():
        load(0)  # what is imported or opened only once does not count
    found: dict[str, dict[int, list[float]]] = {name: {place: [] for place in places} for name in loaders}
    for _ in range(rounds):
        for place in places:
            for name, load in loaders.items():
                found[name][place].append(load(place))
    return found


def main() -> None:
    """Measure and print as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(int(sys.argv[1]), [int(place) for place in sys.argv[2:]], Path(folder))
    print(json.dumps({"seconds": found}), flush=True)


if __name__ == "__main__":
    main()
