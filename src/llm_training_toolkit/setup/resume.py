"""Resume state of a run (newest checkpoint, configuration, data), and checks of changes to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_training_toolkit.checkpoint import CheckpointReader, Manifest, UnknownFormatError, list_complete_checkpoints
from llm_training_toolkit.config import Config, parse_config_json
from llm_training_toolkit.config.run_identity import check_config_changes, fingerprint
from llm_training_toolkit.data.prepare.builder import DatasetBuilder
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo, PreparedDataset
from llm_training_toolkit.data.prepare.epochs import build_data_facts
from llm_training_toolkit.errors import CheckpointError, ConfigError, DataError, PlanError
from llm_training_toolkit.families import ASSUMED_DIMENSIONS
from llm_training_toolkit.plan import DataFacts, Plan, with_precision
from llm_training_toolkit.plan.horizon import is_prepared
from llm_training_toolkit.runs.directory import RunDirectory

DOCUMENTS = "documents"  # value of --accept besides field names: the documents themselves have changed


@dataclass(frozen=True)
class ResumeState:
    """State that earlier attempts left. Before its first checkpoint a run has no identity to keep."""

    manifest: Manifest | None
    """Manifest of the newest readable checkpoint."""
    config: Config | None
    dataset_info: DatasetInfo | None

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.manifest.step if self.manifest else 0

    @property
    def sequences(self) -> int:
        """Sequences seen in these steps."""
        return self.manifest.sequences if self.manifest else 0

    def build_data_facts(self, config: Config) -> DataFacts | None:
        """Return the data facts known before preparation, or None if the sources are mixed differently."""
        if self.dataset_info is None or len(self.dataset_info.streams) != max(len(config.data.source_weights), 1):
            return None
        return build_data_facts(self.dataset_info, self.step, self.sequences)

    def is_finished(self, plan: Plan) -> bool:
        """Return whether the run has completed all its steps."""
        return self.manifest is not None and plan.steps is not None and self.step >= plan.steps

    def keep_saved_precision(self, config: Config) -> Config:
        """Return the configuration with `auto` replaced by the precision that the run began with."""
        if self.manifest is None or self.config is None or config.train.precision != "auto":
            return config
        began_with = self.config.train.precision
        return config if began_with == "auto" else with_precision(config, began_with)

    def find_reusable_dataset(self, config: Config, accept: Sequence[str]) -> DatasetInfo | None:
        """Return the dataset info if its tokens exist and last to the end of the run: no document is read again."""
        facts = self.build_data_facts(config)
        if self.manifest is None or self.dataset_info is None or facts is None or _accepts_changed_data(accept):
            return None
        try:
            PreparedDataset.from_info(self.dataset_info)
        except DataError:
            return None
        return self.dataset_info if is_prepared(config, facts) else None


def read_resume_state(run: RunDirectory) -> ResumeState:
    """Read the state of a run. Raises CheckpointError for checkpoints of another version of the toolkit."""
    config = (
        parse_config_json(run.resolved_config_path.read_text(), where=str(run.resolved_config_path))
        if run.resolved_config_path.is_file()
        else None
    )
    dataset_info = DatasetInfo.from_json(run.dataset_info_path.read_text()) if run.dataset_info_path.is_file() else None
    for directory in reversed(list_complete_checkpoints(run.checkpoints_dir)):
        try:
            return ResumeState(CheckpointReader(directory, run.storage).manifest, config, dataset_info)
        except UnknownFormatError:
            raise
        except CheckpointError:
            continue  # damaged: the workers quarantine and report it
    return ResumeState(None, config, dataset_info)


def check_run_unchanged(resume_state: ResumeState, config: Config, accept: Sequence[str], *, extend: bool) -> None:
    """Raise ConfigError with the difference if the identity of the run changes without being accepted."""
    if resume_state.manifest is not None and resume_state.config is None:
        _check_fingerprint(resume_state.manifest, config)
    if resume_state.manifest is not None and resume_state.config is not None:
        if resume_state.config.data.source_weights != config.data.source_weights:
            raise ConfigError(
                "data.sources: the weights of a run that has begun cannot change, because its place in every source "
                "follows from them: change them back, or start another run with model.init_from"
            )
        fields = [key for key in accept if key != DOCUMENTS]
        check_config_changes(
            resume_state.config, resume_state.keep_saved_precision(config), accept=fields, extend=extend
        )


def _check_fingerprint(manifest: Manifest, config: Config) -> None:
    """Raise ConfigError if the identity differs from the checkpoint's, for a run that has lost its resolved.json."""
    candidates = [config, *(with_precision(config, precision) for precision in ("bf16", "fp32"))]
    if manifest.config_fingerprint not in {fingerprint(candidate) for candidate in candidates}:
        raise ConfigError(
            "the run has begun with another configuration, and its resolved.json, which says what differs, is missing "
            f"(fingerprint {manifest.config_fingerprint[:12]} in the checkpoint of step {manifest.step}): bring the "
            "file or the configuration back, or take another run.name"
        )


def check_checkpoint_size(resume_state: ResumeState, plan: Plan) -> None:
    """Raise PlanError, before any write, if the model's size differs from the checkpoint's."""
    if resume_state.manifest is None:
        return
    saved = sum(math.prod(shape) for shape in resume_state.manifest.shapes.values())
    if saved != plan.trainable_parameters:
        remedy = "take the model back, or start a new run under another run.name"
        if ASSUMED_DIMENSIONS in plan.estimated:
            remedy = (
                f"this size is assumed by the name {plan.model}, as the hub did not answer for model.path. Give the "
                "same command again once the hub answers"
            )
        raise PlanError(
            f"the run's checkpoint holds {saved:,} parameters, the configuration now describes a model of "
            f"{plan.trainable_parameters:,}: {remedy}"
        )


def check_documents_unchanged(
    resume_state: ResumeState, config: Config, work: DatasetBuilder, accept: Sequence[str]
) -> None:
    """Raise ConfigError if the documents changed since the run began, unless they or their fields are accepted."""
    before = resume_state.dataset_info
    if resume_state.manifest is None or before is None or before.fingerprint == work.fingerprint:
        return
    if config.tokenizer.train is not None and before.tokenizer_path != str(work.tokenizer_path):
        raise ConfigError(
            "the documents have changed since the run began, and a tokenizer trained on them now would be another than "
            "the weights know: bring the documents back, or take another run.name"
        )
    if not _accepts_changed_data(accept):
        raise ConfigError(
            "the documents have changed since the run began (paths, sizes or times of modification differ), so the "
            f"order of the data would be another: bring them back, take another run.name, or --accept {DOCUMENTS}"
        )


def _accepts_changed_data(accept: Sequence[str]) -> bool:
    return any(key.split(".")[0] in {"data", "eval", "tokenizer", "run", DOCUMENTS} for key in accept)
