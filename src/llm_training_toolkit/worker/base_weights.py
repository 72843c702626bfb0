"""The weights that adapters stand beside: always a directory or a hub id, so that a resume and an export find them.

With model.path that is theirs. From scratch, and from another run, whose newest checkpoint is another one tomorrow, the
weights are written to <run>/base at the first start.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from llm_training_toolkit.checkpoint import Checkpoint, newest
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError, ToolkitError
from llm_training_toolkit.export import ModelWeights, appearing, exported_from, write_model
from llm_training_toolkit.export.export_run import beside, read_run, whole_weights
from llm_training_toolkit.models import build_model, initialize
from llm_training_toolkit.plan import Plan
from llm_training_toolkit.runs.directory import run_of
from llm_training_toolkit.worker.spec import Place


def base_path(place: Place, plan: Plan, context: RunContext) -> str:
    """Where the weights lie that the run's adapters stand beside; written there first, if need be. Collective."""
    if place.config.model.path is not None:
        return place.config.model.path
    # One rank writes, and an error of its own must reach the others, which wait.
    failed = ""
    if context.is_first and exported_from(place.run.base) is None:
        try:
            _write(place, plan)
        except ToolkitError as error:
            failed = str(error)
    failed = context.broadcast(failed)
    if failed:
        raise CheckpointError(failed)
    return str(place.run.base)


def _write(place: Place, plan: Plan) -> None:
    if place.config.model.init_from is None:
        _write_first_weights(place, plan)
    else:
        _write_of_another_run(place, place.config.model.init_from)


def _write_first_weights(place: Place, plan: Plan) -> None:
    config = place.config
    model = build_model(plan.hf_config, precision=plan.precision, attention=config.model.attention)
    initialize(model, config.run.seed, lambda _parameter: nullcontext())
    origin = f"seed {config.run.seed}"
    card = (
        f"# {config.run.name}, base\n\nRandom weights of {config.model.name} ({origin}), beside which adapters stand.\n"
    )
    with appearing(place.run.base) as directory:
        write_model(
            ModelWeights(model),
            directory,
            hf_config=plan.hf_config,
            precision=plan.precision,
            beside=beside(config, place.receipt, card, origin),
        )


def _write_of_another_run(place: Place, init_from: str) -> None:
    source = read_run(run_of(Path(init_from).expanduser()))
    found = newest(source.run.checkpoints)
    if found is None:
        raise CheckpointError(f"model.init_from = {init_from}: that run has no complete checkpoint")
    config = place.config
    card = f"# {config.run.name}, base\n\nThe weights of `{init_from}`, {found.name}, beside which adapters stand.\n"
    weights, hf_config = whole_weights(source, Checkpoint(found))
    with appearing(place.run.base) as directory:
        write_model(
            weights,
            directory,
            hf_config=hf_config,
            precision=config.train.precision,
            beside=beside(config, place.receipt, card, f"{init_from} {found.name}"),
        )
