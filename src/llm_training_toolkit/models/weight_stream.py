"""Pretrained weights, tensor by tensor from their files to the device, read by one rank of each machine.

The other ranks of a machine receive each tensor by broadcast. A rank's host memory holds its model if the device is the
CPU, and otherwise one chunk of a tensor.

Before each tensor the ranks of a machine tell each other whether one of them has failed. If so they stop there, and
all ranks of the run raise its error, those of other machines after their last tensor. Names, conversions and ties are
left to transformers, which takes the tensors as a state dict.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.distributed.node_group import NodeGroup
from llm_training_toolkit.errors import CheckpointError, ToolkitError
from llm_training_toolkit.models.check_weights import LOAD_ERRORS, check_pretrained_weights, read_hf_config
from llm_training_toolkit.plan.memory.host_memory import LOADING_CHUNK_BYTES

_FILE_ERRORS = (*LOAD_ERRORS, KeyError, TypeError)  # the last two from headers and indexes of another form


@dataclass(frozen=True)
class TensorEntry:
    """Place of a tensor in its file."""

    file: str
    offset: int
    """First byte in the file."""
    dtype: str
    """As in the header, such as BF16."""
    shape: tuple[int, ...]


class StreamedTensor:
    """Tensor that is read, or received, when transformers indexes it as it does a slice of safetensors."""

    def __init__(self, stream: WeightStream, name: str, entry: TensorEntry) -> None:
        self._stream, self._name, self._entry = stream, name, entry

    def get_shape(self) -> list[int]:
        """Return the shape, without reading the values."""
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """Return the dtype as safetensors names it."""
        return self._entry.dtype

    def __getitem__(self, index: Any) -> Tensor:  # noqa: ANN401 - whatever a tensor takes
        """Return the tensor on the device, of the file's dtype. Collective among the ranks of the machine."""
        tensor = self._stream.load_tensor(self._name)
        return tensor if index is Ellipsis else tensor[index]


class _PeerError(RuntimeError):
    """Failure of another rank of the machine, which has its cause."""


class WeightStream:
    """Tensors of a directory of safetensors, for the ranks of one machine."""

    def __init__(self, directory: str, context: RunContext, node: NodeGroup) -> None:
        """Read the headers. Collective: raises CheckpointError on every rank if one of them cannot."""
        self.directory, self.device = Path(directory).expanduser(), context.device
        self._context, self._node = context, node
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()
        self._staging: Tensor | None = None
        self._failure: Exception | None = None
        self._ranks_are_in_step = True
        entries: dict[str, TensorEntry] = {}
        failure: CheckpointError | None = None
        if node.is_reader:
            try:
                entries = self._open_files()
            except _FILE_ERRORS as error:
                failure = CheckpointError(f"{self.directory}: the weights cannot be read: {error}")
        with self._stack:
            _raise_first(failure, context)
            self._entries = node.broadcast_object(entries)
            self._stack = self._stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._staging = None

    def get_state_dict(self) -> dict[str, Any]:
        """Return every tensor by its name in the files."""
        return {name: StreamedTensor(self, name, entry) for name, entry in self._entries.items()}

    def load_tensor(self, name: str) -> Tensor:
        """Return a tensor on the device. Every rank of the machine must ask for the same ones in the same order.

        Raises OSError if the file cannot be read, RuntimeError if another rank of the machine has failed.
        """
        if self._failure is not None:
            raise self._failure  # transformers collects some errors, and continues with the next tensor
        try:
            return self._load_together(name)
        except Exception as error:
            self._failure = error
            raise

    def _load_together(self, name: str) -> Tensor:
        entry = self._entries[name]
        self._context.heartbeat.keepalive(f"loading {name}")
        tensor = torch.empty(entry.shape, dtype=str_to_torch_dtype[entry.dtype], device=self.device)
        if self._node.is_reader:
            self._read_into(tensor.view(-1).view(torch.uint8), entry)
        self._exchange_failure(has_failed=False)
        with self._in_collective():
            self._node.broadcast(tensor)
        return tensor

    @contextmanager
    def raise_together(self, describe: Callable[[Exception], CheckpointError]) -> Iterator[None]:
        """Raise the CheckpointError of the lowest rank that fails in this block, on every rank. Collective.

        In the block every rank loads all tensors. `describe` makes a CheckpointError of another error of this rank.
        """
        failure: CheckpointError | None = None
        cause: Exception | None = None
        try:
            yield
            if self._failure is not None:
                raise self._failure  # transformers collected it, and returned a model
        except Exception as error:  # of any library: the other ranks wait for the next tensor
            if not self._ranks_are_in_step:
                raise  # a collective failed, so that the ranks cannot tell each other anything
            cause = self._failure or error
            if not isinstance(cause, _PeerError):
                failure = cause if isinstance(cause, CheckpointError) else describe(cause)
        if not isinstance(cause, _PeerError):
            with suppress(_PeerError):  # its cause follows
                self._exchange_failure(has_failed=failure is not None)
        try:
            _raise_first(failure, self._context)
        except CheckpointError as first:
            # Of this rank's own failure, though the error is perhaps another rank's: a gathered one is a copy.
            raise first from (None if isinstance(cause, _PeerError) else cause)

    def _exchange_failure(self, *, has_failed: bool) -> None:
        """Raise _PeerError if another rank of the machine has failed. Collective among them."""
        with self._in_collective():
            any_failed = self._node.any_rank(has_failed, self.device)
        if any_failed and not has_failed:
            raise _PeerError("another rank of this machine could not load the weights")

    @contextmanager
    def _in_collective(self) -> Iterator[None]:
        """Remember an error in this block: after it, ranks may wait at different places."""
        self._ranks_are_in_step = False
        yield
        self._ranks_are_in_step = True

    def _open_files(self) -> dict[str, TensorEntry]:
        entries: dict[str, TensorEntry] = {}
        for name in _list_files(self.directory):
            path = self.directory / name
            with safe_open(path, framework="pt"):  # raises if the header or the length of the file is wrong
                pass
            self._files[name] = file = self._stack.enter_context(path.open("rb", buffering=0))
            entries |= dict(_read_header(file, name))
        return entries

    def _read_into(self, values: Tensor, entry: TensorEntry) -> None:
        """Read the bytes of a tensor into `values` (bytes), by chunks if they are not in host memory."""
        file = self._files[entry.file]
        if values.device.type == "cpu":
            _read_exactly(file, values, entry.offset)
            return
        if self._staging is None:
            pinned = values.device.type == "cuda"
            self._staging = torch.empty(LOADING_CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned)
        for start in range(0, len(values), LOADING_CHUNK_BYTES):
            part = values[start : start + LOADING_CHUNK_BYTES]
            staged = self._staging[: len(part)]
            _read_exactly(file, staged, entry.offset + start)
            part.copy_(staged)


@contextmanager
def load_in_order() -> Iterator[None]:
    """Make transformers ask for tensors one after another inside the block, in an order that all ranks share.

    Its threads would read ahead, in an order of their own, and fill host memory.
    """
    key = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        with suppress(KeyError):
            del os.environ[key]
        if before is not None:
            os.environ[key] = before


def check_weights_by_readers(path: str, model_type: str, context: RunContext, node: NodeGroup) -> None:
    """Check the weights on one rank of each machine, and on all that they can read the configuration. Collective.

    Every rank raises the error of the lowest one that has one.
    """
    failure: ToolkitError | None = None
    try:
        if node.is_reader:
            check_pretrained_weights(path, model_type)
        else:
            read_hf_config(path, model_type)
    except ToolkitError as error:
        failure = error
    _raise_first(failure, context)


def _raise_first(failure: ToolkitError | None, context: RunContext) -> None:
    """Raise the failure of the lowest rank that has one, on every rank. Collective."""
    for each in context.all_gather_object(failure):
        if each is not None:
            raise each


def _list_files(directory: Path) -> list[str]:
    """Return the names of the files that transformers would read: the only one, or those of the index."""
    if (directory / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = json.loads((directory / "model.safetensors.index.json").read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()))


def _read_header(file: BinaryIO, name: str) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the tensors of a safetensors file: length of the header in 8 bytes, header in JSON, then the values."""
    length = int.from_bytes(file.read(8), "little")
    header: Mapping[str, Any] = json.loads(file.read(length))
    for key, value in header.items():
        if key != "__metadata__":
            yield key, TensorEntry(name, 8 + length + value["data_offsets"][0], value["dtype"], tuple(value["shape"]))


def _read_exactly(file: BinaryIO, values: Tensor, offset: int) -> None:
    """Fill `values` (bytes in host memory) from `offset` on. Raises OSError if the file ends before."""
    view, done = values.numpy().data, 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], offset + done)
        if count == 0:
            raise OSError(f"{file.name} ends at byte {offset + done:,}, within a tensor")
        done += count
