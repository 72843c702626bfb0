"""Early check of initial weights: unsuitable ones end the run before its documents are read."""

from __future__ import annotations

from pathlib import Path

from llm_training_toolkit import families
from llm_training_toolkit.checkpoint.hub_commit import HubCommit, find_hub_commit
from llm_training_toolkit.config import Config
from llm_training_toolkit.errors import CheckpointError, PlanError
from llm_training_toolkit.plan import Plan
from llm_training_toolkit.plan.checks.run_check import is_directory_or_hub_id
from llm_training_toolkit.setup.hub_weights import HubAnswer, ask_hub, ask_hub_commit
from llm_training_toolkit.setup.machine import is_local
from llm_training_toolkit.setup.resume import ResumeState


def check_initial_weights(
    config: Config, plan: Plan, resume_state: ResumeState, answer: HubAnswer | None = None
) -> None:
    """Raise PlanError or CheckpointError if the weights at model.path are missing or do not match.

    `answer` is that of the hub for a run that has not begun; without one the hub is asked.
    Every worker checks again, because its machine may have other files. A run that has begun needs these weights only
    for adapters.
    """
    path = config.model.path
    if path is None or (resume_state.manifest is not None and config.model.lora is None):
        return
    if not is_directory_or_hub_id(path):
        raise PlanError(
            f"model.path = {path}: there is no such directory: give that of the weights, or a hub id "
            "(organisation/name)"
        )
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error  # seconds to import

    from llm_training_toolkit.models.check_weights import check_pretrained_weights, read_hf_config

    disable_progress_bar()
    set_verbosity_error()  # the error below replaces its table
    model_type = plan.hf_config["model_type"]
    if Path(path).expanduser().is_dir():
        check_pretrained_weights(path, model_type)
        return
    starts_here = config.cluster.workers == 0 or is_local()
    hub = _find_recorded_commit(config, resume_state)
    revision = hub.commit if hub else config.model.revision
    if starts_here and (problem := (answer or ask_hub(path, revision)).problem) is not None:
        raise PlanError(str(problem))  # elsewhere the nodes may have another login
    try:
        published = read_hf_config(path, model_type, revision).to_dict()
    except CheckpointError:
        if starts_here:
            raise
        return  # the hub is unreachable here, but the workers' machines may have the weights
    found = families.count_parameters({**published, "vocab_size": plan.hf_config["vocab_size"]})
    if found != plan.parameters:
        raise PlanError(
            f"model.path = {path} holds a model of {found:,} parameters, {config.model.name} has {plan.parameters:,}: "
            "correct one of them"
        )


def _find_recorded_commit(config: Config, resume_state: ResumeState) -> HubCommit | None:
    return None if resume_state.manifest is None else find_hub_commit(resume_state.manifest.extra, config.model)


def find_moved_branch(config: Config, resume_state: ResumeState) -> str | None:
    """Return a note if the hub's branch has moved from the commit that the run began with, else or offline None."""
    hub = _find_recorded_commit(config, resume_state)
    if hub is None or not hub.can_move:
        return None
    now = ask_hub_commit(hub.path, hub.revision)  # a resume does not depend on the hub
    if now is None or now == hub.commit:
        return None
    return (
        f"model.path = {hub.path}: {hub.revision} has moved on the hub, from commit {hub.commit[:12]} to {now[:12]}. "
        f"The run keeps {hub.commit[:12]}, which it began with"
    )
