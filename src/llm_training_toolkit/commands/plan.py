"""`ltt plan`: a run as it would be on this machine, or on the cluster of a file."""

from __future__ import annotations

from pathlib import Path

from llm_training_toolkit.config import Config
from llm_training_toolkit.plan import ClusterEstimate, Plan, estimate_on_cluster, make_plan, resolve_for_hardware


def plan_run(config: Config, cluster: Path | None = None) -> tuple[Plan, ClusterEstimate | None]:
    """Return the plan of a run with all its problems, and its estimate on the cluster of a file.

    Raises PlanError only if nothing can be planned, ConfigError for a bad cluster file.
    """
    if cluster is None:
        from llm_training_toolkit.worker.precision import keep_begun_precision, resolve_local_precision

        config, notes = resolve_local_precision(keep_begun_precision(config))
        return make_plan(config).with_notes(notes), None
    from llm_training_toolkit.plan.cluster_file import read_hardware

    hardware = read_hardware(cluster)
    config, reasons = resolve_for_hardware(config, hardware)
    plan = make_plan(config).with_notes(reasons)
    estimate = estimate_on_cluster(config, plan, hardware)
    return estimate.add_to_plan(plan), estimate
