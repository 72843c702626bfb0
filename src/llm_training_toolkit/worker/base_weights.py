"""Base weights of adapters: always in a directory or on the hub, so that a resume and an export find them.

With model.path they are used where they are. From scratch, and from another run (its newest checkpoint changes), they
are written to <run>/base at the first start.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from llm_training_toolkit.checkpoint.run import Run
from llm_training_toolkit.distributed.context import RunContext
from llm_training_toolkit.errors import CheckpointError, ToolkitError
from llm_training_toolkit.export import ModelWeights, atomic_export_dir, read_source_checkpoint_name, write_model
from llm_training_toolkit.export.export_run import build_full_weights, build_model_files
from llm_training_toolkit.models import build_model, initialize_weights
from llm_training_toolkit.plan import Plan
from llm_training_toolkit.runs.directory import RunDirectory, check_run
from llm_training_toolkit.worker.spec import WorkerSpec


def ensure_base_weights(spec: WorkerSpec, plan: Plan, context: RunContext) -> str:
    """Return the path of the base weights of the run's adapters; write them first if needed. Collective."""
    if spec.config.model.path is not None:
        return spec.config.model.path
    # Rank 0 alone writes; its error must reach the ranks that wait.
    failed = ""
    if context.is_rank_zero and read_source_checkpoint_name(spec.directory.base_weights_dir) is None:
        try:
            _write_base_weights(spec, plan)
        except ToolkitError as error:
            failed = str(error)
    failed = context.broadcast_object(failed)
    if failed:
        raise CheckpointError(failed)
    return str(spec.directory.base_weights_dir)


def _write_base_weights(spec: WorkerSpec, plan: Plan) -> None:
    if spec.config.model.init_from is None:
        _write_random_weights(spec, plan)
    else:
        _write_weights_from_run(spec, spec.config.model.init_from)


def _write_random_weights(spec: WorkerSpec, plan: Plan) -> None:
    config = spec.config
    model = build_model(plan.hf_config, precision=plan.precision, attention="sdpa")
    initialize_weights(model, config.run.seed, lambda _parameter: nullcontext())
    origin = f"seed {config.run.seed}"
    card = (
        f"# {config.run.name}, base\n\nRandom weights of {config.model.name} ({origin}), beside which adapters stand.\n"
    )
    with atomic_export_dir(spec.directory.base_weights_dir) as directory:
        write_model(
            ModelWeights(model),
            directory,
            hf_config=plan.hf_config,
            precision=plan.precision,
            beside=build_model_files(config, spec.dataset_info, card, origin),
        )


def _write_weights_from_run(spec: WorkerSpec, init_from: str) -> None:
    source = Run.read(check_run(RunDirectory(Path(init_from).expanduser())))
    checkpoint = source.open_latest_checkpoint()
    if checkpoint is None:
        raise CheckpointError(f"model.init_from = {init_from}: that run has no complete checkpoint")
    config, name = spec.config, checkpoint.directory.name
    card = f"# {config.run.name}, base\n\nThe weights of `{init_from}`, {name}, beside which adapters stand.\n"
    weights, hf_config = build_full_weights(source, checkpoint)
    with atomic_export_dir(spec.directory.base_weights_dir) as directory:
        write_model(
            weights,
            directory,
            hf_config=hf_config,
            precision=config.train.precision,
            beside=build_model_files(config, spec.dataset_info, card, f"{init_from} {name}"),
        )
