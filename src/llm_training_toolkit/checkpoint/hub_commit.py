"""Commit of the hub repository that a run's weights come from, recorded so that a resume uses the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llm_training_toolkit.config.model_config import ModelConfig

HUB_KEY = "hub"  # in the `extra` of a manifest, and in the record of an attempt
DEFAULT_REVISION = "main"
# Files that are fetched of a repository: skips a second copy of the weights in another format.
WEIGHT_PATTERNS = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]


@dataclass(frozen=True)
class HubCommit:
    """Commit that a revision of `model.path` meant when the run began."""

    path: str
    """Hub id, as given."""
    revision: str
    """Branch, tag or commit, as given."""
    commit: str

    @property
    def can_move(self) -> bool:
        """Return whether the revision is a name, which may mean another commit later."""
        return not self.commit.startswith(self.revision)

    def to_json(self) -> dict[str, str]:
        """Return the stored form."""
        return asdict(self)


def get_revision(model: ModelConfig) -> str:
    """Return the revision that a hub id in `model.path` is read at."""
    return model.revision or DEFAULT_REVISION


def find_hub_commit(record: Mapping[str, Any], model: ModelConfig) -> HubCommit | None:
    """Return the commit in a manifest's `extra` or an attempt's record; None if it is of another path or revision."""
    found = record.get(HUB_KEY)
    if not isinstance(found, Mapping) or (found["path"], found["revision"]) != (model.path, get_revision(model)):
        return None
    return HubCommit(**found)
