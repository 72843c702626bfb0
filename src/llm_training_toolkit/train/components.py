"""Everything a run is made of, as the loop gets it: built by `launch/worker.py`, run by `train.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

from llm_training_toolkit.checkpoint.manager import CheckpointSaver
from llm_training_toolkit.checkpoint.state import Progress
from llm_training_toolkit.data.dataloader import Feed
from llm_training_toolkit.distributed.context import RunContext, Wish
from llm_training_toolkit.engine import Engine
from llm_training_toolkit.monitoring.metrics import Metrics
from llm_training_toolkit.plan import Plan, Schedule
from llm_training_toolkit.runs.goodput import Account
from llm_training_toolkit.train.loss_spikes import Policy
from llm_training_toolkit.train.stragglers import Pace

Status = Literal["finished", "stopped", "left"]
"""How the loop ended; `left` = other workers are to go on from the checkpoint just written."""


class Midway(Protocol):
    """Tasks that are carried out between two steps, on the checkpoint of the first."""

    def due(self, step: int) -> bool:
        """Whether some are, after `step` steps."""
        ...

    def carry_out(self, step: int) -> Wish:
        """Do so, unless it was done before; what is wished of the run meanwhile. Collective."""
        ...


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of."""

    plan: Plan
    schedule: Schedule
    seed: int
    context: RunContext
    engine: Engine
    feed: Feed
    saver: CheckpointSaver
    metrics: Metrics
    attempt: int
    account: Account
    """Where the time goes."""
    origin: Progress
    """Where this attempt goes on from."""
    midway: Midway
    on_spike: Policy = "stop"
    pace: Pace = field(default_factory=Pace)
