"""How a run stands before a start: its newest checkpoint, its configuration, its data; and what may change in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llm_training_toolkit.checkpoint import Checkpoint, Manifest, UnknownFormatError, complete
from llm_training_toolkit.config import Config, from_json
from llm_training_toolkit.config.run_identity import refuse_changed_identity
from llm_training_toolkit.data.prepare.builder import Preparation, Prepared
from llm_training_toolkit.data.prepare.dataset_info import Receipt
from llm_training_toolkit.data.prepare.epochs import facts_of
from llm_training_toolkit.errors import CheckpointError, ConfigError, DataError, PlanError
from llm_training_toolkit.plan import DataFacts, Plan, with_precision
from llm_training_toolkit.plan.horizon import covers
from llm_training_toolkit.runs.directory import RunDirectory

DOCUMENTS = "documents"
"""What --accept takes besides field names: the documents themselves are other ones than before."""


@dataclass(frozen=True)
class Standing:
    """What earlier starts have left. Before its first checkpoint a run has no identity to keep."""

    manifest: Manifest | None
    """Of the newest readable checkpoint."""
    config: Config | None
    receipt: Receipt | None

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.manifest.step if self.manifest else 0

    @property
    def sequences(self) -> int:
        """Sequences they have seen."""
        return self.manifest.sequences if self.manifest else 0

    def facts(self, config: Config) -> DataFacts | None:
        """What the plan can know before anything is prepared again; nothing of data that is mixed otherwise."""
        if self.receipt is None or len(self.receipt.streams) != max(len(config.data.weights), 1):
            return None
        return facts_of(self.receipt, self.step, self.sequences)

    def is_finished(self, plan: Plan) -> bool:
        """Whether the run has taken all its steps."""
        return self.manifest is not None and plan.steps is not None and self.step >= plan.steps

    def kept(self, config: Config) -> Config:
        """The configuration with the precision that the run began with, where it leaves that to the machine."""
        if self.manifest is None or self.config is None or config.train.precision != "auto":
            return config
        began_with = self.config.train.precision
        return config if began_with == "auto" else with_precision(config, began_with)

    def prepared(self, config: Config, accept: Sequence[str]) -> Receipt | None:
        """The receipt, if its tokens are there and last to the run's end: the documents need not be read again."""
        facts = self.facts(config)
        if self.manifest is None or self.receipt is None or facts is None or _touches_data(accept):
            return None
        try:
            Prepared.load(self.receipt)
        except DataError:
            return None
        return self.receipt if covers(config, facts) else None


def standing_of(run: RunDirectory) -> Standing:
    """Read how a run stands. Raises CheckpointError for checkpoints of another version of the toolkit."""
    config = from_json(run.resolved.read_text(), where=str(run.resolved)) if run.resolved.is_file() else None
    receipt = Receipt.from_json(run.receipt.read_text()) if run.receipt.is_file() else None
    for directory in reversed(complete(run.checkpoints)):
        try:
            return Standing(Checkpoint(directory).manifest, config, receipt)
        except UnknownFormatError:
            raise
        except CheckpointError:
            continue  # damaged: the workers set it aside and say so
    return Standing(None, config, receipt)


def refuse_changed_run(standing: Standing, config: Config, accept: Sequence[str], *, extend: bool) -> None:
    """Refuse another identity than the run has, unless it is accepted. Raises ConfigError with the difference."""
    if standing.manifest is not None and standing.config is not None:
        if standing.config.data.weights != config.data.weights:
            raise ConfigError(
                "data.sources: the weights of a run that has begun cannot change, because its place in every source "
                "follows from them: change them back, or start another run with model.init_from"
            )
        fields = [key for key in accept if key != DOCUMENTS]
        refuse_changed_identity(standing.config, standing.kept(config), accept=fields, extend=extend)


def refuse_other_weights(standing: Standing, plan: Plan) -> None:
    """Refuse a model of another size than the checkpoint's, before anything is written."""
    if standing.manifest is None:
        return
    saved = sum(math.prod(shape) for shape in standing.manifest.shapes.values())
    if saved != plan.trainable_parameters:
        raise PlanError(
            f"the run's checkpoint holds {saved:,} parameters, the configuration now describes a model of "
            f"{plan.trainable_parameters:,}: take the model back, or start a new run under another run.name"
        )


def refuse_changed_documents(standing: Standing, config: Config, work: Preparation, accept: Sequence[str]) -> None:
    """Refuse other documents than the run began with, unless they, or the fields that name them, are accepted."""
    before = standing.receipt
    if standing.manifest is None or before is None or before.fingerprint == work.fingerprint:
        return
    if config.tokenizer.train is not None and before.tokenizer_path != str(work.tokenizer_path):
        raise ConfigError(
            "the documents have changed since the run began, and a tokenizer trained on them now would be another than "
            "the weights know: bring the documents back, or take another run.name"
        )
    if not _touches_data(accept):
        raise ConfigError(
            "the documents have changed since the run began (paths, sizes or times of modification differ), so the "
            f"order of the data would be another: bring them back, take another run.name, or --accept {DOCUMENTS}"
        )


def _touches_data(accept: Sequence[str]) -> bool:
    return any(key.split(".")[0] in {"data", "tokenizer", "run", DOCUMENTS} for key in accept)
