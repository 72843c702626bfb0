"""Files that the driver writes before the workers start."""

from __future__ import annotations

import json

from llm_training_toolkit.config import Config, dump_config_json, redact_config
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.plan import Plan
from llm_training_toolkit.runs.atomic_write import write_atomically
from llm_training_toolkit.runs.directory import RunDirectory, collect_environment


def write_run_files(run: RunDirectory, config: Config, plan: Plan, dataset_info: DatasetInfo) -> None:
    """Write all files that the workers read, after every check has passed."""
    write_atomically(run.resolved_config_path, dump_config_json(redact_config(config)))
    write_atomically(run.plan_path, json.dumps(plan.to_json(), indent=1))
    write_atomically(run.environment_path, json.dumps(collect_environment(), indent=1))
    write_atomically(run.dataset_info_path, dataset_info.to_json())
    if dataset_info.fault_report is not None:
        write_atomically(run.fault_report_path, dataset_info.fault_report.read_text(encoding="utf-8"))
