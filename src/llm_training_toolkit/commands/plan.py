"""`ltt plan`: a run as it would be on this machine, or on the cluster of a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.plan import (
    ClusterEstimate,
    MeasuredSpeed,
    Plan,
    estimate_on_cluster,
    make_plan,
    resolve_for_hardware,
)
from llm_training_toolkit.plan.forecast.settings_search import SettingsSearch, search_settings
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.status import read_run_speed
from llm_training_toolkit.runs.storage.open import get_run_location
from llm_training_toolkit.setup.stored_plan import recall_stored_plan

if TYPE_CHECKING:
    from llm_training_toolkit.setup.hub_weights import HubAnswer


def plan_run(config: Config, cluster: Path | None = None) -> tuple[Plan, ClusterEstimate | None]:
    """Return the plan of a run with all its problems, and its estimate on the cluster of a file.

    Raises PlanError only if nothing can be planned, ConfigError for a bad cluster file.
    """
    config, answer = _ask_for_plan(config)
    if cluster is None:
        from llm_training_toolkit.worker.precision import keep_begun_precision, resolve_local_precision

        config, notes = resolve_local_precision(keep_begun_precision(config))
        return _with_hub_answer(answer, _make_plan(config).with_notes(notes)), None
    from llm_training_toolkit.plan.forecast.cluster_file import read_hardware

    hardware = read_hardware(cluster)
    config, reasons = resolve_for_hardware(config, hardware)
    plan = _with_hub_answer(answer, _make_plan(config).with_notes(reasons))
    estimate = estimate_on_cluster(config, plan, hardware, read_measured_speed(config))
    return estimate.add_to_plan(plan), estimate


def search_run_settings(config: Config, cluster: Path) -> tuple[Plan, SettingsSearch]:
    """Return the plan of a run as it is, and the search for faster and cheaper settings on the cluster of a file.

    Raises PlanError for problems that no searched setting mends, ConfigError for a bad cluster file.
    """
    from llm_training_toolkit.plan.forecast.cluster_file import read_hardware

    config, answer = _ask_for_plan(config)
    plan = _with_hub_answer(answer, _make_plan(config))
    return plan, search_settings(config, plan, read_hardware(cluster))


def _make_plan(config: Config) -> Plan:
    """Return the plan, with the length of a run over epochs estimated by the bytes of its files."""
    plan = make_plan(config)
    if config.train.epochs is None:
        return plan
    from llm_training_toolkit.commands.data_estimate import estimate_data_facts, format_estimate_note

    facts = estimate_data_facts(config)
    if facts is None:
        return plan
    return plan.with_data(facts).with_notes([format_estimate_note(facts, config)])


def read_measured_speed(config: Config) -> MeasuredSpeed | None:
    """Return the speed of the run in its newest steps, or None unless it has begun on this disk and has an MFU."""
    if is_uri(config.run.dir):
        return None
    run = RunDirectory(Path(get_run_location(config)))
    found = read_run_speed(run)
    if found is None:
        return None
    return MeasuredSpeed(found.tokens_per_second, found.mfu, 1e12 * found.tflops / found.mfu, run.name)


def _ask_for_plan(config: Config) -> tuple[Config, HubAnswer | None]:
    """Ask the run in its store, else the hub, for what the plan has to know of the weights."""
    config = recall_stored_plan(config)
    if config.model.path is None:
        return config, None
    from llm_training_toolkit.setup.hub_weights import ask_for_plan  # huggingface_hub takes over a second to import

    return config, ask_for_plan(config)


def _with_hub_answer(answer: HubAnswer | None, plan: Plan) -> Plan:
    """Return the plan with the problem that the hub has with `model.path`, or the note that it could not be asked."""
    if answer is None:
        return plan
    if answer.unreachable:
        note = f"The hub cannot be asked for model.path ({answer.unreachable}): it is checked when training starts."
        plan = replace(plan, notes=(*plan.notes, note))
    if answer.missing_tokenizer:
        note = (
            f"The tokenizer is not here ({answer.missing_tokenizer}): of the families with this class of model, "
            f"{plan.family} is assumed. Training needs it."
        )
        plan = replace(plan, notes=(*plan.notes, note))
    return plan if answer.problem is None else plan.with_problem(answer.problem)
