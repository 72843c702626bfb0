"""Files that the driver writes before the workers start."""

from __future__ import annotations

import json

from llm_training_toolkit.config import Config, to_json
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.plan import Plan
from llm_training_toolkit.runs.directory import RunDirectory, environment, write_atomically


def write_down(run: RunDirectory, config: Config, plan: Plan, receipt: Receipt) -> None:
    """Write everything the workers read, once nothing stands against the start any more."""
    write_atomically(run.resolved, to_json(config))
    write_atomically(run.plan, json.dumps(plan.to_json(), indent=1))
    write_atomically(run.environment, json.dumps(environment(), indent=1))
    write_atomically(run.receipt, receipt.to_json())
