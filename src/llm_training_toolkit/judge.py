"""What becomes of an update whose loss or gradient stands out: decided by all ranks together, before it is taken."""

from __future__ import annotations

from typing import Literal

from llm_training_toolkit.context import RunContext
from llm_training_toolkit.errors import TrainingError
from llm_training_toolkit.saving import CheckpointSaver, Progress
from llm_training_toolkit.spikes import FEWEST, MOST_IN_A_ROW, Taken, row_of_skips, spike

Policy = Literal["stop", "skip", "ignore"]


class Judge:
    """Judges one update, and says what follows where it is left out."""

    def __init__(self, policy: Policy, context: RunContext, progress: Progress, loss: float, loss_tokens: int) -> None:
        self._policy, self._context, self._progress = policy, context, progress
        self._loss, self._loss_tokens = loss, loss_tokens
        self.spike = ""
        """Why the update was left out, in words; empty where it was taken."""

    def allow(self, norm: float) -> bool:
        """Whether the update is taken; the engine asks once it knows the gradient's norm. All ranks go by rank 0.

        Collective once there are enough steps to compare with.
        """
        recent = self._progress.recent
        if self._policy == "ignore" or len(recent) < FEWEST:
            return True
        found = spike(Taken(self._loss, norm), self._loss_tokens, recent)
        [agreed] = self._context.sum(float(bool(found) and self._context.is_first))
        self.spike = (found or "rank 0 finds that it stands out") if agreed else ""
        return not agreed

    def settle(self, saver: CheckpointSaver, loss_sum: float, documents: str) -> None:
        """Say that the update was left out; `loss_sum` and `documents` are those of this rank. Collective.

        Raises TrainingError where that ends the run, which is then saved as it was before the update.
        """
        step = self._progress.step + 1
        _, highest = max(self._context.gather((loss_sum, documents)))
        what = f"step {step}: {self.spike} in the last {len(self._progress.recent)} steps"
        holds = f"The rank with the highest loss had: {highest}"
        before = row_of_skips(self._progress.skips, self._progress.step)
        if self._policy == "skip" and before < MOST_IN_A_ROW:
            if self._context.is_first:
                message = f"{what}; this update is left out. {holds}"
                self._context.report({"kind": "warning", "message": message})
            return
        saver.begin(self._progress)
        saved = f"a checkpoint of step {self._progress.step} is saved. {holds}"
        if self._policy == "skip":
            raise TrainingError(
                f"{what}, after {before} updates in a row that were left out: that is no spike any more; {saved}. "
                "failures.on_spike=ignore takes the updates; an earlier checkpoint with a lower optim.lr (--accept "
                "optim.lr) may be what it needs"
            )
        raise TrainingError(
            f"{what}; stopped before this update, {saved}. "
            "failures.on_spike=skip goes on without it, failures.on_spike=ignore takes it"
        )
