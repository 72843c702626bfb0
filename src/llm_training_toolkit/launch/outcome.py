"""What a command reports when it ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["finished", "stopped", "failed"]
EXIT_CODES: dict[Status, int] = {"finished": 0, "stopped": 75, "failed": 1}
"""75 = stopped, the same command resumes: what Slurm's requeue and a Kubernetes back-off look for."""


@dataclass(frozen=True)
class Outcome:
    """How a run stands."""

    run: str
    """Its directory."""
    step: int
    status: Status
    checkpoint: str | None
    """Its newest checkpoint."""

    def to_json(self) -> dict[str, Any]:
        """The contract of `ltt train --json`."""
        return asdict(self)
