"""A run that has prepared its data: directory, configuration, dataset, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from llm_training_toolkit import families
from llm_training_toolkit.checkpoint.base_weights import find_weights_directory
from llm_training_toolkit.checkpoint.hub_commit import find_hub_commit
from llm_training_toolkit.checkpoint.reader import CheckpointReader, find_latest_checkpoint
from llm_training_toolkit.config import Config, parse_config_json
from llm_training_toolkit.data.prepare.dataset_info import DatasetInfo
from llm_training_toolkit.errors import CheckpointError
from llm_training_toolkit.families import AdapterSpec
from llm_training_toolkit.runs.directory import RunDirectory


@dataclass(frozen=True)
class Run:
    """Everything that is known of a run once its data is prepared."""

    directory: RunDirectory
    config: Config
    dataset_info: DatasetInfo

    @classmethod
    def read(cls, directory: RunDirectory) -> Run:
        """Read the run in a directory. Raises CheckpointError if nothing was trained."""
        if not directory.dataset_info_path.is_file():
            raise CheckpointError(f"{directory.path}: nothing was trained there yet (no data/dataset_info.json)")
        config = parse_config_json(
            directory.resolved_config_path.read_text(), where=str(directory.resolved_config_path)
        )
        config = families.recall_plan(config, directory.path)  # which may be a mirror, or have been moved
        return cls(directory, config, DatasetInfo.from_json(directory.dataset_info_path.read_text()))

    def open_latest_checkpoint(self) -> CheckpointReader | None:
        """Open the newest complete checkpoint. Raises CheckpointError if its manifest is unreadable."""
        found = find_latest_checkpoint(self.directory.checkpoints_dir)
        return CheckpointReader(found, self.directory.storage) if found else None

    def get_adapter(self, checkpoint: CheckpointReader) -> AdapterSpec | None:
        """Return the run's adapters, or None for full training."""
        return families.resolve_adapter(self.config, checkpoint.manifest.extra["hf_config"])

    @property
    def base_path(self) -> str:
        """Location of the base weights that the adapters belong to, as given."""
        return self.config.model.path or str(self.directory.base_weights_dir)

    def find_base_directory(self, checkpoint: CheckpointReader) -> str:
        """Return the directory of these weights on this machine, of a hub id at the commit they were trained beside."""
        hub = find_hub_commit(checkpoint.manifest.extra, self.config.model)
        return str(find_weights_directory(self.base_path, hub.commit if hub else None))
