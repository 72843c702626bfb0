"""Components of the training loop: built by `worker/main.py`, used by `train/loop.py`."""

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
from llm_training_toolkit.train.compute_meter import ComputeMeter
from llm_training_toolkit.train.loss_spikes import SpikePolicy
from llm_training_toolkit.train.profiler import StepProfiler
from llm_training_toolkit.train.stragglers import StragglerDetector

# How the loop ended; drained = other workers resume from the checkpoint just written.
LoopStatus = Literal["finished", "stopped", "drained"]


class InTrainingTasks(Protocol):
    """Evaluation tasks that run between two steps, on the checkpoint of the first."""

    def has_due_tasks(self, step: int) -> bool:
        """Return whether tasks are due after `step` steps."""
        ...

    def run_due_tasks(self, step: int) -> StopRequest:
        """Run the due tasks, unless already done, and return the stop request that arrived meanwhile. Collective."""
        ...


@dataclass(frozen=True)
class TrainerComponents:
    """Everything that the training loop uses."""

    plan: Plan
    lr_schedule: LRSchedule
    seed: int
    context: RunContext
    engine: Engine
    dataloader: DataLoader
    checkpoint_manager: CheckpointManager
    metrics: Metrics
    attempt: int
    goodput_tracker: GoodputTracker
    """Seconds of the run by category."""
    initial_state: TrainState
    """State that this attempt starts from."""
    in_training_tasks: InTrainingTasks
    compute_meter: ComputeMeter
    step_profiler: StepProfiler
    on_spike: SpikePolicy = "stop"
    straggler_detector: StragglerDetector = field(default_factory=StragglerDetector)

    @property
    def replica(self) -> int:
        """Replica of this rank: ranks of one replica work on the same sequences."""
        return self.context.rank // self.plan.ranks_per_replica

    @property
    def replicas(self) -> int:
        """Number of replicas, among which the sequences of a step are divided."""
        return self.context.world_size // self.plan.ranks_per_replica
