"""Everything a run is made of, as the loop gets it: built by `launch/worker.py`, run by `train.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from llm_training_toolkit.checkpoint.manager import CheckpointManager
from llm_training_toolkit.checkpoint.state import TrainState
from llm_training_toolkit.data.dataloader import DataLoader
from llm_training_toolkit.distributed.context import RunContext, StopRequest
from llm_training_toolkit.engine import Engine
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.plan import LRSchedule, Plan
from llm_training_toolkit.runs.goodput import GoodputTracker
from llm_training_toolkit.train.loss_spikes import SpikePolicy
from llm_training_toolkit.train.stragglers import StragglerDetector

LoopStatus = Literal["finished", "stopped", "left"]
"""How the loop ended; `left` = other workers are to go on from the checkpoint just written."""


class InTrainingTasks(Protocol):
    """Tasks that are carried out between two steps, on the checkpoint of the first."""

    def has_due_tasks(self, step: int) -> bool:
        """Whether some are, after `step` steps."""
        ...

    def run_due_tasks(self, step: int) -> StopRequest:
        """Do so, unless it was done before; what is wished of the run meanwhile. Collective."""
        ...


@dataclass(frozen=True)
class TrainerComponents:
    """Everything a run is made of."""

    plan: Plan
    schedule: LRSchedule
    seed: int
    context: RunContext
    engine: Engine
    dataloader: DataLoader
    checkpoint_manager: CheckpointManager
    metrics: Metrics
    attempt: int
    goodput_tracker: GoodputTracker
    """Where the time goes."""
    initial_state: TrainState
    """Where this attempt goes on from."""
    in_training_tasks: InTrainingTasks
    on_spike: SpikePolicy = "stop"
    straggler_detector: StragglerDetector = field(default_factory=StragglerDetector)
