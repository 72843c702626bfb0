"""Events that a rank reports to the driver and the console: frozen dataclasses, matched by class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoteEvent:
    """A line for the user."""

    message: str


@dataclass(frozen=True)
class WarningEvent:
    """A warning for the user."""

    message: str


@dataclass(frozen=True)
class StageEvent:
    """Progress of a stage before the first step or after the last one."""

    name: str
    done: int
    total: int
    """0 = unknown."""


@dataclass(frozen=True)
class StepEvent:
    """A completed optimizer step."""

    step: int
    steps: int
    loss: float
    lr: float
    tokens_per_second: float
    seconds: float
    """Duration of the step."""
    time: float
    """Completion, in seconds since 1970 by the worker's clock."""
    tflops: float
    """FLOPs of the model per second and device, in 10^12."""
    mfu: float | None = None
    """Share of the device's peak, or None without a published peak."""


@dataclass(frozen=True)
class EvalEvent:
    """Validation loss after a step."""

    step: int
    loss: float
    bits_per_byte: float


@dataclass(frozen=True)
class CheckpointEvent:
    """A complete checkpoint."""

    step: int
    path: str


@dataclass(frozen=True)
class StragglerEvent:
    """A rank that is slower than the others."""

    rank: int
    ratio: float
    """Seconds of its own work per step, relative to the other ranks."""
    address: str | None = None
    """Node address, filled in by the driver."""


@dataclass(frozen=True)
class SampleEvent:
    """Generated text and the prompt around it."""

    title: str
    prefix: str
    written: str
    suffix: str = ""


@dataclass(frozen=True)
class RungEvent:
    """A trial that waits at a rung for the driver's decision."""

    step: int


@dataclass(frozen=True)
class WorkerStartedEvent:
    """A rank's process, as it starts."""

    rank: int
    node: str
    """Node id."""
    address: str
    pid: int
    started: float
    """Start time of the process in seconds since 1970, because process ids are reused."""
    actor: str
    """Actor id."""
    placement_group: str
    """Id of the placement group of all ranks."""


@dataclass(frozen=True)
class WorkerErrorEvent:
    """An exception that ends a rank."""

    rank: int
    phase: str
    type: str
    text: str
    final: bool
    """A new worker group would meet the same error."""
    helped: bool
    """The next worker group starts with a remedy, such as a smaller micro-batch."""


Event = (
    NoteEvent
    | WarningEvent
    | StageEvent
    | StepEvent
    | EvalEvent
    | CheckpointEvent
    | StragglerEvent
    | SampleEvent
    | RungEvent
    | WorkerStartedEvent
    | WorkerErrorEvent
)
